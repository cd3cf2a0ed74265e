import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.nn.neighborhood_attention import neighborhood_attention

HEADS = 2
attend = jax.jit(neighborhood_attention, static_argnames=("window", "num_heads"))


def images(*shape, seed=0):
  return [jnp.asarray(x) for x in np.random.default_rng(seed).standard_normal((3, *shape)).astype("float32")]


def dense(q, k, v, window, bias):
  """Attention over all pixels with an explicit mask of clipped windows, pixel by pixel in float64."""
  q, k, v, bias = (np.asarray(x, np.float64) for x in (q, k, v, bias))
  batch, height, width, channels = q.shape
  out, size = np.zeros(q.shape), channels // HEADS
  for b, y, x, h in np.ndindex(batch, height, width, HEADS):
    own = slice(h * size, (h + 1) * size)
    top, left = (min(max(p - window // 2, 0), n - window) for p, n in ((y, height), (x, width)))
    logits, values = [], []
    for i in range(top, top + window):
      for j in range(left, left + window):
        shifted = bias[h, i - y + window - 1, j - x + window - 1]
        logits.append(q[b, y, x, own] @ k[b, i, j, own] / np.sqrt(size) + shifted)
        values.append(v[b, i, j, own])
    weights = np.exp(np.array(logits) - max(logits))
    out[b, y, x, own] = weights @ np.array(values) / weights.sum()
  return out


@pytest.mark.parametrize(("height", "width", "window"), [(9, 12, 7), (19, 10, 5), (7, 7, 7), (3, 17, 3), (4, 4, 1)])
def test_is_dense_attention_with_clipped_windows(height, width, window):
  q, k, v = images(2, height, width, 6)
  bias = jnp.asarray(np.random.default_rng(1).standard_normal((HEADS, 2 * window - 1, 2 * window - 1)), "float32")
  out = attend(q, k, v, window=window, num_heads=HEADS, bias=bias)
  np.testing.assert_allclose(out, dense(q, k, v, window, bias), atol=2e-6)
  plain = attend(q, k, v, window=window, num_heads=HEADS)
  np.testing.assert_allclose(plain, dense(q, k, v, window, 0 * bias), atol=2e-6)


def test_gradients_are_those_of_the_masked_dense_form():
  q, k, v = images(1, 9, 10, 4)
  bias = jnp.asarray(np.random.default_rng(1).standard_normal((HEADS, 9, 9)), "float32")
  target = jnp.asarray(np.random.default_rng(2).standard_normal(q.shape), "float32")
  y, x = (a.ravel() for a in np.mgrid[:9, :10])
  first = lambda p, n: np.clip(p - 2, 0, n - 5)[:, None]
  inside = lambda p, n: (p >= first(p, n)) & (p < first(p, n) + 5)
  mask = inside(y, 9) & inside(x, 10)
  dy, dx = (np.clip(a - a[:, None] + 4, 0, 8) for a in (y, x))

  def full(q, k, v, bias):
    heads = lambda a: a.reshape(90, HEADS, 2)
    logits = jnp.einsum("qhd,khd->hqk", heads(q), heads(k)) / jnp.sqrt(2.0) + bias[:, dy, dx]
    out = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(jnp.where(mask, logits, -1e30)), heads(v))
    return jnp.vdot(out.reshape(q.shape), target)

  ours = lambda q, k, v, bias: jnp.vdot(neighborhood_attention(q, k, v, window=5, num_heads=HEADS, bias=bias), target)
  got, want = (jax.jit(jax.grad(f, (0, 1, 2, 3)))(q, k, v, bias) for f in (ours, full))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_keys_are_not_copied_for_every_window():
  image = jax.ShapeDtypeStruct((1, 64, 64, 32), "float32")
  call = jax.jit(lambda q, k, v: neighborhood_attention(q, k, v, window=11, num_heads=1))
  memory = call.lower(image, image, image).compile().memory_analysis()
  copies = 121 * 64 * 64 * 32 * 4
  assert memory.temp_size_in_bytes < copies / 3


def test_bfloat16():
  q, k, v = images(1, 8, 8, 4)
  low = attend(*(x.astype("bfloat16") for x in (q, k, v)), window=3, num_heads=HEADS)
  assert low.dtype == "bfloat16"
  np.testing.assert_allclose(low.astype("float32"), attend(q, k, v, window=3, num_heads=HEADS), atol=0.05)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"window": 4}, "window: got 4"),
    ({"window": 9}, "window: got 9"),
    ({"key": jnp.zeros((1, 8, 7, 4))}, "key: got shape"),
    ({"query": jnp.zeros((8, 8, 4))}, "query: got shape"),
    ({"bias": jnp.zeros((2, 3, 3))}, "bias: got shape"),
    ({"num_heads": 3}, "num_heads: got 3"),
  ],
)
def test_bad_arguments(change, message):
  q, k, v = images(1, 8, 8, 4)
  with pytest.raises(ValueError, match=message):
    neighborhood_attention(**{"query": q, "key": k, "value": v, "window": 3, "num_heads": HEADS, **change})
