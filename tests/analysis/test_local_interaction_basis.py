"""The official outputs, and the properties of bases and edges, against oracles in plain NumPy."""

import golden_rule
import jax
import numpy as np

from jaxlab.analysis import local_interaction_basis as lib

# ------------------------------------------------------------------------------------------------------ golden outputs

RUNS = {
  "transformer.lib": {},
  "transformer.pca": {"method": "pca"},
  "transformer.integrated": {"integration": "gauss_legendre", "intervals": 2},
  "transformer.trapezoid": {"integration": "trapezoid", "intervals": 2},
  "transformer.older": {"method": "(1-0)*alpha", "integration": "gauss_legendre", "intervals": 2},
  "transformer.oldest": {"method": "(1-alpha)^2", "integration": "trapezoid", "intervals": 2},
  "relu.lib": {},
  "gelu.lib": {},
  "relu.uncentered": {"center": False, "rotate_output": True},
}


perceptron = jax.jit(lib.mlp, static_argnums=1)


def test_golden():
  """A transformer and perceptrons by every formula: bases up to signs, edges, logits."""

  def convert(state):
    layers = [{"kernel": state.pop(f"layers.{i}.W"), "bias": state.pop(f"layers.{i}.b")} for i in range(3)]
    return lib.from_torch(state), layers

  def apply(weights, inputs):
    variables, layers = weights
    tokens = lib.pairs(7, train=1)[0]["tokens"]
    tokens = tokens[np.lexsort((tokens[:, 1], tokens[:, 0]))][::2]
    x = jax.jit(lib.embed)(wide(variables["params"]), tokens)
    logits = jax.jit(lib.ModularAddition(7, 10, 2, 14, "float64", "float64").apply)(variables, tokens)
    out = {"transformer.logits": logits[:, None]}
    features = np.append(inputs["x"], np.ones((40, 1)), 1)[:, None]
    networks = {
      "transformer": (jax.jit(lib.modular_addition)(wide(variables["params"])), x),
      "relu": (perceptron(wide(layers)), features),
      "gelu": (perceptron(wide(layers), "gelu"), features),
    }
    for name, options in RUNS.items():
      graph = lib.interaction_graph(*networks[name.split(".")[0]], threshold=1e-8, batch_size=10, **options)
      for i, (basis, edges) in enumerate(zip(graph.bases, graph.edges, strict=False)):
        out |= {f"{name}.into{i}": abs(basis.into), f"{name}.back{i}": abs(basis.back), f"{name}.edges{i}": edges}
    return out

  with jax.enable_x64(True):
    golden_rule.check("local_interaction_basis", convert, apply, atol=2e-5, rtol=2e-5)


def wide(tree):
  return jax.tree.map(lambda a: np.asarray(a, "float64"), tree)
