"""The networks of the paper's experiments, and official weights of its GN-LeNet."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab import interop


class GNLeNet(nn.Module):
  """LeNet with group normalisation for 32x32 images. The first block pools before it normalises, the others after.

  Attributes:
    num_classes: C.
    dtype: of the computation.
    param_dtype: of the weights.
  """

  num_classes: int = 10
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b k"]:
    """Log-probabilities [B, C] of images [B, 32, 32, 3]."""
    kind: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    for i, width in enumerate((32, 32, 64)):
      norm = nn.GroupNorm(2, epsilon=1e-5, name=f"norm{i}", **kind)
      x = nn.Conv(width, (5, 5), padding=2, name=f"conv{i}", **kind)(x)
      x = norm(nn.max_pool(x, (3, 3), (2, 2))) if i == 0 else nn.max_pool(norm(x), (3, 3), (2, 2))
      x = nn.relu(x)
    logits = nn.Dense(self.num_classes, name="classifier", **kind)(_channels_first(x))
    return jax.nn.log_softmax(logits.astype(jnp.float32)).astype(self.dtype)


class FEMNIST(nn.Module):
  """The network for 28x28 characters of 62 classes."""

  num_classes: int = 62
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b k"]:
    """Logits [B, C] of images [B, 28, 28, 1]."""
    kind: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    for i, width in enumerate((32, 64)):
      x = nn.max_pool(nn.Conv(width, (5, 5), padding=2, name=f"conv{i}", **kind)(x), (2, 2), (2, 2))
      x = nn.relu(x)
    x = nn.relu(nn.Dense(512, name="hidden", **kind)(_channels_first(x)))
    return nn.Dense(self.num_classes, name="classifier", **kind)(x)


class CelebA(nn.Module):
  """The network for 84x84 faces of two classes."""

  num_classes: int = 2
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b k"]:
    """Logits [B, C] of images [B, 84, 84, 3]."""
    kind: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    for i in range(4):
      x = nn.relu(nn.max_pool(nn.Conv(32, (3, 3), name=f"conv{i}", **kind)(x), (2, 2), (2, 2)))
    return nn.Dense(self.num_classes, name="classifier", **kind)(_channels_first(x))


class Factorization(nn.Module):
  """Ratings as products of factors of users and items (MovieLens: 610 users, 9,724 items, rank 20).

  Attributes:
    users: how many.
    items: how many.
    rank: of the factors.
    param_dtype: of the weights.
  """

  users: int = 610
  items: int = 9724
  rank: int = 20
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, pairs: Int[Array, "b 2"], *, train: bool = False) -> Float[Array, " b"]:
    """Ratings [B] of (user, item), numbers from 0. Traced numbers cannot be checked: unknown ones rate NaN."""
    if not isinstance(pairs, jax.core.Tracer):
      for name, known, found in (("users", self.users, pairs[:, 0]), ("items", self.items, pairs[:, 1])):
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < known:
          raise ValueError(f"pairs: got {name} {found.min()} to {found.max()}, expected 0 to {known - 1}")
    init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -0.05, 0.05)
    user = nn.Embed(self.users, self.rank, embedding_init=init, param_dtype=self.param_dtype, name="users_")
    item = nn.Embed(self.items, self.rank, embedding_init=init, param_dtype=self.param_dtype, name="items_")
    return jnp.sum(user(pairs[:, 0]) * item(pairs[:, 1]), axis=-1)


def from_torch(state_dict: dict[str, Any]) -> dict[str, Any]:
  """Official weights of the GN-LeNet as flax variables."""
  rules: dict[str, Any] = {"params/classifier": interop.dense("classifier.0")}
  # Layers are numbered through, and the first block pools before it normalises.
  for i, (conv, norm) in enumerate(((0, 2), (4, 5), (8, 9))):
    rules[f"params/conv{i}"] = interop.conv(f"features.{conv}")
    rules[f"params/norm{i}"] = interop.norm(f"features.{norm}")
  return interop.variables(state_dict, rules)


def _channels_first(x: Float[Array, "b h w c"]) -> Float[Array, "b chw"]:
  """Flat, in the order in which the official classifier reads them."""
  return jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
