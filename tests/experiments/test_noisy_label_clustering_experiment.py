"""The experiment end to end on one trial a target: what it writes, and that a second run reports without computing."""

import json

import pytest

from experiments import noisy_label_clustering as experiment


def test_reports_draws_and_does_not_run_twice(tmp_path, monkeypatch, capsys):
  config = experiment.Config(seeds=1, accuracies=(0.8,), workdir=tmp_path)
  experiment.main(config)
  folder = tmp_path / "sbm-demo-1"
  mean = {name: m["mean"] for name, m in json.loads((folder / "result.json").read_text())["metrics"].items()}
  ours = mean.pop("F1 of LFD, 0.8")
  assert ours > max(mean.values()) + 0.1  # the headline of the paper, on its random model
  assert (folder / "figure.png").stat().st_size > 10_000
  monkeypatch.setattr(experiment, "compare", None)
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


def test_bad_config():
  for config in (experiment.Config(seeds=0), experiment.Config(accuracies=(1.2,))):
    with pytest.raises(ValueError, match="^(seeds|accuracies): got"):
      experiment.main(config)
