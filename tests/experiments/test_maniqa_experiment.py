import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from experiments import maniqa as experiment
from jaxlab.data import camvid, photographs


def test_paper_preset_is_the_published_recipe():
  config = experiment.parse(["--preset", "paper"])
  rate = experiment.schedule(config, config.learning_rates[0])
  steps = np.array([0, 25, 50, 75, 100, 130])
  np.testing.assert_allclose([rate(i) for i in steps], 0.5e-5 * (1 + np.cos(np.pi * steps / 50)), atol=1e-11)
  assert (config.batch_size, config.size, config.weight_decay, config.flip) == (8, 224, 1e-5, 0.7)
  model = experiment.network(config, "MANIQA")
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 224, 224, 3), "float32"))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == 114_164_578


def test_features_tell_noise_from_blur():
  image = photographs.photograph("coins", 64)
  rng = np.random.default_rng(0)
  blurred, noisy = (photographs.distort(image, name, 5, rng) for name in ("gaussian blur", "white noise"))
  features = [experiment.statistics(x) for x in (image, blurred, noisy)]
  assert all(f.shape == (36,) and np.isfinite(f).all() for f in features)
  assert features[1][1] < features[0][1] < features[2][1]  # variance of the normalised luminance
  x = rng.standard_normal(100_000)
  shape, mean, left, right = experiment.generalised_gaussian(x)
  np.testing.assert_allclose([shape, mean, left, right], [2, 0, 1, 1], atol=0.05)
  # Twice as wide to the left, where then lie two thirds of the draws, as the density is continuous.
  skewed = np.abs(x) * np.where(rng.random(len(x)) < 2 / 3, -2, 1)
  fitted = experiment.generalised_gaussian(skewed)
  np.testing.assert_allclose(fitted, [2, skewed.mean(), 2, 1], atol=0.05)


def test_correlations():
  quality = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
  assert experiment.correlations(np.exp(quality), quality)[0] == pytest.approx(1)
  assert experiment.correlations(2 * quality - 7, quality)[1] == pytest.approx(1)
  assert experiment.correlations(-quality, quality) == pytest.approx((-1, -1))
  assert experiment.correlations(np.ones(5), quality) == (0, 0)


def test_the_pooled_backbone_is_the_mean_over_patches():
  config = experiment.Config(batch_size=2)
  model = experiment.network(config, "pooled backbone")
  images = np.random.default_rng(0).standard_normal((2, 48, 48, 3)).astype("float32")
  embedding = {"kernel": np.full((192, 48), 0.01, "float32"), "bias": np.zeros(48, "float32")}
  learner = experiment.learner(config, model, 1e-3, embedding)
  state = jax.jit(learner.init)(jax.random.key(0), {"image": images, "quality": np.ones(2, "float32")})
  assert set(state.params) == {"backbone", "Dense_0"}
  np.testing.assert_array_equal(state.params["backbone"]["patch_embed"]["kernel"], embedding["kernel"])
  whole = experiment.network(config, "MANIQA")
  backbone = experiment.maniqa.Backbone(whole.width, whole.num_heads, whole.patch_size, whole.mlp_ratio, whole.taps)
  patches = jax.jit(backbone.apply)({"params": state.params["backbone"]}, images)
  head = state.params["Dense_0"]
  expected = np.asarray(patches).mean(1) @ head["kernel"][:, 0] + head["bias"]
  np.testing.assert_allclose(jax.jit(model.apply)({"params": state.params}, images), expected, atol=1e-5)


@pytest.fixture
def streets(monkeypatch):
  frame = np.random.default_rng(0).integers(0, 256, (3, 180, 240, 3), "uint8")
  load = lambda split, size: camvid.Scenes(frame[:, : size[0], : size[1]], frame[:, : size[0], : size[1], 0])
  monkeypatch.setattr(camvid, "load", load)


def test_frames_are_distorted_like_photographs(streets):
  made = experiment.street_scenes(experiment.Config(frames=2))
  assert [len(part.image) for part in made] == [2 * 4 * 5] * 2
  assert [part.image[0].shape for part in made] == [(144, 192, 3), (180, 240, 3)]
  assert set(made[0].content) == {len(photographs.CONTENTS), len(photographs.CONTENTS) + 2}
  with pytest.raises(ValueError, match="frames: got 4"):
    experiment.street_scenes(experiment.Config(frames=4))
  assert experiment.street_scenes(experiment.Config()) == []


def test_runs_end_to_end(tmp_path, monkeypatch, streets):
  monkeypatch.setattr(
    photographs, "CONTENTS", ("cat", "coins", "flower", "moon", "rocket", "coffee", "brick", "camera")
  )
  monkeypatch.setattr(experiment, "NETWORKS", ("MANIQA",))
  monkeypatch.setattr(experiment.jax, "device_count", lambda: 1)
  tiny = {"image_size": 16, "width": 8, "num_heads": 1, "taps": (0,), "num_tab": 0, "depths": (), "stage_heads": ()}
  whole = experiment.maniqa.base
  monkeypatch.setattr(experiment.maniqa, "base", lambda **options: whole(**options | tiny))
  config = experiment.Config(
    side=32, train_sides=(32, 40), frames=2, size=16, steps=12, batch_size=8, crops=2, learning_rates=(1e-3,),
    workdir=tmp_path,
  )  # fmt: skip
  experiment.main(config)
  folder = tmp_path / "demo-four-16-12-2"
  result = json.loads((folder / "result.json").read_text())
  assert set(result["metrics"]) >= {
    "MANIQA, SRCC",
    "MANIQA, PLCC",
    "statistics, SRCC",
    "PSNR, SRCC",
    "SSIM, PLCC",
  }
  assert result["metrics"]["PSNR, SRCC"]["mean"] > 0.4
  assert (folder / "scores.png").stat().st_size > 10_000
  experiment.main(config)  # says that it is finished


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"seeds": 0}, "seeds: got 0"),
    ({"size": 300}, "size: got 300"),
    ({"learning_rates": ()}, "learning_rates: got none"),
    ({"frames": -1}, "frames: got -1"),
    ({"size": 64}, "size: got 64, expected a multiple of 24"),
    ({"preset": "paper", "side": 288, "train_sides": (288,), "size": 224, "frames": 3}, "size: got 224"),
    ({"backbone": pathlib.Path("vit.safetensors")}, "backbone: got vit.safetensors"),
  ],
)
def test_bad_settings(change, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    experiment.main(dataclasses.replace(experiment.Config(workdir=tmp_path), **change))
