"""What the vision networks share besides layers: handing precision on, and checking images."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


def precision(module: Any) -> dict[str, Any]:
  """`dtype` and `param_dtype` of a module, as arguments for its layers."""
  return {"dtype": module.dtype, "param_dtype": module.param_dtype}


def check_images(images: Array, in_channels: int) -> None:
  """Raises a ValueError unless these are floats [B, H, W, in_channels]."""
  if images.ndim != 4:
    raise ValueError(f"images: got shape {images.shape}, expected [batch, height, width, channels]")
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(f"images: got dtype {images.dtype}, expected floats, already normalised")
  if images.shape[-1] != in_channels:
    raise ValueError(f"images: got {images.shape[-1]} channels, expected in_channels, {in_channels}, last")
