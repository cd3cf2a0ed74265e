"""The SAGE link predictor on the messages that it re-weights itself, and ATC."""

from typing import NamedTuple

import jax
import jraph
import numpy as np
import scipy.sparse
from contract_case import Case, drawn

from jaxlab.graph import sparse, structure
from jaxlab.graph.links import topological_concentration as tc

NODES, FEATURES, PAIRS = 11, 5, 9


class Inputs(NamedTuple):
  graph: jraph.GraphsTuple
  pairs: np.ndarray


def model(**changes):
  return tc.cora(**{"conv": "sage", "features": 8} | changes)


def made(senders, receivers, nodes):
  return structure.normalize(structure.from_edges(senders, receivers, num_nodes=NODES, nodes=nodes), "row")


def inputs(seed):
  """A ring with chords: as many edges for each seed, at other places."""
  rng = np.random.default_rng(seed)
  ring, shift = np.arange(NODES), 2 + seed % 4
  one, other = np.concatenate([ring, ring]), np.concatenate([ring + 1, ring + shift]) % NODES
  nodes = rng.standard_normal((NODES, FEATURES)).astype("float32")
  graph = made(np.concatenate([one, other]), np.concatenate([other, one]), nodes)
  return Inputs(graph, rng.integers(0, NODES, (2, PAIRS)).astype("int32"))


def relabel(given, order):
  place, graph = np.argsort(order), given.graph
  loop = graph.senders == graph.receivers
  moved = made(place[graph.senders[~loop]], place[graph.receivers[~loop]], graph.nodes[order])
  return Inputs(moved, place[given.pairs].astype("int32"))


def apply(**changes):
  def function(params, given):
    net, variables = model(**changes), {"params": params}
    base = sparse.operator(given.graph)
    weights = tc.reweight(net, variables, given.graph, base, alpha=0.5)
    return net.apply(variables, given.graph, given.pairs, base.replace_values(weights))

  return function


def init(graph, pairs, **changes):
  return lambda: jax.eval_shape(model(**changes).init, jax.random.key(0), graph, pairs)


def exact(**changes):
  given = {"graph": RING, "targets": None} | changes
  return lambda: tc.concentration(given.pop("graph"), given.pop("targets"), **given)


def again(**changes):
  return lambda: tc.reweight(model(), {"params": PARAMS}, GRAPH, sparse.operator(GRAPH), **{"alpha": 1.0} | changes)


def learner(**changes):
  return lambda: tc.learner(model(), **{"steps_per_epoch": 1} | changes)


GRAPH, ENDS = inputs(0)
PARAMS = drawn(model().init, GRAPH, ENDS)["params"]
RING = scipy.sparse.csr_array(np.roll(np.eye(5, dtype="float32"), 1, 1) + np.roll(np.eye(5, dtype="float32"), -1, 1))
RING_ON_DEVICE = sparse.from_scipy(RING)
TRUTH = np.eye(3, dtype=bool)
CASE = Case(
  function=apply(),
  params=PARAMS,
  inputs=inputs,
  narrow=apply(dtype="bfloat16"),
  pad=lambda given: given._replace(graph=structure.pad(given.graph, nodes=16, edges=80)),
  unpad=lambda logits: logits,
  relabel=relabel,
  reorder=lambda logits, order: logits,  # the pairs keep their places
  num_nodes=NODES,
  bad={
    "no features": (init(GRAPH._replace(nodes=None), ENDS), "graph"),
    "features for a table": (init(GRAPH, ENDS, num_embeddings=4), "graph"),
    "no message weights": (init(GRAPH._replace(edges=None), ENDS), "graph"),
    "unknown convolution": (init(GRAPH, ENDS, conv="gat"), "conv"),
    "no layer": (init(GRAPH, ENDS, num_layers=0), "num_layers"),
    "dropout of one": (init(GRAPH, ENDS, dropout=1.0), "dropout"),
    "normalised GCN": (init(GRAPH, ENDS, conv="gcn", normalize=True), "normalize"),
    "pairs on end": (init(GRAPH, ENDS.T), "pairs"),
    "operator of another graph": (
      lambda: model().init(jax.random.key(0), GRAPH, ENDS, RING_ON_DEVICE), "operator",
    ),
    "unknown receiver": (again(receiver="both"), "receiver"),
    "negative alpha": (again(alpha=-1.0), "alpha"),
    "unknown context": (again(context="gin"), "conv"),
    "weights of another graph": (again(weights=RING_ON_DEVICE.values), "weights"),
    "dense graph": (exact(graph=RING.toarray()), "graph"),
    "loops": (exact(graph=RING + scipy.sparse.eye_array(5, format="csr")), "graph"),
    "targets of other nodes": (exact(targets=RING[:4, :4].tocsr()), "targets"),
    "depth of zero": (exact(depth=0), "depth"),
    "decay of zero": (exact(decay=0.0), "decay"),
    "block of zero": (exact(block=0), "block"),
    "no node with both": (lambda: tc.shift(RING, scipy.sparse.csr_array((5, 5))), "targets"),
    "no width": (lambda: tc.approximate(RING_ON_DEVICE, jax.random.key(0), width=0), "width"),
    "unknown similarity": (lambda: tc.approximate(RING_ON_DEVICE, jax.random.key(0), similarity="l2"), "similarity"),
    "overlap of another graph": (
      lambda: tc.weighted_concentration(RING_ON_DEVICE, RING_ON_DEVICE.values, np.ones(3, "float32")), "overlap",
    ),
    "no steps": (learner(steps_per_epoch=0), "steps_per_epoch"),
    "no clip": (learner(clip=0.0), "clip"),
    "negative interval": (learner(reweighting=tc.Reweighting(1.0, -1)), "reweighting"),
    "truth of other nodes": (lambda: tc.node_metrics(np.ones((3, 4), "float32"), TRUTH), "truth"),
    "cutoffs beyond the graph": (lambda: tc.node_metrics(np.ones((3, 3), "float32"), TRUTH, ks=(4,)), "ks"),
  },
)  # fmt: skip
