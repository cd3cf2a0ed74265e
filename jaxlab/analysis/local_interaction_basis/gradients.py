"""Sums over a dataset of products of Jacobians, a batch at a time: what basis and edges are made of."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxlab import checks
from jaxlab.analysis.local_interaction_basis import sections
from jaxlab.analysis.local_interaction_basis.sections import Section

Integration: TypeAlias = Literal["gradient", "gauss_legendre", "trapezoid"]
Formula: TypeAlias = Literal["(1-0)*alpha", "(1-alpha)^2"]


def nodes(integration: Integration, intervals: int = 0) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
  """Points on the line from 0 to an activation, and their weights, which sum to 1.

  Args:
    integration: "gradient", at the activation itself; "gauss_legendre" with `intervals` + 1 points; "trapezoid", as
      many equally spaced points in [e, 1 - e], e = 0.001 / (`intervals` + 1), or 1/2 for no intervals.
    intervals: see there; 0 for "gradient".

  Raises:
    ValueError: an unknown rule or a number out of range.
  """
  checks.choice("integration", integration, Integration)
  checks.count("intervals", intervals, 0, 0 if integration == "gradient" else None)
  if integration == "gradient":
    return np.ones(1), np.ones(1)
  if integration == "gauss_legendre":
    points, weights = np.polynomial.legendre.leggauss(intervals + 1)
    return (points + 1) / 2, weights / 2
  if intervals == 0:
    return np.full(1, 0.5), np.ones(1)
  edge = 1e-3 / (intervals + 1)
  weights = np.full(intervals + 1, 1 / intervals)
  weights[[0, -1]] /= 2
  return np.linspace(edge, 1 - edge, intervals + 1), weights


def jacobian_gram(
  section: Section,
  x: Float[Array, "n p d"],
  to: Float[Array, "e r"],
  key: PRNGKeyArray | None = None,
  *,
  integration: Integration = "gradient",
  intervals: int = 0,
  position_sources: int | None = None,
  feature_sources: int | None = None,
  batch_size: int = 64,
) -> Float[Array, "d d"]:
  """M' = 1 / (N P) sum_x sum_{t, i, s} J J^T, with J[t, i, s] = d f_i(x)_t / d x_s [D] and f = section(.) C.

  Of a dense layer or a block, the Jacobian is known from the activation's slopes g: J^T = W diag(g) C of the first,
  so that M' = W (C C^T * mean g g^T) W^T, and no Jacobian is formed.

  Args:
    section: from one node layer to the next.
    x: activations.
    to: C, basis of the next node layer.
    key: for sources.
    integration: J is averaged over `nodes` on the line to x.
    intervals: of `nodes`.
    position_sources: random signs to combine outputs t with, in place of all t; None for all.
    feature_sources: as well for i.
    batch_size: examples whose Jacobians are held at once.

  Returns:
    Symmetric, in x's dtype and float32 at least.

  Raises:
    ValueError: wrong shapes, an unknown rule, or sources without a key.
  """
  for name, value in (("position_sources", position_sources), ("feature_sources", feature_sources)):
    if value is not None:
      checks.count(name, value)
  if key is None and (position_sources or feature_sources):
    raise ValueError("key: got None, expected one for random sources")
  points = _points(integration, intervals, x)
  _check(section, x, to, batch_size)
  sources = (position_sources, feature_sources)
  return _jacobian_gram(section, x, to, key, points, sources=sources, batch_size=batch_size)


@functools.partial(jax.jit, static_argnames=("sources", "batch_size"))
def _jacobian_gram(section, x, to, key, points, *, sources, batch_size):
  position_sources, feature_sources = sources
  drawn, norm = position_sources or feature_sources, x.shape[0] * x.shape[1]
  section, x, to = _wide((section, x, to))
  f = lambda a: section(a) @ to
  if not drawn and isinstance(section, sections.Dense | sections.Block):
    return _from_slopes(section, x.reshape(norm, -1), to, points) / norm

  _, out_positions, rank = jax.eval_shape(f, x).shape

  def pulled(a, cotangents):
    """[S, Q, R] -> [S, P, D], averaged over nodes."""
    pull = lambda point: jax.vmap(jax.vjp(f, point * a)[1])(cotangents)[0]
    return _average(pull, points)

  unit = jnp.eye(out_positions * rank, dtype=x.dtype).reshape(-1, out_positions, rank)

  def signs(key):
    shape = (position_sources or out_positions, feature_sources or rank, out_positions, rank)
    phi = jax.random.rademacher(key, shape, x.dtype)
    if position_sources is None:
      phi *= jnp.eye(out_positions, dtype=x.dtype)[:, None, :, None]
    if feature_sources is None:
      phi *= jnp.eye(rank, dtype=x.dtype)[None, :, None, :]
    return phi.reshape(-1, out_positions, rank)

  def batch(a, real, key):
    if drawn:
      jacobian = jax.vmap(lambda a, key: pulled(a, signs(key)))(a, jax.random.split(key, len(a)))
    else:
      jacobian = jax.vmap(lambda a: pulled(a, unit))(a)
    rows = (jacobian * real[:, None, None, None]).reshape(-1, x.shape[-1])
    return rows.T @ rows

  norm *= (position_sources or 1) * (feature_sources or 1)
  return _sum(batch, x, batch_size, key) / norm


def _from_slopes(section, x, to, points):
  """As `jacobian_gram` says, for examples [N, D]; J of a block is (I + W_in diag(g) W_out) C. Slopes are averaged over
  nodes, which averages Jacobians."""
  inner = section.kernel if isinstance(section, sections.Dense) else section.inner
  slope = jax.grad(sections.ACTIVATIONS[section.activation])
  slopes = _average(lambda point: jax.vmap(jax.vmap(slope))(point * x @ inner), points)
  mixed = slopes.T @ slopes
  if isinstance(section, sections.Dense):
    return inner @ (to @ to.T * mixed) @ inner.T
  outer = section.outer @ to
  cross = inner * slopes.sum(0) @ outer @ to.T
  return inner @ (outer @ outer.T * mixed) @ inner.T + cross + cross.T + len(x) * to @ to.T


def gradient_gram(
  section: Section,
  x: Float[Array, "n p d"],
  to: Float[Array, "e r"],
  *,
  formula: Formula,
  integration: Integration = "gauss_legendre",
  intervals: int = 0,
  batch_size: int = 64,
) -> tuple[Float[Array, "d d"], Float[Array, "d d"]]:
  """The official code's older M' = mean g g^T and Lambda' = mean g x^T, of gradients g of one number at points a x.

  Args:
    section: as for `jacobian_gram`, like all that follows but the formula.
    x: activations.
    to: C, basis of the next node layer.
    integration: where the points are.
    intervals: of `nodes`.
    batch_size: examples at once.
    formula: of what: "(1-0)*alpha", f(a x) . f(x); "(1-alpha)^2", -|f(x) - f(a x)|^2.

  Raises:
    ValueError: as `jacobian_gram`; the second formula at a = 1 alone, where its gradient is zero.
  """
  checks.choice("formula", formula, Formula)
  check_formula(formula, integration)
  points = _points(integration, intervals, x)
  _check(section, x, to, batch_size)
  # Their gradients are J(a x)^T f(x), and J(a x)^T (2 f(x) - 2 f(a x)).
  factors = (1.0, 0.0) if formula == "(1-0)*alpha" else (2.0, 2.0)
  return _gradient_gram(section, x, to, points, factors, batch_size=batch_size)


def check_formula(formula: str, integration: Integration) -> None:
  """Raises a ValueError for a formula whose gradients are zero at all points of the rule."""
  if formula == "(1-alpha)^2" and integration == "gradient":
    raise ValueError(f"integration: got {integration!r}, expected gauss_legendre or trapezoid for {formula}")


@functools.partial(jax.jit, static_argnames="batch_size")
def _gradient_gram(section, x, to, points, factors, *, batch_size):
  section, x, to = _wide((section, x, to))
  f = lambda a: section(a) @ to

  def gradient(a):
    target = f(a)

    def at(point):
      value, pull = jax.vjp(f, point * a)
      return pull(factors[0] * target - factors[1] * value)[0]

    return _average(at, points)

  def batch(a, real, _):
    g = (jax.vmap(gradient)(a) * real[:, None, None]).reshape(-1, a.shape[-1])
    return g.T @ g, g.T @ a.reshape(g.shape)

  return jax.tree.map(lambda a: a / (x.shape[0] * x.shape[1]), _sum(batch, x, batch_size))


def edge_weights(
  section: Section,
  x: Float[Array, "n p d"],
  basis: tuple[Float[Array, "d r"], Float[Array, "r d"]],
  to: Float[Array, "e q"],
  *,
  integration: Integration = "gradient",
  intervals: int = 0,
  batch_size: int = 64,
) -> Float[Array, "q r"]:
  """E[i, j] = 1 / (N P) sum_{x, t} A[t, i, j]^2, with A[t, i, j] = sum_s d f_i(x^)_t / d x^_sj x^_sj.

  A[:, :, j] is a derivative along one direction, x^ without all but feature j, so it takes as many forward passes as
  there are features, whatever the number of positions; or, if those are fewer, a backward pass for each output.

  Args:
    section: as for `jacobian_gram`.
    x: as for `jacobian_gram`; x^ = x C.
    integration: as for `jacobian_gram`.
    intervals: likewise.
    batch_size: likewise.
    basis: C and its pseudoinverse, of x.
    to: C of the next node layer.

  Returns:
    From features j of this node layer to features i of the next, in x's dtype and float32 at least.
  """
  points = _points(integration, intervals, x)
  _check(section, x, to, batch_size)
  if jnp.shape(basis[0])[:1] != x.shape[2:] or jnp.shape(basis[1]) != jnp.shape(basis[0])[::-1]:
    shapes = [jnp.shape(part) for part in basis]
    raise ValueError(f"basis: got shapes {shapes}, expected [{x.shape[2]}, features] and its transpose")
  return _edge_weights(section, x, tuple(basis), to, points, batch_size=batch_size)


@functools.partial(jax.jit, static_argnames="batch_size")
def _edge_weights(section, x, basis, to, points, *, batch_size):
  section, x, to, (into, back) = _wide((section, x, to, basis))
  f = lambda a: section(a) @ to
  count, positions, rank = len(x), x.shape[1], into.shape[1]
  outputs = int(np.prod(jax.eval_shape(f, x).shape[1:]))

  def forward(a, features):
    """[R, Q, E]; with one position, features scale results, so that directions are the same for every example."""
    directions = back[:, None] if positions == 1 else features.T[:, :, None] * back[:, None]
    push = lambda point: jax.vmap(lambda d: jax.jvp(f, (point * a,), (d,))[1])(directions)
    along = _average(push, points)
    return along * features[0][:, None, None] if positions == 1 else along

  def backward(a, features):
    """As well."""
    jacobian = _average(lambda point: jax.jacrev(f)(point * a), points)  # [Q, E, P, D]
    return jnp.einsum("qesj,sj->jqe", jacobian @ back.T, features)

  def batch(a, real, _):
    features = a @ into
    attributions = jax.vmap(forward if rank <= outputs else backward)(features @ back, features)
    return jnp.einsum("njqe,n->ej", attributions**2, real)

  return _sum(batch, x, batch_size) / (count * positions)


# ------------------------------------------------------------------------------------------------------------- helpers


def _average(function: Callable, points: Sequence[Array]) -> Array:
  """sum_k weight_k function(point_k)."""
  at, weights = points
  if len(at) == 1:
    return weights[0] * function(at[0])
  shape = jax.eval_shape(function, at[0])
  add = lambda total, node: (total + node[1] * function(node[0]), None)
  return jax.lax.scan(add, jnp.zeros(shape.shape, shape.dtype), points)[0]


def _sum(function: Callable, x: Array, batch_size: int, key: PRNGKeyArray | None = None) -> Any:
  """Sum over batches of function(examples, 1 for the real of them, key); one batch of terms is held at a time."""
  batches = -(-len(x) // batch_size)
  size = -(-len(x) // batches)
  padded = jnp.concatenate([x, jnp.broadcast_to(x[:1], (batches * size - len(x), *x.shape[1:]))])
  real = (jnp.arange(batches * size) < len(x)).astype(x.dtype)
  keys = jnp.zeros(batches) if key is None else jax.random.split(key, batches)
  parts = padded.reshape(batches, size, *x.shape[1:]), real.reshape(batches, size), keys
  first = jax.eval_shape(function, *jax.tree.map(lambda a: a[0], parts))
  zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)
  return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, function(*part)), None), zero, parts)[0]


def _points(integration, intervals, x):
  dtype = jnp.promote_types(jnp.result_type(x), "float32")
  return tuple(jnp.asarray(part, dtype) for part in nodes(integration, intervals))


def _wide(tree):
  """All floating arrays in one dtype, the widest among them and float32."""
  floats = [a for a in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(a), jnp.floating)]
  return sections.floats_as(jnp.result_type("float32", *floats), tree)


def check_section(section: Section, x: Float[Array, "n p d"]) -> tuple[int, ...]:
  """The shape of the section's activations; raises a ValueError unless it takes x."""
  try:
    return jax.eval_shape(section, x).shape
  except (TypeError, ValueError) as error:
    raise ValueError(f"x: got shape {jnp.shape(x)}, expected what the section takes ({error})") from error


def _check(section, x, to, batch_size):
  checks.count("batch_size", batch_size)
  if jnp.ndim(x) != 3 or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
    raise ValueError(
      f"x: got {jnp.result_type(x)} {jnp.shape(x)}, expected activations [examples, positions, features]"
    )
  shape = check_section(section, x)
  if jnp.ndim(to) != 2 or jnp.shape(to)[0] != shape[-1]:
    raise ValueError(f"to: got shape {jnp.shape(to)}, expected [{shape[-1]}, features], the next layer's basis")
