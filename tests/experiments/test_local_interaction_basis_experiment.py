"""The experiment end to end, small: what it writes, and that a second run reports without computing."""

import json

import jax
import numpy as np
import pytest

from experiments import local_interaction_basis as experiment

SMALL = {"seeds": 1, "modulus": 5, "features": 8, "share": 0.6, "steps": 20, "epochs": 1, "examples": 40}


@pytest.fixture(autouse=True, scope="module")
def quick_compiler():
  """Programs here run for microseconds, so all the time is the compiler's."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


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


def test_blocks(tmp_path):
  experiment.main(experiment.Config(**SMALL | {"examples": 3000}, network="blocks", workdir=tmp_path))
  found = means(tmp_path / "blocks-toy-demo")
  assert found["edges between blocks (%), layer 1, LIB"] < 5 < found["edges between blocks (%), layer 1, PCA"]


def test_images(tmp_path):
  """Folded networks give the logits of the flax ones, so what they score is an accuracy."""
  config = experiment.Config(**SMALL | {"epochs": 2}, network="cnn", workdir=tmp_path)
  problem = experiment.sees(config, 0, tmp_path)
  assert problem.x.shape == (40, 64, 2) and (problem.x[..., -1] == 1).all() and problem.labels.shape == (40,)
  outputs = experiment.lib.run(jax.tree.map(lambda a: a.astype("float32"), problem.network), problem.held)
  assert outputs.shape == (40, 1, 10)
  assert experiment.lib.accuracy(outputs, problem.labels) > 0.3


def test_frequencies():
  """Embeddings that are waves are found out."""
  modulus = 7
  i, j = np.divmod(np.arange(modulus**2), modulus)
  x = np.stack([np.cos(2 * np.pi * 2 * i / modulus), np.sin(2 * np.pi * 3 * (i + j) / modulus), np.ones(49)], 1)
  basis = experiment.lib.Basis(np.eye(3), np.eye(3), np.ones(3))
  problem = experiment.Problem((), x, x, i, x[:, None])
  tags = experiment.frequencies(problem, experiment.lib.Graph((basis,), ()), modulus)
  assert list(tags[0][:2]) == [2, 3]


def test_bad_config():
  for change, name in (
    ({"seeds": 0}, "seeds"),
    ({"weights": "official", "seeds": 6}, "seeds"),
    ({"weights": "official", "network": "mlp"}, "weights"),
    ({"drawn": 0}, "drawn"),
  ):
    with pytest.raises(ValueError, match=f"^{name}: got"):
      experiment.main(experiment.Config(**change))
