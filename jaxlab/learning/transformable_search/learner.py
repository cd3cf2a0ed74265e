"""Training of the shared weights and of the architecture, and of a found network under a teacher."""

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxlab import checks, train
from jaxlab.learning.transformable_search.search import SearchNetwork, sample
from jaxlab.learning.transformable_search.space import (
  Architecture,
  Genotype,
  Space,
  expected_macs,
  found_macs,
  initial,
  macs,
)

_ROUNDOFF = 1e-6  # of a share in float32, in which a search compares


@flax.struct.dataclass
class SearchState:
  """State of a search.

  Attributes:
    step: updates done.
    params: shared weights.
    batch_stats: running statistics.
    opt_state: of the weights' optimizer.
    architecture: logits.
    architecture_opt_state: of their optimizer.
    found: the last logits whose F was in [target - tolerance, target]; the first ones, before there were any, which
      `on_target` tells.
    key: where noise comes from; constant, because step t uses `fold_in(key, t)`.
  """

  step: Int[Array, ""]
  params: PyTree
  batch_stats: PyTree
  opt_state: PyTree
  architecture: Architecture
  architecture_opt_state: PyTree
  found: Architecture
  key: Key[Array, ""]


def temperature(epochs: int, steps_per_epoch: int, *, first: float = 5.0, last: float = 0.1) -> optax.Schedule:
  """tau = last + (first - last) (1 + cos(pi epoch / epochs)) / 2 in epoch 0, 1, ..., of a step."""
  checks.count("epochs", epochs)
  checks.count("steps_per_epoch", steps_per_epoch)

  def value(step: Any) -> Array:
    epoch = jnp.minimum(jnp.asarray(step) // steps_per_epoch, epochs)
    return last + (first - last) * (1 + jnp.cos(jnp.pi * epoch / epochs)) / 2

  return value


def architecture_optimizer(
  rate: optax.ScalarOrSchedule = 1e-3, *, weight_decay: float = 1e-3
) -> optax.GradientTransformation:
  """Adam of betas 0.5 and 0.999, weight decay in the gradient."""
  return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(rate, b1=0.5, b2=0.999))


def cost(expected: Float[Array, ""], found: Float[Array, ""], target: float, tolerance: float) -> Float[Array, ""]:
  """-log E_F where F is below target - tolerance, log E_F where it is above the target, else 0.

  Args:
    expected: E_F, multiplications.
    found: F, multiplications.
    target: T, multiplications.
    tolerance: multiplications.
  """
  sign = jnp.where(found < target - tolerance, -1.0, jnp.where(found > target, 1.0, 0.0))
  return sign * jnp.log(expected)


def on_target(space: Space, genotype: Genotype, *, ratio: float, tolerance: float = 0.05) -> bool:
  """Host. Whether F is in [target - tolerance, target]; arguments as of `search_learner`.

  A search that never came there leaves the network that it started with as its `found`, for which this is False,
  unless that one was there by chance.
  """
  share = macs(space, genotype, connected=False) / macs(space, space.full)
  return ratio - tolerance - _ROUNDOFF <= share <= ratio + _ROUNDOFF


def search_learner(
  model: SearchNetwork,
  tx: optax.GradientTransformation,
  architecture_tx: optax.GradientTransformation,
  tau: optax.Schedule,
  *,
  ratio: float,
  tolerance: float = 0.05,
  cost_weight: float = 2.0,
) -> train.Learner:
  """The search: in a step weights descend on one batch, then the architecture on another, with new noise.

  Args:
    model: shared weights.
    tx: their optimizer.
    architecture_tx: the logits' optimizer.
    tau: temperature by step.
    ratio: R, target cost over the full network's.
    tolerance: below the target, over the full network's cost.
    cost_weight: lambda.

  Returns:
    A learner on batches {"weights": {"image", "label"}, "architecture": {"image", "label"}}, of the two halves of the
    training set. Its metrics have `macs` and `expected_macs`, F and E_F over the full network's cost, before the step.
    `evaluate` takes one batch {"image", "label"} and samples a network, always the same one for a state.

  Raises:
    ValueError: ratio or tolerance outside [0, 1], a negative weight.
  """
  checks.real("ratio", ratio)
  checks.real("tolerance", tolerance)
  checks.real("cost_weight", cost_weight, 0.0, float("inf"))
  space, axis_name = model.space, model.axis_name
  full = float(macs(space, space.full))
  cross_entropy = train.cross_entropy()
  mean = lambda tree: tree if axis_name is None else jax.lax.pmean(tree, axis_name)

  def init(key: Key[Array, ""], batch: train.Batch) -> SearchState:
    model_key, architecture_key, state_key = jax.random.split(key, 3)
    architecture = initial(space, architecture_key)
    drawn = sample(architecture, state_key, tau(0))
    variables = model.init(model_key, batch["weights"]["image"], drawn)
    params = variables["params"]
    return SearchState(
      jnp.zeros((), jnp.int32),
      params,
      variables["batch_stats"],
      tx.init(params),
      architecture,
      architecture_tx.init(architecture),
      architecture,
      state_key,
    )

  def loss(
    params: PyTree, batch_stats: PyTree, architecture: Architecture, batch: train.Batch, key: Any, t: Any
  ) -> tuple[Float[Array, ""], tuple[PyTree, train.Metrics]]:
    drawn = sample(architecture, key, t)  # the same noise on all devices: one network a batch
    variables = {"params": params, "batch_stats": batch_stats}
    logits, updated = model.apply(variables, batch["image"], drawn, train=True, mutable=["batch_stats"])
    value, metrics = cross_entropy(logits, batch)
    return value, (updated["batch_stats"], metrics)

  def objective(
    architecture: Architecture, params: PyTree, batch_stats: PyTree, batch: train.Batch, key: Any, t: Any
  ) -> tuple[Float[Array, ""], tuple[PyTree, train.Metrics]]:
    value, (batch_stats, metrics) = loss(params, batch_stats, architecture, batch, key, t)
    found, expected = found_macs(space, architecture), expected_macs(space, architecture)
    penalty = cost_weight * cost(expected, found, ratio * full, tolerance * full)
    metrics = {"architecture_loss": value, "architecture_accuracy": metrics["accuracy"]}
    return value + penalty, (batch_stats, {**metrics, "macs": found / full, "expected_macs": expected / full})

  def step(state: SearchState, batch: train.Batch) -> tuple[SearchState, train.Metrics]:
    weight_key, architecture_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    t = tau(state.step)
    (value, (batch_stats, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(
      state.params, state.batch_stats, state.architecture, batch["weights"], weight_key, t
    )
    value, batch_stats, metrics, grads = mean((value, batch_stats, metrics, grads))
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    slope, (batch_stats, more) = jax.grad(objective, has_aux=True)(
      state.architecture, params, batch_stats, batch["architecture"], architecture_key, t
    )
    slope, batch_stats, more = mean((slope, batch_stats, more))
    updates, architecture_opt_state = architecture_tx.update(slope, state.architecture_opt_state, state.architecture)
    architecture = optax.apply_updates(state.architecture, updates)
    share = found_macs(space, architecture) / full
    inside = (share >= ratio - tolerance) & (share <= ratio)
    found = jax.tree.map(lambda new, old: jnp.where(inside, new, old), architecture, state.found)
    state = SearchState(
      state.step + 1, params, batch_stats, opt_state, architecture, architecture_opt_state, found, state.key
    )
    norm = optax.global_norm((grads, slope))
    return state, {"loss": value, **metrics, **more, "temperature": t, "grad_norm": norm}

  def evaluate(state: SearchState, batch: train.Batch) -> train.Metrics:
    drawn = sample(state.architecture, jax.random.fold_in(state.key, -1 - state.step), tau(state.step))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    value, metrics = cross_entropy(model.apply(variables, batch["image"], drawn), batch)
    return mean({"loss": value, **metrics})

  return train.Learner(init, step, evaluate, axis_name)


# --------------------------------------------------------------------------------------------------- knowledge transfer


@flax.struct.dataclass
class DistilledState:
  """State of a student.

  Attributes:
    student: what is trained.
    teacher: variables of the teacher, constant.
  """

  student: train.TrainState
  teacher: PyTree

  @property
  def params(self) -> PyTree:
    """The student's weights."""
    return self.student.params


def knowledge_transfer(alpha: float = 0.9, heat: float = 4.0) -> train.Loss:
  """(1 - alpha) CE + alpha T^2 KL(softmax(t / T) || softmax(s / T)), the mean over a batch.

  Args:
    alpha: weight of the teacher.
    heat: T.

  Returns:
    A loss on student's logits and batches with `label` and the teacher's logits, `teacher`.
  """
  checks.real("alpha", alpha)
  if not heat > 0:
    raise ValueError(f"heat: got {heat}, expected a number above 0")
  cross_entropy = train.cross_entropy()

  def loss(logits: Float[Array, "b k"], batch: train.Batch) -> tuple[Float[Array, ""], train.Metrics]:
    hard, metrics = cross_entropy(logits, batch)
    student = jax.nn.log_softmax(logits.astype(jnp.float32) / heat)
    teacher = jax.nn.log_softmax(batch["teacher"].astype(jnp.float32) / heat)
    soft = jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - student), -1))
    return (1 - alpha) * hard + alpha * heat**2 * soft, {**metrics, "cross_entropy": hard, "divergence": soft}

  return loss


def distilled_learner(
  student: nn.Module,
  tx: optax.GradientTransformation,
  teacher: nn.Module,
  teacher_variables: PyTree,
  *,
  alpha: float = 0.9,
  heat: float = 4.0,
) -> train.Learner:
  """Training of a network on labels and on what a trained one says.

  Args:
    student: called as `student(images, train=...)`.
    tx: its optimizer.
    teacher: the same, in evaluation.
    teacher_variables: of the teacher.
    alpha: weight of the teacher.
    heat: T.

  Returns:
    A learner on batches of `image` and `label` whose state is a `DistilledState`; `evaluate` has cross entropy and
    accuracy.
  """
  axis_name = getattr(student, "axis_name", None)
  learned = train.supervised(student, knowledge_transfer(alpha, heat), tx, axis_name=axis_name)
  plain = train.supervised(student, train.cross_entropy(), tx, axis_name=axis_name)

  def init(key: Key[Array, ""], batch: train.Batch) -> DistilledState:
    return DistilledState(learned.init(key, batch), jax.tree.map(jnp.asarray, teacher_variables))

  def step(state: DistilledState, batch: train.Batch) -> tuple[DistilledState, train.Metrics]:
    logits = teacher.apply(state.teacher, batch["image"])
    student_state, metrics = learned.step(state.student, {**batch, "teacher": logits})
    return DistilledState(student_state, state.teacher), metrics

  return train.Learner(init, step, lambda state, batch: plain.evaluate(state.student, batch), axis_name)
