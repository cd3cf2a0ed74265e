"""MAN: supervised local learning whose heads know the next module through a moving average of its weights.

Module j puts out h. Before its head come two blocks built like n(j), the first block of module j + 1:

    y    = LB_j(h) + EMA_j(h)
    L_j  = a_j BCE(decoder_j(y), image in [0, 1]) + b_j CE(classifier_j(y), label)
    EMA_j <- m EMA_j + (1 - m) n(j),   with n(j)'s weights before the step's update

The local loss trains LB_j ("learnable bias"). Gradient passes through EMA_j to h, but neither gradient nor optimizer
moves its weights. So modules hear of each other by parameters, never by gradients (`jaxlab.learning.local`). The last
module has the classifier. Blocks, decoders and local classifiers are not used after training. Without either block
(`bias`, `average`) this is InfoPro, which it builds on (Wang et al., ICLR 2021).

Su et al., "Momentum Auxiliary Network for Supervised Local Learning", ECCV 2024, arXiv 2407.05623.
Symbols: m is `momentum`, a_j and b_j are `weights`, F is `feature_dim`.

Differs from the paper: there the branch has one set of weights, moved by both gradient and average, and a small bias.
The official code, and this, keep a frozen block and a trainable one, each of the full size and drawn on its own.

Differs from the official code: its a_j and b_j follow the stage of n(j) where InfoPro's follow j, and get negative for
few modules. Here `linear_weights` is InfoPro's rule and `stage_weights` the code's, which refuses what is negative.
What is named "16" (ResNet-32) and "55" (ResNet-110) there has 15 and 54 modules. ResNet-101, ResNet-152 and
ResNeXt-101, with the wider heads for ImageNet, are not here; nor are SVHN and STL-10 among the experiment's data, nor
the paper's version on the heads of Decoupled Greedy Learning, which was not released.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxlab import checks, interop, train
from jaxlab.learning import local
from jaxlab.models.backbones import cifar
from jaxlab.nn.batch_norm import BatchNormAct
from jaxlab.nn.initializers import torch_bias
from jaxlab.nn.module import precision
from jaxlab.nn.resize import resize

LossMode = Literal["cross_entropy", "contrast"]
Weights = Sequence[tuple[float, float]]  # of reconstruction and of classification, for all modules but the last

# Of CIFAR-10's pixels, as the official code rounds them.
MEAN, STD = (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)

# Last block of each module, (stage, block), by layers and the number that the paper gives.
_ALL = lambda blocks: tuple((stage, block) for stage in (1, 2, 3) for block in range(blocks))
_TEN = (1, 2, 4, 5, 7, 9, 11, 13, 14, 16, 17)
CUTS: dict[int, dict[int, tuple[tuple[int, int], ...]]] = {
  32: {
    1: ((3, 4),),
    2: ((2, 1), (3, 4)),
    3: ((1, 4), (2, 4), (3, 4)),
    4: ((1, 2), (2, 1), (3, 0), (3, 4)),
    8: ((1, 0), (1, 2), (1, 4), (2, 1), (2, 3), (3, 0), (3, 2), (3, 4)),
    16: _ALL(5),
  },
  110: {
    1: ((3, 17),),
    2: ((2, 8), (3, 17)),
    3: ((1, 17), (2, 17), (3, 17)),
    4: ((1, 11), (2, 7), (3, 3), (3, 17)),
    8: ((1, 4), (1, 11), (2, 0), (2, 7), (2, 14), (3, 3), (3, 10), (3, 17)),
    16: (
      *((1, b) for b in (1, 4, 7, 10, 13, 16)),
      *((2, b) for b in (1, 4, 7, 11, 15)),
      *((3, b) for b in (1, 5, 9, 13, 17)),
    ),
    32: (
      *((1, b) for b in _TEN),
      *((2, b) for b in _TEN),
      *((3, b) for b in (1, 3, 4, 6, 7, 9, 11, 13, 15, 17)),
    ),
    55: _ALL(18),
  },
}


class MomentumAuxiliary(local.LocalNetwork):
  """A backbone in modules with momentum auxiliary networks.

  Parameters besides those of `LocalNetwork`: `biases_<j>` and `averages_<j>`.

  Attributes, besides those of `LocalNetwork`:
    cuts: the last unit of each module, the backbone's last among them.
    bias: whether there is LB, the trainable block.
    average: whether there is EMA, the averaged block.
    convolutions: 1 or 2 in a local classifier (the official "1c2f" and "2c2f").
    feature_dim: F, width of its hidden dense layer.
    loss_mode: "cross_entropy", or "contrast", whose classifiers put out F numbers instead of logits.
    image_size: side that decoders paint.
  """

  cuts: tuple[int, ...] = ()
  bias: bool = True
  average: bool = True
  convolutions: int = 2
  feature_dim: int = 128
  loss_mode: LossMode = "cross_entropy"
  image_size: int = 32

  def __post_init__(self) -> None:
    checks.count("num_classes", self.num_classes)
    checks.count("convolutions", self.convolutions, 1, 2)
    checks.count("feature_dim", self.feature_dim)
    checks.count("image_size", self.image_size)
    checks.choice("loss_mode", self.loss_mode, LossMode)
    cuts, last = self.cuts, len(self.backbone) - 1
    if not cuts or list(cuts) != sorted(set(cuts)) or cuts[0] < 0 or cuts[-1] != last:
      raise ValueError(f"cuts: got {cuts}, expected increasing numbers of units, {last} the last of them")
    super().__post_init__()

  def ends(self) -> tuple[int, ...]:
    """The cuts."""
    return self.cuts

  def make_head(self, index: int) -> nn.Module:
    """Decoder and local classifier."""
    return Head(
      self.backbone.widths[-1],
      self.feature_dim if self.loss_mode == "contrast" else self.num_classes,
      self.convolutions,
      self.feature_dim,
      self.in_channels,
      self.image_size,
      **self.options(),
    )

  def setup(self) -> None:
    """Makes the blocks, too."""
    super().setup()
    following = [end + 1 for end in self.cuts[:-1]]
    make = lambda i: cifar.unit(self.backbone, i, **self.options())
    self.biases = [make(i) for i in following] if self.bias else ()
    self.averages = [make(i) for i in following] if self.average else ()

  def members(self, index: int) -> tuple[str, ...]:
    """With LB."""
    extra = (f"biases_{index}",) if self.bias and index < self.num_modules - 1 else ()
    return (*super().members(index), *extra)

  def averaged(self, index: int) -> dict[str, str]:
    """EMA_j is the average of n(j)."""
    if not self.average or index == self.num_modules - 1:
      return {}
    return {f"averages_{index}": f"units_{self.cuts[index] + 1}"}

  def head(self, h: Float[Array, "b i j f"], index: int, train: bool) -> tuple[Array, Array]:
    """Logits of the image's pixels and of the classes (or features to contrast) from y = LB(h) + EMA(h)."""
    branches = [*self.biases[index : index + 1], *self.averages[index : index + 1]]
    y = sum(branch(h, train=train) for branch in branches) if branches else h
    return self.heads[index](y, train=train)


class Head(nn.Module):
  """InfoPro's decoder and local classifier.

  Attributes:
    last_width: channels of the backbone's last stage, the most that the classifier's convolutions have.
    outputs: of the classifier.
    convolutions: in the classifier.
    feature_dim: of its hidden dense layer.
    in_channels: of the image to paint.
    image_size: its side.
    dtype: compute dtype.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  last_width: int
  outputs: int
  convolutions: int = 2
  feature_dim: int = 128
  in_channels: int = 3
  image_size: int = 32
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(
    self, y: Float[Array, "b i j f"], *, train: bool = False
  ) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
    """Features to the pixels' logits and the classifier's outputs."""
    options = {**precision(self), "axis_name": self.axis_name}
    # The convolution comes after the enlargement: widths of 12 at full size are what a decoder costs.
    image = resize(y, (self.image_size,) * 2, align_corners=True)
    image = self._conv(image, 12, "decoder_in")
    image = BatchNormAct(name="decoder_norm", **options)(image, train=train)
    image = self._conv(image, self.in_channels, "decoder_out")

    width, stride = min(2 * y.shape[-1], self.last_width), 2 if y.shape[-1] < self.last_width else 1
    for i in range(self.convolutions):
      y = cifar.ConvUnit(width, stride=stride, use_bias=False, name=f"convs_{i}", **options)(y, train=train)
      stride = 1
    z = nn.relu(cifar.linear(self.feature_dim, width, name="hidden", **precision(self))(cifar.average_pool(y)))
    return image, cifar.linear(self.outputs, self.feature_dim, name="classifier", **precision(self))(z)

  def _conv(self, x: Array, features: int, name: str) -> Array:
    bias = torch_bias(9 * x.shape[-1])
    return cifar.conv(features, 3, bias_init=bias, name=name, **precision(self))(x)


def resnet32(modules: int, num_classes: int = 10, **changes: Any) -> MomentumAuxiliary:
  """ResNet-32; `modules` is the paper's 1, 2, 3, 4, 8 or 16; changes are attributes of `MomentumAuxiliary`."""
  return _resnet(32, modules, num_classes, changes)


def resnet110(modules: int, num_classes: int = 10, **changes: Any) -> MomentumAuxiliary:
  """ResNet-110; `modules` is the paper's 1, 2, 3, 4, 8, 16, 32 or 55; changes are attributes."""
  return _resnet(110, modules, num_classes, changes)


def _resnet(layers: int, modules: int, num_classes: int, changes: dict[str, Any]) -> MomentumAuxiliary:
  return MomentumAuxiliary(cifar.resnet(layers), num_classes, cuts=published_cuts(layers, modules), **changes)


def published_cuts(layers: int, modules: int) -> tuple[int, ...]:
  """The last unit of each module, for the `layers` and `modules` of `CUTS`."""
  table = CUTS[checks.choice("layers", layers, tuple(CUTS))]
  blocks = (layers - 2) // 6
  cuts = table[checks.choice("modules", modules, tuple(table))]
  return tuple((stage - 1) * blocks + block + 1 for stage, block in cuts)


def linear_weights(modules: int, first: tuple[float, float], last: tuple[float, float]) -> list[tuple[float, float]]:
  """InfoPro's rule: (a_j, b_j) in equal steps from `first`, of module 1, to `last`, of module K - 1.

  Args:
    modules: K, the last included.
    first: of reconstruction and of classification.
    last: the same. With a last of (0, 0), as in the released command, module K - 1 is not trained.
  """
  checks.count("modules", modules)
  ratios = [j / (modules - 2) if modules > 2 else 0.0 for j in range(modules - 1)]
  return [_mixed(first, last, r) for r in ratios]


def stage_weights(
  model: MomentumAuxiliary, modules: int, first: tuple[float, float], last: tuple[float, float]
) -> list[tuple[float, float]]:
  """The official code's rule: steps by the stage s = 1, 2, 3 of n(j), (1 - r) first + r last with r = s / (K - 2).

  Args:
    model: a ResNet with cuts.
    modules: K, the number that the code is given: 16 for 15 modules.
    first: of reconstruction and of classification.
    last: the same.

  Raises:
    ValueError: a network without the three stages of a ResNet; a weight below zero, as it gives for few modules.
  """
  checks.count("modules", modules)
  blocks = len(model.backbone) - 1
  if model.backbone.kind != "resnet" or blocks % 3:
    raise ValueError(f"model: got a {model.backbone.kind!r} of {blocks + 1} units, expected a ResNet of three stages")
  stages = [_next(model, j)[0] for j in range(model.num_modules - 1)]
  weights = [_mixed(first, last, s / (modules - 2) if modules > 2 else 0.0) for s in stages]
  if any(min(pair) < 0 for pair in weights):
    raise ValueError(f"modules: got {modules}, whose weights would be {weights}, expected enough for none below 0")
  return weights


def _mixed(first: tuple[float, float], last: tuple[float, float], r: float) -> tuple[float, float]:
  return first[0] * (1 - r) + last[0] * r, first[1] * (1 - r) + last[1] * r


def learner(
  model: MomentumAuxiliary,
  tx: optax.GradientTransformation,
  weights: Weights,
  *,
  momentum: float = 0.995,
  mean: Sequence[float] = MEAN,
  std: Sequence[float] = STD,
) -> train.Learner:
  """Local training with averages; see `local.learner`.

  Args:
    model: the network.
    tx: the optimizer, in the paper `local.sgd(local.schedule(0.8, 400, ...))`.
    weights: (a_j, b_j) of all modules but the last.
    momentum: m; not used by a network without averages.
    mean: of pixels in [0, 1], by which the images were normalised.
    std: the same.

  Returns:
    A learner on batches of `image`, normalised, and `label`.

  Raises:
    ValueError: weights of another number or below zero, a momentum outside [0, 1]; from `step`, images that are not of
      the model's `image_size`.
  """
  weights = [(float(a), float(b)) for a, b in weights]
  if len(weights) != model.num_modules - 1 or any(min(pair) < 0 for pair in weights):
    raise ValueError(f"weights: got {weights}, expected {model.num_modules - 1} pairs of numbers of at least 0")
  if not len(mean) == len(std) == model.in_channels or min(std) <= 0:
    raise ValueError(f"mean, std: got {mean}, {std}, expected {model.in_channels} channels, and deviations above 0")
  checks.real("momentum", momentum)
  cross_entropy = train.cross_entropy()

  def loss(index: int, output: Any, batch: train.Batch) -> tuple[Float[Array, ""], train.Metrics]:
    if index == model.num_modules - 1:
      return cross_entropy(output, batch)
    pixels, guess = output
    if pixels.shape != batch["image"].shape:
      raise ValueError(f"image_size: got {model.image_size}, expected the side of the images {batch['image'].shape}")
    target = batch["image"] * jnp.asarray(std, jnp.float32) + jnp.asarray(mean, jnp.float32)
    painted = jnp.mean(optax.losses.sigmoid_binary_cross_entropy(pixels.astype(jnp.float32), target))
    if model.loss_mode == "contrast":
      classified = supervised_contrast(guess, batch["label"])
    else:
      classified = cross_entropy(guess, batch)[0]
    return weights[index][0] * painted + weights[index][1] * classified, {}

  averages = model.average and model.num_modules > 1
  return local.learner(model, loss, tx, momentum=momentum if averages else None)


def supervised_contrast(
  features: Float[Array, "b f"], labels: Int[Array, " b"], temperature: float = 0.07
) -> Float[Array, ""]:
  """Khosla et al. 2020: mean over examples of -log of the share that others of its class have in a softmax of cosines.

  Args:
    features: of one view of each example.
    labels: classes. An example without another of its class counts as 0.
    temperature: divides cosines.
  """
  z = features.astype(jnp.float32)
  squares = jnp.sum(z**2, -1, keepdims=True)
  z = z * jax.lax.rsqrt(jnp.where(squares > 1e-24, squares, 1.0))  # a row of zeros, whose norm has no gradient, stays
  others = ~jnp.eye(len(z), dtype=bool)
  log_share = jax.nn.log_softmax(jnp.where(others, z @ z.T / temperature, -jnp.inf), axis=-1)
  positive = others & (labels[:, None] == labels[None, :])
  total = jnp.sum(jnp.where(positive, log_share, 0.0), -1)
  return -jnp.mean(total / jnp.maximum(jnp.sum(positive, -1), 1))


def from_torch(state_dict: Mapping[str, Any], model: MomentumAuxiliary) -> dict[str, Any]:
  """Variables from the official code's state dict; the heads that it makes and never uses are left out.

  Args:
    state_dict: of `InfoProResNet`, as tensors or arrays.
    model: the same network. `params` has the averages too; `local.split_averages` takes them apart.

  Raises:
    ValueError: tensors that are missing, left over or of another shape; a network that the official code has not.
  """
  rules, per_stage = weight_table(model), (len(model.backbone) - 1) // 3
  used = {_next(model, j) for j in range(model.num_modules - 1)}
  ignore = ["Encoder_Net.*", "fc.*"]
  for stage, block in ((s, b) for s in (1, 2, 3) for b in range(per_stage)):
    if (stage, block) not in used:
      ignore += [f"decoder_{stage}_{block}.*", f"aux_classifier_{stage}_{block}.*"]
  return interop.variables(state_dict, rules, ignore=ignore)


def weight_table(model: MomentumAuxiliary) -> dict[str, interop.Rule]:
  """The table of the conversion."""
  if model.backbone.kind != "resnet" or not (model.bias and model.average):
    raise ValueError(f"model: got {model}, expected a ResNet with both blocks")
  backbone = model.backbone
  rules = cifar.resnet_weights(backbone, "params/units") | {"params/classifier": interop.dense("fc64")}
  for j, end in enumerate(model.cuts[:-1]):
    stage, block = _next(model, j)
    shortcut = backbone.strides[end + 1] != 1 or backbone.widths[end + 1] != backbone.widths[end]
    rules |= cifar.block_weights(f"params/biases_{j}", f"LB.{j}", shortcut)
    rules |= cifar.block_weights(f"params/averages_{j}", f"EMA_Net.{j}", shortcut)
    path, decoder, head = (
      f"params/heads_{j}",
      f"decoder_{stage}_{block}.decoder",
      f"aux_classifier_{stage}_{block}.head",
    )
    rules |= {
      f"{path}/decoder_in": interop.conv(f"{decoder}.0"),
      f"{path}/decoder_norm": interop.batch_norm(f"{decoder}.1"),
      f"{path}/decoder_out": interop.conv(f"{decoder}.3"),
    }
    for i in range(model.convolutions):
      rules |= cifar.conv_weights(f"{path}/convs_{i}", f"{head}.{3 * i}", f"{head}.{3 * i + 1}")
    after = 3 * model.convolutions + 2  # the mean and the flattening are layers there
    rules[f"{path}/hidden"] = interop.dense(f"{head}.{after}")
    rules[f"{path}/classifier"] = interop.dense(f"{head}.{after + 2}")
  return rules


def _next(model: MomentumAuxiliary, index: int) -> tuple[int, int]:
  """Stage and block of n(j)."""
  per_stage = (len(model.backbone) - 1) // 3
  return model.cuts[index] // per_stage + 1, model.cuts[index] % per_stage
