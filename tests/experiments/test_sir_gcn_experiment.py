"""The experiment end to end on few graphs and epochs: what it writes, and the parts that its numbers rest on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from experiments import sir_gcn as experiment
from jaxlab import train
from jaxlab.data import heterophilous, synthetic
from jaxlab.data.node import NodeDataset
from jaxlab.graph import sparse
from jaxlab.graph.nets import sir_gcn


def test_dictionary_reports_draws_and_does_not_train_twice(tmp_path, monkeypatch, capsys):
  config = experiment.Config(size=3, seeds=1, epochs=12, methods=("SIR-GCN", "GCN"), workdir=tmp_path)
  experiment.main(config)
  folder = tmp_path / "dictionary-3-1runs-12epochs"
  result = json.loads((folder / "result.json").read_text())
  mean = {name: metric["mean"] for name, metric in result["metrics"].items()}
  assert list(mean) == ["SIR-GCN", "GCN"] and all(m["n"] == 1 for m in result["metrics"].values())
  assert mean["GCN"] == pytest.approx(100 / 3, abs=1e-3)  # a third of the keys, in every graph
  assert mean["SIR-GCN"] > 60
  assert (folder / "figure.png").stat().st_size > 10_000
  assert len(train.read_metrics(folder / "GCN-seed0")["test_accuracy"][1]) == 12
  monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained again"))
  capsys.readouterr()
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


def test_batches_of_counts_are_the_graphs():
  """Operators that are put together from parts equal those made from the batch; nothing is lost in shuffling."""
  data = experiment.edge_counts(3, 7)(5)
  task = synthetic.hetero_edge_count(3, seed=7)
  np.testing.assert_array_equal(data.test.target.reshape(-1), task.targets[4000:])
  assert sorted(data.train.target.reshape(-1)) == sorted(task.targets[:4000])
  graph, operator, target = jax.tree.map(lambda a: a[3], data.train)
  made = sparse.operator(graph)
  for name in ("rows", "columns", "row_starts", "transpose_order", "transpose_rows", "transpose_starts"):
    np.testing.assert_array_equal(getattr(operator, name), getattr(made, name))
  eye = jnp.eye(3)
  params = {
    "embedding": {"embedding": eye},
    "conv_0": {
      "query": {"kernel": -eye, "bias": jnp.zeros(3)},
      "key": {"kernel": eye},
      "relation": {"kernel": eye, "bias": jnp.zeros(3)},
    },
    "regression": {"kernel": jnp.ones((3, 1))},
  }
  counts = sir_gcn.HeteroEdgeCount(3, 3).apply({"params": params}, graph, operator)
  np.testing.assert_array_equal(counts[: experiment.BATCH], target)


@pytest.mark.parametrize("ties", [False, True])
def test_auc(ties):
  rng = np.random.default_rng(0)
  scores = rng.normal(size=200).round(1 if ties else 8).astype("float32")
  positive, mask = rng.random(200) < 0.3, rng.random(200) < 0.6
  expected = sklearn.metrics.roc_auc_score(positive[mask], scores[mask])
  np.testing.assert_allclose(experiment.auc(scores, jnp.asarray(positive), jnp.asarray(mask)), expected, atol=1e-5)


def test_minesweeper_on_a_small_graph(tmp_path, monkeypatch):
  def small(name, number):
    assert name == "minesweeper"
    senders, receivers = synthetic.erdos_renyi(60, 120, seed=0)
    rng = np.random.default_rng(number)
    labels = rng.integers(0, 2, 60)
    part = rng.permutation(60)
    features = np.eye(7, dtype="float32")[labels]
    return NodeDataset(features, senders, receivers, labels.astype("int32"), part < 30, part // 15 == 2, part >= 45)

  monkeypatch.setattr(heterophilous, "load", small)
  monkeypatch.setattr(experiment, "EPOCHS_PER_STEP", 5)
  network = sir_gcn.minesweeper
  monkeypatch.setattr(sir_gcn, "minesweeper", lambda **changes: network(**changes | {"hidden": 8, "depth": 1}))
  experiment.split.cache_clear()
  experiment.main(experiment.Config(task="minesweeper", seeds=2, epochs=40, methods=("GCN",), workdir=tmp_path))
  experiment.split.cache_clear()
  result = json.loads((tmp_path / "minesweeper-demo-2runs-40epochs" / "result.json").read_text())
  assert len(result["metrics"]["GCN"]["values"]) == 2 and result["metrics"]["GCN"]["mean"] > 80


def test_gatv2_against_matrices():
  rng = np.random.default_rng(0)
  adjacency = (rng.random((6, 6)) < 0.4) | np.eye(6, dtype=bool)
  op, x = sparse.from_scipy(adjacency.astype("float32")), rng.normal(size=(6, 3)).astype("float32")
  variables = experiment.GATv2Conv(4).init(jax.random.key(0), op, x)
  q, k = (x @ variables["params"][name]["kernel"] for name in ("query", "key"))
  z = np.asarray(q[:, None] + k[None])
  score = (np.where(z > 0, z, 0.2 * z) @ variables["params"]["attention"])[..., 0]
  weights = np.exp(score) * adjacency
  expected = weights / weights.sum(1, keepdims=True) @ k
  np.testing.assert_allclose(experiment.GATv2Conv(4).apply(variables, op, x), expected, atol=1e-5)


def test_presets_and_checks():
  paper = experiment.completed(experiment.parse(["--task", "minesweeper", "--preset", "paper"]))
  net, recipe = experiment.minesweeper_method(paper, "SIR-GCN")
  assert net == sir_gcn.minesweeper() and recipe == sir_gcn.RECIPES["minesweeper"] and paper.seeds == 10
  other, _ = experiment.minesweeper_method(paper, "GCN")
  assert (other.hidden, other.depth, other.norm) == (256, 5, "batch")
  assert experiment.completed(experiment.parse(["--task=edge_count", "--preset=paper", "--seeds=2"])).seeds == 2
  for change, name in (({"seeds": 0}, "seeds"), ({"methods": ("MLP",)}, "methods"), ({"tune": True}, "tune")):
    with pytest.raises(ValueError, match=f"^{name}: got "):
      experiment.main(experiment.Config(**change))
