"""The experiment end to end on few epochs: what it writes, and that a second run reports without training."""

import json

import numpy as np
import pytest

from experiments import forward_gnn as experiment
from jaxlab import train


@pytest.fixture
def short(monkeypatch):
  """Two algorithms; the memory of compiled steps has its own test."""
  monkeypatch.setattr(experiment, "LAYERWISE", {"nodes": {"SF": experiment.LAYERWISE["nodes"]["SF"]}})
  monkeypatch.setattr(experiment, "JOINT", {"nodes": {"BP": experiment.JOINT["nodes"]["BP"]}})
  monkeypatch.setattr(experiment, "step_memory", lambda *_: {"SF": [1.0, 1.0, 1.0, 1.0], "BP": [1.0, 2.0, 3.0, 4.0]})


def test_reports_draws_and_does_not_train_twice(short, tmp_path, monkeypatch, capsys):
  config = experiment.Config(splits=2, hidden=16, epochs=60, workdir=tmp_path)
  experiment.main(config)
  folder = tmp_path / "digits-nodes-gcn-2-2-60"
  result = json.loads((folder / "result.json").read_text())
  assert list(result["metrics"])[:2] == ["BP, 2 layers", "SF, 2 layers"]
  assert all(len(result["metrics"][name]["values"]) == 2 for name in ("BP, 2 layers", "SF, 2 layers"))
  assert result["metrics"]["SF, 2 layers"]["mean"] > 40  # of ten classes
  assert result["metrics"]["BP: step memory at 4 layers over 1"]["mean"] == 4
  assert (folder / "figure.png").stat().st_size > 10_000

  monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained again"))
  capsys.readouterr()
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


def test_layerwise_results_are_read_at_each_depth():
  config = experiment.Config(depths=(1, 3))
  by_depth = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
  found = experiment.results(config, "SF", {"test_by_depth": by_depth, "test": by_depth[:, 2]})
  np.testing.assert_allclose(found["SF, 1 layers"], [10, 40])
  np.testing.assert_allclose(found["SF, 3 layers"], [30, 60])


def test_bad_settings_are_named(tmp_path):
  for changes, argument in (
    ({"depths": ()}, "depths"),
    ({"splits": 6}, "splits"),
    ({"algorithms": ("SGD",)}, "algorithms"),
  ):
    with pytest.raises(ValueError, match=f"^{argument}: got"):
      experiment.main(experiment.Config(workdir=tmp_path, **changes))
