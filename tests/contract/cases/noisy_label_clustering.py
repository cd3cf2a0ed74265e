import jax.numpy as jnp
import numpy as np
import scipy.sparse
from contract_case import Case

from jaxlab.graph import sparse
from jaxlab.graph.search import noisy_label_clustering as lfd

NODES = 16


def matrix(seed):
  """A ring with chords, as many edges for each seed."""
  ring, shift = np.arange(NODES), 2 + seed % 5
  rows, columns = np.tile(ring, 2), np.concatenate([ring + 1, ring + shift]) % NODES
  a = scipy.sparse.coo_array((np.ones(2 * NODES, "float32"), (rows, columns)), (NODES, NODES))
  return (a + a.T).tocsr()


def inputs(seed):
  labels = np.random.default_rng(seed).integers(0, 2, NODES)
  source = np.zeros(NODES, "float32")
  source[seed % NODES] = 12
  return sparse.from_scipy(matrix(seed)), labels, source, np.full(NODES, 1.5, "float32")


def function(params, given):
  operator, labels, source, sink = given
  solution = lfd.solve(lfd.label_weights(operator, labels, 0.2), source, sink, tolerance=1e-5)
  return solution.height, solution.mass


def relabel(given, order):
  operator, *rest = given
  place = np.argsort(order)
  a = scipy.sparse.coo_array((operator.values, (place[operator.rows], place[operator.columns])), operator.shape)
  return sparse.from_scipy(a), *(value[order] for value in rest)


def local(**changes):
  """A diffusion on the host, with a changed argument."""
  given = {"adjacency": A, "nodes": 0, "source": 5.0} | changes
  return lambda: lfd.diffuse(given.pop("adjacency"), given.pop("nodes"), given.pop("source"), **given)


A = matrix(0)
OPERATOR, LABELS, SOURCE, SINK = inputs(0)
CASE = Case(
  function=function,
  params=(),
  inputs=inputs,
  relabel=relabel,
  num_nodes=NODES,
  reorder=lambda outputs, order: tuple(value[order] for value in outputs),
  tolerance=1e-4,  # heights, at residuals of 1e-5
  bad={
    "dense adjacency": (local(adjacency=A.toarray()), "adjacency"),
    "adjacency not square": (local(adjacency=A[:3]), "adjacency"),
    "a node beyond the graph": (local(nodes=NODES), "nodes"),
    "a node twice": (local(nodes=[1, 1]), "nodes"),
    "no node": (local(nodes=np.zeros(0, int)), "nodes"),
    "negative source": (local(source=-1.0), "source"),
    "infinite source": (local(source=np.inf), "source"),
    "unknown sink": (local(sink="two"), "sink"),
    "sink of other nodes": (local(sink=np.ones(3)), "sink"),
    "labels of other nodes": (local(labels=np.ones(3, int)), "labels"),
    "epsilon above one": (local(epsilon=1.5), "epsilon"),
    "tolerance of zero": (local(tolerance=0.0), "tolerance"),
    "no sources": (lambda: lfd.cluster(A, 0, []), "sources"),
    "alpha of one": (lambda: lfd.pagerank(A, 0, alpha=1.0), "alpha"),
    "rho of zero": (lambda: lfd.pagerank(A, 0, rho=0.0), "rho"),
    "device: a matrix that is no operator": (lambda: lfd.solve(A, SOURCE, SINK), "operator"),
    "device: source of other nodes": (lambda: lfd.solve(OPERATOR, SOURCE[:3], SINK), "source"),
    "device: sink of other nodes": (lambda: lfd.solve(OPERATOR, SOURCE, SINK[:3]), "sink"),
    "device: tolerance of zero": (lambda: lfd.solve(OPERATOR, SOURCE, SINK, tolerance=0.0), "tolerance"),
    "device: labels of other nodes": (lambda: lfd.label_weights(OPERATOR, jnp.zeros(3, int)), "labels"),
  },
)
