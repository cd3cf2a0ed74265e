"""Full-batch node classification: the training protocol that most graph networks are published with, and its baselines.

The protocol is that of Shchur et al. ("Pitfalls of Graph Neural Network Evaluation", arXiv:1811.05868) in the form of
`divelab/DeeperGNN`: every epoch updates on the whole graph and evaluates; reported is the test accuracy at the epoch of
lowest validation loss; training may stop early. Runs that differ in seed or split are trained together under `vmap`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np
import optax
import scipy.sparse
from jaxtyping import Array, Bool, Float, Int

from jaxlab.graph import evaluation, layers, sparse, structure
from jaxlab.train.learner import Learner


class Task(NamedTuple):
  """One graph and S splits of its N nodes: all that a step reads, so that nothing big is a constant of the program.

  Attributes:
    graph: normalised, with features as nodes.
    operator: of the graph.
    labels: [N] classes; nodes without one are in no mask.
    train: [S, N] masks; likewise the next two.
  """

  graph: jraph.GraphsTuple
  operator: sparse.Operator
  labels: Int[Array, " n"]
  train: Bool[Array, "s n"]
  validation: Bool[Array, "s n"]
  test: Bool[Array, "s n"]

  @property
  def num_classes(self) -> int:
    """C. Host."""
    return int(self.labels.max()) + 1


class Best(NamedTuple):
  """The epoch of lowest validation loss of a run."""

  loss: Float[Array, ""]
  validation: Float[Array, ""]  # accuracy
  test: Float[Array, ""]  # accuracy
  variables: dict[str, Any]


class Run(NamedTuple):
  """State of a run. `losses` are the last validation losses, the newest in place of the oldest."""

  variables: dict[str, Any]
  moments: Any
  key: Array
  epoch: Int[Array, ""]
  losses: Float[Array, " patience"]
  best: Best
  stopped: Bool[Array, ""]


def task(
  features: Float[np.ndarray, "n f"] | scipy.sparse.sparray,
  senders: Int[np.ndarray, " e"],
  receivers: Int[np.ndarray, " e"],
  labels: Int[np.ndarray, " n"],
  splits: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> Task:
  """Host. A task from the arrays of a `data.NodeDataset`, symmetrically normalised with self-loops.

  Args:
    features: dense, or any scipy matrix, which stays sparse.
    senders: both directions of every edge, once.
    receivers: likewise.
    labels: class of each node, negative for none.
    splits: for each run, masks of training, validation and test nodes, such as `evaluation.planetoid_split` draws.

  Raises:
    ValueError: on what `structure.from_edges` refuses, no split, or a mask that selects a node without a label.
  """
  if not splits:
    raise ValueError("splits: got none, expected at least one")
  masks = [np.stack(part) for part in zip(*splits, strict=True)]
  for name, mask in zip(("train", "validation", "test"), masks, strict=True):
    if (mask & (labels < 0)).any() or not mask.any(axis=1).all():
      raise ValueError(
        f"splits: got {name} masks that are empty or hold nodes without a label, expected labelled nodes"
      )
  x = sparse.from_scipy(features) if scipy.sparse.issparse(features) else features
  graph = structure.normalize(structure.from_edges(senders, receivers, num_nodes=len(labels), nodes=x))
  labels = np.maximum(labels, 0)
  operator = sparse.operator(graph._replace(nodes=labels))
  return Task(*jax.tree.map(jnp.asarray, (graph, operator, labels, *masks)))


def learner(
  net: nn.Module,
  *,
  learning_rate: float,
  l2: float,
  epochs: int,
  patience: int,
  decayed: Sequence[str] | None = None,
  epochs_per_step: int = 25,
) -> Learner:
  """Trains a network on all splits of a `Task` at once; the state is a `Run` with a leading axis of splits.

  A run that has stopped keeps its state while others go on.

  Args:
    net: called as `net.apply(variables, graph, operator, train=...)`, with random stream "dropout". Collections beside
      "params", such as "batch_stats", are what the last training pass left.
    learning_rate: of Adam.
    l2: coefficient of the L2 term in the gradient, before Adam's moments (not AdamW).
    epochs: most updates.
    patience: in the second half of the epochs, stop where the validation loss exceeds the mean of this many before it;
      0 never stops.
    decayed: names of the top-level layers under the L2 term; None for all.
    epochs_per_step: how many epochs a step of the learner runs, in one compiled loop.
  """
  window = max(patience, 1)
  chosen = lambda params: {name: decayed is None or name in decayed for name in params}
  tx = optax.chain(optax.add_decayed_weights(l2, chosen), optax.adam(learning_rate))
  per_run = (0, Task(*[None] * 3, *[0] * 3))  # type: ignore[arg-type]  # what has an axis of runs: state and masks

  def cross_entropy(logits, task, mask):
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits.astype("float32"), task.labels)
    return jnp.sum(loss * mask) / jnp.sum(mask)

  def init(key, task):
    key, params_key = jax.random.split(key)
    variables = net.init(params_key, task.graph, task.operator)
    best = Best(jnp.inf, 0.0, 0.0, variables)
    run = Run(variables, tx.init(variables["params"]), key, 0, jnp.zeros(window), best, False)
    return jax.tree.map(jnp.asarray, run)

  def epoch(run, task):
    key, dropout = jax.random.split(run.key)
    collections = {name: value for name, value in run.variables.items() if name != "params"}

    def objective(params):
      logits, updated = net.apply(
        {"params": params, **collections}, task.graph, task.operator,
        train=True, rngs={"dropout": dropout}, mutable=list(collections),
      )  # fmt: skip
      return cross_entropy(logits, task, task.train), updated

    params = run.variables["params"]
    gradient, collections_after = jax.grad(objective, has_aux=True)(params)
    updates, moments = tx.update(gradient, run.moments, params)
    variables = {"params": optax.apply_updates(params, updates), **collections_after}
    logits = net.apply(variables, task.graph, task.operator)
    loss = cross_entropy(logits, task, task.validation)
    accuracy = functools.partial(evaluation.accuracy, logits, task.labels)
    best = Best(loss, accuracy(task.validation), accuracy(task.test), variables)

    number = run.epoch + 1
    earlier = jnp.sum(run.losses) / jnp.clip(run.epoch, 1, window)  # the mean does not include this epoch's loss
    stop = (patience > 0) & (number > epochs // 2) & (loss > earlier) | (number >= epochs)
    losses = run.losses.at[run.epoch % window].set(loss)
    best = _where(loss < run.best.loss, best, run.best)
    return _where(run.stopped, run, Run(variables, moments, key, number, losses, best, stop))

  def init_all(key, task):
    return jax.vmap(init, per_run)(jax.random.split(key, len(task.train)), task)

  def step(runs, task):
    def train(runs):
      return jax.lax.scan(lambda r, _: (jax.vmap(epoch, per_run)(r, task), None), runs, length=epochs_per_step)[0]

    runs = jax.lax.cond(jnp.all(runs.stopped), lambda runs: runs, train, runs)
    return runs, evaluate(runs, task)

  def evaluate(runs, task):
    del task  # every epoch has been evaluated
    best = {"loss": runs.best.loss, "validation_accuracy": runs.best.validation, "test_accuracy": runs.best.test}
    return {name: jnp.mean(value) for name, value in best.items()} | {"running": jnp.sum(~runs.stopped)}

  return Learner(init_all, step, evaluate)


def _where(condition, a, b):
  """`a` where the condition holds, else `b`, leaf by leaf."""
  return jax.tree.map(functools.partial(jnp.where, condition), a, b)


class GCN(nn.Module):
  """Graph convolutions with dropout before and ReLU between them (Kipf and Welling, ICLR 2017, arXiv:1609.02907).

  With `convolution=False` linear layers that do not see the graph take their place: the MLP that a graph network is
  compared with. Layers are named layer_0, layer_1, ...

  Attributes:
    num_classes: C.
    hidden: width between layers.
    dropout: rate in training.
    depth: number of layers.
    convolution: whether layers see the graph.
  """

  num_classes: int
  hidden: int = 16
  dropout: float = 0.5
  depth: int = 2
  convolution: bool = True

  @nn.compact
  def __call__(
    self, graph: jraph.GraphsTuple, operator: sparse.Operator | None = None, *, train: bool = False
  ) -> Float[Array, "n c"]:
    """Logits [N, C]; arguments as those of `DAGNN`."""
    x = graph.nodes
    for i in range(self.depth):
      width = self.hidden if i < self.depth - 1 else self.num_classes
      x = layers.Dropout(self.dropout, relu=i > 0)(x, train=train)
      if self.convolution:
        x = layers.GCNConv(width, name=f"layer_{i}")(graph if operator is None else operator, x)
      else:
        x = layers.Linear(width, initializer="glorot", name=f"layer_{i}")(x)
    return x
