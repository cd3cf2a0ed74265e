"""The experiment end to end on few epochs: what it writes, and that a second run reports without training."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.sparse

from experiments import dagnn as experiment
from jaxlab import train
from jaxlab.data import networks
from jaxlab.graph import sparse
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
  assert methods["DAGNN, K = 10"].net.hops == 10 and methods["DAGNN, K = 32"].net.hops == 32
  assert methods["GCN"].decayed == ("layer_0",) and methods["GCN of 32 layers"].net.depth == 32


@pytest.mark.parametrize(("split", "expected"), [("public", 84.4), ("random", None)])
def test_published_accuracy_is_of_the_split_it_belongs_to(split, expected, tmp_path, monkeypatch):
  monkeypatch.setattr(experiment.planetoid, "load", lambda _: experiment.synthetic.citation())
  best = experiment.node_classification.Best(*np.ones((3, 2)), {})
  monkeypatch.setattr(train, "fit", lambda *_, **__: experiment.node_classification.Run(*[None] * 5, best, None))
  monkeypatch.setattr(experiment, "draw", lambda *_: None)
  monkeypatch.setattr(train, "save_variables", lambda *_: None)
  experiment.main(experiment.Config("cora", seeds=2, split=split, hops=(), workdir=tmp_path))
  result = json.loads((tmp_path / f"cora-{split}-2" / "result.json").read_text())
  assert result["published"].get("DAGNN", {}).get("value") == expected


def test_networks_have_neighbours_as_features_and_a_split_by_class(monkeypatch):
  n = 120
  ring = np.arange(n - 2)  # of all nodes but the last two, which are a component of their own
  rows, columns = np.append(ring, n - 2), np.append((ring + 1) % (n - 2), n - 1)
  half = scipy.sparse.csr_array((np.ones(n - 1, "float32"), (rows, columns)), (n, n))
  adjacency, labels = (half + half.T).tocsr(), (np.arange(n) % 2).astype("int32")
  monkeypatch.setattr(networks, "amazon_photo", lambda: networks.Network(adjacency, labels))
  config = experiment.Config("amazon_photo", seeds=2)
  task = experiment.load(config)
  features = sparse.propagate(task.graph.nodes, np.eye(n, dtype="float32"))
  np.testing.assert_allclose(features, adjacency.toarray() / adjacency.sum(1)[:, None])
  for mask, size in ((task.train, 40), (task.validation, 60), (task.test, 18)):
    np.testing.assert_array_equal(mask.sum(1), size)
    assert not mask[:, -2:].any()
  assert (task.train[0] != task.train[1]).any()
  assert experiment.methods(config, 8)["DAGNN"].recipe == dagnn.RECIPES["amazon_photo"]


def test_what_is_typed_stays_beside_a_preset():
  typed = experiment.parse(["--preset", "paper", "--seeds", "3", "--dataset", "pubmed"])
  assert typed == dataclasses.replace(experiment.PRESETS["paper"], seeds=3, dataset="pubmed")
  assert experiment.parse(["--preset=paper"]).seeds == 100
  assert experiment.parse(["--dataset", "digits"]) == experiment.Config()
