"""The experiment end to end on few rounds: what it writes, and that a second run reports without training."""

import json

import numpy as np
import pytest

from experiments import disrupted_p2p as experiment
from jaxlab import train


def test_reports_draws_and_does_not_train_twice(tmp_path, monkeypatch, capsys):
  config = experiment.Config("digits", 8, time=0, rounds=4, epochs=1, hidden=(8,), graphs=2, workdir=tmp_path)
  experiment.main(config)
  (folder,) = tmp_path.iterdir()
  metrics = json.loads((folder / "result.json").read_text())["metrics"]
  assert len(metrics["undisturbed (%)"]["values"]) == 2
  gap = "random minus hubs removed, A"
  expected = np.mean(metrics["A, random (%)"]["values"]) - np.mean(metrics["A, hubs (%)"]["values"])
  assert metrics[f"{gap} (points)"]["mean"] == pytest.approx(expected)
  assert metrics[f"{gap}: 95 % interval, half width"]["mean"] >= 0
  low, middle = (metrics[f"A, hubs: {part} of survivors (%)"]["mean"] for part in ("minimum", "median"))
  assert low <= middle and low <= metrics["A, hubs (%)"]["mean"]
  assert metrics["A, hubs: survivors next to the removed (%)"]["n"] == 2
  assert metrics["undisturbed: algebraic connectivity"]["mean"] > 0
  assert metrics["A, hubs: algebraic connectivity"]["n"] == 2
  assert (folder / "figure.png").stat().st_size > 10_000

  monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained again"))
  capsys.readouterr()
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


@pytest.mark.parametrize(("peers", "share"), [(27, 0.5), (5, 0.3)])
def test_all_arms_have_worlds_of_one_shape(peers, share):
  examples = {"image": np.zeros((260, 2)), "label": np.zeros(260, int)}
  config = experiment.Config(peers=peers, share=share)
  shapes = {experiment.world(config, name, examples, 0)[0].clients.index.shape for name in experiment.ARMS}
  assert len(shapes) == 1


def test_interval_is_that_of_students_t():
  assert experiment.interval(np.array([1.0, 2.0, 3.0])) == pytest.approx(4.3027 * 1 / np.sqrt(3), rel=1e-4)


def test_bad_settings_are_named(tmp_path):
  with pytest.raises(ValueError, match="^time: got 9"):
    experiment.main(experiment.Config(time=9, rounds=9, workdir=tmp_path))
  with pytest.raises(ValueError, match="^share: got 0.99"):
    experiment.main(experiment.Config(share=0.99, workdir=tmp_path))
