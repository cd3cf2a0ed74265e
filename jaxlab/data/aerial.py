"""Aerial tiles to segment, drawn: stands in for ISPRS Vaihingen and Potsdam, which cannot be had without registration.

A tile has land cover in Voronoi cells, straight roads with cars on them, buildings with shadows and trees, each class
with its colour and its band of texture, under light that differs from tile to tile. Classes are as unequal as in
Vaihingen: cars cover about 1 % of the pixels.
"""

from typing import Literal, NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import Float, UInt8

from jaxlab import checks

CLASSES = ("impervious surface", "building", "low vegetation", "tree", "car", "bare ground")
PALETTE: UInt8[np.ndarray, "6 3"] = np.array(
  [(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)], np.uint8
)
"""ISPRS's colour of each class."""
MEAN, STD = (0.47, 0.49, 0.38), (0.143, 0.112, 0.128)
"""Of the pixels after scaling to [0, 1]."""

_COLOR = np.array([(0.50, 0.50, 0.52), (0.62, 0.45, 0.40), (0.42, 0.55, 0.32), (0.22, 0.38, 0.20), (0.5, 0.5, 0.5),
                   (0.60, 0.52, 0.42)])  # fmt: skip
_SCALE = (3.0, 2.0, 1.0, 0.7, 1.0, 4.0)  # of the texture, in pixels
_CONTRAST = (0.04, 0.05, 0.06, 0.08, 0.03, 0.06)


class Tiles(NamedTuple):
  """Images and the class of every pixel.

  Attributes:
    image: [N, H, W, 3], 0 to 255.
    label: [N, H, W], an index into `CLASSES`.
  """

  image: UInt8[np.ndarray, "n h w 3"]
  label: UInt8[np.ndarray, "n h w"]


def tiles(
  count: int, height: int = 128, width: int = 128, *, roads: Literal["any", "diagonal"] = "any", seed: int = 0
) -> Tiles:
  """Host. Draws tiles.

  Args:
    count: N.
    height: pixels, at least 32.
    width: pixels, at least 32.
    roads: run in any direction, or within 5 degrees of a diagonal.
    seed: of everything.

  Raises:
    ValueError: an argument out of range.
  """
  checks.count("count", count, 1)
  checks.count("height", height, 32)
  checks.count("width", width, 32)
  checks.choice("roads", roads, ("any", "diagonal"))
  rng = np.random.default_rng(seed)
  made = [_tile(rng, height, width, roads) for _ in range(count)]
  return Tiles(np.stack([image for image, _ in made]), np.stack([label for _, label in made]))


def _tile(rng: np.random.Generator, height: int, width: int, roads: str) -> tuple[np.ndarray, np.ndarray]:
  y, x = np.mgrid[:height, :width]
  area = height * width / 128**2
  inside = lambda: rng.uniform((0, 0), (height, width))

  def along(center: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of all pixels along a direction and across it, from a centre."""
    dy, dx = y - center[0], x - center[1]
    return dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)

  cells = np.stack([inside() for _ in range(max(int(8 * area), 3))])
  nearest = ((y[..., None] - cells[:, 0]) ** 2 + (x[..., None] - cells[:, 1]) ** 2).argmin(-1)
  label = rng.choice((2, 5, 0), len(cells), p=(0.6, 0.25, 0.15))[nearest].astype(np.uint8)
  shade, paint = np.ones((height, width)), np.zeros((height, width, 3))

  angle, cars = 0.0, []
  for _ in range(rng.integers(1, 3)):
    angle = rng.uniform(0, np.pi) if roads == "any" else np.radians(rng.choice((45, 135)) + rng.uniform(-5, 5))
    center, half = inside(), rng.uniform(4, 6)
    _, across = along(center, angle)
    label[abs(across) < half] = 0
    shade[abs(across) < 0.5] = 1.3  # the line in the middle
    for _ in range(rng.integers(3, 8)):
      at = rng.uniform(-0.5, 0.5) * max(height, width)
      lane = rng.choice((-0.5, 0.5)) * half
      cars.append((center + at * np.array((np.sin(angle), np.cos(angle)))
                   + lane * np.array((np.cos(angle), -np.sin(angle))), angle))  # fmt: skip
  for _ in range(int(rng.integers(3, 7) * area) + 1):
    length, depth = rng.uniform(7, 16, 2)
    u, v = along(inside(), angle + rng.choice((0, np.pi / 2)))
    building = (abs(u) < length) & (abs(v) < depth) & (label != 0)
    shadow = np.roll(building, (4, 4), (0, 1)) & ~building
    shade[shadow] = 0.55
    label[building] = 1
    shade[building] = np.where(v[building] > 0, 1.1, 0.9)  # two sides of a roof
    paint[building] = rng.uniform(-0.12, 0.12, 3)
  for _ in range(int(rng.integers(8, 20) * area) + 1):
    center, radius = inside(), rng.uniform(3, 8)
    u, v = along(center, 0.0)
    tree = (u**2 + v**2 < radius**2) & (label != 0) & (label != 1)
    label[tree] = 3
    shade[tree] = 1 - 0.3 * (u + v)[tree] / (2 * radius)
  for center, direction in cars:
    u, v = along(center, direction)
    car = (abs(u) < 3) & (abs(v) < 1.5) & (label == 0)
    label[car] = 4
    shade[car] = 1
    paint[car] = rng.uniform(-0.4, 0.4, 3)

  image = _COLOR[label] + paint
  for kind, (scale, contrast) in enumerate(zip(_SCALE, _CONTRAST, strict=True)):
    image += np.where(label == kind, contrast * _texture(rng, height, width, scale), 0)[..., None]
  light = rng.uniform(0.75, 1.2) * rng.uniform(0.92, 1.08, 3)
  image = image * shade[..., None] * light + 0.015 * rng.standard_normal(image.shape)
  return (255 * np.clip(image, 0, 1)).astype(np.uint8), label


def _texture(rng: np.random.Generator, height: int, width: int, scale: float) -> Float[np.ndarray, "h w"]:
  """Noise of one band, of deviation 1."""
  noise = rng.standard_normal((height, width))
  blur = lambda sigma: scipy.ndimage.gaussian_filter(noise, sigma)
  band = blur(scale) - blur(2 * scale)
  return band / band.std()
