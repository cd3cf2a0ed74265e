import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.nn.product import dot_general


def normal(*shape, seed=0, dtype="bfloat16"):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def test_layer_in_bfloat16_sums_in_float32_both_ways():
  """Against float64 products of the same bfloat16 numbers; a bfloat16 sum of 3000 ones would stop at 256."""
  x, kernel, g = normal(2, 1500, 6), normal(6, 4, seed=1), normal(2, 1500, 4, seed=2)
  layer = nn.Dense(4, use_bias=False, dtype="bfloat16", dot_general=dot_general)

  @jax.jit
  def run(x, kernel, g):
    out, back = jax.vjp(lambda x, k: layer.apply({"params": {"kernel": k}}, x), x, kernel)
    return out, *back(g)

  wide = [np.asarray(a, "float64") for a in (x, kernel, g)]
  expected = (
    wide[0] @ wide[1],
    wide[2] @ wide[1].T,
    np.einsum("bnc,bno->co", wide[0], wide[2]),
  )
  for got, want in zip(run(x, kernel, g), expected, strict=True):
    assert got.dtype == jnp.bfloat16 and got.shape == want.shape
    assert np.abs(np.asarray(got, "float64") - want).max() < 2**-7 * np.abs(want).max()
  ones = jnp.ones((3000, 1), "bfloat16")
  assert float(jax.grad(lambda k: dot_general(ones, k, (((1,), (0,)), ((), ()))).sum())(ones[:1])[0, 0]) == 3008


def test_odd_widths_and_batches_of_calls():
  x, kernel = normal(3, 5, 7), normal(7, 2, seed=1)
  numbers = (((1,), (0,)), ((), ()))
  gradient = jax.grad(lambda k, x: dot_general(x, k, numbers).astype("float32").sum())
  got = jax.jit(jax.vmap(gradient, (None, 0)))(kernel, x)
  expected = np.broadcast_to(np.asarray(x, "float64").sum(1)[..., None], (3, 7, 2))
  np.testing.assert_allclose(np.asarray(got, "float64"), expected, atol=0.05)


def test_other_products_are_left_to_jax():
  numbers = (((1,), (0,)), ((), ()))
  x, kernel = normal(5, 6, dtype="float32"), normal(6, 2, dtype="float32")
  plain = jax.make_jaxpr(lambda x, k: dot_general(x, k, numbers))(x, kernel)
  assert "custom_vjp" not in str(plain)
  assert dot_general(*(a.astype("bfloat16") for a in (x, kernel)), numbers, None, jnp.float32).dtype == jnp.float32
