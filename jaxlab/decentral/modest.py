"""MoDeST: federated averaging without a server, where a hash says who trains and who averages in each round.

    S^k = the first s ids that answer, of order(k) = ids sorted by MD5(id || "-" || k)
    trainers of round k: S^k;    aggregators of round k: the first a of S^{k+1};    w^{k+1} = mean of the trained models

De Vos, Dhasade, Kermarrec et al., "MoDeST: Bridging the Gap between Federated and Decentralized Learning with
Decentralized Sampling", 2023, arXiv:2302.13837. Symbols: s is `sample_size`, a `num_aggregators`, sf `success_fraction`
(of s models an aggregator waits for), Delta_k `inactivity` (rounds after which a silent node is no longer sampled).

Every node keeps a view (id -> last round it was active, last membership event). Views travel with the models and form a
join-semilattice under `merge`, so that nodes agree on samples without coordination.

Two parts, since what is learnt does not steer the protocol. `simulate` is the protocol on the host: an event loop with
a clock, latencies, crashes, leaves and joins; its `Trace` says who trained which model and who averaged whose. The
`learner` runs the rounds of a trace on a device, all trainers of a round in one vmapped computation. A trace without
failures is FedAvg with those samples.

Differs from the code of February 2023: merging keeps the later of two activities and the later of two events
separately (as later versions do; there, an event overwrote the activity with its counter). Every model takes the same
time to send; bandwidth is not shared. `timeout` is of later versions: an aggregator then makes do with what it has.
Not provided: what later versions do besides (acknowledgements, aggregators that pass on their models when they leave,
the fastest node as the aggregator), the measured latencies of 227 sites, gossip learning as a baseline.
"""

import collections
import dataclasses
import hashlib
import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxlab import checks, interop
from jaxlab.decentral import gossip, partition, simulator
from jaxlab.train import Batch, Learner, Metrics

Change = Literal["join", "leave"]
Happening = Literal["crash", "leave", "join"]
NO_ACTIVITY = -1


# ------------------------------------------------------------------------------------------------------- host: samples


class Entry(NamedTuple):
  """What a view knows of a node: the last round it was active in, and its last membership event."""

  active: int = NO_ACTIVITY
  counter: int = 0
  change: Change = "join"


View = dict[bytes, Entry]


def merge(a: View, b: View) -> View:
  """Host. What two views know together: the later activity and the later event of each node.

  Events of one node have different counters; should they not, `leave` counts as the later.
  """
  merged = dict(a)
  for node, theirs in b.items():
    mine = merged.get(node, theirs)
    event = max((mine.counter, mine.change == "leave"), (theirs.counter, theirs.change == "leave"))
    merged[node] = Entry(max(mine.active, theirs.active), event[0], "leave" if event[1] else "join")
  return merged


def active(view: View, me: bytes | None = None, round: int = 0, inactivity: int = 50) -> list[bytes]:
  """Host. Nodes that may be sampled in a round: not left, and heard of in the last `inactivity` rounds.

  Args:
    view: of a node.
    me: that node, which is always among them if the view has it.
    round: k; at 0 activity does not matter.
    inactivity: Delta_k.
  """
  return [
    node
    for node, entry in view.items()
    if node == me or (entry.change != "leave" and (not round or entry.active >= round - inactivity))
  ]


def order(nodes: Iterable[bytes], round: int) -> list[bytes]:
  """Host. Nodes in the order in which a round samples them."""
  return sorted(nodes, key=lambda node: (hashlib.md5(b"%s-%d" % (node, round)).digest(), node))


def node_id(i: int) -> bytes:
  """The id of node i."""
  return b"peer-%02d" % i


# ------------------------------------------------------------------------------------------------------ host: protocol


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Settings of the protocol and its clock.

  Attributes:
    sample_size: s.
    num_aggregators: a, at most s.
    success_fraction: sf in (0, 1]; an aggregator waits for as many of s models.
    inactivity: Delta_k in rounds; 50 in the library, 1000 in its simulations. A node that is alive but not sampled for
      as long is dropped, too, so it should be several times n / s.
    ping_timeout: seconds until a node counts as unavailable.
    timeout: seconds after its first model from which on an aggregator averages as soon as it has `least` models; None
      to wait for all it needs.
    least: see `timeout`; at most s.
    model_time: seconds to send a model, besides the latency.
    train_time: seconds to train.
  """

  sample_size: int = 10
  num_aggregators: int = 1
  success_fraction: float = 1.0
  inactivity: int = 50
  ping_timeout: float = 5.0
  timeout: float | None = None
  least: int = 3
  model_time: float = 0.5
  train_time: float = 2.0

  def __post_init__(self) -> None:
    for name in ("sample_size", "num_aggregators", "inactivity", "least"):
      checks.count(name, getattr(self, name))
    if self.num_aggregators > self.sample_size:
      raise ValueError(f"num_aggregators: got {self.num_aggregators}, expected at most sample_size, {self.sample_size}")
    if not 0 < self.success_fraction <= 1:
      raise ValueError(f"success_fraction: got {self.success_fraction}, expected a number in (0, 1]")
    for name in ("ping_timeout", "model_time", "train_time"):
      if not 0 <= getattr(self, name) < np.inf:
        raise ValueError(f"{name}: got {getattr(self, name)}, expected seconds")
    if self.timeout is not None and not 0 < self.timeout < np.inf:
      raise ValueError(f"timeout: got {self.timeout}, expected seconds above 0, or None")
    if self.timeout is not None and self.least > self.sample_size:
      raise ValueError(f"least: got {self.least}, expected at most sample_size, {self.sample_size}")


class Event(NamedTuple):
  """Something that happens to a node when a round is first trained: it crashes, leaves, or joins, maybe again.

  Those of one round happen in the order given. A node whose first event is to join is not there before.
  """

  round: int
  happening: Happening
  node: int


@dataclasses.dataclass
class Trace:
  """What happened. Rounds are 1, 2, ..., R; entry k - 1 of each list is of round k.

  Attributes:
    trained: node -> aggregator whose model it trained (-1 for the common start), in order of completion.
    averaged: aggregator -> nodes whose models it averaged, in order of completion.
    models: models sent over the network in the round: to aggregators, and from them to the next trainers.
    pings: pings to other nodes while the round's aggregators and the next round's trainers were sought.
    failed: those that were not answered.
    time: [R] seconds when the round's first average was made.
    known: joining node -> for each round since it last joined, the share of online nodes whose view has its newest
      event.
  """

  trained: list[dict[int, int]]
  averaged: list[dict[int, list[int]]]
  models: list[int]
  pings: list[int]
  failed: list[int]
  time: list[float]
  known: dict[int, list[float]]


class _Node:
  """State of a node."""

  def __init__(self, number: int, view: View):
    self.number, self.id, self.online = number, node_id(number), True
    self.view, self.pending = dict(view), View()
    self.train_round, self.aggregate_round = 0, 0
    self.training, self.trained, self.averaged, self.overdue = False, False, False, False
    self.received: dict[int, int] = {}  # sender -> 1, in order of arrival
    self.advertised = 1

  @property
  def estimate(self) -> int:
    """The highest round that it knows of."""
    seen = max((entry.active for entry in self.view.values()), default=NO_ACTIVITY)
    return max(self.train_round, self.aggregate_round, seen)

  def heard(self, other: bytes, round: int) -> None:
    """Somebody was active in a round; nodes that are not in the view are not added."""
    if other in self.view:
      entry = self.view[other]
      self.view[other] = entry._replace(active=max(entry.active, round))

  def flush(self) -> None:
    """Joins become part of the view."""
    self.view, self.pending = merge(self.view, self.pending), View()


class _Simulation:
  def __init__(self, protocol: Protocol, nodes: int, latency: np.ndarray, events: Sequence[Event], seed: int):
    self.protocol, self.latency, self.rng = protocol, latency, np.random.default_rng(seed)
    self.events = sorted(events, key=lambda event: event.round)
    later = _absent(self.events)
    self.start_view = {node_id(i): Entry() for i in range(nodes) if i not in later}
    self.nodes = {i: _Node(i, self.start_view) for i in range(nodes) if i not in later}
    self.now, self.sequence = 0.0, 0
    self.queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
    self.trained: dict[int, dict[int, int]] = collections.defaultdict(dict)
    self.averaged: dict[int, dict[int, list[int]]] = collections.defaultdict(dict)
    self.models: dict[int, int] = collections.defaultdict(int)
    self.pings: dict[int, int] = collections.defaultdict(int)
    self.failed: dict[int, int] = collections.defaultdict(int)
    self.time: dict[int, float] = {}
    self.known: dict[int, list[float]] = {}

  def after(self, delay: float, call: Callable[..., None], *given: Any) -> None:
    """Something to do later; what is due at the same time keeps its order."""
    heapq.heappush(self.queue, (self.now + delay, self.sequence, call, given))
    self.sequence += 1

  def run(self, rounds: int) -> None:
    for node in order(active(self.start_view), 1)[: self.protocol.sample_size]:
      self.after(0.0, self.receive_average, self.nodes[_number(node)], 1, -1)
    while self.queue and len(self.averaged) < rounds:
      self.now, _, call, given = heapq.heappop(self.queue)
      call(*given)

  # ---- membership

  def happen(self, round: int) -> None:
    """The events of a round, when it is first trained."""
    while self.events and self.events[0].round <= round:
      _, what, number = self.events.pop(0)
      if what == "join":
        host = self.nodes[int(self.rng.choice([i for i, node in self.nodes.items() if node.online]))]
        before = self.nodes.get(number)
        node = self.nodes[number] = _Node(number, host.view | {node_id(number): Entry()})
        if before is not None:  # its events go on from those that others know of
          node.advertised = before.advertised
        self.known[number] = []
        self.advertise(node, "join")
      else:
        if what == "leave":
          self.advertise(self.nodes[number], "leave")
        self.nodes[number].online = False

  def advertise(self, node: _Node, change: Change) -> None:
    others = [i for i in active(node.view, node.id) if i != node.id]
    count, number = min(self.protocol.sample_size, len(others)), node.advertised
    chosen = [others[i] for i in self.rng.permutation(len(others))[:count]]
    estimate = node.estimate
    for other in chosen:
      to = self.nodes[_number(other)]
      self.after(self.latency[node.number, to.number], self.hear_change, to, node.id, estimate, number, change)
    node.view[node.id] = Entry(node.view[node.id].active, number, change)
    node.advertised += 1

  def hear_change(self, node: _Node, other: bytes, round: int, counter: int, change: Change) -> None:
    if not node.online:
      return
    entry = Entry(max(round, node.estimate), counter, change)
    if change == "join":  # only once it has sent a model, so that the sample in progress stays the same everywhere
      node.pending[other] = entry
    else:
      node.view = merge(node.view, {other: entry})

  # ---- sampling

  def find(self, node: _Node, sample: int, count: int, round: int, found: Callable[[list[int]], None]) -> None:
    """Pings the sample's order until `count` nodes have answered or none is left. `round` is for the account."""
    candidates = order(active(node.view, node.id, sample, self.protocol.inactivity), sample)
    available: list[int] = []
    settled: set[int] = set()
    state = {"next": 0, "done": False}

    def finish() -> None:
      if not state["done"]:
        state["done"] = True
        found(available)

    def answer(other: int, online: bool, estimate: int) -> None:
      if other in settled or not node.online:
        return
      settled.add(other)
      if online:
        node.heard(node_id(other), max(node.estimate, estimate))
        if not state["done"]:
          available.append(other)
      else:
        self.failed[round] += 1
        ask()
      if len(available) == count or (len(settled) == len(candidates)):
        finish()

    def ask() -> None:
      if state["done"] or state["next"] == len(candidates):
        return
      other = _number(candidates[state["next"]])
      state["next"] += 1
      if other == node.number:
        self.after(0.0, answer, other, True, node.estimate)
        return
      self.pings[round] += 1
      there, back, estimate = self.latency[node.number, other], self.latency[other, node.number], node.estimate

      def arrive() -> None:
        peer = self.nodes[other]
        if peer.online:
          peer.heard(node.id, max(peer.estimate, estimate))
          self.after(back, answer, other, True, peer.estimate)

      self.after(there, arrive)
      self.after(self.protocol.ping_timeout, answer, other, False, 0)

    for _ in range(min(count, len(candidates))):
      ask()

  # ---- models

  def send(self, node: _Node, to: list[int], tag: int, round: int, arrive: Callable[[_Node], None]) -> None:
    """A model with the sender's view to some nodes, in random order; then joins that waited are let in."""
    view = dict(node.view)

    def deliver(peer: _Node) -> None:
      if peer.online:
        peer.view = merge(peer.view, view)
        peer.heard(node.id, max(tag, peer.estimate))
        arrive(peer)

    for other in self.rng.permutation(np.array(to, int)).tolist():
      if other == node.number:
        self.after(0.0, arrive, node)
        continue
      self.models[round] += 1
      self.after(self.latency[node.number, other] + self.protocol.model_time, deliver, self.nodes[other])
      node.heard(node_id(other), node.estimate)
    node.flush()

  def receive_average(self, node: _Node, round: int, source: int) -> None:
    """A trainer receives a model of round k; the first to arrive is trained."""
    if not node.online:
      return
    if round > node.train_round:
      node.train_round, node.training, node.trained = round, False, False
    if round == node.train_round and not node.training and not node.trained:
      node.training = True
      self.happen(round)
      self.after(self.protocol.train_time, self.finish_training, node, round, source)

  def finish_training(self, node: _Node, round: int, source: int) -> None:
    if not node.online or node.train_round != round:  # a later round has cancelled this one
      return
    self.trained[round][node.number] = source

    def found(aggregators: list[int]) -> None:
      if node.online:
        node.training, node.trained = False, True
        self.send(node, aggregators, round + 1, round, lambda peer: self.receive_trained(peer, round + 1, node.number))

    self.find(node, round + 1, self.protocol.num_aggregators, round, found)

  def receive_trained(self, node: _Node, index: int, sender: int) -> None:
    """An aggregator receives a model that was trained in round index - 1."""
    if not node.online:
      return
    if index > node.aggregate_round:
      node.aggregate_round, node.received, node.averaged, node.overdue = index, {}, False, False
      if self.protocol.timeout is not None:
        self.after(self.protocol.timeout, self.give_up_waiting, node, index)
    if index != node.aggregate_round or node.averaged:
      return
    node.received[sender] = 1
    self.average_if_enough(node, index)

  def give_up_waiting(self, node: _Node, index: int) -> None:
    if node.online and node.aggregate_round == index and not node.averaged:
      node.overdue = True
      self.average_if_enough(node, index)

  def average_if_enough(self, node: _Node, index: int) -> None:
    wanted = self.protocol.sample_size * self.protocol.success_fraction
    if len(node.received) >= (min(wanted, self.protocol.least) if node.overdue else wanted):
      self.average(node, index)

  def average(self, node: _Node, index: int) -> None:
    node.averaged = True
    self.averaged[index - 1][node.number] = list(node.received)
    self.time.setdefault(index - 1, self.now)
    if len(self.averaged[index - 1]) == 1:
      event = lambda view, i: view[i][1:] if i in view else None
      online = [other for other in self.nodes.values() if other.online]
      for number, shares in self.known.items():
        newest = event(self.nodes[number].view, node_id(number))
        shares.append(float(np.mean([event(other.view, node_id(number)) == newest for other in online])))

    def found(trainers: list[int]) -> None:
      if node.online and node.aggregate_round == index:
        self.send(node, trainers, index, index - 1, lambda peer: self.receive_average(peer, index, node.number))

    self.find(node, index, self.protocol.sample_size, index - 1, found)


def simulate(
  protocol: Protocol,
  nodes: int,
  rounds: int,
  *,
  latency: Float[np.ndarray, "n n"] | None = None,
  events: Sequence[Event] = (),
  seed: int = 0,
) -> Trace:
  """Host. Runs the protocol until so many rounds have an average, or nothing more can happen.

  Args:
    protocol: its settings.
    nodes: n, with those that join later.
    rounds: R to aim at; the trace is shorter if a round is lost, such as when all its aggregators crash.
    latency: [N, N] seconds from sender to receiver; None for 50 ms everywhere.
    events: crashes, leaves and joins by round; see `Event`.
    seed: of send orders and advertisements.

  Raises:
    ValueError: fewer nodes than a sample, latencies of another shape, events of unknown nodes, a join of a node that is
      there, or another event of one that is not.
  """
  checks.count("rounds", rounds)
  for event in events:
    if event.happening not in get_args(Happening) or not 0 <= event.node < nodes:
      raise ValueError(f"events: got {event}, expected one of {get_args(Happening)} of a node below {nodes}")
  in_order = sorted(events, key=lambda event: event.round)
  away = _absent(in_order)
  here = nodes - len(away)
  for event in in_order:
    if (event.happening == "join") != (event.node in away):
      state = "absent" if event.node in away else "present"
      raise ValueError(
        f"events: got {event} of a node that is {state}, expected joins of absent nodes, others of present"
      )
    away ^= {event.node}
  if here < protocol.sample_size:
    raise ValueError(f"nodes: got {here} at the start, expected at least the sample size, {protocol.sample_size}")
  delays = np.full((nodes, nodes), 0.05) if latency is None else np.asarray(latency, np.float64)
  if delays.shape != (nodes, nodes) or not (delays >= 0).all():
    raise ValueError(f"latency: got shape {delays.shape}, expected seconds [{nodes}, {nodes}]")
  run = _Simulation(protocol, nodes, delays, list(events), seed)
  run.run(rounds + 1)  # so that all of the last round's models are sent
  # A round counts once it has an average and so have all before it.
  last = next(k for k in range(rounds + 1) if k + 1 not in run.averaged or k == rounds)
  done = range(1, last + 1)
  return Trace(
    trained=[run.trained[k] for k in done],
    averaged=[run.averaged[k] for k in done],
    models=[run.models[k] for k in done],
    pings=[run.pings[k] for k in done],
    failed=[run.failed[k] for k in done],
    time=[run.time[k] for k in done],
    known=run.known,
  )


def _absent(events: Sequence[Event]) -> set[int]:
  """Nodes that are not there at the start: those whose first event is to join."""
  first = {event.node: event.happening for event in reversed(events)}
  return {node for node, happening in first.items() if happening == "join"}


def _number(node: bytes) -> int:
  return int(node[5:])


# ------------------------------------------------------------------------------------------------- device: the learner


class Plan(NamedTuple):
  """A trace as arrays; a batch of `learner`.

  Attributes:
    clients: data of the N nodes.
    ids: [R, S] trainers of each round; unused places repeat the first.
    source: [R, S] which of the last round's averages each trains.
    weights: [R, A, S] the averages, rows of trainers' shares.
    sent: [R] models sent.
  """

  clients: partition.Clients
  ids: Int[Any, "r s"]
  source: Int[Any, "r s"]
  weights: Float[Any, "r a s"]
  sent: Int[Any, " r"]


def plan(trace: Trace, clients: partition.Clients) -> Plan:
  """Host. The rounds of a trace; only trainers whose models were averaged count."""
  rounds = len(trace.averaged)
  if not rounds:
    raise ValueError("trace: got no rounds, expected at least one")
  used = [sorted({i for senders in a.values() for i in senders}) for a in trace.averaged]
  most, averages = max(map(len, used)), max(map(len, trace.averaged))
  ids, source = np.zeros((rounds, most), np.int32), np.zeros((rounds, most), np.int32)
  weights = np.zeros((rounds, averages, most), np.float32)
  for k, (nodes, aggregates) in enumerate(zip(used, trace.averaged, strict=True)):
    ids[k] = nodes[0]
    ids[k, : len(nodes)] = nodes
    before = list(trace.averaged[k - 1]) if k else [-1]
    source[k, : len(nodes)] = [before.index(trace.trained[k][i]) for i in nodes]
    for row, senders in zip(weights[k], aggregates.values(), strict=False):
      row[[nodes.index(i) for i in senders]] = 1 / len(senders)
  if ids.max() >= clients.num_clients:
    raise ValueError(f"clients: got {clients.num_clients}, expected data of node {ids.max()} too")
  return Plan(clients, ids, source, weights, np.asarray(trace.models, np.int32))


@flax.struct.dataclass
class Rounds:
  """State of `learner`.

  Attributes:
    round: rounds done.
    models: [A, ...] averages of the last round; the first is the one that was made first.
    key: randomness of the run.
    sent: models transferred so far.
  """

  round: Int[Array, ""]
  models: PyTree
  key: Key[Array, ""]
  sent: Int[Array, ""]


def learner(local: Learner, work: simulator.Work) -> Learner:
  """The rounds of a plan: trainers take an average of the round before, train, and are averaged, all equally.

  Args:
    local: the learner of one node; its optimizer starts afresh in each round.
    work: of a trainer; one epoch of minibatches of 20 in the paper.

  Returns:
    A learner on a `Plan`, for at most its number of rounds. Metrics of a round: `loss` and `sent`. `evaluate` is of the
    first average. Without failures it has the numbers of `simulator.federated(..., by_size=False)` on these samples.
  """

  def init(key: Key[Array, ""], batch: Plan) -> Rounds:
    first, second = jax.random.split(key)
    states = simulator.start(local, first, batch.clients)
    one = jax.tree.map(lambda leaf: leaf[:1], states.variables)
    zero, a = jnp.zeros((), jnp.int32), batch.weights.shape[1]
    return Rounds(zero, jax.tree.map(lambda leaf: jnp.repeat(leaf, a, axis=0), one), second, zero)

  def step(state: Rounds, batch: Plan) -> tuple[Rounds, Metrics]:
    ids, source, weights, sent = (jnp.asarray(x)[state.round] for x in batch[1:])
    mine = simulator.chosen(batch.clients, ids)
    keys = simulator.client_keys(jax.random.split(state.key, 3)[1], state.round, ids)
    received = jax.tree.map(lambda leaf: leaf[source], state.models)
    states = jax.vmap(local.init, (0, None))(keys, simulator.example(batch.clients))
    params = received.pop("params")
    states, metrics = simulator.train_clients(
      local, dataclasses.replace(states, params=params, collections=received), mine, keys, work
    )
    models = gossip.mix(weights, states.variables)
    share = jnp.max(weights, axis=0) > 0
    loss = jnp.sum(metrics["loss"] * share) / jnp.sum(share)
    total = state.sent + sent
    return Rounds(state.round + 1, models, state.key, total), {"loss": loss, "sent": total}

  def evaluate(state: Rounds, test: Batch) -> Metrics:
    return simulator.evaluate_model(local, jax.tree.map(lambda leaf: leaf[0], state.models), test)

  return Learner(init, step, evaluate)


# --------------------------------------------------------------------------------------------------------- its networks


class GNLeNet(nn.Module):
  """LeNet with group normalisation for 32x32 images. The first block pools before it normalises, the others after.

  Attributes:
    num_classes: C.
    dtype: of the computation.
    param_dtype: of the weights.
  """

  num_classes: int = 10
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b k"]:
    """Log-probabilities [B, C] of images [B, 32, 32, 3]."""
    kind: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    for i, width in enumerate((32, 32, 64)):
      norm = nn.GroupNorm(2, epsilon=1e-5, name=f"norm{i}", **kind)
      x = nn.Conv(width, (5, 5), padding=2, name=f"conv{i}", **kind)(x)
      x = norm(nn.max_pool(x, (3, 3), (2, 2))) if i == 0 else nn.max_pool(norm(x), (3, 3), (2, 2))
      x = nn.relu(x)
    logits = nn.Dense(self.num_classes, name="classifier", **kind)(_channels_first(x))
    return jax.nn.log_softmax(logits.astype(jnp.float32)).astype(self.dtype)


class FEMNIST(nn.Module):
  """The network for 28x28 characters of 62 classes."""

  num_classes: int = 62
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b k"]:
    """Logits [B, C] of images [B, 28, 28, 1]."""
    kind: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    for i, width in enumerate((32, 64)):
      x = nn.max_pool(nn.Conv(width, (5, 5), padding=2, name=f"conv{i}", **kind)(x), (2, 2), (2, 2))
      x = nn.relu(x)
    x = nn.relu(nn.Dense(512, name="hidden", **kind)(_channels_first(x)))
    return nn.Dense(self.num_classes, name="classifier", **kind)(x)


class CelebA(nn.Module):
  """The network for 84x84 faces of two classes."""

  num_classes: int = 2
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b k"]:
    """Logits [B, C] of images [B, 84, 84, 3]."""
    kind: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    for i in range(4):
      x = nn.relu(nn.max_pool(nn.Conv(32, (3, 3), name=f"conv{i}", **kind)(x), (2, 2), (2, 2)))
    return nn.Dense(self.num_classes, name="classifier", **kind)(_channels_first(x))


class Factorization(nn.Module):
  """Ratings as products of factors of users and items (MovieLens: 610 users, 9,724 items, rank 20).

  Attributes:
    users: how many.
    items: how many.
    rank: of the factors.
    param_dtype: of the weights.
  """

  users: int = 610
  items: int = 9724
  rank: int = 20
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, pairs: Int[Array, "b 2"], *, train: bool = False) -> Float[Array, " b"]:
    """Ratings [B] of (user, item), numbers from 0. Traced numbers cannot be checked: unknown ones rate NaN."""
    if not isinstance(pairs, jax.core.Tracer):
      for name, known, found in (("users", self.users, pairs[:, 0]), ("items", self.items, pairs[:, 1])):
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < known:
          raise ValueError(f"pairs: got {name} {found.min()} to {found.max()}, expected 0 to {known - 1}")
    init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -0.05, 0.05)
    user = nn.Embed(self.users, self.rank, embedding_init=init, param_dtype=self.param_dtype, name="users_")
    item = nn.Embed(self.items, self.rank, embedding_init=init, param_dtype=self.param_dtype, name="items_")
    return jnp.sum(user(pairs[:, 0]) * item(pairs[:, 1]), axis=-1)


def from_torch(state_dict: dict[str, Any]) -> dict[str, Any]:
  """Official weights of the GN-LeNet as flax variables."""
  rules: dict[str, Any] = {"params/classifier": interop.dense("classifier.0")}
  # Layers are numbered through, and the first block pools before it normalises.
  for i, (conv, norm) in enumerate(((0, 2), (4, 5), (8, 9))):
    rules[f"params/conv{i}"] = interop.conv(f"features.{conv}")
    rules[f"params/norm{i}"] = interop.norm(f"features.{norm}")
  return interop.variables(state_dict, rules)


def _channels_first(x: Float[Array, "b h w c"]) -> Float[Array, "b chw"]:
  """Flat, in the order in which the official classifier reads them."""
  return jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
