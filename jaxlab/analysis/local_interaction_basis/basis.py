"""The bases of a network's node layers, from the outputs backwards. Host, in float64."""

import functools
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, PRNGKeyArray

from jaxlab import checks
from jaxlab.analysis.local_interaction_basis import gradients, sections
from jaxlab.analysis.local_interaction_basis.gradients import Formula, Integration
from jaxlab.analysis.local_interaction_basis.sections import Network

Method: TypeAlias = Literal["lib", "pca", "neuron"] | Formula


class Basis(NamedTuple):
  """Features x C of a node layer, the most important first; the constant is before all others if there is one.

  Attributes:
    into: C, [D, R].
    back: its pseudoinverse, [R, D].
    importance: Lambda, [R]: the features' mean squares, without the constant's; for `pca` the variances.
  """

  into: Float[np.ndarray, "d r"]
  back: Float[np.ndarray, "r d"]
  importance: Float[np.ndarray, " r"]


class Graph(NamedTuple):
  """Node layers and the edges between them.

  Attributes:
    bases: of each node layer, outputs included.
    edges: [to, from] between each two, not negative.
  """

  bases: tuple[Basis, ...]
  edges: tuple[Float[np.ndarray, "to from"], ...]


def interaction_graph(
  network: Network,
  x: Float[Array, "n p d"],
  *,
  method: Method = "lib",
  center: bool = True,
  threshold: float = 1e-15,
  rotate_output: bool = False,
  integration: Integration = "gradient",
  intervals: int = 0,
  position_sources: int | None = None,
  feature_sources: int | None = None,
  key: PRNGKeyArray | None = None,
  batch_size: int = 64,
) -> Graph:
  """Host, with sums over the data on the device: bases of all node layers, and edges between them.

  Args:
    network: sections; their floating weights are taken to float64, whether or not JAX's 64 bits are enabled.
    x: activations of the first node layer.
    method: "lib"; "pca", which stops after the first rotation; "neuron", no rotation; or LIB by an older formula of
      the official code, see `gradient_gram`.
    center: whether features are of centred activations, with one for the constant, which must be last in x.
    threshold: directions of less variance, and features of less importance, are dropped.
    rotate_output: whether the last node layer has its principal components as basis, in place of itself.
    integration: see `jacobian_gram`; for "(1-alpha)^2" another integration than "gradient".
    intervals: see there.
    batch_size: see there.
    position_sources: see there; for "lib" alone.
    feature_sources: likewise.
    key: for sources.

  Raises:
    ValueError: an argument out of range, one that the method does not know, or a constant that is none.
  """
  checks.choice("method", method, ("lib", "pca", "neuron", "(1-0)*alpha", "(1-alpha)^2"))
  checks.real("threshold", threshold, 0.0, np.inf)
  gradients.check_formula(method, integration)
  for name, sources in (("position_sources", position_sources), ("feature_sources", feature_sources)):
    if sources is not None and method != "lib":
      raise ValueError(f"{name}: got {sources} for method {method!r}, expected None, as only 'lib' draws sources")
  _check(network, x)
  nodes: Any = {"integration": integration, "intervals": intervals, "batch_size": batch_size}
  with jax.enable_x64(True):
    x = jnp.asarray(np.asarray(x, np.float64))
    network = sections.floats_as("float64", tuple(network))
    gradients.check_section(network[0], x)
    layers, statistics = _survey(network, x, center=center)
    if rotate_output:
      bases = [_principal("rotate_output", layers[-1], statistics[-1], threshold, center)]
    else:
      bases = [_identity(layers[-1].shape[-1])]
    for depth in reversed(range(len(network))):
      section, acts, to = network[depth], layers[depth], _padded(bases[0].into, 1)
      if method == "neuron":
        bases.insert(0, _identity(acts.shape[-1]))
        continue
      start = _principal("x", acts, statistics[depth], threshold, center)
      if method == "pca":
        bases.insert(0, start)
      elif method == "lib":
        if key is not None:
          key, layer_key = jax.random.split(key)
        gram = gradients.jacobian_gram(
          section, acts, to, None if key is None else layer_key, **nodes,
          position_sources=position_sources, feature_sources=feature_sources,
        )  # fmt: skip
        bases.insert(0, rotated(start, np.asarray(gram), threshold, center))
      else:
        grams = gradients.gradient_gram(section, acts, to, formula=method, **nodes)
        bases.insert(0, rotated(start, np.asarray(grams[0]), threshold, center, np.asarray(grams[1])))
    edges = []
    for section, acts, basis, after in zip(network, layers, bases, bases[1:], strict=False):
      padded = _padded(basis.into, 1), _padded(basis.back, 0)
      weights = gradients.edge_weights(section, acts, padded, _padded(after.into, 1), **nodes)
      edges.append(np.asarray(weights)[: len(after.importance), : len(basis.importance)])
  return Graph(tuple(bases), tuple(edges))


@jax.jit
def activations(network: Network, x: Float[Array, "n p d"]) -> tuple[Float[Array, "n q e"], ...]:
  """Of all node layers, x and the outputs included."""
  found = [x]
  for section in network:
    found.append(section(found[-1]))
  return tuple(found)


@functools.partial(jax.jit, static_argnames="center")
def _survey(network, x, *, center):
  layers = activations(network, x)
  return layers, [moments(layer, center=center) for layer in layers]


def moments(x: Float[Array, "n p d"], *, center: bool = True) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
  """Mean m over examples and positions, and the Gram matrix E[y y^T] of y = x, centred but for the last coordinate.

  Args:
    x: activations.
    center: whether y = x - m in all coordinates but the last, the constant.
  """
  rows = x.reshape(-1, x.shape[-1])
  mean = rows.mean(0)
  rows = rows - mean.at[-1].set(0) if center else rows
  return mean, rows.T @ rows / len(rows)


def principal(
  mean: Float[np.ndarray, " d"], gram: Float[np.ndarray, "d d"], threshold: float, center: bool = True
) -> Basis:
  """Principal components W = Y U, with x Y = x - m and U the eigenvectors of the Gram matrix.

  Args:
    mean: of `moments`.
    gram: of `moments`.
    threshold: smaller eigenvalues are dropped.
    center: whether the last coordinate is a constant 1, which then is the first component, by itself.
  """
  gram, mean = np.asarray(gram, np.float64), np.asarray(mean, np.float64)
  if not center:
    values, vectors = _eigen(gram)
    keep = values > threshold
    return Basis(vectors[:, keep], vectors[:, keep].T, values[keep])
  values, vectors = _eigen(gram[:-1, :-1])
  keep = values > threshold
  vectors = scipy.linalg.block_diag(1, vectors[:, keep])  # constant first
  vectors = np.concatenate([vectors[1:], vectors[:1]])  # and last among coordinates
  into, back = vectors.copy(), vectors.T.copy()
  into[-1] -= mean[:-1] @ vectors[:-1]
  back[0, :-1] += mean[:-1]
  return Basis(into, back, np.concatenate([[1.0], values[keep]]))


def rotated(
  start: Basis,
  gram: Float[np.ndarray, "d d"],
  threshold: float,
  center: bool = True,
  scales: Float[np.ndarray, "d d"] | None = None,
) -> Basis:
  """C = R V Lambda^(1/2): whitened, turned to the eigenvectors V of R^+ M' R^+^T, and scaled by their eigenvalues.

  Args:
    start: principal components; R = W D^(-1/2).
    gram: M', of `jacobian_gram` or `gradient_gram`.
    threshold: features of less importance are dropped, the constant never.
    center: whether the first component is the constant, which no rotation may touch. It is scaled as the others, or
      left as it is where its importance is below the threshold.
    scales: Lambda' of `gradient_gram`, for Lambda = |diag(V^T R^+ Lambda' R V)| in place of eigenvalues.
  """
  spread = np.sqrt(start.importance)
  whiten, color = start.into / spread, spread[:, None] * start.back  # R, R^+
  inner = color @ np.asarray(gram, np.float64) @ color.T
  first = int(center)
  values, vectors = _eigen(inner[first:, first:])
  turn = scipy.linalg.block_diag(np.eye(first), vectors)
  if scales is None:
    importance = np.concatenate([np.abs(np.diag(inner)[:first]), values])
  else:
    importance = np.abs(np.diag(turn.T @ color @ np.asarray(scales, np.float64) @ whiten @ turn))
  order = np.concatenate([np.arange(first), first + np.argsort(-importance[first:], kind="stable")])
  order = order[(importance[order] >= threshold) | (order < first)]
  importance, turn = importance[order], turn[:, order]
  scale = np.sqrt(np.where(importance < max(threshold, np.finfo(float).tiny), 1, importance))
  return Basis(whiten @ turn * scale, turn.T @ color / scale[:, None], importance)


def _identity(size):
  return Basis(np.eye(size), np.eye(size), np.ones(size))


def _eigen(matrix):
  """Absolute eigenvalues, descending, and vectors as columns."""
  values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
  order = np.argsort(-np.abs(values), kind="stable")
  return np.abs(values[order]), vectors[:, order]


def _padded(matrix, axis):
  """Zeros up to a multiple of 32, or the size of the other axis: programs are compiled for few shapes."""
  size = min(-(-matrix.shape[axis] // 32) * 32, max(matrix.shape))
  widths = [(0, 0), (0, 0)]
  widths[axis] = (0, size - matrix.shape[axis])
  return jnp.asarray(np.pad(matrix, widths))


def _principal(name, layer, statistics, threshold, center):
  # ReLU keeps a 1 exactly; what an activation maps to 1 it does to within roundoff.
  if center and not np.allclose(np.asarray(layer)[..., -1], 1, rtol=0, atol=1e-6):
    raise ValueError(f"{name}: got activations whose last coordinate is not 1, expected 1 to center them")
  return principal(*statistics, threshold, center)


def _check(network, x):
  if not len(network):
    raise ValueError("network: got no sections, expected at least one")
  if np.ndim(x) != 3 or not len(x):
    raise ValueError(f"x: got shape {np.shape(x)}, expected activations [examples, positions, features]")
