import json

import numpy as np
import pytest

from experiments import auglocal as experiment
from jaxlab.data import images


def test_paper_preset_is_the_published_recipe():
  config = experiment.parse(["--preset", "paper"])
  assert (config.layers, config.widths, config.size, config.epochs) == (110, (16, 16, 32, 64), 32, 400)
  assert (config.batch_size, config.learning_rate, config.warmup, config.depths) == (1024, 0.8, 10, (1, 3, 5, 6))
  assert experiment.parse(["--preset", "paper", "--layers", "32"]).layers == 32


@pytest.mark.parametrize(
  ("layers", "depth", "backbone", "total"),
  [(32, 2, 69.12, 173.99), (32, 3, 69.12, 192.86), (110, 1, 253.15, None), (110, 6, 253.15, 1284.46)],
)
def test_multiplications_are_the_published_ones(layers, depth, backbone, total):
  config = experiment.Config(layers=layers, widths=(16, 16, 32, 64), depths=(depth,))
  mine, heads = experiment.macs(experiment.networks(config)[f"d = {depth}"], 32)
  assert round(mine / 1e6, 2) == backbone
  assert total is None or round((mine + heads) / 1e6, 2) == total


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
  assert (folder / "figure.png").stat().st_size > 10_000
  experiment.main(config)  # finished


@pytest.mark.parametrize(
  ("change", "name"),
  [({"depths": ()}, "depths"), ({"depths": (-1,)}, "depths"), ({"seeds": 0}, "seeds"), ({"layers": 9}, "depth")],
)
def test_bad_settings(change, name, tmp_path):
  with pytest.raises(ValueError, match=f"{name}: got"):
    experiment.main(experiment.Config(workdir=tmp_path, **change))
