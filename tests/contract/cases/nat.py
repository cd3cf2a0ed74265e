import jax
import jax.numpy as jnp
import numpy as np
from contract_case import Case, drawn

from jaxlab.data.temporal import Batches
from jaxlab.graph.links import nat

NODES, BATCHES, ROWS, FEATURES = 8, 3, 4, 3


def inputs(seed):
  """A short stream with features."""
  rng = np.random.default_rng(seed)
  senders, receivers, negatives = rng.integers(1, NODES + 1, (3, BATCHES, ROWS)).astype("int32")
  edges = np.arange(1, BATCHES * ROWS + 1, dtype="int32").reshape(BATCHES, ROWS)
  times = np.sort(rng.uniform(1, 5, edges.size)).reshape(edges.shape).astype("float32")
  node, edge = (rng.standard_normal((n + 1, FEATURES)).astype("float32") for n in (NODES, edges.size))
  node[0] = edge[0] = 0
  return {"tables": nat.Tables(node, edge), "batches": Batches(senders, receivers, negatives, edges, times)}


def relabel(given, order):
  place = np.concatenate([[0], np.argsort(order) + 1]).astype("int32")
  batches = given["batches"]
  ids = {name: place[getattr(batches, name)] for name in ("senders", "receivers", "negatives")}
  node = np.concatenate([given["tables"].node[:1], given["tables"].node[1:][order]])
  return {"tables": given["tables"]._replace(node=node), "batches": batches._replace(**ids)}


def pad(given):
  """Two rows more in each batch."""
  return given | {"batches": Batches(*(np.pad(a, ((0, 0), (0, 2))) for a in given["batches"]))}


def model(**changes):
  # More slots than ids and a hash seed of M - 1 keep keys from colliding, so that ids do not matter.
  slots = (NODES + 1, NODES + 1)
  return nat.NAT(**{"slots": slots, "self_dim": 6, "time_dim": 2, "position_dim": 3, "replace_prob": 1.0} | changes)


def apply(**changes):
  """Logits of a stream from its beginning, each batch on the memory that the ones before it wrote."""

  def run(params, given):
    net = model(**changes)
    memory = nat.reset(net, NODES, hash_seed=NODES)
    return nat.stream(net, params, memory, given["tables"], given["batches"], jax.random.key(0))[1]

  return run


def init(given=None, **changes):
  given = GIVEN if given is None else given
  net = model(**changes)
  memory, first = nat.reset(model(), NODES), jax.tree.map(lambda a: a[0], given["batches"])
  return lambda: jax.eval_shape(net.init, jax.random.key(0), memory, given["tables"], first)["params"]


GIVEN = inputs(0)
first = jax.tree.map(lambda a: a[0], GIVEN["batches"])
CASE = Case(
  function=apply(),
  params=drawn(model().init, nat.reset(model(), NODES), GIVEN["tables"], first)["params"],
  inputs=inputs,
  narrow=apply(dtype="bfloat16"),
  pad=pad,
  unpad=lambda logits: logits[:, :, :ROWS],
  relabel=relabel,
  num_nodes=NODES,
  reorder=lambda logits, order: logits,
  bad={
    "three hops": (init(slots=(4, 4, 4)), "slots"),
    "no slots": (init(slots=(0,)), "slots"),
    "no heads": (init(num_heads=0), "num_heads"),
    "dropout of one": (init(dropout=1.0), "dropout"),
    "probability above one": (init(replace_prob=1.5), "replace_prob"),
    "unknown aggregation": (init(aggregation="max"), "aggregation"),
    "memory of another model": (init(slots=(3,)), "memory"),
    "memory of another width": (init(self_dim=5), "memory"),
    "features of other nodes": (init(GIVEN | {"tables": nat.Tables(np.zeros((3, 1)), np.zeros((3, 1)))}), "tables"),
    "ids that are not integers": (
      init(GIVEN | {"batches": Batches(*(jnp.asarray(a, "float32") for a in GIVEN["batches"]))}),
      "events",
    ),
    "several batches at once": (
      init(GIVEN | {"batches": Batches(*(a[None] for a in GIVEN["batches"]))}),
      "events",
    ),
    "no nodes": (lambda: nat.reset(model(), 0), "num_nodes"),
    "no patience": (lambda: nat.learner(model(), None, patience=0), "patience"),
  },
)
