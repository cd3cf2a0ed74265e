"""STU-Net: a residual U-Net for volumes, in depth and width grown together from 14 million to 1.4 billion weights.

Six stages of widths w (1, 2, 4, 8, 16, 16) and n residual blocks each, joined by strides s_1 ... s_5. Norms are over
the voxels of one volume, without running statistics:

    block(x)  = LeakyReLU(Norm(Conv(LeakyReLU(Norm(Conv(x, stride))))) + skip(x))     Conv: 3x3x3;  skip: 1x1x1 or none
    e_0 = stage_0(x),   e_k = stage_k(e_{k-1}, s_k)                                           encoder, k = 1 ... 5
    d_5 = e_5,   d_k = stage'_k([repeat(d_{k+1}, s_{k+1}) W_k, e_k])                          decoder, k = 4 ... 0
    logits_k = d_k H_k                                                                        a head at every scale

Nothing that is resampled has weights of a window, and a stage that a task has no use for keeps its weights and takes
stride (1, 1, 1), so the weights of one task fit any other: only the heads are new (`transfer`).

Huang et al., "STU-Net: Scalable and Transferable Medical Image Segmentation Models Empowered by Large-Scale Supervised
Pre-training", 2023, arXiv:2304.06716. The training objective (`segmentation_loss`) and inference by overlapping patches
are those of nnU-Net (Isensee et al., Nature Methods 2021), on which the official code is built; see also
`jaxlab.nn.sliding_window`.

Differs from the official code: maps are upsampled after the 1x1x1 convolution instead of before, which gives the same
numbers for an eighth of the work; a deepest map of a single voxel, whose norm would be zero, is an error in evaluation
too. Its initialisation is that of the network for nnU-Net 1 (He normal); the port to nnU-Net 2 keeps PyTorch's default.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxlab import checks, interop, train
from jaxlab.nn.module import precision
from jaxlab.nn.volume import Conv3D, InstanceNorm, fan_in_normal

Triple = tuple[int, int, int]
SLOPE = 0.01  # of LeakyReLU below zero
HALVES: tuple[Triple, ...] = ((2, 2, 2),) * 5
# The published variants: w and n.
VARIANTS = {"S": (16, 1), "B": (32, 1), "L": (64, 2), "H": (96, 3)}

_he_init = fan_in_normal(2 / (1 + SLOPE**2))


class ResidualBlock(nn.Module):
  """Two normalised 3x3x3 convolutions beside the identity or, where shapes change, a 1x1x1 convolution.

  Attributes:
    features: output channels.
    strides: of the first convolution and the skip.
    project: whether the skip is a convolution.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  features: int
  strides: Triple = (1, 1, 1)
  project: bool = False
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b d h w c"]) -> Float[Array, "b i j k o"]:
    """Args: x, maps. Returns maps, smaller by the strides."""
    conv = functools.partial(Conv3D, self.features, kernel_init=_he_init, **precision(self))
    norm = functools.partial(InstanceNorm, **precision(self))
    y = norm(name="norm1", negative_slope=SLOPE)(conv(strides=self.strides, name="conv1")(x))
    y = norm(name="norm2")(conv(name="conv2")(y))
    if self.project:
      x = conv(kernel_size=1, strides=self.strides, name="skip")(x)
    return nn.leaky_relu(y + x, SLOPE)


class Stage(nn.Module):
  """Residual blocks in a row; the first one changes shape. Attributes as in `ResidualBlock`, and `depth`, how many."""

  features: int
  depth: int
  strides: Triple = (1, 1, 1)
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b d h w c"]) -> Float[Array, "b i j k o"]:
    """Args: x, maps. Returns maps, smaller by the strides."""
    block = functools.partial(ResidualBlock, self.features, **precision(self))
    x = block(strides=self.strides, project=True, name="block0")(x)
    for i in range(1, self.depth):
      x = block(name=f"block{i}")(x)
    return x


class STUNet(nn.Module):
  """Class logits of every voxel, at one scale or at all.

  Attributes:
    num_classes: outputs a voxel, background included.
    in_channels: channels of the volumes (modalities).
    widths: channels of each stage.
    depths: blocks of each stage, in encoder and decoder alike.
    strides: (depth, height, width) between stages, one fewer than stages; `fit_strides` makes them from any plan.
    deep_supervision: return the logits of all scales, not only the full one. The weights are the same either way.
    remat: recompute each stage in the backward pass, for memory.
    dtype: compute dtype. Norms accumulate in float32.
    param_dtype: parameter dtype.
  """

  num_classes: int
  in_channels: int = 1
  widths: Sequence[int] = (32, 64, 128, 256, 512, 512)
  depths: Sequence[int] = (1,) * 6
  strides: Sequence[Triple] = HALVES
  deep_supervision: bool = False
  remat: bool = False
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(
    self, volumes: Float[Array, "b d h w c"], *, train: bool = False
  ) -> Float[Array, "b d h w k"] | tuple[Float[Array, "b i j l k"], ...]:
    """Segments volumes.

    Args:
      volumes: floats, normalised by the caller; sides are multiples of the product of the strides.
      train: without effect, as nothing here differs in training.

    Returns:
      Logits [B, D, H, W, num_classes] or, under deep supervision, a tuple of them from the full scale to the coarsest
      of the decoder; in `dtype`.

    Raises:
      ValueError: volumes of wrong rank, dtype, channels or sides; attributes that contradict each other.
    """
    self._check(volumes)
    options = precision(self)
    stage: Any = functools.partial(nn.remat(Stage) if self.remat else Stage, **options)
    point: Any = functools.partial(Conv3D, kernel_size=1, kernel_init=_he_init, **options)
    strides = ((1, 1, 1), *(tuple(s) for s in self.strides))

    x, skips = volumes.astype(self.dtype), []
    for k, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
      x = stage(width, depth, strides[k], name=f"encoder{k}")(x)
      skips.append(x)
    outputs = []
    for k in reversed(range(len(self.widths) - 1)):
      up = repeat(point(self.widths[k], name=f"up{k}")(x), strides[k + 1])
      x = stage(self.widths[k], self.depths[k], name=f"decoder{k}")(jnp.concatenate([up, skips[k]], -1))
      outputs.append(point(self.num_classes, name=f"head{k}")(x))
    return tuple(outputs[::-1]) if self.deep_supervision else outputs[-1]

  def _check(self, volumes: Array) -> None:
    if volumes.ndim != 5:
      raise ValueError(f"volumes: got shape {volumes.shape}, expected [batch, depth, height, width, channels]")
    if not jnp.issubdtype(volumes.dtype, jnp.floating):
      raise ValueError(f"volumes: got dtype {volumes.dtype}, expected floats, already normalised")
    if volumes.shape[-1] != self.in_channels:
      raise ValueError(f"volumes: got {volumes.shape[-1]} channels, expected in_channels, {self.in_channels}, last")
    if self.num_classes < 1:
      raise ValueError(f"num_classes: got {self.num_classes}, expected at least 1")
    stages = len(self.widths)
    if stages < 2:
      raise ValueError(f"widths: got {self.widths}, expected one a stage, of at least 2")
    if len(self.depths) != stages or min(self.depths) < 1:
      raise ValueError(f"depths: got {self.depths}, expected at least one block for each of {stages} stages")
    if len(self.strides) != stages - 1 or any(len(s) != 3 or min(s) < 1 for s in self.strides):
      raise ValueError(f"strides: got {self.strides}, expected {stages - 1} triples of positive integers")
    whole = np.prod(np.array(self.strides), 0)
    if (np.array(volumes.shape[1:4]) % whole).any():
      raise ValueError(f"volumes: got sides {volumes.shape[1:4]}, expected multiples of {tuple(map(int, whole))}")
    if math.prod(volumes.shape[1:4]) == math.prod(whole):
      raise ValueError(f"volumes: got sides {volumes.shape[1:4]}, expected more than one voxel in the deepest map")


def repeat(x: Float[Array, "b d h w c"], times: Sequence[int]) -> Float[Array, "b i j k c"]:
  """Every voxel `times` times along each axis: upsampling to the nearest."""
  b, *sides, c = x.shape
  apart = [n for side in sides for n in (side, 1)]
  wide = [n for side, t in zip(sides, times, strict=True) for n in (side, t)]
  whole = [side * t for side, t in zip(sides, times, strict=True)]
  return jnp.broadcast_to(x.reshape(b, *apart, c), (b, *wide, c)).reshape(b, *whole, c)


def stu_net(variant: Literal["S", "B", "L", "H"], num_classes: int = 105, **overrides: Any) -> STUNet:
  """A published network; with one channel and 105 classes, 14,596,941 (S) to 1,457,326,221 (H) parameters.

  Args:
    variant: "S", "B", "L" or "H".
    num_classes: outputs; 105 are the structures of TotalSegmentator and the background.
    **overrides: other attributes of `STUNet`.

  Raises:
    ValueError: an unknown variant.
  """
  width, depth = VARIANTS[checks.choice("variant", variant, VARIANTS)]
  shape = {"widths": scaled_widths(width), "depths": (depth,) * 6}
  return STUNet(**{"num_classes": num_classes, **shape, **overrides})


def scaled_widths(width: int) -> tuple[int, ...]:
  """Channels of the six stages for a first stage of `width`."""
  return tuple(width * factor for factor in (1, 2, 4, 8, 16, 16))


def fit_strides(plan: Sequence[Sequence[int]], stages: int = 6) -> tuple[Triple, ...]:
  """The strides for a network of `stages` from a plan of any length: the first ones, then (1, 1, 1)."""
  triples = [(int(d), int(h), int(w)) for d, h, w in plan[: stages - 1]]
  return (*triples, *((1, 1, 1),) * (stages - 1 - len(triples)))


def multiply_adds(model: STUNet, sides: Sequence[int]) -> int:
  """Multiplications (each with an addition) of the official network's convolutions, for one volume.

  Upsampled maps count at the full size, as they are convolved there officially. Norms count nothing.

  Args:
    model: the network.
    sides: depth, height and width of the volume.
  """
  voxels, total, channels = math.prod(sides), 0, model.in_channels
  sizes = [voxels]
  for stride in model.strides:
    sizes.append(sizes[-1] // math.prod(stride))

  def stage(size: int, inputs: int, width: int, depth: int) -> int:
    return size * width * (27 * inputs + 27 * width + inputs + (depth - 1) * 54 * width)

  for size, width, depth in zip(sizes, model.widths, model.depths, strict=True):
    total += stage(size, channels, width, depth)
    channels = width
  for size, width, depth in list(zip(sizes, model.widths, model.depths, strict=True))[-2::-1]:
    total += size * channels * width + stage(size, 2 * width, width, depth) + size * width * model.num_classes
    channels = width
  return total


# The objective.


def soft_dice(
  logits: Float[Array, "b *voxels k"], labels: Int[Array, "b *voxels"], *, batch_dice: bool = True
) -> Float[Array, ""]:
  """Soft Dice coefficient, the mean over all classes but the background (class 0).

      dice_c = (2 TP_c + e) / (2 TP_c + FP_c + FN_c + e + 1e-8),   e = 1e-5

  with TP, FP and FN summed from softmax probabilities.

  Args:
    logits: of each voxel, over at least two classes.
    labels: class of each voxel.
    batch_dice: sum over all volumes of the batch; else over each, then take the mean of their coefficients.

  Returns:
    In [0, 1], float32. A class that is neither there nor predicted counts as (nearly) 1.

  Raises:
    ValueError: shapes that do not fit together.
  """
  _check_labels(logits, labels)
  if logits.shape[-1] < 2:
    raise ValueError(f"logits: got {logits.shape[-1]} classes, expected a background and at least one other")
  p = jnp.exp(jax.nn.log_softmax(logits.astype(jnp.float32)))  # as the cross entropy has it: computed once for both
  truth = labels[..., None] == jnp.arange(logits.shape[-1])
  axes = tuple(range(0 if batch_dice else 1, labels.ndim))
  hit = jnp.where(truth, p, 0).sum(axes)[..., 1:]
  either = (p + truth).sum(axes)[..., 1:]  # 2 TP + FP + FN
  return jnp.mean((2 * hit + 1e-5) / (either + 1e-5 + 1e-8))


def dice_cross_entropy(
  logits: Float[Array, "b *voxels k"], labels: Int[Array, "b *voxels"], *, batch_dice: bool = True
) -> Float[Array, ""]:
  """Mean cross entropy over voxels minus `soft_dice`, in float32. Arguments and errors are those of `soft_dice`."""
  dice = soft_dice(logits, labels, batch_dice=batch_dice)
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  truth = labels[..., None] == jnp.arange(logits.shape[-1])
  return -jnp.where(truth, log_p, 0).sum() / labels.size - dice


def supervision_weights(scales: int) -> tuple[float, ...]:
  """1, 1/2, 1/4 ... over the scales from the full one, the last 0 (if it is not the only one); they sum to 1."""
  weights = [0.5**i for i in range(scales)]
  if scales > 1:
    weights[-1] = 0.0
  return tuple(w / sum(weights) for w in weights)


def segmentation_loss(*, batch_dice: bool = True) -> train.Loss:
  """`dice_cross_entropy` for `train.supervised`, with deep supervision if the network gives several scales.

  Args:
    batch_dice: as in `soft_dice`.

  Returns:
    (logits or a tuple of them from the full scale down, batch with "label" [B, D, H, W]) -> (loss, {"dice"}): the
    mean over scales by `supervision_weights` against labels taken from the nearest voxel, and the soft Dice of the full
    scale.
  """

  def loss(outputs: Any, batch: Any) -> tuple[Float[Array, ""], dict[str, Array]]:
    scales = outputs if isinstance(outputs, tuple) else (outputs,)
    total = jnp.zeros(())
    for logits, weight in zip(scales, supervision_weights(len(scales)), strict=True):
      if weight:
        labels = nearest_labels(batch["label"], logits.shape[1:-1])
        total += weight * dice_cross_entropy(logits, labels, batch_dice=batch_dice)
    return total, {"dice": soft_dice(scales[0], batch["label"], batch_dice=batch_dice)}

  return loss


def nearest_labels(labels: Int[Array, "b *voxels"], sides: Sequence[int]) -> Int[Array, "b *fewer"]:
  """Labels at fewer voxels: the one in the middle of each block, the later of two middles.

  Args:
    labels: class of each voxel.
    sides: of the result; divide those of the labels.

  Raises:
    ValueError: sides that do not divide.
  """
  if len(sides) != labels.ndim - 1 or any(n % m for n, m in zip(labels.shape[1:], sides, strict=True)):
    raise ValueError(f"labels: got sides {labels.shape[1:]}, expected multiples of {tuple(sides)}")
  steps = [n // m for n, m in zip(labels.shape[1:], sides, strict=True)]
  return labels[:, *(slice(step // 2, None, step) for step in steps)]


def _check_labels(logits: Array, labels: Array) -> None:
  if logits.shape[:-1] != labels.shape:
    raise ValueError(f"labels: got shape {labels.shape}, expected {logits.shape[:-1]} for logits {logits.shape}")
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"labels: got dtype {labels.dtype}, expected whole numbers")


# Weights.


def transfer(pretrained: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
  """Variables for a new task: those of a trained network, but with the heads of a new one.

  A network trained on one channel serves any number of them: the kernels that see the volume are repeated along their
  inputs, without division, as in the official code; the norm behind the first convolution undoes the larger scale.

  Args:
    pretrained: variables of a network of the same widths and depths; classes and strides do not matter.
    target: variables of the new network, freshly initialised.

  Returns:
    Variables like `target`.

  Raises:
    ValueError: arrays that are missing, that have no place in `target` or are of other shapes, all in one message.
  """
  old = dict(jax.tree_util.tree_leaves_with_path(pretrained["params"]))
  wrong: list[str] = []

  def label(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")

  def take(path: Any, new: Array) -> Array:
    name = label(path)
    if name.startswith("head"):
      return new
    if path not in old:
      wrong.append(f"{name} is missing")
      return new
    array = jnp.asarray(old[path])
    if name in ("encoder0/block0/conv1/kernel", "encoder0/block0/skip/kernel") and array.shape[3] == 1:
      array = jnp.repeat(array, new.shape[3], axis=3)
    if array.shape != new.shape:
      wrong.append(f"{name} is {array.shape}, expected {new.shape}")
    return array.astype(new.dtype)

  params = jax.tree_util.tree_map_with_path(take, target["params"])
  places = dict(jax.tree_util.tree_leaves_with_path(target["params"]))
  wrong += [f"{label(path)} has no place" for path in old if path not in places and not label(path).startswith("head")]
  if wrong:
    raise ValueError(f"pretrained: got {len(wrong)} mismatches, expected a network of the same stages: {wrong}")
  return {**target, "params": params}


def from_torch(state_dict: Mapping[str, Any]) -> dict[str, PyTree]:
  """Official weights as flax variables, from either nnU-Net version.

  Args:
    state_dict: official names -> NumPy arrays or tensors, of any variant.

  Returns:
    {"params"} for the network that the names belong to.

  Raises:
    ValueError: names missing, left over or misshaped, all in one message.
  """
  blocks = [re.match(r"conv_blocks_context\.(\d+)\.(\d+)\.", name) for name in state_dict]
  depths: dict[int, int] = {}
  for stage, block in (map(int, match.groups()) for match in blocks if match):
    depths[stage] = max(depths.get(stage, 0), block + 1)
  return interop.variables(state_dict, weight_table([depths.get(k, 1) for k in range(max(depths, default=5) + 1)]))


def weight_table(depths: Sequence[int] = (1,) * 6) -> dict[str, interop.Rule]:
  """Which official tensor is which variable, for `interop.variables` and `interop.state_dict`; depths as in STUNet."""
  table, last = {}, len(depths) - 1
  for k, depth in enumerate(depths):
    u = last - 1 - k  # the official decoder counts from the deepest
    stages = {f"encoder{k}": f"conv_blocks_context.{k}"}
    if k < last:
      stages[f"decoder{k}"] = f"conv_blocks_localization.{u}"
      table[f"up{k}"] = interop.conv(f"upsample_layers.{u}.conv")
      table[f"head{k}"] = interop.conv(f"seg_outputs.{u}")
    for path, name in stages.items():
      for i in range(depth):
        table |= {f"{path}/block{i}/conv{j}": interop.conv(f"{name}.{i}.conv{j}") for j in (1, 2)}
        table |= {f"{path}/block{i}/norm{j}": interop.norm(f"{name}.{i}.norm{j}") for j in (1, 2)}
      table[f"{path}/block0/skip"] = interop.conv(f"{name}.0.conv3")
  return {f"params/{path}": rule for path, rule in table.items()}
