"""The one-layer transformer that adds two numbers modulo a prime, and its data."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab import checks, interop
from jaxlab.analysis.local_interaction_basis import sections


class ModularAddition(nn.Module):
  """Tokens (i, j, =) -> logits of i + j mod p at the last position: attention, a ReLU perceptron, no layer norm.

  Attributes:
    modulus: p; tokens and logits are of p + 1 symbols, the last is "=".
    features: D.
    num_heads: H; divides D.
    hidden: of the perceptron; None for 4 D.
    dtype: compute dtype; the softmax is in float32 at least.
    param_dtype: parameter dtype.
  """

  modulus: int = 113
  features: int = 128
  num_heads: int = 4
  hidden: int | None = None
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, tokens: Int[Array, "b 3"], *, train: bool = False) -> Float[Array, "b p+1"]:
    """Logits.

    Raises:
      ValueError: other tokens than integers [B, 3], or heads that do not divide the features.
    """
    if tokens.ndim != 2 or tokens.shape[1] != 3 or not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise ValueError(f"tokens: got {tokens.dtype} {tokens.shape}, expected integers [batch, 3]")
    if self.features % self.num_heads:
      raise ValueError(f"num_heads: got {self.num_heads}, expected a divisor of features, {self.features}")
    size = self.features // self.num_heads
    init = nn.initializers.normal(0.8 / self.features**0.5)
    options: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": init}
    table: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype, "embedding_init": init}

    x = nn.Embed(self.modulus + 1, self.features, name="embed", **table)(tokens)
    x = x + nn.Embed(3, self.features, name="position", **table)(jnp.arange(3))
    heads = lambda name: nn.DenseGeneral((self.num_heads, size), name=name, **options)
    x_last = x[:, -1]  # the answer is read there, so no other position need ask
    q, k, v = heads("query")(x_last) / size**0.5, heads("key")(x), heads("value")(x)
    scores = jnp.einsum("bhk,bphk->bhp", q, k)
    share = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, "float32"))).astype(v.dtype)
    mixed = jnp.einsum("bhp,bphk->bhk", share, v)
    x = x_last + nn.DenseGeneral(self.features, axis=(-2, -1), name="out", **options)(mixed)
    hidden = nn.relu(nn.Dense(self.hidden or 4 * self.features, name="mlp_in", **options)(x))
    x = x + nn.Dense(self.features, name="mlp_out", **options)(hidden)
    return nn.Dense(self.modulus + 1, name="unembed", **options)(x)


_LAYERS = {"query": "attn.{}_Q", "key": "attn.{}_K", "value": "attn.{}_V", "out": "attn.{}_O"}
_LAYERS |= {"mlp_in": "mlp.{}_in", "mlp_out": "mlp.{}_out"}
_HEADS = {
  "to_flax": lambda w: np.moveaxis(w, 0, 1),  # [H, D, K] -> [D, H, K]
  "to_torch": lambda w: np.moveaxis(w, 1, 0),
}
WEIGHTS = {
  "params/embed/embedding": interop.raw("embed.W_E"),
  "params/position/embedding": interop.raw("pos_embed.W_pos"),
  "params/unembed/kernel": interop.raw("unembed.W_U"),
  "params/unembed/bias": interop.raw("unembed.b_U"),
}
for _name, _source in _LAYERS.items():
  _moved = _HEADS if _name in ("query", "key", "value") else {}
  WEIGHTS[f"params/{_name}/kernel"] = interop.raw(f"blocks.0.{_source.format('W')}", **_moved)
  WEIGHTS[f"params/{_name}/bias"] = interop.raw(f"blocks.0.{_source.format('b')}")


def from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Weights of the official checkpoints as variables of `ModularAddition`; its causal masks are left out."""
  return interop.variables(state_dict, WEIGHTS, ignore=("*.mask", "*.IGNORE"))


def modular_addition(params: Any) -> tuple[sections.Attention, sections.Block, sections.Dense]:
  """The sections between embedding, attention, perceptron and logits, biases folded in.

  Args:
    params: of `ModularAddition`.
  """
  attention = {name: params[name] for name in ("query", "key", "value", "out")}
  return (
    sections.attention(**attention, last_only=True),
    sections.block(params["mlp_in"], params["mlp_out"]),
    sections.dense(**params["unembed"], activation="identity", last=True),
  )


def embed(params: Any, tokens: Int[Array, "b 3"]) -> Float[Array, "b 3 d+1"]:
  """Activations of the first node layer of `modular_addition`: embeddings and a 1."""
  x = jnp.asarray(params["embed"]["embedding"])[tokens] + jnp.asarray(params["position"]["embedding"])
  return sections.with_one(x)


def pairs(
  modulus: int = 113, *, train: float = 0.3, seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Host. All pairs (i, j) as tokens [N, 3] and labels [N], in a part to train on and one to test on.

  The split is the one of the official code: PyTorch's random permutation, of which `train` come first.

  Args:
    modulus: p.
    train: share of the pairs to train on.
    seed: of the permutation.
  """
  checks.count("modulus", modulus, 2)
  checks.real("train", train)
  numbers = np.arange(modulus, dtype="int32")
  i, j = np.repeat(numbers, modulus), np.tile(numbers, modulus)
  tokens, labels = np.stack([i, j, np.full_like(i, modulus)], 1), (i + j) % modulus
  order = np.arange(modulus**2)
  # Fisher and Yates's shuffle with the 32-bit words of the Mersenne twister.
  words = np.random.RandomState(checks.count("seed", seed, 0)).randint(0, 2**32, len(order) - 1, "uint32")
  for at, word in enumerate(words):
    other = at + int(word) % (len(order) - at)
    order[at], order[other] = order[other], order[at]
  cut = int(len(order) * train)
  first, second = ({"tokens": tokens[part], "label": labels[part]} for part in (order[:cut], order[cut:]))
  return first, second
