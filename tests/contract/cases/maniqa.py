import jax
import numpy as np
from contract_case import Case, drawn

from jaxlab.models import maniqa

SHAPE = (2, 16, 16, 3)


def inputs(seed):
  return np.random.default_rng(seed).standard_normal(SHAPE).astype("float32")


def model(**changes):
  shape = {"image_size": 16, "patch_size": 4, "width": 8, "num_heads": 2, "mlp_ratio": 2, "taps": (0,), "num_tab": 1}
  return maniqa.MANIQA(**shape | {"depths": (1,), "stage_heads": (2,), "window": 2, "mlp_width": 8} | changes)


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
    "one image without a batch": (init(inputs(0)[0]), "images"),
    "bytes": (init(np.zeros(SHAPE, "uint8")), "images"),
    "grey": (init(inputs(0)[..., :1]), "images"),
    "another size": (init(inputs(0)[:, :12]), "images"),
    "patches that do not fit": (init(patch_size=5), "patch_size"),
    "width that heads do not divide": (init(width=9), "width"),
    "no taps": (init(taps=()), "taps"),
    "fewer than no TABs": (init(num_tab=-1), "num_tab"),
    "heads of two groups": (init(stage_heads=(2, 2)), "stage_heads"),
    "stage heads that do not divide": (init(stage_heads=(3,)), "num_heads"),
    "windows that do not fit": (init(window=3), "window"),
    "dropout of one": (init(dropout=1.0), "dropout"),
    "negative drop path": (init(drop_path=-0.1), "drop_path"),
  },
)
