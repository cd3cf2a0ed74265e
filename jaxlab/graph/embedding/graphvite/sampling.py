"""Augmented edges: pairs of nodes that random walks visit within a few steps of each other, dealt to blocks. Host."""

import concurrent.futures
import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

from jaxlab import checks
from jaxlab.graph.embedding.graphvite import _kernels
from jaxlab.graph.embedding.graphvite.partition import Partition

_STREAMS = 8  # independent sequences of random numbers that fill a pool, whatever the threads
_WASTE = 100  # pairs drawn for each place in a pool before blocks are held to be unreachable


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How positive pairs are drawn.

  Attributes:
    augmentation_step: s, the largest distance of a pair along a walk; 1 draws edges. None: log(1600) / log(E / N)
      rounded down, at least 1.
    walk_length: L, steps of a walk.
    shuffle_base: b, the stride of the pseudo shuffle; None: s. 1 leaves pairs as they come.
    p: node2vec's return parameter: steps back to the node before have weight 1 / p.
    q: its in-out parameter: steps to nodes that are no neighbours of the node before have weight 1 / q.
  """

  augmentation_step: int | None = None
  walk_length: int = 40
  shuffle_base: int | None = None
  p: float = 1.0
  q: float = 1.0

  def resolve(self, num_nodes: int, num_edges: int) -> "Sampling":
    """The same without None. Raises ValueError for values out of range."""
    step = self.augmentation_step
    if step is None:
      density = num_edges / num_nodes
      step = min(self.walk_length, max(1, int(math.log(1600) / math.log(density)))) if density > 1 else 1
    base = step if self.shuffle_base is None else self.shuffle_base
    for name, value in (("walk_length", self.walk_length), ("augmentation_step", step), ("shuffle_base", base)):
      checks.count(name, value, 1)
    if step > self.walk_length:
      raise ValueError(f"augmentation_step: got {step}, expected at most walk_length, {self.walk_length}")
    for name, number in (("p", self.p), ("q", self.q)):
      if not 0 < number < math.inf:
        raise ValueError(f"{name}: got {number}, expected a positive number")
    return dataclasses.replace(self, augmentation_step=step, shuffle_base=base)


class Graph(NamedTuple):
  """Edges to draw and walk on.

  Attributes:
    walkable: rows of neighbours with alias tables.
    degree: [N] float64, sums of weights of the edges that leave a node.
    num_edges: E, as given: an epoch is as many samples.
  """

  walkable: _kernels.Walkable
  degree: Float[np.ndarray, " N"]
  num_edges: int


def graph(
  edges: Int[np.ndarray, "2 E"],
  num_nodes: int,
  weights: Float[np.ndarray, " E"] | None = None,
  *,
  directed: bool = False,
  normalize: bool = False,
) -> Graph:
  """Host. Prepares a graph for sampling.

  Args:
    edges: [2, E]; an undirected edge is given once and walked both ways. Weights of repeated edges add up.
    num_nodes: N.
    weights: [E] positive; None: 1.
    directed: walk edges from row 0 to row 1 only.
    normalize: divide each weight by the square root of the product of both degrees.

  Raises:
    ValueError: an argument of another shape or range.
  """
  checks.count("num_nodes", num_nodes, 1)
  edges = np.asarray(edges)
  if edges.ndim != 2 or edges.shape[0] != 2 or edges.shape[1] == 0:
    raise ValueError(f"edges: got shape {edges.shape}, expected [2, E] with E at least 1")
  if not np.issubdtype(edges.dtype, np.integer):
    raise ValueError(f"edges: got dtype {edges.dtype}, expected integers")
  if edges.min() < 0 or edges.max() >= num_nodes:
    raise ValueError(f"edges: got nodes {edges.min()} to {edges.max()}, expected [0, {num_nodes})")
  w = np.ones(edges.shape[1]) if weights is None else np.asarray(weights, np.float64)
  if w.shape != edges.shape[1:]:
    raise ValueError(f"weights: got shape {w.shape}, expected [{edges.shape[1]}], one for each edge")
  if not ((w > 0) & np.isfinite(w)).all():
    raise ValueError(f"weights: got {w.min()} to {w.max()}, expected positive numbers")
  senders, receivers = edges
  if not directed:
    other = senders != receivers  # a self-loop is stored once
    senders, receivers = np.concatenate([senders, receivers[other]]), np.concatenate([receivers, senders[other]])
    w = np.concatenate([w, w[other]])
  matrix: Any = scipy.sparse.csr_array((w, (senders, receivers)), (num_nodes, num_nodes))
  matrix.sum_duplicates()
  starts, columns, w = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data
  rows = np.repeat(np.arange(num_nodes, dtype=np.int32), np.diff(starts))
  if normalize:
    out, into = np.bincount(rows, w, num_nodes), np.bincount(columns, w, num_nodes)
    w = w / np.sqrt(out[rows] * (into if directed else out)[columns])
  none = np.zeros(0, np.float32), np.zeros(0, np.int32)
  uniform = bool((w == w[0]).all())
  of_edges = none if uniform else _kernels.alias_tables(w, np.array([0, len(w)]))
  of_rows = none if uniform else _kernels.alias_tables(w, starts)
  walkable = _kernels.Walkable(starts, columns, rows, *of_edges, *of_rows)
  return Graph(walkable, np.bincount(rows, w, num_nodes), edges.shape[1])


def walks(
  graph: Graph, count: int, seed: int, sampling: Sampling = Sampling()
) -> tuple[Int[np.ndarray, "count L1"], Int[np.ndarray, " count"]]:
  """Host. Random walks that start with an edge drawn by weight.

  Returns:
    [count, L + 1] nodes; [count] steps made, less than L where a walk met a dead end (what follows is -1).
  """
  checks.count("count", count, 1)
  sampling = sampling.resolve(len(graph.degree), graph.num_edges)
  chains, lengths = np.full((count, sampling.walk_length + 1), -1, np.int32), np.empty(count, np.int64)
  _kernels.walk(graph.walkable, _seed(seed), 0, 1 / sampling.p, 1 / sampling.q, chains, lengths)
  return chains, lengths


def pool(
  graph: Graph,
  partition: Partition,
  block_samples: int,
  seed: int,
  sampling: Sampling = Sampling(),
  *,
  threads: int | None = None,
) -> Int[np.ndarray, "P P Q 2"]:
  """Host. The samples of one episode: every block gets exactly Q; what walks bring beyond that is dropped.

  Sample t of a block goes to slot (t mod b) (Q / b) + floor(t / b): the pseudo shuffle, which moves pairs that one
  walk brought in a row far from each other.

  Args:
    graph: to walk on.
    partition: of its nodes.
    block_samples: Q, a multiple of b.
    seed: the result depends on it, not on `threads`.
    sampling: how to draw.
    threads: to draw with; None: as many as cores.

  Returns:
    [P, P, Q, 2] int32: rows (head, tail) within their parts, by part of the tail and part of the head.

  Raises:
    ValueError: an argument out of range, or no walk ever gets from one part to another.
  """
  sampling = sampling.resolve(len(graph.degree), graph.num_edges)
  step, base = sampling.augmentation_step, sampling.shuffle_base
  assert step is not None and base is not None
  checks.count("block_samples", block_samples, 1)
  if block_samples % base:
    raise ValueError(f"block_samples: got {block_samples}, expected a multiple of shuffle_base, {base}")
  threads = checks.threads(threads)
  parts = len(partition.sizes)
  samples = np.empty((parts, parts, block_samples, 2), np.int32)
  streams = min(_STREAMS, block_samples)
  bounds = np.linspace(0, block_samples, streams + 1).astype(int)
  length = 1 if step == 1 else sampling.walk_length

  def fill(stream: int) -> int:
    begin, end = bounds[stream], bounds[stream + 1]
    limit = _WASTE * parts**2 * (end - begin + _kernels.WALKS * length)
    back, away, one = 1 / sampling.p, 1 / sampling.q, _seed(seed, stream)
    return _kernels.fill(
      graph.walkable, partition.place, samples, begin, end, base, step, length, back, away, one, limit
    )

  with concurrent.futures.ThreadPoolExecutor(threads) as executor:
    drawn = list(executor.map(fill, range(streams)))
  if min(drawn) < 0:
    raise ValueError(f"num_parts: got {parts}, expected few enough for walks to join every part with every other")
  return samples


def _seed(*numbers: int) -> np.uint64:
  return np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
