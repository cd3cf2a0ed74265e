"""Scikit-learn's 1,797 handwritten digits of 8x8 pixels: real data without a download, as images and as a graph."""

import numpy as np
import sklearn.datasets

from jaxlab import checks
from jaxlab.data import arrays, node
from jaxlab.data.arrays import Images, ImageSplits
from jaxlab.data.node import NodeDataset


def images(*, val: float = 1 / 6, test: float = 1 / 6, seed: int = 0) -> ImageSplits:
  """Host. The digits as images [N, 8, 8, 1] float32 in [0, 1] with labels 0 to 9, in stratified splits.

  Args:
    val: fraction for validation.
    test: fraction for testing.
    seed: of the splits.
  """
  return arrays.stratified(_all(), val=val, test=test, seed=seed)


def graph(
  *, neighbors: int = 10, train_per_class: int = 20, val: int = 500, test: int | None = 1000, seed: int = 0
) -> NodeDataset:
  """Host. The digits as nodes of a graph that joins i and j if either is among the other's nearest neighbours.

  Distances are Euclidean between pixel rows. Pixels are whole numbers, so distances are exact and ties (broken by the
  lower index) fall the same way on every machine.

  Args:
    neighbors: k of each node, not counting itself.
    train_per_class: labelled digits a class; see `node.random_split`, also for the rest.
    val: validation nodes.
    test: test nodes; None for all others.
    seed: of the split. The graph does not depend on it.

  Returns:
    1,797 nodes with 64 dense features in [0, 1] (pixel / 16), 10 classes.
  """
  digits = _all()
  label, n = digits["label"], len(digits["label"])
  features = digits["image"].reshape(n, -1)
  checks.count("neighbors", neighbors, 1, n - 1)
  pixels = np.rint(features * 16).astype(np.float64)
  norms = np.sum(pixels**2, axis=1)
  squared = (norms[:, None] + norms - 2 * pixels @ pixels.T).astype(np.int64)
  np.fill_diagonal(squared, squared.max() + 1)
  keys = squared * n + np.arange(n)  # distance first, then index: no ties
  nearest = np.argpartition(keys, neighbors - 1, axis=1)[:, :neighbors]
  edges = node.undirected(np.repeat(np.arange(n), neighbors), nearest.reshape(-1), n)
  nothing = np.zeros(n, bool)
  dataset = NodeDataset(features, *edges, label, nothing, nothing, nothing)
  return node.random_split(dataset, seed=seed, train_per_class=train_per_class, val=val, test=test)


def _all() -> Images:
  pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
  return Images(image=(pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1), label=labels.astype(np.int32))
