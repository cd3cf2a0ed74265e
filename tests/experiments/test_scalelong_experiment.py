import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import scalelong as experiment

TINY = experiment.Config(
  scalings=("constant",), width=8, depth=2, heads=1, rates=(1e-3,), steps=20, warmup=2, batch_size=8, seeds=1,
  sampled=(), samples=70, sample_steps=20,
)  # fmt: skip


class Small(nn.Module):
  """In place of the U-ViT, whose training step takes long to compile."""

  @nn.compact
  def __call__(self, x, times, *, train=False):
    return nn.Dense(1, name="mid_block")(x)


def test_the_network_fits_the_images():
  task = experiment.load(TINY)
  model = experiment.network(TINY, task, "constant")
  image = task.train[:1]
  assert jax.eval_shape(model.init_with_output, jax.random.key(0), image, np.ones(1))[0].shape == image.shape
  assert (model.scaling, model.kappa, model.patch_size) == ("constant", 0.7, 2)


def test_runs_end_to_end_and_resumes(tmp_path, monkeypatch):
  monkeypatch.setattr(experiment, "network", lambda *_: Small())
  drawn = lambda config, apply, variables, shape: {"some": np.zeros((config.samples, *shape))}
  monkeypatch.setattr(experiment, "draw_samples", drawn)
  compared = []
  monkeypatch.setattr(experiment, "frechet", lambda *sets: compared.append([len(s) for s in sets]) or 1.0)
  config = dataclasses.replace(TINY, workdir=tmp_path, sampled=("constant",), samples=400)
  experiment.main(config)
  folder = tmp_path / "demo/digits"
  result = json.loads((folder / "result.json").read_text())
  assert 0.5 < result["metrics"]["constant: test loss at its best rate"]["mean"] < 6  # of a random layer
  train, _, test = (len(part["image"]) for part in experiment.digits.images())
  assert test < 400 and compared == [[400, test, train]] * 2  # every image that was drawn, and as many known ones
  for name in ("comparison.png", "samples.png"):
    assert (folder / name).stat().st_size > 5_000
  steps = (folder / "constant/rate0.001/seed0/metrics.jsonl").read_text()
  (folder / "result.json").unlink()
  experiment.main(config)  # trains no further, measures the same
  assert (folder / "constant/rate0.001/seed0/metrics.jsonl").read_text() == steps
  assert json.loads((folder / "result.json").read_text())["metrics"] == result["metrics"]


def test_samplers_draw_the_images_that_the_network_knows():
  """The exact denoiser of Gaussian pixels."""
  alpha = lambda t: jnp.exp(-0.05 * t - 4.975 * t**2)[:, None, None, None]

  def apply(mean, x, times):
    a = alpha(times / 999)
    return jnp.sqrt(1 - a**2) * (x - a * mean) / (0.09 * a**2 + 1 - a**2)

  mean = np.linspace(-0.2, 0.2, 4, dtype="float32").reshape(2, 2, 1)
  config = dataclasses.replace(TINY, samples=1000, sample_steps=200)
  drawn = experiment.draw_samples(config, apply, mean, (2, 2, 1))
  images = mean + 0.3 * np.random.default_rng(0).standard_normal((2, 1000, 2, 2, 1))
  assert len(drawn) == 3
  for pictures in drawn.values():
    assert experiment.frechet(pictures, images[0], images[0]) < 0.03
  assert experiment.frechet(images[1], images[0], images[0]) < 0.01
  assert experiment.frechet(images[1] + 0.2, images[0], images[0]) > 0.1


def test_paper_preset_is_the_published_recipe():
  config = experiment.parse(["--preset", "paper"])
  assert (config.width, config.depth, config.heads, config.steps, config.warmup) == (512, 12, 8, 500_000, 2500)
  assert (config.batch_size, config.rates, config.ema_decay, config.sample_steps) == (128, (2e-4,), 0.9999, 1000)
  assert experiment.parse(["--preset", "paper", "--steps", "5000"]) == dataclasses.replace(config, steps=5000)


def test_paper_preset_takes_the_whole_test_set(monkeypatch):
  asked = []
  monkeypatch.setattr(
    experiment.images, "as_arrays", lambda *names: asked.append(names) or {"image": np.zeros((1, 2, 2, 3))}
  )
  experiment.load(experiment.PRESETS["paper"])
  experiment.load(dataclasses.replace(TINY, dataset="cifar10"))
  assert [part for _, part in asked[2::3]] == ["test", "test[:1000]"]


def test_every_constant_is_compared_by_default():
  assert {"none", "inv_sqrt2", "constant", "learned"} == set(experiment.Config().scalings)
  assert experiment.Config().seeds == 3
  assert experiment.parse(["--scalings", "inv_sqrt2", "learned"]).scalings == ("inv_sqrt2", "learned")


def test_batches_depend_on_seed_and_step_alone():
  task = experiment.load(TINY)
  assert task.train.min() == -1 and task.train.max() == 1
  first, other_rate = (experiment.batches(TINY, task, rate, 0)(3) for rate in (1e-3, 1e-2))
  np.testing.assert_array_equal(first["image"], other_rate["image"])
  assert other_rate["rate"][0] == np.float32(1e-2)
  assert not np.array_equal(first["image"], experiment.batches(TINY, task, 1e-3, 1)(3)["image"])
  assert not np.array_equal(first["image"], experiment.batches(TINY, task, 1e-3, 0)(4)["image"])


@pytest.mark.parametrize(
  ("change", "argument"),
  [
    ({"seeds": 0}, "seeds"),
    ({"sampled": ("learned",)}, "sampled"),
    ({"rates": ()}, "rates"),
    ({"steps": 2}, "steps"),
    ({"batch_size": 301}, "batch_size"),
    ({"batch_size": 0}, "batch_size"),
  ],
)
def test_bad_settings(change, argument):
  with pytest.raises(ValueError, match=f"^{argument}: got "):
    experiment.main(dataclasses.replace(TINY, **change))


def test_a_batch_may_be_all_images_of_validation():
  task = experiment.load(TINY)
  assert len(task.val) <= 300
  experiment.check(dataclasses.replace(TINY, batch_size=min(len(task.val), len(task.test))), task)


@pytest.mark.parametrize("samples", [4, 20])
def test_grid_of_few_samples(samples, tmp_path):
  rows = {"some": np.zeros((samples, 8, 8, 1), np.float32)}
  assert experiment.draw_grid(rows, tmp_path / "grid.png").stat().st_size > 1000
