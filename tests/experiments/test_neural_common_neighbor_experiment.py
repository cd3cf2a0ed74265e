"""The experiment end to end on a small graph: what it writes, and that a second run reports without training."""

import json

import numpy as np
import pytest

from experiments import neural_common_neighbor as experiment
from jaxlab import train
from jaxlab.graph.links import neural_common_neighbor as ncn


@pytest.fixture
def short(monkeypatch):
  geometric, build = experiment.geometric, experiment.build

  def narrow(config, method):
    model, recipe = build(config, method)
    parts = (part.clone(parent=None, features=8) for part in (model.encoder, model.head))
    return ncn.LinkPredictor(*parts), recipe._replace(batch_size=200)

  monkeypatch.setattr(experiment, "geometric", lambda: geometric(300))
  monkeypatch.setattr(experiment, "build", narrow)
  monkeypatch.setattr(experiment, "METHODS", {name: experiment.METHODS[name] for name in ("GAE", "NCN")})
  monkeypatch.setattr(experiment, "K", 50)


def test_reports_draws_and_does_not_train_twice(short, tmp_path, monkeypatch, capsys):
  config = experiment.Config(seeds=2, epochs=8, workdir=tmp_path)
  experiment.main(config)
  folder = tmp_path / "geometric-2-8"
  result = json.loads((folder / "result.json").read_text())
  names = ["GAE", "NCN", "common neighbours", "Adamic-Adar", "resource allocation", "loss, NCN"]
  assert list(result["metrics"]) == names
  assert all(len(metric["values"]) == 2 for metric in result["metrics"].values())
  assert (folder / "figure.png").stat().st_size > 10_000
  # Nodes look alike, so the ends say little and the common neighbours nearly all.
  assert result["metrics"]["NCN"]["mean"] > result["metrics"]["GAE"]["mean"] + 40
  curve = train.read_metrics(tmp_path / "geometric" / "NCN-8" / "seed0")
  best = curve["eval_test"][1][np.argmax(curve["eval_validation"][1])]
  np.testing.assert_allclose(result["metrics"]["NCN"]["values"][0], 100 * best, rtol=1e-6)

  monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained again"))
  capsys.readouterr()
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["seeds", "epochs"])
def test_bad_settings(argument):
  with pytest.raises(ValueError, match=f"^{argument}: got 0"):
    experiment.main(experiment.Config(**{argument: 0}))


def test_citation_graphs_use_the_published_recipe():
  config = experiment.Config(dataset="citeseer")
  model, recipe = experiment.build(config, experiment.METHODS["NCNC"])
  assert recipe == ncn.RECIPES["citeseer"] and model == ncn.citeseer("incn1cn1")
  assert experiment.build(config, experiment.ABLATION["NCNC2"])[0].head.depth == 2
