"""The experiment end to end on few epochs: what it writes, and that a second run reports without training."""

import json

import numpy as np
import pytest

from experiments import dagnn as experiment
from jaxlab import train
from jaxlab.graph.nets import dagnn


@pytest.fixture
def short(monkeypatch):
  candidate = experiment.candidate
  monkeypatch.setattr(
    experiment, "candidate", lambda *a: (m := candidate(*a))._replace(recipe=m.recipe._replace(epochs=50))
  )


def test_demo_reports_draws_saves_and_does_not_train_twice(short, tmp_path, monkeypatch, capsys):
  config = experiment.Config(seeds=2, hops=(0,), workdir=tmp_path)
  experiment.main(config)
  folder = tmp_path / "digits-random-2"
  result = json.loads((folder / "result.json").read_text())
  assert list(result["metrics"]) == ["DAGNN", "GCN", "MLP", "DAGNN, K = 0"]
  assert all(len(metric["values"]) == 2 for metric in result["metrics"].values())
  mean = {name: metric["mean"] for name, metric in result["metrics"].items()}
  assert min(mean["DAGNN"], mean["GCN"]) > mean["MLP"] > 70  # the graph helps
  assert (folder / "figure.png").stat().st_size > 10_000

  # The saved weights give the accuracy in the table.
  params = train.load_variables(folder / "dagnn_seed0")
  task = experiment.load(config)
  net = dagnn.DAGNN(10, dropout=0.0)
  hit = np.argmax(net.apply(params, task.graph, task.operator), 1) == task.labels
  np.testing.assert_allclose(
    100 * hit[np.asarray(task.test[0])].mean(), result["metrics"]["DAGNN"]["values"][0], atol=0.2
  )

  monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained again"))
  capsys.readouterr()
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


def test_seeds_are_checked():
  with pytest.raises(ValueError, match="^seeds: got 0"):
    experiment.main(experiment.Config(seeds=0))


@pytest.mark.parametrize("dataset", ["cora", "citeseer", "synthetic"])
def test_citation_graphs_use_published_hyperparameters(dataset):
  methods = experiment.methods(experiment.Config(dataset=dataset, ablation=True), 7)
  recipe = dagnn.RECIPES["citeseer" if dataset == "citeseer" else "cora"]
  assert methods["DAGNN, K = 20"].recipe == recipe and methods["DAGNN, K = 20"].net.hops == 20
  assert methods["GCN"].decayed == ("layer_0",) and methods["GCN of 32 layers"].net.depth == 32
