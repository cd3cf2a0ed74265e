"""Sparse kernels on the device: propagation (sparse times dense) with a stored transpose, and segment reductions.

An `Operator` is a sparse matrix in row order that also carries its transpose's order, so that the gradient of a product
is another product and never a scatter. It is a pytree: pass it as an argument of a jitted function, never capture it.

On GPU and TPU products are sorted segment sums. On CPU they are a host kernel (`jaxlab.graph._product`), several times
faster than XLA's scatter; `vmap` over features or weights runs as one call.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
import jraph
import numpy as np
import scipy.sparse
from jaxtyping import Array, Float, Int

from jaxlab import kernels
from jaxlab.graph import _product


@flax.struct.dataclass
class Operator:
  """Sparse matrix A of shape [R, C] with E stored entries: A[rows[e], columns[e]] = values[e].

  For a graph, A[i, j] is the weight of the edge from sender j to receiver i. Entries are sorted by row. Entries that
  pad a graph carry the padding node's row and column like any other.

  Attributes:
    rows: [E] int32, ascending.
    columns: [E] int32.
    values: [E] floating.
    row_starts: [R + 1] int32; entries of row r are `row_starts[r]` up to `row_starts[r + 1]`.
    transpose_order: [E] int32; the entry that comes i-th when sorted by column.
    transpose_rows: [E] int32; its row, `rows[transpose_order]`.
    transpose_starts: [C + 1] int32; as `row_starts`, for columns.
  """

  rows: Int[Array, " e"]
  columns: Int[Array, " e"]
  values: Float[Array, " e"]
  row_starts: Int[Array, " r1"]
  transpose_order: Int[Array, " e"]
  transpose_rows: Int[Array, " e"]
  transpose_starts: Int[Array, " c1"]

  @property
  def shape(self) -> tuple[int, int]:
    """[R, C]."""
    return self.row_starts.shape[-1] - 1, self.transpose_starts.shape[-1] - 1

  def replace_values(self, values: Float[Array, " e"]) -> "Operator":
    """The same pattern with other weights."""
    return self.replace(values=values)  # type: ignore[attr-defined]

  @property
  def dtype(self) -> jnp.dtype:
    """Dtype of the values."""
    return self.values.dtype

  @property
  def ndim(self) -> int:
    """2, as an array's."""
    return 2


def from_scipy(
  matrix: scipy.sparse.sparray | scipy.sparse.spmatrix, dtype: jax.typing.DTypeLike = "float32"
) -> Operator:
  """Host. Any scipy matrix as an operator; entries at the same place are summed.

  Raises:
    ValueError: values that are not finite.
  """
  csr = scipy.sparse.csr_array(matrix)
  csr.sum_duplicates()
  if not np.isfinite(csr.data).all():
    raise ValueError(f"matrix: got {np.count_nonzero(~np.isfinite(csr.data))} values not finite, expected none")
  rows = np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))
  return _operator(rows, csr.indices, csr.data.astype(dtype), csr.shape, np)


def operator(graph: jraph.GraphsTuple, weights: Float[Array, " e"] | None = None) -> Operator:
  """The graph's weighted adjacency: row = receiver, column = sender. On the host, or traced under `jit`.

  Args:
    graph: edges sorted by receiver, as `structure` makes them.
    weights: [E]; default `graph.edges` when that is a vector, else ones.

  Raises:
    ValueError: edges that are not sorted by receiver (seen on the host only), or `weights` of another length.
  """
  # Features or weights may be traced beside edges that are not.
  xp = jnp if any(isinstance(ends, jax.core.Tracer) for ends in (graph.senders, graph.receivers)) else np
  if weights is None:
    weights = graph.edges if getattr(graph.edges, "ndim", 0) == 1 else xp.ones(graph.senders.shape[0], np.float32)
  if weights.shape != graph.receivers.shape:
    raise ValueError(f"weights: got shape {weights.shape}, expected {graph.receivers.shape}, one for each edge")
  if xp is np and (np.diff(graph.receivers) < 0).any():
    raise ValueError("graph: got edges in another order, expected them sorted by receiver")
  # A padded graph's n_node need not be concrete, its node features' leading axis always is.
  nodes = jax.tree.leaves(graph.nodes, is_leaf=lambda node: isinstance(node, Operator))
  n = nodes[0].shape[0] if nodes else int(np.sum(graph.n_node))
  return _operator(graph.receivers, graph.senders, weights, (n, n), xp)


def _operator(rows, columns, values, shape, xp):
  order = xp.argsort(columns, stable=True)

  def starts(ids, n):
    return xp.searchsorted(ids, xp.arange(n + 1)).astype("int32")

  fields = (
    rows, columns, values, starts(rows, shape[0]), order, xp.asarray(rows)[order], starts(columns[order], shape[1])
  )  # fmt: skip
  return Operator(*(jnp.asarray(f) if f is values else jnp.asarray(f, "int32") for f in fields))


def transpose(op: Operator) -> Operator:
  """A transposed, without sorting anything."""
  inverse = jnp.zeros_like(op.transpose_order).at[op.transpose_order].set(jnp.arange(op.rows.shape[0], dtype="int32"))
  return Operator(
    rows=op.columns[op.transpose_order],
    columns=op.transpose_rows,
    values=op.values[op.transpose_order],
    row_starts=op.transpose_starts,
    transpose_order=inverse,
    transpose_rows=op.columns,
    transpose_starts=op.row_starts,
  )


def propagate(
  graph: jraph.GraphsTuple | Operator, x: Float[Array, "c *f"], weights: Float[Array, " e"] | None = None
) -> Float[Array, "r *f"]:
  """Weighted sum over incoming edges: y[i] = sum over edges (j -> i) of w * x[j], that is A x.

  Differentiable in `x` and in the weights, in reverse mode.

  Args:
    graph: operator, or graph sorted by receiver. A graph is sorted by sender anew at each call: make an operator once
      where speed matters.
    x: one row for each sender.
    weights: [E], in place of the stored ones.

  Returns:
    One row for each receiver, in the dtype of `x`, accumulated in float32 (float64 for float64).

  Raises:
    ValueError: `x` or `weights` of another length than the operator says.
  """
  op = graph if isinstance(graph, Operator) else operator(graph)
  values = op.values if weights is None else weights
  if x.ndim < 1 or x.shape[0] != op.shape[1]:
    raise ValueError(f"x: got shape {x.shape}, expected {op.shape[1]} rows for an operator of shape {op.shape}")
  if values.shape != op.rows.shape:
    raise ValueError(f"weights: got shape {values.shape}, expected {op.rows.shape}, one for each entry")
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"x: got dtype {x.dtype}, expected a floating one")
  accumulate = jnp.promote_types(x.dtype, jnp.float32)
  flat = x.reshape(x.shape[0], math.prod(x.shape[1:])).astype(accumulate)
  y = _multiply(op.replace(values=None), values.astype(accumulate), flat)  # type: ignore[attr-defined]
  return y.astype(x.dtype).reshape(op.shape[0], *x.shape[1:])


# Three products, each linear in either of its float arguments, with gradients among themselves. `pattern` is an
# operator without values.


@jax.custom_vjp
def _multiply(pattern, values, x):
  """A x: [E], [C, F] -> [R, F]."""
  if _host(values):
    identity = jnp.arange(values.shape[0], dtype="int32")
    return _host_multiply(pattern.row_starts, pattern.columns, identity, values[None], x[None])[0]
  messages = x[pattern.columns] * values[:, None]
  return jax.ops.segment_sum(messages, pattern.rows, pattern.shape[0], indices_are_sorted=True)


@jax.custom_vjp
def _multiply_transpose(pattern, values, g):
  """A^T g: [E], [R, F] -> [C, F]."""
  order = pattern.transpose_order
  if _host(values):
    return _host_multiply(pattern.transpose_starts, pattern.transpose_rows, order, values[None], g[None])[0]
  messages = g[pattern.transpose_rows] * values[order, None]
  return jax.ops.segment_sum(messages, pattern.columns[order], pattern.shape[1], indices_are_sorted=True)


@jax.custom_vjp
def _sample(pattern, g, x):
  """g x^T at the stored places: [R, F], [C, F] -> [E]."""
  if _host(g):
    return _host_sample(pattern.rows, pattern.columns, g[None], x[None])[0]
  return (g[pattern.rows] * x[pattern.columns]).sum(-1)


_multiply.defvjp(
  lambda pattern, values, x: (_multiply(pattern, values, x), (pattern, values, x)),
  lambda saved, g: (None, _sample(saved[0], g, saved[2]), _multiply_transpose(saved[0], saved[1], g)),
)
_multiply_transpose.defvjp(
  lambda pattern, values, g: (_multiply_transpose(pattern, values, g), (pattern, values, g)),
  lambda saved, c: (None, _sample(saved[0], saved[2], c), _multiply(saved[0], saved[1], c)),
)
_sample.defvjp(
  lambda pattern, g, x: (_sample(pattern, g, x), (pattern, g, x)),
  lambda saved, c: (None, _multiply(saved[0], c, saved[2]), _multiply_transpose(saved[0], c, saved[1])),
)


def _host(values: Array) -> bool:
  """Whether to use host kernels, which compute in float32."""
  return values.dtype == jnp.float32 and kernels.available()


@jax.custom_batching.custom_vmap
def _host_multiply(starts, columns, order, values, x):
  """[V, E], [S, C, F] -> [S, R, F], V being 1 or S."""
  batch, rows, width = x.shape[0], starts.shape[0] - 1, x.shape[2]
  shape = jax.ShapeDtypeStruct((batch, rows, width), x.dtype)
  lanes = kernels.max_lanes()
  if batch > 1 and values.shape[0] == 1 and width <= lanes:
    lanes = 8 if width <= 8 else lanes  # half a register where that is enough
    kernel, items = _product.multiply_each(lanes), _product.multiply_each_items(batch, rows)
  else:
    kernel, items = _product.multiply(lanes), _product.multiply_items(batch, rows)
  return kernels.call(kernel, [shape], starts, columns, order, values, x, items=items)[0]


@_host_multiply.def_vmap
def _(size, batched, starts, columns, order, values, x):
  if any(batched[:3]):  # a pattern for each element: nothing to share
    axes = [0 if b else None for b in batched]
    return _loop(_host_multiply, size, axes, starts, columns, order, values, x), True
  inner = x.shape[1] if batched[4] else x.shape[0]
  x = _fold(x if batched[4] else jnp.broadcast_to(x, (size, *x.shape)))
  if batched[3]:
    values = _fold(jnp.broadcast_to(values, (size, inner, values.shape[-1])))
  elif values.shape[0] > 1:
    values = jnp.tile(values, (size, 1))
  y = _host_multiply(starts, columns, order, values, x)
  return y.reshape(size, inner, *y.shape[1:]), True


@jax.custom_batching.custom_vmap
def _host_sample(rows, columns, g, x):
  """[S, R, F], [S, C, F] -> [S, E]."""
  shape = jax.ShapeDtypeStruct((g.shape[0], rows.shape[0]), g.dtype)
  items = _product.sample_items(*shape.shape)
  return kernels.call(_product.sample, [shape], rows, columns, g, x, items=items)[0]


@_host_sample.def_vmap
def _(size, batched, rows, columns, g, x):
  if any(batched[:2]):
    return _loop(_host_sample, size, [0 if b else None for b in batched], rows, columns, g, x), True
  g, x = (_fold(a if b else jnp.broadcast_to(a, (size, *a.shape))) for a, b in zip((g, x), batched[2:], strict=True))
  y = _host_sample(rows, columns, g, x)
  return y.reshape(size, -1, y.shape[1]), True


def _fold(a):
  """Merges the two leading axes."""
  return a.reshape(-1, *a.shape[2:])


def _loop(function, size, axes, *args):
  """vmap as a loop on the device."""

  def at(i):
    return function(*(a if axis is None else a[i] for a, axis in zip(args, axes, strict=True)))

  return jax.lax.map(at, jnp.arange(size))


# Reductions over the incoming edges of every node; `op` is an operator or a graph sorted by receiver.


def segment_sum(op: Operator, data: Float[Array, "e *f"]) -> Float[Array, "r *f"]:
  """Sum of the rows' entries; 0 where there are none. Accumulates in float32."""
  _check_entries(op, data)
  every = jnp.arange(data.shape[0], dtype="int32")
  # The matrix that adds up entries: one column for each entry, in order.
  adder = Operator(op.rows, every, None, op.row_starts, every, op.rows, jnp.arange(data.shape[0] + 1, dtype="int32"))  # type: ignore[arg-type]
  return propagate(adder, data, jnp.ones(data.shape[0], jnp.promote_types(data.dtype, jnp.float32)))


def segment_mean(op: Operator, data: Float[Array, "e *f"]) -> Float[Array, "r *f"]:
  """Mean of the rows' entries; 0 where there are none."""
  counts = jnp.maximum(jnp.diff(op.row_starts), 1).reshape(-1, *[1] * (data.ndim - 1))
  return (segment_sum(op, data) / counts).astype(data.dtype)


def segment_max(op: Operator, data: Float[Array, "e *f"], *, empty: float = 0.0) -> Float[Array, "r *f"]:
  """Largest of the rows' entries; `empty` where there are none."""
  _check_entries(op, data)
  largest = jax.ops.segment_max(data, op.rows, op.shape[0], indices_are_sorted=True)
  any_entry = (jnp.diff(op.row_starts) > 0).reshape(-1, *[1] * (data.ndim - 1))
  return jnp.where(any_entry, largest, jnp.asarray(empty, data.dtype))


def segment_softmax(op: Operator, logits: Float[Array, "e *f"]) -> Float[Array, "e *f"]:
  """Softmax over the entries of each row, in the dtype of `logits`, computed in float32."""
  _check_entries(op, logits)
  scores = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  scores = jnp.exp(scores - jax.lax.stop_gradient(segment_max(op, scores))[op.rows])
  return (scores / segment_sum(op, scores)[op.rows]).astype(logits.dtype)


def _check_entries(op, data):
  if data.ndim < 1 or data.shape[0] != op.rows.shape[0]:
    raise ValueError(f"data: got shape {data.shape}, expected {op.rows.shape[0]} rows, one for each entry")
