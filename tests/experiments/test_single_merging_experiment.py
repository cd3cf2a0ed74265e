"""The experiment end to end on few rounds: what it writes, and that a second run reports without training."""

import json

import pytest

from experiments import single_merging as experiment
from jaxlab import train


def test_reports_draws_and_does_not_train_twice(tmp_path, monkeypatch, capsys):
  every = experiment.arms
  kept = ("sparse + merge", "local + merge", "server")  # each is a program of its own
  monkeypatch.setattr(experiment, "arms", lambda c: {k: v for k, v in every(c).items() if k in kept})
  config = experiment.Config(
    "digits", 3, rounds=5, steps=4, size=40, hidden=8, seeds=1, evaluate_every=2, workdir=tmp_path
  )
  experiment.main(config)
  (folder,) = tmp_path.iterdir()
  metrics = json.loads((folder / "result.json").read_text())["metrics"]
  assert metrics["server: models received a client"]["mean"] == 5 * 2
  assert metrics["local + merge: models received a client"]["mean"] == 2
  assert 0 <= metrics["sparse + merge: final (%)"]["mean"] <= 100
  assert (folder / "figure.png").stat().st_size > 10_000

  monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained again"))
  capsys.readouterr()
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


def test_arms_have_the_budgets_they_are_compared_at():
  config = experiment.Config()
  everyone = experiment.np.ones((16, 16), bool)
  made = experiment.arms(config)
  cost = lambda name: experiment.sm.budget(made[name][0], 16, config.steps, everyone)
  assert cost("sparse + merge") == pytest.approx(16 * (150 * 0.2 + 15))
  assert cost("same budget, even") == pytest.approx(cost("sparse + merge"))
  assert cost("local + merge") == pytest.approx(16 * 15)


def test_bad_settings_are_named(tmp_path):
  with pytest.raises(ValueError, match="^rounds: got 3"):
    experiment.main(experiment.Config(rounds=3, workdir=tmp_path))
