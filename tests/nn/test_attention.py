import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.nn.attention import multi_head_attention

BATCH, QUERIES, KEYS, CHANNELS, HEADS = 2, 5, 7, 12, 3
attend = jax.jit(multi_head_attention, static_argnames="num_heads")


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


QUERY, KEY, VALUE = (
  normal(BATCH, QUERIES, CHANNELS),
  normal(BATCH, KEYS, CHANNELS),
  normal(BATCH, KEYS, CHANNELS, seed=1),
)


def by_loops(bias=0.0, mask=True):
  """One head and one query at a time, in float64."""
  query, key, value = (np.asarray(x, np.float64) for x in (QUERY, KEY, VALUE))
  bias, mask = (np.broadcast_to(x, (BATCH, HEADS, QUERIES, KEYS)) for x in (bias, mask))
  out, size = np.zeros(query.shape), CHANNELS // HEADS
  for b, h, n in np.ndindex(BATCH, HEADS, QUERIES):
    own = slice(h * size, (h + 1) * size)
    weights = np.exp(key[b, :, own] @ query[b, n, own] / np.sqrt(size) + bias[b, h, n]) * mask[b, h, n]
    out[b, n, own] = weights @ value[b, :, own] / weights.sum()
  return out


def test_equals_loops_over_heads_and_queries():
  np.testing.assert_allclose(attend(QUERY, KEY, VALUE, num_heads=HEADS), by_loops(), atol=1e-6)


def test_bias_and_mask_act_on_the_logits_of_their_head():
  bias = normal(1, HEADS, QUERIES, KEYS, seed=2)
  mask = np.random.default_rng(3).random((BATCH, 1, QUERIES, KEYS)) < 0.6
  mask[..., 0] = True
  out = attend(QUERY, KEY, VALUE, num_heads=HEADS, bias=bias, mask=jnp.asarray(mask))
  np.testing.assert_allclose(out, by_loops(bias, mask), atol=1e-6)


def test_hidden_keys_change_nothing():
  mask = jnp.arange(KEYS)[None, None, None] < 4
  other = [x.at[:, 4:].add(100.0) for x in (KEY, VALUE)]
  a, b = (attend(QUERY, *pair, num_heads=HEADS, mask=mask) for pair in ((KEY, VALUE), other))
  np.testing.assert_array_equal(a, b)


def test_softmax_is_float32_in_bfloat16():
  # With 4096 equal keys a bfloat16 sum of weights would stop growing at 256.
  query, key = jnp.zeros((1, 1, 4), "bfloat16"), jnp.zeros((1, 4096, 4), "bfloat16")
  out = attend(query, key, jnp.ones((1, 4096, 4), "bfloat16"), num_heads=1)
  assert out.dtype == "bfloat16"
  np.testing.assert_allclose(out.astype("float32"), 1, rtol=1e-2)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"query": QUERY[0]}, "query: got shape"),
    ({"key": KEY[:1]}, "key: got shape"),
    ({"key": KEY[..., :8]}, "key: got shape"),
    ({"value": VALUE[:, :3]}, "value: got shape"),
    ({"num_heads": 5}, "num_heads: got 5"),
    ({"num_heads": 0}, "num_heads: got 0"),
  ],
)
def test_bad_arguments(change, message):
  with pytest.raises(ValueError, match=message):
    multi_head_attention(**{"query": QUERY, "key": KEY, "value": VALUE, "num_heads": HEADS, **change})
