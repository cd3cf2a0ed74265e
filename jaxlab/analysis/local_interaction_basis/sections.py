"""Networks as chains of sections with their biases folded in: every activation ends in a constant 1.

Activations are [..., positions, features]: tokens of a sequence, pixels of an image, one position for a perceptron. A
section is a pytree that can be called, [..., P, D] -> [..., Q, E], such as `jax.tree_util.Partial(function, params)`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special
from flax import struct
from jaxtyping import Array, Float

from jaxlab import checks

Section: TypeAlias = Callable[[Float[Array, "... p d"]], Float[Array, "... q e"]]
Network: TypeAlias = Sequence[Section]
Activation: TypeAlias = Literal["identity", "relu", "gelu", "gelu_tanh"]

ACTIVATIONS: dict[str, Callable] = {
  "identity": lambda x: x,
  "relu": jax.nn.relu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@struct.dataclass
class Dense:
  """act(x W) at every position.

  Attributes:
    kernel: W with the bias as its last row and, unless the last of a network, a last column that hands the 1 on.
    activation: of `ACTIVATIONS`.
  """

  kernel: Float[Array, "d e"]
  activation: Activation = struct.field(pytree_node=False, default="relu")

  def __call__(self, x: Float[Array, "... p d"]) -> Float[Array, "... p e"]:
    """Activations to activations."""
    return ACTIVATIONS[self.activation](x @ self.kernel)


@struct.dataclass
class Block:
  """x + act(x W_in) W_out at every position; the residual stream x carries the 1, so W_out's last column is 0."""

  inner: Float[Array, "d h"]
  outer: Float[Array, "h d"]
  activation: Activation = struct.field(pytree_node=False, default="relu")

  def __call__(self, x: Float[Array, "... p d"]) -> Float[Array, "... p d"]:
    """Activations to activations."""
    return x + ACTIVATIONS[self.activation](x @ self.inner) @ self.outer


@struct.dataclass
class Attention:
  """x + sum_h softmax(q_h k_h^T / sqrt(K)) v_h W_h, each position asks itself and those before it.

  Attributes:
    query: [H, D, K], of K features a head; biases are the last row.
    key: likewise.
    value: [H, D, K + 1]; the last feature is the 1 again, for the bias of `out`.
    out: [H, K + 1, D].
    last_only: return the last position only, for networks whose answer is read there.
  """

  query: Float[Array, "h d k"]
  key: Float[Array, "h d k"]
  value: Float[Array, "h d v"]
  out: Float[Array, "h v d"]
  last_only: bool = struct.field(pytree_node=False, default=False)

  def __call__(self, x: Float[Array, "... p d"]) -> Float[Array, "... q d"]:
    """Activations to activations."""
    asking = x[..., -1:, :] if self.last_only else x
    q = jnp.einsum("...qd,hdk->...hqk", asking, self.query) / self.query.shape[-1] ** 0.5
    k = jnp.einsum("...pd,hdk->...hpk", x, self.key)
    v = jnp.einsum("...pd,hdv->...hpv", x, self.value)
    scores = jnp.einsum("...hqk,...hpk->...hqp", q, k)
    if not self.last_only:
      seen = np.tril(np.ones((x.shape[-2],) * 2, bool))
      scores = jnp.where(seen, scores, -jnp.inf)
    # In float32 at least; 64 bits stay.
    share = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, "float32"))).astype(v.dtype)
    return asking + jnp.einsum("...hqp,...hpv,hvd->...qd", share, v, self.out)


@struct.dataclass
class Conv:
  """act(x * W) on images whose pixels are positions, in rows.

  Attributes:
    kernel: [h, w, D, E]; the tap that lies on an image for every output pixel holds the bias in its last row.
    shape: height and width of images.
    strides: of the two axes.
    padding: pixels before and after, for each axis; 0 are padded, also where activations have their 1.
    activation: of `ACTIVATIONS`.
  """

  kernel: Float[Array, "h w d e"]
  shape: tuple[int, int] = struct.field(pytree_node=False)
  strides: tuple[int, int] = struct.field(pytree_node=False, default=(1, 1))
  padding: tuple[tuple[int, int], ...] = struct.field(pytree_node=False, default=((0, 0), (0, 0)))
  activation: Activation = struct.field(pytree_node=False, default="relu")

  def __call__(self, x: Float[Array, "... p d"]) -> Float[Array, "... q e"]:
    """Activations to activations."""
    images = x.reshape(-1, *self.shape, x.shape[-1])
    y = jax.lax.conv_general_dilated(
      images, self.kernel, self.strides, self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return ACTIVATIONS[self.activation](y.reshape(*x.shape[:-2], -1, y.shape[-1]))


@struct.dataclass
class Readout:
  """act(sum_p x_p W_p): all positions to one, as a dense layer on flattened images.

  Attributes:
    kernel: [P, D, E]; each position adds its part of the bias.
    activation: of `ACTIVATIONS`.
  """

  kernel: Float[Array, "p d e"]
  activation: Activation = struct.field(pytree_node=False, default="identity")

  def __call__(self, x: Float[Array, "... p d"]) -> Float[Array, "... 1 e"]:
    """Activations to activations."""
    return ACTIVATIONS[self.activation](jnp.einsum("...pd,pde->...e", x, self.kernel))[..., None, :]


@struct.dataclass
class Chain:
  """Sections one after the other, without a node layer between them."""

  sections: tuple[Any, ...]

  def __call__(self, x: Float[Array, "... p d"]) -> Float[Array, "... q e"]:
    """Activations to activations."""
    return run(self.sections, x)


def run(network: Network, x: Float[Array, "... p d"]) -> Float[Array, "... q e"]:
  """Outputs for activations of the first node layer."""
  for section in network:
    x = section(x)
  return x


def floats_as(dtype: jax.typing.DTypeLike, network: Network) -> Network:
  """Sections whose floating weights have this dtype; whole numbers and bools stay."""
  floats = lambda a: jnp.issubdtype(jnp.result_type(a), jnp.floating)
  return jax.tree.map(lambda a: jnp.asarray(a, dtype) if floats(a) else a, network)


# ------------------------------------------------------------------------------------------------- folding biases in


def with_one(x: Float[Array, "... d"]) -> Float[Array, "... d+1"]:
  """Activations with the constant appended."""
  return jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)


def _unit(activation: str) -> float:
  """What the activation maps to 1."""
  checks.choice("activation", activation, ACTIVATIONS)
  if activation in ("identity", "relu"):
    return 1.0
  normal = scipy.special.ndtr if activation == "gelu" else _ndtr_tanh
  return scipy.optimize.brentq(lambda x: x * normal(x) - 1, 0.5, 2.0, xtol=1e-15)


def _ndtr_tanh(x: float) -> float:
  return 0.5 + 0.5 * np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))


def _fold(kernel: Array, bias: Array, one: float | None) -> Array:
  """[[W, 0], [b, one]], or [[W], [b]] for None; leading axes of the kernel are those of the bias."""
  folded = jnp.concatenate([kernel, bias[..., None, :]], -2)
  if one is None:
    return folded
  column = jnp.zeros((*folded.shape[:-1], 1), folded.dtype).at[..., -1, :].set(one)
  return jnp.concatenate([folded, column], -1)


def dense(
  kernel: Float[Array, "i o"], bias: Float[Array, " o"], activation: Activation = "relu", *, last: bool = False
) -> Dense:
  """A dense layer, folded.

  Args:
    kernel: as `flax.linen.Dense` has it.
    bias: likewise.
    activation: of `ACTIVATIONS`.
    last: whether outputs do without a 1, as those of a network.

  Raises:
    ValueError: shapes that do not fit, an unknown activation.
  """
  _check("kernel", kernel, bias, 2)
  return Dense(_fold(kernel, bias, None if last else _unit(activation)), activation)


def block(inner: Mapping[str, Array], outer: Mapping[str, Array], activation: Activation = "relu") -> Block:
  """x + Dense(act(Dense(x))), folded; both as flax has them, kernel and bias."""
  _check("inner", inner["kernel"], inner["bias"], 2)
  _check("outer", outer["kernel"], outer["bias"], 2)
  return Block(_fold(**inner, one=_unit(activation)), _fold(**outer, one=0.0), activation)


def attention(
  query: Mapping[str, Array],
  key: Mapping[str, Array],
  value: Mapping[str, Array],
  out: Mapping[str, Array],
  *,
  last_only: bool = False,
) -> Attention:
  """x + attention(x), folded.

  Args:
    query: kernel [D, H, K] and bias [H, K], as `flax.linen.DenseGeneral` has them.
    key: likewise.
    value: likewise.
    out: kernel [H, K, D] and bias [D]; each head's constant adds its part of the bias.
    last_only: see `Attention`.

  Raises:
    ValueError: shapes that do not fit.
  """
  for name, layer in (("query", query), ("key", key), ("value", value)):
    _check(name, layer["kernel"], layer["bias"], 3, whole=2)
  _check("out", out["kernel"], out["bias"], 3)
  heads = out["kernel"].shape[0]
  rows = lambda layer: jnp.moveaxis(jnp.asarray(layer["kernel"]), 1, 0)
  share = jnp.tile(out["bias"] / heads, (heads, 1))
  return Attention(
    query=_fold(rows(query), query["bias"], None),
    key=_fold(rows(key), key["bias"], None),
    value=_fold(rows(value), value["bias"], 1.0),
    out=_fold(out["kernel"], share, 0.0),
    last_only=last_only,
  )


def conv(
  kernel: Float[Array, "h w i o"],
  bias: Float[Array, " o"],
  shape: tuple[int, int],
  activation: Activation = "relu",
  *,
  strides: tuple[int, int] = (1, 1),
  padding: str | tuple[tuple[int, int], ...] = "SAME",
) -> Conv:
  """A convolution, folded.

  Args:
    kernel: as `flax.linen.Conv` has it.
    bias: likewise.
    shape: height and width of the images it gets.
    activation: of `ACTIVATIONS`.
    strides: of the two axes.
    padding: of the two axes, as flax has it; at most a window's size minus 1 is padded before.

  Raises:
    ValueError: shapes that do not fit, padding of more, an unknown activation.
  """
  _check("kernel", kernel, bias, 4)
  kernel = jnp.asarray(kernel)
  window = kernel.shape[:2]
  pads = tuple(jax.lax.padtype_to_pads(shape, window, strides, padding)) if isinstance(padding, str) else padding
  pads = tuple((int(a), int(b)) for a, b in pads)
  sizes = [(s + a + b - w) // t + 1 for s, (a, b), w, t in zip(shape, pads, window, strides, strict=True)]
  # Output pixel y of an axis sees input pixel stride * y through the tap at `before`: for all y if the last one is in.
  axes = zip(shape, pads, window, strides, sizes, strict=True)
  if not all(a < w and n > 0 and (n - 1) * t < s for s, (a, _), w, t, n in axes):
    raise ValueError(f"padding: got {padding}, expected one that leaves a pixel of the image in every window")
  tap = (pads[0][0], pads[1][0])
  rows = jnp.zeros((*window, 1, bias.shape[0]), kernel.dtype).at[tap].set(bias)
  folded = jnp.concatenate([kernel, rows], 2)
  column = jnp.zeros((*folded.shape[:3], 1), kernel.dtype).at[(*tap, -1)].set(_unit(activation))
  return Conv(jnp.concatenate([folded, column], 3), shape, strides, pads, activation)


def readout(
  kernel: Float[Array, "i o"], bias: Float[Array, " o"], positions: int, activation: Activation = "identity"
) -> Readout:
  """The last dense layer of a network, on flattened positions, folded.

  Args:
    kernel: as `flax.linen.Dense` has it; rows of a position follow each other.
    bias: likewise.
    positions: P, a divisor of the rows.
    activation: of `ACTIVATIONS`.

  Raises:
    ValueError: shapes that do not fit.
  """
  _check("kernel", kernel, bias, 2)
  if kernel.shape[0] % positions:
    raise ValueError(f"positions: got {positions}, expected a divisor of the kernel's {kernel.shape[0]} rows")
  parts = jnp.asarray(kernel).reshape(positions, -1, kernel.shape[1])
  return Readout(_fold(parts, jnp.tile(bias / positions, (positions, 1)), None), activation)


def mlp(layers: Sequence[Mapping[str, Array]], activation: Activation = "relu") -> tuple[Dense, ...]:
  """A perceptron, one section a layer; its inputs are `with_one(x)[:, None]` [N, 1, D + 1].

  Args:
    layers: kernel and bias of each, as flax has them.
    activation: of all but the last.
  """
  return tuple(
    dense(a["kernel"], a["bias"], "identity" if i == len(layers) - 1 else activation, last=i == len(layers) - 1)
    for i, a in enumerate(layers)
  )


def _check(name, kernel, bias, axes, whole=1):
  if np.ndim(kernel) != axes or np.shape(bias) != np.shape(kernel)[axes - whole :]:
    raise ValueError(
      f"{name}: got a kernel of shape {np.shape(kernel)} and a bias of shape {np.shape(bias)}, expected {axes} axes, "
      "the last as long as the bias"
    )
