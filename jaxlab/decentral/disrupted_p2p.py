"""Fully decentralised learning on a graph of peers, some of which vanish.

    w_i <- sum_{j in N_t(i) + i} p_ij w_j,   p_ij proportional to 1 or to n_j;      then local SGD where there is data

Palmieri, Boldrini, Valerio, Passarella and Conti, "Exploring the Impact of Disrupted Peer-to-Peer Communications on
Fully Decentralized Learning in Disaster Scenarios", 2023, arXiv:2310.02986. Symbols: N_t(i) are the neighbours alive at
round t, n_j a peer's examples, K the `removed` peers, t_d the round `time` from which on they are gone with their edges
and data.

Two scenarios separate what is lost. A, data loss: all peers hold data. B, connectivity only: peers of K hold none and
only relay; with the data of all spread over the others (B), or with as much a peer as in A (B'). After the disruption A
and B' have the same graph and the same data, and differ in what was learnt before.

    world = World(clients, adjacency, removed, time)        # arrays: one compiled round serves all scenarios
    learner(simulator.classifier(network, optimizer), work)

No official code is known. Settings without evidence in the abstract are ours: 50 peers, Barabasi-Albert with 2 edges a
newcomer, equal weights by default, because a relay without data would pass on nothing under weights n_j; under these a
neighbourhood without any data averages equally (a floor n_min of the weights is not provided).
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlab import checks
from jaxlab.decentral import gossip, partition, simulator
from jaxlab.decentral.partition import Clients
from jaxlab.decentral.simulator import Peers
from jaxlab.train import Batch, Learner, Metrics

Weights = Literal["uniform", "data"]
Selection = Literal["degree", "betweenness", "random"]
Scenario = Literal["A", "B", "B'"]


class World(NamedTuple):
  """Peers, their graph and its disruption; a batch of `learner`.

  Attributes:
    clients: data of the N peers.
    adjacency: [N, N] symmetric, no self-loops.
    removed: [N] K.
    time: t_d, the first round without them; rounds count from 0, and at 0 they never were there.
  """

  clients: Clients
  adjacency: Bool[Any, "n n"]
  removed: Bool[Any, " n"]
  time: Int[Any, ""]


def learner(
  local: Learner, work: simulator.Work, *, weights: Weights = "uniform", common: bool = True, at_once: int = 64
) -> Learner:
  """DecAvg: each round, peers that are alive average with their neighbours, then train on their own data.

  Args:
    local: the learner of one peer.
    work: its local training in a round.
    weights: of a neighbourhood average: equal, or by numbers of examples (a neighbourhood without any: equal).
    common: whether all start from the same weights; the paper's setting has no coordinator, so they would not.
    at_once: peers evaluated at once.

  Returns:
    A learner on a `World`. Metrics of a round: `loss`, `sent`. `evaluate` takes {"image", "label"} and gives every
    peer's `accuracy` [N], the removed as they were when they vanished.
  """
  checks.choice("weights", weights, Weights)

  def init(key: Key[Array, ""], world: World) -> Peers:
    n = world.clients.num_clients
    if jnp.shape(world.adjacency) != (n, n):
      raise ValueError(f"adjacency: got shape {jnp.shape(world.adjacency)}, expected [{n}, {n}], the clients'")
    if jnp.shape(world.removed) != (n,):
      raise ValueError(f"removed: got shape {jnp.shape(world.removed)}, expected [{n}]")
    return simulator.peers(local, key, world.clients, common=common)

  def step(state: Peers, world: World) -> tuple[Peers, Metrics]:
    data = world.clients
    alive = ~jnp.asarray(world.removed, bool) | (state.round < world.time)
    matrix = neighbourhood(world.adjacency, alive, data.count if weights == "data" else None)
    mixed = simulator.mix(matrix, state.clients)
    # The identity's rows would still round; who is gone stays exactly as it was.
    mixed = simulator.select(alive, mixed, state.clients)
    keys = simulator.client_keys(state.key, state.round, jnp.arange(data.num_clients))
    clients, metrics = simulator.train_clients(local, mixed, data, keys, work, active=alive)
    trained = alive & (jnp.asarray(data.count) > 0)
    sent = state.sent + gossip.transfers(matrix)
    loss = jnp.sum(metrics["loss"] * trained) / jnp.maximum(jnp.sum(trained), 1)
    return Peers(state.round + 1, clients, state.key, sent), {"loss": loss, "sent": sent}

  def evaluate(state: Peers, test: Batch) -> Metrics:
    return {"accuracy": simulator.evaluate_clients(local, state.clients, test, at_once=at_once)["accuracy"]}

  return Learner(init, step, evaluate)


def neighbourhood(
  adjacency: Bool[Any, "n n"], alive: Bool[Any, " n"], count: Int[Any, " n"] | None = None
) -> Float[Array, "n n"]:
  """p_ij, the averaging matrix among the living: equal weights, or by `count` n_j."""
  weight = None if count is None else jnp.asarray(count, jnp.float32)
  return gossip.restrict(jnp.asarray(adjacency), jnp.asarray(alive, bool), weight)


# ------------------------------------------------------------------------------------------------------- host: graphs


def barabasi_albert(n: int, m: int, *, seed: int) -> Bool[np.ndarray, "n n"]:
  """Host. A graph by preferential attachment: from a star of m + 1, each newcomer joins m others by their degree.

  Args:
    n: peers.
    m: edges of each newcomer, below n.
    seed: of the draws.

  Returns:
    [N, N] adjacency with m (n - m) edges, connected.
  """
  checks.count("m", m)
  if checks.count("n", n) <= m:
    raise ValueError(f"n: got {n}, expected more than m, {m}")
  rng, adjacency = np.random.default_rng(seed), np.zeros((n, n), bool)
  ends: list[int] = []  # each node as often as its degree
  for node in range(m, n):
    if node == m:
      targets = list(range(m))
    else:
      found: set[int] = set()
      while len(found) < m:
        found.add(ends[rng.integers(len(ends))])
      targets = sorted(found)
    adjacency[node, targets] = adjacency[targets, node] = True
    ends += targets + [node] * m
  return adjacency


def erdos_renyi(n: int, p: float, *, seed: int) -> Bool[np.ndarray, "n n"]:
  """Host. Each pair is joined with probability p."""
  checks.count("n", n)
  if not 0 <= p <= 1:
    raise ValueError(f"p: got {p}, expected a probability")
  upper = np.triu(np.random.default_rng(seed).random((n, n)) < p, 1)
  return upper | upper.T


def block_model(sizes: Sequence[int], inside: float, between: float, *, seed: int) -> Bool[np.ndarray, "n n"]:
  """Host. Pairs of one block are joined with probability `inside`, others with `between`."""
  if not (0 <= between <= 1 and 0 <= inside <= 1):
    raise ValueError(f"inside, between: got {inside}, {between}, expected probabilities")
  block = np.repeat(np.arange(len(sizes)), sizes)
  p = np.where(block[:, None] == block, inside, between)
  upper = np.triu(np.random.default_rng(seed).random(p.shape) < p, 1)
  return upper | upper.T


def star(n: int) -> Bool[np.ndarray, "n n"]:
  """Host. Peer 0 is joined with all."""
  adjacency = np.zeros((checks.count("n", n), n), bool)
  adjacency[0, 1:] = adjacency[1:, 0] = True
  return adjacency


# -------------------------------------------------------------------------------------------------- host: disruptions


def choose_removed(
  adjacency: Bool[np.ndarray, "n n"], share: float, by: Selection = "degree", *, seed: int
) -> Bool[np.ndarray, " n"]:
  """Host. K: a share of the peers, the most central ones or any.

  Args:
    adjacency: [N, N].
    share: of the peers, rounded to a whole number of them.
    by: highest degree, highest betweenness, or random. Ties are broken at random.
    seed: of the draws.
  """
  checks.choice("by", by, Selection)
  if not 0 <= share <= 1:
    raise ValueError(f"share: got {share}, expected a number in [0, 1]")
  adjacency = np.asarray(adjacency, bool)
  score = {
    "degree": lambda: adjacency.sum(1).astype(float),
    "betweenness": lambda: betweenness(adjacency),
    "random": lambda: np.zeros(len(adjacency)),
  }[by]()
  order = np.lexsort((np.random.default_rng(seed).random(len(score)), -score))
  removed = np.zeros(len(score), bool)
  removed[order[: round(share * len(score))]] = True
  return removed


def betweenness(adjacency: Bool[np.ndarray, "n n"]) -> Float[np.ndarray, " n"]:
  """Host. For each node, the sum over pairs of others of the share of their shortest paths that pass through it.

  b_v = sum_{s < t} sigma_st(v) / sigma_st,   sigma_st(v) = sigma_sv sigma_vt where d_sv + d_vt = d_st
  """
  a = np.asarray(adjacency, bool).astype(np.float64)
  n = len(a)
  distance = scipy.sparse.csgraph.shortest_path(scipy.sparse.csr_array(a), unweighted=True)
  paths, walks = np.eye(n), np.eye(n)
  for length in range(1, n):
    # A walk as long as the distance is a shortest path.
    walks = np.where(distance == length - 1, paths, 0.0) @ a
    if not (distance == length).any():
      break
    paths = np.where(distance == length, walks, paths)
  result = np.zeros(n)
  for v in range(n):
    through = distance[:, v, None] + distance[v] == distance
    with np.errstate(invalid="ignore", divide="ignore"):
      share = np.where(through & np.isfinite(distance), np.outer(paths[:, v], paths[v]) / paths, 0.0)
    share[v] = share[:, v] = 0.0
    np.fill_diagonal(share, 0.0)
    result[v] = share.sum() / 2
  return result


def scenario(
  labels: Int[np.ndarray, " e"], removed: Bool[np.ndarray, " n"], kind: Scenario, *, seed: int
) -> list[Int[np.ndarray, " _"]]:
  """Host. Rows of each peer: stratified, disjoint, as many for each that holds data.

  Args:
    labels: of all examples.
    removed: K.
    kind: A, all hold data; B, the same total is held by the others; B', the others hold what they hold in A.
    seed: of the shuffle.
  """
  checks.choice("kind", kind, Scenario)
  removed = np.asarray(removed, bool)
  if kind == "B":
    return partition.iid(labels, len(removed), holders=~removed, seed=seed)
  parts = partition.iid(labels, len(removed), seed=seed)
  if kind == "A":
    return parts
  return [np.zeros(0, np.int64) if gone else part for part, gone in zip(parts, removed, strict=True)]


class Structure(NamedTuple):
  """What a disruption does to a graph.

  Attributes:
    component: [N] number of each survivor's component, -1 for the removed.
    components: how many there are.
    giant: size of the largest.
    connectivity: second smallest eigenvalue of the survivors' Laplacian; 0 where they are not connected.
    distance: [N] steps from each survivor to the nearest removed peer before the disruption; inf if none.
  """

  component: Int[np.ndarray, " n"]
  components: int
  giant: int
  connectivity: float
  distance: Float[np.ndarray, " n"]

  @property
  def size(self) -> Int[np.ndarray, " n"]:
    """[N] size of each survivor's component, 0 for the removed."""
    sizes = np.bincount(self.component[self.component >= 0], minlength=1)
    return np.where(self.component >= 0, sizes[self.component], 0)


def structure(adjacency: Bool[np.ndarray, "n n"], removed: Bool[np.ndarray, " n"]) -> Structure:
  """Host. Components, connectivity and distances when `removed` are gone."""
  adjacency, alive = np.asarray(adjacency, bool), ~np.asarray(removed, bool)
  if not alive.any():
    raise ValueError("removed: got all peers, expected survivors")
  rest = adjacency[np.ix_(alive, alive)]
  components, found = scipy.sparse.csgraph.connected_components(scipy.sparse.csr_array(rest), directed=False)
  component = np.full(len(alive), -1)
  component[alive] = found
  laplacian = np.diag(rest.sum(1)).astype(float) - rest
  eigenvalues = np.linalg.eigvalsh(laplacian)
  connectivity = 0.0 if components > 1 or len(rest) < 2 else float(eigenvalues[1])
  distance = np.full(len(alive), np.inf)
  if not alive.all():
    steps = scipy.sparse.csgraph.shortest_path(scipy.sparse.csr_array(adjacency.astype(float)), unweighted=True)
    distance = steps[:, ~alive].min(1)
  return Structure(component, components, int(np.bincount(found).max()), connectivity, distance)


class MLP(nn.Module):
  """Fully connected layers with ReLU; the group's network for MNIST is 784-512-256-128-10.

  Attributes:
    num_classes: C.
    hidden: widths.
    dtype: of the computation.
    param_dtype: of the weights.
  """

  num_classes: int = 10
  hidden: tuple[int, ...] = (512, 256, 128)
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b ..."], *, train: bool = False) -> Float[Array, "b c"]:
    """Logits [B, C] of images [B, ...]."""
    x = x.reshape(x.shape[0], -1)
    for width in self.hidden:
      x = nn.relu(nn.Dense(width, dtype=self.dtype, param_dtype=self.param_dtype)(x))
    return nn.Dense(self.num_classes, dtype=self.dtype, param_dtype=self.param_dtype)(x)
