import json

import flax
import flax.linen as nn
import jax
import numpy as np
import pytest

from experiments import transformable_search as experiment
from jaxlab.data import images


def test_paper_preset_is_the_published_recipe():
  config = experiment.parse(["--preset", "paper"])
  assert (config.layers, config.widths, config.size, config.batch_size) == (32, (16, 16, 32, 64), 32, 256)
  assert (config.epochs, config.warmup, config.learning_rate, config.weight_decay) == (305, 5, 0.1, 5e-4)
  assert (config.train_images, config.teacher_epochs) == (None, 305)
  assert (config.cost_weight, config.random_networks) == (2.0, 5)
  assert (config.search_epochs, config.architecture_rate, config.architecture_decay) == (600, 1e-3, False)
  assert experiment.parse(["--preset", "paper", "--layers", "20"]).layers == 20


def fake_arrays(name, split):
  rng = np.random.default_rng(len(split))
  return images.Images(image=rng.integers(0, 256, (16, 32, 32, 3), np.uint8), label=np.arange(16, dtype=np.int32) % 10)


def test_halves_are_apart(monkeypatch):
  monkeypatch.setattr(images, "as_arrays", fake_arrays)
  task = experiment.comparison.cifar10(experiment.Config(size=8, batch_size=8, train_images=None))
  task.pixels["label"][:] = np.arange(16) >= 8
  both = experiment.Halves(task, 0)
  position = both.get_state()
  first = next(both)
  assert not first["weights"]["label"].any() and first["architecture"]["label"].all()
  both.set_state(position)
  np.testing.assert_array_equal(next(both)["weights"]["image"], first["weights"]["image"])


class Little(nn.Module):
  """In the place of derived networks, of which every one would have to be compiled."""

  space: object
  genotype: object

  @nn.compact
  def __call__(self, images, *, train=False):
    return nn.Dense(10)(images.mean((1, 2)))


def little_search(network, *optimizers, **settings):
  """In the place of the search, which goes nowhere."""
  start = experiment.tas.initial(network.space, jax.random.key(0))

  def step(state, batch):
    loss = batch["weights"]["image"].mean() + batch["architecture"]["image"].mean()
    return state, {"loss": loss, "macs": 0.5 + 0 * loss, "expected_macs": 0.4 + 0 * loss}

  return experiment.train.Learner(lambda key, batch: SimpleState(start), step, lambda state, batch: {})


@flax.struct.dataclass
class SimpleState:
  found: object


def test_runs_end_to_end(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(images, "as_arrays", fake_arrays)
  monkeypatch.setattr(experiment.tas, "DerivedNetwork", Little)
  monkeypatch.setattr(experiment.tas, "search_learner", little_search)
  monkeypatch.setattr(experiment, "_jit", jax.jit)  # with the flags of the tests
  config = experiment.Config(
    widths=(9, 9, 9, 9),
    size=8,
    train_images=None,
    epochs=1,
    teacher_epochs=1,
    batch_size=8,
    seeds=1,
    search_epochs=1,
    random_networks=1,
    workdir=tmp_path,
  )
  experiment.main(config)
  (folder,) = tmp_path.iterdir()
  metrics = json.loads((folder / "result.json").read_text())["metrics"]
  assert {
    f"error, {name}" for name in ("full", "found", "found + KD", "uniform", "uniform + KD", "random + KD")
  } <= set(metrics)
  assert metrics["multiplications, full"]["mean"] == 1
  # That search stays where it starts, which is at 0.44 of the full cost.
  assert metrics["searches that met the target (%)"]["mean"] == 0 and "never met its target" in capsys.readouterr().out
  same = [metrics[f"multiplications, {name}"]["mean"] for name in ("found", "uniform", "random + KD")]
  assert max(same) < 1.08 * min(same)
  assert (folder / "figure.png").stat().st_size > 10_000
  experiment.main(config)  # finished


@pytest.mark.parametrize(
  ("change", "name"),
  [({"random_networks": 0}, "random_networks"), ({"search_epochs": 0}, "search_epochs"), ({"seeds": 0}, "seeds")],
)
def test_bad_settings(change, name, tmp_path):
  with pytest.raises(ValueError, match=f"{name}: got"):
    experiment.main(experiment.Config(workdir=tmp_path, **change))
