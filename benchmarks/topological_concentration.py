"""Exact TC on Cora beside the official method in plain Python, and ATC beside PyTorch's sparse product.

The first peer is what the official code does: trees as lists of walk ends held in dictionaries, a counter and a set for
each level, built anew for both ends of every edge, the two trees' levels intersected pair by pair. TC of one level by
sets of neighbours alone, the least that Python can do, stands beside it, and networkx.
"""

import functools

from benchmarks.harness import Case

NODES, EDGES = 100_000, 1_000_000


@functools.cache
def _split():
  import numpy as np

  from jaxlab.data import planetoid
  from jaxlab.graph import evaluation

  cora = planetoid.load("cora")
  split = evaluation.planetoid_link_split(np.stack([cora.senders, cora.receivers]), cora.num_nodes, 0)
  return (split.train, split.validation, split.test), cora.num_nodes


def exact(depth):
  """concentration, of all three splits."""
  from jaxlab.graph import common_neighbors
  from jaxlab.graph.links import topological_concentration as tc

  parts, n = _split()
  graph, *others = (common_neighbors.adjacency(part, n) for part in parts)
  return lambda: [tc.concentration(graph, targets, depth=depth) for targets in (None, *others)]


def _sets():
  parts, n = _split()
  found = []
  for part in parts:
    near = [set() for _ in range(n)]
    for a, b in part.T.tolist():
      near[a].add(b)
      near[b].add(a)
    found.append(near)
  return found


def official(depth):
  """Trees, counters and sets."""
  from collections import Counter

  parts = _sets()
  near = parts[0]
  decay = len(near) / sum(map(len, near))

  def tree(root):
    levels, ends = [], [root]
    for _ in range(depth):
      ends = [v for u in ends for v in near[u]]
      levels.append(ends)
    return [Counter(level) for level in levels], [set(level) for level in levels]

  def overlap(own, other, train):
    inter = norm = 0.0
    for a, (count, reached) in enumerate(zip(*own, strict=True)):
      for b, there in enumerate(other[1]):
        inter += sum(count[u] for u in reached & there) * decay ** (a + b)
        norm += (sum(count.values()) - (train and a == b == 0)) * decay ** (a + b)
    return inter / norm

  def run():
    out = []
    for t, part in enumerate(parts):
      values = []
      for i, targets in enumerate(part):
        if len(targets) > (t == 0) and near[i]:
          own = tree(i)
          values.append(sum(overlap(own, tree(j), t == 0) for j in targets) / len(targets))
        else:
          values.append(0.0)
      out.append(values)
    return out

  return run


def sets():
  """Intersections of neighbour sets."""
  parts = _sets()
  near = parts[0]

  def share(i, targets, own):
    possible = len(targets) * (len(near[i]) - own)
    return sum(len(near[i] & near[j]) for j in targets) / possible if possible else 0.0

  return lambda: [[share(i, targets, t == 0) for i, targets in enumerate(part)] for t, part in enumerate(parts)]


def networkx():
  """clustering: the train edges alone."""
  import networkx as nx

  parts, n = _split()
  graph = nx.empty_graph(n)
  graph.add_edges_from(parts[0].T.tolist())
  return lambda: nx.clustering(graph)


@functools.cache
def _random():
  from jaxlab.data import synthetic

  return synthetic.erdos_renyi(NODES, EDGES)


def approximate():
  """approximate, 64 wide, two levels."""
  import jax
  import numpy as np

  from jaxlab.graph import common_neighbors, sparse
  from jaxlab.graph.links import topological_concentration as tc

  operator = jax.tree.map(jax.numpy.asarray, sparse.from_scipy(common_neighbors.adjacency(np.stack(_random()), NODES)))
  atc = jax.jit(lambda operator, key: tc.approximate(operator, key, depth=2))
  return lambda: jax.block_until_ready(atc(operator, jax.random.key(0)))


def torch_approximate():
  """The same with torch.sparse products."""
  import numpy as np
  import scipy.sparse
  import torch

  senders, receivers = _random()
  a = scipy.sparse.csr_array((np.ones(len(senders), "float32"), (receivers, senders)), (NODES, NODES))
  degree = torch.from_numpy(np.diff(a.indptr)).float().clamp(min=1)
  a = torch.sparse_csr_tensor(
    torch.from_numpy(a.indptr), torch.from_numpy(a.indices), torch.from_numpy(a.data), (NODES, NODES)
  )
  decay = NODES / (2 * EDGES)

  def run():
    h = torch.randn(NODES, 64) / 8
    total = torch.zeros_like(h)
    for k in range(2):
      h = (a @ h) / degree[:, None]
      total += decay**k * h
    return (total * ((a @ total) / degree[:, None])).sum(1)

  return run


def cases():
  """Exact TC of one and two levels, and ATC."""
  part = functools.partial
  return [
    Case(
      "TC, K = 1, three splits of Cora", part(exact, 1),
      {"the official method, Python": part(official, 1), "sets of neighbours, Python": sets},
    ),
    Case("TC, K = 2, three splits of Cora", part(exact, 2), {"the official method, Python": part(official, 2)}),
    Case("clustering coefficients of Cora", clustering, {"networkx": networkx}),
    Case("ATC, K = 2, 1,000,000 edges, 64 wide", approximate, {"torch.sparse": torch_approximate}),
  ]  # fmt: skip


def clustering():
  """concentration of the train edges."""
  from jaxlab.graph import common_neighbors
  from jaxlab.graph.links import topological_concentration as tc

  parts, n = _split()
  graph = common_neighbors.adjacency(parts[0], n)
  return lambda: tc.concentration(graph)
