"""Products of bfloat16 arrays at the speed that the processor has for them.

XLA's CPU backend has native bfloat16 products for the form rows times columns with a float32 result. Every other form
(a bfloat16 result, which is what layers ask for; the sum over rows that the gradient of a kernel is) it computes by
widening both operands first, at half the speed. Here forward and both gradients take the native form. Hand it to a
layer, or take `Dense`, which has it.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16


def dot_general(
  lhs: Array, rhs: Array, dimension_numbers: Any, precision: Any = None, preferred_element_type: Any = None
) -> Array:
  """`jax.lax.dot_general`, faster where a dense layer calls it with bfloat16 arrays on CPU.

  There the sum is in float32 and then rounded to bfloat16, as elsewhere, but forward-mode differentiation is not
  available.

  Args:
    lhs: of the layer, [..., C].
    rhs: its kernel, [C, O].
    dimension_numbers: as in `jax.lax.dot_general`, as the rest.
    precision: of float32 products.
    preferred_element_type: of the result.
  """
  dense = rhs.ndim == 2 and dimension_numbers == (((lhs.ndim - 1,), (0,)), ((), ()))
  narrow = lhs.dtype == rhs.dtype == jnp.bfloat16 and preferred_element_type in (None, jnp.bfloat16)
  if not (dense and narrow and jax.default_backend() == "cpu"):
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type)
  return _product(lhs.reshape(-1, lhs.shape[-1]), rhs).reshape(*lhs.shape[:-1], rhs.shape[1])


@jax.custom_vjp
def _product(x: BFloat16[Array, "n c"], kernel: BFloat16[Array, "c o"]) -> BFloat16[Array, "n o"]:
  return _rows_times(x, kernel, 0)


def _forward(x, kernel):
  return _rows_times(x, kernel, 0), (x, kernel)


def _backward(saved, g):
  x, kernel = saved
  return _rows_times(g, kernel, 1), _rows_times(_transposed(x), g, 0)


_product.defvjp(_forward, _backward)


def _rows_times(rows, other, axis):
  """Sums over the last axis of `rows` and the given one of `other`."""
  numbers = (((1,), (axis,)), ((), ()))
  return jax.lax.dot_general(rows, other, numbers, preferred_element_type=jnp.float32).astype(rows.dtype)


def _transposed(x):
  """[N, C] -> [C, N], written out. XLA would fold a plain transposition into the product, which is then not native;
  it does not look across a loop."""
  rows, columns = x.shape
  if columns % 2:
    return x.T
  half = columns // 2

  def copy(i, out):
    part = jax.lax.dynamic_slice(x, (0, i * half), (rows, half))
    return jax.lax.dynamic_update_slice(out, part.T, (i * half, 0))

  return jax.lax.fori_loop(0, 2, copy, jnp.zeros((columns, rows), x.dtype))


Dense = functools.partial(nn.Dense, dot_general=dot_general)  # `flax.linen.Dense` with these products
