"""Graph files other than Planetoid's: small ones in the same form, and the published ones where they are at hand."""

import os
import pathlib

import numpy as np
import pytest
import scipy.io
import scipy.sparse

from jaxlab.data import heterophilous, networks

ROOT = os.environ.get("JAXLAB_DATA")


def needs(folder):
  return pytest.mark.skipif(
    not (ROOT and (pathlib.Path(ROOT) / folder).exists()), reason=f"JAXLAB_DATA names no folder with {folder}"
  )


def write_heterophilous(folder, **changes):
  rng = np.random.default_rng(0)
  owner = rng.integers(0, 3, (10, 12))
  content = {
    "node_features": rng.standard_normal((12, 4)).astype(np.float32),
    "node_labels": np.arange(12) % 3,
    "edges": np.array([[0, 1], [1, 0], [2, 2], [3, 4], [5, 11]]),
    "train_masks": owner == 0,
    "val_masks": owner == 1,
    "test_masks": owner == 2,
  } | changes
  np.savez(folder / "toy.npz", **{key: value for key, value in content.items() if value is not None})
  return content


def load(folder, split=0):
  return heterophilous.load("toy", split, folder, published=False)


def test_heterophilous_format(tmp_path):
  content = write_heterophilous(tmp_path)
  dataset = load(tmp_path, split=7)
  np.testing.assert_array_equal(dataset.features, content["node_features"])
  np.testing.assert_array_equal(dataset.train_mask, content["train_masks"][7])
  np.testing.assert_array_equal(dataset.test_mask, content["test_masks"][7])
  pairs = sorted(zip(dataset.senders.tolist(), dataset.receivers.tolist(), strict=True))
  assert pairs == [(0, 1), (1, 0), (3, 4), (4, 3), (5, 11), (11, 5)]


BROKEN = {
  "objects": ({"node_labels": np.array([None] * 12, dtype=object)}, "does not read"),
  "key missing": ({"edges": None}, "does not read"),
  "edge out of range": ({"edges": np.array([[0, 12]])}, r"expected \[0, 12\)"),
  "edges are flat": ({"edges": np.arange(4)}, "misfits"),
  "too few labels": ({"node_labels": np.zeros(11, int)}, "misfits"),
  "nine splits": ({"val_masks": np.zeros((9, 12), bool)}, "expected bool of"),
  "masks overlap": ({"val_masks": np.ones((10, 12), bool)}, "overlap"),
  "masks are numbers": ({"val_masks": np.zeros((10, 12))}, "expected bool"),
  "nan": ({"node_features": np.full((12, 4), np.nan, np.float32)}, "not finite"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_heterophilous_files(tmp_path, case):
  changes, message = BROKEN[case]
  write_heterophilous(tmp_path, **changes)
  with pytest.raises(ValueError, match=message):
    load(tmp_path)


def test_truncated_npz(tmp_path):
  write_heterophilous(tmp_path)
  path = tmp_path / "toy.npz"
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match=r"toy\.npz: got a file that does not read"):
    load(tmp_path)


@needs("heterophilous")
@pytest.mark.parametrize("name", [name for name, published in heterophilous.PUBLISHED.items() if published.sha256])
def test_published_heterophilous(name):
  datasets = [heterophilous.load(name, split) for split in (0, 9)]  # sizes are checked by the loader
  assert (datasets[0].train_mask != datasets[1].train_mask).any()
  for dataset in datasets:
    assert (dataset.adjacency != dataset.adjacency.T).nnz == 0
    masks = dataset.train_mask.astype(int) + dataset.val_mask + dataset.test_mask
    # Roughly 50/25/25 or 48/32/20; only actor's and WebKB's splits leave no node out by design of their authors.
    assert masks.max() == 1 and masks.mean() > 0.99


def test_blogcatalog_format(tmp_path):
  adjacency = scipy.sparse.csc_matrix(np.array([[0, 1, 0], [1, 0, 2], [0, 2, 0]], float))
  groups = scipy.sparse.csc_matrix(np.array([[1, 1], [0, 1], [0, 0]], float))
  path = tmp_path / "blogcatalog.mat"
  scipy.io.savemat(path, {"network": adjacency, "group": groups})
  network = networks.blogcatalog(tmp_path, published=False)
  np.testing.assert_array_equal(network.adjacency.toarray(), [[0, 1, 0], [1, 0, 1], [0, 1, 0]])
  np.testing.assert_array_equal(network.labels, [[True, True], [False, True], [False, False]])
  with pytest.raises(ValueError, match=r"blogcatalog\.mat: got sha256"):
    networks.blogcatalog(tmp_path)
  scipy.io.savemat(path, {"network": adjacency, "group": groups[:2]})
  with pytest.raises(ValueError, match=r"network \(3, 3\) and group \(2, 2\)"):
    networks.blogcatalog(tmp_path, published=False)
  scipy.io.savemat(path, {"network": adjacency})
  with pytest.raises(ValueError, match="does not read"):
    networks.blogcatalog(tmp_path, published=False)


def test_email_format(tmp_path):
  (tmp_path / "email-Eu-core.txt").write_text("0 1\n1 0\n2 2\n3 1\n")
  (tmp_path / "labels.txt").write_text("0 5\n2 1\n1 4\n3 0\n")
  network = networks.email_eu_core(tmp_path, published=False)
  assert network.labels.tolist() == [5, 4, 1, 0]
  assert network.adjacency.toarray().tolist() == [[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]
  directed = networks.email_eu_core_directed(tmp_path, published=False)
  assert [part.tolist() for part in directed] == [[0, 1, 2, 3], [1, 0, 2, 1], [5, 4, 1, 0]]
  (tmp_path / "email-Eu-core.txt").write_text("0 1\n4 2\n")
  with pytest.raises(ValueError, match=r"got nodes 0 to 4, expected \[0, 4\)"):
    networks.email_eu_core_directed(tmp_path, published=False)
  (tmp_path / "labels.txt").write_text("0 5\n2 1\n")
  with pytest.raises(ValueError, match="expected a label for each node id"):
    networks.email_eu_core(tmp_path, published=False)
  (tmp_path / "email-Eu-core.txt").write_text("0 one\n")
  with pytest.raises(ValueError, match="does not read"):
    networks.email_eu_core(tmp_path, published=False)


def test_photo_format(tmp_path):
  (tmp_path / "adj.txt").write_text("2 3\n1\n1\n\n")
  (tmp_path / "labels.txt").write_text("1\n2\n1\n8\n")
  network = networks.amazon_photo(tmp_path, published=False)
  assert network.labels.tolist() == [0, 1, 0, 7]
  assert network.adjacency.toarray().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
  (tmp_path / "labels.txt").write_text("1\n2\n")
  with pytest.raises(ValueError, match="got 2 labels, expected 4"):
    networks.amazon_photo(tmp_path, published=False)
  (tmp_path / "adj.txt").write_text("0\n1\n")
  with pytest.raises(ValueError, match=r"expected \[0, 2\)"):
    networks.amazon_photo(tmp_path, published=False)


@needs("embedding")
def test_published_mails():
  senders, receivers, labels = networks.email_eu_core_directed()
  assert len(senders) == len(receivers) == 25571 and (senders == receivers).sum() == 642
  assert len(labels) == 1005 and np.count_nonzero(np.bincount(receivers, minlength=1005) == 0) == 14


@needs("embedding")
@pytest.mark.parametrize(
  ("loader", "nodes", "edges", "labels"),
  [
    (networks.blogcatalog, 10312, 333983, 39),
    (networks.email_eu_core, 1005, 16064, 42),
    (networks.amazon_photo, 7650, 119081, 8),
  ],
)
def test_published_networks(loader, nodes, edges, labels):
  network = loader()
  assert network.adjacency.shape == (nodes, nodes) and network.adjacency.nnz == 2 * edges
  assert (network.adjacency != network.adjacency.T).nnz == 0 and network.adjacency.has_sorted_indices
  if network.labels.ndim == 2:
    assert network.labels.shape == (nodes, labels) and network.labels.any(axis=1).all()
  else:
    assert len(np.unique(network.labels)) == labels == network.labels.max() + 1
