"""The experiment end to end on few rounds: what it writes, and that a second run reports without training."""

import json

import pytest

from experiments import fedzip as experiment
from jaxlab import train


def test_reports_draws_and_does_not_train_twice(tmp_path, monkeypatch, capsys):
  kept = ("FedAvg", "FedZip, z = 80 %")
  monkeypatch.setattr(experiment, "ARMS", {name: experiment.ARMS[name] for name in kept})
  config = experiment.Config("digits", 3, rounds=3, epochs=1, hidden=16, seeds=1, workdir=tmp_path)
  experiment.main(config)
  (folder,) = tmp_path.iterdir()
  metrics = json.loads((folder / "result.json").read_text())["metrics"]
  assert metrics["FedZip, z = 80 %: ratio of true bytes"]["mean"] > 5
  assert metrics["final model as one message, z = 80 %: ratio of bytes written and read back"]["mean"] > 5
  assert metrics["final model as one message, z = 80 %: ratio by the published accounting"]["mean"] > 15
  assert 0 < metrics["final model as one message, z = 80 %: error"]["mean"] < 1
  assert 0.1 < metrics["FedZip, z = 80 %: error of an update"]["mean"] < 1
  lost = metrics["FedAvg: final accuracy (%)"]["mean"] - metrics["FedZip, z = 80 %: final accuracy (%)"]["mean"]
  assert metrics["FedZip, z = 80 %: loss of accuracy (points)"]["mean"] == pytest.approx(lost)
  assert (folder / "figure.png").stat().st_size > 10_000

  monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained again"))
  capsys.readouterr()
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


def test_bad_settings_are_named(tmp_path):
  with pytest.raises(ValueError, match="^seeds: got 0"):
    experiment.main(experiment.Config(seeds=0, workdir=tmp_path))
