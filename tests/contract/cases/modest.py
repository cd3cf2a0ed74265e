import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from contract_case import Case

from jaxlab import train
from jaxlab.decentral import gossip, modest, partition, simulator

CLIENTS, FEATURES, CLASSES = 4, 6, 3
TRACE = modest.simulate(modest.Protocol(2, 1), CLIENTS, 3)
DATA = partition.clients(
  {"image": np.zeros((8, FEATURES), "float32"), "label": np.zeros(8, "int32")}, list(np.arange(8).reshape(CLIENTS, 2))
)
WEIGHTS = modest.plan(TRACE, DATA).weights[0]


class Net(nn.Module):
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, *, train=False):
    hidden = nn.relu(nn.Dense(5, dtype=self.dtype)(x))
    return nn.Dense(CLASSES, dtype=self.dtype)(hidden)


def inputs(seed):
  """Data of the trainers, and which average each received."""
  rng = np.random.default_rng(seed)
  image = rng.standard_normal((2, 8, FEATURES)).astype("float32")
  return {"image": image, "label": rng.integers(0, CLASSES, (2, 8)), "source": np.array([seed % 2, 1 - seed % 2])}


def round_of(dtype="float32"):
  """A round as a function of two averages: trainers take one each, a gradient step, the next average's outputs."""
  net = Net(dtype)

  def loss(params, image, label):
    logits = net.apply({"params": params}, image).astype(jnp.float32)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], 1))

  def run(params, given):
    models = jax.tree.map(lambda leaf: leaf[given["source"]], params)
    gradient = jax.vmap(jax.grad(loss))(models, given["image"], given["label"])
    models = jax.tree.map(lambda p, g: p - 0.1 * g, models, gradient)
    average = jax.tree.map(lambda leaf: leaf[0], gossip.mix(WEIGHTS, models))
    return net.apply({"params": average}, given["image"][0])

  return run


def params():
  keys = jax.random.split(jax.random.key(0), 2)
  return jax.vmap(lambda key: Net().init(key, jnp.zeros((1, FEATURES)))["params"])(keys)


def run_simulation(protocol=None, nodes=4, rounds=2, **changes):
  return lambda: modest.simulate(modest.Protocol(2, 1) if protocol is None else protocol, nodes, rounds, **changes)


EMA = train.supervised(Net(), train.cross_entropy(), optax.sgd(0.1), ema_decay=0.9)
CASE = Case(
  function=round_of(),
  params=params(),
  inputs=inputs,
  narrow=round_of("bfloat16"),
  bad={
    "an empty sample": (lambda: modest.Protocol(0), "sample_size"),
    "more aggregators than the sample": (lambda: modest.Protocol(2, 3), "num_aggregators"),
    "success fraction of zero": (lambda: modest.Protocol(2, success_fraction=0.0), "success_fraction"),
    "negative time to train": (lambda: modest.Protocol(2, train_time=-1.0), "train_time"),
    "no time to wait": (lambda: modest.Protocol(2, timeout=0.0), "timeout"),
    "more models than a sample has": (lambda: modest.Protocol(2, timeout=1.0, least=3), "least"),
    "a join of a node that is there": (
      run_simulation(events=[modest.Event(1, "leave", 0), *[modest.Event(2, "join", 0)] * 2]), "events",
    ),
    "ratings of unknown users": (
      lambda: modest.Factorization(3, 2, 1).init(jax.random.key(0), jnp.array([[3, 0]])), "pairs",
    ),
    "fewer nodes than a sample": (run_simulation(modest.Protocol(5)), "nodes"),
    "no rounds": (run_simulation(rounds=0), "rounds"),
    "latencies of other nodes": (run_simulation(latency=np.ones((3, 3))), "latency"),
    "an event of nobody": (run_simulation(events=[modest.Event(1, "crash", 9)]), "events"),
    "an unknown event": (run_simulation(events=[modest.Event(1, "sleep", 0)]), "events"),
    "a trace of nothing": (lambda: modest.plan(modest.Trace([], [], [], [], [], [], {}), DATA), "trace"),
    "data of fewer clients": (lambda: modest.plan(TRACE, simulator.chosen(DATA, np.array([0]))), "clients"),
    "a learner with a moving average": (
      lambda: jax.eval_shape(modest.learner(EMA, simulator.Work()).init, jax.random.key(0), modest.plan(TRACE, DATA)),
      "local",
    ),
  },
)  # fmt: skip
