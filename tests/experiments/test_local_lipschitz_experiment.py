"""The experiment end to end, small: what it writes, and that a second run reports without computing."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import local_lipschitz as experiment


def test_bounds_around_digits(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(experiment, "KINDS", ("mlp",))
  monkeypatch.setattr(experiment, "TABULAR", ("lip_crown",))
  monkeypatch.setattr(experiment, "NETS", 1)
  monkeypatch.setattr(experiment, "BOXES", 2)
  monkeypatch.setattr(experiment, "CHUNK", 500)
  config = experiment.Config(width=5, seeds=1, epochs=5, images=2, radii=(0.001, 0.1), timeout=0.5, workdir=tmp_path)
  config = dataclasses.replace(config, points=500, soundness_points=2000)
  experiment.main(config)
  folder = tmp_path / "digits-mlp-5-demo"
  mean = {name: m["mean"] for name, m in json.loads((folder / "result.json").read_text())["metrics"].items()}
  for radius in ("0.001", "0.1"):
    order = [mean[f"{name}, radius {radius}"] for name in reversed((*experiment.METHODS, experiment.SAMPLED))]
    assert order[0] > 0 and (np.diff(order) >= -1e-9).all() and order[-1] <= mean[experiment.GLOBAL]
  assert mean["points in boxes of random networks"] == 2000
  assert mean["outputs whose gradient norm was above a bound"] == mean["bounds looser than RecurJac's"] == 0
  assert mean["below the largest gradient at random points"] == mean["branch and bound, steps upwards"] == 0
  shares = [mean[f"monotone in a feature (%), {m}"] for m in ("lip_crown", "none contradicted on a grid")]
  assert 0 <= shares[0] <= shares[1] <= 100
  assert (folder / "figure.png").stat().st_size > 10_000
  monkeypatch.setattr(experiment, "measure", None)
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


def test_leaders():
  """Labels are those of the nearest leader, so that one nearest neighbour predicts them far better than chance."""
  sets = experiment.leaders(1000)
  train, test = sets["train"], sets["test"]
  assert len(train["label"]) == 700 and len(test["label"]) == 300
  nearest = ((test["image"][:, None] - train["image"]) ** 2).sum(2).argmin(1)
  assert (train["label"][nearest] == test["label"]).mean() > 0.25
  assert train["image"].min() >= 0 and train["image"].max() <= 1


def test_presets_are_defaults():
  paper = experiment.PRESETS["paper"]
  assert experiment.parse(["--preset", "paper"]) == experiment.parse(["--preset=paper"]) == paper
  assert (paper.dataset, paper.width, paper.epochs, paper.images, paper.timeout) == ("mnist5k", 20, 10, 50, 60.0)
  given = experiment.parse(["--preset", "paper", "--width", "40", "--images", "2", "--model", "cnn"])
  assert given == dataclasses.replace(paper, width=40, images=2, model="cnn")
  assert experiment.parse([]) == experiment.parse(["--preset", "demo"]) == experiment.PRESETS["demo"]


def test_bad_config():
  more = {"images": 101}  # for each of three networks, of 300 digits
  for change in (more, {"seeds": 0}, {"images": 0}, {"radii": ()}, {"model": "cnn", "dataset": "leaders"}):
    with pytest.raises(ValueError, match=f"^{next(iter(change))}: got"):
      experiment.main(experiment.Config(**change))
