"""Labelled images that fit in memory, and splits of them."""

from typing import NamedTuple, TypedDict

import numpy as np
import sklearn.model_selection
from jaxtyping import Float, Int, UInt8

from jaxlab import checks


class Images(TypedDict):
  """Labelled images, or a batch of them: a dict of NumPy arrays whose first axis is the example.

  Keys:
    image: [N, H, W, C] float32, or uint8 where a loader says so.
    label: [N] int32.
  """

  image: Float[np.ndarray, "n h w c"] | UInt8[np.ndarray, "n h w c"]
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
  checks.real("val", val, 0.0, 1.0)
  checks.real("test", test, 0.0, 1.0)
  checks.count("seed", seed, 0)
  label = images["label"]
  n, classes = len(label), len(np.unique(label))
  sizes = round(val * n), round(test * n)
  if min(*sizes, n - sum(sizes)) < classes:
    raise ValueError(f"val, test: got {val}, {test} of {n} examples, expected at least {classes} in each of three sets")

  def split(ids: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    return sklearn.model_selection.train_test_split(ids, test_size=size, stratify=label[ids], random_state=seed)

  rest, test_ids = split(np.arange(n), sizes[1])
  train_ids, val_ids = split(rest, sizes[0])
  return ImageSplits(*(Images(image=images["image"][i], label=label[i]) for i in (train_ids, val_ids, test_ids)))
