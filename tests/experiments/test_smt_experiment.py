import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import smt as experiment
from jaxlab.data import images


def test_paper_preset_is_the_published_recipe():
  config = experiment.parse(["--preset", "paper"])
  rate = experiment.schedule(config, steps_per_epoch=1251)
  # The configuration's 1e-3, 1e-7 and 1e-6 are for 512 images; it trains on 1024.
  np.testing.assert_allclose([rate(0), rate(5 * 1251), rate(300 * 1251)], [2e-7, 2e-3, 2e-6], rtol=1e-4)
  assert (config.dataset, config.model, config.size) == ("imagenet2012", "tiny", 224)
  assert (config.weight_decay, config.clip, config.label_smoothing, config.erase, config.mix) == (
    0.05,
    5,
    0.1,
    0.25,
    True,
  )
  changed = experiment.parse(["--preset", "paper", "--model", "small", "--epochs", "90"])
  assert dataclasses.replace(changed, model="tiny", epochs=300) == config


def fake_source(name, split, directory=None):
  """Photographs of several sizes."""
  rng = np.random.default_rng(len(split))
  sizes = rng.integers(40, 90, (24, 2))
  return [{"image": rng.integers(0, 256, (*s, 3)).astype(np.uint8), "label": i % 7} for i, s in enumerate(sizes)]


def test_imagenet_pipeline(monkeypatch):
  monkeypatch.setattr(images, "source", fake_source)
  config = dataclasses.replace(experiment.PRESETS["paper"], batch_size=8, size=32)
  task = experiment.load(config)
  assert (task.num_classes, task.channels, task.steps_per_epoch) == (1000, 3, 3)
  batch = next(task.batches(0))
  assert batch["image"].shape == (8, 32, 32, 3) and batch["image"].dtype == np.float32
  again, other = next(task.batches(0)), next(task.batches(1))
  assert np.array_equal(again["image"], batch["image"]) and not np.array_equal(other["image"], batch["image"])
  for _ in range(2):  # every evaluation reads the set anew
    (held_out,) = task.test
    assert held_out["image"].shape == (24, 32, 32, 3)
    np.testing.assert_array_equal(held_out["label"], np.arange(24) % 7)


def test_ablation_compares_networks_of_one_size():
  task = experiment.load(experiment.Config(dataset="digits"))
  sizes = {}
  for name in experiment.ABLATION:
    model = experiment.network(experiment.Config(dataset="digits"), name, task)
    shapes = jax.eval_shape(model.init, jax.random.key(0), task.test[0]["image"])
    sizes[name] = sum(x.size for x in jax.tree.leaves(shapes["params"]))
  assert max(sizes.values()) < 1.02 * min(sizes.values())
  assert 280_000 < sizes["hybrid"] < 320_000


def test_runs_end_to_end_and_resumes(tmp_path, monkeypatch):
  tiny = {"depths": (1, 1), "widths": (4, 4), "mixers": ("modulation",) * 2, "mlp_ratios": (1, 1), "drop_path": 0.1}
  monkeypatch.setitem(experiment.ABLATION, "hybrid", tiny)
  monkeypatch.setattr(experiment, "linear", lambda task: 50.0)
  config = experiment.Config(
    dataset="digits", epochs=2, batch_size=256, warmup_epochs=1, erase=0.25, mix=True, seeds=2, workdir=tmp_path
  )
  experiment.main(config)
  result = json.loads((tmp_path / "digits/hybrid/result.json").read_text())
  assert result["metrics"]["hybrid"]["n"] == 2 and result["metrics"]["linear"]["mean"] == 50
  assert (tmp_path / "digits/hybrid.png").stat().st_size > 10_000
  steps = (tmp_path / "digits/hybrid/seed0/metrics.jsonl").read_text()
  experiment.main(config)  # finished: trains no further, measures the same
  again = json.loads((tmp_path / "digits/hybrid/result.json").read_text())
  assert again["metrics"] == result["metrics"]
  assert (tmp_path / "digits/hybrid/seed0/metrics.jsonl").read_text() == steps


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"warmup_epochs": 30}, "warmup_epochs: got 30"),
    ({"seeds": 0}, "seeds: got 0"),
    ({"batch_size": 100_000}, "batch_size: got 100000"),
    ({"dataset": "cifar10"}, "cifar10"),
  ],
)
def test_bad_settings(change, message, tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  with pytest.raises(ValueError, match=message):
    experiment.main(dataclasses.replace(experiment.Config(dataset="digits", workdir=tmp_path), **change))
