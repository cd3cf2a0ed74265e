"""Messages that depend on both ends of an edge, summed as they are made: no array of messages on CPU.

    y_i = sum over edges (j -> i) of w_ij phi(q_i + k_j)

For the activations phi named in `ACTIVATIONS` a host kernel reads each edge once and needs no memory for edges, neither
forward nor backward; the gradient is another pass over the same edges, in the order of senders. On other backends, and
in the tests, XLA's form gathers, activates and sums. What the kernels do not cover (edge features, other phi, maxima)
is made of `at_receivers` and `at_senders`, whose gradients are segment sums and never scatters.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numba
from jaxtyping import Array, Float
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from jaxlab import kernels
from jaxlab.graph import sparse

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "identity": lambda z: z,
  "relu": jax.nn.relu,
  "leaky_relu": functools.partial(jax.nn.leaky_relu, negative_slope=0.2),  # the slope that graph networks use
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


def at_receivers(op: sparse.Operator, x: Float[Array, "r f"]) -> Float[Array, "e f"]:
  """x[i] for every edge (j -> i), in the operator's order."""
  return _select(op, x, op.rows, _every(op), op.row_starts)


def at_senders(op: sparse.Operator, x: Float[Array, "c f"]) -> Float[Array, "e f"]:
  """x[j] for every edge (j -> i), in the operator's order."""
  return _select(op, x, op.columns, op.transpose_order, op.transpose_starts)


def _select(op, x, index, order, starts):
  # A matrix with a single one in each row, whose transposed order the operator knows: no sorting.
  edges = _every(op)
  matrix = sparse.Operator(edges, index, op.values, jnp.arange(len(edges) + 1, dtype="int32"), order, order, starts)
  return sparse.propagate(matrix, x, jnp.ones(len(edges), jnp.promote_types(x.dtype, "float32")))


def _every(op):
  return jnp.arange(op.rows.shape[0], dtype="int32")


def sum_of(
  op: sparse.Operator, q: Float[Array, "r f"], k: Float[Array, "c f"], activation: str, weights: Float[Array, " e"]
) -> Float[Array, "r f"]:
  """y_i = sum over edges (j -> i) of w_ij phi(q_i + k_j); 0 where there are no edges.

  Differentiable in q, k and the weights, in reverse mode, once.

  Args:
    op: which edges there are; its values are not used.
    q: of receivers.
    k: of senders.
    activation: phi, a key of `ACTIVATIONS`.
    weights: [E].

  Returns:
    In the dtype of q, computed in float32.

  Raises:
    ValueError: an unknown activation, or shapes that do not fit the operator.
  """
  if activation not in ACTIVATIONS:
    raise ValueError(f"activation: got {activation!r}, expected one of {sorted(ACTIVATIONS)}")
  rows, columns = op.shape
  for name, array, shape in (("q", q, (rows, *q.shape[1:])), ("k", k, (columns, *q.shape[1:]))):
    if array.ndim != 2 or array.shape != shape:
      raise ValueError(f"{name}: got shape {array.shape}, expected {shape} for an operator of shape {op.shape}")
  if weights.shape != op.rows.shape:
    raise ValueError(f"weights: got shape {weights.shape}, expected {op.rows.shape}, one for each edge")
  pattern = op.replace(values=None)  # type: ignore[attr-defined]
  wide = lambda a: a.astype("float32")
  return _sum(activation, pattern, wide(weights), wide(q), wide(k)).astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(activation, op, weights, q, k):
  if not kernels.available():
    return device(activation, op, weights, q, k)
  return _call(_forward(activation, False), [q], op.row_starts, op.columns, weights, q, k)[0]


def _sum_forward(activation, op, weights, q, k):
  if not kernels.available():
    return device(activation, op, weights, q, k), (op, weights, q, k, None)
  # The derivative's sum is as cheap as a by-product here as it is dear as a second pass over the edges.
  y, slopes = _call(_forward(activation, True), [q, q], op.row_starts, op.columns, weights, q, k)
  return y, (op, weights, q, k, slopes)


def _sum_backward(activation, saved, g):
  op, weights, q, k, slopes = saved
  if slopes is None:
    _, pull = jax.vjp(lambda w, q, k: device(activation, op, w, q, k), weights, q, k)
    return None, *pull(g)
  # dL/dk_j = sum_i w_ij g_i phi'(q_i + k_j), over the edges that leave j.
  of_k = _call(
    _backward(activation), [k], op.transpose_starts, op.transpose_rows, weights[op.transpose_order], k, q, g
  )[0]
  # The compiler drops this where nobody asks for it.
  of_weights = (g[op.rows] * ACTIVATIONS[activation](q[op.rows] + k[op.columns])).sum(-1)
  return None, of_weights, g * slopes, of_k


_sum.defvjp(_sum_forward, _sum_backward)


def device(activation, op, weights, q, k):
  """The XLA form of `sum_of`."""
  messages = weights[:, None] * ACTIVATIONS[activation](q[op.rows] + k[op.columns])
  return jax.ops.segment_sum(messages, op.rows, op.shape[0], indices_are_sorted=True)


# ------------------------------------------------------------------------------------------------------- host kernels

_ROWS = 64  # rows of the result an item makes


def _call(kernel, results, *operands):
  shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in results]
  return kernels.call(kernel, shapes, *operands, items=-(-shapes[0].shape[0] // _ROWS))


@functools.cache
def _forward(activation: str, with_slopes: bool) -> kernels.Kernel:
  """Kernel (starts [R + 1], columns [E], weights [E], q [R, F], k [C, F]) -> y [R, F], and the same with phi'."""
  kind = _KINDS.index(activation)  # numba keeps compiled kernels that close over numbers, not over functions

  @kernels.kernel(f"pairwise.forward.{activation}.{with_slopes}")
  def kernel(item, frame):
    starts, columns = kernels.operand(frame, 0, types.int32, 1), kernels.operand(frame, 1, types.int32, 1)
    weights, q = kernels.operand(frame, 2, types.float32, 1), kernels.operand(frame, 3, types.float32, 2)
    k, y = kernels.operand(frame, 4, types.float32, 2), kernels.result(frame, 0, types.float32, 2)
    slopes = kernels.result(frame, 1 if with_slopes else 0, types.float32, 2)
    width = types.uint64(y.shape[1])
    for r in range(item * _ROWS, min(item * _ROWS + _ROWS, y.shape[0])):
      q_r, y_r, s_r = q[r], y[r], slopes[r]
      for f in range(width):
        y_r[f] = types.float32(0)
        s_r[f] = types.float32(0)
      for e in range(starts[r], starts[r + 1]):
        k_e, w = k[columns[e]], weights[e]
        for f in range(width):
          value, slope = _phi(kind, q_r[f] + k_e[f])
          if with_slopes:
            s_r[f] += w * slope
          y_r[f] += w * value

  return kernel


@functools.cache
def _backward(activation: str) -> kernels.Kernel:
  """Kernel (starts [C + 1], rows [E], weights [E], k [C, F], q [R, F], g [R, F]) -> gradient of k [C, F]."""
  kind = _KINDS.index(activation)  # numba keeps compiled kernels that close over numbers, not over functions

  @kernels.kernel(f"pairwise.backward.{activation}")
  def kernel(item, frame):
    starts, rows = kernels.operand(frame, 0, types.int32, 1), kernels.operand(frame, 1, types.int32, 1)
    weights, k = kernels.operand(frame, 2, types.float32, 1), kernels.operand(frame, 3, types.float32, 2)
    q, g = kernels.operand(frame, 4, types.float32, 2), kernels.operand(frame, 5, types.float32, 2)
    out = kernels.result(frame, 0, types.float32, 2)
    width = types.uint64(out.shape[1])
    for c in range(item * _ROWS, min(item * _ROWS + _ROWS, out.shape[0])):
      k_c, out_c = k[c], out[c]
      for f in range(width):
        out_c[f] = types.float32(0)
      for e in range(starts[c], starts[c + 1]):
        q_e, g_e, w = q[rows[e]], g[rows[e]], weights[e]
        for f in range(width):
          out_c[f] += w * g_e[f] * _phi(kind, q_e[f] + k_c[f])[1]

  return kernel


# phi and its derivative, in forms that LLVM turns into vectors.

_KINDS = ("identity", "relu", "leaky_relu", "gelu")


@numba.njit
def _phi(kind, z):
  """Value and slope; `kind`, an index of `_KINDS`, is a constant of the kernel, so nothing branches."""
  zero, one = types.float32(0), types.float32(1)
  if kind == 0:
    return z, one
  if kind == 1:
    return (z if z > zero else zero), (one if z > zero else zero)
  if kind == 2:
    slope = one if z >= zero else types.float32(0.2)
    return z * slope, slope
  return _gelu(z)


@intrinsic
def _float_of_bits(typing_context, bits):
  def codegen(context, builder, signature, args):
    return builder.bitcast(args[0], ir.FloatType())

  return types.float32(types.int32), codegen


@intrinsic
def _nearest(typing_context, x):
  """The nearest whole number, as a float and as an int32."""

  def codegen(context, builder, signature, args):
    rint = builder.module.declare_intrinsic("llvm.rint", [ir.FloatType()])
    whole = builder.call(rint, args)
    return context.make_tuple(builder, signature.return_type, (whole, builder.fptosi(whole, ir.IntType(32))))

  return types.Tuple((types.float32, types.int32))(types.float32), codegen


@numba.njit
def _exp_negative(x):
  """exp(x) for x <= 0: 2^n exp(r) with |r| <= ln(2) / 2, by Taylor's series; 1e-7 relative, 0 below exp(-87)."""
  f32 = types.float32
  x = max(x, f32(-87.0))
  whole, n = _nearest(x * f32(1 / math.log(2)))
  r = x - whole * f32(math.log(2))
  series = f32(1 / 5040)
  for c in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
    series = series * r + f32(c)
  return series * _float_of_bits(types.int32((n + types.int32(127)) << types.int32(23)))


@numba.njit
def _gelu(z):
  """z Phi(z) and Phi(z) + z N(z); Phi by Abramowitz and Stegun 7.1.26, 7.5e-8 absolute."""
  f32 = types.float32
  t = f32(1) / (f32(1) + f32(0.3275911 / math.sqrt(2)) * abs(z))
  bell = _exp_negative(f32(-0.5) * z * z)
  tail = f32(1.061405429 / 2)
  for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
    tail = tail * t + f32(c / 2)
  tail = tail * t * bell  # Phi(-|z|)
  phi = f32(1) - tail if z > f32(0) else tail
  return z * phi, phi + z * f32(1 / math.sqrt(2 * math.pi)) * bell
