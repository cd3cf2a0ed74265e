"""The studies end to end, small: what they write, and that a second run reports without computing."""

import functools
import json
import shutil

import numpy as np
import pytest

from experiments import spark_embedding as experiment
from jaxlab.data import synthetic

pytestmark = pytest.mark.xdist_group("spark")  # one JVM at a time


def metrics(folder):
  result = json.loads((folder / "result.json").read_text())
  assert (folder / "figure.png").stat().st_size > 10_000
  return {name: m["mean"] for name, m in result["metrics"].items()}


def test_quality_on_a_small_graph(tmp_path, monkeypatch, capsys):
  if shutil.which("java") is None:
    pytest.skip("Spark needs Java, and there is no `java` on the path")
  sizes = [40] * 6
  senders, receivers = synthetic.stochastic_blocks(sizes, 0.03 * np.ones((6, 6)) + 0.3 * np.eye(6))
  graph = np.stack([senders, receivers])[:, senders < receivers], np.repeat(np.arange(6), 40)
  monkeypatch.setattr(experiment, "load", lambda config: graph)
  quick = {
    "spark__driver__extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
    "spark__sql__codegen__wholeStage": False,
    "spark__sql__shuffle__partitions": 2,  # not 8: a task of so small a graph is mostly its start
  }
  monkeypatch.setattr(experiment.se, "session", functools.partial(experiment.se.session, **quick))
  config = experiment.Config(dim=40, parts=4, leaf_nodes=80, seeds=1, workdir=tmp_path)
  common = experiment.METHODS
  names = (experiment.WHOLE, experiment.PARTS, experiment.DISTNE, "DistNE, sum")
  monkeypatch.setattr(experiment, "CLOSERS", names[-1:])
  monkeypatch.setattr(experiment, "METHODS", {name: {"grow_steps": 2, "max_depth": 1} | common[name] for name in names})
  experiment.main(config)
  found = metrics(tmp_path / "digits-40-1")
  assert found["numbers in which Spark and reference differ"] == 0
  assert found["dot AUC, parts, no border"] < found["dot AUC, DistNE"] < found["dot AUC, whole graph"]
  assert found["accuracy, whole graph"] > 0.9
  monkeypatch.setattr(experiment, "quality", None)
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


def test_scaling_resumes(tmp_path, monkeypatch):
  calls = []

  def cost(config, count):
    calls.append(count)
    return dict.fromkeys((*experiment.COST, "distinct edges"), count / 10000.0)

  monkeypatch.setattr(experiment, "cost", cost)
  experiment.main(experiment.Config(scaling=True, edges=1_000_000, workdir=tmp_path))
  assert calls == [1_000_000] and not (tmp_path / "scaling/result.json").exists()
  experiment.main(experiment.Config(scaling=True, workdir=tmp_path))
  assert sorted(calls) == list(experiment.EDGES)
  found = metrics(tmp_path / "scaling")
  assert found["slope of log time against log edges, from 10^6"] == pytest.approx(1)


def test_judge_against_a_perfect_embedding():
  """Two cliques: a node's vector is its side."""
  side = np.arange(40) % 2
  pairs = np.stack(np.triu_indices(40, 1))
  same = side[pairs[0]] == side[pairs[1]]
  rng = np.random.default_rng(0)
  edges, others = rng.permutation(pairs[:, same], axis=1), rng.permutation(pairs[:, ~same], axis=1)
  split = experiment.evaluation.EdgeSplit(edges[:, 50:], edges[:, :0], edges[:, :50])
  scores = experiment.judge(np.eye(2)[side], split, others[:, :200], side, np.arange(40) < 10)
  assert scores == [1.0, 1.0, 1.0]


def test_bad_config():
  for changes in ({"seeds": 0}, {"parts": 1}, {"edges": -1}):
    with pytest.raises(ValueError, match=f"^{next(iter(changes))}: got"):
      experiment.main(experiment.Config(**changes))
