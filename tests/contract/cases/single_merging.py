import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from contract_case import Case

from jaxlab.decentral import gossip, partition
from jaxlab.decentral import single_merging as sm

CLIENTS, FEATURES, CLASSES = 4, 6, 3


class Net(nn.Module):
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, *, train=False):
    hidden = nn.relu(nn.Dense(5, dtype=self.dtype)(x))
    return nn.Dense(CLASSES, dtype=self.dtype)(hidden)


def inputs(seed):
  """Data of every client, and the randomness of the round."""
  rng = np.random.default_rng(seed)
  image = rng.standard_normal((CLIENTS, 8, FEATURES)).astype("float32")
  return {"image": image, "label": rng.integers(0, CLASSES, (CLIENTS, 8)), "key": jax.random.key(seed)}


def round_of(dtype="float32"):
  """One round as a function of all clients' weights: a plain gradient step each, random gossip, the outputs."""
  net = Net(dtype)

  def loss(params, image, label):
    logits = net.apply({"params": params}, image).astype(jnp.float32)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], 1))

  def run(params, given):
    gradient = jax.vmap(jax.grad(loss))(params, given["image"], given["label"])
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    peers = sm.Schedule("truncate", 0.5, CLIENTS - 1, 10, point=0.9)(jnp.array(5))
    params = gossip.mix(gossip.random(given["key"], peers, np.ones((CLIENTS, CLIENTS), bool)), params)
    merged = net.apply({"params": gossip.mean(params)}, given["image"][0])
    return jax.vmap(lambda p, x: net.apply({"params": p}, x))(params, given["image"]), merged

  return run


def params():
  keys = jax.random.split(jax.random.key(0), CLIENTS)
  return jax.vmap(lambda key: Net().init(key, jnp.zeros((1, FEATURES)))["params"])(keys)


EXAMPLES = {"image": np.zeros((20, FEATURES), "float32"), "label": np.arange(20) % CLASSES}
LOCAL = sm.simulator.classifier(Net(), sm.optimizer())


def streams(**changes):
  return lambda: sm.streams(**({"examples": EXAMPLES, "num_clients": 3, "alpha": 0.1, "size": 5, "seed": 0} | changes))


CASE = Case(
  function=round_of(),
  params=params(),
  inputs=inputs,
  narrow=round_of("bfloat16"),
  bad={
    "unknown schedule": (lambda: sm.Schedule("step"), "kind"),
    "negative peers": (lambda: sm.Schedule(start=-0.1), "start"),
    "endless peers": (lambda: sm.Schedule(end=np.inf), "end"),
    "no steps": (lambda: sm.Schedule(max_steps=0), "max_steps"),
    "rounds longer than the run": (lambda: sm.single_merge(4, 10, 11), "steps_per_round"),
    "a run that ends between rounds": (lambda: sm.single_merge(4, 109, 10), "steps_per_round"),
    "a class without examples": (streams(examples=EXAMPLES | {"label": np.arange(20) % 2 * 2}), "labels"),
    "no clients": (streams(num_clients=0), "num_clients"),
    "alpha of zero": (streams(alpha=0.0), "alpha"),
    "sets larger than the data": (streams(size=21, resample=False), "size"),
    "labels that are no classes": (streams(examples=EXAMPLES | {"label": np.ones(20)}), "labels"),
    "unknown topology": (lambda: sm.learner(LOCAL, sm.Schedule(), topology="star"), "topology"),
    "empty minibatches": (lambda: sm.learner(LOCAL, sm.Schedule(), batch_size=0), "batch_size"),
    "a table of other classes": (
      lambda: partition.draw(jax.random.key(0), np.ones((2, 5)), partition.classes(EXAMPLES["label"]), 3),
      "weights",
    ),
    "weights of another network": (lambda: sm.from_torch({"head.weight": np.ones((2, 2))}), "state_dict"),
  },
)  # fmt: skip
