import json

import jax
import numpy as np
import pytest

from experiments import momentum_auxiliary as experiment
from jaxlab.data import images
from jaxlab.learning import momentum_auxiliary as man


def test_paper_preset_is_the_published_recipe():
  config = experiment.parse(["--preset", "paper"])
  assert (config.layers, config.widths, config.size, config.epochs) == (32, (16, 16, 32, 64), 32, 400)
  assert (config.batch_size, config.learning_rate, config.warmup, config.momentum) == (1024, 0.8, 10, 0.995)
  assert (config.first, config.last, config.rule, config.padding) == ((5, 0.5), (0, 0), "stage", "reflect")
  assert config.modules == (8, 15)
  larger = experiment.parse(["--preset", "paper-110"])
  assert (larger.layers, larger.modules, larger.rule, larger.widths) == (110, (32, 54), "stage", config.widths)


@pytest.mark.parametrize("preset", ["paper", "paper-110"])
def test_paper_presets_have_published_cuts_and_errors(preset):
  config = experiment.parse(["--preset", preset, "--methods", "InfoPro", "MAN"])
  models = experiment.networks(config)
  assert models.keys() == experiment.PUBLISHED[config.layers].keys()
  few, many = (models[f"MAN, {k} modules"] for k in config.modules)
  cuts = {"paper": (1, 3, 5, 7, 9, 11, 13, 15), "paper-110": man.resnet110(32).cuts}
  assert few.cuts == cuts[preset] and many.cuts == tuple(range(1, len(many.backbone)))
  named = {"paper": 16, "paper-110": 55}[preset]
  assert experiment.weights(config, many) == man.stage_weights(many, named, (5, 0.5), (0, 0))
  assert experiment.weights(config, models["backpropagation"]) == []


def test_linear_weights_by_default():
  config = experiment.Config(modules=(3,))
  model = experiment.networks(config)["MAN, 3 modules"]
  assert experiment.weights(config, model) == [(5, 0.5), (4, 0.4)]


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
  monkeypatch.setattr(jax, "device_count", lambda: 1)  # compiled in half the time; AugLocal's test has all devices
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
