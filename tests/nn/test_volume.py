import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import kernels
from jaxlab.nn import _volume, volume


def plain(x, kernel, strides):
  """XLA's own convolution."""
  padding = [(k // 2, k // 2) for k in kernel.shape[:3]]
  return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))


# Odd sides, windows and channels; steps that do not divide, and steps beyond the window; several items a call.
@pytest.mark.parametrize(
  ("shape", "window", "out", "strides"),
  [
    ((2, 5, 6, 7, 3), (3, 3, 3), 5, (1, 1, 1)),
    ((2, 5, 6, 9, 3), (3, 3, 3), 16, (2, 3, 2)),
    ((1, 6, 5, 4, 20), (1, 3, 5), 48, (5, 1, 4)),
    ((2, 4, 10, 23, 136), (3, 3, 3), 32, (1, 1, 1)),
  ],
)
def test_convolution_and_its_gradients(shape, window, out, strides):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal(shape), "float32")
  kernel = jnp.asarray(rng.standard_normal((*window, shape[-1], out)), "float32")

  @jax.jit
  def both(x, kernel, g):
    results = []
    for function in (plain, lambda x, kernel, strides: volume.convolve(x, kernel, strides=strides)):
      y, vjp = jax.vjp(lambda x, kernel, f=function: f(x, kernel, strides), x, kernel)
      results.append((y, *vjp(g)))
    return results

  g = jnp.asarray(rng.standard_normal(jax.eval_shape(lambda: plain(x, kernel, strides)).shape), "float32")
  for expected, got in zip(*both(x, kernel, g), strict=True):
    np.testing.assert_allclose(got, expected, atol=2e-6 * float(jnp.abs(expected).max()) + 1e-6, rtol=1e-5)


def test_second_derivatives():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((1, 3, 4, 4, 2)), "float32")
  kernel = jnp.asarray(rng.standard_normal((3, 3, 3, 2, 8)), "float32")

  def penalty(function):
    def inner(x, kernel):
      gradients = jax.grad(lambda x, k: (function(x, k) ** 3).sum(), (0, 1))(x, kernel)
      return sum((g**2).sum() for g in gradients)

    return jax.jit(jax.grad(inner, (0, 1)))(x, kernel)

  ours = penalty(lambda x, k: volume.convolve(x, k, strides=(1, 2, 1)))
  for got, expected in zip(ours, penalty(lambda x, k: plain(x, k, (1, 2, 1))), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))


def test_bfloat16_accumulates_in_float32():
  x = jnp.full((1, 4, 4, 4, 64), 1.0, jnp.bfloat16)
  y = volume.convolve(x, jnp.full((3, 3, 3, 64, 8), 1.0, jnp.bfloat16), jnp.zeros(8, jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  assert float(y[0, 1, 1, 1, 0]) == 27 * 64 and float(y[0, 0, 0, 0, 0]) == 8 * 64


# An odd row and a stride; channels above and below those whose gradient is taken in float32; outputs beyond a vector.
@pytest.mark.parametrize(
  ("shape", "out", "strides"), [((1, 5, 6, 9, 6), 5, (1, 1, 1)), ((1, 7, 9, 9, 66), 40, (1, 1, 2))]
)
@pytest.mark.parametrize("dtype", ["widened", "pairs"], indirect=True)
def test_bfloat16_and_its_gradients(shape, out, strides, dtype):
  rng = np.random.default_rng(0)
  narrow = lambda *s: jnp.asarray(rng.standard_normal(s), dtype)
  x, kernel = narrow(*shape), narrow(3, 3, 3, shape[-1], out)
  y, vjp = jax.vjp(lambda x, kernel: volume.convolve(x, kernel, strides=strides), x, kernel)
  g = narrow(*y.shape)
  wide = lambda a: a.astype(jnp.float32)
  expected, wide_vjp = jax.vjp(lambda x, kernel: plain(x, kernel, strides), wide(x), wide(kernel))
  for a, b in zip((y, *vjp(g)), (expected, *wide_vjp(wide(g))), strict=True):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(wide(a), b, rtol=2**-8, atol=1e-5 * float(jnp.abs(b).max()))  # rounded once, at the end


def test_kernels_can_be_left_out():
  x, kernel = jnp.ones((1, 2, 2, 2, 1)), jnp.ones((3, 3, 3, 1, 8))
  text = lambda: jax.jit(lambda x: volume.convolve(x, kernel)).lower(x).as_text()
  with kernels.disabled():
    assert "stablehlo.convolution" in text()
  assert ("stablehlo.convolution" in text()) != kernels.available()


def test_items_cover_large_and_small_volumes():
  for shape, channels in (((1, 128, 128, 128, 64), 32), ((2, 4, 4, 4, 512), 512), ((1, 1, 1, 1, 1), 8)):
    plan, items = _volume.plan(shape, (3, 3, 3), shape[1:4], (1, 1, 1), None, chunks=channels // 8, sums=False)
    assert items == plan[-1] * plan[-2] and 1 <= plan[3] <= shape[1] and 1 <= plan[4] <= shape[2]
  assert _volume.plan((1, 32, 32, 32, 512), (3,) * 3, (32,) * 3, (1,) * 3, None, chunks=16, sums=True)[0][-1] == 1


def test_initial_weights_are_normal_draws():
  shape = (3, 3, 3, 8, 4)
  got = volume.fan_in_normal(2.0)(jax.random.key(0), shape)
  expected = jax.random.normal(jax.random.key(0), shape) * np.sqrt(2 / (27 * 8))
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_instance_norm():
  rng = np.random.default_rng(0)
  x = (3 + 2 * rng.standard_normal((2, 3, 4, 5, 6))).astype("float32")
  scale, bias = rng.standard_normal((2, 6)).astype("float32")
  layer = volume.InstanceNorm(negative_slope=0.1)
  variables = {"params": {"scale": scale, "bias": bias}}
  flat = x.reshape(2, 60, 1, 1, 6)
  y = (flat - flat.mean(1, keepdims=True)) / np.sqrt(flat.var(1, keepdims=True) + 1e-5) * scale + bias
  expected = np.where(y > 0, y, 0.1 * y).reshape(x.shape)
  np.testing.assert_allclose(layer.apply(variables, x), expected, atol=1e-5)
  g = rng.standard_normal(x.shape).astype("float32")

  def reference(variables, x):
    y = jax.nn.standardize(x, (1, 2, 3), epsilon=1e-5) * variables["params"]["scale"] + variables["params"]["bias"]
    return jax.nn.leaky_relu(y, 0.1)

  for function in (lambda v, x: layer.apply(v, x),):
    ours = jax.vjp(function, variables, jnp.asarray(x))[1](g)
    theirs = jax.vjp(reference, variables, jnp.asarray(x))[1](g)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, theirs)


@pytest.mark.parametrize(
  ("shape", "options", "argument"),
  [
    ((3, 3, 3, 5, 4), {}, "kernel"),
    ((3, 2, 3, 2, 4), {}, "kernel"),
    ((3, 3, 3, 2, 4), {"strides": (1, 1)}, "strides"),
    ((3, 3, 3, 2, 4), {"strides": (1, 0, 1)}, "strides"),
    ((3, 3, 3, 2, 4), {"bias": jnp.zeros(3)}, "bias"),
  ],
)
def test_bad_arguments(shape, options, argument):
  with pytest.raises(ValueError, match=f"{argument}: got"):
    volume.convolve(jnp.zeros((1, 2, 2, 2, 2)), jnp.zeros(shape), **options)
