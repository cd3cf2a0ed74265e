import jax
import numpy as np
from contract_case import Case, drawn

from jaxlab.models import parot

SHAPE = (2, 12, 3)
SIZES = {"num_patches": 4, "patch_size": 4, "global_size": 3, "neighbors": 2, "width": 8}


def points(seed):
  return np.random.default_rng(seed).standard_normal(SHAPE).astype("float32")


def inputs(seed):
  return points(seed), np.array([seed % 3, 1], "int32")


def model(**changes):
  """The segmenter: all of the classifier but its head, and more."""
  return parot.PaRotParts(**{"num_parts": 4, "num_categories": 3, "interpolate": 3} | SIZES | changes)


VARIABLES = drawn(model().init, inputs(0))


def apply(**changes):
  network = model(**changes)
  return lambda params, x: network.apply({"params": params, "batch_stats": VARIABLES["batch_stats"]}, x)


def init(x=None, **changes):
  network = parot.PaRot(**{"num_classes": 3} | SIZES | changes)
  return lambda: jax.eval_shape(network.init, jax.random.key(0), points(0) if x is None else x)


def init_parts(category=None, **changes):
  kinds = inputs(0)[1] if category is None else category
  return lambda: jax.eval_shape(model(**changes).init, jax.random.key(0), (points(0), kinds))


CASE = Case(
  function=apply(),
  params=VARIABLES["params"],
  inputs=inputs,
  narrow=apply(dtype="bfloat16"),
  bad={
    "one cloud without a batch": (init(points(0)[0]), "points"),
    "points of a plane": (init(points(0)[..., :2]), "points"),
    "whole numbers": (init(np.zeros(SHAPE, "int32")), "points"),
    "no classes": (init(num_classes=0), "num_classes"),
    "more patches than points": (init(num_patches=13), "num_patches"),
    "patches larger than the cloud": (init(patch_size=13), "patch_size"),
    "no global points": (init(global_size=0), "global_size"),
    "more neighbours than patches": (init(neighbors=5), "neighbors"),
    "width that does not divide": (init(width=10), "width"),
    "dropout of one": (init(dropout=1.0), "dropout"),
    "no parts": (init_parts(num_parts=0), "num_parts"),
    "no categories": (init_parts(num_categories=0), "num_categories"),
    "more centres than there are": (init_parts(interpolate=5), "interpolate"),
    "category a point": (init_parts(np.zeros((2, 12), "int32")), "category"),
    "category as a fraction": (init_parts(np.zeros(2, "float32")), "category"),
  },
)
