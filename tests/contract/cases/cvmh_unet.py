import jax
import numpy as np
from contract_case import Case, drawn

from jaxlab.models import cvmh_unet

SHAPE = (1, 14, 16, 3)


def inputs(seed):
  return np.random.default_rng(seed).standard_normal(SHAPE).astype("float32")


def model(**changes):
  shape = {"num_classes": 3, "widths": (32, 8), "encoder_depths": (1, 1), "decoder_depths": (0, 0)}
  shape |= {"pool_sizes": (7,), "state_size": 2}
  return cvmh_unet.CVMHUNet(**shape | changes)


VARIABLES = drawn(model().init, inputs(0))


def apply(**changes):
  network = model(**changes)
  return lambda params, x: network.apply({"params": params, "batch_stats": VARIABLES["batch_stats"]}, x)


def init(x=None, **changes):
  return lambda: jax.eval_shape(model(**changes).init, jax.random.key(0), inputs(0) if x is None else x)


def loss(shape, labels, valid=None):
  return lambda: cvmh_unet.cross_entropy_and_dice(np.zeros(shape, "float32"), labels, valid)


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
    "no states": (init(state_size=0), "state_size"),
    "no directions": (init(directions=()), "directions"),
    "drop path of one": (init(drop_path=1.0), "drop_path"),
    "pixels of one class": (loss((2, 3, 4, 1), np.zeros((2, 3, 4), int)), "logits"),
    "logits without a batch": (loss((3, 4, 5), np.zeros((3, 4), int)), "logits"),
    "labels that would be broadcast": (loss((2, 3, 4, 5), np.zeros((1, 3, 4), int)), "labels"),
    "labels as floats": (loss((2, 3, 4, 5), np.zeros((2, 3, 4), "float32")), "labels"),
    "a mask that would be broadcast": (loss((2, 3, 4, 5), np.zeros((2, 3, 4), int), np.ones((1, 1, 4), bool)), "valid"),
    "weights for a mask": (loss((2, 3, 4, 5), np.zeros((2, 3, 4), int), np.full((2, 3, 4), 2)), "valid"),
  },
)
