import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.data import NodeDataset, node, random_split, row_normalize_features, undirected

edge_lists = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=40)


@given(edge_lists)
def test_undirected_is_the_simple_graph(edges):
  rows, columns = np.array(edges, int).reshape(-1, 2).T
  senders, receivers = undirected(rows, columns, 10)
  expected = {(b, a) for a, b in edges if a != b} | {(a, b) for a, b in edges if a != b}
  assert list(zip(receivers.tolist(), senders.tolist(), strict=True)) == sorted(expected)
  assert senders.dtype == receivers.dtype == np.int32


@given(st.lists(st.integers(-5, 5)))
def test_unique_is_np_unique(keys):
  np.testing.assert_array_equal(node.unique(np.array(keys, int)), np.unique(np.array(keys, int)))


@pytest.fixture
def dataset():
  labels = np.array([0] * 30 + [1] * 20 + [-1] * 5 + [2] * 25, np.int32)
  nothing = np.zeros(80, bool)
  features = np.random.default_rng(0).integers(0, 3, (80, 4)).astype(np.float32)
  features[7] = 0
  return NodeDataset(features, *undirected(np.arange(79), np.arange(1, 80), 80), labels, nothing, nothing, nothing)


def test_random_split(dataset):
  split = random_split(dataset, seed=1, train_per_class=5, val=10, test=None)
  masks = np.stack([split.train_mask, split.val_mask, split.test_mask])
  assert masks.sum(1).tolist() == [15, 10, 50]
  assert masks.sum(0).tolist() == (dataset.labels >= 0).astype(int).tolist()  # every labelled node once
  assert np.bincount(split.labels[split.train_mask]).tolist() == [5, 5, 5]
  again = random_split(dataset, seed=1, train_per_class=5, val=10, test=None)
  np.testing.assert_array_equal(split.train_mask, again.train_mask)
  other = random_split(dataset, seed=2, train_per_class=5, val=10, test=None)
  assert (split.train_mask != other.train_mask).any()
  # Each node of a class is equally likely to be drawn.
  hits = sum(random_split(dataset, seed=s, train_per_class=5, val=0, test=0).train_mask[:30] for s in range(300))
  assert hits.sum() == 1500 and hits.min() > 25 and hits.max() < 80


def test_row_normalize_dense_and_sparse_agree(dataset):
  dense = row_normalize_features(dataset).features
  sums = dataset.features.sum(1)
  np.testing.assert_allclose(dense.sum(1), (sums > 0).astype(float), atol=1e-6)
  sparse = row_normalize_features(dataset._replace(features=scipy.sparse.csr_array(dataset.features))).features
  np.testing.assert_allclose(sparse.toarray(), dense, atol=1e-7)
  assert sparse.dtype == dense.dtype == np.float32


def test_properties(dataset):
  assert (dataset.num_nodes, dataset.num_features, dataset.num_classes) == (80, 4, 3)
  path = np.eye(80, k=1) + np.eye(80, k=-1)
  np.testing.assert_array_equal(dataset.adjacency.toarray(), path)
