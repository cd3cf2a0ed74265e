"""The studies end to end, small: what they write, and that a second run reports without computing."""

import json
import math

import numpy as np
import pytest

from experiments import graphlet_orbits as experiment
from jaxlab.data import synthetic
from jaxlab.graph import common_neighbors


def result(folder):
  assert (folder / "figure.png").stat().st_size > 10_000
  return json.loads((folder / "result.json").read_text())


def blocks(config):
  """Two communities."""
  edges = np.stack(synthetic.stochastic_blocks([20, 20], np.array([[0.5, 0.05], [0.05, 0.5]]), seed=1))
  return common_neighbors.adjacency(edges, 40), np.repeat([0, 1], 20)


def test_compares_on_two_communities(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(experiment, "load", blocks)
  monkeypatch.setattr(experiment, "PAIRS", ((1, 3, 3), (1, 9, 11)))
  config = experiment.Config(dim=4, windows=(1, 3), penalties=(0.3,), folds=2, seeds=2, workdir=tmp_path)
  experiment.main(config)
  mean = {name: m["mean"] for name, m in result(tmp_path / "digits-4-2")["metrics"].items()}
  assert mean["accuracy, walks"] > 0.9 and mean["accuracy, largest class"] == 0.5
  assert math.isclose(
    mean["accuracy, orbits minus walks"], mean["accuracy, orbits"] - mean["accuracy, walks"], abs_tol=1e-9
  )
  assert {"accuracy, walks: 3 steps", "accuracy, orbits: 1; 9, 11", "accuracy, graphlets: G8"} < set(mean)
  monkeypatch.setattr(experiment, "compare", None)
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


def test_labels_of_test_nodes_are_not_seen_when_picking():
  """A candidate that knows the test nodes alone is not preferred."""
  config = experiment.Config(penalties=(1.0,))
  rng, y, learn = np.random.default_rng(0), np.tile([0, 1], 40), np.arange(40)
  knows_training, knows_test = rng.standard_normal((2, 80, 1))
  knows_training[:40, 0] += 4 * y[:40]
  knows_test[40:, 0] += 4 * y[40:]
  first, second = (experiment.tuned(config, x, y, learn, 0)[0] for x in (knows_training, knows_test))
  assert first > 0.85 > second


@pytest.mark.parametrize("kind", ["scaling", "large"])
def test_cost(tmp_path, monkeypatch, kind):
  monkeypatch.setattr(experiment, "SIZES", (60, 120))
  monkeypatch.setattr(experiment, "LARGE", 300)
  experiment.main(experiment.Config(**{kind: True}, workdir=tmp_path))
  names = {name.split(",")[0] for name in result(tmp_path / kind)["metrics"]}
  assert {"seconds", "entries", "largest entry", "peak GiB of the process"} <= names


def test_bad_config():
  for change in ({"seeds": 0}, {"dim": 0}, {"folds": 1}, {"windows": ()}, {"scaling": True, "large": True}):
    with pytest.raises(ValueError, match=f"^{next(iter(change))}: got"):
      experiment.main(experiment.Config(**change))
