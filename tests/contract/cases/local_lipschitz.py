"""Forward bounds, slopes and norm bounds of a small network with a convolution, as its weights and its box move."""

import jax
import jax.numpy as jnp
import numpy as np
from contract_case import Case

from jaxlab.analysis import local_lipschitz as ll

SHAPE = (4, 4, 1)


def draw():
  """Weights as flax names them."""
  rng = np.random.default_rng(1)
  layer = lambda *shape: {
    "kernel": jnp.asarray(rng.standard_normal(shape) / np.prod(shape[:-1]) ** 0.5, "float32"),
    "bias": jnp.asarray(rng.standard_normal(shape[-1]), "float32"),
  }
  return {"Conv_0": layer(3, 3, 1, 2), "Dense_0": layer(8, 5), "Dense_1": layer(5, 3)}


def network(params):
  return (
    ll.Conv(**params["Conv_0"], padding="VALID"),
    ll.Dense(**params["Dense_0"]),
    ll.Dense(**params["Dense_1"]),
  )


def inputs(seed):
  x = np.random.default_rng(seed).uniform(0.2, 0.8, SHAPE).astype("float32")
  return jax.tree.map(np.asarray, ll.box(x, 0.3))


def function(params, box):
  net = network(params)
  found = ll.forward(net, box)
  return found[-1], ll.jacobian(net, found), ll.lipschitz(net, found)


def narrow(params, box):
  return function(*jax.tree.map(lambda a: a.astype("bfloat16"), (params, box)))


def forward(net=None, box=None, **options):
  return lambda: ll.forward(net or NET, BOX if box is None else box, **options)


def bound(found=None, **options):
  return lambda: ll.lipschitz(NET, found or FOUND, **options)


def search(**options):
  return lambda: ll.branch_and_bound(NET, FOUND, **options)


def monotone(net=None, x=None, features=(0,), **options):
  x = np.ones(8, "float32") if x is None else x
  return lambda: ll.monotonicity(net or NET[1:], x, np.array(features), **options)


def from_torch(**changes):
  weights = {"0.weight": np.ones((2, 3), "float32"), "0.bias": np.ones(2, "float32")}
  return lambda: ll.from_torch(**{"state_dict": weights, "names": ["0"], "input_shape": (3,)} | changes)


PARAMS, BOX = draw(), inputs(0)
NET = network(PARAMS)
FOUND = jax.jit(ll.forward)(NET, BOX)
CASE = Case(
  function=function,
  params=PARAMS,
  inputs=inputs,
  narrow=narrow,
  bad={
    "no layers": (lambda: ll.forward((), BOX), "network"),
    "a layer of another kind": (forward(net=(NET[0], np.ones((8, 5)))), "network"),
    "a bias of another layer": (forward(net=(NET[0], NET[1].replace(bias=np.ones(4)), NET[2])), "network"),
    "a convolution at the end": (forward(net=NET[:1]), "network"),
    "no chain": (forward(net=(NET[0], NET[2])), "network"),
    "another input": (forward(box=ll.box(np.ones((4, 4, 2), "float32"), 0.1)), "network"),
    "a box that is none": (forward(box=np.ones(SHAPE)), "box"),
    "a box of integers": (forward(box=ll.Bounds(np.zeros(SHAPE, int), np.ones(SHAPE, int))), "box"),
    "a box inside out": (forward(box=ll.Bounds(BOX.upper, BOX.lower)), "box"),
    "unknown forward method": (forward(method="lp"), "method"),
    "no chunk": (forward(chunk=0), "chunk"),
    "negative radius": (lambda: ll.box(np.ones(3), -0.1), "radius"),
    "a radius that is no number": (lambda: ll.box(np.ones(3), float("nan")), "radius"),
    "half a step": (lambda: ll.optimize(NET, BOX, steps=2.5), "steps"),
    "half a chunk": (forward(chunk=1.5), "chunk"),
    "a label that is no output": (lambda: ll.optimize(NET, BOX, label=3), "label"),
    "a label below 0": (lambda: ll.optimize(NET, BOX, label=np.int32(-1)), "label"),
    "strides of three axes": (lambda: ll.Conv(**PARAMS["Conv_0"], strides=(1, 1, 1)), "strides"),
    "a stride of 0": (lambda: ll.Conv(**PARAMS["Conv_0"], strides=0), "strides"),
    "padding around": (lambda: ll.Conv(**PARAMS["Conv_0"], padding="CIRCULAR"), "padding"),
    "padding of one axis": (lambda: ll.Conv(**PARAMS["Conv_0"], padding=((1, 1), (1,))), "padding"),
    "strides of no layer": (from_torch(strides={"1": 2}), "strides"),
    "padding of a dense layer": (from_torch(padding={"0": 1}), "padding"),
    "clip the wrong way": (lambda: ll.box(np.ones(3), 0.1, (1, 0)), "clip"),
    "negative steps": (lambda: ll.optimize(NET, BOX, steps=-1), "steps"),
    "a rate that grows": (lambda: ll.optimize(NET, BOX, decay=1.1), "decay"),
    "bounds of fewer layers": (bound(found=FOUND[:-1]), "forward"),
    "bounds of other layers": (bound(found=(*FOUND[:2], FOUND[3], FOUND[3])), "forward"),
    "unknown method": (bound(method="ibp"), "method"),
    "rows of another network": (bound(rows=np.eye(4, dtype="float32")), "rows"),
    "tangent of another input": (lambda: ll.jvp(NET, FOUND, np.ones(3, "float32")), "tangent"),
    "unknown heuristic": (search(heuristic="random"), "heuristic"),
    "no candidates": (search(candidates=0), "candidates"),
    "no batch": (search(batch_size=0), "batch_size"),
    "no cases": (search(max_cases=0), "max_cases"),
    "negative timeout": (search(timeout=-1.0), "timeout"),
    "features of an image": (monotone(x=np.ones((4, 2), "float32")), "x"),
    "features out of range": (monotone(features=(8,)), "features"),
    "features that are no indices": (monotone(features=(0.5,)), "features"),
    "span the wrong way": (monotone(span=(1.0, 0.0)), "span"),
    "unknown output": (monotone(output=3), "output"),
    "weights that are missing": (from_torch(names=["1"]), "state_dict"),
    "weights of another input": (from_torch(input_shape=(4,)), "network"),
  },
)
