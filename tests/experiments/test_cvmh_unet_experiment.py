import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cvmh_unet as experiment
from jaxlab.data import aerial, camvid


def test_compared_networks_are_of_one_size():
  sizes = {}
  for name in experiment.COMPARED:
    model = experiment.network(experiment.Config(), name)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 128, 160, 3)))
    sizes[name] = sum(x.size for x in jax.tree.leaves(shapes["params"]))
  assert max(sizes.values()) < 1.03 * min(sizes.values())
  assert 700_000 < sizes["CVMH-UNet"] < 750_000


def test_each_ablation_changes_the_network():
  config = experiment.Config(ablation=True)
  models = {name: experiment.network(config, name) for name in ("CVMH-UNet", *experiment.ABLATIONS)}
  assert len(set(map(str, models.values()))) == len(models)


def test_paper_preset():
  config = experiment.parse(["--preset", "paper"])
  assert (config.height, config.width, config.batch_size, config.learning_rate) == (360, 480, 8, 1e-3)
  assert (config.crop, round(config.steps * config.batch_size / 367)) == ((352, 480), 100)  # epochs of CamVid
  assert experiment.network(config, "CVMH-UNet").widths == (96, 192, 384, 768)
  assert dataclasses.replace(experiment.parse(["--preset", "paper", "--seeds", "3"]), seeds=1) == config


def test_aerial_tiles_are_square(monkeypatch):
  config = experiment.parse(["--dataset", "aerial-diagonal", "--seeds", "2"])
  assert (config.height, config.width, config.crop, config.seeds) == (128, 128, (128, 128), 2)
  asked = []
  monkeypatch.setattr(
    aerial, "tiles", lambda *args, **how: asked.append((args, how)) or aerial.Tiles(*np.zeros((2, 3)))
  )
  task = experiment.load(config)
  assert asked == [((n, 128, 128), {"roads": "diagonal", "seed": seed}) for n, seed in ((1000, 0), (250, 1))]
  assert task.void not in range(len(task.classes)) and "diagonal" in task.text


def test_scores_leave_void_out():
  label = np.array([[0, 0, 1, camvid.VOID]])
  pairs = experiment.confusion(np.array([[0, 1, 1, 1]], np.uint8), label, len(camvid.CLASSES))
  got = experiment.scores(pairs, camvid.CLASSES)
  assert pairs.sum() == 3
  np.testing.assert_allclose([got["sky"], got["building"], got["accuracy"]], [50, 50, 200 / 3])
  np.testing.assert_allclose([got["mIoU"], got["mean F1"]], [100 / 11, 2 * 200 / 3 / 11])


def test_baseline_takes_any_size():
  model = experiment.UNet(11, (4, 8, 8))
  images = jnp.zeros((1, 18, 25, 3))
  logits, variables = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images))
  assert logits.shape == (1, 18, 25, 11)
  assert variables["params"]["Conv_6"]["kernel"].shape == (3, 3, 16, 8)  # the deepest skip, and what came up


class Pixelwise(nn.Module):
  """A network that compiles fast."""

  @nn.compact
  def __call__(self, images, *, train=False):
    return nn.Dense(11)(images)


def test_run(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)

  def load(split, size):
    label = np.where(np.arange(size[0])[:, None] < size[0] // 2, 0, 3) * np.ones((9, *size), int)
    image = np.where(label == 0, 200, 50)[..., None] + rng.integers(0, 40, (9, *size, 3))
    return camvid.Scenes(image.astype("uint8"), label.astype("uint8"))

  monkeypatch.setattr(camvid, "load", load)
  monkeypatch.setattr(experiment, "COMPARED", ("CVMH-UNet", "U-Net"))
  monkeypatch.setattr(experiment, "network", lambda *_: Pixelwise())
  config = experiment.Config(height=18, width=24, crop=(16, 16), steps=10, workdir=tmp_path)
  experiment.main(config)
  result = json.loads((tmp_path / "camvid-demo-18x24-10/result.json").read_text())
  assert set(experiment.COMPARED) == {name.split(",")[0] for name in result["metrics"]}
  assert 0 <= result["metrics"]["U-Net, mIoU"]["mean"] <= 100
  assert (tmp_path / "camvid-demo-18x24-10/comparison.png").stat().st_size > 10_000
  with pytest.raises(ValueError, match="crop: got"):
    experiment.main(dataclasses.replace(config, crop=(32, 16)))
  with pytest.raises(ValueError, match="seeds, steps: got"):
    experiment.main(dataclasses.replace(config, seeds=0))
