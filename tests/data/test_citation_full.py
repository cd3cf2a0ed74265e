"""Cora-ML: a file of its format, damaged ones, and the published one where it is at hand."""

import numpy as np
import pytest
import scipy.sparse

from jaxlab.data import citation_full, files


@pytest.fixture
def write(tmp_path):
  def save(**changes):
    adjacency = scipy.sparse.csr_array(np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0]], "float32"))
    words = scipy.sparse.csr_array(np.array([[0.5, 0], [0, 0.2], [0.1, 0.3]], "float32"))
    arrays = {"labels": np.array([0, 1, 1])}
    for name, matrix in (("adj_matrix", adjacency), ("attr_matrix", words)):
      arrays |= {f"{name}.{part}": np.asarray(getattr(matrix, part)) for part in ("data", "indices", "indptr", "shape")}
    np.savez(tmp_path / "cora_ml.npz", **(arrays | changes))
    return tmp_path

  return save


def test_directed_citations_with_loops_become_a_simple_undirected_graph(write):
  dataset = citation_full.cora_ml(write(), published=False)
  assert list(zip(dataset.senders, dataset.receivers, strict=True)) == [(1, 0), (0, 1), (2, 1), (1, 2)]
  np.testing.assert_array_equal(dataset.features.toarray(), [[1, 0], [0, 1], [1, 1]])  # words, not their weights
  np.testing.assert_array_equal(dataset.labels, [0, 1, 1])
  assert not (dataset.train_mask | dataset.val_mask | dataset.test_mask).any()
  assert dataset.features.dtype == np.float32 and dataset.labels.dtype == np.int32


def test_bad_files_are_named(write, tmp_path):
  with pytest.raises(files.MissingFile, match="^directory: got no file"):
    citation_full.cora_ml(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="got sha256"):
    citation_full.cora_ml(write())
  with pytest.raises(ValueError, match="misfits"):
    citation_full.cora_ml(write(labels=np.array([0, 1])), published=False)
  with pytest.raises(ValueError, match="expected an npz"):
    citation_full.cora_ml(write(**{"adj_matrix.indices": np.array([0, 1, 0, 7])}), published=False)
  (tmp_path / "cora_ml.npz").write_bytes(b"no archive")
  with pytest.raises(ValueError, match="expected an npz"):
    citation_full.cora_ml(tmp_path, published=False)
  with pytest.raises(ValueError, match="^directory: got None"):
    citation_full.cora_ml(published=False)


def test_published_graph():
  try:
    dataset = citation_full.cora_ml()
  except files.MissingFile as missing:
    pytest.skip(str(missing))
  assert (dataset.num_nodes, len(dataset.senders), dataset.num_features) == (2995, 16316, 2879)
  np.testing.assert_array_equal(np.bincount(dataset.labels), [354, 402, 452, 442, 857, 193, 295])
  assert dataset.features.nnz == 151171 and set(np.unique(dataset.features.data)) == {1.0}
