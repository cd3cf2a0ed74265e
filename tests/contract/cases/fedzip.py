import jax
import jax.numpy as jnp
import numpy as np
import optax
from contract_case import Case

from jaxlab.decentral import fedzip, partition, simulator

CLASSES, FEATURES = 3, 6
MESSAGE = fedzip.Quantized(np.array([0, 1, 2, 1], "int8"), np.ones(3, "float32"))


def inputs(seed):
  """Updates of two clients and an example."""
  rng = np.random.default_rng(seed)
  kernel = rng.standard_normal((2, FEATURES, CLASSES)).astype("float32")
  bias = rng.standard_normal((2, CLASSES)).astype("float32")
  return {"update": {"kernel": kernel, "bias": bias}, "image": rng.standard_normal((4, FEATURES)).astype("float32")}


def server(dtype="float32"):
  """A linear classifier after the server has averaged what it decodes, and its outputs."""

  def run(params, given):
    code = fedzip.codec(0.5).code
    decoded, _ = jax.vmap(lambda u: code(u, jax.random.key(0)))(given["update"])
    new = jax.tree.map(lambda w, d: (w + 0.1 * jnp.mean(d, axis=0)).astype(dtype), params, decoded)
    return given["image"].astype(dtype) @ new["kernel"] + new["bias"]

  return run


def params():
  rng = np.random.default_rng(0)
  return {"kernel": jnp.asarray(rng.standard_normal((FEATURES, CLASSES)), jnp.float32), "bias": jnp.zeros(CLASSES)}


class Net(fedzip.nn.Module):
  @fedzip.nn.compact
  def __call__(self, x, *, train=False):
    return fedzip.nn.Dense(CLASSES)(x)


LOCAL = simulator.classifier(Net(), optax.sgd(0.1))
DATA = partition.clients(
  {"image": np.zeros((4, FEATURES), "float32"), "label": np.zeros(4, "int32")}, [np.arange(2), np.arange(2, 4)]
)


def run_learner(**changes):
  def call():
    learner = fedzip.learner(LOCAL, simulator.Work(), **changes)
    jax.eval_shape(learner.step, jax.eval_shape(learner.init, jax.random.key(0), DATA), DATA)

  return call


CASE = Case(
  function=server(),
  params=params(),
  inputs=inputs,
  narrow=server("bfloat16"),
  bad={
    "sparsity above one": (lambda: fedzip.codec(1.1), "sparsity"),
    "negative sparsity": (lambda: fedzip.top(jnp.ones(3), -0.1), "sparsity"),
    "a single cluster": (lambda: fedzip.quantize(jnp.ones(3), clusters=1), "clusters"),
    "too many clusters": (lambda: fedzip.quantize(jnp.ones(3), clusters=200), "clusters"),
    "no iterations": (lambda: fedzip.quantize(jnp.ones(3), iterations=0), "iterations"),
    "a matrix": (lambda: fedzip.quantize(jnp.ones((3, 2))), "x"),
    "unknown method": (lambda: fedzip.encode(MESSAGE, "zip"), "method"),
    "unknown method of the codec": (lambda: fedzip.codec(method="zip"), "method"),
    "symbols without centroids": (lambda: fedzip.encode(MESSAGE._replace(symbols=np.array([3]))), "message"),
    "an empty stream": (lambda: fedzip.decode(b"", 4), "stream"),
    "a tensor of no size": (lambda: fedzip.decode(fedzip.encode(MESSAGE), 0), "n"),
    "messages of other tensors": (lambda: fedzip.restore([MESSAGE], params()), "messages"),
    "four kinds in the official accounting": (lambda: fedzip.official_bits(np.arange(4)), "symbols"),
    "a stream of one kind": (lambda: fedzip.decode(b"0" * 20, 4, 1), "clusters"),
    "too many symbols to count": (
      lambda: jax.eval_shape(fedzip.bits, MESSAGE._replace(symbols=jax.ShapeDtypeStruct((2**26,), "int8"))), "message",
    ),
    "more than all of the largest": (lambda: fedzip.top_codec(1.5), "share"),
    "none at random": (lambda: fedzip.random_codec(0.0), "share"),
    "no bits": (lambda: fedzip.uniform_codec(0), "width"),
    "server rate of zero": (run_learner(server_rate=0.0), "server_rate"),
    "more clients than there are": (run_learner(choose=simulator.some_clients(3)), "count"),
  },
)  # fmt: skip
