import jax
import jax.numpy as jnp
import numpy as np
import optax
from contract_case import Case

from jaxlab.decentral import disrupted_p2p as dp
from jaxlab.decentral import gossip, partition, simulator

PEERS, FEATURES, CLASSES = 6, 5, 3


def inputs(seed):
  """A ring with chords, who is alive, and data of every peer."""
  rng = np.random.default_rng(seed)
  adjacency = gossip.neighbours(PEERS, [-1, 1, 2 + seed % 2, -(2 + seed % 2)]) & ~np.eye(PEERS, dtype=bool)
  image = rng.standard_normal((PEERS, 8, FEATURES)).astype("float32")
  label, count = rng.integers(0, CLASSES, (PEERS, 8)), rng.integers(0, 9, PEERS)
  return {
    "adjacency": adjacency,
    "alive": np.arange(PEERS) != seed % PEERS,
    "image": image,
    "label": label,
    "count": count,
  }


def relabel(given, order):
  return {k: v[order][:, order] if k == "adjacency" else v[order] for k, v in given.items()}


def round_of(dtype="float32"):
  """A round as a function of all peers' weights: the neighbourhood average, a gradient step, the outputs."""
  net = dp.MLP(CLASSES, (4,), dtype=dtype)

  def loss(params, image, label):
    logits = net.apply({"params": params}, image).astype(jnp.float32)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], 1))

  def run(params, given):
    # Every peer's weights come from one set, scaled, so that relabelling peers relabels outputs.
    scale = 1 + 0.1 * given["image"][:, 0, 0]
    models = jax.tree.map(lambda p: p[None] * scale.reshape(-1, *(1,) * p.ndim), params)
    models = gossip.mix(dp.neighbourhood(given["adjacency"], given["alive"], given["count"]), models)
    gradient = jax.vmap(jax.grad(loss))(models, given["image"], given["label"])
    models = jax.tree.map(lambda p, g: p - 0.1 * g, models, gradient)
    return jax.vmap(lambda p, x: net.apply({"params": p}, x))(models, given["image"])

  return run


CLIENTS = partition.clients(
  {"image": np.zeros((12, FEATURES), "float32"), "label": np.arange(12) % CLASSES}, list(np.arange(12).reshape(6, 2))
)
GRAPH, NOBODY, LABELS = dp.star(PEERS), np.zeros(PEERS, bool), np.arange(12) % CLASSES
LOCAL = simulator.classifier(dp.MLP(CLASSES, (4,)), optax.sgd(0.1))


def start(adjacency=GRAPH, removed=NOBODY):
  learner = dp.learner(LOCAL, simulator.Work())
  return lambda: jax.eval_shape(learner.init, jax.random.key(0), dp.World(CLIENTS, adjacency, removed, np.int32(0)))


CASE = Case(
  function=round_of(),
  params=dp.MLP(CLASSES, (4,)).init(jax.random.key(0), jnp.zeros((1, FEATURES)))["params"],
  inputs=inputs,
  narrow=round_of("bfloat16"),
  relabel=relabel,
  num_nodes=PEERS,
  bad={
    "graph of other peers": (start(adjacency=dp.star(3)), "adjacency"),
    "removed of other peers": (start(removed=NOBODY[:2]), "removed"),
    "unknown weights": (lambda: dp.learner(LOCAL, simulator.Work(), weights="size"), "weights"),
    "no edges of newcomers": (lambda: dp.barabasi_albert(5, 0, seed=0), "m"),
    "fewer peers than edges": (lambda: dp.barabasi_albert(2, 2, seed=0), "n"),
    "no probability": (lambda: dp.erdos_renyi(5, 1.5, seed=0), "p"),
    "blocks of no probability": (lambda: dp.block_model([2, 2], 2.0, 0.0, seed=0), "inside, between"),
    "star of nobody": (lambda: dp.star(0), "n"),
    "unknown selection": (lambda: dp.choose_removed(GRAPH, 0.2, "pagerank", seed=0), "by"),
    "more than all removed": (lambda: dp.choose_removed(GRAPH, 1.2, seed=0), "share"),
    "unknown scenario": (lambda: dp.scenario(LABELS, NOBODY, "C", seed=0), "kind"),
    "nobody holds data": (lambda: dp.scenario(LABELS, ~NOBODY, "B", seed=0), "holders"),
    "nobody survives": (lambda: dp.structure(GRAPH, ~NOBODY), "removed"),
  },
)  # fmt: skip
