import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import kernels
from jaxlab.nn import product


def normal(*shape, seed=0, dtype="float32"):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def run(function, *arguments, g):
  """The result of a function and its gradients along g."""

  @jax.jit
  def both(arguments, g):
    out, back = jax.vjp(function, *arguments)
    return out, *back(g)

  return both(arguments, g)


# Rows and widths below, at and above the tiles, vectors and blocks of the kernel, and cut into several parts.
SHAPES = [(3, 5, 7), (64, 1, 1), (65, 16, 32), (400, 17, 33), (1500, 6, 4), (1029, 300, 290), (4000, 64, 64)]


@pytest.mark.parametrize("dtype", ["float32", "widened", "pairs", "matrices"], indirect=True)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_and_gradients_against_float64(shape, dtype):
  rows, inputs, outputs = shape
  x, kernel, bias = normal(rows, inputs, dtype=dtype), normal(inputs, outputs, seed=1, dtype=dtype), normal(outputs)
  g = normal(rows, outputs, seed=2, dtype=dtype)
  got = run(product.dense, x, kernel, bias.astype(dtype), g=g)
  wide = [np.asarray(a, "float64") for a in (x, kernel, bias.astype(dtype), g)]
  expected = wide[0] @ wide[1] + wide[2], wide[3] @ wide[1].T, wide[0].T @ wide[3], wide[3].sum(0)
  for a, b in zip(got, expected, strict=True):
    assert a.dtype == dtype and a.shape == b.shape
    # One rounding of the sum in bfloat16 (2^-8 of it), that of float32 sums of up to 4000 terms otherwise.
    tolerance = 2**-7 * np.abs(b) + 1e-3 if dtype == "bfloat16" else 1e-5 * np.abs(b).max()
    assert (np.abs(np.asarray(a, "float64") - b) <= tolerance).all()


@pytest.mark.parametrize("dtype", ["widened", "pairs", "matrices"], indirect=True)
def test_bfloat16_sums_in_float32(dtype):
  """A bfloat16 sum of 3000 ones would stop at 256."""
  ones = jnp.ones((3000, 2), dtype)
  weights, bias = jax.grad(lambda k, b: product.dense(ones, k, b).sum(), (0, 1))(ones[:2], ones[0])
  np.testing.assert_array_equal(np.asarray(weights, "float32"), 3008)
  np.testing.assert_array_equal(np.asarray(bias, "float32"), 3008)


@pytest.mark.parametrize(("kernel_axis", "x_axis"), [(None, 0), (0, None), (0, 0)])
def test_batches_of_calls_equal_single_calls(kernel_axis, x_axis):
  x, kernel = normal(3, 2, 70, 7), normal(3, 7, 2, seed=1)
  gradient = jax.grad(lambda k, x: (product.dense(x, k) ** 2).sum())
  given = kernel if kernel_axis == 0 else kernel[0], x[:, 0] if x_axis == 0 else x[0, 0]
  together = jax.jit(jax.vmap(gradient, (kernel_axis, x_axis)))(*given)
  single = [gradient(kernel[i if kernel_axis == 0 else 0], x[i if x_axis == 0 else 0, 0]) for i in range(3)]
  # Sums of about a hundred in another order: three roundings of float32 where they cancel.
  chex.assert_trees_all_close(together, jnp.stack(single), rtol=1e-5, atol=2e-5)
  nested = jax.vmap(jax.vmap(gradient, (None, 0)), (kernel_axis, x_axis))(given[0], x if x_axis == 0 else x[0])
  chex.assert_trees_all_close(nested[:, 0], together, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "widened", "pairs", "matrices"], indirect=True)
def test_rows_of_matrices_against_float64(dtype):
  a, b = normal(3, 40, 70, dtype=dtype), normal(3, 70, 35, seed=1, dtype=dtype)
  g = normal(3, 40, 35, seed=2).astype(dtype).astype("float32")
  got = run(product.multiply, a, b, g=g)
  a, b, g = (np.asarray(x, "float64") for x in (a, b, g))
  expected = a @ b, g @ b.swapaxes(1, 2), a.swapaxes(1, 2) @ g
  for x, y, kind in zip(got, expected, ("float32", dtype, dtype), strict=True):
    assert x.dtype == kind
    tolerance = 2**-8 * np.abs(y) + 1e-5 if kind == "bfloat16" else 1e-5 * np.abs(y).max()
    assert (np.abs(np.asarray(x, "float64") - y) <= tolerance).all()


def test_what_is_held_fixed_costs_no_gradient():
  x, kernel, bias = normal(70, 6), normal(6, 4, seed=1), normal(4, seed=2)
  loss = lambda *a: (product.dense(*a) ** 2).sum()
  products = lambda *argnums: str(jax.make_jaxpr(jax.grad(loss, argnums))(x, kernel, bias)).count("dot_general")
  calls = lambda *argnums: str(jax.make_jaxpr(jax.grad(loss, argnums))(x, kernel, bias)).count("ffi_call")
  assert products(0) == 2 and calls(0) == 0
  assert products(1) == products(2) == 1 and calls(1) > 0 and calls(2) > 0


@pytest.mark.parametrize("use_bias", [True, False])
def test_inside_loops_and_checkpoints(use_bias):
  layer, x = product.Dense(6, use_bias=use_bias), normal(70, 6)
  variables = layer.init(jax.random.key(0), x)

  def loss(variables, wrap):
    step = wrap(lambda x, _: (jnp.tanh(layer.apply(variables, x)), None))
    return (jax.lax.scan(step, x, None, 3)[0] ** 2).sum()

  def plainly(variables):
    y = x
    for _ in range(3):
      y = jnp.tanh(layer.apply(variables, y))
    return (y**2).sum()

  expected = jax.jit(jax.grad(plainly))(variables)
  for wrap in (lambda f: f, jax.checkpoint):
    got = jax.jit(lambda v, wrap=wrap: jax.grad(loss)(v, wrap))(variables)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


def test_second_derivatives_are_those_of_xla():
  x, kernel, bias = normal(70, 6), normal(6, 4, seed=1), normal(4, seed=2)

  def penalty(x, kernel, bias):
    loss = lambda x, k, b: (product.dense(x, k, b) ** 3).sum()
    return sum((g**2).sum() for g in jax.grad(loss, (0, 1, 2))(x, kernel, bias))

  got = jax.jit(jax.grad(penalty, (0, 1, 2)))(x, kernel, bias)
  with kernels.disabled():
    expected = jax.jit(jax.grad(lambda *a: penalty(*a), (0, 1, 2)))(x, kernel, bias)
  chex.assert_trees_all_close(got, expected, rtol=1e-4)


@pytest.mark.parametrize("use_bias", [True, False])
def test_module_is_flax_dense(use_bias):
  x = normal(2, 40, 12)
  ours, theirs = product.Dense(9, use_bias=use_bias), nn.Dense(9, use_bias=use_bias)
  variables = theirs.init(jax.random.key(0), x)
  chex.assert_trees_all_equal(ours.init(jax.random.key(0), x), variables)
  loss = lambda layer: jax.jit(jax.value_and_grad(lambda v: (layer.apply(v, x) ** 2).mean()))
  chex.assert_trees_all_close(loss(ours)(variables), loss(theirs)(variables), rtol=1e-5)
  assert product.Dense(9, use_bias=use_bias, dtype="bfloat16").apply(variables, x).dtype == jnp.bfloat16


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match=r"kernel: got shape \(4, 2\)"):
    product.dense(normal(5, 3), normal(4, 2))
  with pytest.raises(ValueError, match=r"bias: got shape \(3,\)"):
    product.dense(normal(5, 4), normal(4, 2), normal(3))
