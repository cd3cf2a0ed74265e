"""The experiment end to end on the digits."""

import json

import numpy as np
import pytest

from experiments import graphvite as experiment


def test_digits(tmp_path, monkeypatch, capsys):
  config = experiment.Config(dim=16, epochs=(5, 100), seeds=1, models=False, backend="host", workdir=tmp_path)
  experiment.main(config)
  folder = tmp_path / "digits-demo-16-P1-4-host"
  found = {name: m["mean"] for name, m in json.loads((folder / "result.json").read_text())["metrics"].items()}
  one, four = (found[f"AUC, P = {p}, 100 epochs"] for p in (1, 4))
  assert min(one, four) > 0.9 and abs(one - four) < 0.03
  assert found["AUC, P = 1, 5 epochs"] < 0.7 and found["AUC, degree product"] < 0.75
  assert found["micro-F1, P = 1, 100 epochs"] > 0.8 > 0.2 > found["micro-F1, most frequent labels"]
  assert (folder / "figure.png").stat().st_size > 10_000
  monkeypatch.setattr(experiment, "measure", None)
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


def test_auc_by_hand():
  assert experiment.auc(np.array([3.0, 1.0]), np.array([2.0, 0.0])) == 0.75


def test_models_are_compared_at_the_most_epochs():
  names = list(experiment.runs(experiment.Config(epochs=(3, 7), parts=(2,))))
  assert names[:2] == ["P = 2, 3 epochs", "P = 2, 7 epochs"] and all("P = 2, 7 epochs" in n for n in names[2:])
  assert len(names) == 6


def test_bad_config():
  for changes in ({"seeds": 0}, {"dim": 0}, {"augmentation_step": 0}, {"epochs": ()}, {"parts": (0,)}):
    with pytest.raises(ValueError, match=f"^{next(iter(changes))}: got"):
      experiment.main(experiment.Config(**changes))
