"""The experiment end to end: the official protocol with its bars, and a small network of fans."""

import json

import numpy as np
import pytest

from experiments import minhash_communities as experiment
from jaxlab.data import files, networks


def means(folder):
  return {name: m["mean"] for name, m in json.loads((folder / "result.json").read_text())["metrics"].items()}


def test_recall_on_the_mails(tmp_path, monkeypatch, capsys):
  try:
    networks.email_eu_core_directed()
  except files.MissingFile:
    pytest.skip("no file of email-Eu-core")
  config = experiment.Config(workdir=tmp_path)
  experiment.main(config)
  area = {name: value for name, value in means(tmp_path / "email-demo").items() if name.startswith("area")}
  averages, grown, *others, random = (area[f"area under recall, {name}"] for name in experiment.METHODS)
  assert min(averages, grown) >= 0.24 and min(averages, grown) > 8 * random and min(averages, grown) > max(others)
  assert (tmp_path / "email-demo/figure.png").stat().st_size > 10_000
  monkeypatch.setattr(experiment, "email", None)
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


def test_cost_and_error_on_fans(tmp_path):
  config = experiment.Config(dataset="fans", accounts=2000, edges=40_000, queries=30, workdir=tmp_path)
  experiment.main(config)
  found = means(tmp_path / "fans-demo")
  assert found["edges"] > 30_000 and found["signatures (MB)"] == 2000 * 400 / 1e6
  assert abs(found["mean error of J"]) < 0.002 and 0.9 < found["rmse of J over theory"] < 1.1
  assert 0 < found["query, median (ms)"] <= found["query, 99th percentile (ms)"] < 250
  assert found["area under recall, minrank"] > 8 * found["area under recall, random order"]


def test_recall_against_a_loop():
  members, seeds = np.array([1, 3, 5, 7, 9, 11, 13]), np.array([3, 9])
  x, y = experiment.recall(
    np.array([5, 0, 3, 7]), seeds, members, 2
  )  # the candidates ended after four; a seed is no hit
  assert x.tolist() == [0, 0.5, 1] and y.tolist() == [0, 1 / 5, 2 / 5]


def test_bad_config():
  for changes in ({"seeds": 0}, {"accounts": 10}, {"queries": 0}):
    with pytest.raises(ValueError, match=f"^{next(iter(changes))}: got"):
      experiment.main(experiment.Config(**changes))
