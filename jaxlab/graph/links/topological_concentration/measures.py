"""TC exactly on the host, ATC on the device, and how far a split shifts TC.

With A the train adjacency, W_k = A^k counts walks and S_k = 1[A^k > 0] marks where they end. For an edge (i, j)

    inter(i, j) = sum_{k1, k2 <= K} beta^(k1 + k2 - 2) (W_k1 S_k2')_ij = w_i . s_j
    norm(i) = (sum_k1 beta^(k1 - 1) |W_k1|_i) (sum_k2 beta^(k2 - 1))

with w = sum_k beta^(k-1) W_k and s = sum_k beta^(k-1) S_k, so each is summed over levels once, not for each pair of
levels. Multiplicity counts in i's tree only: inter is not symmetric beyond K = 1.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numba
import numpy as np
import scipy.sparse
from jaxtyping import Array, Float, Key

from jaxlab import checks
from jaxlab.graph import common_neighbors, sparse

Similarity = Literal["dot", "cosine"]
Receiver = Literal["neighbour", "centre"]

# -------------------------------------------------------------------------------------------------------------- exact


def concentration(
  graph: scipy.sparse.csr_array,
  targets: scipy.sparse.csr_array | None = None,
  *,
  depth: int = 1,
  decay: float | None = None,
  block: int = 2**24,
) -> Float[np.ndarray, " n"]:
  """Host. TC^t of every node, in float64.

      TC^t(i) = 1 / |N^t(i)| sum_{j in N^t(i)} inter(i, j) / (norm(i) - [t is train])

  With depth 1 and t train it is the local clustering coefficient, exactly: what is taken off the norm is j itself,
  which cannot be a common neighbour. 0 where nothing is defined: no target, no train edge, or for t train a single one.

  Args:
    graph: [N, N] train edges in both directions, no self-loops; stored entries count, not their values.
    targets: [N, N] edges of another split, likewise; None for the train edges.
    depth: K, levels of the trees.
    decay: beta; default 1 / mean degree, isolated nodes included.
    block: entries of s to hold at once, 12 bytes each; at least N are. Beyond that nodes are taken in row blocks.

  Raises:
    ValueError: on an argument of another form or out of range.

  Source: `cal_tc` of the official code.
  """
  n = _check_graph("graph", graph)
  if targets is not None:
    _check_graph("targets", targets, n)
  checks.count("depth", depth)
  if decay is None:
    decay = n / max(graph.nnz, 1)
  if not 0 < decay < np.inf:
    raise ValueError(f"decay: got {decay}, expected a positive number")
  if block < 1:
    raise ValueError(f"block: got {block}, expected a number of entries")
  starts, columns = _rows(graph)
  target_starts, target_columns = (starts, columns) if targets is None else _rows(targets)
  degree = np.diff(starts)
  if depth == 1:
    inter, walks = _common(starts, columns, target_starts, target_columns), degree
  else:
    inter, walks = np.zeros(n), np.zeros(n)
    first = 0
    while first < n:
      last, *support = _supports(starts, columns, depth, float(decay), first, max(block, n))
      _overlaps(
        starts, columns, depth, float(decay), target_starts, target_columns, first, last, *support, inter, walks
      )
      first = last
  count, own = np.diff(target_starts), targets is None
  norm = count * (walks * np.sum(float(decay) ** np.arange(depth)) - own)
  defined = (count > own) & (degree > 0)
  return np.divide(inter, norm, out=np.zeros(n), where=defined)


@numba.njit(cache=True, nogil=True)
def _common(starts, columns, target_starts, target_columns):
  """Sum over targets j of |N_i & N_j|: inter for one level."""
  n = starts.size - 1
  total, marked = np.zeros(n), np.full(n, -1, np.int32)
  for i in range(n):
    begin, end = starts[i], starts[i + 1]
    if begin == end or target_starts[i] == target_starts[i + 1]:
      continue
    for e in range(begin, end):
      marked[columns[e]] = i
    shared = 0
    for t in range(target_starts[i], target_starts[i + 1]):
      j = target_columns[t]
      a, last = starts[j], starts[j + 1]
      if 8 * (end - begin) < last - a:  # the few neighbours of i are looked up among those of a hub
        for e in range(begin, end):
          a += np.searchsorted(columns[a:last], columns[e])
          shared += a < last and columns[a] == columns[e]
      else:
        for b in range(a, last):
          shared += marked[columns[b]] == i
    total[i] = shared
  return total


@numba.njit(cache=True, nogil=True)
def _supports(starts, columns, depth, decay, first, capacity):
  """Rows of s from `first` on, as many as surely fit: the row after the last, row starts, columns, values."""
  n = starts.size - 1
  seen, owner, place = np.full(n, -1, np.int64), np.full(n, -1, np.int64), np.empty(n, np.int64)
  frontier, following = np.empty(n, np.int32), np.empty(n, np.int32)
  found, values = np.empty(capacity, np.int32), np.empty(capacity)
  found_starts = np.zeros(n - first + 1, np.int64)
  x, row = 0, first
  while row < n and x + n <= capacity:
    frontier[0], size, scale = row, 1, 1.0
    for level in range(depth):
      stamp, reached = row * depth + level, 0
      for f in range(size):
        u = frontier[f]
        for e in range(starts[u], starts[u + 1]):
          v = columns[e]
          if seen[v] == stamp:
            continue
          seen[v] = stamp
          following[reached] = v
          reached += 1
          if owner[v] != row:
            owner[v], place[v] = row, x
            found[x], values[x] = v, scale
            x += 1
          else:
            values[place[v]] += scale
      frontier, following, size = following, frontier, reached
      scale *= decay
    row += 1
    found_starts[row - first] = x
  return row, found_starts[: row - first + 1], found, values


@numba.njit(cache=True, nogil=True)
def _overlaps(
  starts, columns, depth, decay, target_starts, target_columns, first, last, s_starts, s_columns, s_values, inter, walks
):
  """Adds to inter[i] the sum of w_i . s_j over targets j in [first, last), and sets walks[i] = |w_i|."""
  n = starts.size - 1
  w, now, after = np.zeros(n), np.zeros(n), np.zeros(n)
  frontier, following, touched = np.empty(n, np.int32), np.empty(n, np.int32), np.empty(n, np.int32)
  for i in range(n):
    needed = 0
    for e in range(target_starts[i], target_starts[i + 1]):
      needed += first <= target_columns[e] < last
    if needed == 0 or starts[i] == starts[i + 1]:
      continue
    frontier[0], size, scale, count, total = i, 1, 1.0, 0, 0.0
    now[i] = 1
    for _ in range(depth):
      reached = 0
      for f in range(size):
        u = frontier[f]
        for e in range(starts[u], starts[u + 1]):
          v = columns[e]
          if after[v] == 0:
            following[reached] = v
            reached += 1
          after[v] += now[u]
        now[u] = 0
      for f in range(reached):
        v = following[f]
        if w[v] == 0:
          touched[count] = v
          count += 1
        w[v] += scale * after[v]
        total += scale * after[v]
      frontier, following, size = following, frontier, reached
      now, after = after, now
      scale *= decay
    for f in range(size):
      now[frontier[f]] = 0
    shared = 0.0
    for e in range(target_starts[i], target_starts[i + 1]):
      j = target_columns[e]
      if first <= j < last:
        for a in range(s_starts[j - first], s_starts[j - first + 1]):
          shared += w[s_columns[a]] * s_values[a]
    inter[i] += shared
    walks[i] = total
    for c in range(count):
      w[touched[c]] = 0


class Shift(NamedTuple):
  """TC by train edges against TC by other edges, over the nodes that have both.

  Attributes:
    train: mean of TC^train.
    target: mean of TC^target.
    difference: mean of TC^target - TC^train; below 0 where new links land outside of a node's neighbourhood.
    standard_error: of that mean, over nodes.
    nodes: how many have two train edges or more, and a target.
  """

  train: float
  target: float
  difference: float
  standard_error: float
  nodes: int


def shift(
  graph: scipy.sparse.csr_array,
  targets: scipy.sparse.csr_array,
  *,
  depth: int = 1,
  decay: float | None = None,
) -> Shift:
  """Host. The distribution shift that a split makes: arguments as `concentration`.

  Raises:
    ValueError: as `concentration`, or where fewer than two nodes have both.
  """
  train = concentration(graph, depth=depth, decay=decay)
  target = concentration(graph, targets, depth=depth, decay=decay)
  both = (np.diff(graph.indptr) > 1) & (np.diff(targets.indptr) > 0)
  nodes = int(np.count_nonzero(both))
  if nodes < 2:
    raise ValueError(f"targets: got {nodes} nodes with two train edges and a target, expected at least 2")
  change = target[both] - train[both]
  return Shift(
    float(train[both].mean()),
    float(target[both].mean()),
    float(change.mean()),
    float(change.std(ddof=1) / nodes**0.5),
    nodes,
  )


# ------------------------------------------------------------------------------------------------- weighted, one hop


def edge_overlap(
  operator: sparse.Operator, graph: scipy.sparse.csr_array, targets: scipy.sparse.csr_array | None = None
) -> Float[np.ndarray, " e"]:
  """Host. |N^t(i) & N^train(j)| / |N^t(i)| for every message edge: entry (i, j) of the operator.

  Args:
    operator: [N, N] message edges, centre i as row; self-loops allowed, their entries are 0.
    graph: [N, N] train edges.
    targets: [N, N] edges of split t; None for the train edges.

  Returns:
    [E] float32; 0 where N^t(i) is empty.
  """
  n = _check_graph("graph", graph)
  targets = graph if targets is None else targets
  _check_graph("targets", targets, n)
  if operator.shape != (n, n):
    raise ValueError(f"operator: got shape {operator.shape}, expected {(n, n)}, the graph's")
  rows, columns = np.asarray(operator.rows), np.asarray(operator.columns)
  shared = np.diff(common_neighbors.common_neighbors(targets, np.stack([rows, columns]), graph).indptr)
  share = shared / np.maximum(np.diff(targets.indptr), 1)[rows]
  return np.where(rows == columns, 0, share).astype("float32")


def weighted_concentration(
  operator: sparse.Operator,
  weights: Float[Array, " e"],
  overlap: Float[Array, " e"],
  *,
  receiver: Receiver = "neighbour",
) -> Float[Array, " n"]:
  """TC of one hop by the weights of messages, cheap enough to be watched in training.

      TC_w(i) = sum_j w_ij |N^t(i) & N^train(j)| / |N^t(i)|,     w without self-loops and scaled to sum_j w_ij = 1

  It divides by the degree, where `concentration` has the degree less one.

  Args:
    operator: [N, N] of a symmetric pattern.
    weights: [E] of messages; entry (i, j) weighs what i receives from j.
    overlap: [E] from `edge_overlap`, for split t.
    receiver: where the weight of centre i for neighbour j is: "neighbour" at entry (j, i), as `reweight` with the same
      option leaves it, or "centre" at (i, j).

  Source: `update_tc` of the official code.
  """
  _check_entries(operator, weights=weights, overlap=overlap)
  weights = weights if checks.choice("receiver", receiver, Receiver) == "centre" else weights[operator.transpose_order]
  weights = jnp.where(operator.rows == operator.columns, 0, weights.astype("float32"))
  total = sparse.segment_sum(operator, weights)
  shared = sparse.segment_sum(operator, weights * overlap)
  return jnp.where(total > 0, shared / jnp.where(total > 0, total, 1), 0)


# -------------------------------------------------------------------------------------------------------- approximate


def embed(
  operator: sparse.Operator,
  key: Key[Array, ""],
  *,
  width: int = 64,
  depth: int = 1,
  decay: float | Float[Array, ""] | None = None,
) -> Float[Array, "n width"]:
  """H = sum_{k=1..K} beta^(k-1) At^k R with At = D^-1 A and R of independent N(0, 1/width): O(K width (E + N)).

  E[H H'] = Z Z' with Z = sum_k beta^(k-1) At^k; for K = 1 its entries are |N_i & N_j| / (d_i d_j).

  Args:
    operator: [N, N] train edges, both directions, no self-loops; values are weights.
    key: of R.
    width: d.
    depth: K.
    decay: beta; default 1 / mean degree.

  Raises:
    ValueError: on an argument out of range.
  """
  _check_operator("operator", operator)
  for name, value in (("width", width), ("depth", depth)):
    if value < 1:
      raise ValueError(f"{name}: got {value}, expected at least 1")
  n = operator.shape[0]
  degree = sparse.segment_sum(operator, operator.values.astype("float32"))
  if decay is None:
    decay = n / jnp.maximum(jnp.sum(degree), 1)
  walk = _by_row(operator, degree)
  h = jax.random.normal(key, (n, width)) / width**0.5
  total = jnp.zeros_like(h)
  for k in range(depth):
    h = sparse.propagate(operator, h, walk)
    total = total + decay**k * h
  return total


def approximate(
  operator: sparse.Operator,
  key: Key[Array, ""],
  targets: sparse.Operator | None = None,
  *,
  width: int = 64,
  depth: int = 1,
  decay: float | Float[Array, ""] | None = None,
  similarity: Similarity = "dot",
) -> Float[Array, " n"]:
  """ATC^t of every node: the mean similarity of H_i and H_j over j in N^t(i); 0 where there is none.

  The mean of products is the product with a mean, H_i . mean_j H_j, so it is one more propagation.

  Args:
    operator: as in `embed`, also for the other arguments.
    key: of R.
    targets: [N, N] edges of split t, both directions; None for the train edges.
    width: d.
    depth: K.
    decay: beta.
    similarity: phi; "dot" has the expectation given there, "cosine" is scaled to [-1, 1].
  """
  checks.choice("similarity", similarity, Similarity)
  targets = operator if targets is None else targets
  if targets.shape != operator.shape:
    raise ValueError(f"targets: got shape {targets.shape}, expected {operator.shape}, the operator's")
  h = embed(operator, key, width=width, depth=depth, decay=decay)
  if similarity == "cosine":
    h = h / jnp.maximum(jnp.linalg.norm(h, axis=1, keepdims=True), 1e-12)
  degree = sparse.segment_sum(targets, targets.values.astype("float32"))
  return jnp.sum(h * sparse.propagate(targets, h, _by_row(targets, degree)), axis=1)


# ------------------------------------------------------------------------------------------------------------- checks


def _by_row(operator, degree):
  """Values over the row's sum."""
  inverse = jnp.where(degree > 0, 1 / jnp.where(degree > 0, degree, 1), 0)
  return operator.values.astype("float32") * inverse[operator.rows]


def _rows(matrix):
  if not matrix.has_sorted_indices:
    matrix = matrix.sorted_indices()
  return matrix.indptr.astype("int64", copy=False), matrix.indices.astype("int32", copy=False)


def _check_graph(name, graph, n=None):
  if not scipy.sparse.issparse(graph) or graph.format != "csr" or graph.shape[0] != graph.shape[1]:
    raise ValueError(f"{name}: got {type(graph).__name__} of shape {np.shape(graph)}, expected a square CSR matrix")
  if n is not None and graph.shape[0] != n:
    raise ValueError(f"{name}: got {graph.shape[0]} nodes, expected {n}, the graph's")
  rows = np.repeat(np.arange(graph.shape[0], dtype="int32"), np.diff(graph.indptr))
  if loops := np.count_nonzero(rows == graph.indices):
    raise ValueError(f"{name}: got {loops} self-loops, expected none")
  return graph.shape[0]


def _check_operator(name, operator):
  if not isinstance(operator, sparse.Operator) or operator.shape[0] != operator.shape[1]:
    shape = getattr(operator, "shape", None)
    raise ValueError(f"{name}: got {type(operator).__name__} of shape {shape}, expected a square sparse.Operator")


def _check_entries(operator, **arrays):
  _check_operator("operator", operator)
  for name, array in arrays.items():
    if array.shape != operator.rows.shape:
      raise ValueError(f"{name}: got shape {array.shape}, expected {operator.rows.shape}, one for each entry")
