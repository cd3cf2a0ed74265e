"""Mean over incoming edges with a learned gate for each feature, the aggregation of gated graph convolutions.

    gate_ij = p_i + q_j + e_ij        y_i = sum_{j -> i} sigmoid(gate_ij) m_j / (sum_{j -> i} sigmoid(gate_ij) + 1e-6)

On CPU it is a host kernel (`jaxlab.graph._gated`) that keeps nothing of the size of the edges unless gates are asked
for; elsewhere gathers and sorted segment sums. Gradients are first order and in reverse mode on CPU.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab import kernels
from jaxlab.graph import _gated, sparse


def gated_mean(
  operator: sparse.Operator,
  receiver: Float[Array, "r f"],
  sender: Float[Array, "c 2f"],
  edges: Float[Array, "e f"] | None = None,
  *,
  gates: bool = False,
) -> tuple[Float[Array, "r f"], Float[Array, "e f"] | None]:
  """The mean, in float32.

  Args:
    operator: whose pattern says which edges there are.
    receiver: p.
    sender: q and m, one after the other.
    edges: e; None for 0.
    gates: also return the gates before the sigmoid.

  Raises:
    ValueError: shapes that do not fit the operator.
  """
  rows, columns = operator.shape
  width = receiver.shape[-1]
  expected = {"receiver": (receiver, (rows, width)), "sender": (sender, (columns, 2 * width))}
  expected |= {} if edges is None else {"edges": (edges, (operator.rows.shape[0], width))}
  for name, (array, shape) in expected.items():
    if array.shape != shape:
      raise ValueError(f"{name}: got shape {array.shape}, expected {shape}")
  p, qm = receiver.astype("float32"), sender.astype("float32")
  e = jnp.zeros((0, width)) if edges is None else edges.astype("float32")
  pattern = operator.replace(values=None)  # type: ignore[attr-defined]
  form = _host_mean if kernels.available() else plain_mean
  mean, gate = form((edges is not None, gates), pattern, p, qm, e)
  return mean, gate if gates else None


def plain_mean(flags, pattern, p, qm, e):
  """In plain JAX: arrays of the size of the edges."""
  q, m = jnp.split(qm[pattern.columns], 2, axis=-1)
  gate = p[pattern.rows] + q + (e if flags[0] else 0)
  weight = jax.nn.sigmoid(gate)
  both = jnp.concatenate([weight * m, weight], -1)
  total = jax.ops.segment_sum(both, pattern.rows, pattern.shape[0], indices_are_sorted=True)
  above, below = jnp.split(total, 2, axis=-1)
  return above / (below + _gated.EPSILON), gate


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _host_mean(flags, pattern, p, qm, e):
  return _host_forward(flags, pattern, p, qm, e)[0]


def _host_forward(flags, pattern, p, qm, e):
  mean, total, gate = _forward(flags)(pattern.row_starts, pattern.columns, p[None], qm[None], e[None])
  return (mean[0], gate[0]), (pattern, p, qm, e, mean[0], total[0])


def _host_backward(flags, saved, cotangents):
  pattern, p, qm, e, mean, total = saved
  g, ggate = cotangents
  arrays = [x[None] for x in (p, qm, e, mean, g / total, ggate)]
  gp, ge = _backward_rows(flags)(pattern.row_starts, pattern.columns, *arrays)
  transposed = pattern.transpose_starts, pattern.transpose_rows, pattern.transpose_order
  gqm = _backward_columns(flags)(*transposed, *arrays)[0]
  return None, gp[0], gqm[0], ge[0]


_host_mean.defvjp(_host_forward, _host_backward)


def _shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


@functools.cache
def _forward(flags):
  def call(starts, columns, p, qm, e):
    batch, rows, width = p.shape
    results = [_shape(*p.shape), _shape(*p.shape), _shape(batch, columns.shape[0] if flags[1] else 0, width)]
    return kernels.call(
      _gated.forward(*flags), results, starts, columns, p, qm, e, items=_gated.items(batch, rows)
    )  # fmt: skip

  return _batched(call, 2)


@functools.cache
def _backward_rows(flags):
  def call(starts, columns, p, qm, e, mean, a, ggate):
    operands, items = (starts, columns, p, qm, e, mean, a, ggate), _gated.items(*p.shape[:2])
    return kernels.call(_gated.backward_rows(*flags), [_shape(*p.shape), _shape(*e.shape)], *operands, items=items)

  return _batched(call, 2)


@functools.cache
def _backward_columns(flags):
  def call(starts, rows, order, p, qm, e, mean, a, ggate):
    operands, items = (starts, rows, order, p, qm, e, mean, a, ggate), _gated.items(*qm.shape[:2])
    return kernels.call(_gated.backward_columns(*flags), [_shape(*qm.shape)], *operands, items=items)

  return _batched(call, 3)


def _batched(call, indices):
  """A call that `vmap` turns into one call of a larger batch where all elements share the first operands, the pattern,
  and into a loop where they do not."""
  call = jax.custom_batching.custom_vmap(call)

  @call.def_vmap
  def _(size, batched, *operands):
    if any(batched[:indices]):

      def one(i):
        return call(*(a[i] if b else a for a, b in zip(operands, batched, strict=True)))

      results = jax.lax.map(one, jnp.arange(size))
    else:
      wide = [
        a if b else jnp.broadcast_to(a, (size, *a.shape))
        for a, b in zip(operands[indices:], batched[indices:], strict=True)
      ]
      made = call(*operands[:indices], *(a.reshape(size * a.shape[1], *a.shape[2:]) for a in wide))
      results = [r.reshape(size, r.shape[0] // size, *r.shape[1:]) for r in made]
    return list(results), [True] * len(results)

  return call
