"""ImageNet as vision transformers train on it: cropping, flipping and RandAugment, on the host.

Each function maps one uint8 image to one of the size that the network sees; `images.batches` and grain apply them.
"""

from collections.abc import Callable

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps
from jaxtyping import UInt8

from jaxlab import checks

_MEAN = (124, 116, 104)  # colour of what a shifted image leaves free
_BICUBIC = PIL.Image.Resampling.BICUBIC


def train_crop(
  image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, *, size: int = 224, augment: bool = True
) -> UInt8[np.ndarray, "s s 3"]:
  """Host. A random part of the image at a random aspect, resized; half of them mirrored; then RandAugment.

  The part has 8 to 100 % of the area and an aspect of 3/4 to 4/3, log-uniform (Szegedy et al., arXiv:1409.4842).

  Args:
    image: of any size.
    rng: of everything.
    size: side of the result.
    augment: apply `rand_augment` with its defaults.
  """
  picture = _picture(image)
  box = _random_box(picture.width, picture.height, rng)
  picture = picture.resize((size, size), _BICUBIC, box=box)
  if rng.random() < 0.5:
    picture = PIL.ImageOps.mirror(picture)
  return np.asarray(_rand_augment(picture, rng) if augment else picture)


def evaluation_crop(image: UInt8[np.ndarray, "h w 3"], size: int = 224) -> UInt8[np.ndarray, "s s 3"]:
  """Host. The shorter side resized to size * 256 / 224, and the centre cut out of it."""
  picture = _picture(image)
  scale = int(size * 256 / 224) / min(picture.size)
  picture = picture.resize(
    (max(size, round(picture.width * scale)), max(size, round(picture.height * scale))), _BICUBIC
  )
  left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
  return np.asarray(picture.crop((left, top, left + size, top + size)))


def rand_augment(
  image: UInt8[np.ndarray, "h w 3"],
  rng: np.random.Generator,
  *,
  layers: int = 2,
  probability: float = 0.5,
  magnitude: float = 9.0,
  std: float = 0.5,
) -> UInt8[np.ndarray, "h w 3"]:
  """Host. Random operations in a row: "rand-m9-mstd0.5-inc1", the setting of DeiT, Swin and SMT.

  Cubuk et al., arXiv:1909.13719; ranges and the increasing forms are those of timm.

  Args:
    image: any size.
    rng: of everything.
    layers: operations drawn, with replacement, out of 15.
    probability: that a drawn operation is applied.
    magnitude: mean strength, out of 10.
    std: its standard deviation; strengths are cut to [0, 10].
  """
  checks.count("layers", layers, 0)
  checks.real("probability", probability)
  checks.real("magnitude", magnitude, 0.0, 10.0)
  return np.asarray(_rand_augment(_picture(image), rng, layers, probability, magnitude, std))


def _rand_augment(
  picture: PIL.Image.Image,
  rng: np.random.Generator,
  layers: int = 2,
  probability: float = 0.5,
  magnitude: float = 9.0,
  std: float = 0.5,
) -> PIL.Image.Image:
  for operation in rng.choice(len(_OPERATIONS), layers):
    if rng.random() < probability:
      strength = float(np.clip(rng.normal(magnitude, std), 0, 10)) / 10
      picture = _OPERATIONS[operation](picture, strength, rng)
  return picture


def _enhance(kind: Callable) -> Callable:
  """A factor of 1 (no change) plus or minus 0.9 * strength, at least 0.1."""
  return lambda picture, strength, rng: kind(picture).enhance(max(0.1, 1 + _either(0.9 * strength, rng)))


def _affine(matrix: Callable) -> Callable:
  def move(picture, strength, rng):
    coefficients = matrix(_either(strength, rng), picture.width, picture.height)
    return picture.transform(picture.size, PIL.Image.Transform.AFFINE, coefficients, _BICUBIC, fillcolor=_MEAN)

  return move


def _solarize_add(picture, strength, rng):
  added = min(128, int(110 * strength))
  return picture.point([min(255, i + added) if i < 128 else i for i in range(256)] * 3)


def _rotate(picture, strength, rng):
  return picture.rotate(_either(30 * strength, rng), _BICUBIC, fillcolor=_MEAN)


def _either(value, rng):
  return value if rng.random() < 0.5 else -value


_OPERATIONS: list[Callable] = [
  lambda picture, strength, rng: PIL.ImageOps.autocontrast(picture),
  lambda picture, strength, rng: PIL.ImageOps.equalize(picture),
  lambda picture, strength, rng: PIL.ImageOps.invert(picture),
  lambda picture, strength, rng: PIL.ImageOps.posterize(picture, max(1, 4 - int(4 * strength))),
  lambda picture, strength, rng: PIL.ImageOps.solarize(picture, 256 - min(256, int(256 * strength))),
  _solarize_add,
  _rotate,
  _enhance(PIL.ImageEnhance.Color),
  _enhance(PIL.ImageEnhance.Contrast),
  _enhance(PIL.ImageEnhance.Brightness),
  _enhance(PIL.ImageEnhance.Sharpness),
  _affine(lambda s, w, h: (1, 0.3 * s, 0, 0, 1, 0)),
  _affine(lambda s, w, h: (1, 0, 0, 0.3 * s, 1, 0)),
  _affine(lambda s, w, h: (1, 0, 0.45 * s * w, 0, 1, 0)),
  _affine(lambda s, w, h: (1, 0, 0, 0, 1, 0.45 * s * h)),
]


def _random_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
  """(left, top, right, bottom) inside the image."""
  for _ in range(10):
    area = rng.uniform(0.08, 1) * width * height
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
      return float(left), float(top), float(left + w), float(top + h)
  # A long, thin image: its centre, at the nearest aspect allowed.
  w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
  left, top = (width - w) / 2, (height - h) / 2
  return left, top, left + w, top + h


def _picture(image: np.ndarray) -> PIL.Image.Image:
  if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
    raise ValueError(f"image: got {image.dtype} {image.shape}, expected uint8 [height, width, 3]")
  return PIL.Image.fromarray(np.ascontiguousarray(image))
