import jax
import numpy as np
from contract_case import Case

from jaxlab.models import cvmh_unet

SHAPE = (1, 14, 16, 3)


def inputs(seed):
  return np.random.default_rng(seed).standard_normal(SHAPE).astype("float32")


def model(**changes):
  shape = {"num_classes": 3, "widths": (32, 8), "encoder_depths": (1, 1), "decoder_depths": (0, 0)}
  shape |= {"pool_sizes": (7,), "state_size": 2}
  return cvmh_unet.CVMHUNet(**shape | changes)


def start(shape):
  """Random weights: compiling the network's own start takes longer than all that the contract does with it."""
  rng = np.random.default_rng(0)
  draw = lambda path, s: (
    rng.uniform(0.5, 1.5, s.shape) if path[-1].key in ("var", "scale") else 0.1 * rng.standard_normal(s.shape)
  )
  return jax.tree_util.tree_map_with_path(lambda *a: draw(*a).astype("float32"), shape)


VARIABLES = start(jax.eval_shape(model().init, jax.random.key(0), inputs(0)))


def apply(**changes):
  network = model(**changes)
  return lambda params, x: network.apply({"params": params, "batch_stats": VARIABLES["batch_stats"]}, x)


def init(x=None, **changes):
  return lambda: jax.eval_shape(model(**changes).init, jax.random.key(0), inputs(0) if x is None else x)


CASE = Case(
  function=apply(),
  params=VARIABLES["params"],
  inputs=inputs,
  narrow=apply(dtype="bfloat16"),
  bad={
    "one image without a batch": (init(inputs(0)[0]), "images"),
    "bytes": (init(np.zeros(SHAPE, "uint8")), "images"),
    "grey": (init(inputs(0)[..., :1]), "images"),
    "no pixels": (init(inputs(0)[:, :0]), "images"),
    "depths of three stages": (init(encoder_depths=(1, 1, 1)), "encoder_depths"),
    "a stage without blocks": (init(encoder_depths=(1, 0)), "encoder_depths"),
    "fewer blocks than none": (init(decoder_depths=(1, -1)), "decoder_depths"),
    "no pooled map": (init(pool_sizes=()), "pool_sizes"),
    "a pooled map that 7 does not divide": (init(pool_sizes=(8,)), "pool_size"),
    "width that the last expansion does not divide": (init(widths=(30, 8)), "widths"),
    "unknown skip": (init(skip="concat"), "skip"),
    "unknown attention": (init(attention="softmax"), "attention"),
    "too many frequencies": (init(frequencies=17), "frequencies"),
    "no frequencies": (init(frequencies=0), "frequencies"),
    "no classes": (init(num_classes=0), "num_classes"),
    "no states": (init(state_size=0), "directions"),
    "drop path of one": (init(drop_path=1.0), "drop_path"),
  },
)
