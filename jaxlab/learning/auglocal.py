"""AugLocal: supervised local learning with heads made of layers that the network still has ahead.

Every unit l of a network with n units is a module of its own. Its head is built like d_l of the units after it, evenly
spread and with weights of its own, then a mean over pixels and a dense layer:

    d_l = max(1, round(d (1 - tau l / (M - 2)) + tau l / (M - 2)))        for the modules l = 0 .. M - 2
    head_l repeats units  round(l + i (n - 1 - l) / d_l),  i = 1 .. d_l    (all after l where they are no more than d_l)

The deeper a module, the shallower its head (tau, "pyramid"); the last M-th module is the rest of the network with its
classifier, M = n - d. No gradient crosses modules (`jaxlab.learning.local`). Heads are not used after training.

Ma, Wu, Si, Tan, "Scaling Supervised Local Learning with Augmented Auxiliary Networks", ICLR 2024, arXiv 2402.17318.
Symbols: d is `depth`, tau `pyramid`, M `modules`. In the paper the last layers are one module too.

The two heads that it is compared with are here as well: `greedy`, a mean over pixels and a dense layer (the official
"0c1f"), and `dgl`, the multi-layer perceptron of Decoupled Greedy Learning.

Differs from the official code: with M = 2 that divides by zero, here d_0 = d; STL-10 has 10 classes, not the 100 that a
misspelt key gives it there. For ImageNet it has ResNet-34, ResNet-101 and VGG-13, whose heads end in layers of their
own, and M = n; none of these are here, nor are PredSim's heads, one more baseline, nor SVHN and STL-10 among the
experiment's data. VGG-19 is here the usual one for 32 x 32, and its heads follow the rule above, with a maximum over
2 x 2 pixels where a ResNet has a stride of 2.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxlab import checks, interop, train
from jaxlab.learning import local
from jaxlab.models.backbones import cifar
from jaxlab.nn.batch_norm import BatchNormAct
from jaxlab.nn.module import precision
from jaxlab.nn.resize import adaptive_average_pool

HeadKind = Literal["auglocal", "greedy", "dgl"]


def head_depths(depth: int, modules: int, pyramid: float = 0.5) -> tuple[int, ...]:
  """d_l of all modules but the last.

  Args:
    depth: d, that of the first.
    modules: M.
    pyramid: tau in [0, 1]; 0 for d everywhere.

  Returns:
    M - 1 numbers, rounded half to even.
  """
  checks.count("depth", depth)
  checks.count("modules", modules)
  checks.real("pyramid", pyramid)
  if modules <= 2:
    return (depth,) * (modules - 1)
  share = [i * pyramid / (modules - 2) for i in range(modules - 1)]
  return tuple(max(1, round(depth * (1 - s) + s)) for s in share)


def sampled_units(unit: int, count: int, depth: int) -> tuple[int, ...]:
  """Which units the head of `unit` is built like: `depth` of those after it, evenly spread, the last one among them.

  Args:
    unit: l, from 0.
    count: n.
    depth: d_l.
  """
  checks.count("unit", unit, 0, count - 2)
  if checks.count("depth", depth) >= count - 1 - unit:
    return tuple(range(unit + 1, count))
  return tuple(round(unit + (count - unit - 1) / depth * i) for i in range(1, depth + 1))


def head_blocks(widths: tuple[int, ...], unit: int, depth: int) -> tuple[tuple[int, int], ...]:
  """Width and stride of each block of a head.

  A block halves the image where the width doubles. Where it quadruples from one sampled unit to the next, the second
  halving is owed to the next block, and never paid if there is none.

  Args:
    widths: of all units.
    unit: whose head.
    depth: d_l.
  """
  blocks, width, owed = [], widths[unit], 0
  for index in sampled_units(unit, len(widths), depth):
    if widths[index] < width:
      raise ValueError(f"widths: got {widths}, expected widths that do not shrink")
    owed += int(math.log2(widths[index] // width))
    stride = 2 if owed else 1
    owed -= stride - 1
    width = widths[index]
    blocks.append((width, stride))
  return tuple(blocks)


class AugLocal(local.LocalNetwork):
  """A backbone whose first modules have one unit and one head each.

  Attributes, besides those of `LocalNetwork`:
    depth: d, blocks in the first head; fewer than n where it gives M.
    pyramid: tau, how fast heads get shallower; 0 not at all.
    modules: M, the last module included; None for n - d, or n for heads that are not `auglocal`. 1, and so d = n - 1,
      is backpropagation.
    head_kind: "auglocal", "greedy" or "dgl".
  """

  depth: int = 3
  pyramid: float = 0.5
  modules: int | None = None
  head_kind: HeadKind = "auglocal"

  def __post_init__(self) -> None:
    counted = self.modules is None and self.head_kind == "auglocal"
    checks.count("depth", self.depth, 1, len(self.backbone) - 1 if counted else None)
    checks.real("pyramid", self.pyramid)
    checks.count("num_classes", self.num_classes)
    checks.choice("head_kind", self.head_kind, HeadKind)
    if self.modules is not None:
      checks.count("modules", self.modules, 1, len(self.backbone))
    super().__post_init__()

  def ends(self) -> tuple[int, ...]:
    """Units 0 .. M - 2, and the last."""
    units = len(self.backbone)
    default = units - self.depth if self.head_kind == "auglocal" else units
    return (*range((default if self.modules is None else self.modules) - 1), units - 1)

  def make_head(self, index: int) -> nn.Module:
    """The head of unit `index`."""
    if self.head_kind == "greedy":
      return Head("resnet", (), False, self.num_classes, **self.options())
    if self.head_kind == "dgl":
      return DGLHead(self.num_classes, **self.options())
    depth = head_depths(self.depth, self.num_modules, self.pyramid)[index]
    blocks = head_blocks(self.backbone.widths, index, depth)
    return Head(self.backbone.kind, blocks, depth == 1, self.num_classes, **self.options())


class Head(nn.Module):
  """Blocks, mean over pixels, a normalisation if there is but one block, dense layer.

  Attributes:
    kind: of the backbone, which says what a block is.
    blocks: width and stride of each.
    normalize: whether to normalise before the dense layer.
    num_classes: logits.
    dtype: compute dtype.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  kind: cifar.Kind
  blocks: tuple[tuple[int, int], ...]
  normalize: bool
  num_classes: int
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, h: Float[Array, "b i j f"], *, train: bool = False) -> Float[Array, "b k"]:
    """Features to logits."""
    options = {**precision(self), "axis_name": self.axis_name}
    for i, (width, stride) in enumerate(self.blocks):
      h = cifar.block(self.kind, width, stride, **options, name=f"blocks_{i}")(h, train=train)
    h = cifar.average_pool(h)
    if self.normalize:
      # Few rows whose mean outweighs their deviation: the variance must not be a difference of moments.
      norm = nn.BatchNorm(not train, momentum=0.9, use_fast_variance=False, name="norm", **options)
      h = norm(h)
    return cifar.linear(self.num_classes, h.shape[-1], name="classifier", **precision(self))(h)


class DGLHead(nn.Module):
  """Belilovsky et al. 2020: three 1x1 convolutions at a quarter of the side, then two dense layers on 2 x 2 pixels.

  Attributes as `Head`'s.
  """

  num_classes: int
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, h: Float[Array, "b i j f"], *, train: bool = False) -> Float[Array, "b k"]:
    """Features to logits."""
    norm = lambda name: BatchNormAct(axis_name=self.axis_name, name=name, **precision(self))
    side, width = -(-h.shape[1] // 4), h.shape[-1]
    h = adaptive_average_pool(h, (side, side))
    for i in range(3):
      h = norm(f"conv_norms_{i}")(
        cifar.conv(width, 1, use_bias=False, name=f"convs_{i}", **precision(self))(h), train=train
      )
    h = adaptive_average_pool(h, (min(side, 2),) * 2)
    h = jnp.moveaxis(h, -1, 1).reshape(h.shape[0], -1)  # channels first, as the official layer is ordered
    for i in range(2):
      dense = cifar.linear(h.shape[-1], h.shape[-1], use_bias=False, name=f"dense_{i}", **precision(self))
      h = norm(f"dense_norms_{i}")(dense(h), train=train)
    return cifar.linear(self.num_classes, h.shape[-1], name="classifier", **precision(self))(h)


def resnet32(num_classes: int = 10, **changes: Any) -> AugLocal:
  """ResNet-32 of 16 units and 466,906 parameters; changes are attributes of `AugLocal`."""
  return AugLocal(cifar.resnet(32), num_classes, **changes)


def resnet110(num_classes: int = 10, **changes: Any) -> AugLocal:
  """ResNet-110 of 55 units and 1,730,714 parameters; changes are attributes of `AugLocal`."""
  return AugLocal(cifar.resnet(110), num_classes, **changes)


def vgg19(num_classes: int = 10, **changes: Any) -> AugLocal:
  """VGG-19 of 16 convolutions with batch normalisation; changes are attributes of `AugLocal`."""
  return AugLocal(cifar.vgg19(), num_classes, **changes)


def learner(model: AugLocal, tx: optax.GradientTransformation) -> train.Learner:
  """Every module minimises the cross entropy of its own logits; see `local.learner`.

  Args:
    model: the network.
    tx: the optimizer, in the paper `local.sgd(local.schedule(0.8, 400, ...))`.

  Returns:
    A learner on batches of `image` and `label`.
  """
  cross_entropy = train.cross_entropy()
  return local.learner(model, lambda index, logits, batch: cross_entropy(logits, batch), tx)


def from_torch(state_dict: Mapping[str, Any], model: AugLocal) -> dict[str, Any]:
  """Variables from the official code's state dict.

  Args:
    state_dict: of `LocalResNet`, as tensors or arrays.
    model: the same network with `auglocal` or `greedy` heads.

  Raises:
    ValueError: tensors that are missing, left over or of another shape; a network that the official code has not.
  """
  return interop.variables(state_dict, weights(model))


def weights(model: AugLocal) -> dict[str, interop.Rule]:
  """The table of the conversion."""
  if model.backbone.kind != "resnet" or model.head_kind == "dgl":
    raise ValueError(
      f"model: got {model.head_kind!r} heads on a {model.backbone.kind!r}, expected 'auglocal' or 'greedy' on 'resnet'"
    )
  widths, per_stage = model.backbone.widths, (len(model.backbone) - 1) // 3
  rules = cifar.resnet_weights(model.backbone, "params/units") | {"params/classifier": interop.dense("fc")}
  depths = head_depths(model.depth, model.num_modules, model.pyramid)
  for unit, depth in enumerate(depths):
    stage, block = (0, 0) if unit == 0 else divmod(unit - 1 + per_stage, per_stage)
    head, path, width = f"aux_classifier_{stage}_{block}.head", f"params/heads_{unit}", widths[unit]
    blocks = head_blocks(widths, unit, depth) if model.head_kind == "auglocal" else ()
    for i, (out, stride) in enumerate(blocks):
      rules |= cifar.block_weights(f"{path}/blocks_{i}", f"{head}.{i}", stride != 1 or out != width)
      width = out
    after = len(blocks) + 2  # the mean and the flattening are layers there
    if blocks and depth == 1:
      rules[f"{path}/norm"] = interop.batch_norm(f"{head}.{after}")
      after += 1
    rules[f"{path}/classifier"] = interop.dense(f"{head}.{after}")
  return rules
