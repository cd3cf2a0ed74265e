"""Neighbourhood attention: every pixel attends to the k x k window around it, and windows at the border move inwards.

    out_p = sum_{q in window(p)} softmax_q(query_p . key_q / sqrt(d) + bias[q - p]) value_q

On an axis of length L the window of pixel i starts at clip(i - k // 2, 0, L - k), so each has exactly k x k keys.
Hassani et al., "Neighborhood Attention Transformer", CVPR 2023, arXiv:2204.07143, and its library NATTEN.

A tile of t x t queries needs no more than (t + k - 1)^2 keys, whatever their windows. So the image is cut into tiles,
each is a small dense attention with a mask, and no key is copied more than ((t + k - 1) / t)^2 times rather than k^2.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlab import checks
from jaxlab.nn.attention import multi_head_attention

TILE = 8


class _Axis(NamedTuple):
  """Tiles along an axis, padded with copies of the last pixel.

  Attributes:
    queries: [tiles, t] positions.
    keys: [tiles, s] positions that the windows of a tile lie in.
    offset: [tiles, t, s] key - query + k - 1, or -1 where the key is outside the query's window.
  """

  queries: np.ndarray
  keys: np.ndarray
  offset: np.ndarray


@functools.cache
def _axis(length: int, window: int) -> _Axis:
  tile = min(TILE, length)
  queries = np.minimum(np.arange(-(-length // tile) * tile), length - 1).reshape(-1, tile)
  first = np.clip(queries - window // 2, 0, length - window)[..., None]
  span = min(tile + window - 1, length)
  keys = np.minimum(first[:, 0], length - span) + np.arange(span)
  inside = (keys[:, None] >= first) & (keys[:, None] < first + window)
  return _Axis(queries, keys, np.where(inside, keys[:, None] - queries[..., None] + window - 1, -1))


def neighborhood_attention(
  query: Float[Array, "b h w c"],
  key: Float[Array, "b h w c"],
  value: Float[Array, "b h w c"],
  *,
  window: int,
  num_heads: int,
  bias: Float[Array, "n 2k-1 2k-1"] | None = None,
) -> Float[Array, "b h w c"]:
  """The attention above, for every head; projections are the caller's, heads own contiguous channels.

  Args:
    query: pixels that ask.
    key: pixels that are asked.
    value: what they answer.
    window: k, odd and no longer than either side of the image.
    num_heads: n; divides the channels.
    bias: [n, 2k - 1, 2k - 1], added to the logit of key (y', x') and query (y, x) at (y' - y + k - 1, x' - x + k - 1).

  Returns:
    Pixels, dtype of the arguments; the softmax is taken in float32.

  Raises:
    ValueError: shapes that do not fit, a window that is even or too wide, heads that do not divide the channels.
  """
  if query.ndim != 4:
    raise ValueError(f"query: got shape {query.shape}, expected images [batch, height, width, channels]")
  batch, height, width, channels = query.shape
  checks.shaped_like("query", query, key=key, value=value)
  if window < 1 or window % 2 == 0 or window > min(height, width):
    raise ValueError(f"window: got {window}, expected an odd number up to {min(height, width)}, the image's side")
  if bias is not None and bias.shape != (num_heads, 2 * window - 1, 2 * window - 1):
    raise ValueError(f"bias: got shape {bias.shape}, expected ({num_heads}, {2 * window - 1}, {2 * window - 1})")
  rows, columns = _axis(height, window), _axis(width, window)

  def cut(x: Array, row: np.ndarray, column: np.ndarray) -> Array:
    """[B, H, W, C] -> [B, tiles, pixels of a tile, C]."""
    x = jnp.swapaxes(x[:, row][:, :, :, column], 2, 3)
    return x.reshape(batch, len(row) * len(column), -1, channels)

  seen = _pairs(rows.offset >= 0, columns.offset >= 0, np.logical_and)
  mask = jnp.asarray(seen.reshape(-1, 1, seen.shape[2] * seen.shape[3], seen.shape[4] * seen.shape[5]))
  logits = None
  if bias is not None:
    logits = jnp.moveaxis(_spread(bias, rows.offset, columns.offset), 0, 2)
    logits = logits.reshape(len(mask), num_heads, *mask.shape[2:])
  attend = functools.partial(multi_head_attention, num_heads=num_heads, bias=logits, mask=mask)
  queries = cut(query, rows.queries, columns.queries)
  out = jax.vmap(attend)(queries, *(cut(x, rows.keys, columns.keys) for x in (key, value)))
  out = out.reshape(batch, len(rows.queries), len(columns.queries), rows.queries.shape[1], -1, channels)
  out = jnp.swapaxes(out, 2, 3).reshape(batch, rows.queries.size, columns.queries.size, channels)
  return out[:, :height, :width]


def _pairs(rows, columns, join):
  """[Th, t, s] and [Tw, t', s'] -> [Th, Tw, t, t', s, s']."""
  return join(rows[:, None, :, None, :, None], columns[None, :, None, :, None, :])


def _spread(bias, rows, columns):
  """[n, 2k - 1, 2k - 1] -> [n, Th, Tw, t, t', s, s']: looked up once for tiles that are alike, as all but a few are."""
  (rows, row_kind), (columns, column_kind) = (np.unique(x, axis=0, return_inverse=True) for x in (rows, columns))
  return _pairs(rows, columns, lambda r, c: bias[:, r, c])[:, row_kind][:, :, column_kind]
