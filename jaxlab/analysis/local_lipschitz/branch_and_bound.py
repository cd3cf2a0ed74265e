"""Tighter bounds by cases: a ReLU of unknown phase passes or it does not, and each case is bounded by itself."""

import functools
import heapq
import itertools
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlab.analysis.local_lipschitz import propagation, relaxation
from jaxlab.analysis.local_lipschitz.layers import Bounds, Network

Heuristic = Literal["area", "babsr"]


class Search(NamedTuple):
  """What a search found.

  Attributes:
    bounds: [C] upper bounds of the rows' gradient norms; never above `lipschitz`'s.
    complete: whether splitting more would not lower them; with `only_largest`, not lower the largest.
    cases: that were bounded.
    history: [T, 3] after each batch: seconds, cases, the largest of the bounds. The last never rises.
  """

  bounds: Float[np.ndarray, " c"]
  complete: bool
  cases: int
  history: Float[np.ndarray, "t 3"]


class _Case(NamedTuple):
  """A node of the tree: phases of all hidden neurons, bounds of all gradients, flat, and the neurons to split next."""

  bound: float
  row: int
  phases: np.ndarray
  lower: np.ndarray
  upper: np.ndarray
  scores: np.ndarray
  picks: np.ndarray


def branch_and_bound(
  network: Network,
  forward: Sequence[Bounds],
  *,
  rows: Float[Array, "c o"] | None = None,
  heuristic: Heuristic = "area",
  candidates: int = 1,
  only_largest: bool = False,
  batch_size: int = 128,
  max_cases: int = 200_000,
  timeout: float = 60.0,
  chunk: int | None = None,
) -> Search:
  """Host, with the bounds of a batch of cases on the device: best first, from a queue over all rows.

  The worst cases are taken, one neuron of each is split, and both halves are bounded. Bounds of z stay what they are,
  so at the end the bound is the largest over all combinations of phases that they allow, reachable or not.

  Args:
    network: as for `lipschitz`.
    forward: likewise.
    rows: likewise.
    chunk: likewise.
    heuristic: neuron to split: "area", of the triangles between lines and gate times the coefficient there; "babsr",
      the offset of the lines times the coefficient.
    candidates: so many neurons of highest score are tried for each case, and the one is kept whose worse half is best.
    only_largest: bound the largest of the rows only, as a Lipschitz constant needs; other rows get less attention.
    batch_size: cases to split at once.
    max_cases: stop when so many were bounded.
    timeout: seconds after which no batch is begun.

  Raises:
    ValueError: as `lipschitz`, or an argument out of range.
  """
  if heuristic not in ("area", "babsr"):
    raise ValueError(f"heuristic: got {heuristic!r}, expected area or babsr")
  for name, value in (("candidates", candidates), ("batch_size", batch_size), ("max_cases", max_cases)):
    if value < 1:
      raise ValueError(f"{name}: got {value}, expected at least 1")
  if timeout < 0:
    raise ValueError(f"timeout: got {timeout}, expected seconds")
  begin = time.perf_counter()
  network, rows, phases, _ = propagation.start(network, forward, rows, "lip_crown", chunk)
  shapes = tuple(b.lower.shape for b in forward[:-1])
  hidden = sum(p.size for p in phases)
  candidates = max(1, min(candidates, hidden))
  bound = functools.partial(_bound, shapes=shapes, heuristic=heuristic, candidates=candidates, chunk=chunk)
  halves = functools.partial(_halves, shapes=shapes, heuristic=heuristic, candidates=candidates, chunk=chunk)

  flat = jnp.concatenate([p.reshape(-1) for p in phases]) if phases else jnp.zeros(0, "int8")
  everything = jnp.full((len(rows), sum(int(np.prod(s)) for s in shapes)), jnp.inf, rows.dtype)
  roots = jax.device_get(bound(network, rows, jnp.tile(flat, (len(rows), 1)), -everything, everything))
  norms = np.array(roots.norm)
  # Of every row: the largest bound of cases that stay as they are, and a queue of those that can be split.
  closed = np.full(len(rows), -np.inf, norms.dtype)
  queues: list[list[tuple[float, int, _Case]]] = [[] for _ in norms]
  best, order = norms.copy(), itertools.count()
  cases, history = 0, []

  def enter(found, row, phases, parent):
    nonlocal cases
    cases += 1
    value = float(min(found.norm, parent))  # a parent's bound holds for its halves
    if found.scores[0] > 0 and value > 0:  # no norm is lower than 0
      case = _Case(value, row, phases, found.lower, found.upper, found.scores, found.picks)
      heapq.heappush(queues[row], (-value, next(order), case))
    else:
      closed[row] = max(closed[row], value)

  def worst():
    """The largest bound in every row's queue."""
    return np.array([-queue[0][0] if queue else -np.inf for queue in queues])

  def record():
    """Closes rows that no split can lower any more, and notes where the bounds are."""
    top = worst()
    final = np.full(len(rows), closed.max()) if only_largest else closed
    for row in np.flatnonzero(top <= final):
      closed[row] = max(closed[row], top[row])
      queues[row].clear()
    np.minimum(best, np.maximum(closed, worst()), out=best)
    history.append((time.perf_counter() - begin, cases, best.max()))

  for row in range(len(rows)):
    enter(_Found(*(a[row] for a in roots)), row, np.asarray(flat), np.inf)
  record()
  while any(queues) and cases < max_cases and time.perf_counter() - begin < timeout:
    taken: list[_Case] = []
    while any(queues) and len(taken) < batch_size:
      taken.append(heapq.heappop(queues[worst().argmax()])[2])
    padded = taken + [taken[0]] * (batch_size - len(taken))  # always the same shapes, so one compiled program
    stacked = [np.stack(values) for values in zip(*(case[2:] for case in padded), strict=True)]
    of = rows[np.array([case.row for case in padded])]
    split, found = jax.device_get(halves(network, of, *stacked))
    for i, case in enumerate(taken):
      for side, sign in enumerate((1, -1)):
        after = case.phases.copy()
        after[split[i]] = sign
        enter(_Found(*(a[side, i] for a in found)), case.row, after, case.bound)
    record()
  return Search(best, not any(queues), cases, np.array(history))


class _Found(NamedTuple):
  """Of a case: the bound, bounds of all gradients, flat, and the neurons of highest score."""

  norm: Array
  lower: Array
  upper: Array
  scores: Array
  picks: Array


_STATIC = ("shapes", "heuristic", "candidates", "chunk")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _bound(network, rows, phases, lower, upper, *, shapes, heuristic, candidates, chunk):
  """A batch of cases, [B, ...] each."""

  def one(row, phases, lower, upper):
    parts = _unflatten(phases, shapes[1:])
    within = list(map(Bounds, _unflatten(lower, shapes), _unflatten(upper, shapes)))
    found = propagation.gradients(network, parts, row, shape=shapes[0], chunk=chunk, within=within)
    scores = [
      _score(heuristic, p, b, c) for p, b, c in zip(parts, found.bounds[1:], found.coefficients, strict=True)
    ] or [jnp.zeros(1, row.dtype)]
    top, picks = jax.lax.top_k(_flatten(scores), candidates)
    bounds = Bounds(*(_flatten(side) for side in zip(*found.bounds, strict=True)))
    return _Found(found.norm, *bounds, top, picks)

  return jax.vmap(one)(rows, phases, lower, upper)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _halves(network, rows, phases, lower, upper, scores, picks, *, shapes, heuristic, candidates, chunk):
  """Splits a batch of cases [B, ...]: the neurons [B] that were split, and both halves [2, B, ...]."""
  options = {"shapes": shapes, "heuristic": heuristic, "candidates": candidates, "chunk": chunk}

  def split(rank):
    def half(sign):
      after = jax.vmap(lambda p, i: p.at[i].set(sign))(phases, picks[:, rank])
      return _bound(network, rows, after, lower, upper, **options)

    return jax.vmap(half)(jnp.array([1, -1], "int8"))

  if candidates == 1:
    return picks[:, 0], split(0)
  tried = jax.lax.map(split, jnp.arange(candidates))  # [K, 2, B, ...]
  worse = jnp.where(scores.T > 0, tried.norm.max(1), jnp.inf)  # a neuron of known phase is no candidate
  chosen, cases = jnp.argmin(worse, 0), jnp.arange(len(rows))
  return picks[cases, chosen], jax.tree.map(lambda a: jnp.moveaxis(a[chosen, :, cases], 0, 1), tried)


def _score(heuristic, phase, gradient, coefficients):
  """Of splitting each neuron: positive where its phase is unknown, zero elsewhere."""
  size, (lower, upper) = jnp.abs(coefficients), gradient
  if heuristic == "area":
    score = (upper * jnp.abs(upper) - lower * jnp.abs(lower)) * size
  else:
    lines = relaxation.gate(jnp.zeros_like(phase), gradient)
    score = 2 * lines.upper_offset * size  # both lines have the same offset
  return jnp.where(phase == 0, score + 1, 0)


def _flatten(arrays):
  return jnp.concatenate([a.reshape(-1) for a in arrays])


def _unflatten(flat, shapes):
  ends = np.cumsum([int(np.prod(s)) for s in shapes])
  return [flat[end - int(np.prod(s)) : end].reshape(s) for s, end in zip(shapes, ends, strict=True)]
