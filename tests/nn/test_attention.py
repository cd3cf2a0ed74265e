import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import kernels
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


def tokens(batch, queries, keys, channels, dtype="float32"):
  shapes = [(batch, n, channels) for n in (queries, keys, keys, queries)]
  return [normal(*shape, seed=i).astype(dtype) for i, shape in enumerate(shapes)]


def value_and_gradients(heads):
  @jax.jit
  def run(query, key, value, g):
    out, back = jax.vjp(lambda *x: multi_head_attention(*x, num_heads=heads), query, key, value)
    return out, *back(g)

  return run


# Below and above tiles, vectors and blocks of queries; an odd width of heads; few heads, cut into parts; many.
@pytest.mark.parametrize(
  ("batch", "queries", "keys", "channels", "heads"),
  [(1, 1, 1, 1, 1), (2, 5, 7, 12, 3), (1, 70, 33, 35, 5), (1, 130, 67, 32, 2), (3, 9, 65, 100, 4)],
)
def test_host_kernel_against_xla_in_float64(batch, queries, keys, channels, heads, dtype):
  given = tokens(batch, queries, keys, channels, dtype)
  got = value_and_gradients(heads)(*given)
  with jax.enable_x64(True):
    expected = value_and_gradients(heads)(*(jnp.asarray(np.asarray(x, "float64")) for x in given))
  for a, b in zip(got, expected, strict=True):
    assert a.dtype == dtype
    # In bfloat16 queries, weights and their gradients are rounded once each.
    tolerance = 3e-6 if dtype == "float32" else 2**-6
    np.testing.assert_allclose(np.asarray(a, "float64"), b, atol=tolerance * max(1, np.abs(b).max()), rtol=0)


def test_bias_and_its_gradient_in_bfloat16():
  given = *tokens(2, 9, 13, 12, "bfloat16"), normal(1, 3, 9, 13, seed=7)

  def run(query, key, value, g, bias):
    out, back = jax.vjp(lambda *x: multi_head_attention(*x[:3], num_heads=3, bias=x[3]), query, key, value, bias)
    return out, *back(g)

  got = jax.jit(run)(*given)
  expected = jax.jit(run)(*(x.astype("float32") for x in given))
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a.astype("float32"), b, atol=2**-6 * max(1, float(jnp.abs(b).max())), rtol=0)


def test_logits_of_any_size():
  """Weights are exp of differences to the largest logit: large ones do not overflow, far ones vanish."""
  query, key, value, g = tokens(1, 6, 40, 8)
  given = 300 * query, key, value, g
  got = value_and_gradients(1)(*given)
  with kernels.disabled():
    expected = value_and_gradients(1)(*given)
  for a, b in zip(got, expected, strict=True):  # logits of 1000 have an error of 6e-5, which is that of weights
    np.testing.assert_allclose(a, b, atol=1e-4 * float(abs(b).max()) + 1e-6, rtol=0)
  one = jax.nn.one_hot(3, 40)[None, :, None] * 1e4
  np.testing.assert_allclose(attend(jnp.ones((1, 6, 8)), one * jnp.ones(8), value, num_heads=1)[0, 0], value[0, 3])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(bad, dtype):
  query, key, value, _ = tokens(1, 5, 40, 8, dtype)
  out = attend(query.at[0, 2, 0].set(bad), key, value, num_heads=2)
  np.testing.assert_array_equal(jnp.isnan(out[0]).any(-1), np.arange(5) == 2)
  # A logit of -infinity is one that no query attends to.
  hears = np.asarray(query[0, :, 0] > 0) | np.isnan(bad)
  assert hears.sum() > 0
  broken = attend(query, key.at[0, 1, 0].set(bad), value, num_heads=2)
  np.testing.assert_array_equal(jnp.isnan(broken[0, :, 0]), hears)
  assert not jnp.isfinite(attend(query, key, value.at[0, 3, 0].set(bad), num_heads=2)[0, :, 0]).any()


def test_second_derivatives_are_those_of_xla():
  def penalty(*given):
    loss = lambda *x: (multi_head_attention(*x, num_heads=2) ** 3).sum()
    return sum((g**2).sum() for g in jax.grad(loss, (0, 1, 2))(*given))

  given = tokens(2, 5, 6, 8)[:3]
  got = jax.jit(jax.grad(penalty, (0, 1, 2)))(*given)
  with kernels.disabled():
    expected = jax.jit(jax.grad(lambda *x: penalty(*x), (0, 1, 2)))(*given)
  chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-4)


def test_weights_of_all_queries_are_never_formed():
  """A thousandth of the 268 MB that weights [1, 2, 4096, 8192] would take, beside arguments and results."""
  shapes = [jax.ShapeDtypeStruct((1, n, 8), jnp.float32) for n in (4096, 8192, 8192, 4096)]
  compiled = value_and_gradients(2).lower(*shapes).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 8192 * 8 / 1000


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
