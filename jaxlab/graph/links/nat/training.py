"""Streams of batches: to score, to train, and the learner of whole epochs."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from jaxlab.data.temporal import Batches
from jaxlab.graph import evaluation
from jaxlab.graph.links.nat.network import NAT, Memory, Tables, changes, reset, write
from jaxlab.train.learner import Learner


def stream(
  model: NAT, params: Any, memory: Memory, tables: Tables, batches: Batches, key: Key[Array, ""]
) -> tuple[Memory, Float[Array, "c 2 b"]]:
  """Scores and writes batch after batch, in evaluation mode: what a deployed model does.

  Args:
    model: as given to `reset`.
    params: weights.
    memory: at the start.
    tables: features.
    batches: arrays [C, B].
    key: of replacements.

  Returns:
    The memory at the end, and logits of events and negatives.
  """

  def score(_, memory, events, key):
    logits, read = model.apply({"params": params}, memory, tables, events)
    return None, changes(model, memory, events, read, key), logits

  _, memory, logits = _scan(score, None, memory, batches, key)
  return memory, logits


class Training(NamedTuple):
  """What training changes from batch to batch."""

  params: Any
  moments: optax.OptState
  memory: Memory


def train_stream(
  model: NAT, tx: optax.GradientTransformation, state: Training, tables: Tables, batches: Batches, key: Key[Array, ""]
) -> tuple[Training, Float[Array, " c"]]:
  """Updates weights and memory batch after batch.

  The loss is the mean over events of -log p(event) - log(1 - p(negative)).

  Args:
    model: the network.
    tx: the optimizer.
    state: at the start.
    tables: features.
    batches: arrays [C, B], at least one event in each batch.
    key: of dropout and replacements.

  Returns:
    The state at the end, and the loss of each batch.
  """

  def learn(weights, memory, events, key):
    params, moments = weights
    dropout, replace = jax.random.split(key)
    real = (events.senders != 0).astype("float32")

    def objective(params):
      logits, read = model.apply({"params": params}, memory, tables, events, train=True, rngs={"dropout": dropout})
      positive, negative = logits.astype("float32")
      return jnp.sum(real * (nn.softplus(-positive) + nn.softplus(negative))) / jnp.sum(real), read

    (loss, read), grads = jax.value_and_grad(objective, has_aux=True)(params)
    updates, moments = tx.update(grads, moments, params)
    return (optax.apply_updates(params, updates), moments), changes(model, memory, events, read, replace), loss

  (params, moments), memory, losses = _scan(learn, (state.params, state.moments), state.memory, batches, key)
  return Training(params, moments, memory), losses


def _scan(function, carry, memory, batches, key):
  """Scans batches with (carry, memory, events, key) -> (carry, writes, output).

  Writes of a batch are made at the start of the next step, before its reads. In a step that wrote what it has read XLA
  would copy the whole memory, and cost would follow the number of nodes.
  """

  def step(state, x):
    carry, memory, pending = state
    memory = write(memory, pending)
    carry, pending, output = function(carry, memory, *x)
    return (carry, memory, pending), output

  keys = jax.random.split(key, len(batches.senders))
  shapes = jax.eval_shape(function, carry, memory, jax.tree.map(lambda a: a[0], batches), keys[0])[1]
  nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
  nothing = nothing._replace(at=jnp.full_like(nothing.at, len(memory.self_rep)))
  (carry, memory, pending), outputs = jax.lax.scan(step, (carry, memory, nothing), (batches, keys))
  return carry, write(memory, pending), outputs


def batch_average_precision(logits: Float[Array, "c 2 b"], batches: Batches) -> Float[Array, ""]:
  """Mean over batches of the average precision within each: the published metric, noisier than the pooled one."""
  scores = jnp.where(batches.senders[:, None] != 0, logits.astype("float32"), -jnp.inf)
  positive = jnp.zeros(scores.shape, bool).at[:, 0].set(batches.senders != 0)
  flat = lambda a: a.reshape(len(a), -1)
  return jnp.mean(jax.vmap(evaluation.average_precision)(flat(scores), flat(positive)))


# ----------------------------------------------------------------------------------------------------------- training


class Task(NamedTuple):
  """What a run of training reads."""

  tables: Tables
  train: Batches
  validation: Batches


class Best(NamedTuple):
  """The best epoch: its score, its weights, and the memory after its validation."""

  average_precision: Float[Array, ""]
  params: Any
  memory: Memory


class Run(NamedTuple):
  """State of a run. `waited` epochs have not improved on the best."""

  params: Any
  moments: optax.OptState
  key: Key[Array, ""]
  hash_seed: Int[Array, ""]
  epoch: Int[Array, ""]
  waited: Int[Array, ""]
  best: Best


def learner(model: NAT, tx: optax.GradientTransformation, *, patience: int = 3, tolerance: float = 1e-3) -> Learner:
  """Trains on a `Task`; a step is an epoch: forget, stream the training events, go on through the validation ones.

  Args:
    model: the network.
    tx: the optimizer.
    patience: epochs without improvement after which steps change nothing.
    tolerance: relative gain in validation average precision (`batch_average_precision`) that is an improvement.

  Returns:
    A learner whose state is a `Run`.

  Raises:
    ValueError: patience below 1 or a negative tolerance.
  """
  if patience < 1:
    raise ValueError(f"patience: got {patience}, expected at least 1")
  if not tolerance >= 0:
    raise ValueError(f"tolerance: got {tolerance}, expected at least 0")

  def fresh(task, hash_seed):
    return reset(model, len(task.tables.node) - 1, hash_seed)

  def init(key, task):
    key, params_key, hash_key = jax.random.split(key, 3)
    hash_seed = jax.random.randint(hash_key, (), 0, 100)
    memory = fresh(task, hash_seed)
    first = jax.tree.map(lambda a: a[0], task.train)
    params = model.init(params_key, memory, task.tables, first)["params"]
    best = Best(jnp.asarray(-jnp.inf), params, memory)
    return Run(params, tx.init(params), key, hash_seed, jnp.asarray(0), jnp.asarray(0), best)

  def epoch(run, task):
    train_key, validation_key = jax.random.split(jax.random.fold_in(run.key, run.epoch))

    start = Training(run.params, run.moments, fresh(task, run.hash_seed))
    (params, moments, memory), losses = train_stream(model, tx, start, task.tables, task.train, train_key)
    memory, logits = stream(model, params, memory, task.tables, task.validation, validation_key)
    score = batch_average_precision(logits, task.validation)

    gained = ~(score <= run.best.average_precision * (1 + tolerance))
    best = jax.tree.map(lambda a, b: jnp.where(gained, a, b), Best(score, params, memory), run.best)
    waited = jnp.where(gained, 0, run.waited + 1)
    return Run(params, moments, run.key, run.hash_seed, run.epoch + 1, waited, best), jnp.mean(losses), score

  def step(run, task):
    stay = lambda run, task: (run, jnp.zeros(()), run.best.average_precision)
    running = run.waited < patience
    run, loss, score = jax.lax.cond(running, epoch, stay, run, task)
    return run, {"loss": loss, "validation_ap": score, "running": running, **evaluate(run, task)}

  def evaluate(run, task):
    del task  # every epoch has been evaluated
    return {"best_validation_ap": run.best.average_precision}

  return Learner(init, step, evaluate)
