import jax
import numpy as np
from contract_case import Case, drawn

from jaxlab.graph import sparse, structure
from jaxlab.graph.nets import sir_gcn

NODES, FEATURES = 11, 5


def inputs(seed):
  """A ring with chords: as many edges for each seed, at other places; features on nodes and edges."""
  rng = np.random.default_rng(seed)
  ring, shift = np.arange(NODES), 2 + seed % 4
  return structure.from_edges(
    np.concatenate([ring, ring]),
    np.concatenate([(ring + 1) % NODES, (ring + shift) % NODES]),
    num_nodes=NODES,
    nodes=rng.standard_normal((NODES, FEATURES)).astype("float32"),
    edges=rng.standard_normal((2 * NODES, 2)).astype("float32"),
  )


def relabel(graph, order):
  place = np.argsort(order)
  return structure.from_edges(
    place[graph.senders], place[graph.receivers], num_nodes=NODES, nodes=graph.nodes[order], edges=graph.edges
  )


class Both:
  """The two networks one after the other, so that every aggregation but one and all layers are seen."""

  def __init__(self, **changes):
    options = {"hidden": 6, "depth": 1} | changes
    self.first = sir_gcn.wikics(**{"num_outputs": 4, "use_edges": True} | options)
    self.second = sir_gcn.minesweeper(**{"num_outputs": 3, "aggregation": "max"} | options)

  def init(self, key, graph):
    first = self.first.init(key, graph)
    return first, self.second.init(key, graph._replace(nodes=self.first.apply(first, graph)))

  def apply(self, variables, graph):
    x = self.first.apply(variables[0], graph)
    return self.second.apply(variables[1], graph._replace(nodes=x))


GRAPH = inputs(0)
VARIABLES = drawn(Both().init, GRAPH)
STATISTICS = [variables["batch_stats"] for variables in VARIABLES]


def apply(**changes):
  def function(params, graph):
    variables = [{"params": params[name], "batch_stats": s} for name, s in zip(params, STATISTICS, strict=True)]
    return Both(**changes).apply(variables, graph)

  return function


def init(graph, builder=sir_gcn.minesweeper, **changes):
  return lambda: jax.eval_shape(builder(**{"hidden": 4} | changes).init, jax.random.key(0), graph)


CASE = Case(
  function=apply(),
  params={"first": VARIABLES[0]["params"], "second": VARIABLES[1]["params"]},
  inputs=inputs,
  narrow=apply(dtype="bfloat16"),
  pad=lambda graph: structure.pad(graph, nodes=16, edges=30),
  unpad=lambda outputs: outputs[:NODES],
  relabel=relabel,
  num_nodes=NODES,
  bad={
    "unknown aggregation": (init(GRAPH, aggregation="median"), "aggregation"),
    "unknown norm": (init(GRAPH, norm="cn"), "norm"),
    "no layers": (init(GRAPH, depth=0), "depth"),
    "dropout of one": (init(GRAPH, message_dropout=1.0), "message_dropout"),
    "no width": (init(GRAPH, hidden=0), "hidden"),
    "no features": (init(GRAPH._replace(nodes=None)), "graph"),
    "features for a table": (init(GRAPH, sir_gcn.zinc), "graph"),
    "no edge features": (init(GRAPH._replace(edges=None), sir_gcn.wikics, use_edges=True), "edges"),
    "unknown pool": (init(GRAPH, sir_gcn.wikics, pool="max"), "pool"),
    "unknown residual": (init(GRAPH, sir_gcn.wikics, residual="none"), "residual"),
    "operator of another graph": (
      lambda: sir_gcn.minesweeper().init(jax.random.key(0), GRAPH, sparse.from_scipy(np.eye(3, dtype="float32"))),
      "graph",
    ),
  },
)
