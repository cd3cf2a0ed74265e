import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from contract_case import Case

from jaxlab.graph import sparse
from jaxlab.graph.embedding import graphlet_orbits as go

NODES = 12


def inputs(seed):
  """A ring with chords: as many edges for each seed, at other places."""
  ring, shift = np.arange(NODES), 2 + seed % 4
  return jnp.asarray(np.stack([np.tile(ring, 2), np.concatenate([ring + 1, ring + shift]) % NODES]), "int32")


def function(params, edges):
  return jnp.stack(list(go.device_orbit_adjacencies(edges, NODES).values()))


def device(edges, num_nodes=NODES):
  return lambda: go.device_orbit_adjacencies(jnp.asarray(edges), num_nodes)


def host(graph, *args, **options):
  return lambda: go.stream(graph, *args, **options)


def embed(operator, **options):
  return lambda: go.embed(operator, jax.random.key(0), **{"dim": 2} | options)


RING = scipy.sparse.csr_array(np.roll(np.eye(5), 1, 1) + np.roll(np.eye(5), -1, 1))
ON_DEVICE = sparse.from_scipy(RING)
ZEROS = RING.copy()
ZEROS.data = ZEROS.data * 0
TWICE = scipy.sparse.csr_array((np.ones(4), [1, 1, 0, 0], [0, 2, 4]), (2, 2))
CASE = Case(
  function=function,
  params=(),
  inputs=inputs,
  pad=lambda edges: jnp.pad(edges, ((0, 0), (0, 5)), constant_values=NODES),
  unpad=lambda matrices: matrices,
  relabel=lambda edges, order: jnp.asarray(np.argsort(order), "int32")[edges],
  reorder=lambda matrices, order: matrices[:, order][:, :, order],
  num_nodes=NODES,
  bad={
    "a dense graph": (host(RING.toarray()), "graph"),
    "a graph not square": (host(RING[:3]), "graph"),
    "no nodes": (host(scipy.sparse.csr_array((0, 0))), "graph"),
    "edges in one direction": (host(scipy.sparse.triu(RING).tocsr()), "graph"),
    "loops": (host(RING + scipy.sparse.eye_array(5, format="csr")), "graph"),
    "an edge twice": (host(TWICE), "graph"),
    "stored zeros": (host(ZEROS), "graph"),
    "an unknown pair": (host(RING, [(1, 4, 4)]), "pairs"),
    "no pairs": (host(RING, []), "pairs"),
    "no rows": (host(RING, rows=0), "rows"),
    "no threads": (host(RING, threads=0), "threads"),
    "half a thread": (lambda: go.orbit_adjacencies(RING, threads=0.5), "threads"),
    "one axis of edges": (device(np.zeros(4, "int32")), "edges"),
    "edges of floats": (device(np.ones((2, 3), "float32")), "edges"),
    "a loop on the device": (device([[0, 1], [1, 1]]), "edges"),
    "an edge in both directions": (device([[0, 1], [1, 0]]), "edges"),
    "a node below 0": (device([[-1], [1]]), "edges"),
    "too many nodes for float32": (device(np.zeros((2, 0), "int32"), 4097), "num_nodes"),
    "another graphlet": (lambda: go.graphlet_adjacency({}, 9), "graphlet"),
    "missing matrices": (lambda: go.graphlet_adjacency({(1, 0, 0): RING}, 1), "matrices"),
    "negative counts": (lambda: go.ppmi(-RING), "matrix"),
    "a dense matrix": (lambda: go.ppmi(np.eye(3)), "matrix"),
    "no steps": (lambda: go.walk_adjacency(RING, 0), "steps"),
    "a rectangle": (lambda: go.device_ppmi(jnp.ones((2, 3))), "matrix"),
    "a scipy matrix": (embed(RING), "matrix"),
    "more columns than nodes": (embed(ON_DEVICE, dim=6), "dim"),
    "no iterations": (embed(ON_DEVICE, iterations=0), "iterations"),
    "negative oversampling": (embed(ON_DEVICE, oversampling=-1), "oversampling"),
  },
)
