"""Labelled images that fit in memory, and splits of them."""

from typing import NamedTuple

import numpy as np
import sklearn.model_selection
from jaxtyping import Float, Int

from jaxlab.data import checks


class Images(NamedTuple):
  """Labelled images, and a batch of them: a pytree of NumPy arrays whose first axis is the example.

  Attributes:
    image: [N, H, W, C] float32.
    label: [N] int32.
  """

  image: Float[np.ndarray, "n h w c"]
  label: Int[np.ndarray, " n"]


class ImageSplits(NamedTuple):
  """Three disjoint sets of examples."""

  train: Images
  val: Images
  test: Images


def stratified(images: Images, *, val: float, test: float, seed: int) -> ImageSplits:
  """Shuffled splits in which every class keeps its share.

  Args:
    images: all examples.
    val: fraction of all examples for validation, in (0, 1).
    test: fraction for testing, in (0, 1); the two leave some for training.
    seed: of the shuffle; the same seed gives the same splits.
  """
  checks.fraction("val", val, 0.0, 1.0)
  checks.fraction("test", test, 0.0, 1.0)
  checks.count("seed", seed, 0)
  n, classes = len(images.label), len(np.unique(images.label))
  sizes = round(val * n), round(test * n)
  if min(*sizes, n - sum(sizes)) < classes:
    raise ValueError(f"val, test: got {val}, {test} of {n} examples, expected at least {classes} in each of three sets")
  rest, test_ids = sklearn.model_selection.train_test_split(
    np.arange(n), test_size=sizes[1], stratify=images.label, random_state=seed
  )
  train_ids, val_ids = sklearn.model_selection.train_test_split(
    rest, test_size=sizes[0], stratify=images.label[rest], random_state=seed
  )
  return ImageSplits(*(Images(images.image[ids], images.label[ids]) for ids in (train_ids, val_ids, test_ids)))
