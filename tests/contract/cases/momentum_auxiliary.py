import jax
import numpy as np
from contract_case import Case, drawn

from jaxlab.learning import local
from jaxlab.learning import momentum_auxiliary as man
from jaxlab.models.backbones import cifar

BACKBONE = cifar.resnet(8, (8, 8, 8, 16))
VGG = cifar.Backbone("vgg", (8, 8), (1, 2))


def inputs(seed):
  return np.random.default_rng(seed).standard_normal((2, 8, 8, 3)).astype("float32")


def model(**changes):
  shape = {"cuts": (1, 3), "feature_dim": 6, "image_size": 8, "convolutions": 1}
  return man.MomentumAuxiliary(**{"backbone": BACKBONE, "num_classes": 5} | shape | changes)


VARIABLES = drawn(model().init, inputs(0))


def apply(**changes):
  """Pixels and logits of all heads."""
  network = model(**changes)
  stats = VARIABLES["batch_stats"]
  return lambda params, x: network.apply({"params": params, "batch_stats": stats}, x, heads=True)


def init(x=None, **changes):
  return lambda: jax.eval_shape(model(**changes).init, jax.random.key(0), inputs(0) if x is None else x)


def learner(weights=((1.0, 1.0),), **changes):
  return lambda: man.learner(model(), local.sgd(0.1), weights, **changes)


CASE = Case(
  function=apply(),
  params=VARIABLES["params"],
  inputs=inputs,
  narrow=apply(dtype="bfloat16"),
  bad={
    "one image without a batch": (init(inputs(0)[0]), "images"),
    "bytes": (init(np.zeros((2, 8, 8, 3), "uint8")), "images"),
    "grey": (init(inputs(0)[..., :1]), "images"),
    "no cut": (init(cuts=()), "cuts"),
    "a rest without a module": (init(cuts=(1, 2)), "cuts"),
    "cuts out of order": (init(cuts=(2, 1, 3)), "cuts"),
    "three convolutions": (init(convolutions=3), "convolutions"),
    "no class": (init(num_classes=0), "num_classes"),
    "no hidden layer": (init(feature_dim=0), "feature_dim"),
    "no image to paint": (init(image_size=0), "image_size"),
    "unknown loss": (init(loss_mode="mse"), "loss_mode"),
    "a number of modules that the paper has not": (lambda: man.resnet32(5), "modules"),
    "weights of two modules": (learner([(1, 1), (1, 1)]), "weights"),
    "a negative weight": (learner([(1, -1)]), "weights"),
    "weights that stages make negative": (lambda: man.stage_weights(model(), 3, (1, 1), (0, 0)), "modules"),
    "stages of a VGG": (lambda: man.stage_weights(man.MomentumAuxiliary(VGG, cuts=(0, 1)), 8, (1, 1), (1, 1)), "model"),
    "a growing average": (learner(momentum=1.5), "momentum"),
    "a mean of one channel": (learner(mean=(0.5,)), "mean, std"),
    "no momentum for averages": (lambda: local.learner(model(), None, local.sgd(0.1)), "momentum"),
    "names of another network": (lambda: man.from_torch({"a": np.ones(2)}, model()), "state_dict"),
    "blocks without official names": (lambda: man.from_torch({}, model(bias=False)), "model"),
  },
)
