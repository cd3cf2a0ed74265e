"""Inference on volumes larger than a network's patch: overlapping patches, averaged with weights.

As in nnU-Net (Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image
segmentation", Nature Methods 2021): patches lie at even distances of about half their sides, each voxel of a patch
counts by a Gaussian around the patch's centre, and a patch may also be seen mirrored.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Predict = Callable[[Array], Array]


def sliding_window(
  predict: Predict, volumes: Float[Array, "b d h w c"], patch: Sequence[int], *, step: float = 0.5
) -> Float[Array, "b d h w k"]:
  """Weighted mean of what `predict` says about overlapping patches.

  One patch after the other, in one compiled loop; memory is that of one patch and of the result.

  Args:
    predict: patches [B, *patch, C] -> class probabilities, or whatever is to be averaged, [B, *patch, K]. Traced.
    volumes: of any sides; where they are shorter than the patch, zeros are added on both sides for `predict`.
    patch: depth, height and width of a patch.
    step: the largest distance of neighbouring patches, in units of the patch; in (0, 1].

  Returns:
    Means over patches, float32.

  Raises:
    ValueError: volumes of wrong rank, patches that are not three positive integers, a step out of range.
  """
  if volumes.ndim != 5:
    raise ValueError(f"volumes: got shape {volumes.shape}, expected [batch, depth, height, width, channels]")
  _check_patch(patch)
  if not 0 < step <= 1:
    raise ValueError(f"step: got {step}, expected a fraction in (0, 1]")
  sides = volumes.shape[1:4]
  missing = [max(p - n, 0) for n, p in zip(sides, patch, strict=True)]
  before = [m // 2 for m in missing]
  padded = jnp.pad(volumes, ((0, 0), *((b, m - b) for b, m in zip(before, missing, strict=True)), (0, 0)))
  starts = jnp.asarray(
    list(itertools.product(*(positions(n, p, step) for n, p in zip(padded.shape[1:4], patch, strict=True)))),
    jnp.int32,
  )
  weight = jnp.asarray(importance(tuple(patch)))[..., None]
  cut = lambda start: jax.lax.dynamic_slice(padded, (0, *start, 0), (padded.shape[0], *patch, padded.shape[-1]))
  classes = jax.eval_shape(predict, cut(starts[0])).shape[-1]

  def add(sums: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
    total, weights = sums
    said = predict(cut(start)).astype(jnp.float32) * weight
    place = (0, *start, 0)
    total = jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, place, said.shape) + said, place)
    old = jax.lax.dynamic_slice(weights, place[1:], weight.shape)
    return (total, jax.lax.dynamic_update_slice(weights, old + weight, place[1:])), None

  empty = jnp.zeros((*padded.shape[:-1], classes)), jnp.zeros((*padded.shape[1:-1], 1))
  (total, weights), _ = jax.lax.scan(add, empty, starts)
  return (total / weights)[:, *(slice(b, b + n) for b, n in zip(before, sides, strict=True))]


def mirrored(predict: Predict, axes: Sequence[int] = (0, 1, 2)) -> Predict:
  """The mean of `predict` over all ways to mirror a volume.

  Args:
    predict: volumes [B, D, H, W, C] -> [B, D, H, W, K].
    axes: which may be mirrored; 0 is depth. n axes cost 2^n predictions.

  Returns:
    A function like `predict`.

  Raises:
    ValueError: axes other than 0, 1 and 2, or one twice.
  """
  if len(set(axes)) != len(axes) or not set(axes) <= {0, 1, 2}:
    raise ValueError(f"axes: got {tuple(axes)}, expected different ones of 0, 1 and 2")
  ways = [way for count in range(len(axes) + 1) for way in itertools.combinations([a + 1 for a in axes], count)]

  def mean(x: Array) -> Array:
    total = predict(x)
    for way in ways[1:]:
      total = total + jnp.flip(predict(jnp.flip(x, way)), way)
    return total / len(ways)

  return mean


def positions(length: int, patch: int, step: float = 0.5) -> list[int]:
  """Host. First voxels of the patches along an axis: from 0 to length - patch, at even distances.

  Distances are at most step * patch, before they are rounded to whole voxels.
  """
  most = length - patch
  count = math.ceil(most / (patch * step)) + 1
  return [round(most / max(count - 1, 1) * i) for i in range(count)]


@functools.lru_cache(maxsize=8)
def importance(patch: tuple[int, ...], scale: float = 1 / 8) -> Float[np.ndarray, "d h w"]:
  """Host. How much each voxel of a patch counts: a Gaussian around the voxel patch // 2, its largest value 1.

  Args:
    patch: sides.
    scale: standard deviations, in units of the sides.

  Returns:
    Float32, not below exp(-24) at any voxel for the default scale.
  """
  _check_patch(patch)
  axes = [np.exp(-0.5 * ((np.arange(n) - n // 2) / (n * scale)) ** 2) for n in patch]
  return np.einsum("d,h,w->dhw", *axes).astype(np.float32)


def _check_patch(patch: Sequence[int]) -> None:
  if len(patch) != 3 or any(int(n) != n or n < 1 for n in patch):
    raise ValueError(f"patch: got {tuple(patch)}, expected three positive integers")
