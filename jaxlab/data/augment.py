"""Augmentation of whole batches on the device: mixup, CutMix, random erasing. Pure functions of a key, jit-able.

Labels are distributions [B, C]: `jax.nn.one_hot`, with smoothing (`optax.smooth_labels`) if wanted.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

Mixed = tuple[Float[Array, "b h w c"], Float[Array, "b k"]]


def mixup(
  key: PRNGKeyArray, images: Float[Array, "b h w c"], labels: Float[Array, "b k"], *, alpha: float = 0.2
) -> Mixed:
  """Convex combinations of pairs of examples: x' = l x + (1 - l) x[permuted], labels alike, l ~ Beta(alpha, alpha).

  One l for the batch, as in the authors' code. Zhang et al., ICLR 2018, arXiv:1710.09412.

  Args:
    key: of l and the permutation.
    images: [B, H, W, C].
    labels: [B, K], rows that sum to 1.
    alpha: above 0; small values mix little.

  Returns:
    Mixed images and labels, in the dtypes given.
  """
  _check(images, labels, alpha)
  key_share, key_order = jax.random.split(key)
  share = jax.random.beta(key_share, alpha, alpha)
  order = jax.random.permutation(key_order, len(images))
  return _blend(images, images[order], share), _blend(labels, labels[order], share)


def cutmix(
  key: PRNGKeyArray, images: Float[Array, "b h w c"], labels: Float[Array, "b k"], *, alpha: float = 1.0
) -> Mixed:
  """Pastes a box of another image over each, and mixes labels by the area that remains.

  The box has sides sqrt(1 - l) of the image's, l ~ Beta(alpha, alpha), a uniform centre, and is clipped at the border;
  one box for the batch. Yun et al., ICCV 2019, arXiv:1905.04899.

  Args:
    key: of the box and the permutation.
    images: [B, H, W, C].
    labels: [B, K], rows that sum to 1.
    alpha: above 0; 1 makes every area equally likely.

  Returns:
    Mixed images and labels, in the dtypes given.
  """
  _check(images, labels, alpha)
  key_share, key_box, key_order = jax.random.split(key, 3)
  side = jnp.sqrt(1 - jax.random.beta(key_share, alpha, alpha))
  box = _box(key_box, images.shape[1:3], side, side)
  order = jax.random.permutation(key_order, len(images))
  mixed = jnp.where(box[None, :, :, None], images[order], images)
  return mixed, _blend(labels, labels[order], 1 - jnp.mean(box, dtype="float32"))


def mixup_or_cutmix(
  key: PRNGKeyArray,
  images: Float[Array, "b h w c"],
  labels: Float[Array, "b k"],
  *,
  mixup_alpha: float = 0.8,
  cutmix_alpha: float = 1.0,
  cutmix_share: float = 0.5,
) -> Mixed:
  """One of the two for the batch, CutMix with probability `cutmix_share`: what DeiT and Swin train with."""
  if not 0 <= cutmix_share <= 1:
    raise ValueError(f"cutmix_share: got {cutmix_share}, expected a probability")
  key_choice, key_mix = jax.random.split(key)
  return jax.lax.cond(
    jax.random.bernoulli(key_choice, cutmix_share),
    lambda: cutmix(key_mix, images, labels, alpha=cutmix_alpha),
    lambda: mixup(key_mix, images, labels, alpha=mixup_alpha),
  )


def random_erase(
  key: PRNGKeyArray,
  images: Float[Array, "b h w c"],
  *,
  probability: float = 0.25,
  area: tuple[float, float] = (0.02, 1 / 3),
  aspect: float = 10 / 3,
) -> Float[Array, "b h w c"]:
  """Overwrites a box in some images with standard normal noise; each image draws its own. Images are normalised ones.

  Zhong et al., AAAI 2020, arXiv:1708.04896. Differs: a box that reaches over the border is clipped, not drawn again.

  Args:
    key: of everything.
    images: [B, H, W, C].
    probability: that an image is touched.
    area: smallest and largest part of the image, before clipping.
    aspect: height over width is log-uniform in [1 / aspect, aspect].

  Returns:
    Images in the dtype given.
  """
  if not 0 <= probability <= 1:
    raise ValueError(f"probability: got {probability}, expected a number in [0, 1]")
  if not 0 < area[0] <= area[1] <= 1:
    raise ValueError(f"area: got {area}, expected 0 < smallest <= largest <= 1")
  if not aspect >= 1:
    raise ValueError(f"aspect: got {aspect}, expected at least 1")
  if images.ndim != 4:
    raise ValueError(f"images: got shape {images.shape}, expected [B, H, W, C]")

  def erase(key: PRNGKeyArray, image: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    key_hit, key_area, key_aspect, key_box, key_noise = jax.random.split(key, 5)
    part = jax.random.uniform(key_area, minval=area[0], maxval=area[1])
    root = jnp.exp(jax.random.uniform(key_aspect, minval=-1.0, maxval=1.0) * jnp.log(aspect) / 2)
    height, width, _ = image.shape
    # Aspect is of pixels; _box wants sides as parts of the image's.
    square = jnp.sqrt(part * height * width)
    box = _box(key_box, (height, width), square * root / height, square / root / width)
    hit = jax.random.bernoulli(key_hit, probability)
    return jnp.where(hit & box[:, :, None], jax.random.normal(key_noise, image.shape, image.dtype), image)

  return jax.vmap(erase)(jax.random.split(key, len(images)), images)


def _box(key: PRNGKeyArray, shape: tuple[int, ...], height: Array, width: Array) -> Bool[Array, "h w"]:
  """True in a box with the given sides (as parts of the image's) about a uniform centre, clipped at the border."""
  rows, columns = (
    jnp.abs(jnp.arange(n) + 0.5 - jax.random.uniform(k) * n) < side * n / 2
    for k, n, side in zip(jax.random.split(key), shape, (height, width), strict=True)
  )
  return rows[:, None] & columns[None, :]


def _blend(a: Array, b: Array, share: Array) -> Array:
  return (share * a + (1 - share) * b).astype(a.dtype)  # `share` is float32, and so is the sum


def _check(images: Array, labels: Array, alpha: float) -> None:
  if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(f"images: got {images.dtype} {images.shape}, expected floats [B, H, W, C]")
  if labels.ndim != 2 or len(labels) != len(images) or not jnp.issubdtype(labels.dtype, jnp.floating):
    raise ValueError(f"labels: got {labels.dtype} {labels.shape}, expected distributions [{len(images)}, K] (one_hot)")
  if not alpha > 0:
    raise ValueError(f"alpha: got {alpha}, expected a number above 0")
