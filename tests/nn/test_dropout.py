import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.nn import dropout
from jaxlab.nn.dropout import dropout as drop


@pytest.mark.parametrize("shape", [(301,), (40, 33), (2, 3, 5)])
def test_entries_are_drawn_independently(shape):
  keys = jax.random.split(jax.random.key(0), 4000)
  drawn = jax.jit(jax.vmap(lambda key: drop(key, jnp.ones(shape), 0.3)))(keys).reshape(4000, -1)
  assert set(np.unique(drawn.round(3))) == {0, np.float32(1.429)}
  np.testing.assert_allclose(drawn.mean(axis=0), 1, atol=5 * np.sqrt(0.3 / 0.7 / 4000))
  correlation = np.corrcoef(drawn[:, :30].T) - np.eye(drawn[:, :30].shape[1])
  assert np.abs(correlation).max() < 5 / np.sqrt(4000)
  same_block = drawn[:, :: -(-drawn.shape[1] // 4)]  # the four entries that share a Threefry block
  assert np.abs(np.corrcoef(same_block.T) - np.eye(4)).max() < 5 / np.sqrt(4000)


def test_rates():
  key, x = jax.random.key(0), jnp.ones((8, 8), "bfloat16")
  assert drop(key, x, 0.5).dtype == jnp.bfloat16
  np.testing.assert_array_equal(drop(key, x, 0.0), x)
  gradient = jax.grad(lambda x: jnp.sum(drop(key, x, 0.5)))(jnp.ones(64))
  np.testing.assert_array_equal(gradient, drop(key, jnp.ones(64), 0.5))
  for rate in (-0.1, 1.0):
    with pytest.raises(ValueError, match="^rate: got"):
      drop(key, x, rate)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 101, 4 * 4096 + 3, 8 * 4096 + 1])
def test_host_kernel_is_the_xla_form(n):
  words = jax.random.bits(jax.random.key(n), (2,), "uint32")
  x = jax.random.normal(jax.random.key(1), (n,)).at[0].set(jnp.inf)
  np.testing.assert_array_equal(dropout._drop(40000, False, words, x), dropout.device(40000, words, x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_relu_before(dtype):
  key, x = jax.random.key(0), jax.random.normal(jax.random.key(1), (5, 1007), dtype)
  special = jnp.array([jnp.nan, -jnp.nan, jnp.inf, -jnp.inf, -0.0], dtype)
  x = x.at[:, :200].set(jnp.tile(special, 40))

  def separate(x):
    return drop(key, jax.nn.relu(x), 0.4)

  y = drop(key, x, 0.4, relu=True)
  np.testing.assert_array_equal(y.astype("float32"), separate(x).astype("float32"))
  assert jnp.isnan(y).any() and jnp.isinf(y).any()
  finite = jnp.where(jnp.isfinite(x), x, 0)
  gradients = [
    jax.grad(lambda x, f=f: jnp.sum(f(x).astype("float32") ** 2))(finite)
    for f in (lambda x: drop(key, x, 0.4, relu=True), separate)
  ]
  np.testing.assert_array_equal(*gradients)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("key_axis", "x_axis"), [(0, 0), (0, None), (None, 0)])
def test_vmap_is_a_loop(key_axis, x_axis, relu):
  keys, x = jax.random.split(jax.random.key(0), 3), jax.random.normal(jax.random.key(1), (3, 7, 3))

  def both(key, x):
    one = lambda x: drop(key, x, 0.4, relu=relu)
    return one(x), jax.grad(lambda x: jnp.sum(one(x) ** 2))(x)

  given = (keys if key_axis == 0 else keys[0], x if x_axis == 0 else x[0])
  together = jax.vmap(both, (key_axis, x_axis))(*given)
  one_by_one = [both(keys[i if key_axis == 0 else 0], x[i if x_axis == 0 else 0]) for i in range(3)]
  for a, b in zip(together, zip(*one_by_one, strict=True), strict=True):
    np.testing.assert_array_equal(a, np.stack(b))
  nested = jax.vmap(jax.vmap(lambda key, x: drop(key, x, 0.4, relu=relu), (None, 0)), (0, None))(keys, x)
  np.testing.assert_array_equal(nested[1, 2], drop(keys[1], x[2], 0.4, relu=relu))
  nested = jax.vmap(jax.vmap(lambda key, x: drop(key, x, 0.4, relu=relu), (0, None)), (None, 0))(keys, x)
  np.testing.assert_array_equal(nested[1, 2], drop(keys[2], x[1], 0.4, relu=relu))
