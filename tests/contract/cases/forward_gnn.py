import jax
import jax.numpy as jnp
import numpy as np
from contract_case import Case

from jaxlab.graph import structure
from jaxlab.graph.nets import forward_gnn as fg

NODES, FEATURES, CLASSES = 11, 5, 3


def inputs(seed):
  """A ring with chords: as many edges for each seed, at other places; labels of some nodes, virtual features."""
  rng = np.random.default_rng(seed)
  ring, shift = np.arange(NODES), 2 + seed % 4
  graph = structure.from_edges(
    np.concatenate([ring, ring]),
    np.concatenate([(ring + 1) % NODES, (ring + shift) % NODES]),
    num_nodes=NODES,
    nodes=rng.standard_normal((NODES, FEATURES)).astype("float32"),
    undirected=True,
  )
  links = np.eye(CLASSES, dtype="float32")[ring % CLASSES] * (ring < 8)[:, None]
  return {"graph": graph, "links": links, "virtual": rng.standard_normal((CLASSES, FEATURES)).astype("float32")}


def relabel(given, order):
  place, graph = np.argsort(order), given["graph"]
  graph = structure.from_edges(
    place[graph.senders], place[graph.receivers], num_nodes=NODES, nodes=graph.nodes[order]
  )  # fmt: skip
  return given | {"graph": graph, "links": given["links"][order]}


def pad(given):
  graph = structure.pad(given["graph"], nodes=16, edges=80)
  return given | {"graph": graph, "links": np.pad(given["links"], ((0, 5), (0, 0)))}


def net(**changes):
  return fg.Net(**{"num_classes": CLASSES, "hidden": 8, "depth": 2} | changes)


def apply(**changes):
  """SF's logits of every layer [N, C, depth]; gradients flow through the whole stack."""

  def run(params, given):
    stack = fg.stack(given["graph"].nodes, given["virtual"])
    streams = fg.Streams(fg.bordered(given["graph"], given["links"]), [fg.normalize(stack)])
    return jnp.stack([fg.class_logits(z, CLASSES) for z in fg.outputs(net(**changes), params, streams)], axis=-1)

  return run


def task(labels=None, splits=None, senders=None):
  graph = inputs(0)["graph"]
  ring = np.arange(NODES)
  labels = ring % CLASSES if labels is None else labels
  splits = [(ring < 6, (ring >= 6) & (ring < 8), ring >= 8)] if splits is None else splits
  senders = graph.senders if senders is None else senders
  return fg.node_task(graph.nodes, senders, graph.receivers, labels, splits)


def params():
  method = fg.single_forward(net())
  state = method.learner.init(jax.random.key(0), task())
  return jax.tree.map(lambda leaf: leaf[0], state.run.params)


def start(method, batch=None):
  return lambda: jax.eval_shape(method.learner.init, jax.random.key(0), task() if batch is None else batch)


def few_classes():
  fg.single_forward(net(num_classes=2)).learner.init(jax.random.key(0), task())


GIVEN = inputs(0)
ring = np.arange(NODES)
around = np.concatenate([ring, (ring + 1) % NODES]), np.concatenate([(ring + 1) % NODES, ring])
links = fg.link_task(GIVEN["graph"].nodes, *around, [0])
CASE = Case(
  function=apply(),
  params=params(),
  inputs=inputs,
  narrow=apply(dtype="bfloat16"),
  pad=pad,
  unpad=lambda logits: logits[:NODES],
  relabel=relabel,
  num_nodes=NODES,
  bad={
    "no layers": (lambda: net(depth=0), "depth"),
    "no width": (lambda: net(hidden=0), "hidden"),
    "one class": (lambda: net(num_classes=1), "num_classes"),
    "unknown convolution": (lambda: net(kind="gin"), "kind"),
    "width that heads do not share": (lambda: net(kind="gat", heads=3), "hidden"),
    "no class count for nodes": (lambda: fg.single_forward(net(num_classes=None)), "num_classes"),
    "class count for links": (start(fg.link_forward(net()), links), "num_classes"),
    "links for a node classifier": (start(fg.single_forward(net()), links), "num_classes"),
    "more classes than the network has": (few_classes, "num_classes"),
    "no temperature": (lambda: fg.single_forward(net(), temperature=0.0), "temperature"),
    "unknown loss": (lambda: fg.link_forward(net(num_classes=None), loss="mse"), "loss"),
    "no sweeps": (lambda: fg.top_to_input(net(), sweeps=0), "sweeps"),
    "all sweeps skipped": (lambda: fg.top_to_input(net(), skip=10), "skip"),
    "no patience": (lambda: fg.backprop(net(), fg.Recipe(patience=0)), "patience"),
    "no validation": (lambda: fg.backprop(net(), fg.Recipe(epochs=1)), "epochs"),
    "negative L2": (lambda: fg.backprop(net(), fg.Recipe(l2=-1.0)), "l2"),
    "no clipping norm": (lambda: fg.top_to_loss(net(), clip=0.0), "clip"),
    "no split": (lambda: task(splits=[]), "splits"),
    "an empty mask": (lambda: task(splits=[(np.zeros(NODES, bool),) * 3]), "splits"),
    "training nodes without labels": (lambda: task(labels=np.full(NODES, -1)), "splits"),
    "edges to nodes that are not there": (lambda: task(senders=GIVEN["graph"].senders + NODES), "senders"),
    "no seed for links": (lambda: fg.link_task(GIVEN["graph"].nodes, [0], [1], []), "seeds"),
    "weights of no layer": (lambda: fg.from_torch({"lin.weight": np.ones((2, 2))}), "state_dict"),
    "links of other nodes": (
      lambda: fg.bordered(GIVEN["graph"], np.ones((3, CLASSES), "float32")),
      "links",
    ),
  },
)  # fmt: skip
