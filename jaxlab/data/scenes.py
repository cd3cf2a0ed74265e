"""Pictures to segment, made from photographs that scikit-learn ships: shapes whose class is not where the shape is."""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxlab import checks

CLASSES = (
  "background",
  "disc, red marker",
  "disc, blue marker",
  "square, stripes across",
  "square, stripes down",
  "small triangle",
  "large triangle",
)


class Scenes(NamedTuple):
  """Images and the class of every pixel.

  Attributes:
    image: [N, S, S, 3] in [0, 1].
    label: [N, S, S], an index into `CLASSES`.
  """

  image: Float[np.ndarray, "n s s 3"]
  label: Int[np.ndarray, "n s s"]


def marked_shapes(count: int, side: int = 96, *, shapes: int = 5, seed: int = 0) -> Scenes:
  """Host. Shapes cut from one photograph, laid on another place of it.

  The class of a shape's pixels follows from three scales: a disc's from the colour of a dot of 4 pixels, anywhere in
  the image; a square's from the direction of stripes 2 pixels apart; a triangle's from its size. A shape's own colours
  tell nothing, as they are those of some piece of the photographs.

  Args:
    count: N.
    side: S, in pixels, 32 to 400.
    shapes: laid on each image; later ones cover earlier ones.
    seed: of everything.

  Raises:
    ValueError: an argument out of range.
  """
  checks.count("count", count, 1)
  checks.count("side", side, 32, 400)
  checks.count("shapes", shapes, 1)
  rng = np.random.default_rng(seed)
  image, label = np.empty((count, side, side, 3), np.float32), np.zeros((count, side, side), np.int32)
  y, x = np.mgrid[:side, :side]
  for scene, classes in zip(image, label, strict=True):
    scene[:] = _crop(rng, side)
    marker = rng.integers(2)
    for _ in range(shapes):
      kind, large = rng.integers(3), rng.integers(2)
      radius = side * (rng.uniform(0.08, 0.11) if kind == 2 and not large else rng.uniform(0.15, 0.2))
      cy, cx = rng.uniform(radius, side - radius, 2)
      dy, dx = y - cy, x - cx
      texture = _crop(rng, side)
      if kind == 0:
        inside, which = dy**2 + dx**2 < radius**2, 1 + marker
      elif kind == 1:
        inside, which = np.maximum(abs(dy), abs(dx)) < 0.85 * radius, 3 + large
        texture = texture + np.where((x if large else y) % 2, 0.2, -0.2)[..., None]
      else:
        inside, which = (dy < 0.7 * radius) & (dy > 2 * abs(dx) - radius), 5 + large
      scene[inside], classes[inside] = texture[inside], which
    top, left = rng.integers(0, side - 4, 2)
    dot = np.array([(0.9, 0.1, 0.1), (0.1, 0.1, 0.9)][marker])
    scene[top : top + 4, left : left + 4] = dot
  return Scenes(np.clip(image, 0, 1), label)


def _crop(rng: np.random.Generator, side: int) -> Float[np.ndarray, "s s 3"]:
  """A square of a photograph, mirrored or turned upside down or not."""
  photograph = _photographs()[rng.integers(2)]
  top, left = (rng.integers(0, n - side + 1) for n in photograph.shape[:2])
  return photograph[top : top + side, left : left + side][:: rng.choice((-1, 1)), :: rng.choice((-1, 1))]


@functools.cache
def _photographs() -> list[Float[np.ndarray, "h w 3"]]:
  from sklearn.datasets import load_sample_images

  return [np.asarray(image, np.float32) / 255 for image in load_sample_images().images]
