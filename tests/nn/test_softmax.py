import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxlab import kernels
from jaxlab.nn import softmax


@pytest.fixture(autouse=True)
def rows_of_any_length(monkeypatch):
  monkeypatch.setattr(softmax, "_LONG", 1)


def logits(*shape, scale=1.0):
  return jnp.asarray(scale * np.random.default_rng(0).standard_normal(shape), "float32")


@pytest.mark.parametrize("shape", [(3,), (1, 1), (2, 5, 49), (300, 257)])
@pytest.mark.parametrize("host", [True, False])
def test_values_and_gradients(shape, host):
  x, g = logits(*shape, scale=5.0), logits(*shape)[::-1]
  run = jax.jit(lambda x, g: (softmax.softmax(x), jax.vjp(softmax.softmax, x)[1](g)[0]))
  if host:
    p, dx = run(x, g)
  else:
    with kernels.disabled():
      p, dx = run(x, g)
  wide, slope = np.asarray(x, "float64"), np.asarray(g, "float64")
  expected = scipy.special.softmax(wide, -1)
  np.testing.assert_allclose(p, expected, rtol=3e-6)
  np.testing.assert_allclose(dx, expected * (slope - (expected * slope).sum(-1, keepdims=True)), atol=1e-6)


def test_logits_of_any_size():
  x = logits(4, 100, scale=1e4)
  np.testing.assert_allclose(
    jax.jit(softmax.softmax)(x), scipy.special.softmax(np.asarray(x, "float64"), -1), atol=1e-7
  )


def test_what_is_no_number_is_not_hidden():
  inf, nan = np.inf, np.float32(np.nan)
  rows = [[inf, 0, 1], [-inf, 0, 1], [nan, 0, 1], [-nan, 0, 1], [-inf, -inf, -inf], [0, -inf, -inf], [nan, -inf, -inf]]
  got = jax.jit(softmax.softmax)(jnp.array(rows, "float32"))
  np.testing.assert_allclose(got, jax.nn.softmax(jnp.array(rows, "float32")), atol=1e-7)  # NaN in the same places
  np.testing.assert_array_equal(jnp.isnan(got).all(-1), [True, False, True, True, True, False, True])


def test_second_derivatives_and_batches():
  x = logits(3, 4, 6)
  penalty = lambda f: lambda x: (jax.grad(lambda x: (f(x) ** 3).sum())(x) ** 2).sum()
  got = jax.vmap(jax.grad(penalty(softmax.softmax)))(x)
  np.testing.assert_allclose(got, jax.vmap(jax.grad(penalty(jax.nn.softmax)))(x), atol=1e-6)
  pull = lambda f: jax.vmap(lambda x, g: jax.vjp(f, x)[1](g)[0], (0, None))  # one array of a new axis, one without
  np.testing.assert_allclose(pull(softmax.softmax)(x, x[0]), pull(jax.nn.softmax)(x, x[0]), atol=1e-6)


def test_a_batch_is_one_call():
  program = str(jax.make_jaxpr(jax.vmap(jax.vmap(softmax.softmax)))(logits(5, 4, 3, 6)))
  assert program.count("ffi_call[") == 1 and "while" not in program and "scan" not in program


def test_other_dtypes_and_short_rows_are_left_to_jax(monkeypatch):
  x = logits(2, 5).astype("bfloat16")
  np.testing.assert_array_equal(softmax.softmax(x), jax.nn.softmax(x))
  calls = lambda: "ffi_call" in str(jax.make_jaxpr(lambda x: softmax.softmax(x))(logits(2, 5)))
  assert calls()
  monkeypatch.setattr(softmax, "_LONG", 6)
  assert not calls()
