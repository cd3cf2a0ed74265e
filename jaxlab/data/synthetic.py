"""Random graphs: communities and features to learn on, tasks for graph networks, and plain graphs to scale on.

Plain ones may have 10^4 to 10^7 edges. NumPy throughout; every function of a seed gives the same graph on every
machine.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

from jaxlab import checks
from jaxlab.data import node
from jaxlab.data.node import NodeDataset

Edges = tuple[Int[np.ndarray, " e"], Int[np.ndarray, " e"]]


def citation(
  num_nodes: int = 2000,
  num_classes: int = 5,
  *,
  mean_degree: float = 8.0,
  homophily: float = 0.8,
  degree_exponent: float = 2.5,
  num_features: int = 500,
  words_per_node: int = 20,
  topic_share: float = 0.3,
  train_per_class: int = 20,
  val: int = 500,
  test: int | None = 1000,
  seed: int = 0,
) -> NodeDataset:
  """Host. A stand-in for citation and co-purchase graphs: degree-corrected block model with sparse bags of words.

  Edges are drawn one by one: an end by weight, then with probability `homophily` a partner of the same class, else of
  another class, again by weight (Karrer and Newman 2011). Weights follow a power law. The vocabulary is divided evenly
  among the classes; each word of a node is from its class's part with probability `topic_share`, else from anywhere.

  Args:
    num_nodes: N; classes are of equal size up to one.
    num_classes: C, at least 2.
    mean_degree: distinct neighbours of a node on average, at most a quarter of a class.
    homophily: fraction of edges within a class, in expectation.
    degree_exponent: of the weights' power law, above 2; larger is more even.
    num_features: F, the vocabulary, at least C.
    words_per_node: words drawn a node, with repetition; features say only whether a word occurs.
    topic_share: see above; 0 makes features useless.
    train_per_class: as `node.random_split`, also for `val` and `test`.
    val: validation nodes.
    test: test nodes; None for all others.
    seed: of everything.

  Returns:
    Features in CSR of ones.

  Raises:
    ValueError: an argument out of range.
  """
  checks.count("num_classes", num_classes, 2)
  checks.count("num_nodes", num_nodes, 8 * num_classes)
  checks.real("mean_degree", mean_degree, 0.0, num_nodes / num_classes / 4)
  checks.real("homophily", homophily)
  checks.real("degree_exponent", degree_exponent, 2.0001, 1e6)
  checks.count("num_features", num_features, num_classes)
  checks.count("words_per_node", words_per_node, 1)
  checks.real("topic_share", topic_share)
  rng = np.random.default_rng(checks.count("seed", seed, 0))

  labels = rng.permutation(np.arange(num_nodes) % num_classes).astype(np.int32)
  by_class = np.argsort(labels, kind="stable")
  starts = np.searchsorted(labels[by_class], np.arange(num_classes + 1))
  # Cut at sqrt(N), without which one node could want more neighbours than there are.
  weights = np.minimum(rng.pareto(degree_exponent - 1, num_nodes) + 1, np.sqrt(num_nodes))
  # cumulative[starts[c]] to cumulative[starts[c + 1]] is the weight of class c: one search draws from any class.
  cumulative = np.concatenate([[0.0], np.cumsum(weights[by_class])])

  def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
    first = by_class[_inverse(cumulative, rng.random(count) * cumulative[-1])]
    same = rng.random(count) < homophily
    other = (labels[first] + rng.integers(1, num_classes, count)) % num_classes
    target = np.where(same, labels[first], other)
    low, high = cumulative[starts[target]], cumulative[starts[target + 1]]
    return first, by_class[_inverse(cumulative, low + rng.random(count) * (high - low))]

  edges = _distinct(draw, round(num_nodes * mean_degree / 2), num_nodes, rng)

  shape = (num_nodes, words_per_node)
  bounds = np.linspace(0, num_features, num_classes + 1).astype(int)
  low, high = bounds[labels][:, None], bounds[labels + 1][:, None]
  words = np.where(
    rng.random(shape) < topic_share, rng.integers(low, high, shape), rng.integers(0, num_features, shape)
  )
  pairs = node.unique(np.repeat(np.arange(num_nodes), words_per_node) * num_features + words.reshape(-1))
  features = scipy.sparse.csr_array(
    (np.ones(len(pairs), np.float32), (pairs // num_features, pairs % num_features)), shape=(num_nodes, num_features)
  )
  nothing = np.zeros(num_nodes, bool)
  dataset = NodeDataset(features, *edges, labels, nothing, nothing, nothing)
  return node.random_split(dataset, seed=seed, train_per_class=train_per_class, val=val, test=test)


def erdos_renyi(num_nodes: int, num_edges: int, *, seed: int = 0) -> Edges:
  """Host. The G(n, m) model: a uniformly random simple graph with exactly `num_edges` undirected edges.

  Args:
    num_nodes: n, at least 2.
    num_edges: m, at most half of all pairs (beyond that, draw the complement).
    seed: of the graph.

  Returns:
    (senders, receivers) int32 of both directions, [2m] each, sorted by receiver, then sender.
  """
  checks.count("num_nodes", num_nodes, 2, 2**31 - 1)
  checks.count("num_edges", num_edges, 0, num_nodes * (num_nodes - 1) // 4)
  rng = np.random.default_rng(checks.count("seed", seed, 0))

  def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(0, num_nodes, count), rng.integers(0, num_nodes, count)

  return _distinct(draw, num_edges, num_nodes, rng)


def barabasi_albert(num_nodes: int, attachments: int, *, seed: int = 0) -> Edges:
  """Host. Growth by preferential attachment: each new node links to `attachments` earlier ends of edges, at random.

  This is the linearised chord diagram of Bollobas and Riordan (2004), in which the other end of edge e is a uniform
  pick among the 2e + 1 ends so far. All picks are made at once and then followed back to a known node (Sanders and
  Schulz 2016, arXiv:1602.07106). Repeated edges and self-loops are dropped afterwards, so that somewhat fewer than
  `num_nodes * attachments` edges remain. Degrees follow a power law with exponent 3.

  Args:
    num_nodes: n, at least 2.
    attachments: m, edges that a node brings.
    seed: of the graph.

  Returns:
    (senders, receivers) int32 of both directions, sorted by receiver, then sender.
  """
  checks.count("num_nodes", num_nodes, 2, 2**31 - 1)
  checks.count("attachments", attachments, 1, num_nodes - 1)
  rng = np.random.default_rng(checks.count("seed", seed, 0))
  count = num_nodes * attachments
  # Ends are numbered: end 2e is the new node of edge e, end 2e + 1 is a copy of end picked[e].
  picked = rng.integers(0, 2 * np.arange(count) + 1)
  end = picked.copy()
  open_edges = np.flatnonzero(end % 2)
  while len(open_edges):
    end[open_edges] = picked[end[open_edges] // 2]
    open_edges = open_edges[end[open_edges] % 2 == 1]
  return node.undirected(np.arange(count) // attachments, end // 2 // attachments, num_nodes)


def stochastic_blocks(sizes: Sequence[int], probabilities: Float[np.ndarray, "b b"], *, seed: int = 0) -> Edges:
  """Host. The stochastic block model: nodes in blocks, every edge independent, its probability set by the ends' blocks.

  Args:
    sizes: of the blocks; nodes are numbered block by block.
    probabilities: [B, B], symmetric.
    seed: of the graph.

  Returns:
    (senders, receivers) int32 of both directions, sorted by receiver, then sender.

  Raises:
    ValueError: probabilities of another shape, out of range or not symmetric.
  """
  p = np.asarray(probabilities, float)
  if p.shape != (len(sizes), len(sizes)) or not ((p >= 0) & (p <= 1)).all() or (p != p.T).any():
    raise ValueError(f"probabilities: got {p}, expected a symmetric {len(sizes)} x {len(sizes)} matrix in [0, 1]")
  starts = np.cumsum([0, *(checks.count("sizes", size, 1) for size in sizes)])
  rng = np.random.default_rng(checks.count("seed", seed, 0))
  low, high = [], []
  for a, b in zip(*np.triu_indices(len(sizes)), strict=True):
    n, m = sizes[int(a)], sizes[int(b)]
    pairs = n * (n - 1) // 2 if a == b else n * m
    chosen = rng.choice(pairs, rng.binomial(pairs, p[a, b]), replace=False, shuffle=False)
    if a == b:  # pair number j (j - 1) / 2 + i for i < j
      column = ((1 + np.sqrt(1 + 8 * chosen)) / 2).astype(np.int64)
      row = chosen - column * (column - 1) // 2
    else:
      row, column = chosen // m, chosen % m
    low.append(starts[a] + row)
    high.append(starts[b] + column)
  return node.undirected(np.concatenate(low), np.concatenate(high), int(starts[-1]))


class Fans(NamedTuple):
  """Edges from fans to the accounts that they follow, and the community of each account.

  Attributes:
    senders: [E] int64 fans, ascending.
    receivers: [E] int32 accounts, ascending for each fan.
    labels: [A] int32.
  """

  senders: Int[np.ndarray, " e"]
  receivers: Int[np.ndarray, " e"]
  labels: Int[np.ndarray, " a"]


def fans(
  num_accounts: int,
  num_fans: int,
  num_communities: int,
  *,
  mean_follows: float = 20.0,
  loyalty: float = 0.8,
  popularity_exponent: float = 2.5,
  part: int = 0,
  seed: int = 0,
) -> Fans:
  """Host. A bipartite graph of fans who follow accounts, mostly of one community: what a social network's stars see.

  A fan has a uniformly random community and draws a Poisson number of accounts by popularity, each from this community
  with probability `loyalty`, else from all; accounts drawn twice are followed once. Popularities follow a power law.

  Args:
    num_accounts: A.
    num_fans: of this part.
    num_communities: of accounts, of equal size up to one.
    mean_follows: draws of a fan on average.
    loyalty: see above.
    popularity_exponent: of the power law, above 2; larger is more even.
    part: fans of another part, numbered from `part * num_fans`, follow the same accounts: a graph larger than memory
      is a sequence of parts.
    seed: of everything.
  """
  checks.count("num_communities", num_communities, 1)
  checks.count("num_accounts", num_accounts, num_communities, 2**31 - 1)
  checks.count("num_fans", num_fans, 1)
  checks.real("mean_follows", mean_follows, 0.0, 1e6)
  checks.real("loyalty", loyalty)
  checks.real("popularity_exponent", popularity_exponent, 2.0001, 1e6)
  checks.count("part", part, 0)
  rng = np.random.default_rng(checks.count("seed", seed, 0))
  labels = rng.permutation(np.arange(num_accounts) % num_communities).astype(np.int32)
  by_community = np.argsort(labels, kind="stable")
  starts = np.searchsorted(labels[by_community], np.arange(num_communities + 1))
  popularity = np.minimum(rng.pareto(popularity_exponent - 1, num_accounts) + 1, np.sqrt(num_accounts))
  cumulative = np.concatenate([[0.0], np.cumsum(popularity[by_community])])

  rng = np.random.default_rng([seed, 1 + part])
  fan = np.repeat(np.arange(num_fans), rng.poisson(mean_follows, num_fans))
  home = rng.integers(0, num_communities, num_fans)[fan]
  loyal = rng.random(len(fan)) < loyalty
  low = np.where(loyal, cumulative[starts[home]], 0)
  high = np.where(loyal, cumulative[starts[home + 1]], cumulative[-1])
  account = by_community[_inverse(cumulative, low + rng.random(len(fan)) * (high - low))]
  edges = node.unique(fan * num_accounts + account)
  return Fans(edges // num_accounts + part * num_fans, (edges % num_accounts).astype(np.int32), labels)


class Dictionaries(NamedTuple):
  """Graphs of `dictionary_lookup`: the same 2n nodes and n^2 edges in each, other values.

  Attributes:
    nodes: [S, 2n, 2] (key, value); nodes 0 to n - 1 ask for a key and have the value n, which stands for none.
    senders: [n^2] of each graph: nodes n to 2n - 1, which hold values.
    receivers: [n^2], ascending: nodes 0 to n - 1.
    labels: [S, n] the value of the key that node i asks for.
  """

  nodes: Int[np.ndarray, "s m 2"]
  senders: Int[np.ndarray, " e"]
  receivers: Int[np.ndarray, " e"]
  labels: Int[np.ndarray, "s n"]


def dictionary_lookup(size: int, num_graphs: int = 5000, *, seed: int = 0) -> Dictionaries:
  """Host. Look up each key of a dictionary: a task for dynamic attention.

  Brody, Alon and Yahav, "How Attentive are Graph Attention Networks?", ICLR 2022, arXiv:2105.14491, section 4.1. Every
  node that asks sees every node that answers; a graph's values are a random permutation of 0 to n - 1.

  Args:
    size: n, number of keys and of values.
    num_graphs: S.
    seed: of the permutations.
  """
  checks.count("size", size, 1, 10_000)
  checks.count("num_graphs", num_graphs, 1)
  rng = np.random.default_rng(checks.count("seed", seed, 0))
  keys = np.arange(size, dtype=np.int32)
  labels = rng.permuted(np.tile(keys, (num_graphs, 1)), axis=1)
  asking = np.stack([keys, np.full(size, size, np.int32)], axis=1)
  answering = np.stack([np.broadcast_to(keys, labels.shape), labels], axis=2)
  nodes = np.concatenate([np.broadcast_to(asking, answering.shape), answering], axis=1)
  return Dictionaries(nodes, np.tile(keys + np.int32(size), size), np.repeat(keys, size), labels)


class LabelledGraphs(NamedTuple):
  """Graphs of `hetero_edge_count`, one after the other; node numbers start at 0 in each.

  Attributes:
    n_node: [S].
    n_edge: [S].
    labels: [sum of n_node] classes.
    senders: [sum of n_edge].
    receivers: [sum of n_edge], ascending in each graph.
    targets: [S] how many edges join nodes of different classes.
  """

  n_node: Int[np.ndarray, " s"]
  n_edge: Int[np.ndarray, " s"]
  labels: Int[np.ndarray, " nodes"]
  senders: Int[np.ndarray, " edges"]
  receivers: Int[np.ndarray, " edges"]
  targets: Int[np.ndarray, " s"]


def hetero_edge_count(
  num_classes: int, num_graphs: int = 5000, *, max_nodes: int = 50, seed: int = 0
) -> LabelledGraphs:
  """Host. Count the edges between nodes of different classes: a task for messages that see both ends.

  The task of Lim et al., TMLR 2025, arXiv:2403.12529, as their code draws it: n uniform in 2 to `max_nodes`, the number
  of directed edges uniform in n^2 // 4 to n^2, edges without repetition among the n^2 pairs (loops are possible),
  classes uniform.

  Args:
    num_classes: c.
    num_graphs: S.
    max_nodes: largest n, at least 2.
    seed: of everything.
  """
  checks.count("num_classes", num_classes, 1)
  checks.count("num_graphs", num_graphs, 1)
  checks.count("max_nodes", max_nodes, 2, 10_000)
  rng = np.random.default_rng(checks.count("seed", seed, 0))
  n_node = rng.integers(2, max_nodes + 1, num_graphs, dtype=np.int32)
  n_edge = rng.integers(n_node**2 // 4, n_node**2 + 1, dtype=np.int32)
  pairs = [np.sort(rng.choice(n * n, e, replace=False)) for n, e in zip(n_node.tolist(), n_edge.tolist(), strict=True)]
  labels = rng.integers(0, num_classes, n_node.sum(), dtype=np.int32)
  pair, size = np.concatenate(pairs), np.repeat(n_node, n_edge)
  senders, receivers = (pair % size).astype(np.int32), (pair // size).astype(np.int32)
  first = np.repeat(np.cumsum(n_node) - n_node, n_edge)
  differ = labels[senders + first] != labels[receivers + first]
  ends = np.concatenate([[0], np.cumsum(differ)])[np.concatenate([[0], np.cumsum(n_edge)])]
  return LabelledGraphs(n_node, n_edge, labels, senders, receivers, np.diff(ends).astype(np.int32))


def _inverse(cumulative: np.ndarray, at: np.ndarray) -> np.ndarray:
  """Index whose interval of the cumulative weights holds `at`; rounding may put `at` on the upper end."""
  return np.minimum(np.searchsorted(cumulative, at, side="right") - 1, len(cumulative) - 2)


def _distinct(draw: Callable[[int], Edges], count: int, num_nodes: int, rng: np.random.Generator) -> Edges:
  """`count` distinct undirected edges without self-loops from repeated draws; surplus is dropped at random."""
  keys = np.zeros(0, np.int64)
  for _ in range(100):
    missing = count - len(keys)
    if missing <= 0:
      break
    a, b = draw(missing + missing // 8 + 16)
    low, high = np.minimum(a, b).astype(np.int64), np.maximum(a, b)
    keys = node.unique(np.concatenate([keys, (low * num_nodes + high)[low != high]]))
  else:
    raise ValueError(f"mean_degree: got a graph of {count} edges that 100 rounds did not fill, expected a sparser one")
  if len(keys) > count:
    keys = np.delete(keys, rng.choice(len(keys), len(keys) - count, replace=False))
  return node.undirected(keys // num_nodes, keys % num_nodes, num_nodes)
