"""A stack of random ReLU layers shaped like a U, on which ScaleLong's bounds are laws that a few lines can check.

    f_N(x) = b(x)
    f_{i-1}(x) = B_i(k_i A_i(x) + f_i(A_i(x))),   i = 1 ... N

A_i, B_i and b are blocks of ReLU layers with weights N(0, 2 / width) and a linear one with N(0, 1 / width), which keep
E |x|^2. Then, over random weights,

    E |f_i(x)|^2 = (1 + sum_{j > i} k_j^2) E |x|^2,   and the same for |J d|^2 / |d|^2, J the Jacobian of f_i.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxlab import checks


class ToyUNet(NamedTuple):
  """Weights.

  Attributes:
    down: of A_1 ... A_N.
    up: of B_1 ... B_N.
    bottom: of b.
  """

  down: Float[Array, "n l c c"]
  up: Float[Array, "n l c c"]
  bottom: Float[Array, "l c c"]


def init_toy_unet(key: Key[Array, ""], depth: int, width: int, *, layers: int = 2) -> ToyUNet:
  """Random weights that keep the second moment.

  Args:
    key: of the draw.
    depth: N.
    width: channels of x and of every layer.
    layers: of a block; a ReLU follows all but the last.

  Raises:
    ValueError: on less than one of anything.
  """
  for name, value in (("depth", depth), ("width", width), ("layers", layers)):
    checks.count(name, value)
  gain = jnp.array([2.0] * (layers - 1) + [1.0]) / width
  weights = jax.random.normal(key, (2 * depth + 1, layers, width, width)) * jnp.sqrt(gain)[:, None, None]
  return ToyUNet(weights[:depth], weights[depth:-1], weights[-1])


def toy_unet(params: ToyUNet, x: Float[Array, " c"], scales: Float[Array, " n"]) -> Float[Array, "m c"]:
  """What every level of the network computes.

  Args:
    params: from `init_toy_unet`.
    x: input of the outermost level.
    scales: k_1 ... k_N.

  Returns:
    [f_0, f_1(A_1 x), ..., f_N(...)], [N + 1, C]: row 0 is the network's output.

  Raises:
    ValueError: shapes that do not fit.
  """
  depth, _, width, _ = params.down.shape
  if x.shape != (width,):
    raise ValueError(f"x: got shape {x.shape}, expected ({width},)")
  if jnp.shape(scales) != (depth,):
    raise ValueError(f"scales: got shape {jnp.shape(scales)}, expected one a level, ({depth},)")

  def encode(x: Array, weights: Array) -> tuple[Array, Array]:
    x = _block(weights, x)
    return x, x

  def decode(f: Array, level: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    weights, scale, kept = level
    f = _block(weights, scale * kept + f)
    return f, f

  x, kept = jax.lax.scan(encode, x, params.down)
  deepest = _block(params.bottom, x)
  _, levels = jax.lax.scan(decode, deepest, (params.up, jnp.asarray(scales), kept), reverse=True)
  return jnp.concatenate([levels, deepest[None]])


def skip_norm_prediction(scales: Float[Array, " n"]) -> Float[Array, " m"]:
  """The law: 1 + sum_{j > i} k_j^2 for i = 0 ... N, in units of |x|^2.

  Args:
    scales: k_1 ... k_N.

  Returns:
    [N + 1], for the levels that `toy_unet` returns.
  """
  squares = jnp.square(jnp.asarray(scales, jnp.float32))
  return 1 + jnp.append(jnp.cumsum(squares[::-1])[::-1], 0.0)


def _block(weights: Float[Array, "l c c"], x: Float[Array, " c"]) -> Float[Array, " c"]:
  for w in weights[:-1]:
    x = jax.nn.relu(w @ x)
  return weights[-1] @ x
