"""The same queries in JAX: of static size, for many sets of seeds at once under `vmap`, with padding and masks.

active = gather(index, seeds, size=512, bucket_size=128)     # check active.overflow
order, score = minrank(active, 50)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, Int32, UInt32

from jaxlab.graph.search.minhash_communities.hashing import EMPTY
from jaxlab.graph.search.minhash_communities.table import Index


class Active(NamedTuple):
  """An active set, padded.

  Attributes:
    vertices: [m] ascending; V where there is none.
    signatures: [m, H].
    exists: [m].
    places: [S] where in the set the seeds are.
    overflow: [] whether a bucket or the set had more members than there was room for, so that some are missing.
  """

  vertices: Int32[Array, " m"]
  signatures: UInt32[Array, "m h"]
  exists: Bool[Array, " m"]
  places: Int32[Array, " s"]
  overflow: Bool[Array, ""]


def gather(index: Index, seeds: Int[Array, " s"], *, size: int, bucket_size: int) -> Active:
  """The seeds and all that share a bucket with one.

  Args:
    index: of JAX arrays.
    seeds: different vertices in [0, V), which a traced program cannot check.
    size: m, room for candidates.
    bucket_size: members of a bucket that are read.

  Raises:
    ValueError: an argument of another shape or out of range.
  """
  if seeds.ndim != 1 or not jnp.issubdtype(seeds.dtype, jnp.integer):
    raise ValueError(f"seeds: got {seeds.dtype}{list(seeds.shape)}, expected integers [S]")
  if size < seeds.shape[0]:
    raise ValueError(f"size: got {size}, expected at least {seeds.shape[0]}, the number of seeds")
  if bucket_size < 1:
    raise ValueError(f"bucket_size: got {bucket_size}, expected at least 1")
  bands, v = index.order.shape
  place = index.start[seeds][..., None] + jnp.arange(bucket_size)
  entry = index.order[jnp.arange(bands)[:, None], jnp.minimum(place, v - 1)]
  last = entry < 0
  closed = last.any(axis=-1)
  inside = jnp.arange(bucket_size) <= jnp.where(closed, jnp.argmax(last, axis=-1), bucket_size)[..., None]
  member = jnp.where(last, ~entry, entry)
  mask = jnp.zeros(v, bool).at[jnp.where(inside, member, v)].set(True, mode="drop").at[seeds].set(True)
  vertices = jnp.nonzero(mask, size=size, fill_value=v)[0].astype(jnp.int32)
  exists = vertices < v
  signatures = jnp.where(exists[:, None], index.signatures[jnp.minimum(vertices, v - 1)], EMPTY)
  if index.mask_empty:
    own = EMPTY - vertices.astype(jnp.uint32)  # above all hashes, and different
    signatures = jnp.where(signatures[:, :1] == EMPTY, own[:, None], signatures)
  overflow = ~closed.all() | (mask.sum() > size)
  places = jnp.searchsorted(vertices, seeds).astype(jnp.int32)
  return Active(vertices, signatures, exists, places, overflow)


def initial_averages(active: Active) -> Float32[Array, " m"]:
  """Mean similarity to the seeds of each vertex; 0 where there is none."""
  total = _total(active)
  return jnp.where(active.exists, total / (len(active.places) * active.signatures.shape[1]), 0)


def minrank(active: Active, size: int) -> tuple[Int32[Array, " k"], Float32[Array, " k"]]:
  """Vertices in the order in which the community takes them, and their mean similarity to it at that moment.

  Args:
    active: the set.
    size: k additions.

  Returns:
    -1 and 0 where the set was exhausted.
  """
  if size < 1:
    raise ValueError(f"size: got {size}, expected at least 1")
  hashes = active.signatures.shape[1]

  def add(state, _):
    total, outside, members = state
    best = jnp.argmax(jnp.where(outside, total, -1))  # the first of equals
    found = outside[best]
    result = jnp.where(found, active.vertices[best], -1), jnp.where(found, total[best] / (members * hashes), 0)
    total += jnp.where(found, _matches(active.signatures, active.signatures[best]), 0)
    return (total, outside.at[best].set(False), members + found), result

  state = _total(active), active.exists.at[active.places].set(False), jnp.int32(len(active.places))
  return jax.lax.scan(add, state, length=size)[1]


def pagerank(active: Active, *, damping: float = 0.9, steps: int = 3) -> Float32[Array, " m"]:
  """Personalised PageRank of each vertex, also of seeds; 0 where there is none. Takes 4 m^2 bytes."""
  if not 0 <= damping <= 1:
    raise ValueError(f"damping: got {damping}, expected a number in [0, 1]")
  exists = active.exists.astype(jnp.float32)
  rows = jax.lax.map(lambda row: _matches(active.signatures, row), active.signatures)
  w = rows / active.signatures.shape[1] * exists[:, None] * exists
  degree = jnp.sum(w, axis=0)
  inverse = jnp.where(active.exists, 1 / jnp.where(active.exists, degree, 1), 0)

  def step(rank, _):
    rank = damping * jnp.dot(w, rank * inverse, precision="highest")
    return rank.at[active.places].add((jnp.sum(exists) - jnp.sum(rank)) / len(active.places)), None

  return jax.lax.scan(step, exists, length=steps)[0]


def _matches(signatures, row):
  return jnp.sum(signatures == row, axis=-1, dtype=jnp.int32)


def _total(active):
  """Equal entries with all seeds."""

  def add(total, place):
    return total + _matches(active.signatures, active.signatures[place]), None

  return jax.lax.scan(add, jnp.zeros(len(active.vertices), jnp.int32), active.places)[0]
