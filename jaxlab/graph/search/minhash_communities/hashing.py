"""Signatures from a stream of edges, on the host."""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numba
import numpy as np
from jaxtyping import Int, UInt32, UInt64

EMPTY = np.uint32(2**32 - 1)  # every entry of a vertex without in-neighbours; no hash is that large
_PRIME, _RANGE = 3_000_000_019, 3_000_000_000


class HashFamily(NamedTuple):
  """Multipliers (odd) and offsets of H hash functions."""

  a: UInt64[np.ndarray, " h"]
  b: UInt64[np.ndarray, " h"]


def hash_family(num_hashes: int, seed: int = 0) -> HashFamily:
  """Host. The published family, drawn as the official code draws it.

  Args:
    num_hashes: H; families of different H share no functions.
    seed: 0 is the official one.
  """
  if num_hashes < 1:
    raise ValueError(f"num_hashes: got {num_hashes}, expected at least 1")
  random = np.random.RandomState(seed)
  # Floats of that size are multiples of 2048, so that adding 1 makes all of them odd.
  a = random.uniform(0, 2**64 - 1, 3 * num_hashes).astype(np.uint64) + np.uint64(1)
  b = random.randint(0, 2**33 + 1, num_hashes, dtype=np.int64)
  return HashFamily(a[a % 2 == 1][:num_hashes], b.astype(np.uint64))


def signatures(
  blocks: Iterable[tuple[Int[np.ndarray, " e"], Int[np.ndarray, " e"]]], num_vertices: int, hashes: HashFamily
) -> UInt32[np.ndarray, "v h"]:
  """Host. Signatures of all vertices; on all cores.

  Args:
    blocks: (senders, receivers) of some edges each, read once: a generator may yield more edges than memory holds. Any
      order, and repetition, give the same result; edges of one sender in a row are fastest. Senders are any
      numbers in [0, 2^64), not only vertices.
    num_vertices: V; receivers are below it.
    hashes: H functions.

  Returns:
    [V, H]; rows of `EMPTY` for vertices without in-neighbours.

  Raises:
    ValueError: a block that is no pair of equally long integer arrays, or a number out of range.
  """
  if num_vertices < 1:
    raise ValueError(f"num_vertices: got {num_vertices}, expected at least 1")
  a, b = (np.ascontiguousarray(part, np.uint64) for part in hashes)
  if a.ndim != 1 or a.shape != b.shape or not len(a):
    raise ValueError(f"hashes: got shapes {a.shape} and {b.shape}, expected two equal [H]")
  result = np.full((num_vertices, len(a)), EMPTY)
  run = in_parallel(len(a), 16)  # threads own columns, in whole cache lines, and never meet
  for block in blocks:
    senders, receivers = _check_block(block, num_vertices)
    run(functools.partial(_ingest, senders, receivers, a, b, result))
  return result


def merge(*parts: UInt32[np.ndarray, "*shape"]) -> UInt32[np.ndarray, "*shape"]:
  """Host. Signatures of the unions of neighbourhoods: of a stream that was read in parts, or of several vertices."""
  if not parts or any(part.shape != parts[0].shape or part.dtype != np.uint32 for part in parts):
    raise ValueError(f"parts: got {[(p.shape, str(p.dtype)) for p in parts]}, expected equal shapes of uint32")
  return functools.reduce(np.minimum, parts)


def in_parallel(count: int, multiple: int = 1) -> Callable[[Callable[[int, int], None]], None]:
  """Host. Runs `task(low, high)` over [0, count), a part for each core; for tasks that let other threads run.

  Args:
    count: of things.
    multiple: parts begin at multiples of it.
  """
  cores = len(os.sched_getaffinity(0))
  bounds = sorted({0, *(round(count * k / cores / multiple) * multiple for k in range(1, cores)), count})

  def run(task):
    if len(bounds) == 2:
      return task(0, count)
    with concurrent.futures.ThreadPoolExecutor(len(bounds) - 1) as pool:
      list(pool.map(task, bounds[:-1], bounds[1:]))

  return run


def _check_block(block, num_vertices):
  if len(block) != 2:
    raise ValueError(f"blocks: got one of {len(block)} arrays, expected (senders, receivers)")
  senders, receivers = map(np.asarray, block)
  for name, ends in (("senders", senders), ("receivers", receivers)):
    if ends.ndim != 1 or not np.issubdtype(ends.dtype, np.integer):
      raise ValueError(f"blocks: got {name} of shape {ends.shape} and dtype {ends.dtype}, expected integers [E]")
  if len(senders) != len(receivers):
    raise ValueError(f"blocks: got {len(senders)} senders and {len(receivers)} receivers, expected as many")
  if len(senders) and senders.min() < 0:
    raise ValueError(f"blocks: got sender {senders.min()}, expected none below 0")
  if len(senders) and not (receivers.min() >= 0 and receivers.max() < num_vertices):
    raise ValueError(f"blocks: got receivers {receivers.min()} to {receivers.max()}, expected [0, {num_vertices})")
  return np.ascontiguousarray(senders, np.uint64), np.ascontiguousarray(receivers, np.int64)


@numba.njit(cache=True, nogil=True, inline="always")
def _modulo(x):
  """x mod `_PRIME` of uint64, as int64, in operations that processors do on many numbers at once, unlike division.

  The quotient is below 2^33, so that in float64 it is off by less than 1e-5, and by one after rounding down.
  """
  quotient = np.int64(np.float64(x) * (1 / _PRIME))
  remainder = np.int64(x - np.uint64(quotient * _PRIME))
  remainder = remainder + _PRIME if remainder < 0 else remainder
  return remainder - _PRIME if remainder >= _PRIME else remainder


@numba.njit(cache=True, nogil=True)
def _ingest(senders, receivers, a, b, signatures, low, high):
  """Minima over the edges' senders in columns low to high - 1; a sender is hashed once for each run of its edges."""
  a, b = a[low:high], b[low:high]
  value = np.empty(high - low, np.uint32)
  e = 0
  while e < len(senders):
    sender = senders[e]
    for i in range(len(value)):
      remainder = _modulo(a[i] * sender + b[i])  # the sum wraps around at 2^64, as it should
      value[i] = remainder - _RANGE if remainder >= _RANGE else remainder
    while e < len(senders) and senders[e] == sender:
      row = signatures[receivers[e], low:high]
      for i in range(len(value)):
        row[i] = min(row[i], value[i])
      e += 1
