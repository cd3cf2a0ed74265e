import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import kernels
from jaxlab.nn.layer_norm import LayerNorm, layer_norm


def given(rows, channels, dtype="float32"):
  rng = np.random.default_rng(0)
  x = jnp.asarray(5 + 3 * rng.standard_normal((*rows, channels)), dtype)
  return x, jnp.asarray(rng.standard_normal(channels), "float32"), jnp.asarray(rng.standard_normal(channels), "float32")


def float64(x, scale, bias, g):
  """Output and gradients, by the definition."""
  x, scale, bias, g = (np.asarray(a, "float64").reshape(-1, x.shape[-1]) for a in (x, scale, bias, g))
  std = np.sqrt(x.var(1, keepdims=True) + 1e-5)
  hat = (x - x.mean(1, keepdims=True)) / std
  gs = g * scale
  dx = (gs - gs.mean(1, keepdims=True) - hat * (gs * hat).mean(1, keepdims=True)) / std
  return hat * scale + bias, dx, (g * hat).sum(0), g.sum(0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "channels"), [((1,), 1), ((2, 3), 7), ((5, 7), 64), ((40,), 129)], ids=str)
@pytest.mark.parametrize("host", [True, False])
def test_value_and_gradients_against_float64(rows, channels, dtype, host):
  x, scale, bias = given(rows, channels, dtype)
  g = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), dtype)

  @jax.jit
  def run(x, scale, bias, g):
    y, back = jax.vjp(layer_norm, x, scale, bias)
    return y, *back(g)

  if host:
    got = run(x, scale, bias, g)
  else:
    with kernels.disabled():
      got = run(x, scale, bias, g)
  assert got[0].dtype == got[1].dtype == dtype and got[2].dtype == got[3].dtype == jnp.float32
  for a, b in zip(got, float64(x, scale, bias, g), strict=True):
    a = np.asarray(a, "float64").reshape(b.shape)
    narrow = 2**-8 * np.abs(b) if a.shape[0] == b.shape[0] and dtype == "bfloat16" else 0
    assert (np.abs(a - b) <= narrow + 2e-5 * max(1, np.abs(b).max())).all()


@pytest.mark.parametrize(("source", "result"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_result_of_another_dtype(source, result):
  x, scale, bias = given((6,), 20, source)
  y, back = jax.vjp(lambda *a: layer_norm(*a, dtype=result), x, scale, bias)
  g = jnp.ones((6, 20), result)
  expected = float64(x, scale, bias, g)
  assert y.dtype == result
  np.testing.assert_allclose(np.asarray(y, "float64"), expected[0], atol=0.05 if result == "bfloat16" else 1e-5)
  dx = back(g)[0]
  assert dx.dtype == source
  np.testing.assert_allclose(np.asarray(dx, "float64"), expected[1], atol=0.02 if source == "bfloat16" else 1e-5)


def test_a_large_mean_costs_no_precision():
  """The mean of squares less the square of the mean would be all rounding here."""
  rng = np.random.default_rng(0)
  x = (1e4 + rng.standard_normal((4, 64))).astype("float32")
  ones, zeros = jnp.ones(64), jnp.zeros(64)
  got = jax.jit(layer_norm)(x, ones, zeros)
  np.testing.assert_allclose(got, float64(x, ones, zeros, x)[0], atol=2e-3)


def test_module_is_that_of_flax():
  x = given((3, 5), 12)[0]
  ours, theirs = LayerNorm(1e-6), nn.LayerNorm(1e-6)
  variables = theirs.init(jax.random.key(0), x)
  chex.assert_trees_all_equal(ours.init(jax.random.key(0), x), variables)
  loss = lambda layer: jax.jit(jax.value_and_grad(lambda v: (layer.apply(v, x) ** 3).mean()))
  chex.assert_trees_all_close(loss(ours)(variables), loss(theirs)(variables), rtol=1e-4, atol=1e-6)
  assert LayerNorm(dtype="bfloat16").apply(variables, x).dtype == jnp.bfloat16


def test_second_derivatives_are_those_of_xla():
  x, scale, bias = given((7,), 9)

  def penalty(x, scale, bias):
    loss = lambda *a: (layer_norm(*a) ** 3).sum()
    return sum((g**2).sum() for g in jax.grad(loss, (0, 1, 2))(x, scale, bias))

  got = jax.jit(jax.grad(penalty, (0, 1, 2)))(x, scale, bias)
  with kernels.disabled():
    expected = jax.jit(jax.grad(lambda *a: penalty(*a), (0, 1, 2)))(x, scale, bias)
  chex.assert_trees_all_close(got, expected, rtol=1e-3, atol=1e-3)


def test_batches_of_calls_equal_single_calls():
  x, scale, bias = given((3, 5), 8)
  gradient = jax.jit(jax.grad(lambda x: (layer_norm(x, scale, bias) ** 3).sum()))
  chex.assert_trees_all_close(jax.jit(jax.vmap(gradient))(x), jnp.stack([gradient(row) for row in x]), rtol=1e-5)


def test_what_does_not_fit_is_refused():
  x, scale, bias = given((3,), 8)
  with pytest.raises(ValueError, match=r"scale: got shape \(7,\), expected \(8,\)"):
    layer_norm(x, scale[:7], bias)
  with pytest.raises(ValueError, match=r"bias: got shape \(7,\)"):
    layer_norm(x, scale, bias[:7])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(bad, dtype):
  x, scale, bias = given((4,), 20, dtype)
  y, back = jax.vjp(jax.jit(layer_norm), x.at[2, 3].set(bad), scale, bias)
  np.testing.assert_array_equal(jnp.isnan(y).any(1), np.arange(4) == 2)
  assert jnp.isnan(back(jnp.ones_like(y))[0][2]).any()
