import jax
import numpy as np
from contract_case import Case, drawn

from jaxlab.models import segman

SHAPE = (1, 96, 96, 3)


def inputs(seed):
  return np.random.default_rng(seed).standard_normal(SHAPE).astype("float32")


def model(decoder=None, **changes):
  shape = {"num_classes": 0, "widths": (8, 8, 16, 16), "depths": (1,) * 4, "heads": (1, 2, 2, 4)}
  head = {"num_classes": 5, "width": 8, "map_width": 8} | {
    name: changes[name] for name in ("dtype",) if name in changes
  }
  shape |= {"windows": (3,) * 4, "mlp_ratios": (2,) * 4, "global_tokens": 9, "layer_scale": 0.5}
  return segman.SegMAN(segman.Encoder(**shape | changes), segman.Decoder(**head | (decoder or {})))


VARIABLES = drawn(model().init, inputs(0))


def apply(**changes):
  network = model(**changes)
  return lambda params, x: network.apply({"params": params, "batch_stats": VARIABLES["batch_stats"]}, x)


def init(x=None, **changes):
  return lambda: jax.eval_shape(model(**changes).init, jax.random.key(0), inputs(0) if x is None else x)


def train():
  model().apply(VARIABLES, inputs(0), train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})


def decode(*shapes):
  maps = [np.zeros(shape, "float32") for shape in shapes]
  return lambda: jax.eval_shape(segman.Decoder(5, 8, 8).init, jax.random.key(0), maps)


CASE = Case(
  function=apply(),
  params=VARIABLES["params"],
  inputs=inputs,
  narrow=apply(dtype="bfloat16"),
  bad={
    "one image without a batch": (init(inputs(0)[0]), "images"),
    "bytes": (init(np.zeros(SHAPE, "uint8")), "images"),
    "grey": (init(inputs(0)[..., :1]), "images"),
    "sides that strides do not divide": (init(inputs(0)[:, :80]), "images"),
    "too small for the windows": (init(windows=(3, 3, 3, 5)), "images"),
    "an encoder that classifies": (init(num_classes=3), "encoder"),
    "depths of three stages": (init(depths=(1, 1, 1)), "depths"),
    "a stage without blocks": (init(depths=(1, 0, 1, 1)), "depths"),
    "width that heads do not divide": (init(widths=(8, 8, 16, 20)), "widths"),
    "an even window": (init(windows=(3, 2, 3, 3)), "window"),
    "drop path of one": (init(drop_path=1.0), "drop_path"),
    "unknown variant": (lambda: segman.encoder("XL"), "variant"),
    "one image to train on": (lambda: jax.eval_shape(train), "maps"),
    "two maps": (decode((2, 8, 8, 4), (2, 4, 4, 4)), "maps"),
    "maps without a batch": (decode((8, 8, 4), (4, 4, 4), (2, 2, 4)), "maps"),
    "maps of two batches": (decode((2, 8, 8, 4), (1, 4, 4, 4), (1, 2, 2, 4)), "maps"),
    "maps that grow": (decode((2, 8, 8, 4), (2, 4, 4, 4), (2, 4, 8, 4)), "maps"),
    "an empty map": (decode((2, 8, 8, 4), (2, 4, 4, 4), (2, 0, 2, 4)), "maps"),
    "a map that 4 does not divide": (decode((2, 8, 6, 4), (2, 4, 3, 4), (2, 2, 2, 4)), "maps"),
    "no classes": (init(decoder={"num_classes": 0}), "num_classes"),
    "dropout of one": (init(decoder={"dropout": 1.0}), "dropout"),
    "a decoder without width": (init(decoder={"map_width": 0}), "map_width"),
  },
)
