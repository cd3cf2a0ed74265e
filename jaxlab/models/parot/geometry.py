"""Frames from two directions, what they say about each other, and what is asked of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate(points: Float[Array, "*b k 3"], rotation: Float[Array, "*b 3 3"]) -> Float[Array, "*b k 3"]:
  """p R of each row p, written out: XLA's products of many small matrices are slow on CPU."""
  x, y, z = (points[..., i, None] * rotation[..., None, i, :] for i in range(3))
  return x + y + z


def unrotate(points: Float[Array, "*b k 3"], rotation: Float[Array, "*b 3 3"]) -> Float[Array, "*b k 3"]:
  """p R^T of each row."""
  return rotate(points, rotation.mT)


def normalize(v: Float[Array, "*b 3"]) -> tuple[Float[Array, "*b 3"], Float[Array, "*b 1"]]:
  """v / max(||v||, 1e-12), and ||v||. A zero vector stays zero and passes no gradient."""
  square = (v * v).sum(-1, keepdims=True)
  some = square > 0
  length = jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0)
  return jnp.where(some, v, 0) / jnp.where(some, jnp.maximum(length, 1e-12), 1), length


def frame(directions: Float[Array, "*b 2 3"], *, differentiable: bool = True) -> Float[Array, "*b 3 3"]:
  """Rows d1, d2 and the direction of d1 x d2. Orthonormal only as far as d1 and d2 are.

  Args:
    directions: unit vectors.
    differentiable: whether gradients pass the cross product; aggregation between scales stops them.
  """
  third = normalize(jnp.cross(directions[..., 0, :], directions[..., 1, :]))[0][..., None, :]
  return jnp.concatenate([directions, third if differentiable else jax.lax.stop_gradient(third)], -2)


def relative_pose(
  first: Float[Array, "*b 3 3"], second: Float[Array, "*b 3 3"], offset: Float[Array, "*b 3"]
) -> Float[Array, "*b 16"]:
  """[||v||, O_a O_b^T by rows, O_a v^, O_b v^]: unchanged when frames and offset turn together. A reflection of the
  cloud changes it, since frames are right-handed."""
  unit, length = normalize(offset)
  between = (first[..., :, None, :] * second[..., None, :, :]).sum(-1)
  seen = [(f * unit[..., None, :]).sum(-1) for f in (first, second)]
  return jnp.concatenate([length, between.reshape(*between.shape[:-2], 9), *seen], -1)


def direction_loss(
  directions1: Float[Array, "*b 2 3"],
  directions2: Float[Array, "*b 2 3"],
  rotation1: Float[Array, "*b 3 3"],
  rotation2: Float[Array, "*b 3 3"],
) -> Float[Array, ""]:
  """L_dir: mean of (d1 - d2 R2^T R1)^2 over all entries. Zero where the directions turn with the patch."""
  return jnp.mean((directions1 - rotate(unrotate(directions2, rotation2), rotation1)) ** 2)


def orthogonality_loss(directions: Float[Array, "*b 2 3"]) -> Float[Array, ""]:
  """L_orth: mean squared dot product of a patch's two directions: 0 for orthogonal, 1 for parallel ones."""
  return jnp.mean((directions[..., 0, :] * directions[..., 1, :]).sum(-1) ** 2)
