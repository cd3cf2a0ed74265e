"""Consistency training: several views of the same nodes a step, one supervised loss, one that makes views agree.

A view is a network's output for one draw of generated features and dropout (`augmented`), or for one random
propagation of real or generated features (`grand`). Evaluation takes one view of its own every epoch, and the epoch of
lowest validation loss counts.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxlab import checks
from jaxlab.graph import evaluation, node_classification, sparse, structure
from jaxlab.graph.nets.local_augmentation.networks import GRANDMLP, random_propagation
from jaxlab.train.learner import Learner


class Batch(NamedTuple):
  """All that a step reads: a graph with one split, and what generated features are drawn from.

  Attributes:
    graph: normalised, features as nodes; operator: of it.
    labels: [N] classes.
    train, validation, test: [N] masks.
    source: the first argument of `draw`, such as a `Generator`, or drawn features themselves.
  """

  graph: jraph.GraphsTuple
  operator: sparse.Operator
  labels: Int[Array, " n"]
  train: Bool[Array, " n"]
  validation: Bool[Array, " n"]
  test: Bool[Array, " n"]
  source: Any


def batch(task: node_classification.Task, source: Any, split: int = 0) -> Batch:
  """A task's graph with one of its splits."""
  return Batch(
    task.graph, task.operator, task.labels, task.train[split], task.validation[split], task.test[split], source
  )


class Views(NamedTuple):
  """What is trained.

  Attributes:
    init: (key, batch) -> variables.
    train: (variables, batch, key) -> (logits [S, N, C], updated collections).
    evaluate: (variables, batch, key) -> logits [N, C].
  """

  init: Callable[[Key[Array, ""], Batch], dict[str, PyTree]]
  train: Callable[[dict[str, PyTree], Batch, Key[Array, ""]], tuple[Float[Array, "s n c"], dict[str, PyTree]]]
  evaluate: Callable[[dict[str, PyTree], Batch, Key[Array, ""]], Float[Array, "n c"]]


def augmented(
  net: nn.Module,
  draw: Callable[[Any, Key[Array, ""]], Float[Array, "n f"]] | None,
  *,
  concat: int = 1,
  samples: int = 4,
  initialize: Callable[[Key[Array, ""], PyTree], PyTree] | None = None,
) -> Views:
  """Views of one of the networks that take generated features, each with new ones.

  Args:
    net: such as `LAGCN`.
    draw: (batch.source, key) -> features [N, F] of one draw; None needs `concat=0`.
    concat: c, number of generated feature matrices at once. 0 leaves dropout as the only difference between views.
    samples: S views a step.
    initialize: (key, params) -> params in place of the network's own, such as `official_init`.
  """
  checks.count("samples", samples)
  checks.count("concat", concat, 0)
  if draw is None and concat:
    raise ValueError(f"concat: got {concat} without a draw, expected 0")

  def features(batch, key):
    if draw is None or not concat:
      return jnp.zeros((0, *batch.graph.nodes.shape))
    return jax.lax.stop_gradient(jnp.stack([draw(batch.source, k) for k in jax.random.split(key, concat)]))

  def init(key, batch):
    key, first = jax.random.split(key)
    variables = dict(net.init(first, batch.graph, jnp.zeros((concat, *batch.graph.nodes.shape)), batch.operator))
    if initialize is not None:
      variables["params"] = initialize(key, variables["params"])
    return variables

  def train(variables, batch, key):
    params = variables["params"]

    logits, collections = [], {name: value for name, value in variables.items() if name != "params"}
    for view in jax.random.split(key, samples):  # a scan would copy each view's features once more, to stack them
      source_key, dropout = jax.random.split(view)
      each, updated = net.apply(
        {"params": params, **collections}, batch.graph, features(batch, source_key), batch.operator,
        train=True, rngs={"dropout": dropout}, mutable=list(collections),
      )  # fmt: skip
      logits, collections = [*logits, each], dict(updated)
    return jnp.stack(logits), collections

  def evaluate(variables, batch, key):
    return net.apply(variables, batch.graph, features(batch, key), batch.operator)

  return Views(init, train, evaluate)


def grand(
  net: GRANDMLP,
  *,
  hops: int,
  drop_node: float,
  samples: int = 4,
  initialize: Callable[[Key[Array, ""], PyTree], PyTree] | None = None,
) -> Views:
  """2S views a step: S random propagations of the real features and S of `batch.source` [N, F], generated once.

  Args:
    net: the classifier.
    hops: K of `random_propagation`.
    drop_node: its rate.
    samples: S.
    initialize: as `augmented`.
  """
  checks.count("samples", samples)

  def init(key, batch):
    key, first = jax.random.split(key)
    variables = dict(net.init(first, batch.graph, jnp.zeros(batch.graph.nodes.shape)))
    if initialize is not None:
      variables["params"] |= initialize(key, {name: variables["params"][name] for name in ("first", "second")})
    return variables

  def train(variables, batch, key):
    def view(x, collections, key):
      rows, dropout = jax.random.split(key)
      x = jax.lax.stop_gradient(random_propagation(batch.operator, x, hops, drop_node, rows))
      logits, updated = net.apply(
        {"params": variables["params"], **collections}, batch.graph, x,
        train=True, rngs={"dropout": dropout}, mutable=list(collections),
      )  # fmt: skip
      return dict(updated), logits

    def both(collections, keys):
      collections, real = view(batch.graph.nodes, collections, keys[0])
      collections, generated = view(batch.source, collections, keys[1])
      return collections, jnp.stack([real, generated])

    collections = {name: value for name, value in variables.items() if name != "params"}
    updated, logits = jax.lax.scan(both, collections, jax.random.split(key, (samples, 2)))
    return logits.reshape(2 * samples, *logits.shape[2:]), updated

  def evaluate(variables, batch, key):
    del key
    return net.apply(variables, batch.graph, random_propagation(batch.operator, batch.graph.nodes, hops, drop_node))

  return Views(init, train, evaluate)


def consistency_loss(
  logits: Float[Array, "s n c"], temperature: float = 0.5, mask: Bool[Array, " n"] | None = None
) -> Float[Array, ""]:
  """mean over views s and nodes of |P_s - q|^2, where q is mean_s P_s sharpened: q ~ (mean_s P_s)^(1 / T).

  No gradient flows into q. Zero exactly where all views give the same probability to one class, or to several the same.

  Args:
    logits: S views; P_s is their softmax.
    temperature: T; below 1 sharpens.
    mask: [N] nodes that count, such as those that are not padding; default all.
  """
  if not temperature > 0:
    raise ValueError(f"temperature: got {temperature}, expected a positive number")
  p = jax.nn.softmax(logits.astype("float32"))
  power = jnp.mean(p, axis=0) ** (1 / temperature)
  q = jax.lax.stop_gradient(power / jnp.sum(power, axis=-1, keepdims=True))
  each = jnp.mean(jnp.sum((p - q) ** 2, axis=-1), axis=0)  # [N]
  return jnp.mean(each) if mask is None else jnp.sum(each * mask) / jnp.maximum(jnp.sum(mask), 1)


class Best(NamedTuple):
  """The epoch of lowest validation loss: its accuracies, weights, and the key of the features it was evaluated on."""

  loss: Float[Array, ""]
  validation: Float[Array, ""]
  test: Float[Array, ""]
  epoch: Int[Array, ""]
  variables: Any
  key: Key[Array, ""]


class Run(NamedTuple):
  """State of a run. Once `stopped` it stays as it is."""

  variables: Any
  moments: Any
  key: Key[Array, ""]
  epoch: Int[Array, ""]
  best: Best
  stopped: Bool[Array, ""]


def learner(
  views: Views,
  *,
  learning_rate: float,
  l2: float,
  epochs: int,
  consistency: float = 1.0,
  temperature: float = 0.5,
  l2_of: Mapping[str, float] | None = None,
  patience: int = 0,
  epochs_per_step: int = 10,
) -> Learner:
  """Adam on mean_s NLL(P_s) + consistency * `consistency_loss`; the state is a `Run`, the batch a `Batch`.

  Several seeds: `train.over_seeds(learner(...))`.

  Args:
    views: what is trained.
    learning_rate: of Adam.
    l2: coefficient of the L2 term in the gradient, before Adam's moments (not AdamW).
    epochs: most updates.
    consistency: lambda; 0 leaves the supervised loss alone.
    temperature: T of `consistency_loss`.
    l2_of: other coefficients, by the name of a top-level layer.
    patience: stop after this many epochs without a lower validation loss; 0 never. (The official GRAND script also
      counts a validation accuracy as high as the best so far as progress.)
    epochs_per_step: how many epochs a step of the learner runs, in one compiled loop.
  """
  l2_of = dict(l2_of or {})

  def decay(updates, params):
    known = set(params)
    if not set(l2_of) <= known:
      raise ValueError(f"l2_of: got {sorted(set(l2_of) - known)}, expected names among {sorted(known)}")
    return {
      name: jax.tree.map(lambda g, p, c=l2_of.get(name, l2): g + c * p, updates[name], params[name]) for name in updates
    }

  tx = optax.chain(optax.stateless(decay), optax.adam(learning_rate))

  def nll(logits, batch, mask):
    log_p = jax.nn.log_softmax(logits.astype("float32"))[..., jnp.arange(batch.labels.shape[0]), batch.labels]
    return -jnp.sum(log_p * mask, -1) / jnp.sum(mask)

  def init(key: Key[Array, ""], batch: Batch) -> Run:
    key, first = jax.random.split(key)
    variables = views.init(first, batch)
    none, start = jnp.zeros(()), jnp.zeros((), "int32")
    best = Best(none + jnp.inf, none, none, start, variables, key)
    return Run(variables, tx.init(variables["params"]), key, start, best, jnp.zeros((), bool))

  def objective(params, collections, batch, key):
    logits, updated = views.train({"params": params, **collections}, batch, key)
    supervised = jnp.mean(nll(logits, batch, batch.train))
    if not consistency:
      return supervised, updated
    real = structure.node_mask(batch.graph._replace(nodes=batch.labels))
    return supervised + consistency * consistency_loss(logits, temperature, real), updated

  def epoch(run, batch):
    train_key, evaluate_key = jax.random.split(jax.random.fold_in(run.key, run.epoch))
    params = run.variables["params"]
    collections = {name: value for name, value in run.variables.items() if name != "params"}
    (loss, collections), gradient = jax.value_and_grad(objective, has_aux=True)(params, collections, batch, train_key)
    updates, moments = tx.update(gradient, run.moments, params)
    variables = {"params": optax.apply_updates(params, updates), **collections}

    logits = views.evaluate(variables, batch, evaluate_key)
    accuracy = functools.partial(evaluation.accuracy, logits, batch.labels)
    number = run.epoch + 1
    validation = nll(logits, batch, batch.validation)
    now = Best(validation, accuracy(batch.validation), accuracy(batch.test), number, variables, evaluate_key)
    best = _where(validation < run.best.loss, now, run.best)
    stop = (number >= epochs) | (patience > 0) & (number - best.epoch >= patience)
    return _where(run.stopped, run, Run(variables, moments, run.key, number, best, stop)), loss

  def step(run: Run, batch: Batch) -> tuple[Run, dict[str, Array]]:
    def train(run):
      return jax.lax.scan(lambda r, _: epoch(r, batch), run, length=epochs_per_step)

    def idle(run):
      return run, jnp.zeros(epochs_per_step)

    run, losses = jax.lax.cond(run.stopped, idle, train, run)
    return run, {"loss": jnp.mean(losses), **evaluate(run, batch)}

  def evaluate(run: Run, batch: Batch) -> dict[str, Array]:
    del batch  # every epoch has been evaluated
    best = run.best
    return {
      "validation_loss": best.loss, "validation_accuracy": best.validation, "test_accuracy": best.test,
      "running": ~run.stopped,
    }  # fmt: skip

  return Learner(init, step, evaluate)


def _where(condition, a, b):
  return jax.tree.map(functools.partial(jnp.where, condition), a, b)


class Recipe(NamedTuple):
  """How a published result is trained: the arguments of `learner`, `concat` and `samples` of `augmented` or `grand`.

  Attributes: as there. `latent` is the generator's.
  """

  learning_rate: float = 0.01
  l2: float = 5e-4
  epochs: int = 1000
  concat: int = 1
  samples: int = 4
  consistency: float = 1.0
  temperature: float = 0.5
  l2_of: Mapping[str, float] | None = None
  patience: int = 0

  def learner(self, views: Views, **changes: Any) -> Learner:
    """`learner` with this recipe."""
    mine = self._asdict()
    del mine["concat"], mine["samples"]
    return learner(views, **mine | changes)


# The official `semi.sh` and `full.sh`.
_GCNII = Recipe(l2_of={"convolutions": 0.01}, patience=200)
RECIPES: dict[tuple[str, str], Recipe] = {
  ("gcn", "cora"): Recipe(epochs=2000),
  ("gcn", "citeseer"): Recipe(epochs=2000),
  ("gcn", "pubmed"): Recipe(learning_rate=0.02, epochs=300, concat=3),
  ("gat", "cora"): Recipe(),
  ("gat", "citeseer"): Recipe(),
  ("gat", "pubmed"): Recipe(concat=3),
  ("gcnii", "cora"): _GCNII._replace(consistency=0.0),
  ("gcnii", "citeseer"): _GCNII,
  ("gcnii", "pubmed"): _GCNII._replace(concat=3, l2_of=None),
  ("grand", "cora"): Recipe(epochs=5000, patience=200),
  ("grand", "citeseer"): Recipe(epochs=5000, patience=200, temperature=0.2, consistency=0.7),
  ("grand", "pubmed"): Recipe(0.2, epochs=5000, patience=200, temperature=0.2, consistency=1.2),
  ("gcn", "arxiv"): Recipe(l2=0.0, epochs=500, samples=2),
  ("sage", "arxiv"): Recipe(l2=0.0, epochs=500),
  ("gcn", "products"): Recipe(l2=0.0, epochs=300, samples=1, consistency=0.0),
  ("sage", "products"): Recipe(learning_rate=0.003, l2=0.0, epochs=20),
}
