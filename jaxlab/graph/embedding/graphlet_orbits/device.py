"""Orbit adjacencies as dense matrices on the device, for graphs of up to 4,096 nodes.

The six sums of `counting` are matrix products in float32. They are exact: every product and every partial sum is a
whole number of at most n (n - 1) < 2^24. What follows from them is int32, exact as n^2 < 2^31.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

from jaxlab.graph.embedding.graphlet_orbits import counting
from jaxlab.graph.embedding.graphlet_orbits.counting import OrbitPair

MAX_NODES = 4096  # n (n - 1) < 2^24
CHUNK = 512  # edges whose common neighbours are held at a time

_product = functools.partial(jnp.matmul, precision="highest", preferred_element_type=jnp.float32)


def device_orbit_adjacencies(edges: Int[Array, "2 m"], num_nodes: int) -> dict[OrbitPair, Int32[Array, "n n"]]:
  """All 28 matrices, exactly. O(n^2 (n + m)) operations, 28 n^2 integers.

  Args:
    edges: [2, m] integers, each undirected edge once. Edges with an end at `num_nodes` or beyond are padding.
    num_nodes: n, static, at most 4,096; nodes without edges have rows of zeros.

  Returns:
    Pair -> matrix, row's node on the first orbit, column's on the second.

  Raises:
    ValueError: another shape or dtype, more nodes; on the host also a self-loop or an edge given twice.
  """
  _check(edges, num_nodes)
  n = num_nodes
  # Padding is moved out of bounds, where scatters drop and gathers fill.
  senders, receivers = jnp.where((edges >= n).any(0), n, edges)
  a = jnp.zeros((n, n), "float32").at[senders, receivers].set(1, mode="drop").at[receivers, senders].set(1, mode="drop")
  d = a.sum(1)
  common = _product(a, a)
  triangles = a * common
  near = _product(triangles, a)
  inner = _inner(a, senders, receivers)
  whole = lambda x: x.astype("int32")
  columns = counting.Node(whole(d), whole(triangles.sum(1)), whole((a * (d - 1 - triangles)).sum(1)))
  rows = counting.Node(*(x[:, None] for x in columns))
  sums = counting.Sums(whole(common), whole(_product(a * d, a)), whole(near), whole(near.T), whole(inner))
  on_edges = counting.linked(sums, whole(_product(common, a)), rows, columns)
  elsewhere = counting.apart(sums, rows, columns)
  edge, two_apart = a > 0, (a == 0) & (common > 0) & ~jnp.eye(n, dtype=bool)
  matrices = {p: jnp.where(edge, m, 0) for p, m in zip(counting.HOP_1, on_edges, strict=True)}
  matrices |= {p: jnp.where(two_apart, m, 0) for p, m in zip(counting.HOP_2, elsewhere, strict=True)}
  paths = whole(_product(matrices[2, 1, 1].astype("float32"), a)) - matrices[2, 9, 10]
  return matrices | {(3, 4, 4): jnp.where(edge, 0, paths)}


def _inner(a, senders, receivers):
  """E = C' C, where row e of C marks the common neighbours of the ends of edge e."""
  n, m = a.shape[0], senders.shape[0]
  chunks = -(-m // CHUNK)
  ends = jnp.pad(jnp.stack([senders, receivers]), ((0, 0), (0, chunks * CHUNK - m)), constant_values=n)

  def add(total, ends):
    rows = a.at[ends].get(mode="fill", fill_value=0)
    c = rows[0] * rows[1]
    return total + _product(c.T, c), None

  return jax.lax.scan(add, jnp.zeros((n, n), "float32"), ends.reshape(2, chunks, CHUNK).swapaxes(0, 1))[0]


def _check(edges, num_nodes):
  if not isinstance(num_nodes, int | np.integer) or not 1 <= num_nodes <= MAX_NODES:
    raise ValueError(
      f"num_nodes: got {num_nodes!r}, expected 1 to {MAX_NODES}; `stream` takes any number, and works by rows"
    )
  if np.ndim(edges) != 2 or edges.shape[0] != 2 or not jnp.issubdtype(edges.dtype, jnp.integer):
    raise ValueError(f"edges: got {getattr(edges, 'dtype', None)} of shape {np.shape(edges)}, expected integers [2, m]")
  if isinstance(edges, jax.core.Tracer):
    return
  real = np.sort(np.asarray(edges)[:, (np.asarray(edges) < num_nodes).all(0)], axis=0)
  if real.size and real.min() < 0:
    raise ValueError(f"edges: got node {real.min()}, expected none below 0")
  if (real[0] == real[1]).any():
    raise ValueError(f"edges: got {np.count_nonzero(real[0] == real[1])} self-loops, expected none")
  if np.unique(real, axis=1).shape[1] < real.shape[1]:
    raise ValueError("edges: got an edge twice, expected each once, in one direction")
