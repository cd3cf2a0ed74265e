"""Mamba's mixer, and two of them as one bidirectional block.

    x, z = W_in v;  x = silu(conv(x));  delta, B, C = W_x x;  y = scan(x, W_dt delta, -exp(A_log), B, C, D);
    out = W_out (y * silu(z))

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752, section 3.4, with the
names and defaults of the reference code and of `transformers`, whose weights `weights` maps.

Packed sequences carry `starts`, True at the first token of each segment: neither the scan nor the convolution reaches
across, in either direction.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlab import interop, kernels
from jaxlab.nn import _causal_conv
from jaxlab.nn.initializers import torch_kernel
from jaxlab.nn.layer_norm import LayerNorm
from jaxlab.nn.selective_scan import Discretization, selective_scan


class MambaMixer(nn.Module):
  """One direction of a state-space mixer.

  Attributes:
    state_size: N, states of a channel.
    expand: inner channels over those of the input.
    conv_size: taps of the convolution over tokens.
    dt_rank: rank of the step sizes; None for ceil(channels / 16).
    reverse: read each segment from its last token to its first.
    recurrent: False where every sequence is one token: no state decays then, and Mamba's rule needs no A.
    discretization: as `selective_scan`.
    dtype: compute dtype; the recurrence runs in float32.
    param_dtype: parameter dtype.
  """

  state_size: int = 16
  expand: int = 2
  conv_size: int = 4
  dt_rank: int | None = None
  reverse: bool = False
  recurrent: bool = True
  discretization: Discretization = "mamba"
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "*b l c"], starts: Bool[Array, "*b l"] | None = None) -> Float[Array, "*b l c"]:
    """Tokens to tokens.

    Raises:
      ValueError: a size that is not positive, or several tokens without `recurrent`.
    """
    for name in ("state_size", "expand", "conv_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}: got {getattr(self, name)}, expected a positive integer")
    features, inner = x.shape[-1], self.expand * x.shape[-1]
    rank = -(-features // 16) if self.dt_rank is None else self.dt_rank
    dense = lambda size, name: nn.Dense(
      size, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=torch_kernel, name=name
    )
    hidden, gate = jnp.split(dense(2 * inner, "in_proj")(x), 2, axis=-1)
    hidden = nn.silu(
      CausalConv(self.conv_size, self.reverse, self.dtype, self.param_dtype, name="conv1d")(hidden, starts)
    )
    delta, B, C = jnp.split(dense(rank + 2 * self.state_size, "x_proj")(hidden), (rank, rank + self.state_size), -1)
    step = StepSize(inner, self.dtype, self.param_dtype, name="dt_proj")
    delta, delta_bias = step(delta)
    D = self.param("D", nn.initializers.ones, (inner,), self.param_dtype)
    if self.recurrent or self.discretization == "zoh":
      A_log = self.param("A_log", log_range, (inner, self.state_size), self.param_dtype)
      y = selective_scan(
        hidden, delta, -jnp.exp(A_log.astype("float32")), B, C, D, z=gate, delta_bias=delta_bias, delta_softplus=True,
        starts=starts, reverse=self.reverse, discretization=self.discretization,
      )  # fmt: skip
    elif x.shape[-2] > 1:
      raise ValueError(f"recurrent: got False for {x.shape[-2]} tokens, expected True")
    else:
      u, delta, B, C = (a.astype("float32") for a in (hidden, delta, B, C))
      y = nn.softplus(delta + delta_bias) * u * (B * C).sum(-1, keepdims=True) + D.astype("float32") * u
      y = (y * nn.silu(gate.astype("float32"))).astype(hidden.dtype)
    return dense(features, "out_proj")(y)


class CausalConv(nn.Module):
  """y_t = b + sum_i w_i x_{t - i} for each channel, the sum ending at the segment's first token.

  Parameters `kernel` [size, 1, C], whose last tap is that of the token itself, and `bias` [C], as torch's depthwise
  `Conv1d` has them.

  Attributes:
    size: number of taps.
    reverse: t + i in place of t - i.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  size: int
  reverse: bool = False
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "*b l c"], starts: Bool[Array, "*b l"] | None = None) -> Float[Array, "*b l c"]:
    """Same shape as `x`."""
    bound = self.size**-0.5
    uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
    kernel = self.param("kernel", uniform, (self.size, 1, x.shape[-1]), self.param_dtype)
    bias = self.param("bias", uniform, x.shape[-1:], self.param_dtype)
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    starts = jnp.zeros(x.shape[:-1], bool) if starts is None else starts
    # Tokens of one segment have one number, ascending over all sequences.
    segment = jnp.cumsum(starts.at[..., 0].set(True).reshape(-1), dtype="int32")
    form = _host_conv if kernels.available() and x.dtype.itemsize <= 4 else plain_conv
    return form(self.reverse, x.reshape(-1, x.shape[-1]), kernel[:, 0], bias, segment).reshape(x.shape)


def plain_conv(
  reverse: bool,
  x: Float[Array, "t c"],
  kernel: Float[Array, "k c"],
  bias: Float[Array, " c"],
  segment: Int[Array, " t"],
) -> Float[Array, "t c"]:
  """The convolution of `CausalConv` in plain JAX, over tokens laid end to end whose segments have ascending numbers."""
  y = bias + kernel[-1] * x
  for i in range(1, min(kernel.shape[0], x.shape[0])):
    kept, pad = (slice(i, None), (0, i)) if reverse else (slice(None, -i), (i, 0))
    same = segment == jnp.pad(segment[kept], pad, constant_values=-1)
    tap = jnp.pad(x[kept], (pad, (0, 0)))  # x_{t - i}
    y = y + kernel[-1 - i] * jnp.where(same[:, None], tap, 0)
  return y


def _host_conv(reverse, x, kernel, bias, segment):
  wide = (a.astype("float32") for a in (x, kernel, bias))
  return _conv(reverse, *wide, segment).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(reverse, x, kernel, bias, segment):
  result = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
  items = _causal_conv.items(x.shape[0])
  return kernels.call(_causal_conv.forward(reverse), result, x, kernel, bias, segment, items=items)[0]


def _conv_forward(reverse, x, kernel, bias, segment):
  return _conv(reverse, x, kernel, bias, segment), (x, kernel, segment)


def _conv_backward(reverse, saved, g):
  x, kernel, segment = saved
  items = _causal_conv.items(x.shape[0])
  results = [jax.ShapeDtypeStruct(s, x.dtype) for s in (x.shape, (items, *kernel.shape), (items, x.shape[1]))]
  gx, gw, gbias = kernels.call(_causal_conv.backward(reverse), results, x, kernel, segment, g, items=items)
  return gx, gw.sum(0), gbias.sum(0), None


_conv.defvjp(_conv_forward, _conv_backward)


class StepSize(nn.Module):
  """Linear map whose bias is kept apart, to be added in float32, and starts as the step sizes in [0.001, 0.1].

  softplus(bias) is log-uniform: without it the state forgets within a few tokens.

  Attributes:
    features: outputs.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  features: int
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "*b r"]) -> tuple[Float[Array, "*b c"], Float[Array, " c"]]:
    """Product and bias."""
    rank = x.shape[-1]
    uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -(rank**-0.5), rank**-0.5)
    kernel = self.param("kernel", uniform, (rank, self.features), self.param_dtype)
    bias = self.param("bias", step_bias, (self.features,), self.param_dtype)
    x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
    return x @ kernel, bias


def step_bias(key: Key[Array, ""], shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Array:
  """Initializer of the bias of step sizes: softplus(bias) is log-uniform in [0.001, 0.1]."""
  step = jnp.exp(jax.random.uniform(key, shape, minval=math.log(1e-3), maxval=math.log(0.1)))
  return jnp.log(jnp.expm1(step)).astype(dtype)


def log_range(key: Key[Array, ""], shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Array:
  """Initializer of A_log [..., N]: A = -(1, ..., N) for every channel, the real S4D initialisation."""
  del key
  return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype="float32")), shape).astype(dtype)


class BidirectionalMamba(nn.Module):
  """x + W_out (forward(LN x) + backward(LN x)): two mixers with weights of their own, one reading each way.

  Behrouz and Hashemi, "Graph Mamba", KDD 2024, algorithm 2, where a mixer's `out_proj` is called W_1 and its gate W_2;
  the residual connection is not written there.

  Attributes:
    bidirectional: False for the forward mixer alone.
    last_only: give the last token's output alone, [..., 1, C]; the backward mixer then reads that token and no other.
    state_size, expand, conv_size, discretization, dtype, param_dtype: as `MambaMixer`.
  """

  bidirectional: bool = True
  last_only: bool = False
  state_size: int = 16
  expand: int = 2
  conv_size: int = 4
  discretization: Discretization = "mamba"
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "*b l c"], starts: Bool[Array, "*b l"] | None = None) -> Float[Array, "*b m c"]:
    """Tokens to tokens; `starts` as `MambaMixer`."""
    normed = LayerNorm(epsilon=1e-5, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(x)
    wanted = slice(-1, None) if self.last_only else slice(None)
    mixer = functools.partial(
      MambaMixer,
      self.state_size,
      self.expand,
      self.conv_size,
      discretization=self.discretization,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )
    total = mixer(name="forward")(normed, starts)[..., wanted, :]
    if self.bidirectional:
      starts = None if starts is None else starts[..., wanted]
      backward = mixer(reverse=True, recurrent=not self.last_only, name="backward")
      total = total + backward(normed[..., wanted, :], starts)
    out = nn.Dense(
      x.shape[-1], use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=torch_kernel, name="out"
    )
    return x[..., wanted, :] + out(total)


def weights(path: str, prefix: str) -> dict[str, interop.Rule]:
  """Rules for `interop.variables`: the mixer at a flax path from torch's names below a prefix, such as "mixer."."""
  return {
    f"{path}/in_proj": interop.dense(f"{prefix}in_proj", bias=False),
    f"{path}/conv1d": interop.conv(f"{prefix}conv1d"),
    f"{path}/x_proj": interop.dense(f"{prefix}x_proj", bias=False),
    f"{path}/dt_proj": interop.dense(f"{prefix}dt_proj"),
    f"{path}/A_log": interop.raw(f"{prefix}A_log"),
    f"{path}/D": interop.raw(f"{prefix}D"),
    f"{path}/out_proj": interop.dense(f"{prefix}out_proj", bias=False),
  }
