"""LAGNN: official outputs, exact sizes, and what the generator, its selection and the consistency loss must satisfy."""

import functools

import golden_rule
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from jaxlab.graph import layers, node_classification, sparse, structure
from jaxlab.graph.nets import local_augmentation as la
from jaxlab.graph.nets.local_augmentation import cvae as cvae_module

KEY = jax.random.key(0)


def small_graph(nodes=12, features=6, seed=0):
  """A random graph with two real-valued feature matrices."""
  rng = np.random.default_rng(seed)
  s, r = np.nonzero(np.triu(rng.random((nodes, nodes)) < 0.3, 1))
  x = rng.random((2, nodes, features)).astype("float32")
  return structure.normalize(structure.from_edges(s, r, num_nodes=nodes, nodes=x[1], undirected=True)), x[:1]


# ---------------------------------------------------------------------------------------------------------- parity


def _golden(variables, given):
  graph = structure.from_edges(given["senders"], given["receivers"], num_nodes=9, nodes=given["real"])
  plain, graph = sparse.operator(graph), structure.normalize(graph)
  operator, generated = sparse.operator(graph), given["generated"][None]
  z, x = given["z"], given["x"]
  out = {}
  for name, continuous in (("cvae", False), ("cvae_ogb", True)):
    net = la.CVAE(7, 4, continuous=continuous)
    weights = variables[name]
    condition = given["condition"] if continuous else sparse.from_scipy(given["condition"])
    posterior = net.apply(weights, x, condition, z)
    out[f"{name}_mean"], out[f"{name}_log_variance"] = posterior.mean, posterior.log_variance
    out[f"{name}_decoded"] = net.apply(weights, z, condition, method=la.CVAE.decode)
    out[f"{name}_loss"] = la.negative_elbo(posterior, x, continuous=continuous)
    if continuous:
      decode = functools.partial(net.apply, method=la.CVAE.decode, mutable=["batch_stats"])
      out["cvae_ogb_decoded_by_batch"] = decode(weights, z, condition, train=True)[0]
    else:
      out["generated"] = la.row_normalize(out["cvae_decoded"])
  out["rownorm_raw"] = la.row_normalize(given["condition"])
  networks = {
    "gcn": (la.LAGCN(3, 5), operator),
    "gcnii": (la.LAGCNII(3, 4, depth=6), operator),
    "gat": (la.LAGAT(3, 3, heads=2), operator),
    "sage": (la.LAOGB(3, 5, convolution="sage"), plain),
    "ogb_gcn": (la.LAOGB(3, 5), operator),
  }
  for name, (net, op) in networks.items():
    out[name] = net.apply(variables[name], graph, generated, op)
  out["grand"] = la.GRANDMLP(3, 5, batch_norm=True).apply(variables["grand"], graph, given["real"])
  out["consistency"] = la.consistency_loss(jnp.stack([given[f"view{i}"] for i in range(4)]))
  out["propagation"] = la.random_propagation(operator, given["real"], 3, 0.3)
  return out


def test_golden():
  """CVAE of both forms, every network, the losses, and GRAND's propagation, as the official code computes them."""

  def convert(state):
    parts = {}
    for name, value in state.items():
      model, rest = name.split(".", 1)
      parts.setdefault(model, {})[rest] = value
    return {model: la.from_torch(part) for model, part in parts.items()}

  golden_rule.check("local_augmentation", convert, _golden, atol=1e-6, rtol=1e-5)
