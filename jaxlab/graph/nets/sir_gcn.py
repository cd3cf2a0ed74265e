"""SIR-GCN: a graph convolution whose nonlinearity sits between the sum of an edge's two ends and the sum over edges.

    y_u = W_R sum_{v -> u} sigma(W_Q x_u + W_K x_v)          with edge features: sigma(W_Q x_u + W_K x_v + W_E e_vu)

Lim, Lim, Lim and Naval, "Contextualized Messages Boost Graph Representations", TMLR 2025, arXiv:2403.12529; code
`briangodwinlim/SIR-GCN`. Symbols: W_Q, W_K, W_E, W_R are `query`, `key`, `edge`, `relation`, sigma is `activation`.
The centre u decides which channels of each neighbour v pass (anisotropic, dynamic), at the cost of one addition and one
activation an edge: O(N h d_in + |E| h + N d_out h). With sigma = identity it is GCN, GraphSAGE or GIN, see `SIRConv`.
On CPU and for the activations of `pairwise.ACTIVATIONS`, no array over edges is made.

The official classes are: `SIRConv` and, called with edge features, its SIREConv; `SIRConvBase` and likewise its
SIREConvBase; `SIRGCN` and `PreNormSIRGCN` the models of all benchmarks; `DictionaryLookup` and `HeteroEdgeCount` those
of the synthetic tasks. The builders and `RECIPES` at the end are the published settings.

Differs from the paper: b_R is added once a node after the sum, not once a message, as in the official code. Differs
from the official code: the ideas that all of its recipes turn off are left out (jumping knowledge, DropEdge, virtual
nodes, ContraNorm); where two messages are the largest, `max` shares the gradient between them; the variance that batch
normalisation remembers is the biased one.
"""

import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import optax
from jaxtyping import Array, Float, Int

from jaxlab import interop
from jaxlab.graph import layers, pairwise, sparse, structure

Aggregation = Literal["sum", "mean", "sym", "max"]
Activation = str | Callable[[Array], Array]

# ------------------------------------------------------------------------------------------------------- convolutions


class SIRConv(nn.Module):
  """The convolution. Adds no self-loops, residual or norm; a node without incoming edges sums to 0.

      sum, mean, sym:  y_u = W_R sum_{v -> u} c_vu m_vu + b_R,     max:  y_u = max_{v -> u} (W_R m_vu + b_R)
      m_vu = sigma(q_u + k_v + W_E e_vu),    q = W_Q x + b_Q,    k = W_K x
      c_vu = 1 (sum), 1 / in(u) (mean), (out(v) in(u))^-1/2 (sym; degrees of 0 count as 1)

  `max` maps every message by W_R, O(|E| h d_out); without incoming edges it is 0, the others b_R.
  With sigma = identity and W_Q = b_Q = 0 this is, exactly: GCN with weight W_R W_K (sym, on a graph with self-loops),
  GraphSAGE's neighbour branch (mean), the sum that GIN maps (sum).

  Attributes:
    features: d_out.
    hidden: h, width of messages.
    activation: sigma, a key of `pairwise.ACTIVATIONS` ("leaky_relu" has slope 0.2) or any function or module on [E, h],
      which may have parameters.
    aggregation: see above.
    dropout: rate in training on q, k and W_E e: one mask a node, shared by its edges.
    edge_types: if given, edge features are integers below it and W_E a table.
    inner_bias: whether there is b_Q.
    outer_bias: whether there is b_R.
    dtype: compute dtype.
    param_dtype: parameter dtype; initialised as torch does.
  """

  features: int
  hidden: int
  activation: Activation = "relu"
  aggregation: Aggregation = "sum"
  dropout: float = 0.0
  edge_types: int | None = None
  inner_bias: bool = True
  outer_bias: bool = True
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(
    self,
    graph: layers.Graph,
    x: Float[Array, "n d_in"],
    edges: Float[Array, "e d_edge"] | Int[Array, " e"] | None = None,
    *,
    train: bool = False,
  ) -> Float[Array, "n d_out"]:
    """Convolves node features.

    Args:
      graph: sorted by receiver, or its operator; weights of edges are not used.
      x: [N, d_in].
      edges: features of edges in the graph's order, [E, d_edge] or, with `edge_types`, [E] integers.
      train: draws dropout (stream "dropout").

    Raises:
      ValueError: while tracing, on an attribute out of range or shapes that do not fit.
    """
    _check_aggregation(self.aggregation)
    _check_activation(self.activation)
    for name, value in (("features", self.features), ("hidden", self.hidden)):
      if value < 1:
        raise ValueError(f"{name}: got {value}, expected at least 1")
    _check_rate("dropout", self.dropout)
    op = _operator(graph, x)
    drop: Any = lambda v: layers.Dropout(self.dropout)(v, train=train)  # noqa: E731
    q = drop(self._linear(self.hidden, self.inner_bias, "query")(x))
    k = drop(self._linear(self.hidden, False, "key")(x))
    relation = self._linear(self.features, self.outer_bias, "relation")
    sigma = pairwise.ACTIVATIONS[self.activation] if isinstance(self.activation, str) else self.activation

    if edges is None and self.aggregation != "max" and isinstance(self.activation, str):
      return relation(pairwise.sum_of(op, q, k, self.activation, _coefficients(op, self.aggregation)))
    z = pairwise.at_receivers(op, q) + pairwise.at_senders(op, k)  # [E, h]
    if edges is not None:
      z = z + drop(self._map_edges(op, edges))
    if self.aggregation == "max":
      return _aggregate(op, relation(sigma(z)), "max")
    return relation(_aggregate(op, sigma(z), self.aggregation))

  def _linear(self, features, bias, name):
    return layers.Linear(features, bias, "torch", self.dtype, self.param_dtype, name=name)

  def _map_edges(self, op, edges):
    _check_edges(op, edges, 2 if self.edge_types is None else 1)
    if self.edge_types is None:
      return self._linear(self.hidden, False, "edge")(edges)
    return _embed(self, self.edge_types, self.hidden, "edge")(edges)


class SIRConvBase(nn.Module):
  """The convolution's general form: y_u = AGG_{v -> u} c_vu g([x_u, x_v]) or, with edge features, g([x_u, x_v, e_vu]).

  A message that is any function of both ends and the edge, at O(|E|) evaluations of it. Aggregations as `SIRConv`.

  Attributes:
    message: g, a function or module on [E, 2 d_in + d_edge].
    aggregation: as `SIRConv`.
  """

  message: Callable[[Array], Array]
  aggregation: Aggregation = "sum"

  @nn.compact
  def __call__(
    self, graph: layers.Graph, x: Float[Array, "n d_in"], edges: Float[Array, "e d_edge"] | None = None
  ) -> Float[Array, "n d_out"]:
    """[N, d_in], and [E, d_edge] in the graph's order -> what `message` makes of an edge, summed up by node."""
    _check_aggregation(self.aggregation)
    op = _operator(graph, x)
    ends = [pairwise.at_receivers(op, x), pairwise.at_senders(op, x)]
    if edges is not None:
      _check_edges(op, edges, 2)
      ends.append(edges.astype(x.dtype))
    return _aggregate(op, self.message(jnp.concatenate(ends, axis=-1)), self.aggregation)


def _coefficients(op: sparse.Operator, aggregation: Aggregation) -> Float[Array, " e"]:
  """c_vu of every edge."""
  degree = lambda starts: jnp.maximum(jnp.diff(starts), 1).astype("float32")  # noqa: E731
  if aggregation == "mean":
    return (1 / degree(op.row_starts))[op.rows]
  if aggregation == "sym":
    return (degree(op.row_starts) ** -0.5)[op.rows] * (degree(op.transpose_starts) ** -0.5)[op.columns]
  return jnp.ones(op.rows.shape[0], "float32")


def _aggregate(op: sparse.Operator, messages: Float[Array, "e f"], aggregation: Aggregation) -> Float[Array, "n f"]:
  if aggregation == "max":
    return sparse.segment_max(op, messages)
  weighted = messages.astype("float32") * _coefficients(op, aggregation)[:, None]
  return sparse.segment_sum(op, weighted).astype(messages.dtype)


# ----------------------------------------------------------------------------------------------------------- networks


class Norm(nn.Module):
  """One of the norms that the recipes name.

  Attributes:
    kind: over all nodes of the batch, the channels of a node, the nodes of each graph, or none.
    axis_name: device axis over which batch statistics are averaged.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  kind: Literal["batch", "layer", "graph", "none"]
  axis_name: str | None = None
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(
    self, graph: jraph.GraphsTuple, x: Float[Array, "n f"], mask: Any, *, train: bool
  ) -> Float[Array, "n f"]:
    """Same shape as x; `mask` [N] says which rows are real."""
    options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "name": "norm"}
    if self.kind == "batch":
      norm = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, axis_name=self.axis_name, **options)
      return norm(x, mask=mask[:, None])
    if self.kind == "layer":
      return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, **options)(x)
    if self.kind == "graph":
      return layers.GraphNorm(**options)(graph, x)
    if self.kind == "none":
      return x
    raise ValueError(f"norm: got {self.kind!r}, expected 'batch', 'layer', 'graph' or 'none'")


class PreNormSIRGCN(nn.Module):
  """The network of the heterophilous graphs: blocks of [norm, SIRConv, GELU, linear] around which the input is added.

  Attributes:
    num_outputs: classes, or 1 for the logit of a binary task.
    hidden: width everywhere.
    depth: blocks.
    aggregation: as `SIRConv`.
    norm: kind of `Norm`.
    dropout: rate in training, after every linear map and convolution.
    message_dropout: `SIRConv.dropout`.
    axis_name, dtype, param_dtype: as `Norm`.
  """

  num_outputs: int
  hidden: int
  depth: int
  aggregation: Aggregation
  norm: Literal["batch", "layer", "graph", "none"]
  dropout: float = 0.2
  message_dropout: float = 0.2
  axis_name: str | None = None
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(
    self, graph: jraph.GraphsTuple, operator: sparse.Operator | None = None, *, train: bool = False
  ) -> Float[Array, "n num_outputs"]:
    """Outputs of every node.

    Args:
      graph: `nodes` [N, F]. Padding is ignored.
      operator: `sparse.operator(graph)`, made once where the same graph is used again; default made here.
      train: draws dropout (stream "dropout") and updates batch statistics.

    Raises:
      ValueError: while tracing, as `SIRConv` does.
    """
    _check_network(self, graph, 2)
    op = _operator(graph if operator is None else operator, graph.nodes)
    mask = structure.node_mask(graph)
    drop: Any = lambda v: layers.Dropout(self.dropout)(v, train=train)  # noqa: E731
    norm = lambda name, v: Norm(self.norm, self.axis_name, self.dtype, self.param_dtype, name=name)(  # noqa: E731
      graph, v, mask, train=train
    )
    linear = lambda width, name: layers.Linear(width, True, "torch", self.dtype, self.param_dtype, name=name)  # noqa: E731
    gelu = pairwise.ACTIVATIONS["gelu"]

    x = gelu(drop(linear(self.hidden, "encoder")(graph.nodes)))
    for i in range(self.depth):
      y = norm(f"norm_{i}", x)
      y = SIRConv(
        self.hidden, self.hidden, "gelu", self.aggregation, self.message_dropout,
        dtype=self.dtype, param_dtype=self.param_dtype, name=f"conv_{i}",
      )(op, y, train=train)  # fmt: skip
      y = linear(self.hidden, f"linear_{i}")(gelu(drop(y)))
      x = x + drop(y)
    return linear(self.num_outputs, "readout")(norm("readout_norm", x))


class SIRGCN(nn.Module):
  """The network of the other benchmarks: layers of [SIRConv, norm, LeakyReLU], then a readout for nodes or graphs.

      residual "identity":  x + drop(act(norm(conv(x))))        "linear":  drop(act(norm(conv(x) + drop(W x + b))))

  Attributes:
    num_outputs: of a node, or of a graph if there is a `pool`.
    hidden: width everywhere.
    depth: layers.
    aggregation: as `SIRConv`.
    encoder: of the input: a linear map, nothing, a table of so many rows (nodes [N] of integers), or a sum of tables
      (nodes [N, number of tables]).
    residual: see above.
    norm: kind of `Norm`.
    readout: hidden widths of the MLP at the end.
    pool: how nodes are joined to graphs: after the readout or, with `pool_first`, before it, and then the readout has
      batch normalisation.
    edge_types: as `SIRConv`.
    use_edges: whether convolutions see `graph.edges` (the official SIREConv).
    input_dropout: rate in training after the encoder.
    dropout: after every layer.
    message_dropout: `SIRConv.dropout`.
    branch_dropout: of the linear residual.
    axis_name, dtype, param_dtype: as `Norm`.
  """

  num_outputs: int
  hidden: int
  depth: int
  aggregation: Aggregation
  encoder: Literal["linear", "none"] | int | tuple[int, ...]
  residual: Literal["identity", "linear"]
  norm: Literal["batch", "layer", "graph", "none"] = "batch"
  readout: tuple[int, ...] = ()
  pool: Literal["sum", "mean"] | None = None
  pool_first: bool = False
  edge_types: int | None = None
  use_edges: bool = False
  input_dropout: float = 0.0
  dropout: float = 0.0
  message_dropout: float = 0.0
  branch_dropout: float = 0.0
  axis_name: str | None = None
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(
    self, graph: jraph.GraphsTuple, operator: sparse.Operator | None = None, *, train: bool = False
  ) -> Float[Array, "n num_outputs"] | Float[Array, "g num_outputs"]:
    """Outputs of every node, or of every graph of the tuple (padding graphs included, for them to be masked).

    Args:
      graph: `nodes` as `encoder` says, `edges` with `use_edges`. Padding reaches no real node or graph.
      operator: `sparse.operator(graph)`, made once where the same graph is used again; default made here.
      train: draws dropout (stream "dropout") and updates batch statistics.

    Raises:
      ValueError: while tracing, as `SIRConv` does.
    """
    _check_network(self, graph, 1 if isinstance(self.encoder, int) else 2)
    if self.residual not in ("identity", "linear"):
      raise ValueError(f"residual: got {self.residual!r}, expected 'identity' or 'linear'")
    if self.pool not in (None, "sum", "mean"):
      raise ValueError(f"pool: got {self.pool!r}, expected 'sum', 'mean' or None")
    mask = structure.node_mask(graph)
    drop: Any = lambda rate, v: layers.Dropout(rate)(v, train=train)  # noqa: E731
    options = (self.axis_name, self.dtype, self.param_dtype)
    linear = lambda width, name: layers.Linear(width, True, "torch", self.dtype, self.param_dtype, name=name)  # noqa: E731
    act = pairwise.ACTIVATIONS["leaky_relu"]

    x = drop(self.input_dropout, self._encode(graph.nodes))
    op = _operator(graph._replace(nodes=x) if operator is None else operator, x)
    for i in range(self.depth):
      conv = SIRConv(
        self.hidden, self.hidden, "leaky_relu", self.aggregation, self.message_dropout, self.edge_types,
        dtype=self.dtype, param_dtype=self.param_dtype, name=f"conv_{i}",
      )  # fmt: skip
      y = conv(op, x, graph.edges if self.use_edges else None, train=train)
      if self.residual == "linear":
        y = y + drop(self.branch_dropout, linear(self.hidden, f"branch_{i}")(x))
      y = Norm(self.norm, *options, name=f"norm_{i}")(graph, y, mask, train=train)
      y = drop(self.dropout, act(y))
      x = x + y if self.residual == "identity" else y

    if self.pool_first:
      x, mask = self._pool(graph, x), graph.n_node > 0
    for j, width in enumerate(self.readout):
      x = linear(width, f"readout_{j}")(x)
      if self.pool_first:
        x = Norm("batch", *options, name=f"readout_norm_{j}")(graph, x, mask, train=train)
      x = act(x)
    x = linear(self.num_outputs, f"readout_{len(self.readout)}")(x)
    return x if self.pool is None or self.pool_first else self._pool(graph, x)

  def _encode(self, nodes):
    if self.encoder == "none":
      return jnp.asarray(nodes, self.dtype)
    if self.encoder == "linear":
      return layers.Linear(self.hidden, True, "torch", self.dtype, self.param_dtype, name="encoder")(nodes)
    if isinstance(self.encoder, int):
      return _embed(self, self.encoder, self.hidden, "encoder")(nodes)
    if nodes.shape[1] != len(self.encoder):
      raise ValueError(f"graph: got nodes of shape {nodes.shape}, expected [N, {len(self.encoder)}], a column a table")
    glorot = nn.initializers.glorot_uniform()  # as OGB's encoder of atoms
    tables = [_embed(self, rows, self.hidden, f"encoder_{i}", glorot) for i, rows in enumerate(self.encoder)]
    return sum(table(nodes[:, i]) for i, table in enumerate(tables))

  def _pool(self, graph, x):
    ids = structure.graph_ids(graph._replace(nodes=x))
    total = jax.ops.segment_sum(x.astype("float32"), ids, graph.n_node.shape[0], indices_are_sorted=True)
    if self.pool == "mean":
      total = total / jnp.maximum(graph.n_node, 1)[:, None]
    return total.astype(x.dtype)


class DictionaryLookup(nn.Module):
  """The network of `data.synthetic.dictionary_lookup`: one convolution whose sigma is ReLU, linear, ReLU.

  Attributes:
    size: n, keys and values of a dictionary.
    hidden: width; 4n in the paper.
    dtype, param_dtype: as `Norm`.
  """

  size: int
  hidden: int
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(
    self, graph: jraph.GraphsTuple, operator: sparse.Operator | None = None, *, train: bool = False
  ) -> Float[Array, "nodes n"]:
    """Logits over values; `graph.nodes` [N, 2] integers (key, value), n standing for no value."""
    del train  # the published network has nothing that differs in training
    _check_network(self, graph, 2)
    linear = lambda width, bias, name: layers.Linear(width, bias, "torch", self.dtype, self.param_dtype, name=name)  # noqa: E731
    key, value = (_embed(self, self.size + 1, self.hidden, name) for name in ("key_embedding", "value_embedding"))
    x = key(graph.nodes[:, 0]) + value(graph.nodes[:, 1])
    inner = linear(self.hidden, True, "activation")
    sigma = lambda z: nn.relu(inner(nn.relu(z)))  # noqa: E731
    conv = SIRConv(self.hidden, self.hidden, sigma, dtype=self.dtype, param_dtype=self.param_dtype, name="conv_0")
    x = conv(_operator(graph._replace(nodes=x) if operator is None else operator, x), x)
    return linear(self.size, False, "classifier")(x)


class HeteroEdgeCount(nn.Module):
  """The network of `data.synthetic.hetero_edge_count`: one convolution, a number for each node, summed over the graph.

  Attributes:
    num_classes: c, of nodes.
    hidden: width; 10c in the paper.
    dtype, param_dtype: as `Norm`.
  """

  num_classes: int
  hidden: int
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(
    self, graph: jraph.GraphsTuple, operator: sparse.Operator | None = None, *, train: bool = False
  ) -> Float[Array, " g"]:
    """A count for each graph of the tuple; `graph.nodes` [N] integers, the class of each node."""
    del train
    _check_network(self, graph, 1)
    x = _embed(self, self.num_classes, self.hidden, "embedding")(graph.nodes)
    conv = SIRConv(self.hidden, self.hidden, dtype=self.dtype, param_dtype=self.param_dtype, name="conv_0")
    x = conv(_operator(graph._replace(nodes=x) if operator is None else operator, x), x)
    x = layers.Linear(1, False, "torch", self.dtype, self.param_dtype, name="regression")(x)[:, 0]
    total = jax.ops.segment_sum(
      x.astype("float32"), structure.graph_ids(graph), graph.n_node.shape[0], indices_are_sorted=True
    )
    return total.astype(self.dtype)


def _embed(module, rows, width, name, init=nn.initializers.normal(1.0)):
  """A table initialised as torch does."""
  return nn.Embed(rows, width, dtype=module.dtype, param_dtype=module.param_dtype, embedding_init=init, name=name)


def _operator(graph, x):
  if getattr(x, "ndim", 0) != 2:
    raise ValueError(f"x: got shape {getattr(x, 'shape', None)}, expected features [N, F]")
  op = layers.as_operator(graph, x)
  if op.shape != (x.shape[0], x.shape[0]):
    raise ValueError(f"graph: got an operator of shape {op.shape}, expected {(x.shape[0],) * 2}, one row per node")
  return op


def _check_network(net, graph, ndim):
  shape = getattr(graph.nodes, "shape", None)
  if shape is None or len(shape) != ndim:
    raise ValueError(f"graph: got nodes of shape {shape}, expected {ndim} axes")
  integers = isinstance(net, DictionaryLookup | HeteroEdgeCount) or not isinstance(getattr(net, "encoder", ""), str)
  if jnp.issubdtype(graph.nodes.dtype, jnp.integer) != integers:
    kind = "integers, rows of a table" if integers else "real features"
    raise ValueError(f"graph: got nodes of dtype {graph.nodes.dtype}, expected {kind}")
  if getattr(net, "use_edges", False) and graph.edges is None:
    raise ValueError("edges: got None, expected edge features, for use_edges is set")
  for name in ("hidden", "depth"):
    if getattr(net, name, 1) < 1:
      raise ValueError(f"{name}: got {getattr(net, name)}, expected at least 1")
  for name in ("dropout", "input_dropout", "message_dropout", "branch_dropout"):
    _check_rate(name, getattr(net, name, 0.0))


def _check_rate(name, rate):
  if not 0 <= rate < 1:
    raise ValueError(f"{name}: got {rate}, expected a rate in [0, 1)")


def _check_aggregation(aggregation):
  if aggregation not in Aggregation.__args__:
    raise ValueError(f"aggregation: got {aggregation!r}, expected one of {Aggregation.__args__}")


def _check_activation(activation):
  if not callable(activation) and activation not in pairwise.ACTIVATIONS:
    raise ValueError(f"activation: got {activation!r}, expected a function or one of {sorted(pairwise.ACTIVATIONS)}")


def _check_edges(op, edges, ndim):
  shape, count = getattr(edges, "shape", None), op.rows.shape[0]
  if shape is None or len(shape) != ndim or shape[0] != count:
    raise ValueError(f"edges: got shape {shape}, expected {ndim} axes with {count} rows, one for each edge")


# -------------------------------------------------------------------------------------------------- published variants


class Recipe(NamedTuple):
  """How a variant is trained: AdamW on loss + l1 sum |w| + l2 sum w^2 over all parameters.

  The rate rises linearly over `warmup` epochs and is halved where the training loss, in evaluation mode, has not
  improved for more than `patience` epochs (`next_rate`). The epoch of lowest validation loss counts.

  Attributes:
    learning_rate: after the warm-up.
    epochs: over the training set.
    batch_size: graphs a step; 0 for the whole graph.
    weight_decay: decoupled, as AdamW's, on all parameters.
    l1, l2: see above.
    patience, warmup: see above.
  """

  learning_rate: float = 1e-3
  epochs: int = 200
  batch_size: int = 128
  weight_decay: float = 0.0
  l1: float = 0.0
  l2: float = 0.0
  patience: int = 10
  warmup: int = 10


_SYNTHETIC = Recipe(epochs=500, batch_size=256, warmup=0)  # and stops where training and test loss are below 1e-3
_HETEROPHILOUS = Recipe(3e-5, 1000, 0, patience=1000)
_SUPERPIXELS = Recipe(l1=1e-6, l2=1e-6)
_SBM = Recipe(l1=1e-7, l2=1e-7)
RECIPES = {
  "dictionary_lookup": _SYNTHETIC,
  "hetero_edge_count": _SYNTHETIC,
  "roman_empire": _HETEROPHILOUS,
  "amazon_ratings": _HETEROPHILOUS,
  "minesweeper": _HETEROPHILOUS,
  "tolokers": _HETEROPHILOUS,
  "questions": _HETEROPHILOUS,
  "arxiv": Recipe(1e-2, 1000, 0, weight_decay=1e-3, patience=40, warmup=20),  # on `log_cross_entropy`
  "molhiv": Recipe(epochs=100, batch_size=64, weight_decay=1e-4),
  "zinc": Recipe(epochs=500, l1=1e-7, l2=1e-7),  # on the absolute error
  "mnist": _SUPERPIXELS,
  "cifar10": _SUPERPIXELS,
  "pattern": _SBM,
  "cluster": _SBM,
  "wikics": Recipe(batch_size=0, l1=1e-5, l2=1e-5),
}


def dictionary_lookup(size: int = 10, **changes: Any) -> DictionaryLookup:
  """DictionaryLookup of n keys, n in 10, 20, .. 50: 100 %. Parameters 7,800 / 30,800 / 69,000 / 122,400 / 191,000."""
  return DictionaryLookup(**{"size": size, "hidden": 4 * size} | changes)


def hetero_edge_count(num_classes: int = 2, **changes: Any) -> HeteroEdgeCount:
  """HeteroEdgeCount of c classes, c in 2, 4, .. 10. Parameters 1,300 / 5,080 / 11,340 / 20,080 / 31,300."""
  return HeteroEdgeCount(**{"num_classes": num_classes, "hidden": 10 * num_classes} | changes)


def _pre_norm(outputs, hidden, depth, aggregation, norm, changes):
  options = {"num_outputs": outputs, "hidden": hidden, "depth": depth, "aggregation": aggregation, "norm": norm}
  return PreNormSIRGCN(**options | changes)


def roman_empire(**changes: Any) -> PreNormSIRGCN:
  """roman-empire, 300 features: accuracy 87.67 %. Parameters 5,420,050."""
  return _pre_norm(18, 512, 5, "max", "layer", changes)


def amazon_ratings(**changes: Any) -> PreNormSIRGCN:
  """amazon-ratings, 300 features: accuracy 46.73 %. Parameters 869,125."""
  return _pre_norm(5, 256, 3, "max", "batch", changes)


def minesweeper(**changes: Any) -> PreNormSIRGCN:
  """minesweeper, 7 features: AUC 94.12 %. Parameters 1,319,937."""
  return _pre_norm(1, 256, 5, "sym", "batch", changes)


def tolokers(**changes: Any) -> PreNormSIRGCN:
  """tolokers, 10 features: AUC 82.85 %. Parameters 1,320,705."""
  return _pre_norm(1, 256, 5, "sym", "layer", changes)


def questions(**changes: Any) -> PreNormSIRGCN:
  """questions, 301 features: AUC 75.33 %. Parameters 3,309,569."""
  return _pre_norm(1, 512, 3, "sym", "layer", changes)


def _post_norm(outputs, hidden, depth, aggregation, encoder, residual, changes, **options):
  required = {"num_outputs": outputs, "hidden": hidden, "depth": depth, "aggregation": aggregation}
  return SIRGCN(**required | {"encoder": encoder, "residual": residual} | options | changes)


def arxiv(**changes: Any) -> SIRGCN:
  """ogbn-arxiv, 128 features, with reverse edges and self-loops: accuracy 72.52 %. Parameters 98,460."""
  return _post_norm(40, 95, 3, "sym", "linear", "identity", changes, dropout=0.2, message_dropout=0.2)


# Rows of OGB's tables: atomic number, chirality, degree, charge, hydrogens, radical electrons, hybridisation, aromatic,
# in a ring.
ATOM_FEATURES = (119, 5, 12, 12, 10, 6, 6, 2, 2)


def molhiv(**changes: Any) -> SIRGCN:
  """ogbg-molhiv: AUC 77.63 %. Parameters 96,201."""
  return _post_norm(
    1, 80, 4, "max", ATOM_FEATURES, "identity", changes,
    readout=(40, 20), pool="mean", pool_first=True, input_dropout=0.2, message_dropout=0.2,
  )  # fmt: skip


def zinc(**changes: Any) -> SIRGCN:
  """ZINC, 28 kinds of atoms: absolute error 0.278. Parameters 99,376."""
  return _post_norm(1, 75, 4, "sym", 28, "linear", changes, readout=(75,), pool="sum")


def _superpixels(changes):
  return _post_norm(
    10, 80, 4, "max", "none", "linear", changes,
    readout=(80, 80), pool="mean", message_dropout=0.1, branch_dropout=0.2,
  )  # fmt: skip


def mnist(**changes: Any) -> SIRGCN:
  """MNIST superpixels, 3 features: accuracy 97.90 %. Parameters 99,290."""
  return _superpixels(changes)


def cifar10(**changes: Any) -> SIRGCN:
  """CIFAR-10 superpixels, 5 features: accuracy 71.98 %. Parameters 99,770."""
  return _superpixels(changes)


def pattern(**changes: Any) -> SIRGCN:
  """PATTERN, 3 kinds of nodes: accuracy 85.75 %. Parameters 104,402."""
  return _post_norm(2, 80, 4, "sym", 3, "linear", changes)


def cluster(**changes: Any) -> SIRGCN:
  """CLUSTER, 7 kinds of nodes: accuracy 63.35 %. Parameters 105,046."""
  return _post_norm(6, 80, 4, "sym", 7, "linear", changes)


def wikics(**changes: Any) -> SIRGCN:
  """WikiCS, 300 features: accuracy 78.06 %. Parameters 102,610."""
  return _post_norm(
    10, 60, 4, "mean", "none", "linear", changes, input_dropout=0.3, dropout=0.1, branch_dropout=0.2
  )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ training


def penalty(params: Any, recipe: Recipe) -> Float[Array, ""]:
  """l1 sum |w| + l2 sum w^2 over all parameters, to be added to the loss."""
  each = [recipe.l1 * jnp.abs(p).sum() + recipe.l2 * (p**2).sum() for p in jax.tree.leaves(params)]
  return jnp.sum(jnp.stack(each), dtype="float32")


def log_cross_entropy(logits: Float[Array, "n c"], labels: Int[Array, " n"]) -> Float[Array, " n"]:
  """log(eps + CE) - log(eps) with eps = 1 - ln 2, of each node: the loss of ogbn-arxiv, which bounds outliers."""
  eps = 1 - jnp.log(2.0)
  each = optax.losses.softmax_cross_entropy_with_integer_labels(logits.astype("float32"), labels)
  return jnp.log(eps + each) - jnp.log(eps)


class Plateau(NamedTuple):
  """State of the learning rate: the rate of the coming epoch, the lowest loss, epochs since it was improved on."""

  rate: Float[Array, ""]
  lowest: Float[Array, ""]
  stale: Int[Array, ""]


def first_rate(recipe: Recipe) -> Plateau:
  """Before the first epoch."""
  rate = recipe.learning_rate / max(recipe.warmup, 1)
  return Plateau(jnp.float32(rate), jnp.float32(jnp.inf), jnp.int32(0))


def next_rate(state: Plateau, loss: Float[Array, ""], epochs: Int[Array, ""], recipe: Recipe) -> Plateau:
  """The rate after an epoch: torch's `ReduceLROnPlateau` by half, overwritten during the warm-up.

  Args:
    state: of the epoch that ended.
    loss: of the training set after it, in evaluation mode.
    epochs: how many have ended.
    recipe: patience, warm-up and rate.
  """
  better = loss < state.lowest * (1 - 1e-4)
  stale = jnp.where(better, 0, state.stale + 1)
  reduce = stale > recipe.patience
  rate = jnp.where(reduce, state.rate / 2, state.rate)
  warm = recipe.learning_rate * (epochs + 1) / max(recipe.warmup, 1)
  rate = jnp.where(epochs < recipe.warmup, warm, rate)
  return Plateau(rate, jnp.where(better, loss, state.lowest), jnp.where(reduce, 0, stale))


# ------------------------------------------------------------------------------------------------------------- weights

# Official layer -> flax path. Those that name the index of a layer keep it.
_DENSE = {
  r"(?:convs\.(\d+)\.)?linear_(query|key|relation|edge)": r"conv_\1/\2",
  r"resids\.(\d+)\.linears\.0": r"branch_\1",
  r"linears\.(\d+)": r"linear_\1",
  r"readouts?(?:\.\d+)?\.linears\.(\d+)": r"readout_\1",
  r"readout": "readout_0",
  r"output_linear": "readout",
  r"input_linear|embedding\.linears\.0": "encoder",
  r"activation\.1": "activation",
  r"classifier": "classifier",
  r"regression": "regression",
}
_TABLES = {
  r"node_encoder": "encoder",
  r"embedding\.atom_embedding_list\.(\d+)": r"encoder_\1",
  r"embedding": "embedding",
  r"key_embedding": "key_embedding",
  r"val_embedding": "value_embedding",
}
_NORMS = {
  r"norms\.(\d+)\.norm": r"norm_\1/norm",
  r"readout\.norms\.(\d+)": r"readout_norm_\1/norm",
  r"output_norm\.norm": "readout_norm/norm",
}


def from_torch(state_dict: dict[str, Any], *, edge_tables: bool = False) -> dict[str, Any]:
  """Official weights, of a convolution alone or of any of the official models, as flax variables.

  Args:
    state_dict: of `SIRConv`, `SIREConv` or a `SIRModel`.
    edge_tables: whether W_E is a table, as for `edge_types`.

  Raises:
    ValueError: listing every missing, unused or misshaped tensor.
  """
  rules: dict[str, interop.Rule] = {}
  for layer in dict.fromkeys(name.rpartition(".")[0] for name in state_dict):
    if path := _path(_DENSE, layer):
      is_table = edge_tables and path.endswith("edge")
      rule = interop.embed(layer) if is_table else interop.dense(layer, f"{layer}.bias" in state_dict)
    elif path := _path(_TABLES, layer):
      rule = interop.embed(layer)
    elif path := _path(_NORMS, layer):
      rule = interop.batch_norm(layer) if f"{layer}.running_mean" in state_dict else interop.norm(layer)
      if f"{layer}.mean_scale" in state_dict:
        rule = (*rule, interop.Leaf(f"{layer}.mean_scale", "mean_scale"))
    else:
      continue  # reported as unused
    rules[f"params/{path}"] = rule
  return interop.variables(state_dict, rules, ignore=["convs.*.activation.*"])  # the model's own, a second time


def _path(table, layer):
  for pattern, path in table.items():
    if match := re.fullmatch(pattern, layer):
      return match.expand(path).removeprefix("conv_/")
  return None
