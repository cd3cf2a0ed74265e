"""PyTorch's default initialisers: of a weight or a bias with F inputs, U(-1 / sqrt(F), 1 / sqrt(F))."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

torch_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias(fan_in: int) -> jax.nn.initializers.Initializer:
  """Of a bias, whose shape does not tell the number of inputs."""
  bound = fan_in**-0.5

  def init(key: Array, shape: Sequence[Any], dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init
