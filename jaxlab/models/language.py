"""A small decoder language model, and what is measured on its logits.

    x_t = E[token_t] + P[t]
    x = Block_depth(...Block_1(x))              # pre-norm, causal: `jaxlab.nn.transformer`
    logits_t = E LN(x_t)                        # predicts token t + 1

The layout is GPT-2's (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019): learned positions,
pre-norm blocks, a final norm, and the embedding again as the output matrix. GELU is the exact one and layer norms have
epsilon 1e-5.

Sentences are padded at the end, so that no token sees padding. A `mask` says which tokens count as targets: token t is
predicted from the logits at t - 1, and a first token is predicted from nothing, hence never a target.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab import checks
from jaxlab.nn.layer_norm import LayerNorm
from jaxlab.nn.module import precision
from jaxlab.nn.transformer import Block
from jaxlab.train.learner import Batch, Metrics


class LanguageModel(nn.Module):
  """Tokens to the logits of each next token.

  Blocks are named `block0`, `block1`, ..., so that the first weight of the MLP of block 2 is `block2/mlp/fc1/kernel`.

  Attributes:
    vocab_size: V.
    width: C.
    depth: blocks.
    num_heads: divides C.
    max_length: most tokens in a sentence.
    mlp_ratio: hidden width of the MLPs, in units of C.
    dtype: compute dtype; norms, softmax and logits are in float32.
    param_dtype: parameter dtype.
  """

  vocab_size: int
  width: int = 64
  depth: int = 3
  num_heads: int = 4
  max_length: int = 32
  mlp_ratio: float = 4.0
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  def __post_init__(self) -> None:
    """Checks the sizes."""
    checks.count("vocab_size", self.vocab_size, 2)
    checks.count("depth", self.depth)
    checks.count("max_length", self.max_length)
    checks.count("width", self.width)
    if self.width % checks.count("num_heads", self.num_heads):
      raise ValueError(f"num_heads: got {self.num_heads}, expected a divisor of the width, {self.width}")
    super().__post_init__()

  @nn.compact
  def __call__(self, tokens: Int[Array, "b n"], *, train: bool = False) -> Float[Array, "b n v"]:
    """Logits of the token after each, in float32.

    Args:
      tokens: ids below V.
      train: there is no dropout, so that it changes nothing.

    Raises:
      ValueError: tokens that are not whole numbers [B, N], or more than `max_length` of them.
    """
    del train
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise ValueError(f"tokens: got {tokens.dtype} of shape {tokens.shape}, expected whole numbers [batch, length]")
    if tokens.shape[1] > self.max_length:
      raise ValueError(f"tokens: got {tokens.shape[1]} a sentence, expected at most max_length, {self.max_length}")
    options = precision(self)
    embed = nn.Embed(self.vocab_size, self.width, name="embed", embedding_init=nn.initializers.normal(0.02), **options)
    position = self.param("position", nn.initializers.normal(0.02), (self.max_length, self.width), self.param_dtype)
    x = embed(tokens) + position[: tokens.shape[1]].astype(self.dtype)
    for i in range(self.depth):
      x = Block(self.num_heads, self.mlp_ratio, causal=True, epsilon=1e-5, name=f"block{i}", **options)(x)
    x = LayerNorm(1e-5, name="norm", **options)(x)
    return jnp.einsum("bnc,vc->bnv", x, embed.embedding.astype(self.dtype), preferred_element_type=jnp.float32)


def check_sentences(name: str, sentences: Batch) -> None:
  """Raises a ValueError unless these are whole `tokens` [..., N] and a bool `mask` of the same shape, N at least 2."""
  if missing := [part for part in ("tokens", "mask") if part not in sentences]:
    raise ValueError(f"{name}: got {sorted(sentences)}, expected {' and '.join(missing)} too")
  tokens, mask = sentences["tokens"], sentences["mask"]
  if not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f"{name}: got tokens of {tokens.dtype}, expected whole numbers")
  check_mask(name, mask)
  if tokens.ndim < 1 or tokens.shape[-1] < 2 or tokens.shape != mask.shape:
    raise ValueError(
      f"{name}: got tokens {tokens.shape} and mask {mask.shape}, expected the same [..., length], at least 2 long"
    )


def check_mask(name: str, mask: Array) -> None:
  """Raises a ValueError unless the mask is bool: of a whole number, `~` is not the opposite."""
  if mask.dtype != bool:
    raise ValueError(f"{name}: got a mask of {mask.dtype}, expected bool")


def log_likelihood(logits: Float[Array, "*b n v"], tokens: Int[Array, "*b n"]) -> Float[Array, "*b n-1"]:
  """log p(token t | tokens before), of every token but the first, in float32."""
  logits = logits[..., :-1, :].astype(jnp.float32)
  chosen = jnp.take_along_axis(logits, tokens[..., 1:, None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def sentence_nll(
  logits: Float[Array, "*b n v"], tokens: Int[Array, "*b n"], mask: Bool[Array, "*b n"]
) -> Float[Array, "*b"]:
  """Negative log-likelihood of each sentence's targets, the mean over them; 0 for a sentence without a target.

  Raises:
    ValueError: a mask that is not bool.
  """
  check_mask("mask", mask)
  weight = mask[..., 1:].astype(jnp.float32)
  total = jnp.sum(weight * log_likelihood(logits, tokens), axis=-1)
  return -total / jnp.maximum(jnp.sum(weight, axis=-1), 1.0)


def sentence_success(
  logits: Float[Array, "*b n v"], tokens: Int[Array, "*b n"], mask: Bool[Array, "*b n"]
) -> Float[Array, "*b"]:
  """1 where every target of a sentence is the likeliest token, given those before; else 0.

  Raises:
    ValueError: a mask that is not bool.
  """
  check_mask("mask", mask)
  right = jnp.argmax(logits[..., :-1, :], axis=-1) == tokens[..., 1:]
  return jnp.all(right | ~mask[..., 1:], axis=-1).astype(jnp.float32)


def next_token(logits: Float[Array, "b n v"], batch: Batch) -> tuple[Float[Array, ""], Metrics]:
  """Loss for `train.supervised`, with `inputs=lambda batch: batch["tokens"]`.

  Args:
    logits: of the model.
    batch: `tokens` [B, N] and `mask` [B, N], True at targets.

  Returns:
    Mean negative log-likelihood of all targets, and the fraction of sentences with every target right as `accuracy`.

  Raises:
    ValueError: tokens and mask of different shapes, tokens that are not whole numbers, a mask that is not bool.
  """
  check_sentences("batch", batch)
  tokens, mask = batch["tokens"], batch["mask"]
  weight = mask[..., 1:].astype(jnp.float32)
  loss = -jnp.sum(weight * log_likelihood(logits, tokens)) / jnp.maximum(jnp.sum(weight), 1.0)
  return loss, {"accuracy": jnp.mean(sentence_success(logits, tokens, mask))}
