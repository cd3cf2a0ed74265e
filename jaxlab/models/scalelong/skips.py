"""Multipliers on long skip connections."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab import checks
from jaxlab.nn.initializers import torch_bias, torch_kernel
from jaxlab.nn.module import precision

Scaling = Literal["none", "inv_sqrt2", "constant", "learned", "learned_each"]
REDUCTION = 16  # how much narrower than its input the hidden layer of a gate is


def multipliers(scaling: Scaling, num_skips: int, kappa: float = 0.5) -> tuple[float, ...]:
  """Host. The constants k_i, outermost skip first.

  Args:
    scaling: a constant kind.
    num_skips: N.
    kappa: of "constant", in (0, 1]; the authors advise 0.5 to 0.95.

  Raises:
    ValueError: a learned kind, whose multipliers depend on the features; another argument out of range.
  """
  checks.choice("scaling", scaling, ("none", "inv_sqrt2", "constant"))
  checks.count("num_skips", num_skips)
  if not 0 < kappa <= 1:
    raise ValueError(f"kappa: got {kappa}, expected a number in (0, 1]")
  if scaling == "constant":
    return tuple(kappa**i for i in range(num_skips))
  return (1.0 if scaling == "none" else 2**-0.5,) * num_skips


class Gate(nn.Module):
  """sigmoid(W_2 ReLU(W_1 x + b_1) + b_2), L -> L / 16 -> L. Starts spread around a half.

  Attributes:
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, pooled: Float[Array, "b l"]) -> Float[Array, "b l"]:
    """Args: pooled, means of features. Returns multipliers in (0, 1). Raises ValueError on fewer than 16 entries."""
    size = pooled.shape[-1]
    if size < REDUCTION:
      raise ValueError(f"scaling: got a learned kind over {size} entries, expected at least {REDUCTION} of them")

    def dense(inputs: int, outputs: int, name: str) -> nn.Dense:
      return nn.Dense(outputs, kernel_init=torch_kernel, bias_init=torch_bias(inputs), name=name, **precision(self))

    hidden = nn.relu(dense(size, size // REDUCTION, "squeeze")(pooled))
    return nn.sigmoid(dense(size // REDUCTION, size, "excite")(hidden))


class SkipScaling(nn.Module):
  """Multiplies the skips of a network; called once for each.

  Learned gates see tokens averaged over features, and give one multiplier a token; they see maps averaged over
  positions, and give one a channel, with a gate of its own for each number of channels if shared.

  Attributes:
    scaling: see the package's docstring.
    num_skips: N.
    kappa: of "constant".
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  scaling: Scaling
  num_skips: int
  kappa: float = 0.5
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, skip: Float[Array, "b *p c"], level: int) -> Float[Array, "b *p c"]:
    """Scales one skip.

    Args:
      skip: tokens [B, L, C] or maps [B, H, W, C].
      level: i - 1: 0 for the outermost pair.

    Returns:
      The same shape, in the dtype of `skip`.

    Raises:
      ValueError: an unknown kind of scaling, kappa outside (0, 1], too few entries for a gate.
    """
    checks.choice("scaling", self.scaling, Scaling)
    if not self.scaling.startswith("learned"):
      return skip * multipliers(self.scaling, self.num_skips, self.kappa)[level]
    tokens = skip.ndim == 3
    pooled = jnp.mean(skip, -1 if tokens else (1, 2), dtype=jnp.float32)
    shared = "gate" if tokens else f"gate{skip.shape[-1]}"
    name = shared if self.scaling == "learned" else f"gate{level}"
    gate = Gate(name=name, **precision(self))(pooled).astype(skip.dtype)
    return skip * (gate[:, :, None] if tokens else gate[:, None, None, :])
