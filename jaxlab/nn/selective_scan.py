"""Selective scan: the linear recurrence with input-dependent coefficients at the heart of Mamba.

    h_t = exp(delta_t A) h_{t-1} + w_t u_t B_t,    y_t = C_t . h_t + D u_t        for every channel, h of N states

with w = delta (Mamba) or (exp(delta A) - 1) / A (zero-order hold). A is [C, N], delta and u have a value a channel, B_t
and C_t are shared by the channels of a group: one group is Mamba's mixer, and a scan of an image in four directions has
one group for each. Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752,
equations 1 to 4; names and defaults are those of their `selective_scan_fn`, channels come last.

Packed sequences: `starts` marks the first token of each segment, across which no state is carried, in either direction.

Memory is linear in L. No form stores [L, C, N]: both keep the state of every `CHUNK`-th step and compute those between
again for the gradient. On CPU the scan is a host kernel (`jaxlab.nn._selective_scan`), elsewhere a `lax.scan` over
chunks with an associative scan in each. The recurrence is computed in float32; gradients are first order and in reverse
mode on CPU.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlab import kernels
from jaxlab.nn import _selective_scan as host

CHUNK = 64  # steps of a chunk of the form for other backends

Discretization = Literal["mamba", "zoh"]


def selective_scan(
  u: Float[Array, "*b l c"],
  delta: Float[Array, "*b l c"],
  A: Float[Array, "c n"],
  B: Float[Array, "*b l n"] | Float[Array, "*b l g n"],
  C: Float[Array, "*b l n"] | Float[Array, "*b l g n"],
  D: Float[Array, " c"] | None = None,
  *,
  z: Float[Array, "*b l c"] | None = None,
  delta_bias: Float[Array, " c"] | None = None,
  delta_softplus: bool = False,
  starts: Bool[Array, "*b l"] | None = None,
  reverse: bool = False,
  discretization: Discretization = "mamba",
) -> Float[Array, "*b l c"]:
  """The scan over axis L.

  Args:
    u: inputs.
    delta: step sizes, positive after bias and softplus.
    A: negative for a state that decays; not 0 for zero-order hold.
    B: input weights, an axis of G groups if it has one axis more than `u`; channel c is in group c // (C / G).
    C: output weights, likewise.
    D: weight of the skip; None for none.
    z: gate; the result is multiplied by silu(z). None for none.
    delta_bias: added to `delta` first.
    delta_softplus: whether softplus is applied to `delta`.
    starts: True at the first token of each segment; None for one segment a sequence.
    reverse: scan from each segment's last token to its first; the outputs stay at their tokens.
    discretization: w as above.

  Returns:
    Outputs, in the dtype of `u`.

  Raises:
    ValueError: shapes that do not fit together, or an unknown discretization.
  """
  if discretization not in ("mamba", "zoh"):
    raise ValueError(f"discretization: got {discretization!r}, expected 'mamba' or 'zoh'")
  *batch, length, channels = _shapes(u, delta, A, B, C, D, z, delta_bias, starts)
  if u.size == 0:
    return u
  groups = B.shape[-2] if B.ndim > u.ndim else 1
  dtype, wide = u.dtype, jnp.promote_types(u.dtype, jnp.float32)
  u, delta, A, B, C = (a.astype(wide) for a in (u, delta, A, B, C))
  delta = delta if delta_bias is None else delta + delta_bias.astype(wide)
  delta = jax.nn.softplus(delta) if delta_softplus else delta
  resets = jnp.zeros((*batch, length), bool) if starts is None else starts
  if reverse:  # the step before a start, in the order of the array, is the first of its segment that is taken
    resets = jnp.concatenate([resets[..., 1:], jnp.ones_like(resets[..., :1])], -1)
  total = math.prod(batch)
  u_, delta_ = (a.reshape(total, length, channels) for a in (u, delta))
  B, C = (a.reshape(total, length, groups, A.shape[1]) for a in (B, C))
  form = _host_scan if _use_host(u) else chunked_scan
  y = form(discretization == "zoh", reverse, u_, delta_, A, B, C, resets.reshape(total, length)).reshape(u.shape)
  y = y if D is None else y + D.astype(wide) * u
  y = y if z is None else y * jax.nn.silu(z.astype(wide))
  return y.astype(dtype)


def _use_host(u: Array) -> bool:
  """Whether to use host kernels, which compute in float32."""
  return u.dtype == jnp.float32 and kernels.available()


def _shapes(u, delta, A, B, C, D, z, delta_bias, starts):
  if u.ndim < 2:
    raise ValueError(f"u: got shape {u.shape}, expected [..., length, channels]")
  channels = u.shape[-1]
  if A.ndim != 2 or A.shape[0] != channels:
    raise ValueError(f"A: got shape {A.shape}, expected ({channels}, states)")
  groups = B.shape[u.ndim - 1] if B.ndim == u.ndim + 1 else 1
  if groups < 1 or channels % groups:
    raise ValueError(f"B: got {groups} groups, expected a divisor of {channels} channels")
  per_token = (*u.shape[:-1], *([groups] if B.ndim == u.ndim + 1 else []), A.shape[1])
  expected = {
    "delta": (delta, u.shape), "B": (B, per_token), "C": (C, per_token), "D": (D, (channels,)), "z": (z, u.shape),
    "delta_bias": (delta_bias, (channels,)), "starts": (starts, u.shape[:-1]),
  }  # fmt: skip
  for name, (array, shape) in expected.items():
    if array is not None and array.shape != shape:
      raise ValueError(f"{name}: got shape {array.shape}, expected {shape}")
  return u.shape


# --------------------------------------------------------------------------------- any backend: chunks in parallel form


def chunked_scan(
  zoh: bool,
  reverse: bool,
  u: Float[Array, "b l c"],
  delta: Float[Array, "b l c"],
  A: Float[Array, "c n"],
  B: Float[Array, "b l g n"],
  C: Float[Array, "b l g n"],
  resets: Bool[Array, "b l"],
) -> Float[Array, "b l c"]:
  """The recurrence in plain JAX: one associative scan of [CHUNK, b, c, n] at a time, carrying the last state on.

  `resets` marks steps that begin with h = 0. Other arguments as `selective_scan`.
  """
  batch, length, channels = u.shape
  groups, states = B.shape[2:]
  A = A.reshape(groups, -1, states)
  size = min(CHUNK, length)

  def split(a):  # [b, l, ...] -> [chunks, size, b, ...]; padding is at the end of the walk and changes no output
    a = jnp.flip(a, 1) if reverse else a
    a = jnp.pad(a, [(0, 0), (0, -length % size)] + [(0, 0)] * (a.ndim - 2))
    return jnp.moveaxis(a, 1, 0).reshape(-1, size, batch, *a.shape[2:])

  def combine(earlier, later):
    return earlier[0] * later[0], later[0] * earlier[1] + later[1]

  @jax.checkpoint
  def chunk(h, inputs):
    u, delta, B, C, resets = inputs
    u, delta = (a.reshape(size, batch, groups, -1, 1) for a in (u, delta))
    w = jnp.expm1(delta * A) / A if zoh else delta
    a = jnp.where(resets[..., None, None, None], 0, jnp.exp(delta * A))  # [size, b, g, c / g, n]
    decay, local = jax.lax.associative_scan(combine, (a, w * u * B[:, :, :, None]))
    h = decay * h + local
    return h[-1], jnp.einsum("tbgcn,tbgn->tbgc", h, C)

  h = jnp.zeros((batch, *A.shape), u.dtype)
  _, y = jax.lax.scan(chunk, h, tuple(map(split, (u, delta, B, C, resets))))
  y = jnp.moveaxis(y.reshape(-1, batch, channels)[:length], 0, 1)
  return jnp.flip(y, 1) if reverse else y


# ----------------------------------------------------------------------------------------------------- CPU: host kernel


def _host_scan(zoh, reverse, u, delta, A, B, C, resets):
  return _scan(zoh, reverse, u, delta, A[None], B, C, resets.astype("int32"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(zoh, reverse, *operands):
  """u, d [S, L, C], A [V, C, N], B, C [S, L, G, N], resets [S, L] -> y [S, L, C]; V divides S."""
  return _forward(zoh, reverse)(*operands)[0]


def _scan_forward(zoh, reverse, *operands):
  y, states = _forward(zoh, reverse)(*operands)
  return y, (operands, states)


def _scan_backward(zoh, reverse, saved, gy):
  operands, states = saved
  return *_backward(zoh, reverse)(*operands, states, gy), None


_scan.defvjp(_scan_forward, _scan_backward)


@functools.cache
def _forward(zoh, reverse):
  def call(u, d, A, B, C, resets):
    (batch, length, channels), (groups, order) = u.shape, B.shape[2:]
    blocks = groups * host.blocks(channels // groups)
    runs = min(batch // A.shape[0], 32)
    states = (batch, host.stored(length), blocks, order, host.LANES)
    results = [jax.ShapeDtypeStruct(shape, u.dtype) for shape in (u.shape, states)]
    items, operands = A.shape[0] * blocks * runs, (u, d, A, B, C, resets, jnp.zeros(runs, "int32"))
    return tuple(kernels.call(host.forward(zoh, reverse), results, *operands, items=items))

  return _batched(call)


@functools.cache
def _backward(zoh, reverse):
  def call(u, d, A, B, C, resets, states, gy):
    (batch, _, channels), groups, (axes, _, order) = u.shape, B.shape[2], A.shape
    runs, parts = host.shares(batch // axes, groups, channels // groups)
    shapes = u.shape, u.shape, (axes, runs, order, channels), (parts, *B.shape), (parts, *B.shape)
    results = [jax.ShapeDtypeStruct(shape, u.dtype) for shape in shapes]
    operands, items = (u, d, A, B, C, resets, states, gy), axes * groups * parts * runs
    gu, gd, gA, gB, gC = kernels.call(host.backward(zoh, reverse), results, *operands, items=items)
    return gu, gd, jnp.swapaxes(gA.sum(1), 1, 2), kernels.added(gB), kernels.added(gC)

  return _batched(call)


def _batched(call):
  """A call that `vmap` turns into one call of a larger batch, with an A for each element."""
  call = jax.custom_batching.custom_vmap(call)

  @call.def_vmap
  def _(size, batched, *operands):
    operands = (a if b else jnp.broadcast_to(a, (size, *a.shape)) for a, b in zip(operands, batched, strict=True))
    results = call(*(a.reshape(size * a.shape[1], *a.shape[2:]) for a in operands))
    return tuple(r.reshape(size, r.shape[0] // size, *r.shape[1:]) for r in results), (True,) * len(results)

  return call
