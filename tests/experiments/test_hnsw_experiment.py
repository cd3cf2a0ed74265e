import dataclasses
import json

import numpy as np
import pytest

from experiments import hnsw as experiment


def test_points_and_queries():
  shapes = {"mnist5k": (5000, 784), "digits": (1797, 64)}
  for dataset in ("mnist5k", "digits", "clustered", "uniform"):
    x, queries = experiment.load(experiment.Config(dataset=dataset, points=300, dim=8))
    count, dim = shapes.get(dataset, (300 + experiment.QUERIES, 8))
    assert x.shape[1] == queries.shape[1] == dim
    assert len(x) + len(queries) == count
    assert not {row.tobytes() for row in x} & {row.tobytes() for row in queries}


def test_rate_at_a_recall_lies_between_the_measured():
  recall, rate = [0.8, 0.9, 1.0], [1000.0, 100.0, 10.0]
  assert experiment.rate_at(recall, rate, 0.95) == pytest.approx(10**1.5)
  assert experiment.rate_at(recall[:2], rate[:2], 0.95) is None


def test_recall_counts_answers_as_near_as_the_tenth_neighbour(monkeypatch):
  monkeypatch.setattr(experiment, "PATIENCE", 1e-9)
  monkeypatch.setattr(experiment, "SETTLE", 0)
  near, far = np.full((4, experiment.K), 1.0), np.full((4, experiment.K), 3.0)
  far[:, 0] = 1.0
  searches = {"all": lambda ef: near, "one": lambda ef: far if ef < 20 else near}
  found = experiment.curves(searches, (10, 20), np.full((4, 1), 2.0))
  assert found["all"][0] == [1.0, 1.0] and found["one"][0] == [1 / experiment.K, 1.0]


def test_runs_end_to_end_on_host_and_device(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(experiment, "PATIENCE", 0.05)
  monkeypatch.setattr(experiment, "SETTLE", 0)
  config = experiment.Config(dataset="digits", ef=(10, 80), threads=1, device=True, workdir=tmp_path)
  experiment.main(config)
  metrics = json.loads((tmp_path / "digits-demo/result.json").read_text())["metrics"]
  names = {name.split(":")[0] for name in metrics}
  assert {"jaxlab", "jaxlab, JAX on cpu"} <= names
  for name in ("jaxlab", "jaxlab, JAX on cpu"):
    assert 0.8 < metrics[f"{name}: recall at ef 10"]["mean"] < metrics[f"{name}: recall at ef 80"]["mean"] <= 1
  assert (tmp_path / "digits-demo/figure.png").stat().st_size > 10_000
  capsys.readouterr()
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out
  with pytest.raises(ValueError, match="threads: got 0"):
    experiment.main(dataclasses.replace(config, threads=0))
