import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.nn.diffusion import Straight, VariancePreserving
from jaxlab.train import diffusion

VP = VariancePreserving()


class Scale(nn.Module):
  """Predicts w x, plus what it is conditioned on; remembers nothing."""

  @nn.compact
  def __call__(self, x, times, shift=0.0, *, train=False):
    return self.param("w", nn.initializers.zeros, ()) * x + 0.0 * times.mean() + shift


def data(seed, size=256):
  return {"image": np.random.default_rng(seed).standard_normal((size, 4)).astype("float32")}


@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_learns_the_best_scale(prediction):
  """For standard normal data x_t is standard normal too, and the best w is E[sigma(t)], or E[alpha(t)]."""
  learner = diffusion.learner(Scale(), VP, optax.sgd(0.05), prediction=prediction, ema_decay=0.99)

  @jax.jit
  def train(key):
    def step(state, seed):
      batch = {"image": jax.random.normal(jax.random.key(seed), (256, 4))}
      return learner.step(state, batch)

    return jax.lax.scan(step, learner.init(key, data(0)), jnp.arange(600))

  state, metrics = train(jax.random.key(1))
  t = (np.arange(10_000) + 0.5) / 10_000
  alpha = np.exp(-0.05 * t - 4.975 * t**2)
  best = np.sqrt(1 - alpha**2).mean() if prediction == "noise" else alpha.mean()
  w = diffusion.variables(state)["params"]["w"]
  np.testing.assert_allclose(w, best, atol=0.02)
  assert w != diffusion.variables(state, averaged=False)["params"]["w"]
  np.testing.assert_allclose(metrics["loss"][-100:].mean(), 1 - best**2, atol=0.03)


def test_steps_draw_anew_and_evaluation_does_not():
  learner = diffusion.learner(Scale(), Straight(), optax.sgd(0.0), prediction="velocity", ema_decay=None)
  batch, step, evaluate = data(0), jax.jit(learner.step), jax.jit(learner.evaluate)
  state = jax.jit(learner.init)(jax.random.key(0), batch)
  state, first = step(state, batch)
  state, second = step(state, batch)
  assert first["loss"] != second["loss"]
  loss = evaluate(state, batch)["loss"]
  assert evaluate(state, batch)["loss"] == loss
  np.testing.assert_allclose(loss, 2, atol=0.3)  # w = 0: the mean square of eps - x_0


def test_conditions_reach_the_network():
  learner = diffusion.learner(
    Scale(), VP, optax.sgd(0.0), prediction="data", condition=lambda batch: (batch["image"],), ema_decay=None
  )
  state = learner.init(jax.random.key(0), data(0))
  assert learner.evaluate(state, data(0))["loss"] == 0  # told the answer


def test_bad_input_is_named():
  with pytest.raises(ValueError, match="^prediction: got 'score'"):
    diffusion.learner(Scale(), VP, optax.sgd(0.1), prediction="score")
