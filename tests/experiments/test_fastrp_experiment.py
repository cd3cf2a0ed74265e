import dataclasses
import json

import numpy as np
import pytest

from experiments import fastrp as experiment


def test_runs_end_to_end(tmp_path, capsys):
  config = experiment.Config(dim=32, fractions=(0.1, 0.5), shuffles=2, workdir=tmp_path)
  experiment.main(config)
  folder = tmp_path / "digits-32-2"
  result = json.loads((folder / "result.json").read_text())
  metrics = result["metrics"]
  few, many, chance = (
    metrics[name]["mean"]
    for name in ("FastRP, micro-F1 at 10 %", "FastRP, micro-F1 at 50 %", "most frequent labels, micro-F1 at 10 %")
  )
  assert chance < 0.2 < few < many <= 1
  assert f"{few:.3f}" in result["claim"] and f"{few - chance:+.3f} against most frequent labels" in result["claim"]
  assert {f"{name}, macro-F1 at 10 %" for name in experiment.METHODS} <= set(metrics)
  assert (folder / "figure.png").stat().st_size > 10_000
  capsys.readouterr()
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out
  with pytest.raises(ValueError, match="shuffles: got 0"):
    experiment.main(dataclasses.replace(config, shuffles=0))


def test_scaling_measures_each_size(tmp_path, monkeypatch):
  monkeypatch.setattr(experiment, "EDGES", (1000, 2000, 4000, 8000))
  monkeypatch.setattr(experiment, "DOUBLED", (60_000, 120_000))
  experiment.main(experiment.Config(scaling=True, workdir=tmp_path))
  result = json.loads((tmp_path / "scaling/result.json").read_text())
  metrics = result["metrics"]
  assert 0.9 < metrics["slope of log memory against log edges, from 10^5"]["mean"] < 1.1
  time = metrics["slope of log time against log edges, from 10^5"]["mean"]
  assert result["claim"].startswith(f"Time grows as edges^{time:.2f} and memory as edges^1.0")
  assert (tmp_path / "scaling/figure.png").stat().st_size > 10_000


def test_slope_of_a_power():
  x = np.array([1.0, 10.0, 100.0])
  assert experiment.slope(x, 3 * x**1.5) == pytest.approx(1.5)


def test_what_is_typed_stays_beside_a_preset():
  typed = experiment.parse(["--preset", "paper", "--shuffles", "3", "--dim", "128"])
  assert typed == dataclasses.replace(experiment.PRESETS["paper"], shuffles=3, dim=128)
  assert experiment.parse(["--preset=paper"]).dataset == "blogcatalog"
