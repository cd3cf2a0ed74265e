"""The experiment end to end on a short stream: what it writes, and that a second run reports without training."""

import json

import numpy as np
import pytest

from experiments import nat as experiment
from jaxlab import train
from jaxlab.data import temporal
from jaxlab.data.temporal import Batches
from jaxlab.graph.links import nat


@pytest.fixture
def short(monkeypatch):
  monkeypatch.setattr(experiment, "load", lambda name: temporal.communities(40, 600, num_communities=4))
  small = nat.NAT((8, 4), 8, replace_prob=0.7)
  monkeypatch.setattr(experiment, "models", lambda config: {"NAT": small})
  return small


@pytest.mark.parametrize("mode", ["inductive"])
def test_demo_reports_draws_saves_and_does_not_train_twice(short, mode, tmp_path, monkeypatch, capsys):
  config = experiment.Config(dataset="communities", mode=mode, seeds=1, epochs=2, workdir=tmp_path)
  experiment.main(config)
  folder = tmp_path / f"communities-{mode}-1"
  result = json.loads((folder / "result.json").read_text())
  methods = ("NAT", "EdgeBank", "EdgeBank, best on validation")
  names = [name + end for name in methods for end in ("", ", mean AP of batches", ", AUC")]
  assert sorted(result["metrics"]) == sorted([*names, "NAT minus EdgeBank"])
  mean = {name: metric["mean"] for name, metric in result["metrics"].items()}
  assert mean["EdgeBank"] > 55  # who has met meets again
  assert abs(mean["NAT minus EdgeBank"] - mean["NAT"] + mean["EdgeBank"]) < 1e-6
  assert (folder / "figure.png").stat().st_size > 10_000
  params = train.load_variables(folder / "seed0" / "NAT" / "best")["params"]
  assert params["aggregation"]["kernel"].shape == (1 + 4 + 16, 2)

  monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained again"))
  capsys.readouterr()
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


def test_edge_bank_remembers_pairs():
  stream = temporal.event_stream(np.array([1, 2]), np.array([2, 3]), np.array([1.0, 5.0]))
  rows = [[1, 2, 3, 3, 6.0], [2, 1, 3, 4, 6.0]], [[3, 1, 2, 5, 9.0], [1, 2, 3, 6, 9.0]]
  *ids, times = np.moveaxis(np.array(rows), 2, 0)
  asked = Batches(*(a.astype("int32") for a in ids), times)
  everything = np.ones(2, bool)
  scores = experiment.edge_bank(stream, everything, asked)
  # Batch 1: (1, 2) met and (1, 3) not, (2, 1) not in this direction; (2, 3) met. Batch 2 knows batch 1.
  assert scores.tolist() == [[[1, 0], [0, 1]], [[0, 1], [0, 0]]]
  undirected = experiment.edge_bank(stream, everything, asked, directed=False)
  assert undirected.tolist() == [[[1, 1], [0, 1]], [[0, 1], [1, 0]]]
  recent = experiment.edge_bank(stream, everything, asked, window=3.5)
  assert recent.tolist() == [[[0, 0], [0, 1]], [[0, 1], [0, 0]]]


def test_arguments_are_checked():
  with pytest.raises(ValueError, match="^seeds: got 0"):
    experiment.main(experiment.Config(seeds=0))
