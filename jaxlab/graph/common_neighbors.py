"""Common and exclusive neighbours of node pairs: enumerated on the host, pooled on the device.

For a pair (i, j) of a graph the neighbourhoods split into three sets,

    common = N(i) & N(j),    left only = N(i) \\ N(j),    right only = N(j) \\ N(i).

How many there are depends on the data, so a compiled program cannot list them. `neighbor_sets` lists them in one merge
of sorted rows for each pair; `pairs` turns the lists into sparse operators [P, N] of bucketed static sizes, whose
product with node features is the sum over a set, gradient included. Batches of one bucket share one compilation.

N(i) is row i of the adjacency, a CSR matrix of positive entries; `adjacency` makes one. A set may hold i or j: if the
edge (i, j) is there, j is in N(i) and not in N(j).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import numba
import numpy as np
import scipy.sparse
from jaxtyping import Array, Bool, Float, Int

from jaxlab import checks
from jaxlab.graph import sparse

# --------------------------------------------------------------------------------------------------------- enumeration


class NeighborSets(NamedTuple):
  """Matrices [P, N] of ones: row p marks the nodes of a set of pair p. Columns are sorted.

  Attributes:
    common: neighbours of both ends.
    left_only: of the left end alone.
    right_only: of the right end alone.
  """

  common: scipy.sparse.csr_array
  left_only: scipy.sparse.csr_array
  right_only: scipy.sparse.csr_array


def adjacency(edges: Int[np.ndarray, "2 e"], num_nodes: int) -> scipy.sparse.csr_array:
  """Host. Symmetric 0/1 matrix [N, N] of undirected edges in any direction; self-loops are left out.

  Raises:
    ValueError: edges of another shape, or nodes out of range.
  """
  edges = np.asarray(edges)
  if edges.ndim != 2 or edges.shape[0] != 2:
    raise ValueError(f"edges: got shape {edges.shape}, expected [2, E]")
  if edges.size and not (edges.min() >= 0 and edges.max() < num_nodes):
    raise ValueError(f"edges: got nodes from {edges.min()} to {edges.max()}, expected nodes in [0, {num_nodes})")
  edges = edges[:, edges[0] != edges[1]]
  rows, columns = np.concatenate([edges, edges[::-1]], axis=1)
  matrix = scipy.sparse.csr_array((np.ones(rows.size, "float32"), (rows, columns)), shape=(num_nodes, num_nodes))
  matrix.sum_duplicates()
  matrix.data[:] = 1
  return matrix


def neighbor_sets(
  left: scipy.sparse.csr_array,
  pairs: Int[np.ndarray, "2 p"],
  right: scipy.sparse.csr_array | None = None,
) -> NeighborSets:
  """Host. The three sets of every pair, in time linear in the degrees.

  Args:
    left: [N, N] whose rows are the neighbourhoods of the left ends; the pattern of stored entries counts.
    pairs: [2, P] left and right ends.
    right: likewise for the right ends; default the same matrix. Two hops against one is `(a, pairs, a @ a)`.
  """
  right = left if right is None else right
  ends = _ends(pairs, left.shape[0])
  both_starts, both, starts, columns, from_right = _merge(*_rows(left), *_rows(right), *ends)
  rows = np.repeat(np.arange(starts.size - 1), np.diff(starts))
  sides = []
  for side in (~from_right, from_right):
    count = np.bincount(rows[side], minlength=starts.size - 1)
    sides.append(_matrix(np.append(0, np.cumsum(count)).astype("int32"), columns[side], left.shape[1]))
  return NeighborSets(_matrix(both_starts, both, left.shape[1]), *sides)


def common_neighbors(
  left: scipy.sparse.csr_array, pairs: Int[np.ndarray, "2 p"], right: scipy.sparse.csr_array | None = None
) -> scipy.sparse.csr_array:
  """Host. `neighbor_sets(...).common` alone, which is faster where degrees differ: the shorter row is looked up."""
  right = left if right is None else right
  ends = _ends(pairs, left.shape[0])
  starts, columns = _intersection(*_rows(left), *_rows(right), *ends)
  return _matrix(starts, columns, left.shape[1])


def heuristic(
  graph: scipy.sparse.csr_array,
  pairs: Int[np.ndarray, "2 p"],
  weight: Callable[[np.ndarray], np.ndarray] = np.ones_like,
) -> Float[np.ndarray, " p"]:
  """Host. Sum over common neighbours u of weight(degree of u).

  `np.ones_like` counts common neighbours; `lambda d: 1 / np.log(d)` is the index of Adamic and Adar; `np.reciprocal`
  that of resource allocation (Zhou et al. 2009). A common neighbour of two different nodes has degree 2 or more.

  Args:
    graph: [N, N] symmetric.
    pairs: [2, P].
    weight: elementwise, of float64 degrees of at least 2.
  """
  degree = np.maximum(np.diff(graph.indptr), 2).astype("float64")
  return common_neighbors(graph, pairs) @ weight(degree)


def _ends(pairs, num_nodes):
  pairs = np.asarray(pairs)
  if pairs.ndim != 2 or pairs.shape[0] != 2 or not np.issubdtype(pairs.dtype, np.integer):
    raise ValueError(f"pairs: got {pairs.dtype} of shape {pairs.shape}, expected integers [2, P]")
  if pairs.size and not (pairs.min() >= 0 and pairs.max() < num_nodes):
    raise ValueError(f"pairs: got nodes from {pairs.min()} to {pairs.max()}, expected nodes in [0, {num_nodes})")
  return pairs.astype("int32")


def _rows(matrix):
  if not matrix.has_sorted_indices:
    matrix = matrix.sorted_indices()
  return matrix.indptr.astype("int32", copy=False), matrix.indices.astype("int32", copy=False)


def _matrix(starts, columns, num_nodes):
  data = np.ones(columns.size, "float32")
  matrix = scipy.sparse.csr_array((data, columns, starts), shape=(starts.size - 1, num_nodes))
  matrix.has_sorted_indices = matrix.has_canonical_format = True
  return matrix


@numba.njit(cache=True, nogil=True)
def _merge(starts, columns, right_starts, right_columns, left, right):
  """Row starts and columns of the common entries and of all others, and which others are the right end's: one merge of
  two sorted rows for each pair."""
  most, least = 0, 0
  for p in range(left.size):
    a = starts[left[p] + 1] - starts[left[p]]
    b = right_starts[right[p] + 1] - right_starts[right[p]]
    most += a + b
    least += min(a, b)
  both, other, from_right = np.empty(least, np.int32), np.empty(most, np.int32), np.empty(most, np.bool_)
  both_starts, other_starts, x, y = np.zeros(left.size + 1, np.int32), np.zeros(left.size + 1, np.int32), 0, 0
  for p in range(left.size):
    a, a_end = starts[left[p]], starts[left[p] + 1]
    b, b_end = right_starts[right[p]], right_starts[right[p] + 1]
    while a < a_end and b < b_end:
      u, v = columns[a], right_columns[b]
      if u == v:
        both[x] = u
        x, a, b = x + 1, a + 1, b + 1
      else:
        other[y], from_right[y] = min(u, v), v < u
        y, a, b = y + 1, a + (u < v), b + (v < u)
    while a < a_end:
      other[y], from_right[y] = columns[a], False
      y, a = y + 1, a + 1
    while b < b_end:
      other[y], from_right[y] = right_columns[b], True
      y, b = y + 1, b + 1
    both_starts[p + 1], other_starts[p + 1] = x, y
  return both_starts, both[:x].copy(), other_starts, other[:y].copy(), from_right[:y].copy()


@numba.njit(cache=True, nogil=True)
def _intersection(starts, columns, right_starts, right_columns, left, right):
  """Row starts and columns of the common set: a merge, or binary searches where one row is far longer."""
  least = 0
  for p in range(left.size):
    least += min(starts[left[p] + 1] - starts[left[p]], right_starts[right[p] + 1] - right_starts[right[p]])
  found, found_starts, x = np.empty(least, np.int32), np.zeros(left.size + 1, np.int32), 0
  for p in range(left.size):
    a, a_end, short = starts[left[p]], starts[left[p] + 1], columns
    b, b_end, long = right_starts[right[p]], right_starts[right[p] + 1], right_columns
    if a_end - a > b_end - b:
      a, a_end, short, b, b_end, long = b, b_end, long, a, a_end, short
    if 8 * (a_end - a) < b_end - b:
      for k in range(a, a_end):
        b += np.searchsorted(long[b:b_end], short[k])
        if b < b_end and long[b] == short[k]:
          found[x] = short[k]
          x += 1
    else:
      while a < a_end and b < b_end:
        u, v = short[a], long[b]
        if u == v:
          found[x] = u
          x += 1
        a, b = a + (u <= v), b + (v <= u)
    found_starts[p + 1] = x
  return found_starts, found[:x].copy()


# -------------------------------------------------------------------------------------------------------- for devices


@flax.struct.dataclass
class Pairs:
  """Pairs of nodes and what lies between them. Padding pairs join node 0 to itself and have empty sets.

  Attributes:
    left: [P] int32 node.
    right: [P] int32 node.
    mask: [P] real pairs.
    common: operator [Q, N]; row p sums over the common neighbours of pair p. Q is P, or at the last level below the
      first fewer: pairs from Q on have none.
    exclusive: operator [P, N] over the left only and the right only; None if not asked for.
    candidates: [E'] int32; entry e of `exclusive`, a node u of pair (i, j), is about whether u and the end that it is
      not joined to are linked: pair `candidates[e]` of `inner`.
    inner: those pairs, each once and unordered, with sets of their own; None at the last level.
    two_hop: operators [P, N] over N(i) & N2(j), N2(i) & N(j), N2(i) & N2(j), with N2 the nodes that a walk of length 2
      reaches; None if not asked for.
  """

  left: Int[Array, " p"]
  right: Int[Array, " p"]
  mask: Bool[Array, " p"]
  common: sparse.Operator
  exclusive: sparse.Operator | None = None
  candidates: Int[Array, " e"] | None = None
  inner: "Pairs | None" = None
  two_hop: tuple[sparse.Operator, sparse.Operator, sparse.Operator] | None = None

  @property
  def depth(self) -> int:
    """Levels of candidates below."""
    return 0 if self.inner is None else 1 + self.inner.depth


class Sizes(NamedTuple):
  """Static sizes of `Pairs`; 0 for what is absent.

  Attributes:
    pairs: P.
    rows: Q.
    common: entries of `common`.
    exclusive: entries of `exclusive`.
    two_hop: entries of each of the three operators.
    inner: sizes of `inner`, or None.
  """

  pairs: int = 0
  rows: int = 0
  common: int = 0
  exclusive: int = 0
  two_hop: tuple[int, int, int] = (0, 0, 0)
  inner: "Sizes | None" = None


def bucket(count: int) -> int:
  """The least number of the form 2^k, 1.25, 1.5 or 1.75 times 2^k that is not less, and at least 16."""
  step = 1 << max((int(count) - 1).bit_length() - 3, 2)
  return max(-(-int(count) // step) * step, 16)


def sizes(made: Pairs) -> Sizes:
  """The sizes of pairs that were made, to make others alike."""
  entries = lambda op: 0 if op is None else op.rows.shape[-1]
  return Sizes(
    pairs=made.left.shape[-1],
    rows=made.common.shape[0],
    common=entries(made.common),
    exclusive=entries(made.exclusive),
    two_hop=(0, 0, 0) if made.two_hop is None else tuple(entries(op) for op in made.two_hop),  # type: ignore[arg-type]
    inner=None if made.inner is None else sizes(made.inner),
  )


def largest(many: list[Sizes]) -> Sizes:
  """Sizes that hold each of several."""
  inner = [one.inner for one in many if one.inner is not None]
  most = lambda name: max(getattr(one, name) for one in many)
  return Sizes(
    pairs=most("pairs"),
    rows=most("rows"),
    common=most("common"),
    exclusive=most("exclusive"),
    two_hop=tuple(max(one.two_hop[i] for one in many) for i in range(3)),  # type: ignore[arg-type]
    inner=largest(inner) if inner else None,
  )


def grown(given: Sizes) -> Sizes:
  """Buckets that also hold batches a little larger than those seen; pairs and absent parts stay as they are.

  A tenth more, and four standard deviations of a count of rare events.
  """
  more = lambda count: bucket(int(1.1 * count + 4 * count**0.5)) if count else 0
  return Sizes(
    pairs=given.pairs,
    rows=given.rows,
    common=more(given.common),
    exclusive=more(given.exclusive),
    two_hop=(more(given.two_hop[0]), more(given.two_hop[1]), more(given.two_hop[2])),
    inner=None
    if given.inner is None
    else grown(given.inner)._replace(pairs=more(given.inner.pairs), rows=more(given.inner.rows)),
  )


def pairs(
  graph: scipy.sparse.csr_array,
  ends: Int[np.ndarray, "2 p"],
  *,
  depth: int = 0,
  exclusive: bool = False,
  two_hop: bool = False,
  edge_dropout: float = 0.0,
  drop_again: bool = True,
  max_common: int | None = None,
  max_exclusive: int | None = None,
  rng: np.random.Generator | None = None,
  at_least: Sizes | None = None,
) -> Pairs:
  """Host. Enumerates the sets of pairs and pads them. Leaves are NumPy arrays.

  Args:
    graph: [N, N] adjacency; entry (i, u) puts u in N(i).
    ends: [2, P].
    depth: levels of candidates: 0 for the common neighbours only, 1 for completion once, ...
    exclusive: list the exclusive sets at depth 0 too, without candidates.
    two_hop: list the sets of walks of length 2 too.
    edge_dropout: share of the entries of `graph` to drop first, each direction by itself; entries keep weight 1.
    drop_again: drop from what is left once more for each level below, as the code of arXiv:2302.00890 does.
    max_common: draw so many common neighbours of a pair that has more, with replacement, weighted to keep the sum.
    max_exclusive: likewise for each of the two exclusive sets.
    rng: for drops and draws.
    at_least: least sizes; where more is needed, and by default, a size is the next `bucket`.

  Raises:
    ValueError: an argument out of range, or randomness without `rng`.
  """
  if depth < 0:
    raise ValueError(f"depth: got {depth}, expected 0 or more")
  checks.rate("edge_dropout", edge_dropout)
  for name, most in (("max_common", max_common), ("max_exclusive", max_exclusive)):
    if most is not None and most < 1:
      raise ValueError(f"{name}: got {most}, expected a number of neighbours, or None for all")
  if rng is None and (edge_dropout or max_common or max_exclusive):
    raise ValueError("rng: got None, expected a generator, since edges or neighbours are drawn")
  ends = _ends(ends, graph.shape[0])
  draws = _Draws(edge_dropout, drop_again, max_common, max_exclusive, rng)
  return _level(graph, ends, depth, exclusive, two_hop, draws, at_least or Sizes(), inner=False)[0]


class _Draws(NamedTuple):
  """The random options of `pairs`."""

  edge_dropout: float
  drop_again: bool
  max_common: int | None
  max_exclusive: int | None
  rng: Any


def _level(graph, ends, depth, exclusive, two_hop, draws, least, inner):
  """Pairs, and where each of the given ones is among them."""
  if draws.edge_dropout and (draws.drop_again or not inner):
    graph = masked(graph, draws.rng.random(graph.nnz) >= draws.edge_dropout)
  common = None if depth or exclusive else common_neighbors(graph, ends)
  place = np.arange(ends.shape[1])
  rows = size = _fit(ends.shape[1], least.pairs)
  if inner and depth == 0:
    # Most candidates have no common neighbour. Those that do come first, and only they are rows of the operator.
    count = np.diff(common.indptr)
    order = np.argsort(count == 0, kind="stable")
    ends, place[order] = ends[:, order], np.arange(order.size)
    common = _matrix(np.append(0, np.cumsum(count[order])).astype("int32"), common.indices, graph.shape[0])
    rows = min(_fit(int(np.count_nonzero(count)), least.rows), size)

  extra = {}
  nested = Sizes() if least.inner is None else least.inner
  if depth or exclusive:
    common, (starts, columns, values, from_right) = _split(graph, ends, draws)
    extra["exclusive"] = _operator(starts, columns, values, size, _fit(columns.size, least.exclusive), graph.shape[0])
    if depth:
      row = np.repeat(np.arange(starts.size - 1), np.diff(starts))
      strangers = np.where(from_right, ends[0][row], ends[1][row])  # the end that the node is not a neighbour of
      low, high = np.minimum(columns, strangers), np.maximum(columns, strangers)
      codes, inverse = np.unique(low.astype("int64") * graph.shape[0] + high, return_inverse=True)
      candidates = np.stack([codes // graph.shape[0], codes % graph.shape[0]]).astype("int32")
      extra["inner"], moved = _level(graph, candidates, depth - 1, False, False, draws, nested, inner=True)
      extra["candidates"] = _padded(moved[inverse], extra["exclusive"].rows.size)
  if two_hop:
    square = scipy.sparse.csr_array(graph @ graph)
    square.sort_indices()
    overlaps = (
      common_neighbors(a, ends, b) for a, b in ((graph, square), (square, graph), (square, square))
    )  # fmt: skip
    extra["two_hop"] = tuple(
      _operator(*_entries(_drawn(overlap, draws.max_common, draws.rng)), size, _fit(overlap.nnz, n), graph.shape[0])
      for overlap, n in zip(overlaps, least.two_hop, strict=True)
    )
  starts, columns, values = _entries(_drawn(common, draws.max_common, draws.rng))
  made = Pairs(
    left=_padded(ends[0], size),
    right=_padded(ends[1], size),
    mask=np.arange(size) < ends.shape[1],
    common=_operator(starts[: rows + 1], columns, values, rows, _fit(columns.size, least.common), graph.shape[0]),
    **extra,
  )
  return made, place


def _split(graph, ends, draws):
  """The common set as a matrix, and the exclusive ones together: starts, columns, weights, whether of the right end."""
  if draws.max_exclusive is None:
    both_starts, both, starts, columns, from_right = _merge(*_rows(graph), *_rows(graph), *ends)
    return _matrix(both_starts, both, graph.shape[1]), (starts, columns, np.ones(columns.size, "float32"), from_right)
  common, *sides = neighbor_sets(graph, ends)
  sides = [_drawn(side, draws.max_exclusive, draws.rng) for side in sides]
  rows = np.concatenate([np.repeat(np.arange(ends.shape[1]), np.diff(side.indptr)) for side in sides])
  order = np.argsort(rows, kind="stable")
  starts = (sides[0].indptr + sides[1].indptr).astype("int32")
  columns, values = (np.concatenate([getattr(s, f) for s in sides])[order] for f in ("indices", "data"))
  return common, (starts, columns.astype("int32"), values, order >= sides[0].nnz)


def masked(graph: scipy.sparse.csr_array, keep: Bool[np.ndarray, " e"]) -> scipy.sparse.csr_array:
  """Host. The stored entries that the mask keeps, in CSR order."""
  before = np.append(0, np.cumsum(keep)).astype("int32")
  return _matrix(before[graph.indptr], graph.indices[keep].astype("int32", copy=False), graph.shape[1])


def _drawn(matrix, most, rng):
  """At most so many entries a row, drawn with replacement where there are more: weights sum to the row's count."""
  count = np.diff(matrix.indptr)
  large = np.flatnonzero(count > most) if most is not None else np.empty(0, int)
  if not large.size:
    return matrix
  picks = matrix.indptr[large, None] + (rng.random((large.size, most)) * count[large, None]).astype("int64")
  rows = np.repeat(np.arange(count.size), count)
  kept = ~np.isin(rows, large)
  rows = np.concatenate([rows[kept], np.repeat(large, most)])
  columns = np.concatenate([matrix.indices[kept], matrix.indices[picks.ravel()]])
  values = np.concatenate([matrix.data[kept], np.repeat(count[large] / most, most)]).astype("float32")
  drawn = scipy.sparse.csr_array((values, (rows, columns)), shape=matrix.shape)
  drawn.sum_duplicates()
  return drawn


def _entries(matrix):
  return matrix.indptr.astype("int32"), matrix.indices.astype("int32"), matrix.data


def _fit(count, least):
  return least if count <= least else bucket(count)


def _padded(values, size):
  out = np.zeros(size, "int32")
  out[: values.size] = values
  return out


def _operator(starts, columns, values, num_rows, num_entries, num_nodes):
  """Padding entries are zeros at the last row and column."""
  return sparse.Operator(*_pad(starts, columns, values, num_rows, num_entries, num_nodes))


@numba.njit(cache=True, nogil=True)
def _pad(starts, columns, values, num_rows, num_entries, num_nodes):
  count = columns.size
  rows, padded, weights = (
    np.empty(num_entries, np.int32),
    np.empty(num_entries, np.int32),
    np.empty(num_entries, np.float32),
  )
  row_starts, column_starts = np.empty(num_rows + 1, np.int32), np.zeros(num_nodes + 1, np.int32)
  for r in range(num_rows):
    first = starts[min(r, starts.size - 1)]
    row_starts[r] = first
    for e in range(first, starts[min(r + 1, starts.size - 1)]):
      rows[e], padded[e], weights[e] = r, columns[e], values[e]
  for e in range(count, num_entries):
    rows[e], padded[e], weights[e] = num_rows - 1, num_nodes - 1, 0
  row_starts[num_rows] = num_entries
  for e in range(num_entries):  # counting sort by column
    column_starts[padded[e] + 1] += 1
  for c in range(num_nodes):
    column_starts[c + 1] += column_starts[c]
  place, order, transpose_rows = column_starts.copy(), np.empty(num_entries, np.int32), np.empty(num_entries, np.int32)
  for e in range(num_entries):
    at = place[padded[e]]
    order[at], transpose_rows[at] = e, rows[e]
    place[padded[e]] = at + 1
  return rows, padded, weights, row_starts, order, transpose_rows, column_starts
