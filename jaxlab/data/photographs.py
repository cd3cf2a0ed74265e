"""Photographs that scikit-image and scikit-learn ship, and graded distortions of them, for image quality.

Distortions are of the kinds of KADID-10k (Lin, Hosu and Saupe, QoMEX 2019), each at five levels, with parameters of our
own, as theirs are for pictures of 512x384. Nobody was asked how the pictures look: quality is the level.
"""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.ndimage
import scipy.signal
from jaxtyping import Float, Int, UInt8

from jaxlab import checks

Image = Float[np.ndarray, "h w 3"]  # in [0, 1]

LEVELS = 5
GREY = ("brick", "camera", "coins", "grass", "gravel", "moon")
COLOUR = ("astronaut", "china", "coffee", "cat", "flower", "hubble", "motorcycle", "retina", "rocket", "tissue")
CONTENTS = (*COLOUR, *GREY)


class Graded(NamedTuple):
  """Distorted photographs.

  Attributes:
    image: N pictures [H, W, 3], sizes differ from content to content.
    reference: N pictures that they were made of.
    content: [N], index into `CONTENTS`, or the number of another picture.
    distortion: [N], index into `DISTORTIONS`.
    level: [N], 1 to 5.
    quality: [N], 1 at level 1 to 0 at level 5.
  """

  image: list[UInt8[np.ndarray, "h w 3"]]
  reference: list[UInt8[np.ndarray, "h w 3"]]
  content: Int[np.ndarray, " n"]
  distortion: Int[np.ndarray, " n"]
  level: Int[np.ndarray, " n"]
  quality: Float[np.ndarray, " n"]


class Split(NamedTuple):
  """Disjoint sets of contents."""

  train: tuple[str, ...]
  val: tuple[str, ...]
  test: tuple[str, ...]


def split(*, val: int = 3, test: int = 4, seed: int = 0) -> Split:
  """Host. Contents, shuffled and dealt: no set shows what another does.

  Args:
    val: contents to choose settings by.
    test: contents to test on; the two leave some for training.
    seed: of the shuffle.
  """
  checks.count("val", val, 1)
  checks.count("test", test, 1, len(CONTENTS) - val - 1)
  names = [CONTENTS[i] for i in np.random.default_rng(seed).permutation(len(CONTENTS))]
  return Split(tuple(names[val + test :]), tuple(names[test : val + test]), tuple(names[:test]))


@functools.cache
def photograph(name: str, side: int = 256) -> UInt8[np.ndarray, "h w 3"]:
  """Host. A picture in colour, or grey in three equal channels; scaled down, and cut to 4:3 or narrower.

  Args:
    name: of `CONTENTS`.
    side: the shorter one, in pixels, 16 to 288.

  Raises:
    ValueError: an argument out of range.
  """
  import PIL.Image
  import skimage.data
  import sklearn.datasets

  checks.choice("name", name, CONTENTS)
  checks.count("side", side, 16, 288)
  other: dict[str, Callable[[], np.ndarray]] = {
    "cat": skimage.data.chelsea,
    "china": lambda: sklearn.datasets.load_sample_image("china.jpg"),
    "flower": lambda: sklearn.datasets.load_sample_image("flower.jpg"),
    "hubble": skimage.data.hubble_deep_field,
    "motorcycle": lambda: skimage.data.stereo_motorcycle()[0],
    "tissue": skimage.data.immunohistochemistry,
  }
  x = np.asarray(other[name]() if name in other else getattr(skimage.data, name)())
  if x.ndim == 2:
    x = np.repeat(x[..., None], 3, -1)
  scale = side / min(x.shape[:2])
  size = tuple(round(n * scale) for n in x.shape[1::-1])
  x = np.asarray(PIL.Image.fromarray(x).resize(size, PIL.Image.Resampling.LANCZOS))
  top, left = (max(n - side * 4 // 3, 0) // 2 for n in x.shape[:2])
  x = x[top : top + side * 4 // 3, left : left + side * 4 // 3]
  x.setflags(write=False)  # the cache hands out the same array
  return x


def graded(
  contents: Sequence[str], side: int = 256, *, distortions: Sequence[str] | None = None, seed: int = 0
) -> Graded:
  """Host. Distortions at every level of some photographs; grey ones are not saturated.

  Args:
    contents: of `CONTENTS`.
    side: of the pictures' shorter sides.
    distortions: of `DISTORTIONS`; None for all.
    seed: of the noise; a picture's is the same whatever else is made.

  Raises:
    ValueError: an argument out of range.
  """
  if not contents:
    raise ValueError("contents: got none, expected at least one")
  pictures = [photograph(name, side) for name in contents]
  numbers = map(CONTENTS.index, contents)
  return graded_pictures(dict(zip(numbers, pictures, strict=True)), distortions=distortions, seed=seed)


def graded_pictures(
  pictures: Mapping[int, UInt8[np.ndarray, "h w 3"]], *, distortions: Sequence[str] | None = None, seed: int = 0
) -> Graded:
  """Host. Distortions at every level of any pictures; grey ones are not saturated.

  Args:
    pictures: by number, which becomes their `content`.
    distortions: of `DISTORTIONS`; None for all.
    seed: of the noise; a picture's depends on its number too.

  Raises:
    ValueError: an argument out of range.
  """
  if not pictures:
    raise ValueError("pictures: got none, expected at least one")
  if distortions is not None and (not distortions or not set(distortions) <= set(DISTORTIONS)):
    raise ValueError(f"distortions: got {tuple(distortions)}, expected some of {', '.join(DISTORTIONS)}")
  checks.count("seed", seed, 0)
  images, references, rows = [], [], []
  for content, reference in pictures.items():
    grey = np.ptp(reference, -1).max() == 0
    for k, name in enumerate(DISTORTIONS):
      if (distortions is not None and name not in distortions) or (name == "saturation" and grey):
        continue
      for level in range(1, LEVELS + 1):
        row = (content, k, level)
        images.append(distort(reference, name, level, np.random.default_rng((seed, *row))))
        references.append(reference)
        rows.append(row)
  content_, distortion, level_ = np.array(rows).T
  return Graded(images, references, content_, distortion, level_, 1 - (level_ - 1) / (LEVELS - 1))


def distort(
  image: UInt8[np.ndarray, "h w 3"], name: str, level: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
  """Host. A picture made worse.

  Args:
    image: the picture.
    name: of `DISTORTIONS`.
    level: 1, hardly to be seen, to 5.
    rng: of noise, directions and places.

  Raises:
    ValueError: an argument out of range.
  """
  checks.choice("name", name, tuple(DISTORTIONS))
  checks.count("level", level, 1, LEVELS)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
    raise ValueError(f"image: got {image.dtype} of shape {image.shape}, expected uint8 [H, W, 3]")
  function, amounts = DISTORTIONS[name]
  return _bytes(function(image.astype(np.float32) / 255, amounts[level - 1], rng))


def _bytes(x: Image) -> UInt8[np.ndarray, "h w 3"]:
  return np.round(np.clip(x, 0, 1) * 255).astype(np.uint8)


# Each takes a picture, an amount and a generator.


def _gaussian_blur(x: Image, sigma: float, rng: np.random.Generator) -> Image:
  return scipy.ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="reflect")


def _filtered(x: Image, kernel: Float[np.ndarray, "k k"]) -> Image:
  r = len(kernel) // 2
  padded = np.pad(x, ((r, r), (r, r), (0, 0)), mode="symmetric")
  return scipy.signal.fftconvolve(padded, (kernel / kernel.sum())[..., None], "valid", axes=(0, 1))


def _disc_blur(x: Image, radius: float, rng: np.random.Generator) -> Image:
  y = np.arange(-int(radius) - 1, int(radius) + 2)
  return _filtered(x, np.clip(radius + 0.5 - np.hypot(y[:, None], y), 0, 1))


def _motion_blur(x: Image, length: float, rng: np.random.Generator) -> Image:
  r, angle = int(length) // 2 + 1, rng.uniform(0, np.pi)
  kernel = np.zeros((2 * r + 1, 2 * r + 1))
  for at in np.linspace(-length / 2, length / 2, 8 * r):
    kernel[round(r + at * np.sin(angle)), round(r + at * np.cos(angle))] += 1
  return _filtered(x, kernel)


def _white_noise(x: Image, std: float, rng: np.random.Generator) -> Image:
  return x + rng.normal(0, std, x.shape)


def _colour_noise(x: Image, std: float, rng: np.random.Generator) -> Image:
  noise = rng.normal(0, std, x.shape)
  return x + noise - noise.mean(-1, keepdims=True)


def _speckle(x: Image, std: float, rng: np.random.Generator) -> Image:
  return x * (1 + rng.normal(0, std, x.shape))


def _impulse_noise(x: Image, part: float, rng: np.random.Generator) -> Image:
  return np.where(rng.random(x.shape) < part, rng.integers(0, 2, x.shape), x)


def _coded(x: Image, **options: Any) -> Image:
  import PIL.Image

  file = io.BytesIO()
  PIL.Image.fromarray(_bytes(x)).save(file, **options)
  return np.asarray(PIL.Image.open(file), np.float32) / 255


def _jpeg(x: Image, quality: float, rng: np.random.Generator) -> Image:
  return _coded(x, format="JPEG", quality=int(quality))


def _jpeg2000(x: Image, ratio: float, rng: np.random.Generator) -> Image:
  return _coded(x, format="JPEG2000", quality_mode="rates", quality_layers=[ratio], irreversible=True)


def _quantisation(x: Image, steps: float, rng: np.random.Generator) -> Image:
  return np.round(x * (steps - 1)) / (steps - 1)


def _saturation(x: Image, factor: float, rng: np.random.Generator) -> Image:
  grey = x @ np.array([0.299, 0.587, 0.114], np.float32)
  return grey[..., None] + factor * (x - grey[..., None])


def _colour_shift(x: Image, pixels: float, rng: np.random.Generator) -> Image:
  angle = rng.uniform(0, 2 * np.pi)
  y = x.copy()
  by = pixels * np.sin(angle), pixels * np.cos(angle)
  y[..., 1] = scipy.ndimage.shift(x[..., 1], by, order=1, mode="reflect")
  return y


def _contrast(x: Image, factor: float, rng: np.random.Generator) -> Image:
  return x.mean() + factor * (x - x.mean())


def _gamma(x: Image, exponent: float, rng: np.random.Generator) -> Image:
  return x**exponent


def _pixelation(x: Image, size: float, rng: np.random.Generator) -> Image:
  rows, columns = (np.arange(n) // int(size) * int(size) for n in x.shape[:2])
  return x[rows][:, columns]


def _jitter(x: Image, pixels: float, rng: np.random.Generator) -> Image:
  y, z = np.mgrid[: x.shape[0], : x.shape[1]]
  dy, dz = np.round(rng.uniform(-pixels, pixels, (2, *x.shape[:2]))).astype(int)
  return x[np.clip(y + dy, 0, x.shape[0] - 1), np.clip(z + dz, 0, x.shape[1] - 1)]


def _block_shuffle(x: Image, part: float, rng: np.random.Generator) -> Image:
  """Some of the blocks of a 12th of the shorter side change places."""
  size = max(min(x.shape[:2]) // 12, 1)
  rows, columns = (n // size for n in x.shape[:2])
  at = rng.permutation(rows * columns)[: max(2, round(part * rows * columns))]
  y = x.copy()
  for here, there in zip(at, np.roll(at, 1), strict=True):
    (i, j), (k, m) = (size * np.array(divmod(n, columns)) for n in (here, there))
    y[i : i + size, j : j + size] = x[k : k + size, m : m + size]
  return y


def _sharpening(x: Image, amount: float, rng: np.random.Generator) -> Image:
  return x + amount * (x - scipy.ndimage.gaussian_filter(x, (1, 1, 0), mode="reflect"))


Distortion = Callable[[Image, float, np.random.Generator], Image]

# Name -> function and the amount of each level.
DISTORTIONS: dict[str, tuple[Distortion, tuple[float, ...]]] = {
  "gaussian blur": (_gaussian_blur, (0.5, 0.9, 1.5, 2.4, 4.0)),
  "disc blur": (_disc_blur, (0.8, 1.5, 2.5, 4.0, 6.5)),
  "motion blur": (_motion_blur, (2, 4, 7, 12, 20)),
  "white noise": (_white_noise, (0.02, 0.045, 0.08, 0.14, 0.25)),
  "colour noise": (_colour_noise, (0.03, 0.06, 0.1, 0.18, 0.3)),
  "speckle": (_speckle, (0.05, 0.1, 0.2, 0.35, 0.6)),
  "impulse noise": (_impulse_noise, (0.003, 0.012, 0.04, 0.1, 0.25)),
  "JPEG": (_jpeg, (45, 24, 13, 7, 3)),
  "JPEG 2000": (_jpeg2000, (20, 40, 75, 130, 220)),
  "quantisation": (_quantisation, (20, 11, 7, 4, 2)),
  "saturation": (_saturation, (1.4, 2, 2.8, 4, 6)),
  "colour shift": (_colour_shift, (1, 2.5, 5, 9, 15)),
  "contrast": (_contrast, (0.7, 0.5, 0.35, 0.2, 0.1)),
  "brightening": (_gamma, (0.8, 0.62, 0.45, 0.3, 0.18)),
  "darkening": (_gamma, (1.3, 1.7, 2.3, 3.2, 5)),
  "pixelation": (_pixelation, (2, 3, 4, 6, 9)),
  "jitter": (_jitter, (0.7, 1.2, 2, 3.5, 6)),
  "sharpening": (_sharpening, (0.8, 2, 4, 8, 16)),
  "block shuffle": (_block_shuffle, (0.03, 0.1, 0.25, 0.55, 1)),
}
