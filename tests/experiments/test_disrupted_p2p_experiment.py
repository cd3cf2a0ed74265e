"""The experiment end to end on few rounds: what it writes, and that a second run reports without training."""

import json

import numpy as np
import pytest

from experiments import disrupted_p2p as experiment
from jaxlab import train


def test_reports_draws_and_does_not_train_twice(tmp_path, monkeypatch, capsys):
  config = experiment.Config("digits", 8, time=1, rounds=4, epochs=1, hidden=(8,), graphs=2, workdir=tmp_path)
  experiment.main(config)
  (folder,) = tmp_path.iterdir()
  metrics = json.loads((folder / "result.json").read_text())["metrics"]
  assert len(metrics["undisturbed (%)"]["values"]) == 2
  gap = "random minus hubs removed, A"
  expected = np.mean(metrics["A, random (%)"]["values"]) - np.mean(metrics["A, hubs (%)"]["values"])
  assert metrics[f"{gap} (points)"]["mean"] == pytest.approx(expected)
  assert metrics[f"{gap}: 95 % interval, half width"]["mean"] >= 0
  assert (folder / "figure.png").stat().st_size > 10_000

  monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained again"))
  capsys.readouterr()
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


def test_interval_is_that_of_students_t():
  assert experiment.interval(np.array([1.0, 2.0, 3.0])) == pytest.approx(4.3027 * 1 / np.sqrt(3), rel=1e-4)


def test_bad_settings_are_named(tmp_path):
  with pytest.raises(ValueError, match="^time: got 9"):
    experiment.main(experiment.Config(time=9, rounds=9, workdir=tmp_path))
