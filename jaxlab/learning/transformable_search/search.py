"""The network in which all widths and depths share weights: sampling, and two widths of each convolution mixed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxlab import interop
from jaxlab.learning.transformable_search.space import (
  CHOICES,
  Architecture,
  Block,
  Space,
  check_architecture,
  check_inputs,
  width_choices,
)
from jaxlab.models.backbones import cifar
from jaxlab.nn.module import precision


class Sample(NamedTuple):
  """One draw from an architecture, for a whole batch.

  Attributes:
    indices: two unequal choices of width for each convolution.
    weights: of the two, adding up to 1; they carry the gradient.
    depths: weights of all choices of depth in each stage, adding up to 1; they carry the gradient.
  """

  indices: Int[Array, "n 2"]
  weights: Float[Array, "n 2"]
  depths: Float[Array, "3 d"]


def sample(architecture: Architecture, key: Key[Array, ""], temperature: Float[Array, ""] | float) -> Sample:
  """Two widths a convolution and soft depths.

  Args:
    architecture: logits a.
    key: of the noise.
    temperature: tau; with 0 or less there is no noise in the weights, but widths are still drawn.
  """
  width_key, draw_key, depth_key = jax.random.split(key, 3)
  logits = _perturbed(architecture.widths, width_key, temperature)
  # The two largest of log p plus Gumbel noise are two draws without replacement; the noise must be independent of the
  # one that is in p.
  scores = jnp.log(jax.nn.softmax(logits) + 1e-7) + jax.random.gumbel(draw_key, logits.shape)
  indices = jax.lax.top_k(jax.lax.stop_gradient(scores), 2)[1]
  weights = jax.nn.softmax(jnp.take_along_axis(logits, indices, -1))
  return Sample(indices, weights, jax.nn.softmax(_perturbed(architecture.depths, depth_key, temperature)))


def _perturbed(logits: Float[Array, "n c"], key: Key[Array, ""], temperature: Any) -> Float[Array, "n c"]:
  """l = (log_softmax(a) + u) / tau."""
  logits = logits.astype(jnp.float32)
  noisy = jax.nn.log_softmax(logits) + jax.random.gumbel(key, logits.shape)
  return jnp.where(temperature > 0, noisy / jnp.where(temperature > 0, temperature, 1.0), logits)


def interpolation(channels: Int[Array, "*n"], wanted: Int[Array, "*n"], size: int) -> Float[Array, "*n size size"]:
  """CWI: the matrix [out, in] that maps the first `channels` of `size` channels to the first `wanted`.

  Output o is the mean over inputs floor(o c / m) .. ceil((o + 1) c / m) - 1, as in adaptive average pooling; the
  identity where c = m. Everything beyond is zero.

  Args:
    channels: c, at least 1.
    wanted: m, at least 1.
    size: of the padded channels, no less than both.
  """
  c, m, place = jnp.asarray(channels)[..., None], jnp.asarray(wanted)[..., None], jnp.arange(size)
  low, high = place * c // m, -(-(place + 1) * c // m)
  inside = (place >= low[..., None]) & (place < high[..., None]) & (place < m)[..., None]
  return inside / jnp.maximum(high - low, 1)[..., None].astype(jnp.float32)


class MixedConv(nn.Module):
  """A convolution at full width, two of its eight normalisations, aligned by CWI and added up.

      y = sum_j w_j CWI(BN_j(conv(x)[:c_j]), max(c_1, c_2))

  All eight see the same output, so batch statistics are computed once; in a channel BN_j is gain_j y + offset_j, and
  so the whole is one matrix of full width after the convolution. Scales, biases and statistics of the eight lie one
  after the other in flat arrays of sum_k c_k entries.

  Attributes:
    choices: the eight widths.
    kernel: side of the window.
    stride: of the convolution.
    halve: whether the image is first averaged over 2 x 2 pixels.
    act: whether a ReLU follows.
    momentum: of the running statistics, of the two sampled choices.
    epsilon: added to the variance.
    dtype: compute dtype; statistics are float32.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  choices: tuple[int, ...]
  kernel: int
  stride: int = 1
  halve: bool = False
  act: bool = False
  momentum: float = 0.9
  epsilon: float = 1e-5
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w i"], indices: Int[Array, " 2"], weights: Float[Array, " 2"], *, train: bool
  ) -> tuple[Float[Array, "b u v o"], Int[Array, ""]]:
    """Images of full width, zero beyond their channels -> the same, and how many channels there are."""
    size, total = self.choices[-1], sum(self.choices)
    if self.halve:
      x = nn.avg_pool(x, (2, 2), (2, 2))
    y = cifar.conv(size, self.kernel, self.stride, use_bias=False, name="conv", **precision(self))(x)

    scale = self.param("scale", nn.initializers.ones, (total,), self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, (total,), self.param_dtype)
    mean = self.variable("batch_stats", "mean", jnp.zeros, (total,), jnp.float32)
    var = self.variable("batch_stats", "var", jnp.ones, (total,), jnp.float32)
    counts = jnp.asarray(self.choices)[indices]
    rows = lambda flat: self._rows(flat.astype(jnp.float32), indices, counts)
    if train:
      center, spread = self._statistics(y, mean, var, indices)
    else:
      center, spread = rows(mean.value), rows(var.value)

    gain = rows(scale) * jax.lax.rsqrt(spread + self.epsilon)
    offset = rows(bias) - center * gain
    aligned = weights[:, None, None] * interpolation(counts, jnp.max(counts), size)
    matrix = jnp.einsum("joi,ji->io", aligned, gain).astype(self.dtype)
    shift = jnp.einsum("joi,ji->o", aligned, offset).astype(self.dtype)
    y = y @ matrix + shift
    return nn.relu(y) if self.act else y, jnp.max(counts)

  def _rows(self, flat: Float[Array, " t"], indices: Int[Array, " 2"], counts: Int[Array, " 2"]) -> Array:
    """The two choices' parts of a flat array [2, full width], zero beyond their widths."""
    size = self.choices[-1]
    starts = jnp.asarray(np.cumsum((0, *self.choices[:-1])))[indices]
    padded = jnp.pad(flat, (0, size))
    parts = [jax.lax.dynamic_slice(padded, (starts[j],), (size,)) for j in range(2)]
    return jnp.where(jnp.arange(size) < counts[:, None], jnp.stack(parts), 0.0)

  def _statistics(
    self, y: Float[Array, "b u v o"], mean: nn.Variable, var: nn.Variable, indices: Int[Array, " 2"]
  ) -> tuple[Float[Array, " o"], Float[Array, " o"]]:
    """Mean and (biased) variance of the batch; moves the running ones of the sampled choices, by the unbiased."""
    wide, count = y.astype(jnp.float32), y.size // y.shape[-1]
    moments = jnp.stack([wide.mean((0, 1, 2)), (wide * wide).mean((0, 1, 2))])
    running = not self.is_initializing()
    if self.axis_name is not None and running:
      moments = jax.lax.pmean(moments, self.axis_name)
      count *= jax.lax.axis_size(self.axis_name)
    center, spread = moments[0], jnp.maximum(moments[1] - moments[0] ** 2, 0.0)
    if running:
      number = np.repeat(np.arange(CHOICES), self.choices)  # choice and channel of each entry
      channel = np.concatenate([np.arange(c) for c in self.choices])
      sampled = (number == indices[0]) | (number == indices[1])
      for kept, new in ((mean, center), (var, spread * (count / max(count - 1, 1)))):
        moved = self.momentum * kept.value + (1 - self.momentum) * jax.lax.stop_gradient(new)[channel]
        kept.value = jnp.where(sampled, moved, kept.value)
    return center, spread


class MixedBlock(nn.Module):
  """A residual block of mixed convolutions; its shortcut, if it has one, has the last one's widths.

  Attributes:
    block: which.
    dtype: compute dtype.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  block: Block
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b h w i"],
    channels: Int[Array, ""],
    indices: Int[Array, "k 2"],
    weights: Float[Array, "k 2"],
    *,
    train: bool,
  ) -> tuple[Float[Array, "b u v o"], Int[Array, ""]]:
    """Images and the number of their channels -> the same. Unequal numbers are added as far as both go."""
    block, options = self.block, {**precision(self), "axis_name": self.axis_name}
    h, last = x, len(block.kernels) - 1
    for i, (kernel, stride) in enumerate(zip(block.kernels, block.strides, strict=True)):
      conv = MixedConv(width_choices(block.widths[i + 1]), kernel, stride, act=i < last, name=f"convs_{i}", **options)
      h, count = conv(h, indices[i], weights[i], train=train)
    if block.shortcut:
      conv = MixedConv(width_choices(block.widths[-1]), 1, halve=block.stride == 2, name="shortcut", **options)
      x, channels = conv(x, indices[last], weights[last], train=train)
    return nn.relu(x + h), jnp.maximum(channels, count)


class SearchNetwork(nn.Module):
  """The network of shared weights.

  Attributes:
    space: what is searched.
    dtype: compute dtype.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  space: Space
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, images: Float[Array, "b h w c"], drawn: Sample, *, train: bool = False) -> Float[Array, "b k"]:
    """Logits of the sampled mixture.

    Raises:
      ValueError: images that are not floats [B, S, S, C] of the space's size, a sample of another space.
    """
    space, options = self.space, {**precision(self), "axis_name": self.axis_name}
    check_inputs(space, images)
    pair = (len(space.convolutions), 2)
    expected = (pair, pair, (3, len(space.depths)))
    if (got := tuple(part.shape for part in drawn)) != expected:
      raise ValueError(f"drawn: got indices, weights and depths of shapes {got}, expected {expected}")
    stem = MixedConv(width_choices(space.widths[0]), 3, act=True, name="stem", **options)
    x, channels = stem(images.astype(self.dtype), drawn.indices[0], drawn.weights[0], train=train)
    ends: list[tuple[Array, Array]] = []  # of the stage, at the depths that it may have
    for i, block in enumerate(space.layout):
      span = slice(block.first, block.first + len(block.kernels))
      mixed = MixedBlock(block, name=f"blocks_{i}", **options)
      x, channels = mixed(x, channels, drawn.indices[span], drawn.weights[span], train=train)
      if block.position in space.depths:
        ends.append((x, channels))
      if block.position == space.blocks:
        x, channels = self._merged(ends, drawn.depths[block.stage])
        ends = []
    h = cifar.average_pool(x)
    return nn.Dense(space.num_classes, kernel_init=nn.initializers.normal(0.01), name="classifier", **precision(self))(
      h
    )

  def _merged(self, ends: Sequence[tuple[Array, Array]], weights: Float[Array, " d"]) -> tuple[Array, Array]:
    """sum_k p_k CWI(x_k, the largest number of channels)."""
    counts = jnp.stack([count for _, count in ends])
    widest = jnp.max(counts)
    matrices = weights[:, None, None] * interpolation(counts, widest, ends[0][0].shape[-1])
    return sum(x @ m.T.astype(x.dtype) for (x, _), m in zip(ends, matrices, strict=True)), widest


def from_torch(state_dict: Mapping[str, Any], space: Space) -> tuple[dict[str, Any], Architecture]:
  """Variables and logits from the official code's state dict.

  Args:
    state_dict: of `SearchShapeCifarResNet`, as tensors or arrays.
    space: the same network's.

  Raises:
    ValueError: tensors that are missing, left over or of another shape.
  """
  paths = {"params/stem": "layers.0"}
  names = ("conv_1x1", "conv_3x3", "conv_1x4") if space.bottleneck else ("conv_a", "conv_b")
  for i, block in enumerate(space.layout):
    paths |= {f"params/blocks_{i}/convs_{j}": f"layers.{i + 1}.{name}" for j, name in enumerate(names)}
    if block.shortcut:
      paths[f"params/blocks_{i}/shortcut"] = f"layers.{i + 1}.downsample"
  together, rules = {}, {"params/classifier": interop.dense("classifier")}
  for path, name in paths.items():
    rules[f"{path}/conv"] = interop.conv(f"{name}.conv", False)
    rules[path] = interop.batch_norm(f"{name}.BNs")
    for kind in ("weight", "bias", "running_mean", "running_var"):
      together[f"{name}.BNs.{kind}"] = [f"{name}.BNs.{k}.{kind}" for k in range(CHOICES)]
  rules |= {f"architecture/{kind}": interop.raw(f"{kind[:-1]}_attentions") for kind in ("widths", "depths")}
  made = interop.variables(interop.joined(state_dict, together), rules, ignore=["*.choices_tensor"])
  architecture = Architecture(**made.pop("architecture"))
  check_architecture(space, architecture)
  return made, architecture
