"""Host kernels of the selective scan: states stay in cache, vector lanes are channels, no tile grows with the length.

An item walks along one sequence with some of its channels. `forward` stores the state before every `CHUNK`-th step.
`backward` goes through the chunks from the last to the first: from the stored state it computes the chunk's states
again (`_recur`), then it follows the adjoint recurrence from the chunk's end to its start (`_adjoin`).

The equations, for a channel with u, d (delta) and one state with A, B, C, where w = d, or (a - 1) / A for zero-order
hold (zoh), and k = 0 where the step begins with h = 0 (`resets`), else 1:

    forward:   a = exp(d A)         h' = k a h + w u B      y = sum_n C h'
    adjoint:   m = l' + gy C        gC = gy h'              gB = m w u              gu = sum_n m w B
               l = k a m            gA = l h d              gd = sum_n l h A + m u B
               zoh:                 gA = l h d + m u B (d a - w) / A                gd = sum_n l h A + a m u B

The two inner loops are written with LLVM vectors: no compiler proves that a dozen tiles do not overlap.
"""

import functools
import math

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from jaxlab import kernels, lanes
from jaxlab.lanes import LANES

CHUNK = 32  # steps between stored states; the tiles of a chunk fit into the second-level cache


def blocks(channels: int) -> int:
  """Vectors that the channels of a group fill."""
  return -(-channels // LANES)


def stored(length: int) -> int:
  """States that `forward` keeps of a sequence: those before each chunk but the first, where the state is 0."""
  return -(-length // CHUNK) - 1


def shares(sequences: int, groups: int, channels: int) -> tuple[int, int]:
  """Work items of `backward` for each A and group: Q runs of sequences times P parts of the channels.

  Each part has gradients of B and C of its own, so sequences are shared out first, channels only where they are few.
  """
  runs = min(sequences, 32)
  return runs, min(blocks(channels), -(-16 // (runs * groups)))


def scratch_bytes(length: int, channels: int, states: int) -> int:
  """What an item of `backward` with so many channels allocates besides XLA's buffers: bounded, whatever the length."""
  return 4 * LANES * states * (4 * min(length, CHUNK) + 1 + 3 * blocks(channels))


@intrinsic(prefer_literal=True)
def _recur(typing, zoh, gradient, u, d, count, A, b, c, keep, h, new, out, order):
  """One step of the recurrence for a vector of `count` channels, from h to new [order, LANES].

  `out` receives y [count]; or if `gradient`, a (for zoh a - 1) [order, LANES]. Addresses, but for count, keep (0.0 or
  1.0) and order.
  """
  zoh_, gradient_ = zoh.literal_value, gradient.literal_value

  def codegen(context, builder, signature, args):
    u, d, count, A, b, c, keep, h, new, out, order = args[2:]
    v = lanes.Lanes(builder)
    mask = v.mask(count)
    u, d, keep = v.load_masked(u, mask), v.load_masked(d, mask), v.splat(keep)
    d2, du = v.mul(d, v.constant(1 / math.log(2))), v.mul(d, u)
    (y,) = v.registers([v.zero()])
    with cgutils.for_range(builder, order) as loop:
      at = lambda tile: v.at(tile, loop.index, v.bytes)
      value = v.load(at(A))
      a, less_one = v.exp2(v.mul(d2, value))
      wu = v.mul(builder.fdiv(less_one, value), u) if zoh_ else du
      state = v.multiply_add(v.mul(keep, a), v.load(at(h)), v.mul(wu, v.scalar(b, loop.index)))
      v.store(state, at(new))
      if gradient_:
        v.store(less_one if zoh_ else a, at(out))
      else:
        builder.store(v.multiply_add(v.scalar(c, loop.index), state, builder.load(y)), y)
    if not gradient_:
      v.store_masked(builder.load(y), out, mask)
    return context.get_dummy_value()

  word = types.int64
  return types.void(zoh, gradient, *[word] * 6, types.float32, *[word] * 4), codegen


@intrinsic(prefer_literal=True)
def _adjoin(typing, zoh, u, d, gy, count, A, b, c, keep, h, new, decay, adjoint, vB, vC, gA, gu, gd, order):
  """One step of the adjoint recurrence for a vector of `count` channels.

  Reads u, d, gy [count], A, h, new, decay [order, LANES], b, c [order]; changes adjoint, adds to vB, vC, gA
  [order, LANES], whose lanes are still to be summed for gB and gC; writes gu, gd [count].
  """
  zoh_ = zoh.literal_value

  def codegen(context, builder, signature, args):
    u, d, gy, count, A, b, c, keep, h, new, decay, adjoint, vB, vC, gA, gu, gd, order = args[1:]
    v = lanes.Lanes(builder)
    mul, fma = v.mul, v.multiply_add
    mask = v.mask(count)
    u, d, gy, keep = v.load_masked(u, mask), v.load_masked(d, mask), v.load_masked(gy, mask), v.splat(keep)
    du = mul(d, u)
    to_u, to_d = v.registers([v.zero()] * 2)
    with cgutils.for_range(builder, order) as loop:
      at = lambda tile: v.at(tile, loop.index, v.bytes)

      def accumulate(place, x, y):
        v.store(fma(x, y, v.load(place)), place)

      value, B, stored = v.load(at(A)), v.scalar(b, loop.index), v.load(at(decay))
      m = fma(gy, v.scalar(c, loop.index), v.load(at(adjoint)))
      a = builder.fadd(stored, v.constant(1.0)) if zoh_ else stored
      l = mul(keep, mul(a, m))  # noqa: E741
      v.store(l, at(adjoint))
      lh = mul(l, v.load(at(h)))
      accumulate(at(vC), gy, v.load(at(new)))
      accumulate(at(gA), lh, d)
      mB = mul(m, B)
      if zoh_:
        w = builder.fdiv(stored, value)
        accumulate(at(vB), m, mul(w, u))
        accumulate(at(gA), mul(mB, u), builder.fdiv(builder.fsub(mul(d, a), w), value))
        builder.store(fma(w, mB, builder.load(to_u)), to_u)
        builder.store(fma(mul(a, u), mB, fma(lh, value, builder.load(to_d))), to_d)
      else:
        accumulate(at(vB), m, du)
        builder.store(builder.fadd(mB, builder.load(to_u)), to_u)
        builder.store(fma(lh, value, builder.load(to_d)), to_d)
    if zoh_:
      v.store_masked(builder.load(to_u), gu, mask)
      v.store_masked(builder.load(to_d), gd, mask)
    else:
      v.store_masked(mul(d, builder.load(to_u)), gu, mask)
      v.store_masked(fma(u, builder.load(to_u), builder.load(to_d)), gd, mask)
    return context.get_dummy_value()

  word = types.int64
  return types.void(zoh, *[word] * 7, types.float32, *[word] * 10), codegen


@numba.njit(inline="always")
def _tiles(rows):
  """[rows, LANES] zeros."""
  return np.zeros((rows, LANES), np.float32)


@numba.njit(inline="always")
def _copy(tiles, target):
  """`target[...] = tiles`, which numba would compile for seconds, for the message of an error."""
  for n in range(tiles.shape[0]):
    for j in range(LANES):
      target[n, j] = tiles[n, j]


@numba.njit(inline="always")
def _load_A(tile, A, v, first, count):
  """tile[n, j] = A[v, first + j, n]; lanes without a channel get -1, which every formula bears."""
  for n in range(A.shape[2]):
    for j in range(LANES):
      tile[n, j] = A[v, first + j, n] if j < count else -1


# Addresses of tiles are taken where they are used: numba frees an array after the last mention of its name.
#
# Operands of both kernels: u, d [S, L, C], A [V, C, N], B, C [S, L, G, N], resets [S, L] int32. V divides S, and
# s uses A[s // (S / V)]. `reverse` takes the steps from the last to the first; `resets` keeps the array's order.


@functools.cache
def forward(zoh: bool, reverse: bool) -> kernels.Kernel:
  """Kernel (operands, an array [Q] for its length) -> y [S, L, C], states [S, stored, G * blocks, N, LANES].

  An item is a block of channels of the sequences s of one A in one of Q runs: V * G * blocks * Q items.
  """

  @kernels.kernel(f"selective_scan.forward.{zoh}.{reverse}")
  def kernel(item, frame):
    u, d = kernels.operand(frame, 0, types.float32, 3), kernels.operand(frame, 1, types.float32, 3)
    A, B = kernels.operand(frame, 2, types.float32, 3), kernels.operand(frame, 3, types.float32, 4)
    C, resets = kernels.operand(frame, 4, types.float32, 4), kernels.operand(frame, 5, types.int32, 2)
    y, states = kernels.result(frame, 0, types.float32, 3), kernels.result(frame, 1, types.float32, 5)
    runs = kernels.operand(frame, 6, types.int32, 1).shape[0]
    length, groups, order = u.shape[1], B.shape[2], B.shape[3]
    width, sequences = u.shape[2] // groups, u.shape[0] // A.shape[0]
    vectors = states.shape[2] // groups
    run, block, a = item % runs, item // runs % states.shape[2], item // runs // states.shape[2]
    g, first = block // vectors, block // vectors * width + block % vectors * LANES
    count = min(LANES, (g + 1) * width - first)
    tA, h = _tiles(order), _tiles(order)
    _load_A(tA, A, a, first, count)
    for s in range(a * sequences + sequences * run // runs, a * sequences + sequences * (run + 1) // runs):
      h[:] = 0
      for step in range(length):
        if step % CHUNK == 0 and step > 0:
          _copy(h, states[s, step // CHUNK - 1, block])
        t = length - 1 - step if reverse else step
        x, token = 4 * ((s * length + t) * u.shape[2] + first), 4 * order * ((s * length + t) * groups + g)
        _recur(
          zoh, False, u.ctypes.data + x, d.ctypes.data + x, count, tA.ctypes.data, B.ctypes.data + token,
          C.ctypes.data + token, np.float32(0) if resets[s, t] else np.float32(1), h.ctypes.data, h.ctypes.data,
          y.ctypes.data + x, order,
        )  # fmt: skip

  return kernel


@functools.cache
def backward(zoh: bool, reverse: bool) -> kernels.Kernel:
  """Kernel (operands, states, gy [S, L, C]) -> gu, gd [S, L, C], gA [V, Q, N, C], gB, gC [P, S, L, G, N].

  An item is a part of a group's channels of the sequences of one A in one of Q runs (`shares`): V * G * P * Q items.
  The gradients of B and C are sums over channels, that of A over sequences; an item makes its share of them.
  """

  @kernels.kernel(f"selective_scan.backward.{zoh}.{reverse}")
  def kernel(item, frame):
    u, d = kernels.operand(frame, 0, types.float32, 3), kernels.operand(frame, 1, types.float32, 3)
    A, B = kernels.operand(frame, 2, types.float32, 3), kernels.operand(frame, 3, types.float32, 4)
    C, resets = kernels.operand(frame, 4, types.float32, 4), kernels.operand(frame, 5, types.int32, 2)
    states, gy = kernels.operand(frame, 6, types.float32, 5), kernels.operand(frame, 7, types.float32, 3)
    gu, gd = kernels.result(frame, 0, types.float32, 3), kernels.result(frame, 1, types.float32, 3)
    gA, gB = kernels.result(frame, 2, types.float32, 4), kernels.result(frame, 3, types.float32, 5)
    gC = kernels.result(frame, 4, types.float32, 5)
    length, groups, order, runs, parts = u.shape[1], B.shape[2], B.shape[3], gA.shape[1], gB.shape[0]
    width, sequences = u.shape[2] // groups, u.shape[0] // A.shape[0]
    vectors = states.shape[2] // groups
    run, part, g = item % runs, item // runs % parts, item // runs // parts % groups
    a = item // runs // parts // groups
    low, high = vectors * part // parts, vectors * (part + 1) // parts
    size, tile = min(CHUNK, length), 4 * LANES * order
    h, decay = _tiles((size + 1) * order), _tiles(size * order)  # h before each step, and after the last
    vB, vC = _tiles(size * order), _tiles(size * order)
    tA, adjoint, tgA = _tiles((high - low) * order), _tiles((high - low) * order), _tiles((high - low) * order)
    for v in range(low, high):
      first = g * width + v * LANES
      own = tA[(v - low) * order : (v - low + 1) * order]
      _load_A(own, A, a, first, min(LANES, (g + 1) * width - first))
    for s in range(a * sequences + sequences * run // runs, a * sequences + sequences * (run + 1) // runs):
      adjoint[:] = 0
      for chunk in range((length - 1) // CHUNK, -1, -1):
        start = chunk * CHUNK
        steps = min(CHUNK, length - start)
        vB[:], vC[:] = 0, 0
        for v in range(low, high):
          first = g * width + v * LANES
          count, own = min(LANES, (g + 1) * width - first), tile * (v - low)
          if chunk > 0:
            _copy(states[s, chunk - 1, g * vectors + v], h)
          else:
            h[:order] = 0
          for k in range(steps):
            t = length - 1 - start - k if reverse else start + k
            x, token = 4 * ((s * length + t) * u.shape[2] + first), 4 * order * ((s * length + t) * groups + g)
            _recur(
              zoh, True, u.ctypes.data + x, d.ctypes.data + x, count, tA.ctypes.data + own, B.ctypes.data + token,
              C.ctypes.data + token, np.float32(0) if resets[s, t] else np.float32(1), h.ctypes.data + tile * k,
              h.ctypes.data + tile * (k + 1), decay.ctypes.data + tile * k, order,
            )  # fmt: skip
          for k in range(steps - 1, -1, -1):
            t = length - 1 - start - k if reverse else start + k
            x, token = 4 * ((s * length + t) * u.shape[2] + first), 4 * order * ((s * length + t) * groups + g)
            _adjoin(
              zoh, u.ctypes.data + x, d.ctypes.data + x, gy.ctypes.data + x, count, tA.ctypes.data + own,
              B.ctypes.data + token, C.ctypes.data + token, np.float32(0) if resets[s, t] else np.float32(1),
              h.ctypes.data + tile * k, h.ctypes.data + tile * (k + 1), decay.ctypes.data + tile * k,
              adjoint.ctypes.data + own, vB.ctypes.data + tile * k, vC.ctypes.data + tile * k, tgA.ctypes.data + own,
              gu.ctypes.data + x, gd.ctypes.data + x, order,
            )  # fmt: skip
        for k in range(steps):
          t = length - 1 - start - k if reverse else start + k
          for n in range(order):
            total_B, total_C = np.float32(0), np.float32(0)
            for j in range(LANES):
              total_B += vB[k * order + n, j]
              total_C += vC[k * order + n, j]
            gB[part, s, t, g, n], gC[part, s, t, g, n] = total_B, total_C
    for v in range(low, high):
      first = g * width + v * LANES
      for n in range(order):
        for j in range(min(LANES, (g + 1) * width - first)):
          gA[a, run, n, first + j] = tgA[(v - low) * order + n, j]

  return kernel
