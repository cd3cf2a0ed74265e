"""Sparse kernels on the device: propagation (sparse times dense) with a stored transpose, and segment reductions.

An `Operator` is a sparse matrix in CSR order that also carries its transpose's order, so that the gradient of a
product is another product and never a scatter. It is a pytree: pass it as an argument of a jitted function.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import jraph
import numpy as np
import scipy.sparse
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class Operator:
  """Sparse matrix A of shape [R, C] with E stored entries: A[rows[e], columns[e]] = values[e].

  Entries are sorted by row. `transpose_order[i]` is the entry that comes i-th when sorted by column.

  Attributes:
    rows: receiver of each entry, ascending.
    columns: sender of each entry.
    values: weight of each entry.
    row_starts: entries of row r are `row_starts[r]` up to `row_starts[r + 1]`; padding entries lie after the last.
    transpose_order: see above.
    transpose_starts: as `row_starts`, for columns.
  """

  rows: Int[Array, " e"]
  columns: Int[Array, " e"]
  values: Float[Array, " e"]
  row_starts: Int[Array, " r1"]
  transpose_order: Int[Array, " e"]
  transpose_starts: Int[Array, " c1"]

  @property
  def shape(self) -> tuple[int, int]:
    """[R, C]."""
    return self.row_starts.shape[-1] - 1, self.transpose_starts.shape[-1] - 1

  def replace_values(self, values: Float[Array, " e"]) -> "Operator":
    """The same pattern with other weights."""
    return self.replace(values=values)  # type: ignore[attr-defined]


def from_scipy(
  matrix: scipy.sparse.spmatrix | scipy.sparse.sparray, dtype: jax.typing.DTypeLike = "float32"
) -> Operator:
  """Host. Any scipy matrix as an operator; duplicates are summed."""
  csr = scipy.sparse.csr_array(matrix)
  csr.sum_duplicates()
  rows = np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))
  return _operator(rows, csr.indices, csr.data.astype(dtype), csr.shape, np)


def operator(graph: jraph.GraphsTuple, weights: Float[Array, " e"] | None = None) -> Operator:
  """The graph's weighted adjacency: row = receiver, column = sender. Runs on the host or under `jit`.

  Args:
    graph: edges sorted by receiver, as `structure` makes them.
    weights: [E]; default `graph.edges` when it is a vector, else ones.
  """
  if weights is None:
    weights = graph.edges if getattr(graph.edges, "ndim", 0) == 1 else jnp.ones(graph.senders.shape[0])
  n = jax.tree.leaves(graph.nodes)[0].shape[0] if graph.nodes is not None else int(np.sum(graph.n_node))
  return _operator(graph.receivers, graph.senders, weights, (n, n), jnp)


def _operator(rows, columns, values, shape, xp) -> Operator:
  order = xp.argsort(columns, stable=True)
  starts = functools.partial(lambda ids, n: xp.searchsorted(ids, xp.arange(n + 1)).astype("int32"))
  return Operator(
    rows=jnp.asarray(rows, "int32"),
    columns=jnp.asarray(columns, "int32"),
    values=jnp.asarray(values),
    row_starts=jnp.asarray(starts(rows, shape[0])),
    transpose_order=jnp.asarray(order.astype("int32")),
    transpose_starts=jnp.asarray(starts(columns[order], shape[1])),
  )


def propagate(
  graph: jraph.GraphsTuple | Operator, x: Float[Array, "c *f"], weights: Float[Array, " e"] | None = None
) -> Float[Array, "r *f"]:
  """Weighted sum over incoming edges: y[i] = sum over edges (j -> i) of w * x[j].

  Args:
    graph: operator, or graph sorted by receiver (which is sorted again for the gradient at every call: make an
      operator once where speed matters).
    x: one row per column of the operator (sender).
    weights: [E], in place of the stored ones; differentiable.

  Returns:
    [R, ...] in the dtype of `x`, accumulated in float32.
  """
  op = graph if isinstance(graph, Operator) else operator(graph)
  values = op.values if weights is None else weights
  gathered = x[op.columns] * values.reshape(-1, *[1] * (x.ndim - 1)).astype("float32")
  return jax.ops.segment_sum(gathered, op.rows, op.shape[0], indices_are_sorted=True).astype(x.dtype)
