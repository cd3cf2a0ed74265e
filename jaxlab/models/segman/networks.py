"""The pyramid, the decoder, and the segmenter of both."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab import checks
from jaxlab.nn.attention import multi_head_attention
from jaxlab.nn.conv import Conv, DepthwiseConv
from jaxlab.nn.drop_path import DropPath, linear_rates
from jaxlab.nn.gelu import gelu
from jaxlab.nn.layer_norm import LayerNorm
from jaxlab.nn.module import check_images, precision
from jaxlab.nn.neighborhood_attention import neighborhood_attention
from jaxlab.nn.product import Dense
from jaxlab.nn.resize import resize
from jaxlab.nn.rotary import rotary_2d
from jaxlab.nn.scan_2d import SelectiveScan2D

_init = nn.initializers.truncated_normal(0.02)


class Mixer(nn.Module):
  """Local attention, then a scan of what it found, or attention to it from everywhere.

  Attributes:
    num_heads: heads; the channels of each are a multiple of 4.
    window: side of the neighbourhood, odd.
    global_tokens: None for the scan; for attention from everywhere the number of pixels that its bias is made for,
      which is resized to the pixels at hand.
    local: False leaves neighbourhood attention out, for ablations.
    scan: False leaves the scan out, likewise.
    dtype: compute dtype; softmax and scan run in float32.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  num_heads: int
  window: int
  global_tokens: int | None = None
  local: bool = True
  scan: bool = True
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b h w c"]:
    """Args: x, maps with sides of at least `window` if `local`. Returns maps of the same shape."""
    options = precision(self)
    batch, height, width, channels = x.shape
    heads, side = self.num_heads, 2 * self.window - 1
    dense: Any = functools.partial(Dense, kernel_init=_init, **options)
    local: Any = functools.partial(DepthwiseConv, kernel_init=_init, **options)

    q, k, v = jnp.split(dense(3 * channels, name="qkv")(x), 3, -1)
    position = local(5, name="lepe")(v)
    q, k = (rotary_2d(a, num_heads=heads) for a in (q, k))
    y = v
    if self.local:
      bias = self.param("local_bias", nn.initializers.zeros, (heads, side, side), self.param_dtype)
      y = neighborhood_attention(q, k, v, window=self.window, num_heads=heads, bias=bias)
    if not self.scan and self.global_tokens is None:
      out = y
    elif self.global_tokens is None:
      norm = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, axis_name=self.axis_name, name="conv_norm", **options)
      s = SelectiveScan2D(state_size=1, name="scan", **options)(nn.silu(norm(local(3, name="conv")(y))))
      out = y + LayerNorm(1e-6, name="norm", **options)(s)
    else:
      tokens, count = height * width, self.global_tokens
      bias = self.param("global_bias", nn.initializers.zeros, (heads, count, count), self.param_dtype)
      bias = resize(bias[..., None], (tokens, tokens), "cubic")[None, ..., 0]
      flat = (a.reshape(batch, tokens, channels) for a in (q, k, y))
      out = multi_head_attention(*flat, num_heads=heads, bias=bias.astype(y.dtype)).reshape(x.shape)
    return dense(channels, name="proj")(out + position)


class Mlp(nn.Module):
  """Two dense layers; between them u + DWConv(u) of u = GELU(first).

  Attributes:
    hidden: width between the layers.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  hidden: int
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Args: x, maps. Returns maps of the same shape."""
    options = precision(self)
    u = gelu(Dense(self.hidden, kernel_init=_init, name="fc1", **options)(x))
    u = u + DepthwiseConv(3, kernel_init=_init, name="conv", **options)(u)
    return Dense(x.shape[-1], kernel_init=_init, name="fc2", **options)(u)


class Block(nn.Module):
  """A mixer and an MLP, each behind a depthwise convolution that tells positions apart.

  Attributes:
    mixer: makes the mixer; None for the scan alone, as in the decoder.
    hidden: width of the MLP.
    drop_path: rate of both branches.
    layer_scale: initial value of learned scales (and biases from 0) of the branches; None for none.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  mixer: functools.partial[Mixer] | None
  hidden: int
  drop_path: float = 0.0
  layer_scale: float | None = None
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
    """Args: x, maps. `train` is positional for `nn.remat`. Returns maps of the same shape."""
    options = precision(self)
    local: Any = functools.partial(DepthwiseConv, 3, kernel_init=_init, **options)
    norm = functools.partial(LayerNorm, 1e-6, **options)

    def add(branch: Array, number: int) -> Array:
      if self.layer_scale is not None:
        start = nn.initializers.constant(self.layer_scale)
        scale = self.param(f"scale{number}", start, x.shape[-1:], self.param_dtype).astype(self.dtype)
        shift = self.param(f"shift{number}", nn.initializers.zeros, x.shape[-1:], self.param_dtype).astype(self.dtype)
        branch = branch * scale + shift
      return x + DropPath(self.drop_path)(branch, train=train)

    x = x + local(name="position1")(x)
    y = norm(name="norm1")(x)
    if self.mixer is None:
      x = add(SelectiveScan2D(state_size=1, name="mixer", **options)(y), 1)
    else:
      x = add(self.mixer(name="mixer")(y, train=train), 1)
    x = x + local(name="position2")(x)
    return add(Mlp(self.hidden, name="mlp", **options)(norm(name="norm2")(x)), 2)


class Encoder(nn.Module):
  """The pyramid: class logits, or maps at strides 4, 8, 16 and 32.

  Attributes:
    num_classes: outputs of the classifier; 0 for none, and maps.
    in_channels: channels of the images.
    widths: channels of each stage, divisible by its heads into multiples of 4.
    depths: blocks of each stage.
    heads: of each stage.
    windows: of each stage, odd.
    mlp_ratios: hidden width of the MLP of each stage, in units of its channels.
    global_tokens: pixels of the last stage that its global bias is made for: 49 at 224 x 224.
    local: False leaves neighbourhood attention out of every block, for ablations.
    scan: False leaves the scan out of every block, likewise.
    drop_path: rate of the last block, in [0, 1); rates grow linearly from 0. Training needs a "dropout" key if not 0.
    layer_scale: initial value of the scales of the branches; None for no scales.
    remat: recompute each block in the backward pass, for memory.
    dtype: compute dtype. Norms, softmax and scans accumulate in float32.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  num_classes: int = 1000
  in_channels: int = 3
  widths: Sequence[int] = (32, 64, 144, 192)
  depths: Sequence[int] = (2, 2, 4, 2)
  heads: Sequence[int] = (1, 2, 4, 8)
  windows: Sequence[int] = (11, 9, 9, 7)
  mlp_ratios: Sequence[float] = (4, 4, 3, 3)
  global_tokens: int = 49
  local: bool = True
  scan: bool = True
  drop_path: float = 0.0
  layer_scale: float | None = None
  remat: bool = False
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b k"] | tuple[Float[Array, "b i j d"], ...]:
    """Classifies images, or makes maps of them if `num_classes` is 0.

    Args:
      images: floats, normalised by the caller. With local attention, the map of each stage must be as large as its
        window.
      train: use batch statistics (mutable collection "batch_stats") and drop paths.

    Returns:
      Logits [B, num_classes], or a tuple of maps [B, h, w, width]; in `dtype`.

    Raises:
      ValueError: images of wrong rank, dtype, channels or size; attributes that contradict each other.
    """
    self._check(images)
    options = precision(self)
    norm: Any = functools.partial(
      nn.BatchNorm, not train, momentum=0.9, epsilon=1e-5, axis_name=self.axis_name, **options
    )  # fmt: skip
    down: Any = functools.partial(
      Conv, kernel_size=3, stride=2, padding=1, use_bias=False, kernel_init=_init, **options
    )  # fmt: skip
    same: Any = functools.partial(Conv, kernel_size=3, padding=1, use_bias=False, kernel_init=_init, **options)
    block: Any = nn.remat(Block, static_argnums=(2,)) if self.remat else Block

    x, half = images.astype(self.dtype), self.widths[0] // 2
    x = gelu(norm(name="stem_norm1")(down(half, name="stem_conv1")(x)))
    x = gelu(norm(name="stem_norm2")(same(half, name="stem_conv2")(x)))
    x = gelu(norm(name="stem_norm3")(down(self.widths[0], name="stem_conv3")(x)))
    x = norm(name="stem_norm4")(same(self.widths[0], name="stem_conv4")(x))
    maps = []
    for i, rates in enumerate(linear_rates(self.drop_path, self.depths)):
      width, last = self.widths[i], i == len(self.widths) - 1
      if i:
        x = norm(name=f"stage{i + 1}_norm")(down(width, name=f"stage{i + 1}_conv")(x))
      mixer = functools.partial(
        Mixer, self.heads[i], self.windows[i], self.global_tokens if last else None, self.local, self.scan,
        axis_name=self.axis_name, **options,
      )  # fmt: skip
      for j, rate in enumerate(rates):
        hidden = int(self.mlp_ratios[i] * width)
        x = block(mixer, hidden, rate, self.layer_scale, name=f"stage{i + 1}_block{j}", **options)(x, train)
      maps.append(x)
    if not self.num_classes:
      return tuple(maps)
    x = nn.silu(norm(name="head_norm")(Dense(1024, kernel_init=_init, name="head_proj", **options)(x)))
    return Dense(self.num_classes, kernel_init=_init, name="head", **options)(x.mean((1, 2)))

  def _check(self, images: Array) -> None:
    check_images(images, self.in_channels)
    for name in ("depths", "heads", "windows", "mlp_ratios"):
      if len(getattr(self, name)) != len(self.widths):
        raise ValueError(f"{name}: got {getattr(self, name)}, expected one a stage, {len(self.widths)}")
    for width, heads in zip(self.widths, self.heads, strict=True):
      if heads < 1 or width % (4 * heads):
        raise ValueError(f"widths: got {width}, expected a multiple of 4 channels for each of {heads} heads")
    if min(self.depths) < 1:
      raise ValueError(f"depths: got {self.depths}, expected at least one block a stage")
    for i, window in enumerate(self.windows if self.local else (1,)):  # without windows, any pixel will do
      least = window * 2 ** (i + 2) - 2 ** (i + 2) + 1  # sides are halved rounding up
      if min(images.shape[1:3]) < least:
        raise ValueError(
          f"images: got {images.shape[1]}x{images.shape[2]} pixels, expected at least {least}x{least} for window"
          f" {window} of stage {i + 1}"
        )
    if self.num_classes < 0:
      raise ValueError(f"num_classes: got {self.num_classes}, expected at least 0")
    checks.count("global_tokens", self.global_tokens)
    checks.rate("drop_path", self.drop_path)


class Decoder(nn.Module):
  """Maps of strides 8, 16 and 32 to logits at stride 8, see the package.

  Training needs a batch of at least 2, over all of `axis_name`: mean(f) is one value a channel and image, and BatchNorm
  makes 0 of a lone one.

  Attributes:
    num_classes: K.
    width: E.
    map_width: P, of each projected map.
    dropout: rate of whole channels before the logits, in [0, 1).
    dtype: compute dtype.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  num_classes: int
  width: int = 128
  map_width: int = 192
  dropout: float = 0.1
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, maps: Sequence[Float[Array, "b _ _ _"]], *, train: bool = False) -> Float[Array, "b h w k"]:
    """Segments.

    Args:
      maps: of strides 8, 16 and 32, of any channels; the sides of the first are multiples of 4.
      train: use batch statistics, and dropout, which needs a "dropout" key.

    Returns:
      Logits [B, H, W, K] of the first map's sides.

    Raises:
      ValueError: maps that do not fit, a single image to train on without `axis_name`, attributes out of range.
    """
    self._check(maps)
    if train and maps[0].shape[0] == 1 and self.axis_name is None:
      raise ValueError("maps: got a batch of 1 to train on, expected at least 2, as BatchNorm of one value is 0")
    options = precision(self)

    def relu_norm(y: Array, name: str) -> Array:
      norm = nn.BatchNorm(
        not train, momentum=0.9, epsilon=1e-5, axis_name=self.axis_name, name=f"{name}_norm", **options
      )  # fmt: skip
      return nn.relu(norm(y))

    def point(y: Array, features: int, name: str) -> Array:
      return relu_norm(Dense(features, use_bias=False, kernel_init=_init, name=name, **options)(y), name)

    def strided(y: Array, features: int, size: int, stride: int, name: str) -> Array:
      conv = Conv(features, size, stride, 1, use_bias=False, kernel_init=_init, name=name, **options)
      return relu_norm(conv(y), name)

    e, sides = self.width, maps[0].shape[1:3]
    dense: Any = functools.partial(Dense, kernel_init=_init, **options)
    c = [resize(dense(self.map_width, name=f"map{i + 2}")(m), sides) for i, m in enumerate(maps)]
    f = point(jnp.concatenate(c[::-1], -1), e, "fuse")
    pooled = point(f.mean((1, 2), keepdims=True), e, "pool")
    scales = [
      point(pixel_unshuffle(f, 4), e, "reduce1"),
      point(pixel_unshuffle(strided(f, 2 * e, 3, 2, "half"), 2), e, "reduce2"),
      point(strided(f, 4 * e, 5, 4, "quarter"), e, "reduce4"),
    ]
    m = Block(None, 12 * e, name="block", **options)(jnp.concatenate(scales, -1), train)
    m = resize(m, sides)
    shared = point(m, self.map_width, "spread")
    parts = [point(f, e, "short"), jnp.broadcast_to(pooled, f.shape), m, *(each + shared for each in c)]
    y = point(jnp.concatenate(parts, -1), e, "join")
    y = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(y)
    return dense(self.num_classes, name="head")(y)

  def _check(self, maps: Sequence[Array]) -> None:
    shapes = [m.shape for m in maps]
    if len(shapes) != 3 or any(len(shape) != 4 for shape in shapes):
      raise ValueError(f"maps: got {shapes}, expected three of shape [batch, height, width, channels]")
    if len({shape[0] for shape in shapes}) > 1:
      raise ValueError(f"maps: got {shapes}, expected one batch size")
    sides = [shape[1:3] for shape in shapes]
    if any(small[0] > large[0] or small[1] > large[1] for large, small in itertools.pairwise(sides)):
      raise ValueError(f"maps: got {shapes}, expected each no larger than the one before")
    if min(sides[-1]) < 1 or sides[0][0] % 4 or sides[0][1] % 4:
      raise ValueError(f"maps: got {shapes}, expected sides of the first that are multiples of 4, and no empty map")
    for name in ("num_classes", "width", "map_width"):
      checks.count(name, getattr(self, name))
    checks.rate("dropout", self.dropout)


class SegMAN(nn.Module):
  """Images to a class for each pixel. Training needs a batch of at least 2, see `Decoder`.

  Attributes:
    encoder: without classifier.
    decoder: its number of classes is that of the model.
  """

  encoder: Encoder
  decoder: Decoder

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"], *, train: bool = False, full_size: bool = True
  ) -> Float[Array, "b i j k"]:
    """Segments images.

    Args:
      images: floats, normalised by the caller; sides are multiples of 32.
      train: use batch statistics (mutable collection "batch_stats"), drop paths and dropout.
      full_size: resize the logits from stride 8 to the images' sides, bilinearly.

    Returns:
      Logits [B, H, W, K].

    Raises:
      ValueError: images of wrong rank, dtype, channels or size; an encoder with a classifier; what the parts raise.
    """
    if self.encoder.num_classes:
      raise ValueError(f"encoder: got one with {self.encoder.num_classes} classes, expected num_classes 0")
    check_images(images, self.encoder.in_channels)
    if images.shape[1] % 32 or images.shape[2] % 32:
      raise ValueError(f"images: got {images.shape[1]}x{images.shape[2]} pixels, expected multiples of 32")
    maps: Any = self.encoder(images, train=train)
    logits = self.decoder(maps[1:], train=train)
    return resize(logits, images.shape[1:3]) if full_size else logits


def pixel_unshuffle(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b i j d"]:
  """Squares of pixels as channels; channel (c, y, x) is c * side^2 + y * side + x, as PyTorch counts.

  Raises:
    ValueError: sides that `side` does not divide.
  """
  batch, height, width, channels = x.shape
  if height % side or width % side:
    raise ValueError(f"x: got {height}x{width} pixels, expected multiples of {side}")
  x = x.reshape(batch, height // side, side, width // side, side, channels)
  return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // side, width // side, -1)
