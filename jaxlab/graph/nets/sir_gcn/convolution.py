"""The convolutions: `SIRConv` and its general form `SIRConvBase`, with and without edge features."""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab import checks
from jaxlab.graph import layers, pairwise, sparse

Aggregation = Literal["sum", "mean", "sym", "max"]
Activation = str | Callable[[Array], Array]


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
    checks.rate("dropout", self.dropout)
    op = operator_of(graph, x)
    drop: Any = lambda v: layers.Dropout(self.dropout)(v, train=train)
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
    return embed(self, self.edge_types, self.hidden, "edge")(edges)


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
    op = operator_of(graph, x)
    ends = [pairwise.at_receivers(op, x), pairwise.at_senders(op, x)]
    if edges is not None:
      _check_edges(op, edges, 2)
      ends.append(edges.astype(x.dtype))
    return _aggregate(op, self.message(jnp.concatenate(ends, axis=-1)), self.aggregation)


def _coefficients(op: sparse.Operator, aggregation: Aggregation) -> Float[Array, " e"]:
  """c_vu of every edge."""
  degree = lambda starts: jnp.maximum(jnp.diff(starts), 1).astype("float32")
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


# -------------------------------------------------------------------------------------------- shared with the networks


def embed(module, rows, width, name, init=nn.initializers.normal(1.0)):
  """A table initialised as torch does."""
  return nn.Embed(rows, width, dtype=module.dtype, param_dtype=module.param_dtype, embedding_init=init, name=name)


def operator_of(graph, x):
  """The operator of a graph whose nodes have features x [N, F], checked."""
  if getattr(x, "ndim", 0) != 2:
    raise ValueError(f"x: got shape {getattr(x, 'shape', None)}, expected features [N, F]")
  op = layers.as_operator(graph, x)
  if op.shape != (x.shape[0], x.shape[0]):
    raise ValueError(f"graph: got an operator of shape {op.shape}, expected {(x.shape[0],) * 2}, one row per node")
  return op


def _check_aggregation(aggregation):
  checks.choice("aggregation", aggregation, Aggregation)


def _check_activation(activation):
  if not callable(activation) and activation not in pairwise.ACTIVATIONS:
    raise ValueError(f"activation: got {activation!r}, expected a function or one of {sorted(pairwise.ACTIVATIONS)}")


def _check_edges(op, edges, ndim):
  shape, count = getattr(edges, "shape", None), op.rows.shape[0]
  if shape is None or len(shape) != ndim or shape[0] != count:
    raise ValueError(f"edges: got shape {shape}, expected {ndim} axes with {count} rows, one for each edge")
