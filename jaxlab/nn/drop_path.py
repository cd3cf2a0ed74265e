"""Stochastic depth: residual branches that vanish at random while training.

Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016, arXiv:1603.09382.
"""

from collections.abc import Sequence

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float

from jaxlab import checks


class DropPath(nn.Module):
  """Zeroes a residual branch of whole samples and scales what is kept by 1 / (1 - rate), so that the mean stays.

  Draws from the "dropout" stream, while training only.

  Attributes:
    rate: probability that a sample loses the branch, in [0, 1).
  """

  rate: float

  @nn.compact
  def __call__(self, branch: Float[Array, "b ..."], *, train: bool) -> Float[Array, "b ..."]:
    """Args: branch, one row a sample. Returns the same shape and dtype."""
    checks.rate("rate", self.rate)
    return nn.Dropout(self.rate, broadcast_dims=tuple(range(1, branch.ndim)))(branch, deterministic=not train)


def linear_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
  """Drop rates that grow linearly from 0 at the first block to `rate` at the last, grouped by stage.

  Args:
    rate: of the last block, in [0, 1).
    depths: number of blocks of each stage.

  Returns:
    For each stage a list of `depth` rates.

  Raises:
    ValueError: rate out of range.
  """
  checks.rate("rate", rate)
  rates = np.linspace(0, rate, sum(depths))
  return [rates[stop - depth : stop].tolist() for depth, stop in zip(depths, np.cumsum(depths), strict=True)]
