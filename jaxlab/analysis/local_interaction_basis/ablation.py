"""What a network still does without some of its features or edges."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlab import checks
from jaxlab.analysis.local_interaction_basis.basis import Basis, Graph, activations
from jaxlab.analysis.local_interaction_basis.gradients import check_section
from jaxlab.analysis.local_interaction_basis.sections import Network, Section, floats_as, run


def accuracy(outputs: Float[Array, "n q k"], labels: Int[Array, " n"]) -> float:
  """Host. Share of examples whose largest output at the last position is the label.

  Raises:
    ValueError: other labels than one for each example.
  """
  if np.shape(labels) != np.shape(outputs)[:1]:
    raise ValueError(f"labels: got shape {np.shape(labels)}, expected one for each of {len(outputs)} examples")
  return float((np.asarray(outputs)[:, -1].argmax(-1) == np.asarray(labels)).mean())


def keep_features(x: Float[Array, "... d"], basis: Basis, count: int | Array) -> Float[Array, "... d"]:
  """x C[:, :k] C^+[:k]: activations without the less important features.

  Args:
    x: activations.
    basis: of the node layer.
    count: k, features to keep; with all, still without what the basis has dropped.

  Raises:
    ValueError: activations that are not floats.
  """
  _check_floats(x)
  kept = jnp.arange(basis.into.shape[1]) < count
  return (x @ jnp.asarray(basis.into, x.dtype) * kept) @ jnp.asarray(basis.back, x.dtype)


def keep_edges(
  section: Section, x: Float[Array, "n p d"], basis: Basis, after: Basis, mask: Bool[np.ndarray, "to from"]
) -> Float[Array, "n q e"]:
  """Activations of the next node layer, each feature of which is computed from some features of this one alone.

  Args:
    section: between the two.
    x: activations.
    basis: of x.
    after: of the next node layer.
    mask: edges to keep, [to, from]; concrete, since features with the same sources are computed together.

  Raises:
    ValueError: a mask of another shape, activations that are not floats.
  """
  _check_floats(x)
  expected = (len(after.importance), len(basis.importance))
  mask = np.asarray(mask, bool)
  if mask.shape != expected:
    raise ValueError(f"mask: got shape {mask.shape}, expected {expected}, [to, from]")
  sources, group = np.unique(mask, axis=0, return_inverse=True)
  targets = group.reshape(-1) == np.arange(len(mask))[:, None]
  return _by_group(section, x, basis, after, np.resize(sources, mask.shape), targets, len(sources))


@jax.jit
def _by_group(section, x, basis, after, sources, targets, groups):
  """Targets [G, to] from sources [G, from], the first so many; few examples at a time, so that they stay in cache."""
  into, back, then, home = (jnp.asarray(a, x.dtype) for a in (basis.into, basis.back, after.into, after.back))
  size = min(128, len(x))

  def part(x):
    features = x @ into

    def fill(group, total):
      return jnp.where(targets[group], section((features * sources[group]) @ back) @ then, total)

    start = jnp.zeros(jax.eval_shape(lambda a: section(a) @ then, x).shape, x.dtype)
    return jax.lax.fori_loop(0, groups, fill, start) @ home

  padded = jnp.concatenate([x, jnp.broadcast_to(x[:1], (-len(x) % size, *x.shape[1:]))])
  found = jax.lax.map(part, padded.reshape(-1, size, *x.shape[1:]))
  return found.reshape(-1, *found.shape[2:])[: len(x)]


def strongest(edges: Float[np.ndarray, "to from"], count: int, *, constant: bool = True) -> Bool[np.ndarray, "to from"]:
  """Host. The mask of so many of the largest edges, and of all that are as large as the last of them.

  Args:
    edges: [to, from].
    count: edges to keep; above their number, all.
    constant: whether edges from the first feature, the constant, are kept in any case and not counted.

  Raises:
    ValueError: a negative count, or edges that are no matrix.
  """
  edges = np.asarray(edges)
  checks.count("count", count, 0)
  if edges.ndim != 2:
    raise ValueError(f"edges: got shape {edges.shape}, expected [to, from]")
  first = int(constant)
  counted, mask = edges[:, first:], np.ones(edges.shape, bool)
  if count == 0:
    mask[:, first:] = False
  elif count <= counted.size:
    mask[:, first:] = counted >= np.partition(counted.reshape(-1), -count)[-count]
  return mask


def schedule(width: int, *, every: int = 10, base: float = 2.0) -> list[int]:
  """Host. Numbers of features to keep: all from 0 to `every`, then gaps 1, b, b^2, ... rounded down, and `width`.

  Args:
    width: D, the node layer's original width.
    every: up to which none is left out.
    base: b.
  """
  checks.count("width", width)
  checks.count("every", every, 0, width - 1)
  checks.real("base", base, 1.0, np.inf)
  kept, gap = list(range(every + 1)), 1.0
  while True:
    # Counted as features ablated, rounded down.
    more = width - int(width - kept[-1] - gap)
    if more >= width:
      return [*kept, width]
    kept.append(more)
    gap *= base


def feature_curve(
  network: Network,
  graph: Graph,
  layer: int,
  x: Float[Array, "n p d"],
  score: Callable[[Array], float],
  counts: Sequence[int],
) -> dict[int, float]:
  """Host. Scores of the network with only so many features of one node layer.

  Args:
    network: sections.
    graph: its bases.
    layer: node layer, outputs excluded.
    x: activations of the first node layer, in whose dtype all is computed.
    score: of outputs, such as `functools.partial(accuracy, labels=labels)`.
    counts: of features; with as many as the basis has, or more, the network as it is.

  Raises:
    ValueError: a negative count, no such layer, another network's graph, activations that are not floats.
  """
  for count in counts:
    checks.count("counts", count, 0)
  network, basis, at = _prepared(network, graph, layer, x)
  rest = network[layer:]
  return {
    count: score(_run(rest, at) if count >= len(basis.importance) else _with_features(rest, at, basis, count))
    for count in counts
  }


@jax.jit
def _with_features(network, x, basis, count):
  return run(network, keep_features(x, basis, count))


_run = jax.jit(run)


class Required(NamedTuple):
  """What bisection found.

  Attributes:
    edges: to keep, without those from the constant.
    mask: [to, from].
    scores: edges -> score, of all that were tried.
    base: score with all edges.
  """

  edges: int
  mask: Bool[np.ndarray, "to from"]
  scores: Mapping[int, float]
  base: float


def edges_required(
  network: Network,
  graph: Graph,
  layer: int,
  x: Float[Array, "n p d"],
  score: Callable[[Array], float],
  *,
  tolerance: float = 0.001,
  constant: bool = True,
) -> Required:
  """Host. The fewest of the largest edges behind a node layer with which the score is within tolerance of its own.

  By bisection over the number of edges that are left out, of all that the layers' original widths allow. Scores need
  not fall steadily, so that fewer may do as well.

  Args:
    network: as for `feature_curve`, like the next three.
    graph: of the network.
    layer: the node layer.
    x: activations of the first node layer.
    score: as for `feature_curve`; higher is better.
    tolerance: of the score.
    constant: see `strongest`.

  Raises:
    ValueError: a negative tolerance, or as `feature_curve`.
  """
  checks.real("tolerance", tolerance, 0.0, np.inf)
  network, basis, at = _prepared(network, graph, layer, x)
  after, weights = graph.bases[layer + 1], graph.edges[layer]
  base = score(_run(network[layer:], at))
  scores: dict[int, float] = {}

  def good(count):
    mask = strongest(weights, count, constant=constant)
    if mask.all():
      scores[count] = base
    else:
      scores[count] = score(_run(network[layer + 1 :], keep_edges(network[layer], at, basis, after, mask)))
    return scores[count] >= base - tolerance

  total = basis.into.shape[0] * after.into.shape[0]
  low, high = 0, total  # edges that can be left out; too many
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if good(total - middle) else (low, middle)
  return Required(total - low, strongest(weights, total - low, constant=constant), scores, base)


def _prepared(network, graph, layer, x):
  """The network and activations of a node layer, in the dtype of x."""
  checks.count("layer", layer, 0, len(network) - 1)
  if len(graph.bases) != len(network) + 1:
    raise ValueError(f"graph: got {len(graph.bases)} node layers, expected {len(network) + 1}")
  x = jnp.asarray(x)
  _check_floats(x)
  network = floats_as(x.dtype, tuple(network))
  check_section(network[0], x)
  return network, graph.bases[layer], activations(network, x)[layer]


def _check_floats(x):
  # In the dtype of x all is computed: whole numbers would cut weights off.
  if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
    raise ValueError(f"x: got {jnp.result_type(x)}, expected activations that are floats")
