import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxlab import kernels
from jaxlab.nn.gelu import gelu

# Every sign and size, and more values than an item of the kernel has.
VALUES = np.concatenate([[0, -0.0, 1e-30, -1e-30, 88, -88, 1e4, -1e4], np.linspace(-15, 15, 40_001)])


def definition(x):
  """Values and slopes, in float64."""
  below = scipy.special.ndtr(x)
  return x * below, below + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 0), ("bfloat16", 2**-8)])
def test_values_and_slopes(dtype, rounding, host):
  x = jnp.asarray(VALUES, dtype)
  run = jax.jit(lambda x: (gelu(x), jax.vjp(gelu, x)[1](jnp.ones_like(x))[0]))
  if host:
    got = run(x)
  else:
    with kernels.disabled():
      got = run(x)
  wide = np.asarray(x, "float64")
  for a, b, error in zip(got, definition(wide), (2e-7, 3e-7), strict=True):
    assert a.dtype == dtype
    assert (np.abs(np.asarray(a, "float64") - b) <= error * np.maximum(1, np.abs(wide)) + rounding * np.abs(b)).all()


def test_what_is_not_a_number_stays_so():
  got = jax.jit(gelu)(jnp.array([jnp.nan, jnp.inf, 1.0] * 40))  # in vectors, and in what is left of them
  assert jnp.isnan(got[::3]).all() and (got[1::3] == jnp.inf).all() and jnp.isfinite(got[2::3]).all()


def test_second_derivatives_and_batches():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)), "float32")
  curvature = jax.vmap(jax.vmap(jax.grad(jax.grad(gelu))))(x)
  wide = np.asarray(x, "float64")
  density = np.exp(-wide * wide / 2) / np.sqrt(2 * np.pi)
  np.testing.assert_allclose(curvature, (2 - wide * wide) * density, atol=2e-6)
