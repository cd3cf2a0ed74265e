import jax
import jax.numpy as jnp
import numpy as np
from contract_case import Case, drawn

from jaxlab.graph import structure, tokens
from jaxlab.graph.nets import graph_mamba

NODES, FEATURES = 11, 4


def build(seed, order=None, nodes=12, edges=46, members=160, token_edges=360):
  """A ring with chords, numbered by `order`, its tokens and distinct scores, all padded."""
  order = np.arange(NODES) if order is None else order
  place, rng = np.argsort(order), np.random.default_rng(seed)
  ring, shift = np.arange(NODES), 2 + seed % 4
  features = rng.standard_normal((NODES, FEATURES)).astype("float32")
  scores = rng.permutation(NODES).astype("float32")
  graph = structure.from_edges(
    place[np.concatenate([ring, ring])],
    place[np.concatenate([(ring + 1) % NODES, (ring + shift) % NODES])],
    num_nodes=NODES,
    nodes=features[order],
    undirected=True,
  )
  drawn = tokens.sample(graph, length=2, walks=2, seed=seed, keys=order)
  joined = tokens.batch(
    [drawn], graph_edges=[len(graph.senders)], nodes=nodes, members=members, edges=token_edges
  )  # fmt: skip
  padded = structure.pad(graph, nodes=nodes, edges=edges, graphs=2)
  return padded, tokens.subgraphs(joined), jnp.pad(scores[order], (0, nodes - NODES))


def model(**changes):
  return graph_mamba.GraphMamba(**{"num_outputs": 3, "features": 8, "state_size": 2} | changes)


INPUTS = build(0)
VARIABLES = drawn(model().init, *INPUTS[:2])


def apply(**changes):
  def function(params, inputs):
    graph, sub, scores = inputs
    variables = {"params": params, "batch_stats": VARIABLES["batch_stats"]}
    return model(**changes).apply(variables, graph, sub, scores=scores)[:NODES]

  return function


def init(graph=INPUTS[0], sub=INPUTS[1], **changes):
  return lambda: jax.eval_shape(model(**changes).init, jax.random.key(0), graph, sub)


CASE = Case(
  function=apply(),
  params=VARIABLES["params"],
  inputs=build,
  narrow=apply(dtype="bfloat16"),
  pad=lambda inputs: build(0, nodes=20, edges=70, members=200, token_edges=400),
  unpad=lambda outputs: outputs,
  relabel=lambda inputs, order: build(0, order),
  num_nodes=NODES,
  bad={
    "no features": (init(INPUTS[0]._replace(nodes=None)), "graph"),
    "no outputs": (init(num_outputs=0), "num_outputs"),
    "no layers": (init(num_layers=0), "num_layers"),
    "unknown task": (init(task="edge"), "task"),
    "unknown encoder": (init(local="gcn"), "local"),
    "unknown message passing": (init(mpnn="gcn"), "mpnn"),
    "dropout of one": (init(dropout=1.0), "dropout"),
    "more eigenvectors than features": (init(eigenvectors=FEATURES + 1), "eigenvectors"),
    "edge features without edges": (init(INPUTS[0]._replace(edges=None), edge_features=True), "graph"),
    "tokens for another encoder": (init(local="walks"), "tokens"),
    "tokens of another graph": (init(build(0, nodes=14, edges=50)[0]), "tokens"),
  },
)
