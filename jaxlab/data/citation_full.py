"""Cora-ML: machine-learning papers of Cora with their citations, words and areas.

Bojchevski and Guennemann, "Deep Gaussian Embedding of Graphs", ICLR 2018, arXiv:1707.03815, who collected it as one of
the CitationFull graphs; the file is that of Klicpera et al., `klicperajo/ppnp`, whose word counts are weighted.
"""

import os
import pathlib
from typing import Any

import numpy as np
import scipy.sparse

from jaxlab.data import files, node
from jaxlab.data.node import NodeDataset

# A commit, so that the content stays.
URL = "https://github.com/klicperajo/ppnp/raw/394425a9eeffbd95c09d68d6f0e1473ac9c2fd4a/ppnp/data/"
SHA256 = "e3439bfd32c4a962d5c56a4f313793baee39181c208c90a3915b61183d3e1cda"
PUBLISHED = (2995, 8158, 2879, 7)  # nodes, undirected edges, features, classes
_PARTS = ("data", "indices", "indptr", "shape")


def cora_ml(directory: str | os.PathLike[str] | None = None, *, published: bool = True) -> NodeDataset:
  """Host. The graph with words as 0/1 features, as PyTorch Geometric's `CitationFull("Cora_ML")`.

  Citations become undirected, each once. There is no published split: all masks are empty.

  Args:
    directory: folder with `cora_ml.npz`. Default: `JAXLAB_DATA/citation_full`, else a checked download.
    published: check that the file is the published one. False reads any file of the format from `directory`.

  Returns:
    CSR features [2995, 2879], 16,316 directed edges, 7 classes.

  Raises:
    ValueError: missing file (`files.MissingFile`), damaged or ill-formed content.
  """
  if not published and directory is None:
    raise ValueError("directory: got None, expected the folder to read when published=False")
  path = files.fetch(
    "citation_full", "cora_ml.npz", url=f"{URL}cora_ml.npz", sha256=SHA256 if published else None, directory=directory
  )
  adjacency, features, labels = files.parse(path, _read, "an npz with adj_matrix, attr_matrix and labels")
  n = len(labels)
  if adjacency.shape != (n, n) or features.shape[0] != n or labels.ndim != 1 or labels.min(initial=0) < 0:
    raise ValueError(
      f"{path}: got adjacency {adjacency.shape}, features {features.shape}, labels {labels.shape}, misfits"
    )
  ends = scipy.sparse.coo_array(adjacency)
  senders, receivers = node.undirected(ends.row, ends.col, n)
  words = scipy.sparse.csr_array((features > 0).astype("float32"))
  words.sort_indices()
  none = np.zeros(n, bool)
  dataset = NodeDataset(words, senders, receivers, labels.astype("int32"), none, none.copy(), none.copy())
  got = (n, len(senders) // 2, dataset.num_features, dataset.num_classes)
  if published and got != PUBLISHED:
    raise ValueError(f"{path}: got nodes, edges, features, classes {got}, expected {PUBLISHED}")
  return dataset


def _read(path: pathlib.Path) -> tuple[Any, Any, np.ndarray]:
  with np.load(path, allow_pickle=False) as file:
    matrices = [
      scipy.sparse.csr_array(tuple(file[f"{name}.{part}"] for part in _PARTS[:3]), shape=tuple(file[f"{name}.shape"]))
      for name in ("adj_matrix", "attr_matrix")
    ]
    for matrix in matrices:
      matrix.check_format(full_check=True)
    return *matrices, file["labels"]
