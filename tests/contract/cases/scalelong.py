import jax
import jax.numpy as jnp
import numpy as np
from contract_case import Case

from jaxlab.models import scalelong

SHAPE = (2, 8, 8, 1)


def inputs(seed):
  rng = np.random.default_rng(seed)
  noisy = rng.standard_normal(SHAPE), rng.uniform(0, scalelong.TIME_SCALE, SHAPE[0])
  return {"images": noisy[0].astype("float32"), "times": noisy[1].astype("float32"), "labels": rng.integers(0, 3, 2)}


def model(**changes):
  shape = {"image_size": 8, "in_channels": 1, "width": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 1, "num_classes": 3}
  return scalelong.UViT(**shape | {"scaling": "learned"} | changes)


def weights():
  """Every array drawn anew, so that nothing is near zero; the one hidden unit of the gate is on."""
  x = inputs(0)
  shapes = jax.eval_shape(model().init, jax.random.key(0), x["images"], x["times"], x["labels"])["params"]
  leaves, structure = jax.tree.flatten(shapes)
  rng = np.random.default_rng(0)
  params = jax.tree.unflatten(structure, [jnp.asarray(rng.standard_normal(a.shape) / 4, "float32") for a in leaves])
  params["skips"]["gate"]["squeeze"]["bias"] += 1
  return params


def apply(**changes):
  return lambda params, x: model(**changes).apply({"params": params}, x["images"], x["times"], x["labels"])


def init(images=None, times=None, labels=None, context=None, **changes):
  x = inputs(0)
  given = [x[name] if new is None else new for name, new in zip(x, (images, times, labels), strict=True)]
  return lambda: jax.eval_shape(model(**changes).init, jax.random.key(0), *given, context)


CASE = Case(
  function=apply(),
  params=weights(),
  inputs=inputs,
  narrow=apply(dtype="bfloat16"),
  bad={
    "one image without a batch": (init(inputs(0)["images"][0]), "images"),
    "bytes": (init(np.zeros(SHAPE, "uint8")), "images"),
    "colour": (init(np.zeros((2, 8, 8, 3), "float32")), "images"),
    "another size": (init(np.zeros((2, 16, 16, 1), "float32")), "images"),
    "one time for two images": (init(times=np.zeros(1, "float32")), "timesteps"),
    "labels that are floats": (init(labels=np.zeros(2, "float32")), "labels"),
    "labels of a network without": (init(num_classes=0), "labels"),
    "a context of a network without": (init(context=np.zeros((2, 1, 4), "float32")), "context"),
    "no context": (init(context_size=1, context_width=4), "context"),
    "a context of another width": (
      init(context=np.zeros((2, 1, 3), "float32"), context_size=1, context_width=4),
      "context",
    ),
    "a context of integers": (init(context=np.zeros((2, 1, 4), int), context_size=1, context_width=4), "context"),
    "context without a width": (init(context_size=1), "context_width"),
    "patches that do not fit": (init(patch_size=3), "patch_size"),
    "odd depth": (init(depth=3), "depth"),
    "heads that do not divide": (init(num_heads=3), "num_heads"),
    "unknown scaling": (init(scaling="half"), "scaling"),
    "kappa of zero": (init(scaling="constant", kappa=0.0), "kappa"),
    "too few tokens for a gate": (init(patch_size=4), "scaling"),
  },
)
