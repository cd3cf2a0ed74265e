import jax
import numpy as np
from contract_case import Case, drawn

from jaxlab.learning import auglocal, local
from jaxlab.models.backbones import cifar

BACKBONE = cifar.resnet(8, (8, 8, 8, 16))
VGG = cifar.Backbone("vgg", (8, 8), (1, 2))


def inputs(seed):
  return np.random.default_rng(seed).standard_normal((2, 8, 8, 3)).astype("float32")


def model(**changes):
  return auglocal.AugLocal(**{"backbone": BACKBONE, "num_classes": 5, "depth": 1} | changes)


VARIABLES = drawn(model().init, inputs(0))


def apply(**changes):
  """Logits of all heads."""
  network = model(**changes)
  stats = VARIABLES["batch_stats"]
  return lambda params, x: network.apply({"params": params, "batch_stats": stats}, x, heads=True)


def init(x=None, **changes):
  return lambda: jax.eval_shape(model(**changes).init, jax.random.key(0), inputs(0) if x is None else x)


CASE = Case(
  function=apply(),
  params=VARIABLES["params"],
  inputs=inputs,
  narrow=apply(dtype="bfloat16"),
  bad={
    "one image without a batch": (init(inputs(0)[0]), "images"),
    "bytes": (init(np.zeros((2, 8, 8, 3), "uint8")), "images"),
    "grey": (init(inputs(0)[..., :1]), "images"),
    "no head": (init(depth=0), "depth"),
    "a head deeper than what is ahead": (init(depth=4), "depth"),
    "steeper than a pyramid": (init(pyramid=1.5), "pyramid"),
    "more modules than units": (init(modules=5), "modules"),
    "no class": (init(num_classes=0), "num_classes"),
    "unknown head": (init(head_kind="infopro"), "head_kind"),
    "widths that shrink": (init(backbone=cifar.Backbone("resnet", (8, 8, 4), (1, 1, 1))), "widths"),
    "no ResNet of ten layers": (lambda: cifar.resnet(10), "depth"),
    "two stages": (lambda: cifar.resnet(20, (8, 8, 16)), "widths"),
    "four stages of VGG": (lambda: cifar.vgg19((8, 8, 8, 8)), "widths"),
    "a stride of three": (lambda: cifar.Backbone("vgg", (8,), (3,)), "strides"),
    "an average of nothing": (lambda: local.learner(model(), None, local.sgd(0.1), momentum=0.9), "momentum"),
    "the head of the last unit": (lambda: auglocal.sampled_units(3, 4, 1), "unit"),
    "images too small to halve": (init(np.zeros((2, 1, 1, 3), "float32"), backbone=VGG), "images"),
    "names of another network": (lambda: auglocal.from_torch({"a": np.ones(2)}, model()), "state_dict"),
    "heads without official names": (lambda: auglocal.from_torch({}, model(head_kind="dgl")), "model"),
  },
)
