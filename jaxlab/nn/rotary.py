"""Rotary position embedding of images: channels are turned by angles that grow with the row and the column."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def rotary_2d(x: Float[Array, "b h w c"], *, num_heads: int, base: float = 10000.0) -> Float[Array, "b h w c"]:
  """Turns pairs of channels, so that a product of two pixels depends on where they are from each other only.

      (x_2f, x_2f+1) -> (x_2f cos a - x_2f+1 sin a, x_2f+1 cos a + x_2f sin a),   a = position * w_f

  In every head of d channels the first half is turned by the row, the second by the column, with the frequencies
  w_f = base^(-f / (d/4 - 1)), f = 0, ..., d/4 - 1: both ends, 1 and 1 / base, are among them.

  Args:
    x: queries or keys; heads own contiguous channels.
    num_heads: n; d = C / n is a multiple of 4.
    base: of the frequencies.

  Returns:
    Of the shape and dtype of `x`; angles are float32.

  Raises:
    ValueError: channels that do not divide.

  Source: Su et al., "RoFormer", arXiv:2104.09864, for a line; Fan et al., "RMT", arXiv:2309.11523, for images.
  """
  if x.ndim != 4 or num_heads < 1 or x.shape[-1] % (4 * num_heads):
    raise ValueError(f"x: got shape {x.shape}, expected [B, H, W, C], C a multiple of {4 * num_heads}, 4 for each head")
  _, height, width, channels = x.shape
  frequency = base ** -np.linspace(0, 1, channels // num_heads // 4)
  row, column = np.mgrid[:height, :width][..., None] * frequency
  angle = np.tile(np.concatenate([row, column], -1), num_heads).astype(np.float32)  # [H, W, C / 2]
  cos, sin = jnp.asarray(np.cos(angle)), jnp.asarray(np.sin(angle))
  even, odd = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
  turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
  return turned.reshape(x.shape).astype(x.dtype)
