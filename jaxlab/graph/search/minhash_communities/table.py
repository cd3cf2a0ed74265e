"""The table of locality-sensitive hashes: in each band, vertices sorted into buckets of equal entries."""

import dataclasses
import functools

import jax
import numba
import numpy as np
from jaxtyping import Array, Int, Int32, UInt32

from jaxlab.graph.search.minhash_communities.hashing import EMPTY, in_parallel


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("signatures", "order", "start"), meta_fields=("mask_empty",)
)
@dataclasses.dataclass(frozen=True)
class Index:
  """Signatures and their table, of NumPy or JAX arrays.

  Attributes:
    signatures: [V, H].
    order: [b, V] in each band the vertices bucket by bucket, ascending in each; the last of a bucket as ~vertex < 0.
    start: [V, b] where in `order` the bucket of a vertex begins.
    mask_empty: whether vertices without in-neighbours are similar to nobody.
  """

  signatures: UInt32[np.ndarray | Array, "v h"]
  order: Int32[np.ndarray | Array, "b v"]
  start: Int32[np.ndarray | Array, "v b"]
  mask_empty: bool = True


def build(signatures: UInt32[np.ndarray, "v h"], bands: int, *, mask_empty: bool = True) -> Index:
  """Host. The table, on all cores; bands are compared exactly, whatever their width.

  Args:
    signatures: [V, H], V below 2^31.
    bands: b, a divisor of H.
    mask_empty: see `Index`; False puts all vertices without in-neighbours into one bucket, as the official code does.

  Raises:
    ValueError: an argument of another shape or out of range.
  """
  check_signatures(signatures)
  v, h = signatures.shape
  if bands < 1 or h % bands:
    raise ValueError(f"bands: got {bands}, expected a divisor of {h}, the number of hashes")
  order, start = np.empty((bands, v), np.int32), np.empty((v, bands), np.int32)
  in_parallel(bands)(functools.partial(_buckets, signatures, h // bands, mask_empty, order, start))
  return Index(signatures, order, start, mask_empty)


def candidates(index: Index, seeds: Int[np.ndarray, " s"]) -> Int32[np.ndarray, " m"]:
  """Host. All vertices that share a bucket with a seed, and the seeds: the active set A, ascending.

  Args:
    index: of NumPy arrays.
    seeds: different vertices.

  Raises:
    ValueError: seeds out of range or repeated.
  """
  seeds = check_seeds(seeds, len(index.signatures))
  return np.sort(_collect(index.order, index.start, seeds, np.zeros(len(index.signatures), np.uint8)))


def check_signatures(signatures: UInt32[np.ndarray, "v h"]) -> None:
  """Raises unless [V, H] uint32."""
  if signatures.ndim != 2 or signatures.dtype != np.uint32 or not signatures.size:
    raise ValueError(f"signatures: got {signatures.dtype}{list(signatures.shape)}, expected uint32 [V, H]")


def check_seeds(seeds: Int[np.ndarray, " s"], num_vertices: int) -> Int[np.ndarray, " s"]:
  """Seeds as int64, if they are different vertices."""
  seeds = np.asarray(seeds)
  if seeds.ndim != 1 or not len(seeds) or not np.issubdtype(seeds.dtype, np.integer):
    raise ValueError(f"seeds: got {seeds!r}, expected vertex numbers, at least one")
  if seeds.min() < 0 or seeds.max() >= num_vertices or len(set(seeds.tolist())) < len(seeds):
    raise ValueError(f"seeds: got {seeds}, expected different numbers in [0, {num_vertices})")
  return seeds.astype(np.int64)


@numba.njit(cache=True, nogil=True)
def _buckets(signatures, width, mask_empty, order, start, low, high):
  """Fills bands low to high - 1.

  Vertices are grouped by the first two entries as one number; further entries refine: (bucket, entry) is one again.
  """
  v = len(signatures)
  key, sequence, first = np.empty(v, np.uint64), np.empty(v, np.int32), np.empty(v, np.int32)
  for band in range(low, high):
    column = band * width
    for x in range(v):
      key[x] = signatures[x, column]
    if width == 1:
      _group(key, sequence, first)
    for i in range(column + 1, column + width):
      for x in range(v):
        key[x] = (key[x] << np.uint64(32)) | np.uint64(signatures[x, i])
      _group(key, sequence, first)
      for x in range(v):
        key[x] = first[x]
    for k in range(v):
      x = sequence[k]
      alone = mask_empty and signatures[x, 0] == EMPTY
      last = alone or k == v - 1 or first[sequence[k + 1]] != first[x]
      order[band, k] = ~x if last else x
      start[x, band] = k if alone else first[x]


@numba.njit(cache=True, nogil=True)
def _group(key, sequence, first):
  """Brings equal keys together: `sequence` [V] the vertices, `first` [V] where each one's bucket begins.

  Keys are scrambled (a bijection) and spread by their highest bits over bins of a few different keys each, which are
  then taken out one key at a time. Vertices of one key stay in order.
  """
  v = len(key)
  bits = 1
  while (4 << bits) < v:
    bits += 1
  shift = np.uint64(64 - bits)
  bounds = np.zeros((1 << bits) + 1, np.int32)
  for x in range(v):
    bounds[(_mix(key[x]) >> shift) + np.uint64(1)] += 1
  for k in range(1 << bits):
    bounds[k + 1] += bounds[k]
  place, binned, waiting = bounds[:-1].copy(), np.empty(v, np.uint64), np.empty(v, np.int32)
  for x in range(v):
    k = _mix(key[x]) >> shift
    binned[place[k]], waiting[place[k]] = key[x], x
    place[k] += 1
  for k in range(1 << bits):
    count, low, high = bounds[k], bounds[k], bounds[k + 1]
    while low < high:
      chosen, begin, rest = binned[low], count, low
      for i in range(low, high):
        if binned[i] == chosen:
          sequence[count], first[waiting[i]] = waiting[i], begin
          count += 1
        else:
          binned[rest], waiting[rest] = binned[i], waiting[i]
          rest += 1
      high = rest


@numba.njit(cache=True, nogil=True)
def _mix(x):
  """A bijection of 64-bit numbers that spreads every bit (SplitMix64's finalizer)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _collect(order, start, seeds, seen):
  found = np.empty(64, np.int32)
  count = 0
  for s in seeds:
    for band in range(len(order)):
      k = start[s, band]
      entry = 0
      while entry >= 0:
        entry = order[band, k]
        x = entry if entry >= 0 else ~entry
        if not seen[x]:
          seen[x] = 1
          if count == len(found):
            grown = np.empty(2 * count, np.int32)
            for i in range(count):  # assigned as an array, numba compiles for seconds
              grown[i] = found[i]
            found = grown
          found[count] = x
          count += 1
        k += 1
  return found[:count]
