"""The rounds of a trace on a device, all trainers of a round in one vmapped computation."""

import dataclasses
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxlab.decentral import gossip, partition, simulator
from jaxlab.decentral.modest.protocol import Trace
from jaxlab.train import Batch, Learner, Metrics


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
