"""Attention in windows, shifted or not: an image is cut into squares, and pixels attend to those of their square.

    out = softmax(q k^T / sqrt(d) + table[y_q - y_k, x_q - x_k]) v       in every window and head

Shifted windows are those of the image rolled by -shift in both axes; a window that holds pixels from both ends of the
image keeps the parts apart. Liu et al., "Swin Transformer", ICCV 2021, arXiv:2103.14030.

Differs from the official code: pixels of other parts are hidden, where it subtracts 100 from their logits, which is
e^-100 in the weights: the same in float32 unless a logit is 80 above the others.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab import checks
from jaxlab.nn.attention import multi_head_attention


def window_attention(
  query: Float[Array, "b h w c"],
  key: Float[Array, "b h w c"],
  value: Float[Array, "b h w c"],
  *,
  window: int,
  num_heads: int,
  shift: int = 0,
  table: Float[Array, "r n"] | None = None,
) -> Float[Array, "b h w c"]:
  """The attention above; projections are the caller's, heads own contiguous channels.

  Args:
    query: pixels that ask.
    key: pixels that are asked.
    value: what they answer.
    window: w, side of the windows; divides both sides of the image.
    num_heads: n; divides the channels.
    shift: how far windows are shifted, 0 to w - 1.
    table: [(2w - 1)^2, n] of relative positions; row (y_q - y_k + w - 1)(2w - 1) + (x_q - x_k + w - 1), as official.

  Returns:
    Pixels, dtype of the arguments; the softmax is taken in float32.

  Raises:
    ValueError: shapes that do not fit, heads that do not divide the channels.
  """
  if query.ndim != 4 or window < 1 or query.shape[1] % window or query.shape[2] % window:
    raise ValueError(
      f"query: got shape {query.shape}, expected [B, H, W, C], H and W multiples of the window, {window}"
    )
  checks.shaped_like("query", query, key=key, value=value)
  if not 0 <= shift < window:
    raise ValueError(f"shift: got {shift}, expected 0 to {window - 1}")
  if table is not None and table.shape != ((2 * window - 1) ** 2, num_heads):
    raise ValueError(f"table: got shape {table.shape}, expected ({(2 * window - 1) ** 2}, {num_heads})")
  batch, height, width, channels = query.shape
  grid = height // window, width // window

  shifted = lambda x, by: jnp.roll(x, (by, by), (1, 2)) if by else x

  def cut(x: Array) -> Array:
    """[B, H, W, C] -> [B, windows, w^2, C]."""
    x = x.reshape(-1, grid[0], window, grid[1], window, x.shape[-1])
    return jnp.swapaxes(x, 2, 3).reshape(len(x), grid[0] * grid[1], window**2, -1)

  bias = None if table is None else jnp.moveaxis(table[relative_positions(window)], 2, 0)[None]
  mask = None
  if shift:
    part = 2 * _part(height, shift)[:, None] + _part(width, shift)
    part = cut(part[None, ..., None])[0, :, :, 0]
    mask = (part[:, :, None] == part[:, None, :])[:, None]  # [windows, 1, w^2, w^2]
  attend = functools.partial(multi_head_attention, num_heads=num_heads, bias=bias, mask=mask)
  out = jax.vmap(attend)(*(cut(shifted(x, -shift)) for x in (query, key, value)))
  out = out.reshape(batch, *grid, window, window, channels)
  return shifted(jnp.swapaxes(out, 2, 3).reshape(query.shape), shift)


def relative_positions(window: int) -> Int[np.ndarray, "w2 w2"]:
  """Host. [w^2, w^2] rows of the table for each pair of a window's query and key."""
  y, x = np.divmod(np.arange(window**2), window)
  return (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1


def _part(length: int, shift: int) -> Int[Array, " length"]:
  """Of the rolled axis: 1 for what came from the other end of the image, 0 for the rest."""
  return (jnp.arange(length) >= length - shift).astype(jnp.int32)
