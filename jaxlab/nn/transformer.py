"""The pre-norm transformer block of vision transformers and small language models, on tokens [B, N, C].

    x = x + Attention(LN(x))
    x = x + MLP(LN(x))

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, equations 2 and 3. Parameters have the names that timm
made common: `norm1`, `attn/qkv`, `attn/proj`, `norm2`, `mlp/fc1`, `mlp/fc2`; `weight_table` converts such blocks.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlab import interop
from jaxlab.nn.attention import multi_head_attention
from jaxlab.nn.gelu import gelu
from jaxlab.nn.layer_norm import LayerNorm
from jaxlab.nn.module import precision
from jaxlab.nn.product import Dense

# The usual truncation at +-2 lies a hundred standard deviations out.
_dense_init = nn.initializers.normal(0.02)


class SelfAttention(nn.Module):
  """Every token asks all tokens, or with `causal` itself and those before it.

      [q, k, v] = x W_qkv
      out = concat_h softmax(q_h k_h^T / sqrt(C / num_heads)) v_h W_proj

  Attributes:
    num_heads: h; divides C. Channel = head * (C / h) + i in each of q, k and v.
    qkv_bias: whether `qkv` has a bias; `proj` has one.
    causal: hide later tokens.
    dtype: compute dtype; the softmax is in float32.
    param_dtype: parameter dtype.
    kernel_init: initialiser of both kernels.
  """

  num_heads: int
  qkv_bias: bool = True
  causal: bool = False
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  kernel_init: jax.nn.initializers.Initializer = _dense_init

  @nn.compact
  def __call__(
    self, tokens: Float[Array, "b n c"], mask: Bool[Array, "#b #h #n n"] | None = None
  ) -> Float[Array, "b n c"]:
    """Mixes tokens.

    Args:
      tokens: floats.
      mask: True where a token (third axis) may see another (last axis), at least one; with `causal`, where both allow.

    Returns:
      Tokens of the same shape, in `dtype`.

    Raises:
      ValueError: tokens that are not [B, N, C]; heads that do not divide C.
    """
    if tokens.ndim != 3:
      raise ValueError(f"tokens: got shape {tokens.shape}, expected [batch, tokens, channels]")
    channels = tokens.shape[-1]
    options = {"kernel_init": self.kernel_init, **precision(self)}
    qkv = Dense(3 * channels, use_bias=self.qkv_bias, name="qkv", **options)(tokens)
    if self.causal:
      past = jnp.tri(tokens.shape[1], dtype=bool)[None, None]
      mask = past if mask is None else past & mask
    attended = multi_head_attention(*jnp.split(qkv, 3, axis=-1), num_heads=self.num_heads, mask=mask)
    return Dense(channels, name="proj", **options)(attended)


class Mlp(nn.Module):
  """Two dense layers with the exact (erf) GELU between them.

  Attributes:
    ratio: hidden width, in units of C.
    dtype: compute dtype.
    param_dtype: parameter dtype.
    kernel_init: initialiser of both kernels.
  """

  ratio: float = 4.0
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  kernel_init: jax.nn.initializers.Initializer = _dense_init

  @nn.compact
  def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """Args: x, channels last. Returns the same shape, in `dtype`."""
    options = {"kernel_init": self.kernel_init, **precision(self)}
    hidden = Dense(int(x.shape[-1] * self.ratio), name="fc1", **options)(x)
    return Dense(x.shape[-1], name="fc2", **options)(gelu(hidden))


class Block(nn.Module):
  """Attention and MLP, each a pre-norm residual branch.

  Attributes:
    num_heads: divides C.
    mlp_ratio: hidden width of the MLP, in units of C.
    qkv_bias: whether `attn/qkv` has a bias.
    causal: hide later tokens.
    epsilon: of the layer norms; 1e-6 in timm's vision transformers, 1e-5 is PyTorch's default.
    dtype: compute dtype; norms and softmax accumulate in float32.
    param_dtype: parameter dtype.
    kernel_init: initialiser of the dense kernels.
  """

  num_heads: int
  mlp_ratio: float = 4.0
  qkv_bias: bool = True
  causal: bool = False
  epsilon: float = 1e-6
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  kernel_init: jax.nn.initializers.Initializer = _dense_init

  @nn.compact
  def __call__(
    self, tokens: Float[Array, "b n c"], mask: Bool[Array, "#b #h #n n"] | None = None
  ) -> Float[Array, "b n c"]:
    """Args and Raises: as in `SelfAttention`. Returns tokens of the same shape, in `dtype`."""
    options = precision(self)
    inner = {"kernel_init": self.kernel_init, **options}
    x = tokens.astype(self.dtype)
    y = LayerNorm(self.epsilon, name="norm1", **options)(x)
    x = x + SelfAttention(self.num_heads, self.qkv_bias, self.causal, name="attn", **inner)(y, mask)
    y = LayerNorm(self.epsilon, name="norm2", **options)(x)
    return x + Mlp(self.mlp_ratio, name="mlp", **inner)(y)


def weight_table(prefix: str, *, qkv_bias: bool = True) -> dict[str, interop.Rule]:
  """Which tensor of a timm-style block is which variable, for `interop.variables`.

  Args:
    prefix: of the block's torch names, such as "blocks.0".
    qkv_bias: as in `Block`.

  Returns:
    Path below the block -> rule; put the block's own path, with its collection, before each.
  """
  return {
    "norm1": interop.norm(f"{prefix}.norm1"),
    "attn/qkv": interop.dense(f"{prefix}.attn.qkv", bias=qkv_bias),
    "attn/proj": interop.dense(f"{prefix}.attn.proj"),
    "norm2": interop.norm(f"{prefix}.norm2"),
    "mlp/fc1": interop.dense(f"{prefix}.mlp.fc1"),
    "mlp/fc2": interop.dense(f"{prefix}.mlp.fc2"),
  }
