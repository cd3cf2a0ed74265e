"""Local interaction basis: features of a network that matter for what it computes next and interact sparsely.

    x^ = x C,   C = R V Lambda^(1/2),   f^(x^) = f(x^ C^+) C',   E[i, j] = mean (sum_s d f^_i / d x^_sj  x^_sj)^2

R whitens a node layer's activations x, dropping directions without variance; V are the eigenvectors of the expected
Gram matrix M = mean R^+ J^T J R^+^T of the Jacobian J to the features C' of the next node layer, and Lambda its
eigenvalues. So C is found from the outputs backwards. E are edges of the interaction graph.
Bushnaq et al., "The Local Interaction Basis: Identifying Computationally-Relevant and Sparsely Interacting Features in
Neural Networks", 2024, arXiv:2405.10928; code `ApolloResearch/rib`. Symbols: C is `Basis.into`, C^+ `Basis.back`,
Lambda `Basis.importance`, M' `jacobian_gram`, E `Graph.edges`.

    network = mlp([params["Dense_0"], params["Dense_1"]])     # or modular_addition(params), or sections of your own
    x = with_one(images.reshape(n, -1))[:, None]              # activations [examples, positions, features], the last 1
    graph = interaction_graph(network, x)                     # method="pca" is the baseline
    score = functools.partial(accuracy, labels=labels)
    feature_curve(network, graph, layer, x, score, schedule(width))   # with the most important features alone
    edges_required(network, graph, layer, x, score)                   # how few edges do

A network is a chain of sections between node layers, with biases folded in, so that every activation ends in a 1:
`dense`, `block` (a residual perceptron), `attention`, `conv` and `readout` fold what flax trains, `Chain` joins several
to one section, and any pytree that can be called is one. Positions are tokens or pixels; all sums are over them.

Bases and edges are computed in float64, whether or not JAX's 64 bits are enabled, since a float32 Gram matrix of
activations that do not fill their space has directions that are only roundoff. Ablations are in the data's dtype.
Jacobians are held for one batch of examples; of dense layers and blocks none is formed, and edges are derivatives along
single features.

Differs from the paper and the official code: the constant is split off before the eigendecomposition, which there must
find it among the eigenvectors; a constant of no importance stays, unscaled; convolutional nets, with pixels as
positions; no node layers inside a layer norm (language models), no older edge formula and no modules by clustering.
"""

from jaxlab.analysis.local_interaction_basis.ablation import (
  Required,
  accuracy,
  edges_required,
  feature_curve,
  keep_edges,
  keep_features,
  schedule,
  strongest,
)
from jaxlab.analysis.local_interaction_basis.basis import (
  Basis,
  Graph,
  activations,
  interaction_graph,
  moments,
  principal,
  rotated,
)
from jaxlab.analysis.local_interaction_basis.gradients import edge_weights, gradient_gram, jacobian_gram, nodes
from jaxlab.analysis.local_interaction_basis.sections import (
  Attention,
  Block,
  Chain,
  Conv,
  Dense,
  Readout,
  attention,
  block,
  conv,
  dense,
  mlp,
  readout,
  run,
  with_one,
)
from jaxlab.analysis.local_interaction_basis.transformer import (
  ModularAddition,
  embed,
  from_torch,
  modular_addition,
  pairs,
)

__all__ = [
  "Attention",
  "Basis",
  "Block",
  "Chain",
  "Conv",
  "Dense",
  "Graph",
  "ModularAddition",
  "Readout",
  "Required",
  "accuracy",
  "activations",
  "attention",
  "block",
  "conv",
  "dense",
  "edge_weights",
  "edges_required",
  "embed",
  "feature_curve",
  "from_torch",
  "gradient_gram",
  "interaction_graph",
  "jacobian_gram",
  "keep_edges",
  "keep_features",
  "mlp",
  "modular_addition",
  "moments",
  "nodes",
  "pairs",
  "principal",
  "readout",
  "rotated",
  "run",
  "schedule",
  "strongest",
  "with_one",
]
