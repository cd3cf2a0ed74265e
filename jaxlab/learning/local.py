"""Supervised local learning: a network in modules, each trained by the loss of its own head.

    h_j = module_j(stop_gradient(h_{j-1})),   theta_j and its head take the gradient of L_j(head_j(h_j)) alone

No gradient crosses a border, so a module's activations can go before the next module starts: a step needs the memory of
the largest module with its head instead of that of the network. `learner` is written so: a loop over modules, each with
a forward and a backward pass of its own, and one optimizer step at the end. The result is that of differentiating the
sum of the losses through `stop_gradient` at the borders.

Systems subclass `LocalNetwork`: they say where modules end and what a head is.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from jaxlab import checks
from jaxlab.models.backbones import cifar
from jaxlab.nn.module import check_images, precision
from jaxlab.train import Batch, Learner, Metrics, TrainState

LocalLoss = Callable[[int, Any, Batch], tuple[Float[Array, ""], Metrics]]
_AVERAGES = "averages"


class LocalNetwork(nn.Module):
  """A backbone in modules; the last one has the classifier, each other a head.

  Parameters are `units_<i>`, `classifier` and `heads_<j>`.

  Attributes:
    backbone: the units.
    num_classes: of the classifier.
    in_channels: of the images.
    dtype: compute dtype.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  backbone: cifar.Backbone
  num_classes: int = 10
  in_channels: int = 3
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  def ends(self) -> tuple[int, ...]:
    """The last unit of each module; that of the last is the backbone's last."""
    raise NotImplementedError

  def make_head(self, index: int) -> nn.Module:
    """The head of module `index`."""
    raise NotImplementedError

  def options(self) -> dict[str, Any]:
    """Precision and axis, for layers."""
    return {**precision(self), "axis_name": self.axis_name}

  def setup(self) -> None:
    """Makes units, classifier and heads."""
    self.units = [cifar.unit(self.backbone, i, **self.options()) for i in range(len(self.backbone))]
    self.heads = [self.make_head(j) for j in range(self.num_modules - 1)]
    self.classifier = cifar.linear(self.num_classes, self.backbone.widths[-1], **precision(self))

  @property
  def num_modules(self) -> int:
    """How many modules, the last included."""
    return len(self.ends())

  def span(self, index: int) -> range:
    """The units of a module."""
    ends = (-1, *self.ends())
    return range(ends[index] + 1, ends[index + 1] + 1)

  def members(self, index: int) -> tuple[str, ...]:
    """Names of the parameters that a module's loss trains."""
    last = index == self.num_modules - 1
    return (*(f"units_{i}" for i in self.span(index)), "classifier" if last else f"heads_{index}")

  def averaged(self, index: int) -> dict[str, str]:
    """Parameters that module `index` uses but no gradient moves, and of which others they are the running average."""
    return {}

  def head(self, h: Float[Array, "b i j f"], index: int, train: bool) -> Any:
    """Output of a module's head."""
    return self.heads[index](h, train=train)

  def module(self, h: Float[Array, "b h w c"], index: int, *, train: bool = False) -> tuple[Array, Any]:
    """One module: (its features, what its head puts out), the classifier's logits for the last."""
    for i in self.span(index):
      h = self.units[i](h, train=train)
    if index < self.num_modules - 1:
      return h, self.head(h, index, train)
    return h, self.classifier(cifar.average_pool(h))

  def __call__(self, images: Float[Array, "b h w c"], *, train: bool = False, heads: bool = False) -> Any:
    """Logits [B, num_classes]. No gradient of the last loss reaches modules before the last.

    Args:
      images: normalised.
      train: whether batch statistics are used and kept.
      heads: return a tuple of what every head puts out instead, the classifier's logits last.
    """
    check_images(images, self.in_channels)
    h, outputs = images.astype(self.dtype), []
    for index in range(self.num_modules):
      if heads or self.is_initializing() or index == self.num_modules - 1:
        h, output = self.module(h, index, train=train)
        outputs.append(output)
      else:
        for i in self.span(index):
          h = self.units[i](h, train=train)
      h = jax.lax.stop_gradient(h)
    return tuple(outputs) if heads else outputs[-1]


def learner(
  model: LocalNetwork, loss: LocalLoss, tx: optax.GradientTransformation, *, momentum: float | None = None
) -> Learner:
  """Trains modules one after another on a batch, then updates all weights.

  Args:
    model: the network; its `axis_name` is the learner's.
    loss: (module, what its head puts out, batch) -> (mean loss, metrics).
    tx: the optimizer of all weights.
    momentum: m of `average = m average + (1 - m) weights` for what the model averages (`model.averaged`), from the
      weights before the update; None for models that average nothing. Averages are no parameters for the optimizer.
      They are kept in float32 at least: in bfloat16, steps of 1 - m = 0.005 would be rounded away.

  Returns:
    A learner on batches of `image` and `label`, whose state is a `TrainState` with `batch_stats` and `averages` among
    its collections. Metrics of a step are those of the last module's loss, `loss`, the sum over modules, and
    `local_loss`, the mean over all modules but the last. `evaluate` runs no heads: its `loss` is the last module's
    alone, not to be set beside that of a step.

  Raises:
    ValueError: a momentum outside [0, 1], or one that is missing or in vain.
  """
  count = model.num_modules
  followed = {name: source for j in range(count) for name, source in model.averaged(j).items()}
  if (momentum is None) == bool(followed):
    expected = "a number in [0, 1]" if followed else "None for a network without averages"
    raise ValueError(f"momentum: got {momentum}, expected {expected}")
  decay = 0.0 if momentum is None else checks.real("momentum", momentum)
  axis_name = model.axis_name

  def init(key: Key[Array, ""], batch: Batch) -> TrainState:
    init_key, state_key = jax.random.split(key)
    variables = dict(model.init(init_key, batch["image"]))
    params, averages = split_averages(model, variables.pop("params"))
    averages = jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), averages)
    collections = variables | ({_AVERAGES: averages} if averages else {})
    return TrainState(jnp.zeros((), jnp.int32), params, collections, tx.init(params), None, state_key)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    h = jnp.asarray(batch["image"])
    check_images(h, model.in_channels)
    h = h.astype(model.dtype)
    averages, stats = state.collections.get(_AVERAGES, {}), state.collections["batch_stats"]
    grads: dict[str, PyTree] = {}
    seen: dict[str, PyTree] = {}
    metrics: Metrics = {}
    losses: list[Array] = []
    done = jnp.zeros((), jnp.float32)
    for index in range(count):
      mine = {name: state.params[name] for name in model.members(index)}
      frozen = {
        name: jax.tree.map(lambda average, weights: average.astype(weights.dtype), averages[name], state.params[source])
        for name, source in model.averaged(index).items()
      }
      first = f"units_{model.span(index)[0]}"  # all of a module comes after it
      mine[first] = _after(done, mine[first])
      known = {name: stats[name] for name in (*mine, *frozen) if name in stats}

      def objective(mine: PyTree, h: Array, index: int = index, frozen: PyTree = frozen, known: PyTree = known) -> Any:
        variables = {"params": {**mine, **frozen}, "batch_stats": known}
        (h, output), updated = model.apply(variables, h, index, train=True, method="module", mutable=["batch_stats"])
        value, metrics = loss(index, output, batch)
        return value, (h, dict(updated)["batch_stats"], metrics)

      (value, (h, updated, metrics)), gradient = jax.value_and_grad(objective, has_aux=True)(mine, h)
      done = jnp.stack([leaf.ravel()[0].astype(jnp.float32) for leaf in jax.tree.leaves(gradient)]).sum()
      grads |= gradient
      seen |= updated
      losses.append(value)

    every = jnp.stack(losses)
    metrics = {"loss": every.sum(), **metrics}
    if count > 1:
      metrics["local_loss"] = every[:-1].mean()
    if axis_name is not None:
      grads, seen, metrics = jax.lax.pmean((grads, seen, metrics), axis_name)
    collections: dict[str, PyTree] = {"batch_stats": seen}
    if followed:
      move = lambda average, weights: decay * average + (1 - decay) * weights.astype(average.dtype)
      collections[_AVERAGES] = {
        name: jax.tree.map(move, averages[name], state.params[source]) for name, source in followed.items()
      }
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = TrainState(state.step + 1, params, collections, opt_state, None, state.key)
    return state, {**metrics, "grad_norm": optax.global_norm(grads)}

  def evaluate(state: TrainState, batch: Batch) -> Metrics:
    variables = {"params": state.params, "batch_stats": state.collections["batch_stats"]}
    value, metrics = loss(count - 1, model.apply(variables, batch["image"]), batch)
    metrics = {"loss": value, **metrics}
    return metrics if axis_name is None else jax.lax.pmean(metrics, axis_name)

  return Learner(init, step, evaluate, axis_name)


def _after(done: Float[Array, ""], weights: PyTree) -> PyTree:
  """The same weights, but not before the gradients that `done` is made of are there, so that the activations they
  needed are gone. A compiler orders independent work as it likes, XLA's for CPU regardless of `optimization_barrier`
  and to three times the memory; so `done` enters by a value: where it is NaN, and training at an end, so are weights.
  """
  return jax.tree.map(lambda leaf: jnp.where(jnp.isnan(done), jnp.nan, leaf).astype(leaf.dtype), weights)


def split_averages(model: LocalNetwork, params: dict[str, PyTree]) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
  """All parameters of a network as (what gradients train, running averages)."""
  names = {name for j in range(model.num_modules) for name in model.averaged(j)}
  return (
    {name: leaf for name, leaf in params.items() if name not in names},
    {name: leaf for name, leaf in params.items() if name in names},
  )


def sgd(rate: optax.ScalarOrSchedule, *, weight_decay: float = 1e-4) -> optax.GradientTransformation:
  """The recipe's optimizer: Nesterov momentum of 0.9, and weight decay in the gradient of every parameter."""
  return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum=0.9, nesterov=True))


def schedule(
  rate: float, epochs: int, steps_per_epoch: int, *, warmup: int = 10, start: float = 0.01
) -> optax.Schedule:
  """Learning rate of the recipe, constant within an epoch: a cosine, after a linear warm-up.

  In epoch e = 1, 2, ... it is r(e) = rate / 2 (1 + cos(pi e / epochs)), and for e <= warmup
  r(e) (e - 1) / warmup + start (warmup + 1 - e) / warmup.

  Args:
    rate: the highest.
    epochs: in all.
    steps_per_epoch: updates in one.
    warmup: epochs of warm-up; 0 for none.
    start: rate of the first epoch.
  """
  checks.count("epochs", epochs)
  checks.count("steps_per_epoch", steps_per_epoch)
  checks.count("warmup", warmup, 0, epochs)

  def value(step: Any) -> Array:
    epoch = jnp.asarray(step) // steps_per_epoch + 1
    cosine = rate / 2 * (1 + jnp.cos(jnp.pi * epoch / epochs))
    share = jnp.clip((epoch - 1) / max(warmup, 1), 0, 1)
    return jnp.where(epoch <= warmup, share * cosine + (1 - share) * start, cosine)

  return value
