import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import segman as experiment
from jaxlab.data import scenes


class Pixelwise(nn.Module):
  """A network that compiles fast, with the two parts whose rates differ."""

  @nn.compact
  def __call__(self, images, *, train=False):
    return nn.Dense(len(scenes.CLASSES), name="decoder")(nn.relu(nn.Dense(8, name="encoder")(images)))


def test_each_ablation_leaves_weights_out():
  config, counts = experiment.Config(), {}
  for name in experiment.VARIANTS:
    model = experiment.network(config, name)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 96, 96, 3)))
    counts[name] = sum(x.size for x in jax.tree.leaves(shapes["params"]))
  assert counts["SegMAN"] > max(counts[name] for name in experiment.VARIANTS if name != "SegMAN")
  assert 430_000 < counts["SegMAN"] < 450_000


def test_paper_preset():
  config = experiment.parse(["--preset", "paper"])
  assert (config.steps, config.head_rate, config.warmup, config.clip) == (160_000, 10.0, 1500, None)
  assert config.dtype == "bfloat16" and config.side % 32 == 0
  assert scenes.marked_shapes(1, config.side).image.shape == (1, config.side, config.side, 3)
  assert experiment.network(config, "SegMAN").encoder.widths == (32, 64, 144, 192)
  assert dataclasses.replace(experiment.parse(["--preset", "paper", "--seeds", "3"]), seeds=1) == config


def moved(**changes):
  """How far the second step takes the kernels of encoder and decoder; the rate of the first is 0."""
  batch = {"image": np.ones((2, 4, 4, 3), "float32"), "label": np.arange(32).reshape(2, 4, 4) % len(scenes.CLASSES)}
  learner = experiment.learner(experiment.Config(steps=10, **changes), Pixelwise())
  state = learner.init(jax.random.key(0), batch)
  for _ in range(2):
    before, (state, _) = state, learner.step(state, batch)
  change = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, before.params)
  return np.array([change[name]["kernel"] for name in ("encoder", "decoder")])


def test_rates_warm_up_and_clip():
  plain = moved()
  # A warm-up of None is a tenth of ten steps. AdamW takes no notice of a gradient's scale, unless below its epsilon.
  np.testing.assert_allclose(moved(head_rate=10.0, warmup=5, clip=None), plain * (1, 10) / 5, rtol=2e-2)
  assert (moved(clip=1e-12) < 0.1 * plain).all()
  with pytest.raises(ValueError, match="warmup: got 10"):
    moved(warmup=10)


def test_runs_end_to_end_and_resumes(tmp_path, monkeypatch):
  monkeypatch.setattr(experiment, "network", lambda *_: Pixelwise())
  config = experiment.Config(side=64, images=16, steps=12, batch_size=8, ablation=True, workdir=tmp_path)
  experiment.main(config)
  folder = tmp_path / "demo-64-16-12"
  result = json.loads((folder / "result.json").read_text())
  assert {name.split(",")[0] for name in result["metrics"]} == set(experiment.VARIANTS)
  assert 0 <= result["metrics"]["SegMAN, mIoU all"]["mean"] <= 100
  assert (folder / "comparison.png").stat().st_size > 10_000
  log = folder / "without_scan/seed0/metrics.jsonl"
  steps = log.read_text()
  (folder / "result.json").unlink()
  experiment.main(config)  # trains no further, measures the same
  assert log.read_text() == steps
  assert json.loads((folder / "result.json").read_text())["metrics"] == result["metrics"]
  with pytest.raises(ValueError, match="seeds, steps: got"):
    experiment.main(dataclasses.replace(config, seeds=0))
