"""The official results for the network that adds modulo 113, from its official weights."""

import functools
import os
import pathlib

import golden_rule
import jax
import numpy as np
import pytest

from jaxlab import interop
from jaxlab.analysis import local_interaction_basis as lib

CHECKPOINT = pathlib.Path(os.environ.get("JAXLAB_DATA", "")) / "rib" / "seed0.npz"


@pytest.mark.skipif(not CHECKPOINT.is_file(), reason="the official checkpoint is not in JAXLAB_DATA/rib")
def test_stored_results_of_modular_addition():
  """Of seed 0, behind attention: Lambda, edges, node ablations, and accuracy where the official bisection ended."""
  stored = dict(np.load(golden_rule.GOLDEN / "local_interaction_basis_modular_addition.npz"))
  params = lib.from_torch(interop.load(CHECKPOINT))["params"]
  train, test = lib.pairs(113)
  assert len(train["label"]) == 3830

  @jax.jit
  def middle(params, tokens):
    network = lib.modular_addition(params)
    return network[1:], network[0](lib.embed(params, tokens))

  with jax.enable_x64(True):
    params = jax.tree.map(lambda a: np.asarray(a, "float64"), params)
    network, x = middle(params, train["tokens"])
  _, held = middle(params, test["tokens"])
  graph = lib.interaction_graph(network, x, batch_size=16)
  for i, name in enumerate(("ln2.0", "unembed")):
    np.testing.assert_allclose(graph.bases[i].importance[:20], stored[f"Lambda.{name}"][:20], rtol=1e-6)
    assert graph.edges[i].sum() == pytest.approx(stored[f"sum.{name}"], rel=1e-6)
    np.testing.assert_allclose(graph.edges[i][:20, :20], stored[f"edges.{name}"], rtol=2e-5, atol=1e-5)
  score = functools.partial(lib.accuracy, labels=test["label"])
  for i, name in enumerate(("ln2.0", "unembed")):
    expected = dict(zip(stored[f"kept.{name}"], stored[f"accuracy.{name}"], strict=True))
    counts = [5, 6, 7, 10, 15]
    found = lib.feature_curve(network, graph, i, held, score, counts)
    np.testing.assert_allclose([found[k] for k in counts], [expected[k] for k in counts], atol=1e-3)
  narrow = [jax.tree.map(lambda a: np.asarray(a, "float32"), section) for section in network]
  before_logits, without = lib.activations(narrow[:1], held)[-1], {}
  for count in (632, 633):
    mask = lib.strongest(graph.edges[1], count)
    without[count] = score(lib.keep_edges(narrow[1], before_logits, *graph.bases[1:], mask))
  # 0.001 below 0.99955 is between them.
  assert without == pytest.approx({632: 0.99821, 633: 0.99877}, abs=1e-5)
