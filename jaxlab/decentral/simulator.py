"""Many learners in one computation: N clients stacked on an axis, vmapped, and sharded over devices.

A client is a `train.supervised` learner; N of them are its state with a leading axis. A round is local training
(`train_clients`), averaging (`gossip.mix`, `merge`) and measuring (`evaluate_clients`); a protocol is a `train.Learner`
that puts these together, whose batch is the `partition.Clients` and whose step is one round. Two that the literature
compares with are here:

    federated:  w <- w + r sum_k n_k (w_k - w) / sum_k n_k      McMahan et al. 2017 (FedAvg); w_k after local training
    gossiping:  w_i <- sum_j W_ij w_j                           decentralised SGD, w_j after local training

Clients differ in size, so a minibatch has a `mask`, and a minibatch without real examples changes nothing, neither the
weights nor the optimizer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxlab import checks, train
from jaxlab.decentral import gossip
from jaxlab.decentral.partition import Clients
from jaxlab.train import Batch, Learner, Metrics, TrainState

Models = TrainState  # of N clients: every leaf has a leading axis [N, ...]


class Work(NamedTuple):
  """What a client does in a round: minibatches of its shuffled data.

  Attributes:
    batch_size: examples in a minibatch; None for all of the client's.
    epochs: passes over the data; the last minibatch of each may be smaller.
    steps: minibatches instead, from as many passes as that takes; None for whole epochs. Without a batch size each is
      one pass.
  """

  batch_size: int | None = None
  epochs: int = 1
  steps: int | None = None


def classifier(model: nn.Module, tx: optax.GradientTransformation, *, label_smoothing: float = 0.0) -> Learner:
  """A client that trains `model` on batches of `image`, `label` and `mask` by cross entropy.

  Args:
    model: called as `model.apply(variables, image, train=...)`.
    tx: its optimizer.
    label_smoothing: of the loss.
  """
  loss = train.cross_entropy(label_smoothing=label_smoothing, mask=lambda batch: batch["mask"])
  return train.supervised(model, loss, tx)


# ------------------------------------------------------------------------------------------------------ what clients do


def start(local: Learner, key: Key[Array, ""], data: Clients, *, common: bool = True) -> Models:
  """Models of all clients before the first round.

  Args:
    local: the learner of one client.
    key: random.
    data: gives N and the shapes.
    common: whether all start from the same weights; each has its own randomness either way.
  """
  n, batch = data.num_clients, example(data)
  model = variables(local.init(key, batch))
  states = jax.vmap(local.init, (0, None))(jax.random.split(key, n), batch)
  return give(states, model) if common else states


def variables(state: TrainState) -> dict[str, PyTree]:
  """What is communicated: weights and statistics, not the optimizer's state."""
  if state.average is not None:
    raise ValueError("local: got a learner with a moving average, expected ema_decay=None")
  return state.variables


def give(states: Models, model: dict[str, PyTree]) -> Models:
  """Every client takes this model [...]; the optimizer's state stays."""
  rest, n = dict(model), states.step.shape[0]
  spread = lambda leaf: jnp.broadcast_to(leaf, (n, *leaf.shape))
  params = jax.tree.map(spread, rest.pop("params"))
  return dataclasses.replace(states, params=params, collections=jax.tree.map(spread, rest))


def mix(matrix: Float[Any, "n n"], states: Models) -> Models:
  """Models averaged by a gossip matrix; the optimizer's state stays."""
  mixed = gossip.mix(matrix, states.variables)
  return dataclasses.replace(states, params=mixed.pop("params"), collections=mixed)


def minibatches(
  key: Key[Array, ""], count: Int[Array, ""], capacity: int, work: Work
) -> tuple[Int[Array, "k b"], Bool[Array, "k b"]]:
  """Places within one client's data for each step of a round, and which of them are real.

  Args:
    key: random.
    count: examples of the client.
    capacity: M, at least `count`.
    work: the round's.

  Places that are not real repeat the client's own examples: networks that normalise over a batch see no others.
  """
  size = capacity if work.batch_size is None else checks.count("batch_size", work.batch_size)
  if work.steps is None:
    passes = checks.count("epochs", work.epochs)
  else:
    passes = -(-checks.count("steps", work.steps) * size // capacity)
  draws = jax.random.uniform(key, (passes, capacity))
  # Each row: the real places in random order, then the others.
  order = jnp.argsort(jnp.where(jnp.arange(capacity) < count, draws, 2.0), axis=1).astype(jnp.int32)
  length = jnp.maximum(count, 1)
  if work.steps is not None and work.batch_size is not None:
    # One stream of passes, each as long as the client's data; small clients go through the same orders again.
    at = jnp.arange(work.steps * size)
    place = order[at // length % passes, at % length]
    return place.reshape(-1, size), jnp.broadcast_to(count > 0, (work.steps, size))
  steps = -(-capacity // size)  # of the largest client; in a smaller one the last are empty
  at = jnp.arange(steps * size)
  return order[:, at % length].reshape(-1, size), jnp.tile((at < count).reshape(steps, size), (passes, 1))


def train_clients(
  local: Learner,
  states: Models,
  data: Clients,
  keys: Key[Array, " n"],
  work: Work,
  *,
  active: Bool[Any, " n"] | None = None,
) -> tuple[Models, Metrics]:
  """Local training of all clients at once.

  Args:
    local: the learner of one client.
    states: of N clients.
    data: of the same N.
    keys: one a client, for the order of its examples.
    work: what each does.
    active: who trains; the others stay exactly as they are. None for all.

  Returns:
    The states after training, and the loss of each client [N], a mean over its examples (0 where it has none).
  """
  n = data.num_clients
  if states.step.shape != (n,):
    raise ValueError(f"states: got {states.step.shape}, expected models of the {n} clients")
  trains = jnp.ones(n, bool) if active is None else active
  place, real = jax.vmap(lambda key, count: minibatches(key, count, data.capacity, work))(keys, jnp.asarray(data.count))
  examples, index = jax.tree.map(jnp.asarray, (data.examples, data.index))

  def step(states: Models, x: tuple[Array, Array]) -> tuple[Models, tuple[Array, Array]]:
    place, real = x
    rows = jnp.take_along_axis(index, place, axis=1)
    batch = {name: array[rows] for name, array in examples.items()} | {"mask": real}
    new, metrics = jax.vmap(local.step)(states, batch)
    count = jnp.sum(real, axis=1, dtype=jnp.float32) * trains
    return select(count > 0, new, states), (metrics["loss"] * count, count)

  states, (loss, count) = jax.lax.scan(step, states, (jnp.swapaxes(place, 0, 1), jnp.swapaxes(real, 0, 1)))
  return states, {"loss": jnp.sum(loss, axis=0) / jnp.maximum(jnp.sum(count, axis=0), 1.0)}


def select(which: Bool[Array, " n"], new: Models, old: Models) -> Models:
  """The new state where `which`, the old one elsewhere. Keys are constant and stay."""

  def choose(a: Array, b: Array) -> Array:
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      return b
    return jnp.where(which.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

  return jax.tree.map(choose, new, old)


def client_keys(key: Key[Array, ""], round: Int[Array, ""], ids: Int[Array, " s"]) -> Key[Array, " s"]:
  """The randomness of some clients in a round: it depends on who and when, not on who else takes part."""
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, round), i))(ids)


def chosen(data: Clients, ids: Int[Array, " s"]) -> Clients:
  """The data of some clients."""
  return Clients(data.examples, jnp.asarray(data.index)[ids], jnp.asarray(data.count)[ids])


def evaluate_clients(
  local: Learner, states: Models, test: Batch, *, at_once: int = 64, batch_size: int | None = None
) -> Metrics:
  """Each client's metrics [N] on one common test set.

  Args:
    local: the learner of one client; its metrics are means over the examples that the mask leaves.
    states: of N clients.
    test: arrays [T, ...] by name.
    at_once: so many clients in one computation.
    batch_size: so many examples in one; None for all.
  """
  return jax.lax.map(lambda state: _evaluate(local, state, test, batch_size), states, batch_size=at_once)


def evaluate_model(local: Learner, model: dict[str, PyTree], test: Batch, *, batch_size: int | None = None) -> Metrics:
  """Metrics of one model [...], such as the merged one; arguments as in `evaluate_clients`."""
  rest = dict(model)
  state = jax.eval_shape(local.init, jax.random.key(0), _whole(test))
  state = dataclasses.replace(state, params=rest.pop("params"), collections=rest)
  return _evaluate(local, state, test, batch_size)


def shard(mesh: Mesh, tree: PyTree, num_clients: int) -> PyTree:
  """Host. Puts clients on the devices: arrays [N, ...] are split along their first axis, all others copied.

  A jitted round follows its inputs: each device trains its own clients, and averaging communicates.

  Args:
    mesh: from `train.mesh()`.
    tree: states, or `Clients`, whose data set is copied to each device even if it has N rows.
    num_clients: N, a multiple of the devices.
  """
  if num_clients % mesh.size:
    raise ValueError(f"num_clients: got {num_clients}, expected a multiple of the {mesh.size} devices")
  whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
  put = lambda x: jax.device_put(x, split if jnp.shape(x)[:1] == (num_clients,) else whole)
  if isinstance(tree, Clients):
    return Clients(jax.device_put(tree.examples, whole), put(tree.index), put(tree.count))
  return jax.tree.map(put, tree)


def model_bytes(model: PyTree) -> int:
  """What one model takes on the wire, uncompressed; of arrays or their shapes."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))


# ------------------------------------------------------------------------------------------------------- two protocols


@flax.struct.dataclass
class Federation:
  """State of `federated`.

  Attributes:
    round: rounds done.
    model: the server's variables.
    key: randomness of the run.
    megabits: sent by clients so far; counted where there is a codec, else the models' size.
    residual: {"params": [N, ...]}, what each client's codec has left out, or None without feedback.
  """

  round: Int[Array, ""]
  model: dict[str, PyTree]
  key: Key[Array, ""]
  megabits: Float[Array, ""]
  residual: PyTree


class Codec(NamedTuple):
  """Lossy compression of a client's update.

  Attributes:
    code: (update, key) -> (what the server decodes, its size in bits); a pure function of one client's pytree, which is
      {"params": ...}. Other collections, such as running statistics, are sent as they are.
    feedback: whether each client adds what was lost to its next update (off in most published codecs).
  """

  code: Callable[[PyTree, Key[Array, ""]], tuple[PyTree, Array]]
  feedback: bool = False


Choose = Callable[[Key[Array, ""], Int[Array, ""], int], Int[Array, " s"]]


def some_clients(count: int) -> Choose:
  """So many clients a round, drawn without replacement: a `choose` for `federated`."""
  checks.count("count", count)

  def choose(key: Key[Array, ""], round: Int[Array, ""], num_clients: int) -> Int[Array, " s"]:
    if count > num_clients:
      raise ValueError(f"count: got {count}, expected at most the {num_clients} clients")
    return jax.random.permutation(jax.random.fold_in(key, round), num_clients)[:count]

  return choose


def federated(
  local: Learner,
  work: Work,
  *,
  choose: Choose | None = None,
  by_size: bool = True,
  server_rate: float = 1.0,
  codec: Codec | None = None,
) -> Learner:
  """FedAvg: the server sends its model, clients train, and their updates are averaged. Optimizers start afresh.

  Args:
    local: the learner of one client.
    work: of each client and round.
    choose: who takes part: (key, round, N) -> ids [S]; None for all.
    by_size: weigh updates by numbers of examples (FedAvg) rather than equally.
    server_rate: r; 1 replaces the model by the average.
    codec: applied to each client's update.

  Returns:
    A learner on `Clients`; `evaluate` takes a test set. Metrics of a round: `loss`, `megabits` (of all rounds), and
    `error`, what the codec lost of the round's updates: |lost| / |update| over all clients and weights. A round in
    which no one has data leaves the model as it is, with loss 0.
  """
  if not 0 < server_rate < jnp.inf:
    raise ValueError(f"server_rate: got {server_rate}, expected a finite number above 0")

  def init(key: Key[Array, ""], data: Clients) -> Federation:
    first, second = jax.random.split(key)
    model = variables(local.init(first, example(data)))
    residual = None
    if codec is not None and codec.feedback:
      zeros = lambda leaf: jnp.zeros((data.num_clients, *leaf.shape), leaf.dtype)
      residual = jax.tree.map(zeros, {"params": model["params"]})
    return Federation(jnp.zeros((), jnp.int32), model, second, jnp.zeros(()), residual)

  def step(state: Federation, data: Clients) -> tuple[Federation, Metrics]:
    picks, works, codes = jax.random.split(state.key, 3)
    n = data.num_clients
    ids = jnp.arange(n) if choose is None else choose(picks, state.round, n)
    mine = chosen(data, ids)
    keys = client_keys(works, state.round, ids)
    states = jax.vmap(local.init, (0, None))(keys, example(data))
    states, metrics = train_clients(local, give(states, state.model), mine, keys, work)
    update = jax.tree.map(lambda new, old: new - old[None], states.variables, state.model)
    residual, error = state.residual, jnp.zeros(())
    megabits = jnp.float32(len(ids) * 8e-6 * model_bytes(state.model))
    if codec is not None:
      weights = {"params": update["params"]}
      if residual is not None:
        weights = jax.tree.map(lambda u, r: u + r[ids], weights, residual)
      decoded, bits = jax.vmap(codec.code)(weights, client_keys(codes, state.round, ids))
      whole = len(ids) * (model_bytes(state.model) - model_bytes(state.model["params"]))
      megabits = (jnp.sum(bits.astype(jnp.float32)) + 8 * whole) * 1e-6
      lost = jax.tree.map(jnp.subtract, weights, decoded)
      error = optax.global_norm(lost) / jnp.maximum(optax.global_norm(weights), jnp.finfo(jnp.float32).tiny)
      if residual is not None:
        residual = jax.tree.map(lambda r, x: r.at[ids].set(x), residual, lost)
      update = {**update, **decoded}
    weight = mine.count.astype(jnp.float32) if by_size else jnp.ones(len(ids))
    model = jax.tree.map(lambda old, u: old + server_rate * u, state.model, gossip.mean(update, weight))
    loss = jnp.sum(metrics["loss"] * mine.count) / jnp.maximum(jnp.sum(mine.count), 1)
    sent = state.megabits + megabits
    metrics = {"loss": loss, "megabits": sent, "error": error}
    return Federation(state.round + 1, model, state.key, sent, residual), metrics

  def evaluate(state: Federation, test: Batch) -> Metrics:
    return evaluate_model(local, state.model, test)

  return Learner(init, step, evaluate)


@flax.struct.dataclass
class Peers:
  """State of clients without a server.

  Attributes:
    round: rounds done.
    clients: their learners' states [N, ...].
    key: randomness of the run.
    sent: models transferred so far.
  """

  round: Int[Array, ""]
  clients: Models
  key: Key[Array, ""]
  sent: Int[Array, ""]


def peers(local: Learner, key: Key[Array, ""], data: Clients, *, common: bool = True) -> Peers:
  """The state before the first round; arguments as in `start`."""
  first, second = jax.random.split(key)
  zero = jnp.zeros((), jnp.int32)
  return Peers(zero, start(local, first, data, common=common), second, zero)


def gossiping(
  local: Learner, work: Work, matrices: Float[Any, "p n n"], *, common: bool = True, at_once: int = 64
) -> Learner:
  """Decentralised SGD: every client trains, then averages with its neighbours; round t uses matrix t mod P.

  Args:
    local: the learner of one client.
    work: of each client and round.
    matrices: W, such as `gossip.ring(n)[None]`.
    common: whether all start from the same weights.
    at_once: clients evaluated at once.

  Returns:
    A learner on `Clients`. Metrics of a round: `loss` and `sent`; of `evaluate`: the clients' mean `accuracy` and that
    of the `merged` model, which is not fed back.
  """
  matrices = jnp.asarray(matrices, jnp.float32)
  if matrices.ndim != 3 or matrices.shape[1] != matrices.shape[2]:
    raise ValueError(f"matrices: got shape {matrices.shape}, expected [P, N, N]")

  def init(key: Key[Array, ""], data: Clients) -> Peers:
    if matrices.shape[1] != data.num_clients:
      raise ValueError(f"matrices: got {matrices.shape[1]} clients, expected {data.num_clients}, those of the data")
    return peers(local, key, data, common=common)

  def step(state: Peers, data: Clients) -> tuple[Peers, Metrics]:
    keys = client_keys(state.key, state.round, jnp.arange(data.num_clients))
    clients, metrics = train_clients(local, state.clients, data, keys, work)
    matrix = matrices[state.round % matrices.shape[0]]
    sent = state.sent + gossip.transfers(matrix)
    state = Peers(state.round + 1, mix(matrix, clients), state.key, sent)
    return state, {"loss": jnp.mean(metrics["loss"]), "sent": sent}

  def evaluate(state: Peers, test: Batch) -> Metrics:
    own = evaluate_clients(local, state.clients, test, at_once=at_once)["accuracy"]
    merged = evaluate_model(local, gossip.mean(state.clients.variables), test)["accuracy"]
    return {"accuracy": jnp.mean(own), "worst": jnp.min(own), "merged": merged}

  return Learner(init, step, evaluate)


def example(data: Clients) -> Batch:
  """A minibatch of one example, for shapes."""
  return {name: jnp.asarray(array)[:1] for name, array in data.examples.items()} | {"mask": jnp.ones(1, bool)}


def _evaluate(local: Learner, state: TrainState, test: Batch, batch_size: int | None) -> Metrics:
  """Metrics on a test set, example by example means, in minibatches of which the last is padded."""
  batch = _whole(test)
  if batch_size is None:
    return local.evaluate(state, batch)
  size = min(checks.count("batch_size", batch_size), len(batch["mask"]))
  pad = -len(batch["mask"]) % size

  def split(x: Array) -> Array:
    return jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))).reshape(-1, size, *x.shape[1:])

  parts = jax.tree.map(lambda x: split(jnp.asarray(x)), batch)
  metrics = jax.lax.map(lambda part: local.evaluate(state, part), parts)
  weight = jnp.sum(parts["mask"], axis=1, dtype=jnp.float32)
  return {name: jnp.average(value, weights=weight) for name, value in metrics.items()}


def _whole(test: Batch) -> dict[str, Any]:
  return {"mask": jnp.ones(jnp.shape(test["label"]), bool), **test}
