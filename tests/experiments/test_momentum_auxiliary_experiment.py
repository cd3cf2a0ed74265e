import json

import numpy as np
import pytest

from experiments import momentum_auxiliary as experiment
from jaxlab.data import images


def test_paper_preset_is_the_published_recipe():
  config = experiment.parse(["--preset", "paper"])
  assert (config.layers, config.widths, config.size, config.epochs) == (32, (16, 16, 32, 64), 32, 400)
  assert (config.batch_size, config.learning_rate, config.warmup, config.momentum) == (1024, 0.8, 10, 0.995)


def test_cuts():
  assert experiment.even_cuts(16, 15) == tuple(range(1, 16))
  assert experiment.even_cuts(7, 3) == (2, 4, 6)
  assert experiment.even_cuts(7, 1) == (6,)
  models = experiment.networks(experiment.Config(modules=(3,)))
  sizes = {name: (m.num_modules, m.bias, m.average) for name, m in models.items()}
  assert sizes["MAN, 3 modules"] == (3, True, True) and sizes["InfoPro, 3 modules"] == (3, False, False)
  assert sizes["backpropagation"][0] == 1 and len(sizes) == 5


def fake_arrays(name, split):
  rng = np.random.default_rng(len(split))
  return images.Images(image=rng.integers(0, 256, (32, 32, 32, 3), np.uint8), label=np.arange(32, dtype=np.int32) % 10)


def test_runs_end_to_end(tmp_path, monkeypatch):
  monkeypatch.setattr(images, "as_arrays", fake_arrays)
  config = experiment.Config(
    layers=8, widths=(4, 4, 4, 4), size=8, modules=(2,), methods=("average",), epochs=1, batch_size=16, seeds=1,
    workdir=tmp_path,
  )  # fmt: skip
  experiment.main(config)
  (folder,) = tmp_path.iterdir()
  result = json.loads((folder / "result.json").read_text())
  assert result["metrics"]["error, average, 2 modules"]["n"] == 1
  assert result["metrics"]["step memory, backpropagation"]["mean"] == 1
  assert (folder / "figure.png").stat().st_size > 10_000
  experiment.main(config)  # finished


@pytest.mark.parametrize(
  ("change", "name"), [({"modules": (7,)}, "modules"), ({"methods": ("DGL",)}, "methods"), ({"seeds": 0}, "seeds")]
)
def test_bad_settings(change, name, tmp_path):
  with pytest.raises(ValueError, match=f"{name}: got"):
    experiment.main(experiment.Config(workdir=tmp_path, **change))
