"""Multi-head attention on tokens [B, N, C].

On CPU, attention without bias and mask is a host kernel (`jaxlab.nn._attention`) that never forms the weights of all
queries; forward-mode differentiation is not available there.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlab import kernels
from jaxlab.nn import _attention, _tiles, product, softmax

_MOST = 128  # channels of a head up to which the host kernel is the faster one


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

  plain = bias is None and mask is None and query.dtype == key.dtype == value.dtype
  small = channels // num_heads <= _MOST
  if plain and small and query.size and key.size and kernels.reads(query):
    narrow = query.dtype == jnp.bfloat16 and not _tiles.has_pairs()
    tokens = (x.astype(jnp.float32) if narrow else x for x in (query, key, value))
    return _attend(*tokens, num_heads)[0].astype(query.dtype)
  return _by_xla(query, key, value, num_heads, bias, mask)


def _by_xla(query, key, value, num_heads, bias=None, mask=None):
  size = query.shape[-1] // num_heads

  # Heads first: after one transposition both products are of adjacent matrices, twice as fast on CPU.
  def heads(tokens: Array) -> Array:
    return tokens.reshape(*tokens.shape[:2], num_heads, size).swapaxes(1, 2)

  q, k, v = heads(query * size**-0.5), heads(key), heads(value)
  logits = _product(q, k.swapaxes(2, 3))
  if bias is not None:
    logits = logits + bias
  weights = softmax.softmax(logits) if mask is None else jax.nn.softmax(logits, where=mask)
  return _product(weights.astype(value.dtype), v).astype(value.dtype).swapaxes(1, 2).reshape(query.shape)


def _product(a, b):
  """[B, H, N, C], [B, H, C, O] -> [B, H, N, O] in float32."""
  if a.dtype == b.dtype and jnp.finfo(a.dtype).bits < 32:
    fold = lambda x: x.reshape(-1, *x.shape[2:])
    return product.multiply(fold(a), fold(b)).reshape(*a.shape[:3], b.shape[3])
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(query, key, value, num_heads):
  """The answers, and logarithms of the sums of weights [B, H, N], which pass no gradient."""
  batch, queries, channels = query.shape
  parts = _attention.parts(batch, num_heads, queries)
  results = [
    jax.ShapeDtypeStruct(query.shape, query.dtype),
    jax.ShapeDtypeStruct((batch, num_heads, queries), jnp.float32),
  ]
  host = _attention.attend(kernels.max_lanes(), query.dtype == jnp.bfloat16)
  given = query, key, value, _scale(channels, num_heads), jnp.asarray([parts], jnp.int32)
  return tuple(kernels.call(host, results, *given, items=batch * num_heads * parts))


def _scale(channels, num_heads):
  return jnp.asarray([(channels // num_heads) ** -0.5], jnp.float32)


def _attend_forward(query, key, value, num_heads):
  out, logs = _attend(query, key, value, num_heads)
  return (out, logs), (query, key, value, logs)


def _attend_backward(num_heads, saved, cotangents):
  return _attend_gradient(*saved, cotangents[0], num_heads)


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend_gradient(query, key, value, logs, g, num_heads):
  """Gradients by query, key and value; the logarithms are functions of these and are not differentiated."""
  results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)]
  host = _attention.gradient(kernels.max_lanes(), query.dtype == jnp.bfloat16)
  given = query, key, value, _scale(query.shape[-1], num_heads), logs, g
  return tuple(kernels.call(host, results, *given, items=query.shape[0] * num_heads))


def _gradient_forward(query, key, value, logs, g, num_heads):
  return _attend_gradient(query, key, value, logs, g, num_heads), (query, key, value, logs, g)


def _gradient_backward(num_heads, saved, cotangents):
  query, key, value, logs, g = saved

  def plain(query, key, value, g):
    return jax.vjp(lambda *tokens: _by_xla(*tokens, num_heads), query, key, value)[1](g)

  dq, dk, dv, dg = jax.vjp(plain, query, key, value, g)[1](cotangents)
  return dq, dk, dv, jnp.zeros_like(logs), dg


_attend_gradient.defvjp(_gradient_forward, _gradient_backward)
