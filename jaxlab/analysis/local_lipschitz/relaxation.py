"""Lines above and below what is not linear: ReLU, a gradient that passes ReLU, and the absolute value."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.analysis.local_lipschitz.layers import Bounds

Method = Literal["lip_crown", "recurjac", "interval"]


class Lines(NamedTuple):
  """lower_slope x + lower_offset <= y <= upper_slope x + upper_offset, elementwise."""

  upper_slope: Float[Array, "*shape"]
  upper_offset: Float[Array, "*shape"]
  lower_slope: Float[Array, "*shape"]
  lower_offset: Float[Array, "*shape"]


def substitute(coefficients: Float[Array, "*shape"], lines: Lines) -> tuple[Float[Array, "*shape"], Float[Array, ""]]:
  """max of A y over what the lines allow is at most A' x + c; returns A' and c."""
  positive, negative = jnp.maximum(coefficients, 0), jnp.minimum(coefficients, 0)
  offset = jnp.sum(positive * lines.upper_offset + negative * lines.lower_offset)
  return positive * lines.upper_slope + negative * lines.lower_slope, offset


def relu(bounds: Bounds, lower_slope: Float[Array, "*shape"] | None = None) -> Lines:
  """ReLU on [l, u]: the chord above; below a line through 0.

  Args:
    bounds: of the argument.
    lower_slope: in [0, 1], of the line below where l < 0 < u; None for 1 where the chord is steeper than 1/2, else 0.
  """
  slope, offset = _chord(bounds)
  if lower_slope is None:
    below = (slope > 0.5).astype(slope.dtype)
  else:
    below = jnp.where(bounds.lower >= 0, 1, jnp.where(bounds.upper <= 0, 0, lower_slope))
  return Lines(slope, offset, below, jnp.zeros_like(slope))


def phase(bounds: Bounds) -> Int[Array, "*shape"]:
  """1 where a ReLU passes every input of the box, -1 where none, 0 where unknown. At 0 itself Clarke's derivative is
  all of [0, 1], so both tests are strict."""
  return jnp.where(bounds.lower > 0, 1, jnp.where(bounds.upper < 0, -1, 0)).astype("int8")


def gate(phase: Int[Array, "*shape"], gradient: Bounds, method: Method = "lip_crown") -> Lines:
  """h = g D, the gradient g in [l, u] past a ReLU, D = 1 or 0 by its phase and anything in [0, 1] where unknown.

  Then l <= 0 <= u gives u (g - l) / (u - l) above and -l (g - u) / (u - l) below, the hull of all g D; otherwise h is
  between 0 and g. RecurJac has the constants u and l in place of the two lines.
  """
  above, below = _chord(gradient), _chord(Bounds(-gradient.upper, -gradient.lower))
  lines = Lines(above[0], above[1], below[0], -below[1])  # h <= relu(g) and h >= -relu(-g)
  if method == "recurjac":
    crosses = (gradient.lower < 0) & (gradient.upper > 0)
    flat = Lines(jnp.zeros_like(above[0]), gradient.upper, jnp.zeros_like(above[0]), gradient.lower)
    lines = jax.tree.map(lambda a, b: jnp.where(crosses, a, b), flat, lines)
  known = jnp.abs(phase)
  passes = (phase > 0).astype(above[0].dtype)
  return Lines(
    jnp.where(known, passes, lines.upper_slope),
    jnp.where(known, 0, lines.upper_offset),
    jnp.where(known, passes, lines.lower_slope),
    jnp.where(known, 0, lines.lower_offset),
  )


def absolute(bounds: Bounds) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
  """Slope and offset of the line above |x| on [l, u]: the chord of [min(l, 0), max(u, 0)], so a side where l, u > 0."""
  lower, upper = jnp.minimum(bounds.lower, 0), jnp.maximum(bounds.upper, 0)
  width = upper - lower
  slope = jnp.where(width > 0, (upper + lower) / jnp.where(width > 0, width, 1), 0)
  return slope, -lower - slope * lower


def _chord(bounds):
  """Of ReLU: slope and offset, on [min(l, 0), max(u, 0)]; 1 and 0 where that is a point."""
  lower, upper = jnp.minimum(bounds.lower, 0), jnp.maximum(bounds.upper, 0)
  width = upper - lower
  slope = jnp.where(width > 0, upper / jnp.where(width > 0, width, 1), 1)
  return slope, -lower * slope
