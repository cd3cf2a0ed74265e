"""LFD: the cluster around a seed, by diffusing mass over edges that noisy labels have weighted.

    w_ij = 1 if y_i == y_j else epsilon,     min_{x >= 0}  x' L_w x / 2 + x' (T - Delta)

Back de Luca, Fountoulakis and Yang, "Local Graph Clustering with Noisy Labels", ICLR 2024, arXiv:2310.08031; the
diffusion is that of the same group's weighted flow diffusion (code `s-h-yang/WFD`, arXiv 2301.13187). Symbols: y are
`labels` (what a poor classifier says about "inside"), L_w the Laplacian of the weighted graph, Delta `source` (all mass
starts on the seed), T `sink` (what a node can hold), x `height`. Mass m = Delta - L_w x flows downhill; at the optimum
m <= T, and m_i = T_i wherever x_i > 0. The nodes with x_i > 0 are the cluster, of sum(T) at most sum(Delta).

    total = volume(adjacency, labels)
    found = cluster(adjacency, seed, alphas * target_volume, labels=labels, total=total)

Without labels this is plain flow diffusion (FD); `pagerank` is the l1-regularized PageRank that the paper compares
with. Both push a node's excess to its neighbours until no node has any, so they are one loop, on the host and strongly
local: nodes beyond the result's neighbours are never read. `solve` finds the same x on a device, for many sources at
once under `vmap`, at the cost of the whole graph per step.

Differs from the official code: nodes are pushed first in, first out, not in random rounds (the optimum is unique, so
order changes nothing but rounding); a source that the seed's component cannot hold is recognised and reported.
Our choices where the card has no evidence: `epsilon` 0.05, sinks and sources of the weighted flow diffusion protocol.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numba
import numpy as np
import scipy.sparse
from jaxtyping import Array, Bool, Float, Int

from jaxlab.graph import sparse

Sink = Literal["degree", "one"]


class Diffusion(NamedTuple):
  """Where a diffusion came to rest, on the nodes that it saw; all others have height and mass 0.

  Attributes:
    nodes: [S] those that ever held mass, in order of arrival.
    height: [S] x, or for PageRank the probabilities.
    mass: [S] m, what is left on each node; for PageRank the residual.
    work: entries of the adjacency that were read.
    converged: whether no node has more than the tolerance in excess.
    feasible: whether the nodes that can be reached can hold the source at all; if not, the diffusion stopped early.
  """

  nodes: Int[np.ndarray, " s"]
  height: Float[np.ndarray, " s"]
  mass: Float[np.ndarray, " s"]
  work: int
  converged: bool
  feasible: bool

  @property
  def support(self) -> Int[np.ndarray, " c"]:
    """Nodes of positive height, sorted; the first node alone if none has."""
    positive = self.nodes[self.height > 0]
    return np.sort(positive) if len(positive) else self.nodes[:1]


class Cluster(NamedTuple):
  """A set of nodes and its conductance in the weighted graph; `source` is the mass that found it."""

  nodes: Int[np.ndarray, " c"]
  conductance: float
  source: float


# ------------------------------------------------------------------------------------------------- local, on the host


def diffuse(
  adjacency: scipy.sparse.csr_array,
  nodes: int | Int[np.ndarray, " k"],
  source: float | Float[np.ndarray, " k"],
  *,
  sink: Sink | Float[np.ndarray, " n"] = "degree",
  labels: Int[np.ndarray, " n"] | Bool[np.ndarray, " n"] | None = None,
  epsilon: float = 0.05,
  tolerance: float = 1e-4,
  max_work: int = 10**9,
) -> Diffusion:
  """Host. Flow diffusion from a few nodes; in float64.

  Args:
    adjacency: [N, N] symmetric, weights > 0, no self-loops.
    nodes: where mass starts, different from each other.
    source: Delta there.
    sink: T; "degree" is a node's number of neighbours, "one" is 1.
    labels: y; edges between different labels weigh `epsilon` times as much. None weighs none down.
    epsilon: in [0, 1].
    tolerance: excess that may stay on a node.
    max_work: entries to read at most.

  Returns:
    Heights. The work is proportional to the volume of what is returned times the rounds of pushes; it does not depend
    on N.

  Raises:
    ValueError: an argument of another shape or out of range.
  """
  n = _check_adjacency(adjacency)
  seeds, mass = _check_source(n, nodes, source)
  kind, capacity = _KINDS["array"], np.zeros(1)
  if isinstance(sink, str):
    if sink not in get_args(Sink):
      raise ValueError(f"sink: got {sink!r}, expected {get_args(Sink)} or an array")
    kind = _KINDS[sink]
  else:
    capacity = np.asarray(sink, np.float64)
    if capacity.shape != (n,) or not (capacity >= 0).all():
      raise ValueError(f"sink: got shape {capacity.shape}, expected [{n}], none negative")
  if mass.sum() > {"degree": adjacency.nnz, "one": n}.get(sink if isinstance(sink, str) else "", capacity.sum()):
    return Diffusion(seeds, np.zeros(len(seeds)), mass, 0, False, False)  # more than the whole graph holds
  found, pushed, degree = _run(adjacency, seeds, mass, kind, capacity, 1.0, labels, epsilon, tolerance, max_work)
  return found._replace(height=np.divide(pushed, degree, out=np.zeros_like(pushed), where=pushed > 0))


def pagerank(
  adjacency: scipy.sparse.csr_array,
  nodes: int | Int[np.ndarray, " k"],
  *,
  alpha: float = 0.15,
  rho: float = 1e-4,
  labels: Int[np.ndarray, " n"] | Bool[np.ndarray, " n"] | None = None,
  epsilon: float = 0.05,
  tolerance: float = 1e-3,
  max_work: int = 10**9,
) -> Diffusion:
  """Host. l1-regularized personalised PageRank p of the lazy walk, which is zero away from the seeds.

      min_p  p' D^-1 M p / 2 - alpha p' D^-1 s + rho alpha |p|_1,    M = I - (1 - alpha)/2 (I + A D^-1)

  At the optimum the residual alpha s - M p is at most rho alpha d_i, and equal to it where p_i > 0: the same conditions
  as those of flow diffusion, with a walk that keeps part of what it carries.

  Args:
    adjacency: as in `diffuse`, also for the other arguments.
    nodes: s is uniform on them.
    alpha: teleportation probability, in (0, 1).
    rho: the regularization, > 0; vol(support) <= 1 / rho.
    labels: y.
    epsilon: weight of edges between different labels.
    tolerance: excess that may stay on a node, as a share of `rho * alpha`.
    max_work: entries to read at most.

  Source: Fountoulakis et al., "Variational perspective on local graph clustering", Math. Programming 2019.
  """
  if not 0 < alpha < 1:
    raise ValueError(f"alpha: got {alpha}, expected a number in (0, 1)")
  if not rho > 0:
    raise ValueError(f"rho: got {rho}, expected a positive number")
  n = _check_adjacency(adjacency)
  seeds, _ = _check_source(n, nodes, 1.0)
  carried, capacity = (1 - alpha) / (1 + alpha), np.array([rho * alpha])
  mass = np.full(len(seeds), alpha / len(seeds))
  excess = tolerance * rho * alpha
  found, pushed, _ = _run(
    adjacency, seeds, mass, _KINDS["weighted degree"], capacity, carried, labels, epsilon, excess, max_work
  )
  return found._replace(height=pushed * 2 / (1 + alpha))


def cluster(
  adjacency: scipy.sparse.csr_array,
  nodes: int | Int[np.ndarray, " k"],
  sources: Sequence[float] | Float[np.ndarray, " a"],
  *,
  sink: Sink | Float[np.ndarray, " n"] = "degree",
  labels: Int[np.ndarray, " n"] | Bool[np.ndarray, " n"] | None = None,
  epsilon: float = 0.05,
  sweep: bool = False,
  total: float | None = None,
  tolerance: float = 1e-4,
  max_work: int = 10**9,
) -> Cluster:
  """Host. Of the clusters that different amounts of mass find, that of least conductance (the first of equals).

  Conductance is that of the graph in which mass flows: weighted by labels, if there are any. Amounts that cannot be
  held are left out.

  Args:
    adjacency: as in `diffuse`, also for the other arguments.
    nodes: the seeds, which share each source equally.
    sources: total masses to try; the protocol takes 1.5 to 5 times the volume of the target.
    sink: T.
    labels: y.
    epsilon: weight of edges between different labels.
    sweep: take the best prefix of the nodes by height, not all that have one.
    total: `volume(adjacency, labels, epsilon)`, which reads the whole graph, if it is known already.
    tolerance: excess that may stay on a node.
    max_work: entries to read at most, for each source.

  Raises:
    ValueError: also if no source can be held.
  """
  if not len(sources):
    raise ValueError("sources: got none, expected at least one")
  total = volume(adjacency, labels, epsilon) if total is None else total
  seeds = np.atleast_1d(nodes)
  best = None
  for source in sources:
    share = np.full(len(seeds), source / len(seeds))
    options = {"sink": sink, "labels": labels, "epsilon": epsilon, "tolerance": tolerance, "max_work": max_work}
    found = diffuse(adjacency, seeds, share, **options)  # type: ignore[arg-type]
    if not found.feasible:
      continue
    order = np.argsort(-found.height, kind="stable")
    candidates = found.nodes[order][: max(np.count_nonzero(found.height > 0), 1)]
    values = sweep_conductance(adjacency, candidates, labels=labels, epsilon=epsilon, total=total)
    size = len(values) - int(np.argmin(values[::-1])) if sweep else len(values)  # the longest of the best prefixes
    if best is None or values[size - 1] < best.conductance:
      best = Cluster(np.sort(candidates[:size]), float(values[size - 1]), float(source))
  if best is None:
    raise ValueError(f"sources: got {list(sources)}, expected one that the component of the seeds can hold")
  return best


def volume(
  adjacency: scipy.sparse.csr_array,
  labels: Int[np.ndarray, " n"] | Bool[np.ndarray, " n"] | None = None,
  epsilon: float = 0.05,
) -> float:
  """Host. Sum of all weighted degrees."""
  _check_adjacency(adjacency)
  y, weight = _check_labels(adjacency.shape[0], labels, epsilon)
  return float(_volume(adjacency.indptr, adjacency.indices, adjacency.data, y, weight))


def sweep_conductance(
  adjacency: scipy.sparse.csr_array,
  nodes: Int[np.ndarray, " c"],
  *,
  labels: Int[np.ndarray, " n"] | Bool[np.ndarray, " n"] | None = None,
  epsilon: float = 0.05,
  total: float | None = None,
) -> Float[np.ndarray, " c"]:
  """Host. cut / min(vol, total - vol) of every prefix of `nodes`; infinite for a prefix that has no complement.

  Args:
    adjacency: as in `diffuse`, also for labels.
    nodes: different from each other, in order.
    labels: y.
    epsilon: weight of edges between different labels.
    total: `volume(adjacency, labels, epsilon)`, if it is known already.

  Raises:
    ValueError: nodes that are no numbers of nodes, or not different.
  """
  n = _check_adjacency(adjacency)
  nodes = _check_nodes(n, nodes)
  y, weight = _check_labels(n, labels, epsilon)
  total = volume(adjacency, labels, epsilon) if total is None else total
  inside = np.zeros(n, bool)
  cut, vol = _sweep(adjacency.indptr, adjacency.indices, adjacency.data, y, weight, nodes, inside)
  smaller = np.minimum(vol, total - vol)
  return np.divide(cut, smaller, out=np.full(len(cut), np.inf), where=smaller > 1e-9 * total)


def f1(found: Int[np.ndarray, " a"], truth: Int[np.ndarray, " b"]) -> float:
  """Host. 2 |C and K| / (|C| + |K|) of two sets of nodes, not both empty."""
  if not len(found) + len(truth):
    raise ValueError("found, truth: got no nodes in either")
  return 2 * len(np.intersect1d(found, truth)) / (len(found) + len(truth))


# --------------------------------------------------------------------------------------------- all nodes, on a device


class Solution(NamedTuple):
  """Heights and masses of all nodes; `excess` is the largest m - T at the end, or |m - T| where x > 0."""

  height: Float[Array, " n"]
  mass: Float[Array, " n"]
  steps: Int[Array, ""]
  excess: Float[Array, ""]


def label_weights(
  operator: sparse.Operator, labels: Int[Array, " n"] | Bool[Array, " n"], epsilon: float | Float[Array, ""] = 0.05
) -> sparse.Operator:
  """The adjacency with edges between different labels `epsilon` times as heavy.

  Args:
    operator: [N, N], as of `sparse.from_scipy`.
    labels: y.
    epsilon: in [0, 1].
  """
  if labels.shape != operator.shape[:1]:
    raise ValueError(f"labels: got shape {labels.shape}, expected {operator.shape[:1]}")
  same = labels[operator.rows] == labels[operator.columns]
  return operator.replace_values(operator.values * jnp.where(same, 1, epsilon).astype(operator.values.dtype))


def solve(
  operator: sparse.Operator,
  source: Float[Array, " n"],
  sink: Float[Array, " n"],
  *,
  tolerance: float = 1e-4,
  max_steps: int = 10_000,
) -> Solution:
  """Flow diffusion by accelerated projected gradients, on a device; `vmap` it over sources for many seeds at once.

  A step is x <- max(0, z + D^-1 (m(z) - T) / 2) with Nesterov's z, restarted where it overshoots: D^-1 L_w has no
  eigenvalue above 2.

  Args:
    operator: [N, N] symmetric weights, as of `label_weights`.
    source: Delta; sum(source) <= sum(sink) in every component, or there is no solution.
    sink: T.
    tolerance: of the optimality conditions, in units of mass; use float64 where masses are above 10^3 times of it.
    max_steps: give up after so many; see `excess`.

  Raises:
    ValueError: an argument of another shape or out of range.
  """
  if not isinstance(operator, sparse.Operator) or operator.shape[0] != operator.shape[1]:
    raise ValueError(f"operator: got {getattr(operator, 'shape', operator)}, expected a square sparse.Operator")
  for name, value in (("source", source), ("sink", sink)):
    if value.shape != operator.shape[:1]:
      raise ValueError(f"{name}: got shape {value.shape}, expected {operator.shape[:1]}")
  if not tolerance > 0:
    raise ValueError(f"tolerance: got {tolerance}, expected a positive number")
  degree = sparse.propagate(operator, jnp.ones_like(source))
  step = jnp.where(degree > 0, 0.5 / jnp.where(degree > 0, degree, 1), 0)

  def mass(x):
    return source - degree * x + sparse.propagate(operator, x)

  def residual(x, m):
    over = m - sink
    return jnp.max(jnp.where(x > 0, jnp.abs(over), jnp.maximum(over, 0)))

  def advance(state):
    x, z, t, steps, _ = state
    new = jnp.maximum(z + step * (mass(z) - sink), 0)
    uphill = jnp.sum(degree * (z - new) * (new - x)) > 0  # the momentum points away from the minimum: drop it
    t = jnp.where(uphill, 1, t)
    faster = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
    z = new + jnp.where(uphill, 0, (t - 1) / faster) * (new - x)
    return new, z, faster, steps + 1, residual(new, mass(new))

  start = jnp.zeros_like(source)
  state = start, start, jnp.ones((), source.dtype), jnp.int32(0), residual(start, mass(start))
  unfinished = lambda state: (state[4] > tolerance) & (state[3] < max_steps)
  x, _, _, steps, excess = jax.lax.while_loop(unfinished, advance, state)
  return Solution(x, mass(x), steps, excess)


# -------------------------------------------------------------------------------------------------------------- loops

_KINDS = {"array": 0, "degree": 1, "one": 2, "weighted degree": 3}  # what a node can hold


def _run(adjacency, seeds, mass, kind, capacity, carried, labels, epsilon, tolerance, max_work):
  """The diffusion without heights, the excess that each of its nodes pushed, and their weighted degrees."""
  if not tolerance > 0:
    raise ValueError(f"tolerance: got {tolerance}, expected a positive number")
  n = adjacency.shape[0]
  y, weight = _check_labels(n, labels, epsilon)
  # The system hands out zeroed pages when they are first touched, so these cost what is visited, not N.
  left, pushed, degree, limit = (np.zeros(n) for _ in range(4))
  waiting, order, queue = np.zeros(n, np.int8), np.empty(n, np.int32), np.empty(n, np.int32)
  count, work, excess, feasible = _push(
    adjacency.indptr, adjacency.indices, adjacency.data, y, weight, seeds, mass, kind, capacity, carried, tolerance,
    max_work, left, pushed, degree, limit, waiting, order, queue,
  )  # fmt: skip
  nodes = order[:count].copy()
  found = Diffusion(nodes, np.zeros(count), left[nodes], int(work), bool(excess <= tolerance), bool(feasible))
  return found, pushed[nodes], degree[nodes]


@numba.njit(cache=True)
def _push(
  starts, columns, values, y, epsilon, seeds, source, kind, capacity, carried, tolerance, max_work,
  left, pushed, degree, limit, waiting, order, queue,
):  # fmt: skip
  """While a node holds more than its limit, its excess goes to its neighbours by weight, `carried` of it.

  `waiting` is 0 for a node never seen, 1 for one at rest, 2 for one in the queue.
  """
  n = len(left)
  count, idle, work, head, length, held = 0, 0, 0, 0, 0, 0.0
  total = source.sum()
  for k in range(len(seeds)):
    i = seeds[k]
    left[i] = source[k]
    order[count] = i
    count += 1
  for k in range(count):
    i = order[k]
    work += _enter(i, starts, columns, values, y, epsilon, kind, capacity, degree, limit)
    held += limit[i]
    waiting[i] = 1
    idle += 1
    if left[i] - limit[i] > tolerance:
      queue[length] = i
      length += 1
      waiting[i] = 2
  while length > 0 and work < max_work:
    # Nobody is left to receive: all that were reached have pushed.
    if degree[queue[head]] == 0 or (carried == 1 and idle == 0 and total > held + tolerance * count):
      return count, work, left[queue[head]] - limit[queue[head]], False
    i = queue[head]
    head = (head + 1) % n
    length -= 1
    waiting[i] = 1
    excess = left[i] - limit[i]
    if pushed[i] == 0:
      idle -= 1
    pushed[i] += excess
    left[i] = limit[i]
    share = carried * excess / degree[i]
    for e in range(starts[i], starts[i + 1]):
      j = columns[e]
      w = values[e] if y[i] == y[j] else epsilon * values[e]
      work += 1
      if w == 0:
        continue
      left[j] += w * share
      if waiting[j] == 0:
        work += _enter(j, starts, columns, values, y, epsilon, kind, capacity, degree, limit)
        held += limit[j]
        waiting[j] = 1
        idle += 1
        order[count] = j
        count += 1
      if waiting[j] == 1 and left[j] - limit[j] > tolerance:
        queue[(head + length) % n] = j
        length += 1
        waiting[j] = 2
  return count, work, 0.0 if length == 0 else np.inf, True


@numba.njit(cache=True)
def _enter(i, starts, columns, values, y, epsilon, kind, capacity, degree, limit):
  """Weighted degree and limit of a node seen for the first time; returns the entries read."""
  for e in range(starts[i], starts[i + 1]):
    degree[i] += values[e] if y[i] == y[columns[e]] else epsilon * values[e]
  if kind == 0:
    limit[i] = capacity[i]
  elif kind == 1:
    limit[i] = starts[i + 1] - starts[i]
  elif kind == 2:
    limit[i] = 1
  else:
    limit[i] = capacity[0] * degree[i]
  return starts[i + 1] - starts[i]


@numba.njit(cache=True)
def _volume(starts, columns, values, y, epsilon):
  total = 0.0
  for i in range(len(starts) - 1):
    for e in range(starts[i], starts[i + 1]):
      total += values[e] if y[i] == y[columns[e]] else epsilon * values[e]
  return total


@numba.njit(cache=True)
def _sweep(starts, columns, values, y, epsilon, nodes, inside):
  """Cut and volume of each prefix."""
  cuts, volumes = np.empty(len(nodes)), np.empty(len(nodes))
  cut, volume = 0.0, 0.0
  for k in range(len(nodes)):
    i = nodes[k]
    for e in range(starts[i], starts[i + 1]):
      w = values[e] if y[i] == y[columns[e]] else epsilon * values[e]
      volume += w
      cut += -w if inside[columns[e]] else w
    inside[i] = True
    cuts[k], volumes[k] = cut, volume
  return cuts, volumes


# ------------------------------------------------------------------------------------------------------------- checks


def _check_adjacency(adjacency):
  """N."""
  if not scipy.sparse.issparse(adjacency) or adjacency.format != "csr" or adjacency.shape[0] != adjacency.shape[1]:
    raise ValueError(f"adjacency: got {type(adjacency).__name__}, expected a square scipy.sparse.csr_array")
  return adjacency.shape[0]


def _check_nodes(n, nodes):
  found = np.atleast_1d(np.asarray(nodes))
  if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
    raise ValueError(f"nodes: got {nodes!r}, expected node numbers")
  if len(found) and (found.min() < 0 or found.max() >= n or len(np.unique(found)) < len(found)):
    raise ValueError(f"nodes: got {found}, expected different numbers in [0, {n})")
  return found.astype(np.int64)


def _check_source(n, nodes, source):
  seeds = _check_nodes(n, nodes)
  if not len(seeds):
    raise ValueError(f"nodes: got {nodes!r}, expected at least one")
  mass = np.broadcast_to(np.asarray(source, np.float64), seeds.shape) if np.ndim(source) < 2 else None
  if mass is None or not np.isfinite(mass).all() or (mass < 0).any():
    raise ValueError(f"source: got {source!r}, expected a mass, at least 0, for each node")
  return seeds, mass.copy()  # not a view that cannot be written to, which would be compiled anew


def _check_labels(n, labels, epsilon):
  """Labels of one dtype, all equal without labels, and the weight of an edge between different ones."""
  if not 0 <= epsilon <= 1:
    raise ValueError(f"epsilon: got {epsilon}, expected a number in [0, 1]")
  if labels is None:
    return np.zeros(n, np.int64), 1.0  # NumPy's own integers, so that one compiled loop does for both
  y = np.asarray(labels)
  if y.shape != (n,):
    raise ValueError(f"labels: got shape {y.shape}, expected ({n},)")
  return (y.astype(np.int8) if y.dtype == bool else y), float(epsilon)
