"""Training of diffusion networks: a `Learner` that draws times and noise."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxlab import checks
from jaxlab.nn.diffusion import Prediction, Process
from jaxlab.train.learner import Batch, Learner, Metrics, TrainState, supervised


class _Regression(nn.Module):
  """Squared error of the network's prediction at one time an example. Attributes as in `learner`."""

  network: nn.Module
  process: Process
  prediction: Prediction
  time_scale: float

  @nn.compact
  def __call__(self, inputs: tuple[Array, tuple[Array, ...]], *, train: bool = False) -> Float[Array, " b"]:
    data, condition = inputs
    data = data.astype(jnp.float32)
    size = data.shape[0]
    if train:
      time_key, noise_key = jax.random.split(self.make_rng("dropout"))
      t = jnp.maximum(jax.random.uniform(time_key, (size,)), 2**-23)  # at 0 a velocity may be infinite
    else:  # the same times, evenly spread, and the same noise at every evaluation
      noise_key = jax.random.key(0)
      t = (jnp.arange(size) + 0.5) / size
    eps = jax.random.normal(noise_key, data.shape)
    said = self.network(self.process.noised(data, eps, t), self.time_scale * t, *condition, train=train)
    error = said.astype(jnp.float32) - self.process.target(self.prediction, data, eps, t)
    return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))


def learner(
  network: nn.Module,
  process: Process,
  tx: optax.GradientTransformation,
  *,
  prediction: Prediction = "noise",
  time_scale: float = 1.0,
  data: Callable[[Batch], Array] = lambda batch: batch["image"],
  condition: Callable[[Batch], tuple[Array, ...]] = lambda batch: (),
  ema_decay: float | None = 0.9999,
  accumulate: int = 1,
  axis_name: str | None = None,
) -> Learner:
  """Regression of noise, data or velocity at random times.

      loss = mean |network(x_t, time_scale t) - target|^2,   t ~ U(0, 1),   eps ~ N(0, I)

  Evaluation uses fixed noise and times spread evenly over the batch, and the averaged weights.

  Args:
    network: called as `network(x_t, times [B], *condition, train=...)`; predicts an array of the shape of x_t.
    process: the path.
    tx: the optimizer.
    prediction: what the network predicts.
    time_scale: the network receives this times t.
    data: of a batch: x_0 [B, ...].
    condition: of a batch: what else the network sees, such as labels.
    ema_decay: of the moving average of the weights; None for none.
    accumulate: see `supervised`.
    axis_name: see `supervised`.

  Returns:
    A learner whose state is a `TrainState`; `variables` gives the network's own.

  Raises:
    ValueError: an unknown prediction, or as `supervised`.
  """
  checks.choice("prediction", prediction, Prediction)

  def loss(errors: Float[Array, " b"], batch: Batch) -> tuple[Float[Array, ""], Metrics]:
    return jnp.mean(errors), {}

  return supervised(
    _Regression(network, process, prediction, time_scale),
    loss,
    tx,
    inputs=lambda batch: (data(batch), condition(batch)),
    ema_decay=ema_decay,
    accumulate=accumulate,
    axis_name=axis_name,
  )


def variables(state: TrainState, *, averaged: bool = True) -> dict[str, PyTree]:
  """The network's variables in a state of `learner`.

  Args:
    state: of one run.
    averaged: their moving average where there is one, else as last updated.
  """
  source: dict[str, Any] = state.best_variables if averaged else state.variables
  return {name: tree["network"] for name, tree in source.items()}
