"""Gram matrices of Jacobians, edges and ablated outputs of a small network with a convolution, as its weights move."""

import jax
import jax.numpy as jnp
import numpy as np
from contract_case import Case

from jaxlab.analysis import local_interaction_basis as lib

WIDTH = 3


def draw():
  """Weights as flax names them."""
  rng = np.random.default_rng(1)
  layer = lambda *shape: {
    "kernel": jnp.asarray(rng.standard_normal(shape) / np.prod(shape[:-1]) ** 0.5, "float32"),
    "bias": jnp.asarray(rng.standard_normal(shape[-1]), "float32"),
  }
  return {"Conv_0": layer(2, 2, 1, 2), "Dense_0": layer(8, WIDTH)}


def network(params):
  return (
    lib.conv(**params["Conv_0"], shape=(3, 3), padding="VALID"),
    lib.readout(**params["Dense_0"], positions=4),
  )


def inputs(seed):
  x = np.random.default_rng(seed).standard_normal((4, 9, 1)).astype("float32")
  return np.concatenate([x, np.ones_like(x)], -1)


def basis(size, seed):
  into = np.random.default_rng(seed).standard_normal((size, size)).astype("float32")
  return lib.Basis(into, np.linalg.inv(into), np.arange(size, 0, -1).astype("float32"))


BASES = basis(2, 0), basis(3, 1), basis(WIDTH, 2)


def function(params, x):
  net = network(params)
  middle = net[0](x)
  gram = lib.jacobian_gram(net[1], middle, BASES[2].into)
  edges = lib.edge_weights(net[0], x, BASES[0][:2], BASES[1].into, batch_size=3)
  ablated = lib.run(net[1:], lib.keep_features(middle, BASES[1], 2))
  return gram, edges, ablated


def narrow(params, x):
  found = function(*jax.tree.map(lambda a: jnp.asarray(a, "bfloat16"), (params, x)))
  return jax.tree.map(lambda a: a.astype("bfloat16"), found)


PARAMS, X = draw(), inputs(0)
NET = jax.jit(network)(PARAMS)
EDGES = (np.ones((3, 2)), np.ones((WIDTH, 3)))
GRAPH = lib.Graph(BASES, EDGES)
MASK = np.ones((3, 2), bool)


def graph(net=NET, x=X, **options):
  return lambda: lib.interaction_graph(net, x, **options)


def gram(x=X, to=BASES[1].into, **options):
  return lambda: lib.jacobian_gram(NET[0], x, to, **options)


def required(layer=0, found=GRAPH, **options):
  return lambda: lib.edges_required(NET, found, layer, X, lambda outputs: 1.0, **options)


def dense(kernel=(3, 2), bias=(2,), **options):
  return lambda: lib.dense(np.ones(kernel, "float32"), np.ones(bias, "float32"), **options)


def conv(padding, kernel=(2, 2, 1, 2)):
  return lambda: lib.conv(np.ones(kernel, "float32"), np.ones(2, "float32"), (3, 3), padding=padding)


def heads(name, bias):
  layers = {n: {"kernel": np.ones((4, 2, 2)), "bias": np.ones((2, 2))} for n in ("query", "key", "value")}
  layers["out"] = {"kernel": np.ones((2, 2, 4)), "bias": np.ones(4)}
  layers[name]["bias"] = np.ones(bias)
  return lambda: lib.attention(**layers)


def logits(tokens, **changes):
  return lambda: lib.ModularAddition(5, 8, **changes).init(jax.random.key(0), tokens)


CASE = Case(
  function=function,
  params=PARAMS,
  inputs=inputs,
  narrow=narrow,
  tolerance=1e-4,
  bad={
    "unknown method": (graph(method="ica"), "method"),
    "negative threshold": (graph(threshold=-1.0), "threshold"),
    "no sections": (graph(net=()), "network"),
    "activations without positions": (graph(x=X[:, 0]), "x"),
    "activations without a constant": (graph(x=2 * X), "x"),
    "outputs without a constant to rotate": (graph(rotate_output=True), "rotate_output"),
    "unknown rule": (graph(integration="simpson"), "integration"),
    "intervals of a gradient": (graph(intervals=2), "intervals"),
    "sources without a key": (graph(feature_sources=2), "key"),
    "no sources": (gram(position_sources=0, key=jax.random.key(0)), "position_sources"),
    "no batch": (gram(batch_size=0), "batch_size"),
    "activations of integers": (gram(x=X.astype(int)), "x"),
    "whole numbers to ablate edges of": (lambda: lib.edges_required(NET, GRAPH, 0, X.astype(int), float), "x"),
    "whole numbers to ablate features of": (lambda: lib.keep_features(X.astype(int), BASES[0], 1), "x"),
    "whole numbers to compute by edges": (
      lambda: lib.keep_edges(NET[0], X.astype(int), BASES[0], BASES[1], MASK),
      "x",
    ),
    "a negative number of features": (lambda: lib.feature_curve(NET, GRAPH, 0, X, float, [-1]), "counts"),
    "labels as a column": (lambda: lib.accuracy(np.ones((3, 1, 2)), np.ones((3, 1), int)), "labels"),
    "activations of another width": (graph(x=np.ones((4, 9, 5), "float32")), "x"),
    "activations of another width to ablate": (
      lambda: lib.feature_curve(NET, GRAPH, 0, np.ones((4, 9, 5), "float32"), float, [1]),
      "x",
    ),
    "a formula whose gradients vanish": (graph(method="(1-alpha)^2"), "integration"),
    "gradients that vanish": (
      lambda: lib.gradient_gram(NET[0], X, BASES[1].into, formula="(1-alpha)^2", integration="gradient"),
      "integration",
    ),
    "sources for principal components": (graph(method="pca", position_sources=2), "position_sources"),
    "sources for an older formula": (graph(method="(1-0)*alpha", feature_sources=2), "feature_sources"),
    "activations of another section": (gram(x=np.ones((2, 9, 5), "float32")), "x"),
    "a basis of another layer": (gram(to=BASES[0].into), "to"),
    "unknown formula": (lambda: lib.gradient_gram(NET[0], X, BASES[1].into, formula="alpha"), "formula"),
    "another layer's own basis": (lambda: lib.edge_weights(NET[0], X, BASES[1][:2], BASES[1].into), "basis"),
    "a mask the wrong way": (lambda: lib.keep_edges(NET[0], X, BASES[0], BASES[1], MASK.T), "mask"),
    "a negative number of edges": (lambda: lib.strongest(EDGES[0], -1), "count"),
    "edges that are a list": (lambda: lib.strongest(EDGES[0][0], 1), "edges"),
    "a schedule for no features": (lambda: lib.schedule(0), "width"),
    "a base below 1": (lambda: lib.schedule(20, base=0.5), "base"),
    "a layer too many": (required(layer=2), "layer"),
    "negative tolerance": (required(tolerance=-0.1), "tolerance"),
    "bases of another network": (required(found=lib.Graph(BASES[:2], EDGES)), "graph"),
    "a bias of another layer": (dense(bias=(3,)), "kernel"),
    "unknown activation": (dense(activation="swish"), "activation"),
    "a window off the image": (conv(((2, 2), (2, 2))), "padding"),
    "a kernel of two axes": (conv("SAME", kernel=(1, 2)), "kernel"),
    "positions that do not divide": (lambda: lib.readout(np.ones((8, 3)), np.ones(3), 3), "positions"),
    "a bias without heads": (heads("key", (4,)), "key"),
    "a bias with heads": (heads("out", (2, 4)), "out"),
    "tokens of floats": (logits(np.ones((2, 3))), "tokens"),
    "heads that do not divide": (logits(np.ones((2, 3), int), num_heads=3), "num_heads"),
    "weights that are missing": (lambda: lib.from_torch({}), "state_dict"),
    "a share above 1": (lambda: lib.pairs(5, train=1.5), "train"),
  },
)
