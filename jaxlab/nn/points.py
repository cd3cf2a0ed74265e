"""Sampling, grouping and interpolation on point clouds [B, N, 3].

Everything here returns indices, or gathers by them, so gradients flow through the points and features that are gathered
and not through the choice. On CPU, where XLA's sorting and its loops of small steps are slow, host kernels choose the
points; the plain forms (`farthest_points_device`, `nearest_points_device`) serve other backends.

Farthest point sampling and interpolation by inverse distances as in Qi et al., "PointNet++", NeurIPS 2017.
"""

import jax
import jax.numpy as jnp
import numba
import numpy as np
from jaxtyping import Array, Float, Int, Key
from numba import types

from jaxlab import checks, kernels

_QUERIES = 64  # that an item of the kernel serves


def check_points(points: Array, name: str = "points") -> None:
  """Raises a ValueError unless these are floats [B, N, 3] with N > 0."""
  if points.ndim != 3 or points.shape[-1] != 3 or points.shape[1] < 1:
    raise ValueError(f"{name}: got shape {points.shape}, expected [batch, points, 3]")
  if not jnp.issubdtype(points.dtype, jnp.floating):
    raise ValueError(f"{name}: got dtype {points.dtype}, expected floats")


def farthest_points(
  points: Float[Array, "b n 3"], count: int, start: Int[Array, " b"] | None = None
) -> Int[Array, "b m"]:
  """Farthest point sampling: each choice is the point farthest from all chosen before.

      i_0 = start,   i_s = argmax_n min_{t < s} ||p_n - p_{i_t}||

  Args:
    points: clouds.
    count: m, at most n.
    start: first choices; default the point farthest from the origin, which no rotation or permutation changes. Traced
      ones are clipped to [0, n).

  Returns:
    Indices, int32, in order of choice: the first k are a sample of k. Of equally far points, the first in the cloud.

  Raises:
    ValueError: no such clouds, more choices than points, or a start that is no point.
  """
  check_points(points)
  checks.count("count", count)
  if count > points.shape[1]:
    raise ValueError(f"count: got {count}, expected at most {points.shape[1]}, the points of a cloud")
  points = jax.lax.stop_gradient(points).astype(jnp.float32)
  if start is None:
    start = jnp.argmax((points**2).sum(-1), -1)
  if start.shape != points.shape[:1]:
    raise ValueError(f"start: got shape {start.shape}, expected {points.shape[:1]}, one index a cloud")
  if not isinstance(start, jax.core.Tracer) and ((start < 0) | (start >= points.shape[1])).any():
    raise ValueError(f"start: got {start}, expected indices in [0, {points.shape[1]})")
  start = jnp.clip(start, 0, points.shape[1] - 1).astype(jnp.int32)
  if not kernels.available():
    return farthest_points_device(points, count, start)
  result = jax.ShapeDtypeStruct((points.shape[0], count), jnp.int32)
  return kernels.call(_farthest, [result], points, start, items=points.shape[0])[0]


def farthest_points_device(points: Float[Array, "b n 3"], count: int, start: Int[Array, " b"]) -> Int[Array, "b m"]:
  """The XLA form of `farthest_points`."""

  def choose(s: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    chosen, nearest = carry
    last = jnp.take_along_axis(points, chosen[:, s - 1, None, None], 1)
    nearest = jnp.minimum(nearest, ((points - last) ** 2).sum(-1))
    return chosen.at[:, s].set(jnp.argmax(nearest, -1).astype(jnp.int32)), nearest

  chosen = jnp.zeros((points.shape[0], count), jnp.int32).at[:, 0].set(start)
  return jax.lax.fori_loop(1, count, choose, (chosen, jnp.full(points.shape[:2], jnp.inf)))[0]


def nearest_points(queries: Float[Array, "b m 3"], points: Float[Array, "b n 3"], k: int) -> Int[Array, "b m k"]:
  """The k points nearest to each query, itself included where it is one of them.

  Args:
    queries: where to look from.
    points: clouds to look in.
    k: neighbours, at most n.

  Returns:
    Indices, int32, nearest first; of equally near points, the first in the cloud first.

  Raises:
    ValueError: no such clouds, or more neighbours than points.
  """
  check_points(queries, "queries")
  check_points(points)
  checks.count("k", k)
  if queries.shape[0] != points.shape[0]:
    raise ValueError(f"queries: got {queries.shape[0]} clouds, expected {points.shape[0]}, as many as there are points")
  if k > points.shape[1]:
    raise ValueError(f"k: got {k}, expected at most {points.shape[1]}, the points of a cloud")
  queries, points = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (queries, points))
  if not kernels.available():
    return nearest_points_device(queries, points, k)
  batch, count = queries.shape[:2]
  result = jax.ShapeDtypeStruct((batch, count, k), jnp.int32)
  return kernels.call(_nearest, [result], queries, points, items=batch * -(-count // _QUERIES))[0]


def nearest_points_device(queries: Float[Array, "b m 3"], points: Float[Array, "b n 3"], k: int) -> Int[Array, "b m k"]:
  """The XLA form of `nearest_points`. Differences, not the expanded square, which loses the digits of near points."""
  squares = ((queries[:, :, None] - points[:, None]) ** 2).sum(-1)
  return jax.lax.top_k(-squares, k)[1]


def gather_points(x: Float[Array, "b n c"], index: Int[Array, "b *shape"]) -> Float[Array, "b *shape c"]:
  """Rows of each cloud: points or features."""
  return jax.vmap(lambda rows, i: rows.at[i].get(mode="promise_in_bounds"))(x, index)


def interpolate_features(
  queries: Float[Array, "b m 3"], points: Float[Array, "b n 3"], features: Float[Array, "b n c"], k: int = 3
) -> Float[Array, "b m c"]:
  """Mean of the features of the k nearest points, weighted by inverse squared distance.

      out_i = sum_j w_ij f_j / sum_j w_ij,   w_ij = 1 / (||q_i - p_j||^2 + 1e-8)

  Args:
    queries: where features are wanted.
    points: where they are known.
    features: a row a point.
    k: neighbours.

  Returns:
    Rows in the dtype of the features; weights are float32.

  Raises:
    ValueError: as `nearest_points`, and unless there is a row of features a point.
  """
  index = nearest_points(queries, points, k)
  if features.shape[:2] != points.shape[:2]:
    raise ValueError(f"features: got shape {features.shape}, expected {points.shape[:2]} first, a row a point")
  offset = queries[:, :, None] - gather_points(points, index)
  weight = 1 / ((offset.astype(jnp.float32) ** 2).sum(-1, keepdims=True) + 1e-8)
  weight = weight / weight.sum(2, keepdims=True)
  return (weight * gather_points(features, index)).sum(2).astype(features.dtype)


def random_rotations(key: Key[Array, ""], shape: tuple[int, ...] = ()) -> Float[Array, "*shape 3 3"]:
  """Rotations drawn uniformly from SO(3): the matrices of normalised Gaussian quaternions."""
  q = jax.random.normal(key, (*shape, 4))
  w, x, y, z = jnp.moveaxis(q / jnp.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
  rows = [
    [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
    [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
    [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
  ]
  return jnp.stack([jnp.stack(row, -1) for row in rows], -2)


@kernels.kernel("farthest_points")
def _farthest(item, frame):
  """(points [B, N, 3], start [B]) -> chosen [B, M]; an item is a cloud."""
  points, start = kernels.operand(frame, 0, types.float32, 3), kernels.operand(frame, 1, types.int32, 1)
  chosen = kernels.result(frame, 0, types.int32, 2)
  n = points.shape[1]
  x, y, z = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
  nearest = np.empty(n, np.float32)
  for i in range(n):
    x[i], y[i], z[i] = points[item, i, 0], points[item, i, 1], points[item, i, 2]
    nearest[i] = types.float32(3e38)
  last = types.int64(start[item])
  chosen[item, 0] = last
  for s in range(1, chosen.shape[1]):
    a, b, c = x[last], y[last], z[last]
    farthest = types.float32(-1)
    for i in range(n):
      dx, dy, dz = x[i] - a, y[i] - b, z[i] - c
      nearest[i] = min(nearest[i], dx * dx + dy * dy + dz * dz)
      farthest = max(farthest, nearest[i])
    last = 0  # a second, short loop for its place keeps the first one in vectors
    while nearest[last] != farthest and last < n - 1:
      last += 1
    chosen[item, s] = last


@numba.njit(inline="always")
def _sift(heap, size, place):
  """Restores a heap, largest on top, below a place."""
  value = heap[place]
  while True:
    child = 2 * place + 1
    if child >= size:
      break
    if child + 1 < size and heap[child + 1] > heap[child]:
      child += 1
    if heap[child] <= value:
      break
    heap[place] = heap[child]
    place = child
  heap[place] = value


@kernels.kernel("nearest_points")
def _nearest(item, frame):
  """(queries [B, M, 3], points [B, N, 3]) -> index [B, M, K]; an item is some queries of a cloud.

  The bits of a distance (a float that is not negative orders like them) above those of its index make one number, so
  ties go to the first point; a heap holds the K smallest.
  """
  queries, points = kernels.operand(frame, 0, types.float32, 3), kernels.operand(frame, 1, types.float32, 3)
  index = kernels.result(frame, 0, types.int32, 3)
  m, n, k = queries.shape[1], points.shape[1], index.shape[2]
  blocks = (m + _QUERIES - 1) // _QUERIES
  cloud, first = item // blocks, item % blocks * _QUERIES
  x, y, z = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
  for i in range(n):
    x[i], y[i], z[i] = points[cloud, i, 0], points[cloud, i, 1], points[cloud, i, 2]
  square, heap = np.empty(n, np.float32), np.empty(k, np.int64)
  bits = square.view(np.int32)
  for q in range(first, min(first + _QUERIES, m)):
    a, b, c = queries[cloud, q, 0], queries[cloud, q, 1], queries[cloud, q, 2]
    for i in range(n):
      dx, dy, dz = x[i] - a, y[i] - b, z[i] - c
      square[i] = dx * dx + dy * dy + dz * dz
    for i in range(k):
      heap[i] = (types.int64(bits[i]) << 32) | i
    for i in range(k // 2 - 1, -1, -1):
      _sift(heap, k, i)
    bound = heap[0] >> 32
    for i in range(k, n):
      if bits[i] < bound:  # an equal one comes later, so it stays out
        heap[0] = (types.int64(bits[i]) << 32) | i
        _sift(heap, k, 0)
        bound = heap[0] >> 32
    for size in range(k - 1, -1, -1):
      index[cloud, q, size] = types.int32(heap[0] & 0xFFFFFFFF)
      heap[0] = heap[size]
      _sift(heap, size, 0)
