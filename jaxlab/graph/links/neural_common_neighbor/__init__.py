"""NCN and NCNC: a link is scored from its two ends and from their common neighbours, seen and (NCNC) probable.

    H = MPNN(X, A),   H' = H + mlp(H),
    logit(i, j) = mlp( beta * mlp(s_ij) + mlp(H_i * H_j) )
    NCN:   s_ij = sum over u in N(i) & N(j) of H'_u
    NCNC:  s_ij += sum over u in N(i) \\ N(j) of P_ju H'_u  +  sum over u in N(j) \\ N(i) of P_iu H'_u
           P = alpha pt g / (pt g + 1 - g),   g = sigmoid(scale (r - offset)),   r = NCN's own logit of the pair

Wang, Yang and Zhang, "Neural Common Neighbor with Completion for Link Prediction", ICLR 2024, arXiv:2302.00890; code
`GraphPKU/NeuralCommonNeighbor`. The MPNN runs once on the whole graph; `common_neighbors.pairs` lists the sets N on the
host. Pairs are a `common_neighbors.Pairs` with the depth that the head completes to.

The code's names for the heads, `variant`: cn0 is a graph auto-encoder (GAE), cn1 is NCN, incn1cn1 is NCNC (with
`depth=2` NCNC2), scn1 and sincn1cn1 count neighbours where these two sum embeddings, cn1res adds the exclusive
neighbours with weight 1 (NCN-diff), cn1.5 (NCN2) and cn2 add neighbours at two hops. Its blocks: xlin is
`node`, xcnlin `common`, xijlin `product`, lin `score`, ptlin `prior`.

Differs from the paper: `inner="official"` scores candidates as the code does, on H' in place of H (so that the residual
acts twice) and with dropout in training; `inner="paper"` on the embeddings that the outer pair sees, without dropout.
Differs from the official code: blocks that a variant does not use have no parameters; a candidate pair that occurs
several times in a batch is scored once; those without common neighbours share one evaluation of `common`, hence one
dropout mask there.
"""

from jaxlab.graph.links.neural_common_neighbor.networks import (
  MLP,
  Conv,
  Encoder,
  Head,
  LinkPredictor,
  Variant,
  aggregate,
  calibrate,
)
from jaxlab.graph.links.neural_common_neighbor.variants import (
  RECIPES,
  Recipe,
  citation2,
  citeseer,
  collab,
  cora,
  ddi,
  from_torch,
  ppa,
  pubmed,
)

__all__ = [
  "MLP",
  "RECIPES",
  "Conv",
  "Encoder",
  "Head",
  "LinkPredictor",
  "Recipe",
  "Variant",
  "aggregate",
  "calibrate",
  "citation2",
  "citeseer",
  "collab",
  "cora",
  "ddi",
  "from_torch",
  "ppa",
  "pubmed",
]
