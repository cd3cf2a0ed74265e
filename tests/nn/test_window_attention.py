import jax
import numpy as np
import pytest

from jaxlab.nn.window_attention import relative_positions, window_attention

HEADS, WINDOW, HEIGHT, WIDTH = 2, 3, 6, 9
attend = jax.jit(window_attention, static_argnames=("window", "num_heads", "shift"))


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  q, k, v = rng.standard_normal((3, 2, HEIGHT, WIDTH, 4)).astype("float32")
  return q, k, v, rng.standard_normal(((2 * WINDOW - 1) ** 2, HEADS)).astype("float32")


def by_pixels(q, k, v, table, shift):
  """Each pixel attends to those in the same window of the rolled image that were not moved to another end of it."""
  q, k, v, table = (np.asarray(x, np.float64) for x in (q, k, v, table))
  out, size = np.zeros(q.shape), q.shape[-1] // HEADS
  where = {}  # pixel of the image -> (window, wrapped around, place in the rolled image)
  for y, x in np.ndindex(HEIGHT, WIDTH):
    ry, rx = (y - shift) % HEIGHT, (x - shift) % WIDTH
    where[y, x] = (ry // WINDOW, rx // WINDOW, y < shift, x < shift), (ry, rx)
  for b, y, x, h in np.ndindex(len(q), HEIGHT, WIDTH, HEADS):
    own = slice(h * size, (h + 1) * size)
    group, (ry, rx) = where[y, x]
    weights, values = [], []
    for (i, j), (other, (ri, rj)) in where.items():
      if other == group:
        row = (ry - ri + WINDOW - 1) * (2 * WINDOW - 1) + rx - rj + WINDOW - 1
        weights.append(np.exp(q[b, y, x, own] @ k[b, i, j, own] / np.sqrt(size) + table[row, h]))
        values.append(v[b, i, j, own])
    out[b, y, x, own] = np.array(weights) @ np.array(values) / np.sum(weights)
  return out


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_is_attention_within_regions(shift):
  q, k, v, table = arrays()
  out = attend(q, k, v, window=WINDOW, num_heads=HEADS, shift=shift, table=table)
  np.testing.assert_allclose(out, by_pixels(q, k, v, table, shift), atol=2e-6)
  plain = attend(q, k, v, window=WINDOW, num_heads=HEADS, shift=shift)
  np.testing.assert_allclose(plain, by_pixels(q, k, v, 0 * table, shift), atol=2e-6)


def test_relative_positions_of_a_small_window():
  np.testing.assert_array_equal(relative_positions(2), [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"window": 4}, "query: got shape"),
    ({"key": np.zeros((1, 6, 3, 8))}, "key: got shape"),
    ({"value": np.zeros((1, 3, 6, 8))}, "value: got shape"),
    ({"shift": 3}, "shift: got 3"),
    ({"shift": -1}, "shift: got -1"),
    ({"table": np.zeros((9, HEADS))}, "table: got shape"),
    ({"num_heads": 3}, "num_heads: got 3"),
  ],
)
def test_bad_arguments(change, message):
  q, k, v, _ = arrays()
  with pytest.raises(ValueError, match=message):
    window_attention(**{"query": q, "key": k, "value": v, "window": WINDOW, "num_heads": HEADS, **change})
