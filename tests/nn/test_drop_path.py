import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.nn.drop_path import DropPath, linear_rates


def drop(rate, branch, *, train=True, seed=0):
  return np.asarray(DropPath(rate).apply({}, branch, train=train, rngs={"dropout": jax.random.key(seed)}))


def test_drops_whole_samples_and_keeps_the_mean():
  branch = jnp.ones((4000, 2, 3))
  out = drop(0.3, branch)
  assert set(np.unique(out)) == {np.float32(0), np.float32(1 / 0.7)}
  np.testing.assert_array_equal(out, out[:, :1, :1] * np.ones((2, 3)))
  # Five standard errors of a mean of 4000 such samples.
  assert abs((out[:, 0, 0] > 0).mean() - 0.7) < 5 * np.sqrt(0.3 * 0.7 / 4000)


def test_does_nothing_in_evaluation_or_at_rate_zero():
  branch = jnp.arange(12.0).reshape(4, 3)
  np.testing.assert_array_equal(DropPath(0.5).apply({}, branch, train=False), branch)
  np.testing.assert_array_equal(DropPath(0.0).apply({}, branch, train=True), branch)  # and needs no key


def test_keys_decide():
  branch = jnp.ones((64, 1))
  assert np.array_equal(drop(0.5, branch), drop(0.5, branch))
  assert not np.array_equal(drop(0.5, branch), drop(0.5, branch, seed=1))


def test_linear_rates_grow_over_all_blocks():
  rates = linear_rates(0.3, (1, 2, 1))
  assert [len(stage) for stage in rates] == [1, 2, 1]
  np.testing.assert_allclose(sum(rates, []), [0, 0.1, 0.2, 0.3])
  assert linear_rates(0.3, ()) == []


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_bad_rates(rate):
  with pytest.raises(ValueError, match="rate: got"):
    drop(rate, jnp.ones((2, 2)))
  with pytest.raises(ValueError, match="rate: got"):
    linear_rates(rate, (1, 1))
