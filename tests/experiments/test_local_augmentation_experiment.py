"""The experiment end to end on a few epochs: what it writes, and that a second run reports without training."""

import functools
import json

import pytest

from experiments import local_augmentation as experiment
from jaxlab import train
from jaxlab.data import synthetic


@pytest.fixture
def small(monkeypatch):
  citation = functools.partial(synthetic.citation, 300, 3, num_features=40, words_per_node=8, topic_share=0.6, val=60)
  monkeypatch.setattr(experiment.synthetic, "citation", functools.partial(citation, test=100))


def test_it_reports_draws_and_does_not_train_twice(small, tmp_path, monkeypatch, capsys):
  config = experiment.Config(
    seeds=2, epochs=150, passes=2, generator_passes=2, pool=2, methods=("LA-GCN", "GCN"), workdir=tmp_path
  )
  experiment.main(config)
  (folder,) = (path.parent for path in tmp_path.glob("*/result.json"))
  result = json.loads((folder / "result.json").read_text())
  assert list(result["metrics"]) == ["LA-GCN", "GCN"]
  assert all(len(metric["values"]) == 2 and metric["mean"] > 60 for metric in result["metrics"].values())
  assert (folder / "figure.png").stat().st_size > 10_000

  monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained again"))
  capsys.readouterr()
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


def test_each_ablation_takes_one_part_away():
  methods = experiment.methods("cora")
  ours, plain = methods["LA-GCN"], methods["GCN"]
  assert methods["noise"] == ours._replace(source="noise")
  assert methods["no consistency"].recipe == ours.recipe._replace(consistency=0.0)
  assert methods["dropout views"].recipe == plain.recipe._replace(samples=4, consistency=1.0)
  assert plain.hidden == 2 * ours.hidden and plain.recipe.concat == 0 and plain.recipe.samples == 1


def test_bad_settings_are_named():
  with pytest.raises(ValueError, match="^seeds: got 0"):
    experiment.main(experiment.Config(seeds=0))
  with pytest.raises(ValueError, match="^methods: got"):
    experiment.main(experiment.Config(methods=("GIN",)))
