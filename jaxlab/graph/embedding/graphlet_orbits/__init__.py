"""Graphlet orbit adjacencies: who is where in which small subgraph with whom, counted exactly, and embeddings of it.

    A[h, o, p]_ij = connected induced subgraphs of 2 to 4 nodes with i on orbit o, j on orbit p, h steps apart inside

Windels, Malod-Dognin and Przulj, "Graphlets correct for the topological information missed by random walks", 2024,
arXiv:2405.14194; code `samwindels/gradco`, called GRADCO. Orbits 0 to 14 are numbered as by Przulj (2007): edge 0; path
of three 1 (end), 2; triangle 3; path of four 4 (end), 5; star 6 (leaf), 7; cycle 8; paw 9 (pendant), 10, 11 (degree 3);
diamond 12 (degree 2), 13; clique 14. `ORBIT_PAIRS` lists the 28 matrices (hop, row's orbit, column's orbit).

    stream            host: blocks of rows as sparse matrices of int64, with the memory of a few blocks
    orbit_adjacencies host: the same as whole matrices
    device_orbit_adjacencies, device_ppmi    JAX: dense, for graphs of up to 4,096 nodes
    graphlet_adjacency, node_degrees, edge_degrees    sums of them: graphlet adjacency, and graphlet degree vectors
    walk_adjacency, ppmi, embed    co-occurrence in random walks; positive mutual information; its rank-k factor

    graph = common_neighbors.adjacency(edges, num_nodes)
    matrix = orbit_adjacencies(graph, [(1, 4, 5)])[1, 4, 5]
    vectors = embed(sparse.from_scipy(ppmi(matrix)), jax.random.key(0), dim=64)

All 28 follow, entry by entry, from six sums over the common neighbours of two nodes (see `counting`), so nothing larger
than a triangle or a pair of them is ever enumerated.

Walks of three steps see only some of this: a pair of orbits can be the ends of a simple path over all four nodes only
if the graphlet has a Hamiltonian path between the two places. `INVISIBLE_TO_PATHS` lists the pairs without one. That is
our criterion; the paper's list may differ.

Differs from the paper: its formulas for mutual information and factorisation were not at hand, so `ppmi` and `embed`
are the usual ones. Differs from the official code: sparse and by rows, where it holds dense n x n counters; exact where
its (3, 4, 4) goes through float32; self-loops are refused, not ignored.
"""

from jaxlab.graph.embedding.graphlet_orbits.counting import GRAPHLETS, INVISIBLE_TO_PATHS, ORBIT_PAIRS, OrbitPair
from jaxlab.graph.embedding.graphlet_orbits.degrees import (
  EDGE_PAIRS,
  EdgeDegrees,
  edge_degrees,
  graphlet_adjacency,
  node_degrees,
)
from jaxlab.graph.embedding.graphlet_orbits.device import device_orbit_adjacencies
from jaxlab.graph.embedding.graphlet_orbits.factors import device_ppmi, embed, ppmi, walk_adjacency
from jaxlab.graph.embedding.graphlet_orbits.host import Block, orbit_adjacencies, stream

__all__ = [
  "EDGE_PAIRS",
  "GRAPHLETS",
  "INVISIBLE_TO_PATHS",
  "ORBIT_PAIRS",
  "Block",
  "EdgeDegrees",
  "OrbitPair",
  "device_orbit_adjacencies",
  "device_ppmi",
  "edge_degrees",
  "embed",
  "graphlet_adjacency",
  "node_degrees",
  "orbit_adjacencies",
  "ppmi",
  "stream",
  "walk_adjacency",
]
