"""The protocol on the host: an event loop with a clock, latencies, crashes, leaves and joins."""

import collections
import dataclasses
import hashlib
import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float

from jaxlab import checks

Change = Literal["join", "leave"]
Happening = Literal["crash", "leave", "join"]
NO_ACTIVITY = -1


# ------------------------------------------------------------------------------------------------------------- samples


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


# ------------------------------------------------------------------------------------------------------------ protocol


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
        online = [i for i, node in self.nodes.items() if node.online]
        if not online:
          raise ValueError(f"events: got a node that joins in round {round}, when no other is left to join by")
        host = self.nodes[int(self.rng.choice(online))]
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
