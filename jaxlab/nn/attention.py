"""Multi-head attention on tokens [B, N, C]."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def multi_head_attention(
  query: Float[Array, "b n c"],
  key: Float[Array, "b m c"],
  value: Float[Array, "b m c"],
  *,
  num_heads: int,
  bias: Float[Array, "#b #h #n #m"] | None = None,
  mask: Bool[Array, "#b #h #n #m"] | None = None,
) -> Float[Array, "b n c"]:
  """Scaled dot-product attention of every head, merged.

      out = concat_h softmax(q_h k_h^T / sqrt(C / num_heads) + bias) v_h

  Projections are the caller's. Heads own contiguous channels: channel = head * (C / num_heads) + i. The softmax is
  taken in float32 whatever the dtype of the tokens.

  Args:
    query: tokens that ask.
    key: tokens that are asked.
    value: what they answer.
    num_heads: h; divides C.
    bias: added to the logits, for instance relative positions.
    mask: True where a query may see a key; each query must see at least one.

  Returns:
    Tokens [B, N, C], dtype of the arguments.

  Raises:
    ValueError: shapes that do not fit, heads that do not divide C.

  Source: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, section 3.2.
  """
  if query.ndim != 3:
    raise ValueError(f"query: got shape {query.shape}, expected tokens [batch, tokens, channels]")
  batch, _, channels = query.shape
  if key.ndim != 3 or key.shape[::2] != (batch, channels):
    raise ValueError(f"key: got shape {key.shape}, expected ({batch}, tokens, {channels})")
  if value.shape != key.shape:
    raise ValueError(f"value: got shape {value.shape}, expected the key's, {key.shape}")
  if num_heads < 1 or channels % num_heads:
    raise ValueError(f"num_heads: got {num_heads}, expected a divisor of {channels} channels")

  # Heads first: after one transposition both products are of adjacent matrices, twice as fast on CPU.
  def heads(tokens: Array) -> Array:
    return tokens.reshape(*tokens.shape[:2], num_heads, channels // num_heads).swapaxes(1, 2)

  q, k, v = heads(query), heads(key), heads(value)
  logits = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32) * (channels // num_heads) ** -0.5
  if bias is not None:
    logits = logits + bias
  weights = jax.nn.softmax(logits, where=mask).astype(value.dtype)
  out = jnp.einsum("bhnm,bhmd->bhnd", weights, v, preferred_element_type=jnp.float32)
  return out.astype(value.dtype).swapaxes(1, 2).reshape(query.shape)
