import jax
import numpy as np
from contract_case import Case, drawn

from jaxlab.models import stu_net

SHAPE = (1, 4, 4, 6, 2)


def inputs(seed):
  return np.random.default_rng(seed).standard_normal(SHAPE).astype("float32")


def model(**changes):
  shape = {"widths": (4, 8), "depths": (2, 1), "strides": ((1, 2, 2),), "deep_supervision": True}
  return stu_net.STUNet(**{"num_classes": 3, "in_channels": 2, **shape, **changes})


VARIABLES = drawn(model().init, inputs(0))


def apply(**changes):
  network = model(**changes)
  return lambda params, x: network.apply({"params": params}, x)


def init(x=None, **changes):
  return lambda: jax.eval_shape(model(**changes).init, jax.random.key(0), inputs(0) if x is None else x)


CASE = Case(
  function=apply(),
  params=VARIABLES["params"],
  inputs=inputs,
  narrow=apply(dtype="bfloat16"),
  bad={
    "one volume without a batch": (init(inputs(0)[0]), "volumes"),
    "bytes": (init(np.zeros(SHAPE, "uint8")), "volumes"),
    "one channel": (init(inputs(0)[..., :1]), "volumes"),
    "sides that strides do not divide": (init(inputs(0)[:, :, :3]), "volumes"),
    "one voxel in the deepest map": (init(inputs(0)[:, :1, :2, :2]), "volumes"),
    "no class": (init(num_classes=0), "num_classes"),
    "one stage": (init(widths=(8,)), "widths"),
    "depths of three stages": (init(depths=(1, 1, 1)), "depths"),
    "a stage without blocks": (init(depths=(1, 0)), "depths"),
    "strides of two stages": (init(strides=((1, 2, 2),) * 2), "strides"),
    "strides of two axes": (init(strides=((2, 2),)), "strides"),
    "unknown variant": (lambda: stu_net.stu_net("XL"), "variant"),
    "labels of another size": (
      lambda: stu_net.dice_cross_entropy(np.zeros((1, 2, 2, 3)), np.zeros((1, 2, 3), int)),
      "labels",
    ),
    "one class for the Dice coefficient": (
      lambda: stu_net.soft_dice(np.zeros((1, 2, 2, 1)), np.zeros((1, 2, 2), int)),
      "logits",
    ),
    "weights of another network": (
      lambda: stu_net.transfer(VARIABLES, jax.eval_shape(model(widths=(4, 12)).init, jax.random.key(0), inputs(0))),
      "pretrained",
    ),
  },
)
