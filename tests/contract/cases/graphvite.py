import jax
import numpy as np
from contract_case import Case

from jaxlab.graph.embedding import graphvite
from jaxlab.graph.embedding.graphvite import device, partition

ROWS, DIM, SAMPLES = 6, 4, 8
EDGES = np.array([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]])
GRAPH = graphvite.graph(EDGES, 5)
PARTS = partition.zigzag(GRAPH.degree, 1)


def inputs(seed):
  """Pairs that name every row, negatives, and the rates of two micro-batches."""
  rng = np.random.default_rng(seed)
  pairs = np.stack([rng.permutation(SAMPLES) % ROWS for _ in range(2)], axis=1)
  return pairs.astype("int32"), rng.integers(0, ROWS, (SAMPLES, 2)).astype("int32"), np.array([0.1, 0.05], "float32")


def run(params, given):
  state, loss = device.train_samples(device.State(**params), *given)
  return {"vertex": state.vertex, "context": state.context, "loss": loss}


def run_narrow(params, given):
  narrow = run(jax.tree.map(lambda x: x.astype("bfloat16"), params), given)
  return narrow | {"loss": narrow["loss"].astype("bfloat16")}


def samples(position=None, value=None, **changes):
  given = [np.ones((ROWS, DIM)), np.ones((ROWS, DIM)), *inputs(0)[:2]]
  if position is not None:
    given[position] = value
  return lambda: graphvite.train_samples(*given, 0.1, **changes)


def on_device(state=None, **changes):
  given = dict(zip(("pairs", "negatives", "rates"), inputs(0), strict=True)) | changes
  return lambda: device.train_samples(state or device.State(**PARAMS), *given.values())


def embed(edges=EDGES, num_nodes=5, dim=4, sampling=None, **changes):
  training = {k: changes.pop(k) for k in list(changes) if k in graphvite.Training.__dataclass_fields__}
  return lambda: graphvite.embed(
    edges,
    num_nodes,
    dim,
    jax.random.key(0),
    graphvite.Sampling(**(sampling or {})),
    graphvite.Training(**{"epochs": 2} | training),
    **changes,
  )


PARAMS = {
  name: 0.5 * jax.random.normal(jax.random.key(i), (ROWS, DIM), "float32")
  for i, name in enumerate(("vertex", "context"))
}
MESH = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("workers",))
CASE = Case(
  function=run,
  params=PARAMS,
  inputs=inputs,
  narrow=run_narrow,
  bad={
    "edges of one axis": (embed(edges=np.arange(4)), "edges"),
    "no edges": (embed(edges=np.zeros((2, 0), int)), "edges"),
    "edges that are no integers": (embed(edges=EDGES * 0.5), "edges"),
    "a node too many": (embed(num_nodes=4), "edges"),
    "no nodes": (embed(num_nodes=0), "num_nodes"),
    "no columns": (embed(dim=0), "dim"),
    "weights of other edges": (embed(weights=np.ones(4)), "weights"),
    "weights of zero": (embed(weights=np.zeros(5)), "weights"),
    "unknown backend": (embed(backend="gpu"), "backend"),
    "a mesh on the host": (embed(backend="host", mesh=MESH), "mesh"),
    "a mesh of other workers": (embed(mesh=MESH, num_workers=2), "mesh"),
    "no threads": (embed(threads=0), "threads"),
    "no epochs": (embed(epochs=0), "epochs"),
    "rate below zero": (embed(learning_rate=-1.0), "learning_rate"),
    "weight that is no number": (embed(negative_weight=float("nan")), "negative_weight"),
    "growth for decay": (embed(weight_decay=-0.1), "weight_decay"),
    "no negatives": (embed(num_negatives=0), "num_negatives"),
    "an empty batch": (embed(batch_size=0), "batch_size"),
    "parts that workers do not divide": (embed(num_parts=3, num_workers=2), "num_parts"),
    "more parts than nodes": (embed(num_parts=6, num_workers=1), "num_parts"),
    "a pool that the shuffle does not divide": (
      embed(block_samples=5, num_parts=1, sampling={"augmentation_step": 2}),
      "block_samples",
    ),
    "no step": (embed(sampling={"augmentation_step": 0}), "augmentation_step"),
    "steps beyond the walk": (embed(sampling={"augmentation_step": 9, "walk_length": 8}), "augmentation_step"),
    "a walk of no steps": (embed(sampling={"walk_length": 0}), "walk_length"),
    "no shuffle base": (embed(sampling={"shuffle_base": 0}), "shuffle_base"),
    "return parameter of zero": (embed(sampling={"p": 0.0}), "p"),
    "infinite in-out parameter": (embed(sampling={"q": float("inf")}), "q"),
    "no walks": (lambda: graphvite.walks(GRAPH, 0, 0), "count"),
    "schedule of no workers": (lambda: partition.schedule(4, 0), "num_workers"),
    "degrees of two axes": (lambda: partition.zigzag(np.ones((2, 2)), 1), "degree"),
    "samples: another dim": (samples(1, np.ones((ROWS, DIM + 1))), "context"),
    "samples: other dtypes": (samples(1, np.ones((ROWS, DIM), "float32")), "context"),
    "samples: integers": (samples(0, np.ones((ROWS, DIM), int)), "vertex"),
    "samples: no pairs": (samples(2, np.zeros((0, 2), int)), "pairs"),
    "samples: a row too many": (samples(2, np.full((SAMPLES, 2), ROWS)), "pairs"),
    "samples: negatives of others": (samples(3, np.zeros((2, 1), int)), "negatives"),
    "samples: a negative too many": (samples(3, np.full((SAMPLES, 1), ROWS)), "negatives"),
    "device: integers": (on_device(device.State(np.ones((3, 2), int), np.ones((3, 2)))), "vertex"),
    "device: another dim": (on_device(device.State(np.ones((3, 2)), np.ones((3, 4)))), "context"),
    "device: triples": (on_device(pairs=np.zeros((SAMPLES, 3), int)), "pairs"),
    "device: negatives of others": (on_device(negatives=np.zeros((2, 1), int)), "negatives"),
    "device: uneven micro-batches": (on_device(rates=np.ones(3)), "rates"),
  },
)
