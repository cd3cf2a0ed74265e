"""The experiment end to end on few updates: what it writes, and that a second run reports without training."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from experiments import graph_mamba as experiment
from jaxlab import train
from jaxlab.data import files


def test_ring_reports_draws_and_does_not_train_twice(tmp_path, monkeypatch, capsys):
  timing = experiment.timing
  monkeypatch.setattr(experiment, "timing", lambda: timing((64, 128)))
  config = experiment.Config(ring=(12,), runs=1, epochs=4, features=8, methods=("GMN, m = 0", "GCN"), workdir=tmp_path)
  experiment.main(config)
  (folder,) = tmp_path.iterdir()
  result = json.loads((folder / "result.json").read_text())
  assert set(config.methods) < set(result["metrics"])
  assert all(0 <= m["mean"] <= 100 for name, m in result["metrics"].items() if name in config.methods)
  assert (folder / "figure.png").stat().st_size > 10_000
  monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained again"))
  capsys.readouterr()
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


def test_rings_ask_for_the_opposite_colour():
  problem = experiment.ring_problem(experiment.resolve(experiment.Config(epochs=5)), 10, 0, rings=3)
  batch = problem.train(7)
  x, mask = batch["graph"].nodes, batch["train"]
  assert mask.sum() == 3 and (x[mask][:, experiment.COLORS] == 1).all()
  np.testing.assert_array_equal(
    x[: 3 * 10, : experiment.COLORS].reshape(3, 10, -1).sum(1).argmax(1), batch["labels"][mask]
  )
  np.testing.assert_array_equal(np.asarray(batch["graph"].n_node), [10, 10, 10, 1])
  assert not np.array_equal(problem.train(8)["graph"].senders, batch["graph"].senders)


def test_folds_keep_their_graphs_apart():
  config = experiment.resolve(experiment.Config(dataset="MUTAG", runs=2, epochs=2, length=1))
  try:
    first, second = experiment.fold_problems(config)
  except files.MissingFile as error:
    pytest.skip(str(error))
  shape = lambda batch: jax.tree.map(jnp.shape, batch)
  batches = [first.train(i) for i in range(first.epoch)] + first.evaluation
  assert all(shape(batch) == shape(second.train(0)) for batch in batches)  # one compilation for all
  count = lambda part: sum(int(batch[part].sum()) for batch in batches)
  assert (count("train"), count("validation"), count("test")) == (152, 18, 18)
  graphs = sorted(tuple(batch["graph"].nodes[:-1].sum(0).round(3)) for batch in batches)
  assert len(set(graphs)) == len(graphs)


def test_roc_auc():
  rng = np.random.default_rng(0)
  scores, positive, mask = rng.integers(0, 20, 200).astype("float32"), rng.random(200) < 0.3, rng.random(200) < 0.7
  expected = roc_auc_score(positive[mask], scores[mask])
  np.testing.assert_allclose(experiment.roc_auc(scores, jnp.asarray(positive), jnp.asarray(mask)), expected, rtol=1e-5)


def test_bad_input_is_named():
  with pytest.raises(ValueError, match="^methods: got"):
    experiment.main(experiment.Config(methods=("GAT",)))
