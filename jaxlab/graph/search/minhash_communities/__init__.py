"""MinHash communities: the neighbours of each vertex as a short signature, and communities grown from a few seeds.

    h_i(u) = ((a_i u + b_i) mod 2^64) mod 3000000019 mod 3000000000,     sig[v, i] = min_{u -> v} h_i(u)
    J(v, w) ~ share of equal entries of sig[v], sig[w]

Chamberlain, Levy-Kramer, Humby and Deisenroth, "Real-time community detection in large social networks on a laptop",
PLOS ONE 13(1), 2018, arXiv:1601.03958; code `melifluos/LSH-community-detection`. J is the Jaccard similarity of two
sets of in-neighbours (followers); the estimate is unbiased with variance J (1 - J) / H for H hashes. A table of
locality-sensitive hashes cuts signatures into b bands of r; two vertices are candidates for each other if a band is
equal, which happens with probability 1 - (1 - J^r)^b.

    hashes = hash_family(100)
    index = build(signatures(blocks_of_edges, num_vertices, hashes), bands=50)
    active = candidates(index, seeds)
    community = minrank(index.signatures, seeds, active, size=50).vertices

| setting | H `num_hashes` | b `bands` | seeds |
|---|---|---|---|
| Twitter | 1000 | 500 | 30 |
| email-Eu-core | 100 | 50 | 5 |

`hashing.py` reads a stream of edges, `table.py` is the table, `ranking.py` orders candidates by their similarity to
the seeds (`initial_averages`), to the community as it grows (`minrank`) or by personalised PageRank; these are host
code for answers within milliseconds. `device.py` has the same queries in JAX. `quality.py` judges communities and shows
their structure (`walktrap`).

Differs from the official code: vertices without in-neighbours are similar to nobody unless `mask_empty=False`; bands
are compared as they are instead of by a 32-bit hash; equal scores are resolved by the lowest vertex; sums of
similarities are integers, so that the running mean of `minrank` has no rounding; the weight that leaves a community
does not count its members' similarity to themselves.
"""

from jaxlab.graph.search.minhash_communities import device
from jaxlab.graph.search.minhash_communities.hashing import EMPTY, HashFamily, hash_family, merge, signatures
from jaxlab.graph.search.minhash_communities.quality import (
  Quality,
  assess,
  clustering,
  cohesiveness,
  conductance,
  density,
  separability,
  walktrap,
)
from jaxlab.graph.search.minhash_communities.ranking import Ranking, initial_averages, minrank, pagerank, similarity
from jaxlab.graph.search.minhash_communities.table import Index, build, candidates

__all__ = [
  "EMPTY",
  "HashFamily",
  "Index",
  "Quality",
  "Ranking",
  "assess",
  "build",
  "candidates",
  "clustering",
  "cohesiveness",
  "conductance",
  "density",
  "device",
  "hash_family",
  "initial_averages",
  "merge",
  "minrank",
  "pagerank",
  "separability",
  "signatures",
  "similarity",
  "walktrap",
]
