"""The studies end to end, small: what they write, and that a second run reports without computing."""

import json

import numpy as np
import pytest

from experiments import topological_concentration as experiment
from jaxlab import data


def metrics(folder):
  result = json.loads((folder / "result.json").read_text())
  assert (folder / "figure.png").stat().st_size > 10_000
  return {name: m["mean"] for name, m in result["metrics"].items()}


def test_a_split_by_time_shifts_and_one_at_random_does_not(tmp_path, monkeypatch, capsys):
  config = experiment.Config(shift=True, seeds=2, workdir=tmp_path)
  experiment.main(config)
  mean = metrics(tmp_path / "shift-2")
  assert mean["difference, split by time"] < -0.1
  assert abs(mean["difference, split at random"]) < 0.02
  monkeypatch.setattr(experiment, "shifts", None)
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


def test_compares_on_a_small_graph(tmp_path, monkeypatch):
  """With a graph in Cora's place."""
  edges = experiment.growth(0, num_nodes=150, links=4)
  both = np.concatenate([edges, edges[::-1]], axis=1)
  features, none = np.eye(150, dtype="float32"), np.zeros(150, bool)
  small = data.NodeDataset(features, *both, np.zeros(150, "int32"), none, none, none)
  monkeypatch.setattr(experiment.planetoid, "load", lambda name: small)
  recipe = experiment.tc.RECIPES["cora", "gcn"]._replace(features=8, batch_size=64, k=5)
  monkeypatch.setitem(experiment.tc.RECIPES, ("cora", "gcn"), recipe)
  experiment.main(experiment.Config(seeds=2, epochs=2, rates=(0.01,), workdir=tmp_path))
  mean = metrics(tmp_path / "cora-gcn-2x2")
  assert -1 <= mean["Spearman of Recall@10 with TC"] <= 1
  assert mean["weighted TC, plain"] > 0
  assert 0 <= mean["test Hits@100 (%), re-weighted"] <= 100
  assert mean["weighted TC, plain, scaled"] == pytest.approx(mean["weighted TC, plain"], rel=1e-5)


def test_bad_config():
  for change in ({"seeds": 0}, {"epochs": 0}, {"rates": ()}, {"shift": True, "scaling": True}):
    with pytest.raises(ValueError, match=f"^{next(iter(change))}: got"):
      experiment.main(experiment.Config(**change))
