"""The experiment end to end, small: what it writes, and that a second run reports without computing."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from experiments import local_interaction_basis as experiment

SMALL = {"seeds": 1, "modulus": 5, "features": 8, "share": 0.6, "steps": 20, "epochs": 1, "examples": 40}


def means(folder):
  return {n: m["mean"] for n, m in json.loads((folder / "result.json").read_text())["metrics"].items()}


def test_addition(tmp_path, monkeypatch, capsys):
  config = experiment.Config(**SMALL, workdir=tmp_path)
  experiment.main(config)
  folder = tmp_path / "modular_addition-mod5-trained-demo"
  found = means(folder)
  for name in experiment.LAYERS["modular_addition"]:
    for method in experiment.METHODS:
      assert 1 <= found[f"edges required from {name}, {method}"] <= 9 * 9
      assert 0 <= found[f"features required of {name}, {method}"] <= 9
  assert (folder / "figure.png").stat().st_size > 10_000
  monkeypatch.setattr(experiment, "explain", None)
  experiment.main(config)
  assert "Finished on" in capsys.readouterr().out


def test_crossing():
  """Mass between features of different halves, the constant's and that of equal halves left out."""
  into = np.eye(9)[:, [8, *range(8)]]  # the constant first
  basis = experiment.lib.Basis(into, into.T, np.ones(9))
  edges = np.zeros((9, 9))
  edges[0, 0], edges[1, 0], edges[1, 1], edges[5, 8], edges[1, 5] = 7, 7, 2, 1, 1
  graph = experiment.lib.Graph((basis,) * 6, (edges,) * 5)
  assert experiment.crossing(graph, 0) == pytest.approx(25)
  assert experiment.blocks(experiment.Config(examples=3), 0, None).x.shape == (3, 1, 9)


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_images(tmp_path, monkeypatch, network):
  """Folded networks give the logits of the flax ones."""
  config = experiment.Config(**SMALL, network=network, workdir=tmp_path)
  model = experiment.MLP(4) if network == "mlp" else experiment.CNN()
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 1), "float32"))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype("float32"), shapes)
  monkeypatch.setattr(experiment.train, "fit", lambda *_, **__: types.SimpleNamespace(**variables))
  problem = experiment.sees(config, 0, tmp_path)
  positions = 1 if network == "mlp" else 64
  assert problem.x.shape[:2] == (40, positions) and (problem.x[..., -1] == 1).all() and problem.labels.shape == (40,)
  narrow = jax.tree.map(lambda a: a.astype("float32"), problem.network)
  outputs = jax.jit(experiment.lib.run)(narrow, problem.held)
  logits = jax.jit(model.apply)(variables, problem.held[..., :-1].reshape(-1, 8, 8, 1))
  np.testing.assert_allclose(outputs[:, 0], logits, rtol=1e-4, atol=1e-3)


def test_frequencies():
  """Embeddings that are waves are found out."""
  modulus = 7
  i, j = np.divmod(np.arange(modulus**2), modulus)
  x = np.stack([np.cos(2 * np.pi * 2 * i / modulus), np.sin(2 * np.pi * 3 * (i + j) / modulus), np.ones(49)], 1)
  basis = experiment.lib.Basis(np.eye(3), np.eye(3), np.ones(3))
  problem = experiment.Problem((), x, x, i, x[:, None])
  tags = experiment.frequencies(problem, experiment.lib.Graph((basis,), ()), modulus)
  assert list(tags[0][:2]) == [2, 3]


def test_presets_are_defaults():
  paper = experiment.PRESETS["paper"]
  assert experiment.parse(["--preset", "paper"]) == experiment.parse(["--preset=paper"]) == paper
  assert (paper.modulus, paper.features, paper.share, paper.learning_rate) == (113, 128, 0.3, 0.001)
  assert (paper.steps, paper.seeds, paper.threshold) == (60_000, 5, 1e-15)
  assert experiment.parse([]) == experiment.parse(["--preset", "demo"]) == experiment.PRESETS["demo"]
  given = experiment.parse(["--preset", "paper", "--features", "16", "--threshold", "1e-5"])
  assert given == dataclasses.replace(paper, features=16, threshold=1e-5)
  blocks = experiment.parse(["--network=blocks", "--preset=paper", "--seeds=2"])
  assert (blocks.network, blocks.seeds, blocks.threshold) == ("blocks", 2, 1e-15)
  official = experiment.parse(["--weights", "official", "--threshold", "1e-5"])
  assert (official.modulus, official.features, official.share, official.threshold) == (113, 128, 0.3, 1e-5)
  assert experiment.parse(["--weights", "official"]).threshold == 1e-15


def test_bad_config():
  for change, name in (
    ({"seeds": 0}, "seeds"),
    ({"weights": "official", "seeds": 6}, "seeds"),
    ({"weights": "official", "network": "mlp"}, "weights"),
    ({"weights": "official", "features": 128}, "modulus"),
    ({"weights": "official", **experiment.OFFICIAL, "share": 0.5}, "share"),
    ({"drawn": 0}, "drawn"),
  ):
    with pytest.raises(ValueError, match=f"^{name}: got"):
      experiment.main(experiment.Config(**change))
