"""What all algorithms share: the network, the recipe, and epochs with early stopping, for all splits in lockstep."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxlab import checks
from jaxlab.graph.nets.forward_gnn.convolution import Bordered, Conv, Kind
from jaxlab.graph.nets.forward_gnn.tasks import LinkTask, NodeTask, View
from jaxlab.train.learner import Learner, Metrics

RUNS = "runs"  # the axis of splits, which all learners here are vmapped over


@dataclasses.dataclass(frozen=True)
class Net:
  """A stack of graph convolutions with ReLU.

  Attributes:
    num_classes: C; None for link prediction.
    hidden: width of every layer.
    depth: number of layers.
    kind: "gcn", "sage" or "gat".
    heads: of GAT.
    dtype: compute dtype; norms, softmax and losses are in float32.
    param_dtype: parameter dtype.
  """

  num_classes: int | None = None
  hidden: int = 128
  depth: int = 2
  kind: Kind = "gcn"
  heads: int = 4
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  def __post_init__(self):
    if self.num_classes is not None:
      checks.count("num_classes", self.num_classes, 2)
    for name in ("hidden", "depth", "heads"):
      checks.count(name, getattr(self, name))
    checks.choice("kind", self.kind, Kind)
    if self.kind == "gat" and self.hidden % self.heads:
      raise ValueError(f"hidden: got {self.hidden}, expected a multiple of {self.heads} heads")

  def conv(self, features: int | None = None, *, concat: bool = True) -> Conv:
    """A layer; `hidden` outputs if not said otherwise."""
    return Conv(features or self.hidden, self.kind, self.heads, concat, self.dtype, self.param_dtype)

  def check(self, task: NodeTask | LinkTask) -> None:
    """Whether the network is for such a task.

    Raises:
      ValueError: node classification without a number of classes or (on the host) with too few, or links with one.
    """
    if isinstance(task, LinkTask):
      if self.num_classes is not None:
        raise ValueError(f"num_classes: got {self.num_classes} for link prediction, expected None")
    elif self.num_classes is None:
      raise ValueError("num_classes: got None for node classification, expected a number of classes")
    elif not isinstance(task.labels, jax.core.Tracer) and (least := int(task.labels.max()) + 1) > self.num_classes:
      raise ValueError(f"num_classes: got {self.num_classes}, expected at least {least}, as the labels need")


class Recipe(NamedTuple):
  """How every algorithm is trained: Adam on the whole graph, early stopping on the validation metric.

  Attributes:
    learning_rate: of Adam.
    l2: coefficient of the L2 term, added to the gradient of every parameter before Adam's moments (not AdamW).
    epochs: most updates, of each layer where layers are trained one after the other.
    patience: stop after this many validations without improvement, and take the best parameters.
    validate_every: epochs between validations.
    epochs_per_step: how many epochs a step of the learner runs at most, in one compiled loop.
  """

  learning_rate: float = 1e-3
  l2: float = 5e-4
  epochs: int = 1000
  patience: int = 100
  validate_every: int = 2
  epochs_per_step: int = 50

  def check(self) -> "Recipe":
    """Itself.

    Raises:
      ValueError: a number out of range.
    """
    for name in ("patience", "validate_every", "epochs_per_step"):
      checks.count(name, getattr(self, name))
    checks.count("epochs", self.epochs, self.validate_every)
    for name in ("learning_rate", "l2"):
      if not getattr(self, name) >= 0:
        raise ValueError(f"{name}: got {getattr(self, name)}, expected a number of at least 0")
    return self

  @property
  def steps(self) -> int:
    """Of a learner, to train a layer. The last update is validated in an epoch of its own."""
    return self.epochs // self.epochs_per_step + 1

  def optimizer(self, clip: float | None = None) -> optax.GradientTransformation:
    """Adam with the L2 term; `clip` bounds the norm of the gradient of what it is applied to."""
    parts = [] if clip is None else [optax.clip_by_global_norm(clip)]
    return optax.chain(*parts, optax.add_decayed_weights(self.l2), optax.adam(self.learning_rate))


class Progress(NamedTuple):
  """Training of a set of parameters, of one split.

  Attributes:
    params: after the updates so far.
    moments: of the optimizer.
    states: what an algorithm carries from epoch to epoch besides.
    loss: of the last update.
    best: parameters of highest validation metric.
    score: that metric.
    waited: validations since.
    stopped: whether this split has stopped; it stays as it is while others go on.
  """

  params: Any
  moments: Any
  states: Any
  loss: Float[Array, ""]
  best: Any
  score: Float[Array, ""]
  waited: Int[Array, ""]
  stopped: Array


def begin(params: Any, moments: Any, states: Any = ()) -> Progress:
  """Before the first update."""
  return Progress(
    params, moments, states, jnp.zeros(()), params, jnp.float32(-jnp.inf), jnp.zeros((), "int32"), jnp.zeros((), bool)
  )


def run_epochs(
  progress: Progress,
  epoch: Int[Array, ""],
  update: Callable[[Any, Any, Any], tuple[Any, Any, Any, Float[Array, ""], Any]],
  validate: Callable[[Any, Any], Float[Array, ""]],
  recipe: Recipe,
) -> tuple[Progress, Int[Array, ""], Array]:
  """Up to `epochs_per_step` epochs of a split, in step with all others.

  An epoch starts with the forward pass that its update needs. What the pass computed is handed to the validation of the
  parameters that the epoch found, so that most algorithms validate without a second pass.

  Args:
    progress: of the split.
    epoch: updates so far, the same for all splits.
    update: (params, moments, states) -> (params, moments, states, loss, outputs for `validate`).
    validate: (params, outputs) -> metric, higher is better.
    recipe: when to validate and to stop.

  Returns:
    Progress, epoch, and whether all splits have stopped.
  """
  end = epoch + recipe.epochs_per_step

  def check(p: Progress, outputs: Any) -> Progress:
    score = validate(p.params, outputs)
    better = score > p.score
    waited = jnp.where(better, 0, p.waited + 1)
    new = p._replace(
      best=choose(better, p.params, p.best), score=jnp.where(better, score, p.score), waited=waited,
      stopped=waited >= recipe.patience,
    )  # fmt: skip
    return choose(p.stopped, p, new)

  def body(carry):
    p, epoch, _ = carry
    params, moments, states, loss, outputs = update(p.params, p.moments, p.states)
    due = (epoch > 0) & (epoch % recipe.validate_every == 0)
    p = jax.lax.cond(due, check, lambda p, _: p, p, outputs)
    p = p._replace(stopped=p.stopped | (epoch >= recipe.epochs))
    new = p._replace(params=params, moments=moments, states=states, loss=loss)
    p = choose(p.stopped, p, new)
    return p, epoch + 1, everywhere(p.stopped)

  start = progress, epoch, everywhere(progress.stopped)
  return jax.lax.while_loop(lambda carry: (carry[1] < end) & ~carry[2], body, start)


def everywhere(flag: Array) -> Array:
  """Whether a flag is set in all splits: one value, not one for each, so that loops and branches stay shared."""
  return jax.lax.pmin(flag.astype("int32"), RUNS) > 0


def choose(condition: Array, a: Any, b: Any) -> Any:
  """`a` where the condition holds, else `b`, leaf by leaf."""
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


class State(NamedTuple):
  """State of every learner here.

  Attributes:
    run: of each split, with a leading axis [S].
    layer: the layer in training, or how many there are after the last; algorithms that train all layers at once count
      as one layer.
    epoch: updates of that layer so far; a split that has stopped does not take part.
  """

  run: Any
  layer: Int[Array, ""]
  epoch: Int[Array, ""]


class Method(NamedTuple):
  """A way to train and to predict.

  Attributes:
    learner: for `train.fit`; its batch is the task, its metrics have an axis of splits [S].
    predict: (state, task, view) -> scores of the layers trained so far: of each class [S, N, C], or of the pairs of the
      view, positive ones first [S, 2 P].
    steps: of the learner, after which training has ended at the latest; further ones change nothing.
  """

  learner: Learner
  predict: Callable[[State, Any, View], Array]
  steps: int


def method(
  net: Net,
  init: Callable[[Array, Any], Any],
  step: Callable[[State, Any], tuple[State, Metrics]],
  evaluate: Callable[[State, Any], Metrics],
  predict: Callable[[State, Any, View], Array],
  steps: int,
) -> Method:
  """A method for all splits of a task from functions for one."""
  whole: Any = State(0, None, None)  # type: ignore[arg-type]

  def init_all(key, task):
    net.check(task)
    runs = jax.vmap(init, (0, task.axes))(jax.random.split(key, task.splits), task)
    return State(runs, jnp.zeros((), "int32"), jnp.zeros((), "int32"))

  def step_all(state, task):
    return jax.vmap(step, (whole, task.axes), (whole, 0), axis_name=RUNS)(state, task)

  def evaluate_all(state, task):
    return jax.vmap(evaluate, (whole, task.axes), axis_name=RUNS)(state, task)

  def predict_all(state, task, view):
    return jax.vmap(lambda state, task: predict(state, task, view), (whole, task.axes))(state, task)

  return Method(Learner(init_all, step_all, evaluate_all), predict_all, steps)


def classes_of(net: Net) -> int:
  """C of a node classifier."""
  if net.num_classes is None:
    raise ValueError("num_classes: got None, expected the number of classes")
  return net.num_classes


def init_layer(conv: Conv, key: Array, task: Any, *widths: int) -> Any:
  """Parameters of a layer whose input has blocks of these widths."""
  n = task.adjacency.shape[0]
  graph = Bordered(task.adjacency, jnp.zeros((n, 0)), jnp.zeros(n))
  return conv.init(key, graph, [jnp.zeros((n, width)) for width in widths])["params"]


def virtual_features(key: Array, num_classes: int, num_features: int) -> Float[Array, "c f"]:
  """Features of the virtual nodes, N(0, 1), drawn once and not trained."""
  return jax.random.normal(key, (num_classes, num_features))


def class_links(classes: Int[Array, " n"], linked: Any, num_classes: int) -> Float[Array, "n c"]:
  """Links of nodes of the mask `linked`, each with the virtual node of its class."""
  return jax.nn.one_hot(classes, num_classes) * linked.astype("float32")[:, None]


def mean_cross_entropy(logits: Float[Array, "n c"], labels: Int[Array, " n"], mask: Any) -> Float[Array, ""]:
  """Over the nodes of the mask."""
  loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits.astype("float32"), labels)
  return jnp.sum(loss * mask) / jnp.sum(mask)


def pair_cross_entropy(logits: Float[Array, " p2"]) -> Float[Array, ""]:
  """Mean binary cross-entropy of pairs, of which the first half are positive."""
  positive, negative = jnp.split(logits.astype("float32"), 2)
  return (jnp.mean(jax.nn.softplus(-positive)) + jnp.mean(jax.nn.softplus(negative))) / 2
