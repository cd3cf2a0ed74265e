"""One small client for all tests of this room, so that few programs are compiled; and its training by plain NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab import train
from jaxlab.decentral import partition, simulator

FEATURES, CLASSES, RATE = 4, 3, 0.1


class Net(nn.Module):
  """Two layers."""

  @nn.compact
  def __call__(self, x, *, train=False):
    hidden = nn.relu(nn.Dense(5)(x))
    return nn.Dense(CLASSES)(hidden)


def examples(count=24, seed=0):
  rng = np.random.default_rng(seed)
  label = np.arange(count, dtype="int32") % CLASSES
  image = np.eye(CLASSES, FEATURES)[label] + rng.standard_normal((count, FEATURES)) / 2
  return {"image": image.astype("float32"), "label": label}


def clients(sizes=(6, 6, 6, 6), seed=0, **options):
  data = examples(sum(sizes), seed)
  return partition.clients(data, np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]), **options)


SGD = simulator.classifier(Net(), optax.sgd(RATE))
MOMENTUM = simulator.classifier(Net(), optax.sgd(RATE, momentum=0.9))
TEST = examples(30, 9)


def run(learner, data, rounds, key=None):
  """The state after some rounds, and the metrics of each."""
  state, step = jax.jit(learner.init)(jax.random.key(0) if key is None else key, data), jax.jit(learner.step)
  history = []
  for _ in range(rounds):
    state, metrics = step(state, data)
    history.append(metrics)
  return state, history


def numpy_gradient(params, image, label):
  """Gradient of the mean cross entropy, by hand in float64."""
  w1, b1 = (np.asarray(params["Dense_0"][k], np.float64) for k in ("kernel", "bias"))
  w2, b2 = (np.asarray(params["Dense_1"][k], np.float64) for k in ("kernel", "bias"))
  hidden = image @ w1 + b1
  out = np.maximum(hidden, 0) @ w2 + b2
  p = np.exp(out - out.max(1, keepdims=True))
  p /= p.sum(1, keepdims=True)
  d = (p - np.eye(CLASSES)[label]) / len(label)
  back = (d @ w2.T) * (hidden > 0)
  return {
    "Dense_0": {"kernel": image.T @ back, "bias": back.sum(0)},
    "Dense_1": {"kernel": np.maximum(hidden, 0).T @ d, "bias": d.sum(0)},
  }


def descend(params, image, label, steps=1):
  """Full-batch gradient descent."""
  for _ in range(steps):
    gradient = numpy_gradient(params, image, label)
    params = jax.tree.map(lambda p, g: np.asarray(p, np.float64) - RATE * g, params, gradient)
  return params


def quadratic(shared, rate, decay=None):
  """A learner whose loss is |A theta - b|^2 / 2, with b the batch's `image`: gradients are linear in theta."""

  class Vector(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
      return jnp.asarray(shared) @ self.param("theta", nn.initializers.normal(1.0), (shared.shape[1],))

  def loss(output, batch):
    weight = batch["mask"].astype(jnp.float32)
    gap = 0.5 * jnp.sum((output - batch["image"]) ** 2, axis=-1)
    return jnp.sum(weight * gap) / jnp.maximum(jnp.sum(weight), 1.0), {}

  return train.supervised(Vector(), loss, optax.sgd(rate))
