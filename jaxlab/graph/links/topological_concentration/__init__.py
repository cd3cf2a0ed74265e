"""Topological concentration (TC): how much of a node's neighbourhood its neighbours share, and link prediction by it.

    TC(i) = mean over j in N^t(i) of  |tree(i) & tree(j)| / |tree(i)|      trees: walks of up to K steps on train edges
    ATC(i) = mean over j in N^t(i) of  phi(H_i, H_j),   H = sum_k alpha_k (D^-1 A)^k R,   R random

Wang, Zhao, Zhao, Liu, Cheng, Shah and Derr, "A Topological Perspective on Demystifying GNN-Based Link Prediction
Performance", ICLR 2024, arXiv:2310.04612; code `YuWVandy/Topo_LP_GNN`. Symbols: K is `depth`, beta `decay`, N^t(i) the
neighbours of i by edges of a split t (`targets`; train edges themselves by default), R's width d is `width`.

    measures         exact TC on the host, `concentration`; ATC on the device, `approximate`; the one-hop form with edge
                     weights, `weighted_concentration`; what a split changes, `shift`
    predictor        `LinkPredictor`, GCN or SAGE and an MLP on h_i * h_j; `reweight`, which moves message weight to
                     neighbours of high score, so that TC rises; a builder and a recipe for each published result
    training         `Batches` and `learner`; `rank_nodes` and `node_metrics`, the ranking of all nodes for each node

Differs from the paper: the share is of tree(i) alone, with multiplicity, as in the code, and not of a general function
of both. The code has no ATC; it is written here from the paper. Differs from the official code: weighted TC is 0 for
nodes without neighbours, where it divides by 0; train edges are not ranked at evaluation.
"""

from jaxlab.graph.links.topological_concentration.measures import (
  Shift,
  approximate,
  concentration,
  edge_overlap,
  embed,
  shift,
  weighted_concentration,
)
from jaxlab.graph.links.topological_concentration.predictor import (
  RECIPES,
  Encoder,
  LinkPredictor,
  Recipe,
  Reweighting,
  citeseer,
  collab,
  cora,
  degree_weights,
  from_torch,
  pubmed,
  reptile,
  reweight,
  vole,
)
from jaxlab.graph.links.topological_concentration.training import (
  Batch,
  Batches,
  Best,
  NodeMetrics,
  State,
  Task,
  learner,
  node_metrics,
  rank_nodes,
  task,
)

__all__ = [
  "RECIPES",
  "Batch",
  "Batches",
  "Best",
  "Encoder",
  "LinkPredictor",
  "NodeMetrics",
  "Recipe",
  "Reweighting",
  "Shift",
  "State",
  "Task",
  "approximate",
  "citeseer",
  "collab",
  "concentration",
  "cora",
  "degree_weights",
  "edge_overlap",
  "embed",
  "from_torch",
  "learner",
  "node_metrics",
  "pubmed",
  "rank_nodes",
  "reptile",
  "reweight",
  "shift",
  "task",
  "vole",
  "weighted_concentration",
]
