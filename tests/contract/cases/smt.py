import jax
import numpy as np
from contract_case import Case, drawn

from jaxlab.models import smt

SHAPE = (2, 32, 40, 3)


def inputs(seed):
  return np.random.default_rng(seed).standard_normal(SHAPE).astype("float32")


def model(**changes):
  return smt.SMT(**{"num_classes": 5, "widths": (8, 16, 16, 32), "depths": (1, 1, 2, 1), "head_dim": 8} | changes)


VARIABLES = drawn(model(layer_scale=0.5).init, inputs(0))


def apply(**changes):
  network = model(layer_scale=0.5, **changes)
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
    "too small": (init(inputs(0)[:, :2]), "images"),
    "no classes": (init(num_classes=0), "num_classes"),
    "depths of three stages": (init(depths=(1, 1, 1)), "depths"),
    "a stage without blocks": (init(depths=(1, 0, 1, 1)), "depths"),
    "unknown mixer": (init(mixers=("modulation", "modulation", "other", "attention")), "mixers"),
    "width that modulation cannot split": (init(widths=(6, 16, 16, 32)), "widths"),
    "width that heads do not divide": (init(widths=(8, 16, 16, 36)), "widths"),
    "even stem": (init(stem_kernel=4), "stem_kernel"),
    "drop path of one": (init(drop_path=1.0), "drop_path"),
  },
)
