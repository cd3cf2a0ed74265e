import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import auglocal as experiment
from jaxlab import train
from jaxlab.data import images


def test_paper_preset_is_the_published_recipe():
  config = experiment.parse(["--preset", "paper"])
  assert (config.layers, config.widths, config.size, config.epochs) == (110, (16, 16, 32, 64), 32, 400)
  assert (config.batch_size, config.learning_rate, config.warmup, config.depths) == (1024, 0.8, 10, (1, 3, 5, 6))
  assert config.padding == "reflect"
  assert experiment.parse(["--preset", "paper", "--layers", "32"]).layers == 32


@pytest.mark.parametrize(
  ("layers", "depth", "backbone", "total"),
  [
    (32, 2, 69.12, 173.99),
    (32, 3, 69.12, 192.86),
    (32, 5, 69.12, 241.10),
    (32, 6, 69.12, 256.30),
    (110, 1, 253.15, None),
    (110, 3, 253.15, 793.72),
    (110, 5, 253.15, 1119.30),
    (110, 6, 253.15, 1284.46),
  ],
)
def test_multiplications_are_the_published_ones(layers, depth, backbone, total):
  config = experiment.Config(layers=layers, widths=(16, 16, 32, 64), depths=(depth,))
  mine, heads = experiment.macs(experiment.networks(config)[f"d = {depth}"], 32)
  assert round(mine / 1e6, 2) == backbone
  assert total is None or round((mine + heads) / 1e6, 2) == total


def test_multiplications_on_odd_sides():
  """A stride of 2 leaves 5 of 9 pixels, and 3 of 5."""
  config = experiment.Config(layers=8, widths=(4, 4, 4, 4), depths=(1,))
  backbone, heads = experiment.macs(experiment.networks(config)["d = 1"], 9)
  first, blocks = 81 * 27 * 4, 81 * 288 + 25 * (288 + 16) + 9 * (288 + 16)
  assert backbone == first + blocks + 40
  # Units 0 and 1 have heads of one block at their own size, for the widths are all one.
  assert heads == 2 * (81 * 288 + 40)


def fake_arrays(name, split):
  rng = np.random.default_rng(len(split))
  return images.Images(image=rng.integers(0, 256, (32, 32, 32, 3), np.uint8), label=np.arange(32, dtype=np.int32) % 10)


def test_runs_end_to_end(tmp_path, monkeypatch):
  monkeypatch.setattr(images, "as_arrays", fake_arrays)
  config = experiment.Config(
    layers=8, widths=(4, 4, 4, 4), size=8, depths=(0,), epochs=1, batch_size=16, seeds=1, workdir=tmp_path
  )
  experiment.main(config)
  (folder,) = tmp_path.iterdir()
  result = json.loads((folder / "result.json").read_text())
  assert result["metrics"]["error, greedy heads"]["n"] == 1
  assert result["metrics"]["multiplications, greedy heads"]["mean"] > 1
  assert result["metrics"]["step memory, backpropagation"]["mean"] == 1
  assert 0 <= result["metrics"]["probe of the last unit, greedy heads"]["mean"] <= 100
  assert (folder / "figure.png").stat().st_size > 10_000
  experiment.main(config)  # finished


def test_probes_read_what_units_know():
  """A first unit that passes a colour on is read without error; later ones whose weights are 0 know nothing."""
  config = experiment.Config(layers=8, widths=(4, 4, 4, 4), size=8, depths=(0,))
  model = experiment.networks(config)["backpropagation"]
  labels = np.arange(60, dtype=np.int32) % 3
  batch = {
    "image": np.eye(3, dtype="float32")[labels][:, None, None] * np.ones((60, 8, 8, 3), "float32"),
    "label": labels,
  }
  state = train.supervised(model, train.cross_entropy(), optax.sgd(0.1)).init(jax.random.key(0), batch)
  kernel = np.zeros((3, 3, 3, 4), "float32")
  kernel[1, 1, range(3), range(3)] = 1
  params = dict(jax.tree.map(jnp.zeros_like, state.params))
  params["units_0"] = {"conv": {"kernel": kernel}, "norm": state.params["units_0"]["norm"]}
  params["units_1"] = state.params["units_1"]
  state = types.SimpleNamespace(params=params, collections=state.collections)
  scores = experiment.probe(model, types.SimpleNamespace(plain=lambda: [batch], test=[batch]))(state)
  assert scores[0] == 100 and len(scores) == 4
  assert scores[2] == scores[3] == pytest.approx(100 / 3)


@pytest.mark.parametrize(
  ("change", "name"),
  [
    ({"depths": ()}, "depths"),
    ({"depths": (-1,)}, "depths"),
    ({"layers": 8, "depths": (1, 3)}, "depths"),  # d = 3 of 4 units would be backpropagation
    ({"seeds": 0}, "seeds"),
    ({"padding": "wrap"}, "padding"),
    ({"layers": 9}, "depth"),
  ],
)
def test_bad_settings(change, name, tmp_path):
  with pytest.raises(ValueError, match=f"{name}: got"):
    experiment.main(experiment.Config(workdir=tmp_path, **change))
