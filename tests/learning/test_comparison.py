import dataclasses

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from jaxlab import train
from jaxlab.data import images
from jaxlab.learning import comparison

RECIPE = comparison.Recipe(size=8, batch_size=8, epochs=2, seeds=1)


@pytest.fixture
def white(monkeypatch):
  """Sixteen images without a dark pixel."""
  pixels = images.Images(image=np.full((16, 8, 8, 3), 255, np.uint8), label=np.arange(16, dtype=np.int32) % 2)
  monkeypatch.setattr(images, "as_arrays", lambda name, split: pixels)


@pytest.mark.parametrize(("padding", "dark"), [("constant", True), ("reflect", False)])
def test_padding_before_crops(white, padding, dark):
  task = comparison.cifar10(dataclasses.replace(RECIPE, padding=padding))
  assert (next(task.batches(0))["image"] < 0).any() == dark
  assert (task.test[0]["image"] > 0).all()


class Little(nn.Module):
  @nn.compact
  def __call__(self, images, *, train=False):
    return nn.Dense(2)(images.mean((1, 2)))


@pytest.mark.parametrize("devices", [1, 8])
def test_a_batch_is_shared_over_all_devices(white, devices, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: devices)
  learner = comparison.jitted(train.supervised(Little(), train.cross_entropy(), optax.sgd(0.1)))
  task = comparison.cifar10(RECIPE)
  (state,) = comparison.trained(learner, task, epochs=2, seeds=1, folder=tmp_path, config={})
  assert state.step == 4 and len(state.params["Dense_0"]["kernel"].devices()) == devices
  assert 0 <= comparison.test_error(learner, state, task) <= 100
