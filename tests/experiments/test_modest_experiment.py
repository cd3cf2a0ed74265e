"""The experiment end to end on few rounds: what it writes, and that a second run reports without training."""

import json

import numpy as np
import pytest

from experiments import modest as experiment
from jaxlab import train


def test_reports_draws_and_does_not_train_twice(tmp_path, monkeypatch, capsys):
  config = experiment.Config(
    "digits", 40, 4, rounds=5, crash_at=2, inactivity=40, hidden=8, target=0.1, seeds=1, workdir=tmp_path
  )
  experiment.main(config)
  (folder,) = tmp_path.iterdir()
  metrics = json.loads((folder / "result.json").read_text())["metrics"]
  rounds = metrics["MoDeST: rounds to 10%"]["mean"]
  assert metrics["rounds, MoDeST over FedAvg"]["mean"] == pytest.approx(
    rounds / metrics["FedAvg: rounds to 10%"]["mean"]
  )
  assert metrics["pings without answer, in the five rounds after the crash"]["mean"] > 0
  assert (folder / "figure.png").stat().st_size > 10_000

  monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained again"))
  capsys.readouterr()
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


def test_a_target_is_reached_by_the_mean_of_three_rounds():
  accuracy, cost = np.array([0.1, 0.9, 0.2, 0.6, 0.7, 0.8]), np.arange(10, 70, 10)
  assert experiment.reached(accuracy, cost, 0.6) == 60
  assert experiment.reached(accuracy, cost, 0.5) == 40
  assert np.isnan(experiment.reached(accuracy, cost, 0.9))


def test_a_share_that_is_never_reached_has_no_rounds():
  many, never = experiment.joining(experiment.Config(nodes=200, sample=4), (0.9, 1.1), 0)
  assert 100 < many < 250 and np.isnan(never)


def test_bad_settings_are_named(tmp_path):
  with pytest.raises(ValueError, match="^nodes: got 20"):
    experiment.crash(experiment.Config(nodes=20), 0)
  with pytest.raises(ValueError, match="^rounds: got 2"):
    experiment.main(experiment.Config(rounds=2, crash_at=1, workdir=tmp_path))
  with pytest.raises(ValueError, match="^crash_at: got 9"):
    experiment.main(experiment.Config(crash_at=9, rounds=9, workdir=tmp_path))
