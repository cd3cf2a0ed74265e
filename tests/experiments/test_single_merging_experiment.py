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


@pytest.mark.parametrize("changes", [{}, {"rounds": 52}, {"window": 0.0}, {"clients": 32, "rounds": 300, "steps": 100}])
def test_windows_have_equally_many_rounds(changes):
  config = experiment.Config(**changes)
  made, ends = experiment.arms(config), config.steps * experiment.np.arange(1, config.rounds + 1)
  length, starts = max(1, round(config.window * config.rounds)), []
  for name in ("early", "middle", "late"):
    dense = experiment.np.flatnonzero(made[f"{name} window"][0](ends) == config.clients - 1)
    assert len(dense) == length == dense[-1] - dense[0] + 1
    starts.append(dense[0])
  assert starts == [int(point * config.rounds) for point in (0.1, 0.5, 0.9)]


def test_statistics_come_from_minibatches_of_training_images():
  training = {"image": experiment.np.arange(100.0).reshape(50, 2), "label": experiment.np.zeros(50, int)}
  found = experiment.batches(experiment.Config(batch_size=16), training, 0)
  assert found.shape == (3, 16, 2) and len({tuple(row) for row in found.reshape(-1, 2)}) == 48
  assert experiment.batches(experiment.Config(batch_size=99), training, 0).shape == (1, 50, 2)
  assert experiment.batches(experiment.Config(batch_size=1), training, 0).shape == (32, 1, 2)


def test_bad_settings_are_named(tmp_path):
  with pytest.raises(ValueError, match="^rounds: got 3"):
    experiment.main(experiment.Config(rounds=3, workdir=tmp_path))
  with pytest.raises(ValueError, match="^evaluate_every: got 5, expected a divisor of 11"):
    experiment.main(experiment.Config(rounds=12, workdir=tmp_path))
  with pytest.raises(ValueError, match="^window: got 0.2"):
    experiment.arms(experiment.Config(window=0.2))
