"""Dense layers at the speed that the processor has for them.

On GPU and TPU they are XLA's own products. XLA's CPU backend has native products for the form rows times columns with a
float32 result. Every other form it computes at half the speed or less: a bfloat16 result, which is what layers ask for,
and the product of a transposed matrix, which the gradient of the weights is. Here forward and the gradient of the
inputs take the native form, and the gradients of weights and bias are one host kernel (`jaxlab.nn._product`); in
bfloat16 on a processor that multiplies matrices, the kernel only turns the inputs, and XLA multiplies. All sums are in
float32. Gradients can be differentiated further; forward-mode differentiation is not available on CPU.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab import kernels
from jaxlab.nn import _product, _tiles

_FEW = 64  # rows below which the host kernel is not worth its call
_ROWS_OF_ONES = 8  # of a product that sums, whose form for a single row is slower
_MANY = 1 << 20  # weights from which on XLA's float32 product is as fast


def dense(
  x: Float[Array, "*rows c"], kernel: Float[Array, "c o"], bias: Float[Array, " o"] | None = None
) -> Float[Array, "*rows o"]:
  """x kernel + bias.

  Args:
    x: rows, of any floating dtype.
    kernel: of the dtype of `x`.
    bias: of the dtype of `x`, added to every row.

  Returns:
    In the dtype of `x`, accumulated in float32.

  Raises:
    ValueError: shapes that do not fit together.
  """
  if x.ndim < 1 or kernel.ndim != 2 or kernel.shape[0] != x.shape[-1]:
    raise ValueError(f"kernel: got shape {kernel.shape}, expected (inputs, outputs) for x of shape {x.shape}")
  if bias is not None and bias.shape != kernel.shape[1:]:
    raise ValueError(f"bias: got shape {bias.shape}, expected {kernel.shape[1:]}")
  if x.dtype == kernel.dtype and kernels.reads(x):
    bias = None if bias is None else bias.astype(x.dtype)
    return _dense(x.reshape(-1, x.shape[-1]), kernel, bias).reshape(*x.shape[:-1], kernel.shape[1])
  y = x @ kernel
  return y if bias is None else y + bias


@jax.custom_vjp
def _dense(x, kernel, bias):
  y = _rows_times(x, kernel, 0)
  return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)


def _forward(x, kernel, bias):
  """Keeps what the gradients that are asked for need: a kernel that is held fixed shall cost none of its own size."""
  y = _dense(x.value, kernel.value, None if bias is None else bias.value)
  wanted = kernel.perturbed or (bias is not None and bias.perturbed)
  return y, (x.value if wanted else None, kernel.value if x.perturbed else None, None if bias is None else ())


def _backward(saved, g):
  x, kernel, biased = saved
  if isinstance(g, jax.custom_derivatives.SymbolicZero):
    return None, None, None
  dx = None if kernel is None else _rows_times(g, kernel, 1).astype(g.dtype)
  dkernel, dbias = (None, None) if x is None else (d.astype(g.dtype) for d in _outer(x, g))
  return dx, dkernel, None if biased is None else dbias


_dense.defvjp(_forward, _backward, symbolic_zeros=True)


@jax.custom_vjp
def _outer(x, g):
  """x^T g and the sum of g's rows, in float32."""
  (rows, inputs), outputs = x.shape, g.shape[1]
  if rows < _FEW or (inputs * outputs >= _MANY and x.dtype != jnp.bfloat16):
    return _rows_times(x.T, g, 0), g.astype(jnp.float32).sum(0)
  weights, sums = _host_outer(x[None], g[None])
  return weights[0], sums[0]


@jax.custom_batching.custom_vmap
def _host_outer(x, g):
  """[S, N, C], [S, N, O] -> [S, C, O], [S, O]; one of x and g may have S = 1 for all of the other's."""
  count, (rows, inputs), outputs = max(len(x), len(g)), x.shape[1:], g.shape[2]
  if x.dtype == jnp.bfloat16 and _tiles.has_matrices():
    # XLA would take a float32 copy of g for a sum, and then make the product's bfloat16 numbers of it again.
    sums = _times(jnp.ones((len(g), _ROWS_OF_ONES, rows), g.dtype), g)[:, 0]
    turned, g, sums = (a if len(a) == count else jnp.repeat(a, count, 0) for a in (_turned(x), g, sums))
    return _times(turned, g), sums
  if not _tiles.has_pairs():
    x, g = x.astype(jnp.float32), g.astype(jnp.float32)
  plan, items = _product.plan(count, rows, inputs, outputs)
  shapes = (count, inputs, outputs), (count, outputs)
  results = [jax.ShapeDtypeStruct((int(plan[0]), *shape), jnp.float32) for shape in shapes]
  host = _product.outer(kernels.max_lanes(), x.dtype == jnp.bfloat16)
  return tuple(map(kernels.added, kernels.call(host, results, x, g, jnp.asarray(plan), items=items)))


def _turned(x):
  """Transposes [S, C, N] of [S, N, C], in bfloat16."""
  count, rows, columns = x.shape
  shape = jax.ShapeDtypeStruct((count, columns, rows), x.dtype)
  return kernels.call(_product.turned, [shape], x, items=_product.turned_items(count, columns))[0]


@_host_outer.def_vmap
def _(size, batched, x, g):
  results = _host_outer(*kernels.folded(size, batched, x, g))
  return tuple(a.reshape(size, -1, *a.shape[1:]) for a in results), (True, True)


def _outer_forward(x, g):
  return _outer(x, g), (x, g)


def _outer_backward(saved, cotangents):
  (x, g), (weights, sums) = saved, cotangents
  weights = weights.astype(x.dtype)
  return _rows_times(g, weights, 1).astype(x.dtype), (_rows_times(x, weights, 0) + sums).astype(g.dtype)


_outer.defvjp(_outer_forward, _outer_backward)


@jax.custom_vjp
def multiply(a: Float[Array, "s n c"], b: Float[Array, "s c o"]) -> Float[Array, "s n o"]:
  """The products of two rows of matrices of one dtype, in float32.

  Their gradients are products of that dtype too: JAX's own take the other factor in float32, at a multiple of the cost
  where the processor multiplies narrower numbers. Not for forward-mode differentiation.
  """
  return _times(a, b)


def _multiply_backward(saved, g):
  (a, b), g = saved, g.astype(saved[0].dtype)
  da = jax.lax.dot_general(g, b, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)
  if kernels.available() and a.dtype == jnp.bfloat16:
    db = _host_outer(a, g)[0]
  else:
    db = jax.lax.dot_general(a, g, (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
  return da.astype(a.dtype), db.astype(b.dtype)


multiply.defvjp(lambda a, b: (_times(a, b), (a, b)), _multiply_backward)


def _times(a, b):
  return jax.lax.dot_general(a, b, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _rows_times(rows, other, axis):
  """Sums over the last axis of `rows` and the given one of `other`, in float32."""
  return jax.lax.dot_general(rows, other, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


class Dense(nn.Module):
  """Dense layer; parameters `kernel` [C, features] and `bias` [features], as `flax.linen.Dense`.

  Attributes:
    features: outputs.
    use_bias: add a bias.
    dtype: compute dtype; None for that of inputs and parameters.
    param_dtype: dtype of the parameters.
    kernel_init: initialiser of the kernel.
    bias_init: initialiser of the bias.
  """

  features: int
  use_bias: bool = True
  dtype: jax.typing.DTypeLike | None = None
  param_dtype: jax.typing.DTypeLike = "float32"
  kernel_init: jax.nn.initializers.Initializer = nn.initializers.lecun_normal()
  bias_init: jax.nn.initializers.Initializer = nn.initializers.zeros

  @nn.compact
  def __call__(self, x: Float[Array, "*rows c"]) -> Float[Array, "*rows features"]:
    """Args: x, features last. Returns x kernel + bias, in `dtype`."""
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
    bias: Any = None
    if self.use_bias:
      bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
    return dense(*nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype))
