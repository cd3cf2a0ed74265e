"""GraphVite: node embeddings from pairs that random walks bring, in blocks that workers train without talking.

    max  sum over pairs (h, t) of  log sigmoid(V_h . C_t) + w sum_{k=1..K} log sigmoid(-V_h . C_{n_k})

Zhu, Xu, Qu and Tang, "GraphVite: A High-Performance CPU-GPU Hybrid System for Node Embedding", WWW 2019,
arXiv:1903.00757; code `DeepGraphLearning/graphvite`, of which this is the node embedding. Threads walk the graph and
put pairs into a pool (`sampling.py`). Nodes are dealt to P parts; the pool has a block for each part of heads and part
of tails. W workers train blocks that share neither heads nor tails, and draw negatives n_k from their own part of
tails (`partition.py`). The next pool is drawn while this one is trained (`training.py`).

    embedding = graphvite.embed(edges, num_nodes, 128, jax.random.key(0), graphvite.LINE)
    embedding.vertex                                  # [N, 128], features of nodes
    graphvite.link_scores(embedding, pairs)           # logits of links

| model | s `augmentation_step` | b `shuffle_base` | p, q | epochs |
|---|---|---|---|---|
| `LINE` | by density; published: Youtube 5, Flickr 1 | s | | Youtube 4000, others 2000 |
| `DEEPWALK` | as LINE | 1 | | Youtube 4000 |
| `node2vec(p, q)` | as LINE | 1 | Youtube 4, 2 | Youtube 4000 |

Two backends train a block. "host" is the definition, sample by sample, in compiled loops: blocks keep threads apart,
so the result is the same for any number of them. "device" (`device.py`) is JAX: micro-batches within a block, workers
on the devices of a mesh, tail parts in place and head parts going round.

Differs from the paper and the official code: there, threads of a GPU update rows without locks; here an order is kept.
Second-order walks reject steps instead of keeping a table for each edge: the same distribution in O(E) memory. Repeated
edges add their weights up. SGD is the only optimizer. Training is cut into equal episodes, 30 or more, of at most
2 * 10^7 samples or 16 a node; official sizes are `block_samples` = episode size times batch size.
"""

from jaxlab.graph.embedding.graphvite import device, partition
from jaxlab.graph.embedding.graphvite.sampling import Graph, Sampling, graph, pool, walks
from jaxlab.graph.embedding.graphvite.training import Embedding, Training, embed, link_scores, train_samples

LINE = Sampling()
DEEPWALK = Sampling(shuffle_base=1)


def node2vec(p: float = 4.0, q: float = 2.0) -> Sampling:
  """Walks of second order; the defaults are those for Youtube."""
  return Sampling(shuffle_base=1, p=p, q=q)


__all__ = [
  "DEEPWALK",
  "LINE",
  "Embedding",
  "Graph",
  "Sampling",
  "Training",
  "device",
  "embed",
  "graph",
  "link_scores",
  "node2vec",
  "partition",
  "pool",
  "train_samples",
  "walks",
]
