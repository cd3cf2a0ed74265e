"""Sums of orbit adjacencies: graphlet adjacencies, and graphlet degree vectors of nodes and of edges. Host."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from jaxtyping import Int32, Int64

from jaxlab.graph.embedding.graphlet_orbits import counting, host
from jaxlab.graph.embedding.graphlet_orbits.counting import GRAPHLETS, OrbitPair

# Orbit o's count is a row sum of one matrix over the neighbours of that kind inside the graphlet.
_NODE_SUMS: tuple[tuple[OrbitPair, int], ...] = (
  ((1, 0, 0), 1), ((1, 1, 2), 1), ((1, 2, 1), 2), ((1, 3, 3), 2), ((1, 4, 5), 1), ((1, 5, 5), 1), ((1, 6, 7), 1),
  ((1, 7, 6), 3), ((1, 8, 8), 2), ((1, 9, 11), 1), ((1, 10, 10), 1), ((1, 11, 9), 1), ((1, 12, 13), 2),
  ((1, 13, 12), 2), ((1, 14, 14), 3),
)  # fmt: skip

EDGE_PAIRS: tuple[OrbitPair, ...] = tuple(pair for pair in counting.HOP_1[1:] if pair[1] <= pair[2])


def node_degrees(graph: scipy.sparse.csr_array, *, threads: int | None = None) -> Int64[np.ndarray, "n 15"]:
  """Host. Graphlet degree vectors: in how many graphlets a node is on each orbit. Arguments as `host.stream`.

  From hop 1 alone, so that no pair of nodes without an edge is looked at. Exact while counts stay below 2^63.

  Source: Przulj, "Biological network comparison using graphlet degree distribution", 2007.
  """
  parts = []
  for block in host.stream(graph, counting.HOP_1, threads=threads):
    sums = counting.row_sums(block.hops[1].starts, block.hops[1].values)
    parts.append([sums[counting.HOP_1.index(pair)] // count for pair, count in _NODE_SUMS])
  return np.concatenate(parts, axis=1).T


class EdgeDegrees(NamedTuple):
  """Of each edge, once.

  Attributes:
    edges: [2, m] with senders < receivers.
    counts: [m, 12] graphlets in which the edge joins orbits as `EDGE_PAIRS` lists them, in either direction.
  """

  edges: Int32[np.ndarray, "2 m"]
  counts: Int64[np.ndarray, "m 12"]


def edge_degrees(graph: scipy.sparse.csr_array, *, threads: int | None = None) -> EdgeDegrees:
  """Host. Graphlet degree vectors of edges. Arguments as `host.stream`.

  Source: Hocevar and Demsar, "A combinatorial approach to graphlet counting", 2014, for the 12 edge orbits.
  """
  edges, counts = [], []
  for block in host.stream(graph, counting.HOP_1, threads=threads):
    entries = block.hops[1]
    rows = np.repeat(np.arange(block.first, block.last, dtype=np.int32), np.diff(entries.starts))
    once = rows < entries.columns
    edges.append(np.stack([rows[once], entries.columns[once]]))
    at = lambda pair, values=entries.values[:, once]: values[counting.HOP_1.index(pair)]
    both = [at(pair) if pair[1] == pair[2] else at(pair) + at((1, pair[2], pair[1])) for pair in EDGE_PAIRS]
    counts.append(np.stack(both, axis=1))
  return EdgeDegrees(np.concatenate(edges, axis=1), np.concatenate(counts))


def graphlet_adjacency(matrices: Mapping[OrbitPair, Any], graphlet: int) -> Any:
  """In how many graphlets of a kind two nodes are together: the sum of its orbit adjacencies.

  Args:
    matrices: of all pairs of the graphlet's orbits, sparse or dense, of one block or whole.
    graphlet: 0 to 8.

  Raises:
    ValueError: another graphlet, or a missing matrix.
  """
  if graphlet not in range(len(GRAPHLETS)):
    raise ValueError(f"graphlet: got {graphlet!r}, expected 0 to {len(GRAPHLETS) - 1}")
  pairs = [pair for pair in counting.ORBIT_PAIRS if pair[1] in GRAPHLETS[graphlet]]
  missing = [pair for pair in pairs if pair not in matrices]
  if missing:
    raise ValueError(f"matrices: got none for {missing}, expected all of {pairs}")
  total = matrices[pairs[0]]
  for pair in pairs[1:]:
    total = total + matrices[pair]
  return total
