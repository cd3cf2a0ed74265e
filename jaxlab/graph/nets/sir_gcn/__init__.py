"""SIR-GCN: a graph convolution whose nonlinearity sits between the sum of an edge's two ends and the sum over edges.

    y_u = W_R sum_{v -> u} sigma(W_Q x_u + W_K x_v)          with edge features: sigma(W_Q x_u + W_K x_v + W_E e_vu)

Lim, Lim, Lim and Naval, "Contextualized Messages Boost Graph Representations", TMLR 2025, arXiv:2403.12529; code
`briangodwinlim/SIR-GCN`. Symbols: W_Q, W_K, W_E, W_R are `query`, `key`, `edge`, `relation`, sigma is `activation`.
The centre u decides which channels of each neighbour v pass (anisotropic, dynamic), at the cost of one addition and one
activation an edge: O(N h d_in + |E| h + N d_out h). With sigma = identity it is GCN, GraphSAGE or GIN, see `SIRConv`.
On CPU and for the activations of `pairwise.ACTIVATIONS`, no array over edges is made.

    convolution   `SIRConv`, which with edge features is the official SIREConv; `SIRConvBase`, likewise SIREConvBase
    networks      `SIRGCN` and `PreNormSIRGCN`, the models of all benchmarks; `DictionaryLookup` and `HeteroEdgeCount`,
                  those of the synthetic tasks; `from_torch`
    published     a builder and a recipe for each published result; penalty, loss and learning rate of the recipes

Differs from the paper: b_R is added once a node after the sum, not once a message, as in the official code. Differs
from the official code: the ideas that all of its recipes turn off are left out (jumping knowledge, DropEdge, virtual
nodes, ContraNorm); where two messages are the largest, `max` shares the gradient between them; the variance that batch
normalisation remembers is the biased one.
"""

from jaxlab.graph.nets.sir_gcn.convolution import Activation, Aggregation, SIRConv, SIRConvBase
from jaxlab.graph.nets.sir_gcn.networks import (
  SIRGCN,
  DictionaryLookup,
  HeteroEdgeCount,
  Norm,
  PreNormSIRGCN,
  from_torch,
)
from jaxlab.graph.nets.sir_gcn.published import (
  ATOM_FEATURES,
  RECIPES,
  Plateau,
  Recipe,
  amazon_ratings,
  arxiv,
  cifar10,
  cluster,
  dictionary_lookup,
  first_rate,
  hetero_edge_count,
  log_cross_entropy,
  minesweeper,
  mnist,
  molhiv,
  next_rate,
  pattern,
  penalty,
  questions,
  roman_empire,
  tolokers,
  wikics,
  zinc,
)

__all__ = [
  "Activation",
  "Aggregation",
  "SIRConv",
  "SIRConvBase",
  "SIRGCN",
  "DictionaryLookup",
  "HeteroEdgeCount",
  "Norm",
  "PreNormSIRGCN",
  "from_torch",
  "ATOM_FEATURES",
  "RECIPES",
  "Plateau",
  "Recipe",
  "amazon_ratings",
  "arxiv",
  "cifar10",
  "cluster",
  "dictionary_lookup",
  "first_rate",
  "hetero_edge_count",
  "log_cross_entropy",
  "minesweeper",
  "mnist",
  "molhiv",
  "next_rate",
  "pattern",
  "penalty",
  "questions",
  "roman_empire",
  "tolokers",
  "wikics",
  "zinc",
]
