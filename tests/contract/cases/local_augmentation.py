import jax
import jax.numpy as jnp
import numpy as np
from contract_case import Case, drawn

from jaxlab.graph import sparse, structure
from jaxlab.graph.nets import local_augmentation as la

NODES, FEATURES = 11, 5


def inputs(seed):
  """A ring with chords, its real features, and two matrices of generated ones."""
  rng = np.random.default_rng(seed)
  ring, shift = np.arange(NODES), 2 + seed % 4
  x = rng.standard_normal((3, NODES, FEATURES)).astype("float32")
  graph = structure.from_edges(
    np.concatenate([ring, ring]),
    np.concatenate([(ring + 1) % NODES, (ring + shift) % NODES]),
    num_nodes=NODES,
    nodes=x[2],
    undirected=True,
  )
  return structure.normalize(graph), x[:2]


def pad(given):
  graph, generated = given
  return structure.pad(graph, nodes=16, edges=80), np.pad(generated, ((0, 0), (0, 5), (0, 0)), constant_values=3.0)


def relabel(given, order):
  graph, generated = given
  place = np.argsort(order)
  graph = structure.from_edges(
    place[graph.senders], place[graph.receivers], num_nodes=NODES, nodes=graph.nodes[order], edges=graph.edges,
    self_loops="keep",
  )  # fmt: skip
  return graph, generated[:, order]


def model(**changes):
  return la.LAGCN(**{"num_classes": 3, "hidden": 8} | changes)


def apply(**changes):
  return lambda params, given: model(**changes).apply({"params": params}, *given)


def init(graph, generated, operator=None, **changes):
  return lambda: jax.eval_shape(model(**changes).init, jax.random.key(0), graph, generated, operator)


def cvae(call, **changes):
  net = la.CVAE(**{"features": FEATURES, "latent": 2, "hidden": 4} | changes)
  return lambda: jax.eval_shape(lambda *args: net.init(jax.random.key(0), *args), *map(jnp.zeros, call))


GRAPH, GENERATED = inputs(0)
CASE = Case(
  function=apply(),
  params=drawn(model().init, GRAPH, GENERATED)["params"],
  inputs=inputs,
  narrow=apply(dtype="bfloat16"),
  pad=pad,
  unpad=lambda logits: logits[:NODES],
  relabel=relabel,
  num_nodes=NODES,
  bad={
    "dropout of one": (init(GRAPH, GENERATED, dropout=1.0), "dropout"),
    "no features": (init(GRAPH._replace(nodes=None), GENERATED), "graph"),
    "no weights": (init(GRAPH._replace(edges=None), GENERATED), "graph"),
    "generated of one axis less": (init(GRAPH, GENERATED[0]), "generated"),
    "generated of other nodes": (init(GRAPH, GENERATED[:, 1:]), "generated"),
    "operator of another graph": (
      init(GRAPH, GENERATED, sparse.from_scipy(np.eye(3, dtype="float32"))),
      "operator",
    ),
    "condition of other width": (cvae([(4, FEATURES), (4, 3), (4, 2)]), "condition"),
    "noise of other width": (cvae([(4, FEATURES), (4, FEATURES), (4, 3)]), "noise"),
    "no latent": (cvae([(4, FEATURES), (4, FEATURES), (4, 0)], latent=0), "features, latent, hidden"),
    "scout for continuous features": (lambda: la.selection(la.CVAE(3, continuous=True), 2), "passes"),
    "temperature of zero": (lambda: la.consistency_loss(jnp.zeros((2, 3, 4)), 0.0), "temperature"),
    "unknown convolution": (
      lambda: jax.eval_shape(la.LAOGB(3, convolution="gin").init, jax.random.key(0), GRAPH, GENERATED),
      "convolution",
    ),
    "concat without draw": (lambda: la.augmented(model(), None), "concat"),
    "negative hops": (lambda: la.random_propagation(sparse.operator(GRAPH), GRAPH.nodes, -1, 0.5), "hops, rate"),
    "weights of another model": (lambda: la.from_torch({"head.weight": np.zeros(3)}), "state_dict"),
  },
)
