"""Graph Mamba: nodes as sequences of subgraphs, graphs as sequences of nodes, both read by selective state spaces.

    y_v = last of blocks(phi(T_m(v)), ..., phi(T_1(v)), phi({v}))        for every node, from wide to narrow tokens
    Y  <- block(Y by degree) + MPNN(G, X)                                for all nodes of a graph, hubs last

Behrouz and Hashemi, "Graph Mamba: Towards Learning on Graphs with State Space Models", KDD 2024, arXiv:2402.08678,
algorithms 1 and 2; no official code is public. Symbols: T are the tokens of `graph.tokens` (m is their `length`, M
`walks`, s `repetitions`), phi is `local`, a block is `nn.mamba.BidirectionalMamba`, the MPNN is Psi. Without tokens
(m = 0) y_v is a linear map of the node's features, and the network is GPS with a state space in place of attention.
Encodings (P of X || P) come from `graph.encodings`, as columns of the node features.

Chosen where the paper does not say: the residual around a block; phi is gated graph convolutions on the induced
subgraph, whose own node is marked, then mean || own node; later MPNNs read Y; mean pooling and an MLP for graphs. The
mark matters: gated convolution is a weighted mean, so that without it constant features stay constant, and tokens could
not tell graphs apart that colour refinement cannot. Ties of degree are in the order of node numbers, in training in a
random one. Outputs follow a renumbering of the nodes exactly where `scores` are distinct and tokens are drawn with the
nodes' keys; otherwise up to the order of ties.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Bool, Float, Int

from jaxlab import checks
from jaxlab.graph import encodings, layers, sparse, structure
from jaxlab.graph.tokens import SubgraphTokens, WalkTokens
from jaxlab.nn.mamba import BidirectionalMamba
from jaxlab.nn.selective_scan import Discretization

Tokens = SubgraphTokens | WalkTokens


class GraphMamba(nn.Module):
  """Network for nodes or for whole graphs.

  Attributes:
    num_outputs: C, classes or regression targets.
    task: "node" for an output a node, "graph" for an output a graph.
    features: d, width of tokens and nodes.
    num_layers: layers over the sequence of nodes.
    token_layers: blocks over each node's tokens.
    local: phi: "gated_gcn" or "mean" (of the members' features) for `SubgraphTokens`, "walks" for `WalkTokens`.
    local_layers: convolutions of "gated_gcn".
    mpnn: the message passing beside the sequence of nodes; None for none (GMN-, with no encodings).
    bidirectional: False reads sequences one way only (ablation).
    eigenvectors: how many of the last node features are Laplacian eigenvectors, whose signs training flips.
    edge_features: whether `graph.edges` [E, ...] are features to use; False ignores edges' values.
    dropout: rate in training.
    state_size, expand, conv_size, discretization: of the blocks.
    axis_name: device axis over which batch statistics are averaged.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  num_outputs: int
  task: Literal["node", "graph"] = "node"
  features: int = 64
  num_layers: int = 1
  token_layers: int = 1
  local: Literal["gated_gcn", "mean", "walks"] = "gated_gcn"
  local_layers: int = 1
  mpnn: Literal["gated_gcn", "gine"] | None = "gated_gcn"
  bidirectional: bool = True
  eigenvectors: int = 0
  edge_features: bool = False
  dropout: float = 0.0
  state_size: int = 16
  expand: int = 2
  conv_size: int = 4
  discretization: Discretization = "mamba"
  axis_name: str | None = None
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(
    self,
    graph: jraph.GraphsTuple,
    tokens: Tokens | None = None,
    operator: sparse.Operator | None = None,
    *,
    scores: Float[Array, " n"] | None = None,
    train: bool = False,
  ) -> Float[Array, "n c"] | Float[Array, "g c"]:
    """Outputs of nodes or graphs.

    Args:
      graph: one graph or several with padding, `nodes` [N, F]. Padding is ignored.
      tokens: of the graph, padded alike; None for m = 0.
      operator: `sparse.operator(graph)`, made once where the same graph is used again; default made here.
      scores: nodes are read from small to large; default their in-degree. `encodings.pagerank` is another choice.
      train: draws dropout, the order of ties and of equal tokens, and signs (stream "dropout"), and updates statistics.

    Returns:
      [N, C], or [number of graphs, C] with those of padding graphs.

    Raises:
      ValueError: while tracing, if graph, tokens and attributes do not fit together.
    """
    self._check(graph, tokens)
    if operator is None:
      operator = sparse.operator(graph, jnp.ones(graph.senders.shape[0], "float32"))
    mask, ids = structure.node_mask(graph), structure.graph_ids(graph)
    dense = lambda size, name: nn.Dense(size, dtype=self.dtype, param_dtype=self.param_dtype, name=name)
    x = jnp.asarray(graph.nodes)
    if self.eigenvectors and train:
      split = x.shape[1] - self.eigenvectors
      flipped = encodings.random_signs(self.make_rng("dropout"), x[:, split:], ids, graph.n_node.shape[0])
      x = jnp.concatenate([x[:, :split], flipped], 1)
    x = dense(self.features, "encoder")(x)
    edges = None
    if self.edge_features:
      rows = graph.edges.reshape(len(graph.edges), math.prod(graph.edges.shape[1:]))
      edges = dense(self.features, "edge_encoder")(rows)

    y = x if tokens is None else self._tokens(tokens, x, edges, mask, train)
    if scores is None:
      scores = jnp.diff(operator.row_starts).astype("float32")
    order, starts = self._order(ids, scores, train)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype), unique_indices=True)
    for i in range(self.num_layers):
      read = permute(self._block(f"block_{i}")(permute(y, order, place)[None], starts[None])[0], place, order)
      if self.mpnn is not None:  # Psi(G, X || P) in the first layer
        passed, edges = self._mpnn(i)(operator, x if i == 0 else y, edges, mask=mask, train=train)
        read = read + passed
      y = layers.Dropout(self.dropout)(read, train=train)
    y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(y)
    if self.task == "graph":
      y = mean_nodes(graph._replace(nodes=y), ids)
      y = layers.Dropout(self.dropout, relu=True)(dense(self.features, "hidden")(y), train=train)
    return dense(self.num_outputs, "head")(y)

  def _tokens(self, tokens, x, edges, mask, train):
    """Steps 1 to 3 of algorithm 1: encode every token, order them, and keep what is read last, at the node itself."""
    common = self.features, self.dtype, self.param_dtype
    if isinstance(tokens, WalkTokens):
      phi = WalkEncoder(*common, name="local")(tokens, x, edges)
    else:
      gated = self.local_layers if self.local == "gated_gcn" else 0
      encoder = SubgraphEncoder(*common, gated, self.dropout, self.axis_name, name="local")
      phi = encoder(tokens, x, edges, mask=mask, train=train)
    phi = phi.reshape(x.shape[0], -1, self.features)  # [N, m s + 1, d]
    if train and tokens.repetitions > 1:  # tokens of one length come in any order
      same = phi[:, :-1].reshape(x.shape[0], -1, tokens.repetitions, self.features)
      shuffle = jnp.argsort(jax.random.bits(self.make_rng("dropout"), same.shape[:3]), axis=2)
      same = jnp.take_along_axis(same, shuffle[..., None], axis=2)
      phi = jnp.concatenate([same.reshape(phi[:, :-1].shape), phi[:, -1:]], 1)
    for i in range(self.token_layers):
      phi = self._block(f"token_block_{i}", last_only=i == self.token_layers - 1)(phi)
    return phi[:, -1]

  def _block(self, name, last_only=False):
    return BidirectionalMamba(
      self.bidirectional, last_only, self.state_size, self.expand, self.conv_size, self.discretization, self.dtype,
      self.param_dtype, name=name,
    )  # fmt: skip

  def _mpnn(self, layer):
    name, last = f"mpnn_{layer}", layer == self.num_layers - 1
    if self.mpnn == "gated_gcn":
      return layers.GatedGCN(
        self.features, not last, dropout=self.dropout, axis_name=self.axis_name, dtype=self.dtype,
        param_dtype=self.param_dtype, name=name,
      )  # fmt: skip
    return GINE(self.features, self.axis_name, self.dtype, self.param_dtype, name=name)

  def _order(self, ids, scores, train):
    """Nodes by graph, then score; and where in that order a graph starts."""
    number = jnp.arange(ids.shape[0], dtype="int32")
    ties = jax.random.bits(self.make_rng("dropout"), ids.shape) if train else number
    order = jnp.lexsort((ties, scores, ids))
    return order, jnp.diff(ids, prepend=-1) > 0  # ids ascend, so they are the same in order

  def _check(self, graph, tokens):
    shape = getattr(graph.nodes, "shape", None)
    if shape is None or len(shape) != 2:
      raise ValueError(f"graph: got nodes of shape {shape}, expected features [N, F]")
    for name, least in (
      ("num_outputs", 1),
      ("features", 1),
      ("num_layers", 1),
      ("token_layers", 1),
      ("local_layers", 1),
    ):
      if getattr(self, name) < least:
        raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
    for name, options in (
      ("task", ("node", "graph")),
      ("local", ("gated_gcn", "mean", "walks")),
      ("mpnn", ("gated_gcn", "gine", None)),
    ):
      if getattr(self, name) not in options:
        raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {options}")
    checks.rate("dropout", self.dropout)
    if not 0 <= self.eigenvectors <= shape[1]:
      raise ValueError(f"eigenvectors: got {self.eigenvectors}, expected at most the {shape[1]} node features")
    if self.edge_features and getattr(graph.edges, "ndim", 0) < 1:
      raise ValueError("graph: got no edge features, expected some for edge_features=True")
    if tokens is None:
      return
    if isinstance(tokens, WalkTokens) != (self.local == "walks"):
      raise ValueError(f"tokens: got {type(tokens).__name__}, which local={self.local!r} does not read")
    known = (tokens.positions if isinstance(tokens, WalkTokens) else tokens.members).shape[1]
    if known != shape[0]:
      raise ValueError(f"tokens: got those of {known} nodes, expected {shape[0]}")


def permute(x: Float[Array, "n f"], order: Int[Array, " n"], inverse: Int[Array, " n"]) -> Float[Array, "n f"]:
  """x[order], whose gradient is g[inverse] rather than a scatter."""

  @jax.custom_vjp
  def take(x, order, inverse):
    return x[order]

  take.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, g: (g[inverse], None, None))
  return take(x, order, inverse)


def mean_nodes(graph: jraph.GraphsTuple, ids: Int[Array, " n"]) -> Float[Array, "g f"]:
  """Mean over the nodes of each graph, in float32; 0 for an empty one."""
  graphs = graph.n_node.shape[0]
  total = jax.ops.segment_sum(graph.nodes.astype("float32"), ids, graphs, indices_are_sorted=True)
  return (total / jnp.maximum(graph.n_node, 1)[:, None]).astype(graph.nodes.dtype)


class GINE(nn.Module):
  """x + norm(GINE with an MLP of two layers), in the form of `layers.GatedGCN`; edge states stay as they are.

  Attributes:
    features: width.
    axis_name, dtype, param_dtype: as `GraphMamba`.
  """

  features: int
  axis_name: str | None = None
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(
    self,
    operator: sparse.Operator,
    x: Float[Array, "n f"],
    edges: Float[Array, "e f"] | None = None,
    *,
    mask: Bool[Array, " n"] | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "n f"], Float[Array, "e f"] | None]:
    """New node states, and the edges."""
    dense = lambda name: nn.Dense(self.features, dtype=self.dtype, param_dtype=self.param_dtype, name=name)
    first, second = dense("first"), dense("second")
    new = layers.GINEConv(lambda h: second(nn.relu(first(h))), name="conv")(operator, x, edges)
    norm = nn.BatchNorm(
      not train, momentum=0.9, dtype=self.dtype, param_dtype=self.param_dtype, axis_name=self.axis_name, name="norm"
    )
    return x + nn.relu(norm(new, mask=None if mask is None else mask[:, None])), edges


# ----------------------------------------------------------------------------------------- phi: a token as a vector


class SubgraphEncoder(nn.Module):
  """Mean of the members || the node itself -> linear, after gated graph convolutions on the induced subgraph, or none.

  The token's own node is marked by a learned vector, added to its features.

  Attributes:
    features: d.
    dtype, param_dtype: as `GraphMamba`.
    convolutions: how many; with 0 a token is the mean of its members' features.
    dropout, axis_name: as `GraphMamba`.
  """

  features: int
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  convolutions: int = 1
  dropout: float = 0.0
  axis_name: str | None = None

  @nn.compact
  def __call__(
    self,
    tokens: SubgraphTokens,
    x: Float[Array, "n d"],
    edges: Float[Array, "e d"] | None = None,
    *,
    mask: Bool[Array, " n"],
    train: bool = False,
  ) -> Float[Array, "nt d"]:
    """A vector for each token."""
    mark = self.param("mark", nn.initializers.normal(1.0), (self.features,), self.param_dtype)
    first = jnp.diff(tokens.pool.rows, prepend=-1) > 0  # in its token
    h = sparse.propagate(tokens.members, x) + jnp.where(first[:, None], mark.astype(self.dtype), 0)
    own_edges = None if edges is None else edges[tokens.edges]
    real = mask[tokens.members.columns]
    for i in range(self.convolutions):
      conv = layers.GatedGCN(
        self.features, i < self.convolutions - 1, dropout=self.dropout, axis_name=self.axis_name, dtype=self.dtype,
        param_dtype=self.param_dtype, name=f"conv_{i}",
      )  # fmt: skip
      h, own_edges = conv(tokens.subgraphs, h, own_edges, mask=real, train=train)
    token = jnp.concatenate([sparse.propagate(tokens.pool, h), h[tokens.own]], -1)
    return nn.Dense(self.features, dtype=self.dtype, param_dtype=self.param_dtype, name="out")(token)


class WalkEncoder(nn.Module):
  """Mean over positions and walks of ReLU(linear(node || edge || bits of the walk)) -> linear.

  The walk features are those of CRaWl, Toenshoff et al., arXiv:2102.08786.

  Attributes:
    features: d.
    dtype, param_dtype: as `GraphMamba`.
  """

  features: int
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(
    self, tokens: WalkTokens, x: Float[Array, "n d"], edges: Float[Array, "e d"] | None = None
  ) -> Float[Array, "nt d"]:
    """A vector for each token."""
    dense = lambda bias, name: nn.Dense(
      self.features, use_bias=bias, dtype=self.dtype, param_dtype=self.param_dtype, name=name
    )
    shape = tokens.bits.shape[:4]  # [N, T, walks, positions]
    h = sparse.propagate(tokens.positions, dense(True, "node")(x)).reshape(*shape, -1)
    h = h + dense(False, "bits")(tokens.bits.astype(self.dtype))
    if edges is not None:
      there = (tokens.edges >= 0)[..., None]
      h = h + jnp.where(there, dense(False, "edge")(edges)[jnp.maximum(tokens.edges, 0)], 0)
    present = tokens.positions.values.reshape(*shape, 1)
    total = (nn.relu(h).astype("float32") * present).sum((2, 3))
    mean = total / jnp.maximum(present.sum((2, 3)), 1)
    return dense(True, "out")(mean.astype(self.dtype)).reshape(-1, self.features)


# -------------------------------------------------------------------------------------------------- published variants


def gmn(num_outputs: int, **changes: Any) -> GraphMamba:
  """GMN: tokens, encodings and message passing. Give it tokens, and encodings among the node features."""
  return GraphMamba(**{"num_outputs": num_outputs} | changes)


def gmn_minus(num_outputs: int, **changes: Any) -> GraphMamba:
  """GMN-, the ablation without message passing; give it no encodings."""
  return GraphMamba(**{"num_outputs": num_outputs, "mpnn": None} | changes)


def gps_mamba(num_outputs: int, **changes: Any) -> GraphMamba:
  """GPS + Mamba, m = 0: several layers of message passing and a block over the nodes. Give it no tokens."""
  return GraphMamba(**{"num_outputs": num_outputs, "num_layers": 4} | changes)
