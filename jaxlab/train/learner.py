"""Training as a pair of pure functions: the `Learner`, and the one that most experiments need, `supervised`.

A learner is to training what an optax optimizer is to a gradient step: `init` makes a state (any pytree), `step` maps a
state and a batch to the next state and its metrics, `evaluate` measures a state. All three can be jitted, vmapped over
seeds (`over_seeds`), pmapped and sharded; randomness comes from a key inside the state.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxlab import checks

Batch: TypeAlias = PyTree
State: TypeAlias = PyTree
Metrics: TypeAlias = Mapping[str, Array]
Loss: TypeAlias = Callable[[Any, Batch], tuple[Float[Array, ""], Metrics]]


class Learner(NamedTuple):
  """A way to train.

  Attributes:
    init: (key, batch) -> state. The batch gives shapes; its values must not matter.
    step: (state, batch) -> (next state, metrics). `train.fit` watches the metrics named `loss` and `grad_norm` and
      stops where one is not finite; the others may be anything.
    evaluate: (state, batch) -> metrics. Draws nothing and changes nothing.
    axis_name: the device axis over which `step` averages gradients and statistics, for `train.pmap_step`; None if it
      computes on the whole batch.
  """

  init: Callable[[Key[Array, ""], Batch], State]
  step: Callable[[State, Batch], tuple[State, Metrics]]
  evaluate: Callable[[State, Batch], Metrics]
  axis_name: str | None = None


@flax.struct.dataclass
class TrainState:
  """State of a `supervised` learner.

  Attributes:
    step: updates done.
    params: trainable weights.
    collections: every other flax collection of the model, such as `batch_stats`.
    opt_state: state of the optimizer.
    average: exponential moving average of all variables, or None.
    key: where the run's randomness comes from; constant, because step t uses `fold_in(key, t)`.
  """

  step: Int[Array, ""]
  params: PyTree
  collections: dict[str, PyTree]
  opt_state: PyTree
  average: dict[str, PyTree] | None
  key: Key[Array, ""]

  @property
  def variables(self) -> dict[str, PyTree]:
    """What `model.apply` takes: the weights as last updated."""
    return {"params": self.params, **self.collections}

  @property
  def best_variables(self) -> dict[str, PyTree]:
    """What `evaluate` uses: the moving average where there is one, else `variables`."""
    return self.variables if self.average is None else self.average


def supervised(
  model: nn.Module,
  loss: Loss,
  tx: optax.GradientTransformation,
  *,
  inputs: Callable[[Batch], Any] = lambda batch: batch["image"],
  ema_decay: float | None = None,
  accumulate: int = 1,
  axis_name: str | None = None,
) -> Learner:
  """Backpropagation through a flax model called as `model.apply(variables, inputs(batch), train=...)`.

  Args:
    model: draws random numbers from the streams `dropout` and `drop_path` only.
    loss: (outputs, batch) -> (mean loss, metrics). `loss` and `grad_norm` are added to the metrics.
    tx: the optimizer.
    inputs: what of a batch the model sees: an array or a graph.
    ema_decay: d of the moving average `average = d * average + (1 - d) * variables`, taken after every update and
      used by `evaluate`. Statistics of BatchNorm are averaged like the weights, so that the two stay in step.
    accumulate: micro-batches a batch is computed in, to save memory. Each array of the batch is split along its first
      axis, so batches that hold a graph need 1. The update is that of the whole batch as long as the loss is a mean
      over examples and the model has no BatchNorm, which normalises each micro-batch by itself.
    axis_name: axis of `pmap` or `vmap` over which gradients, statistics and metrics are averaged.

  Returns:
    A learner whose state is a `TrainState`.

  Raises:
    ValueError: on a decay outside [0, 1), fewer than one micro-batch, or (while tracing) a batch that does not split.
  """
  if ema_decay is not None:
    checks.rate("ema_decay", ema_decay)
  checks.count("accumulate", accumulate)

  def init(key: Key[Array, ""], batch: Batch) -> TrainState:
    state_key, *init_keys = jax.random.split(key, 4)
    rngs = dict(zip(("params", "dropout", "drop_path"), init_keys, strict=True))
    collections = dict(model.init(rngs, inputs(batch), train=False))
    params = collections.pop("params")
    average = None if ema_decay is None else {"params": params, **collections}
    return TrainState(jnp.zeros((), jnp.int32), params, collections, tx.init(params), average, state_key)

  def objective(
    params: PyTree, collections: dict[str, PyTree], batch: Batch, key: Key[Array, ""]
  ) -> tuple[Float[Array, ""], tuple[dict[str, PyTree], Metrics]]:
    dropout, drop_path = jax.random.split(key)
    outputs, updated = model.apply(
      {"params": params, **collections},
      inputs(batch),
      train=True,
      rngs={"dropout": dropout, "drop_path": drop_path},
      mutable=list(collections),
    )
    value, metrics = loss(outputs, batch)
    return value, (dict(updated), {"loss": value, **metrics})

  gradient = jax.grad(objective, has_aux=True)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(state.key, state.step)
    if axis_name is not None:
      key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

    if accumulate == 1:
      grads, (collections, metrics) = gradient(state.params, state.collections, batch, key)
    else:

      def micro_step(carry: tuple[PyTree, PyTree], x: tuple[PyTree, Array]) -> tuple[tuple[PyTree, PyTree], Metrics]:
        total, collections = carry
        micro_batch, i = x
        grads, (collections, metrics) = gradient(state.params, collections, micro_batch, jax.random.fold_in(key, i))
        return (jax.tree.map(jnp.add, total, grads), collections), metrics

      start = jax.tree.map(jnp.zeros_like, state.params), state.collections
      micro_batches = _split(batch, accumulate), jnp.arange(accumulate)
      (total, collections), metrics = jax.lax.scan(micro_step, start, micro_batches)
      grads = jax.tree.map(lambda g: g / accumulate, total)
      metrics = jax.tree.map(lambda m: jnp.mean(m, axis=0), metrics)

    if axis_name is not None:
      grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
      collections = jax.tree.map(lambda x: jax.lax.pmean(x, axis_name) if _floating(x) else x, collections)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if ema_decay is not None:
      average = _moved(state.average, {"params": params, **collections}, 1 - ema_decay)
    state = TrainState(state.step + 1, params, collections, opt_state, average, state.key)
    return state, {**metrics, "grad_norm": optax.global_norm(grads)}

  def evaluate(state: TrainState, batch: Batch) -> Metrics:
    outputs = model.apply(state.best_variables, inputs(batch), train=False)
    value, metrics = loss(outputs, batch)
    metrics = {"loss": value, **metrics}
    return metrics if axis_name is None else jax.lax.pmean(metrics, axis_name)

  return Learner(init, step, evaluate, axis_name)


def over_seeds(learner: Learner, *, batch_axis: int | None = None) -> Learner:
  """The same learner for several runs at once, in one vmapped computation.

  Args:
    learner: for one run.
    batch_axis: None if all runs see the same batch (a full-batch graph, or the same order of examples); 0 if the batch
      holds one per run along its first axis.

  Returns:
    A learner whose key, states and metrics have a leading axis of runs: `init(jax.random.split(key, 10), batch)`.
  """
  axes = (0, batch_axis)
  return Learner(
    jax.vmap(learner.init, axes), jax.vmap(learner.step, axes), jax.vmap(learner.evaluate, axes), learner.axis_name
  )


def cross_entropy(
  *,
  label_smoothing: float = 0.0,
  labels: Callable[[Batch], Array] = lambda batch: batch["label"],
  mask: Callable[[Batch], Bool[Array, "..."]] | None = None,
) -> Loss:
  """Softmax cross entropy and accuracy as a loss for `supervised`.

  Args:
    label_smoothing: e in (1 - e) onehot + e / C.
    labels: of a batch: class numbers [...] or distributions [..., C], as mixup makes them.
    mask: of a batch: which entries count [...]: the labelled nodes of a graph, the real examples of a padded batch.
      None for all.

  Returns:
    (logits [..., C], batch) -> (mean over what counts, in float32; {"accuracy"}, a fraction). An empty mask gives 0.
  """
  checks.rate("label_smoothing", label_smoothing)

  def loss(logits: Float[Array, "... c"], batch: Batch) -> tuple[Float[Array, ""], Metrics]:
    logits, target = logits.astype(jnp.float32), jnp.asarray(labels(batch))
    if target.ndim == logits.ndim:
      best = jnp.argmax(target, -1)
    else:
      best, target = target, jax.nn.one_hot(target, logits.shape[-1])
    if target.shape != logits.shape:
      raise ValueError(f"labels: got shape {best.shape} for logits {logits.shape}, expected {logits.shape[:-1]}")
    value = optax.losses.softmax_cross_entropy(logits, optax.smooth_labels(target, label_smoothing))
    hit = (jnp.argmax(logits, -1) == best).astype(jnp.float32)
    if mask is None:
      return jnp.mean(value), {"accuracy": jnp.mean(hit)}
    weight = jnp.asarray(mask(batch)).astype(jnp.float32)
    if weight.shape != value.shape:
      raise ValueError(f"mask: got shape {weight.shape}, expected {value.shape}, an entry per label")
    total = jnp.maximum(jnp.sum(weight), 1.0)
    return jnp.sum(weight * value) / total, {"accuracy": jnp.sum(weight * hit) / total}

  return loss


def decay_mask(params: PyTree) -> PyTree:
  """Which weights to decay, for `optax.adamw(..., mask=decay_mask)`: kernels, not biases nor scales of norms, nor what
  sets the rates of a selective scan (`A_log`, `D`, `dt_bias`), which Mamba never decays."""

  def decays(path: Any, p: Array) -> bool:
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return jnp.ndim(p) > 1 and name not in ("A_log", "D", "dt_bias")

  return jax.tree_util.tree_map_with_path(decays, params)


def _moved(old: PyTree, new: PyTree, fraction: float) -> PyTree:
  """`old` moved towards `new`; whole numbers cannot be averaged, so they take the new value."""
  return jax.tree.map(lambda a, b: a + fraction * (b - a) if _floating(b) else b, old, new)


def _floating(x: Array) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating)


def _split(batch: Batch, parts: int) -> Batch:
  """Arrays [B, ...] -> [parts, B / parts, ...]. Micro-batch i takes the examples i, i + parts, ...: where the batch is
  sharded over devices in blocks, each device then keeps its own examples in every micro-batch."""

  def split(path: Sequence[Any], x: Array) -> Array:
    size = checks.leading("batch" + jax.tree_util.keystr(tuple(path)), x)
    if size % parts:
      raise ValueError(f"accumulate: got {parts} for a batch of {size} examples, expected a divisor of it")
    return jnp.swapaxes(jnp.reshape(x, (size // parts, parts, *x.shape[1:])), 0, 1)

  return jax.tree_util.tree_map_with_path(split, batch)
