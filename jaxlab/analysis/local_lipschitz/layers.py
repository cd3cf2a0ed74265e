"""Chains of affine layers with ReLU between them, and products with their matrices that are never formed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from jaxlab import checks, interop

_HIGHEST = jax.lax.Precision.HIGHEST  # a bound from truncated products would be no bound


@struct.dataclass
class Dense:
  """z = W x + b on all of x, flattened; fields as of `flax.linen.Dense`: `Dense(**params["Dense_0"])`.

  Attributes:
    kernel: W transposed, [in, out].
    bias: [out].
  """

  kernel: Float[Array, "i o"]
  bias: Float[Array, " o"]


@struct.dataclass
class Conv:
  """z = w * x + b on x [H, W, in]; fields as of `flax.linen.Conv`: `Conv(**params["Conv_0"], strides=(2, 2))`.

  Attributes:
    kernel: [h, w, in, out].
    bias: [out].
    strides: of the two axes, or one for both.
    padding: "SAME", "VALID" or ((before, after), (before, after)).

  Raises:
    ValueError: strides below 1, another padding.
  """

  kernel: Float[Array, "h w i o"]
  bias: Float[Array, " o"]
  strides: int | tuple[int, int] = struct.field(pytree_node=False, default=(1, 1))
  padding: str | tuple[tuple[int, int], ...] = struct.field(pytree_node=False, default="SAME")

  def __post_init__(self) -> None:
    """Checks the strides and the padding."""
    strides = self.strides if isinstance(self.strides, Sequence) else (self.strides,) * 2
    if len(strides) != 2:
      raise ValueError(f"strides: got {self.strides}, expected one for each of two axes")
    object.__setattr__(self, "strides", tuple(checks.count("strides", stride) for stride in strides))
    if self.padding in ("SAME", "VALID"):
      return
    pairs = self.padding if isinstance(self.padding, Sequence) else ()
    if [np.shape(pair) for pair in pairs] != [(2,), (2,)]:
      raise ValueError(f"padding: got {self.padding!r}, expected 'SAME', 'VALID' or two pairs (before, after)")
    object.__setattr__(self, "padding", tuple(tuple(checks.count("padding", n, 0) for n in pair) for pair in pairs))


Layer: TypeAlias = Dense | Conv
Network: TypeAlias = Sequence[Layer]  # ReLU after every layer but the last


class Bounds(NamedTuple):
  """lower <= what is bounded <= upper, elementwise."""

  lower: Float[Array, "*shape"]
  upper: Float[Array, "*shape"]

  def intersect(self, other: "Bounds") -> "Bounds":
    """What both allow."""
    return Bounds(jnp.maximum(self.lower, other.lower), jnp.minimum(self.upper, other.upper))


def box(x: Float[Array, "*shape"], radius: float | Array, clip: tuple[float, float] | None = None) -> Bounds:
  """The points within a radius of x in every coordinate.

  Args:
    x: centre.
    radius: eps, a number or an array that broadcasts against x.
    clip: smallest and largest value that inputs have, such as (0, 1).

  Raises:
    ValueError: a radius that is not at least 0 (seen on the host only) or clip's ends in the wrong order.
  """
  x = jnp.asarray(x)
  if not isinstance(radius, jax.core.Tracer) and not (np.asarray(radius) >= 0).all():
    raise ValueError(f"radius: got {radius}, expected at least 0")
  lower, upper = x - radius, x + radius
  if clip is not None:
    if not clip[0] <= clip[1]:
      raise ValueError(f"clip: got {clip}, expected a smaller and a larger number")
    lower, upper = jnp.clip(lower, *clip), jnp.clip(upper, *clip)
  return Bounds(lower, upper)


def apply(network: Network, x: Float[Array, "*shape"]) -> Float[Array, " o"]:
  """f(x), of one input."""
  for i, layer in enumerate(network):
    x = push(layer, x if i == 0 else jax.nn.relu(x)) + layer.bias
  return x


def global_bound(network: Network) -> Float[Array, ""]:
  """Product of the layers' norms: the largest row sum of |W|, for a convolution the largest of a channel's kernel."""
  check(network)
  return jnp.prod(
    jnp.stack([jnp.abs(layer.kernel).sum(tuple(range(layer.kernel.ndim - 1))).max() for layer in network])
  )


def from_torch(
  state_dict: Mapping[str, np.ndarray],
  names: Sequence[str],
  input_shape: tuple[int, ...],
  *,
  strides: Mapping[str, int] | None = None,
  padding: Mapping[str, int] | None = None,
) -> tuple[Layer, ...]:
  """A network of `nn.Linear` and `nn.Conv2d`, for inputs [H, W, C] where torch has [C, H, W].

  Args:
    state_dict: the weights.
    names: of the layers in order, such as ("0", "2", "5").
    input_shape: of one input, [H, W, C] or [N].
    strides: name -> stride, of those that are not 1.
    padding: name -> zeros on every side, of those that have any.

  Raises:
    ValueError: weights that are missing, no chain, or strides and padding of what is no convolution among `names`.
  """
  layers: list[Layer] = []
  shape = tuple(input_shape)
  for name in names:
    if f"{name}.weight" not in state_dict:
      raise ValueError(f"state_dict: got no '{name}.weight', expected the weights of {', '.join(names)}")
  convolutions = [name for name in names if np.ndim(state_dict[f"{name}.weight"]) == 4]
  for argument, given in (("strides", strides), ("padding", padding)):
    if unknown := set(given or ()) - set(convolutions):
      raise ValueError(f"{argument}: got those of {sorted(unknown)}, expected names among {convolutions}")
  for name in names:
    weight, is_conv = f"{name}.weight", name in convolutions
    rule = interop.conv(name) if is_conv else interop.dense(name)
    part = {key: state_dict[key] for key in (weight, f"{name}.bias") if key in state_dict}
    params = interop.variables(part, {"params/layer": rule})["params"]["layer"]
    kernel, bias = jnp.asarray(params["kernel"]), jnp.asarray(params["bias"])
    layer: Layer
    if is_conv:
      pad = (padding or {}).get(name, 0)
      stride = (strides or {}).get(name, 1)
      layer = Conv(kernel, bias, (stride, stride), ((pad, pad), (pad, pad)))
    else:
      if len(shape) == 3:  # torch flattens channels first
        height, width, channels = shape
        kernel = kernel.reshape(channels, height, width, -1).transpose(1, 2, 0, 3).reshape(kernel.shape)
      layer = Dense(kernel, bias)
    shape = out_shape(layer, shape)
    layers.append(layer)
  return tuple(layers)


# ---------------------------------------------------------------------------------------------- products, of one row


def push(layer: Layer, x: Float[Array, "*shape"]) -> Float[Array, "*out"]:
  """W x, without bias."""
  if isinstance(layer, Dense):
    return jnp.dot(x.reshape(-1), layer.kernel, precision=_HIGHEST)
  strides: Any = layer.strides  # two of them since the checks
  return jax.lax.conv_general_dilated(
    x[None], layer.kernel, strides, layer.padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=_HIGHEST
  )[0]


def pull(layer: Layer, z: Float[Array, "*out"], shape: tuple[int, ...]) -> Float[Array, "*shape"]:
  """W^T z, of the given shape."""
  if isinstance(layer, Dense):
    return jnp.dot(layer.kernel, z, precision=_HIGHEST).reshape(shape)
  transpose = jax.linear_transpose(lambda x: push(layer, x), jax.ShapeDtypeStruct(shape, z.dtype))
  return transpose(z)[0]


def push_unit(layer: Layer, index: Array, shape: tuple[int, ...]) -> Float[Array, "*out"]:
  """Column `index` of W, for inputs of the given shape."""
  return layer.kernel[index] if isinstance(layer, Dense) else push(layer, _unit(index, shape, layer.kernel.dtype))


def pull_unit(layer: Layer, index: Array, out: tuple[int, ...], shape: tuple[int, ...]) -> Float[Array, "*shape"]:
  """Row `index` of W, whose outputs have shape `out` and inputs `shape`."""
  if isinstance(layer, Dense):
    return layer.kernel[:, index].reshape(shape)
  return pull(layer, _unit(index, out, layer.kernel.dtype), shape)


def out_shape(layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Of z, for x of a shape."""
  if isinstance(layer, Dense):
    fits = int(np.prod(shape)) == layer.kernel.shape[0]
  else:
    fits = len(shape) == 3 and shape[2] == layer.kernel.shape[2]
  if not fits:
    raise ValueError(
      f"network: got a kernel of shape {layer.kernel.shape} for inputs of shape {shape}, expected a chain"
    )
  x = jax.ShapeDtypeStruct(shape, layer.kernel.dtype)
  return jax.eval_shape(lambda x: push(layer, x), x).shape


def check(network: Network) -> None:
  """Raises a ValueError where layers are none, of unknown kind or malformed."""
  if not len(network):
    raise ValueError("network: got no layers, expected at least one")
  for layer in network:
    if not isinstance(layer, Dense | Conv):
      raise ValueError(f"network: got a layer of type {type(layer).__name__}, expected Dense or Conv")
    axes = 2 if isinstance(layer, Dense) else 4
    if layer.kernel.ndim != axes or layer.bias.shape != layer.kernel.shape[-1:]:
      raise ValueError(
        f"network: got a {type(layer).__name__} with kernel {layer.kernel.shape} and bias {layer.bias.shape}, "
        f"expected {axes} axes, the last as long as the bias"
      )
  if not isinstance(network[-1], Dense):
    raise ValueError("network: got a Conv at the end, expected Dense")


def wide(*trees):
  """Trees of floating arrays in one dtype, the widest among them and float32."""
  dtype = jnp.result_type("float32", *jax.tree.leaves(trees))
  return jax.tree.map(lambda a: jnp.asarray(a, dtype), trees)


def _unit(index, shape, dtype):
  return jax.nn.one_hot(index, int(np.prod(shape)), dtype=dtype).reshape(shape)
