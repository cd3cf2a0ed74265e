import jax
import numpy as np
from contract_case import Case, drawn

from jaxlab.graph import sparse, structure
from jaxlab.graph.nets import dagnn

NODES, FEATURES = 11, 5


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
  return structure.normalize(graph)


def relabel(graph, order):
  place = np.argsort(order)
  return structure.from_edges(
    place[graph.senders], place[graph.receivers], num_nodes=NODES, nodes=graph.nodes[order], edges=graph.edges,
    self_loops="keep",
  )  # fmt: skip


def model(**changes):
  return dagnn.DAGNN(**{"num_classes": 3, "hops": 4, "hidden": 8} | changes)


def apply(**changes):
  return lambda params, graph: model(**changes).apply({"params": params}, graph)


def init(graph, **changes):
  return lambda: jax.eval_shape(model(**changes).init, jax.random.key(0), graph)


GRAPH = inputs(0)
CASE = Case(
  function=apply(),
  params=drawn(model().init, GRAPH)["params"],
  inputs=inputs,
  narrow=apply(dtype="bfloat16"),
  pad=lambda graph: structure.pad(graph, nodes=16, edges=80),
  unpad=lambda logits: logits[:NODES],
  relabel=relabel,
  num_nodes=NODES,
  bad={
    "negative hops": (init(GRAPH, hops=-1), "hops"),
    "a fraction of a hop": (init(GRAPH, hops=2.5), "hops"),
    "no classes": (init(GRAPH, num_classes=0), "num_classes"),
    "no hidden units": (init(GRAPH, hidden=0), "hidden"),
    "dropout of one": (init(GRAPH, dropout=1.0), "dropout"),
    "no features": (init(GRAPH._replace(nodes=None)), "graph"),
    "features of one axis": (init(GRAPH._replace(nodes=GRAPH.nodes[:, 0])), "graph"),
    "no weights": (init(GRAPH._replace(edges=None)), "graph"),
    "operator of another graph": (
      lambda: model().init(jax.random.key(0), GRAPH, sparse.from_scipy(np.eye(3, dtype="float32"))),
      "operator",
    ),
  },
)
