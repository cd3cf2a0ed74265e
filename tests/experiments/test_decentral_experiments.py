"""What the four experiments of this room share: presets give defaults only, and a folder serves no other settings."""

import dataclasses
import importlib

import pytest

NAMES = ("fedzip", "modest", "single_merging", "disrupted_p2p")
SMALL = {
  "fedzip": {"dataset": "digits", "clients": 3, "rounds": 2, "hidden": 8, "seeds": 1},
  "modest": {"nodes": 40, "sample": 4, "rounds": 5, "crash_at": 2, "hidden": 8, "seeds": 1},
  "single_merging": {
    "dataset": "digits",
    "clients": 3,
    "rounds": 5,
    "steps": 2,
    "size": 40,
    "seeds": 1,
    "evaluate_every": 2,
  },
  "disrupted_p2p": {"peers": 8, "time": 1, "rounds": 2, "hidden": (8,), "graphs": 1},
}


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_defaults(name):
  experiment = importlib.import_module(f"experiments.{name}")
  paper = experiment.PRESETS["paper"]
  assert experiment.parse([]) == experiment.PRESETS["demo"] == experiment.Config()
  assert experiment.parse(["--preset", "paper"]) == experiment.parse(["--preset=paper"]) == paper
  assert paper.rounds != 20 and paper.preset == "paper"
  assert experiment.parse(["--preset", "paper", "--rounds", "20"]) == dataclasses.replace(paper, rounds=20)


class Stop(Exception):
  """Ends an experiment at its first run."""


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_serves_no_other_settings(name, tmp_path, monkeypatch):
  """Once a run has begun, other settings are refused, not answered with its numbers."""
  experiment = importlib.import_module(f"experiments.{name}")
  config = experiment.Config(**SMALL[name], workdir=tmp_path)
  fit = experiment.train.fit

  def begin(*args, **options):
    fit(*args, **options | {"steps": 1, "evaluate_on": None, "save_every": 1})
    raise Stop

  monkeypatch.setattr(experiment.train, "fit", begin)
  with pytest.raises(Stop):
    experiment.main(config)
  for changed in ({"rate": 0.5}, {"batch_size": 7}):
    with pytest.raises(ValueError, match=f"^workdir: got .*{next(iter(changed))} was"):
      experiment.main(dataclasses.replace(config, **changed))
