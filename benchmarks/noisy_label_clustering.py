"""Flow diffusion on a block model of 10,000 nodes beside the official method in Python and a global solver.

The first peer is the official loop (rounds over the nodes in excess, in random order) with NumPy arrays for the
neighbours. The second solves the dual quadratic program over all nodes with SciPy's L-BFGS-B, to the same tolerance.
"""

import functools

import numpy as np
import scipy.optimize
import scipy.sparse

from benchmarks.harness import Case

BLOCK, SOURCE, ACCURACY, EPSILON = 500, 1000.0, 0.8, 0.05


@functools.cache
def task():
  """Adjacency and noisy labels, the seed being node 0."""
  from jaxlab.data import synthetic

  p = np.full((20, 20), 0.002) + np.eye(20) * 0.028
  senders, receivers = synthetic.stochastic_blocks([BLOCK] * 20, p)
  n = 20 * BLOCK
  labels = (np.arange(n) < BLOCK) ^ (np.random.default_rng(0).random(n) > ACCURACY)
  labels[0] = True
  return scipy.sparse.csr_array((np.ones(len(senders), np.float32), (receivers, senders)), (n, n)), labels


def ours():
  """diffuse."""
  from jaxlab.graph.search import noisy_label_clustering as lfd

  adjacency, labels = task()
  return lambda: lfd.diffuse(adjacency, 0, SOURCE, sink="one", labels=labels, epsilon=EPSILON)


def official():
  """Rounds of pushes."""
  adjacency, labels = task()
  n = adjacency.shape[0]
  neighbours = np.split(adjacency.indices, adjacency.indptr[1:-1])
  weights = [np.where(labels[i] == labels[near], 1, EPSILON) for i, near in enumerate(neighbours)]
  degree = np.array([w.sum() for w in weights])

  def run():
    rng, x, mass = np.random.default_rng(0), np.zeros(n), np.zeros(n)
    mass[0], seen = SOURCE, {0}
    while over := [i for i in seen if mass[i] > 1 + 1e-4]:
      for i in rng.permutation(over):
        push = (mass[i] - 1) / degree[i]
        x[i] += push
        mass[i] = 1
        mass[neighbours[i]] += weights[i] * push
        seen.update(neighbours[i].tolist())
    return x

  return run


def quadratic_program():
  """The dual over all nodes."""
  adjacency, labels = task()
  a = adjacency.tocoo()
  w = scipy.sparse.csr_array((np.where(labels[a.row] == labels[a.col], 1, EPSILON), (a.row, a.col)), a.shape)
  laplacian = scipy.sparse.diags_array(w.sum(axis=1)) - w
  linear = np.ones(a.shape[0])
  linear[0] -= SOURCE

  def dual(x):
    flow = laplacian @ x
    return x @ flow / 2 + x @ linear, flow + linear

  start, bounds = np.zeros(a.shape[0]), [(0, None)] * a.shape[0]
  options = {"maxiter": 5000, "maxfun": 10**4, "ftol": 0, "gtol": 1e-4}
  return lambda: scipy.optimize.minimize(dual, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)


def cases():
  """One seed, one source."""
  peers = {"the official method, NumPy": official, "SciPy L-BFGS-B": quadratic_program}
  return [Case("diffusion of twice a block of 500 in 10,000 nodes", ours, peers)]
