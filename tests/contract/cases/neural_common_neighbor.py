"""NCNC with a learned prior, the variant that uses every part."""

from typing import NamedTuple

import jax
import jraph
import numpy as np
from contract_case import Case, drawn

from jaxlab.graph import common_neighbors, sparse, structure
from jaxlab.graph.links import neural_common_neighbor as ncn

NODES, FEATURES, PAIRS = 11, 5, 9
EDGE = np.array([[0], [1]])


class Inputs(NamedTuple):
  graph: jraph.GraphsTuple
  pairs: common_neighbors.Pairs


def model(**changes):
  """Probabilities well inside (0, 1), where bfloat16 and float32 agree."""
  both = {"features": 8, "learn_prior": True, "offset": 0.0, "scale": 1.0}
  return ncn.cora("incn1cn1", **both | changes)


def made(graph, ends, nodes=NODES):
  adjacency = common_neighbors.adjacency(np.stack([graph.senders, graph.receivers]), nodes)
  return common_neighbors.pairs(adjacency, ends, depth=1, at_least=SIZES)


def inputs(seed):
  """A ring with chords: as many edges for each seed, at other places."""
  rng = np.random.default_rng(seed)
  ring, shift = np.arange(NODES), 2 + seed % 4
  graph = structure.from_edges(
    np.concatenate([ring, ring]),
    np.concatenate([(ring + 1) % NODES, (ring + shift) % NODES]),
    num_nodes=NODES,
    nodes=rng.standard_normal((NODES, FEATURES)).astype("float32"),
    undirected=True,
  )
  return Inputs(graph, made(graph, rng.integers(0, NODES, (2, PAIRS))))


def relabel(given, order):
  place = np.argsort(order)
  graph = structure.from_edges(
    place[given.graph.senders], place[given.graph.receivers], num_nodes=NODES, nodes=given.graph.nodes[order]
  )
  return Inputs(graph, made(graph, place[np.stack([given.pairs.left, given.pairs.right])[:, :PAIRS]]))


def pad(given):
  ends = np.stack([given.pairs.left, given.pairs.right])[:, :PAIRS]
  larger = common_neighbors.pairs(
    common_neighbors.adjacency(np.stack([given.graph.senders, given.graph.receivers]), 16), ends, depth=1,
    at_least=common_neighbors.Sizes(32, 32, 64, 256, inner=common_neighbors.Sizes(128, 128, 128)),
  )  # fmt: skip
  return Inputs(structure.pad(given.graph, nodes=16, edges=80), larger)


def apply(**changes):
  return lambda params, given: model(**changes).apply({"params": params}, given.graph, given.pairs)[:PAIRS]


def init(graph, pairs, **changes):
  return lambda: jax.eval_shape(model(**changes).init, jax.random.key(0), graph, pairs)


SIZES = common_neighbors.Sizes(16, 16, 32, 80, inner=common_neighbors.Sizes(64, 64, 128))
GRAPH, SETS = inputs(0)
CASE = Case(
  function=apply(),
  # Of the first draws the one whose scores differ most from link to link.
  params=drawn(model().init, GRAPH, SETS, seed=3)["params"],
  inputs=inputs,
  narrow=apply(dtype="bfloat16"),
  pad=pad,
  unpad=lambda logits: logits,
  relabel=relabel,
  reorder=lambda logits, order: logits,  # the pairs keep their places
  num_nodes=NODES,
  bad={
    "no features": (init(GRAPH._replace(nodes=None), SETS), "graph"),
    "features for a table": (init(GRAPH, SETS, num_embeddings=4), "graph"),
    "unknown convolution": (init(GRAPH, SETS, conv="gat"), "conv"),
    "unknown variant": (init(GRAPH, SETS, head={"variant": "cn3"}), "variant"),
    "dropout of one": (init(GRAPH, SETS, head={"dropout": 1.0}), "dropout"),
    "pairs without candidates": (init(GRAPH, SETS.replace(inner=None)), "pairs"),
    "pairs of another graph": (
      init(GRAPH, common_neighbors.pairs(common_neighbors.adjacency(EDGE, 3), EDGE, depth=1)),
      "pairs",
    ),
    "operator of another graph": (
      lambda: model().init(jax.random.key(0), GRAPH, SETS, sparse.from_scipy(np.eye(3, dtype="float32"))),
      "operator",
    ),
    "an attribute of neither part": (lambda: ncn.cora(width=8), "changes"),
  },
)  # fmt: skip
