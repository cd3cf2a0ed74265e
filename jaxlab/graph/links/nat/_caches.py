"""Dictionaries of neighbours in hashed slots: joining those of two nodes, and offering entries to them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numba import types

from jaxlab import kernels

_PAIRS = 16  # that an item of the host kernel joins


class Slots(NamedTuple):
  """Dictionary entries, S = 1 + M_1 + M_2 of each node, hops side by side. A slot with key 0 is empty.

  Attributes:
    key: node id int32.
    edge: edge id int32 of the latest event between the key and its hop-1 neighbour.
    time: of that event, float32.
    rep: float32 vector [f].
  """

  key: Int[Array, "*n s"]
  edge: Int[Array, "*n s"]
  time: Float[Array, "*n s"]
  rep: Float[Array, "*n s f"]


def slot_of(key: Int[Array, "*k"], hash_seed: Int[Array, ""], size: int) -> Int[Array, "*k"]:
  """hash_k(a) = (a s + a^2 (s + 1)) mod M_k, exact for every int32 key a >= 0: nothing exceeds M_k^3."""
  rem = lambda x: jax.lax.rem(x, jnp.full_like(x, size))
  a, s = rem(jnp.asarray(key, "int32")), rem(jnp.asarray(hash_seed, "int32"))
  return rem(a * s + a * a * rem(s + 1))


def join(
  key: Int[Array, "p s2"], sizes: tuple[int, ...], hash_seed: Int[Array, ""]
) -> tuple[Int[Array, "p s2"], Int[Array, "p s2"]]:
  """Which dictionaries of a pair hold each key: one look into each, since a key has one slot where it can be.

  Args:
    key: slots of the one end, then of the other, each of S = sum(sizes); 0 is empty.
    sizes: slots of each hop.
    hash_seed: by which keys were put into slots.

  Returns:
    bits: for each slot the union of 2^k over hops k of the first end and 8 * 2^k of the second that hold its key.
    place: the first slot that holds the same key, or 2S for an empty slot.
  """
  if kernels.available():
    # XLA's CPU backend would compute all this again for each element of whatever reads it.
    shape = jax.ShapeDtypeStruct(key.shape, "int32")
    operands = key, jnp.asarray(sizes, "int32"), jnp.reshape(hash_seed, 1)
    bits, place = kernels.call(_join_kernel, [shape, shape], *operands, items=-(-len(key) // _PAIRS))
    return bits, place
  return _join_reference(key, sizes, hash_seed)


def _join_reference(key, sizes, hash_seed):
  """`join` for other backends, and the kernel's test."""
  bits, place = jnp.zeros_like(key), jnp.full_like(key, key.shape[1])
  for end in (1, 0):
    for hop, size in reversed(tuple(enumerate(sizes))):
      slot = slot_of(key, hash_seed, size) + end * sum(sizes) + sum(sizes[:hop])
      holds = (jnp.take_along_axis(key, slot, axis=1) == key) & (key != 0)
      bits = bits + jnp.where(holds, 8**end * 2**hop, 0)
      place = jnp.where(holds, slot, place)
  return bits, place


@kernels.kernel("caches.join")
def _join_kernel(item, frame):
  key, sizes = kernels.operand(frame, 0, types.int32, 2), kernels.operand(frame, 1, types.int32, 1)
  seed = kernels.operand(frame, 2, types.int32, 1)[0]
  bits, place = kernels.result(frame, 0, types.int32, 2), kernels.result(frame, 1, types.int32, 2)
  slots = key.shape[1] // 2
  for p in range(item * _PAIRS, min((item + 1) * _PAIRS, len(key))):
    for i in range(2 * slots):
      bits[p, i], place[p, i] = 0, 2 * slots
    start = slots
    for hop in range(len(sizes) - 1, -1, -1):
      size = np.uint32(sizes[hop])
      start -= sizes[hop]
      s, next_s = np.uint32(seed) % size, (np.uint32(seed) + np.uint32(1)) % size
      for i in range(2 * slots):
        if key[p, i] != 0:
          a = np.uint32(key[p, i]) % size
          slot = start + np.int64((a * s + a * a * next_s) % size)
          # Later dictionaries first, so that the earliest place stays: those of the second end are never before.
          if key[p, slots + slot] == key[p, i]:
            bits[p, i] += 8 << hop
            if place[p, i] >= slots:
              place[p, i] = slots + slot
          if key[p, slot] == key[p, i]:
            bits[p, i] += 1 << hop
            place[p, i] = slot


@jax.custom_vjp
def sum_by_key(x: Float[Array, "p s2 f"], place: Int[Array, "p s2"]) -> Float[Array, "p s2 f"]:
  """Sums slots with the same key into the first of them, which `join` names; the others become 0."""
  return jnp.zeros_like(x).at[jnp.arange(len(x))[:, None], place].add(x, mode="drop")


def _sum_by_key_backward(place, g):
  return jnp.take_along_axis(g, place[..., None], axis=1, mode="fill", fill_value=0), None


# The transpose that autodiff finds too, but as one plain gather.
sum_by_key.defvjp(lambda x, place: (sum_by_key(x, place), place), _sum_by_key_backward)


def insert(
  stored: Slots,
  at: Int[Array, " r"],
  offered: Slots,
  hash_seed: Int[Array, ""],
  replace: Bool[Array, " r"],
) -> Slots:
  """Offers entries to dictionaries, in order: of several that are accepted for a slot the last one stays.

  An entry is accepted by a slot that is free or has its key, by another if it may replace keys. Free means before the
  first of the offers.

  Args:
    stored: [D, M, ...], dictionaries of one hop.
    at: which of them each entry is offered to.
    offered: entries [R, ...]; those with key 0 are none.
    hash_seed: of the slots.
    replace: whether each entry may.
  """
  slot = slot_of(offered.key, hash_seed, stored.key.shape[1])
  held = stored.key[at, slot]
  occupied = (held != 0) & (held != offered.key)
  accepted = (offered.key != 0) & (~occupied | replace)
  row = jnp.where(accepted, jnp.arange(len(held)), -1)
  # A scatter does not say which of several writes to a place stays, a maximum does.
  newest = jnp.full(stored.key.shape, -1).at[at, slot].max(row)

  def chosen(old, new):
    wins = (newest >= 0).reshape(newest.shape + (1,) * (old.ndim - 2))
    return jnp.where(wins, new[newest], old)

  return jax.tree.map(chosen, stored, offered)
