"""The official models: two of the synthetic tasks, two of all the benchmarks; and their weights."""

import re
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Float

from jaxlab import checks, interop
from jaxlab.graph import layers, pairwise, sparse, structure
from jaxlab.graph.nets.sir_gcn.convolution import Aggregation, SIRConv, embed, operator_of


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
    op = operator_of(graph if operator is None else operator, graph.nodes)
    mask = structure.node_mask(graph)
    drop: Any = lambda v: layers.Dropout(self.dropout)(v, train=train)
    norm = lambda name, v: Norm(self.norm, self.axis_name, self.dtype, self.param_dtype, name=name)(
      graph, v, mask, train=train
    )
    linear = lambda width, name: layers.Linear(width, True, "torch", self.dtype, self.param_dtype, name=name)
    gelu = pairwise.ACTIVATIONS["gelu"]

    x = gelu(drop(linear(self.hidden, "encoder")(graph.nodes)))
    for i in range(self.depth):
      y = norm(f"norm_{i}", x)
      y = self.convolution(f"conv_{i}")(op, y, train=train)
      y = linear(self.hidden, f"linear_{i}")(gelu(drop(y)))
      x = x + drop(y)
    return linear(self.num_outputs, "readout")(norm("readout_norm", x))

  def convolution(self, name: str) -> nn.Module:
    """What a block convolves with, called as a `SIRConv`; a baseline puts its own here."""
    return SIRConv(
      self.hidden, self.hidden, "gelu", self.aggregation, self.message_dropout,
      dtype=self.dtype, param_dtype=self.param_dtype, name=name,
    )  # fmt: skip


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
    checks.choice("residual", self.residual, ("identity", "linear"))
    checks.choice("pool", self.pool, ("sum", "mean", None))
    mask = structure.node_mask(graph)
    drop: Any = lambda rate, v: layers.Dropout(rate)(v, train=train)
    options = (self.axis_name, self.dtype, self.param_dtype)
    linear = lambda width, name: layers.Linear(width, True, "torch", self.dtype, self.param_dtype, name=name)
    act = pairwise.ACTIVATIONS["leaky_relu"]

    x = drop(self.input_dropout, self._encode(graph.nodes))
    op = operator_of(graph._replace(nodes=x) if operator is None else operator, x)
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
      x, mask = self._pool(graph, x), _graph_mask(graph)
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
      return embed(self, self.encoder, self.hidden, "encoder")(nodes)
    if nodes.shape[1] != len(self.encoder):
      raise ValueError(f"graph: got nodes of shape {nodes.shape}, expected [N, {len(self.encoder)}], a column a table")
    glorot = nn.initializers.glorot_uniform()  # as OGB's encoder of atoms
    tables = [embed(self, rows, self.hidden, f"encoder_{i}", glorot) for i, rows in enumerate(self.encoder)]
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
    linear = lambda width, bias, name: layers.Linear(width, bias, "torch", self.dtype, self.param_dtype, name=name)
    key, value = (embed(self, self.size + 1, self.hidden, name) for name in ("key_embedding", "value_embedding"))
    x = key(graph.nodes[:, 0]) + value(graph.nodes[:, 1])
    inner = linear(self.hidden, True, "activation")
    sigma = lambda z: nn.relu(inner(nn.relu(z)))
    conv = SIRConv(self.hidden, self.hidden, sigma, dtype=self.dtype, param_dtype=self.param_dtype, name="conv_0")
    x = conv(operator_of(graph._replace(nodes=x) if operator is None else operator, x), x)
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
    x = embed(self, self.num_classes, self.hidden, "embedding")(graph.nodes)
    conv = SIRConv(self.hidden, self.hidden, dtype=self.dtype, param_dtype=self.param_dtype, name="conv_0")
    x = conv(operator_of(graph._replace(nodes=x) if operator is None else operator, x), x)
    x = layers.Linear(1, False, "torch", self.dtype, self.param_dtype, name="regression")(x)[:, 0]
    total = jax.ops.segment_sum(
      x.astype("float32"), structure.graph_ids(graph), graph.n_node.shape[0], indices_are_sorted=True
    )
    return total.astype(self.dtype)


def _graph_mask(graph):
  """Which graphs of the tuple are real, by the conventions of `structure`."""
  index = jnp.arange(graph.n_node.shape[0])
  return index < jnp.max(jnp.where(graph.n_node > 0, index, 0)) if len(index) > 1 else index == 0


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
    checks.rate(name, getattr(net, name, 0.0))


# ------------------------------------------------------------------------------------------------------------- weights

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
