"""Cora, CiteSeer and PubMed as Planetoid (Yang et al. 2016, arXiv:1603.08861) published them, with its fixed split.

The originals are Python 2 pickles. A pickle is a program; this reader runs none of it. It admits the handful of names
that the files use and replaces each by a passive stand-in that only remembers the described array, which is then built
and checked here.
"""

import collections
import os
import pathlib
import pickle
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse

from jaxlab import checks
from jaxlab.data import files, node
from jaxlab.data.node import NodeDataset

URL = "https://github.com/kimiyoung/planetoid/raw/master/data/"


class Published(NamedTuple):
  """Sizes that a published graph must come out with, and its files' checksums."""

  nodes: int
  edges: int
  features: int
  classes: int
  sha256: dict[str, str]


PUBLISHED = {
  "cora": Published(
    2708,
    5278,
    1433,
    7,
    {
      "x": "23cfa55d91c6f624233f5eb7b6e3f141f1bd2b2ae39608a63cf5d084bb27baab",
      "tx": "b9afbaa4a400df991f6f02ef677e1e44da55ffc04801fd02f9e673987829226a",
      "allx": "9419ba2f26f5c35243db64aba110e0f35a04851609e0dc5433450676ca6b8543",
      "y": "94465c14eb53e04ca262198dcbb2521ee8af60fb3f3d546cd6ca24a511b0e7d1",
      "ty": "41f5ac76596a1699cc33f53084a2419e92961c42bb75f36fc38e616d348532ad",
      "ally": "2b998f5cc7fedc86e7f97ca2498f47a1ffc1462c29e2d578b23bf3f62b6e7d71",
      "graph": "58f13302f39dde8852dad6fe6d15b89b077b6d7f837626bce671ef80344b383d",
      "test.index": "297ce89af2b51a6a194181c7dbe1796c6a1cf9cd9349a88383b1b1e227867875",
    },
  ),
  "citeseer": Published(
    3327,
    4552,
    3703,
    6,
    {
      "x": "d20de19150741e555de0ed037195630fc194114ebc7fd72ced62810148aa22f6",
      "tx": "539a8906a2da97628d212f2fdd668c109a8b3f0d36574b59e5d3fd5b5303da21",
      "allx": "2ac30345d95c9ec933a817ee0bdd6a5f077f8c184a20e696910192d534414668",
      "y": "8ba87e515d8e3ee3cf52f6d2c5b86aa73f11ecad825a808455209ec26cd54924",
      "ty": "55e5bd1ba1e733a04598753ad1a8d57957f4b8f89e74519f41f4f4938767e4ce",
      "ally": "f704b2d986dde6c2669934de1f3ae5696a6cf9455c0f6b2646a2d135ea0a1c95",
      "graph": "d79a4ef9d3e7169aee8946145f6b7306e35bc79bffad26346cfb94e10e9912a7",
      "test.index": "2af990671580b6b2df5d158d1038f8292e30c9cd821b5453f399659b25b723d4",
    },
  ),
  # PubMed's checksums are those under which a public repository stores these files in Git LFS
  # (D61-IA/FisherGCN, data/); its entries for CiteSeer agree with the files hashed here.
  "pubmed": Published(
    19717,
    44324,
    500,
    3,
    {
      "x": "fbe9cb5c47200d1b7769a26e579be3b7130b556831f9d850e77c4c74f2599b33",
      "tx": "4eb5f5d0f30f26497eb0ac6ac9719d09c67e284f1ed0385c93f3ef27a671da3d",
      "allx": "508e538e2abdccdd54c4d3e9f49d638b4af7107d85845f66ddea5a5152658b7e",
      "y": "e6c807633307a07ed659249006536a147c7999c797f11a2560752990181b41b3",
      "ty": "ee2e0d4819d9fbcc403689c3bf2e49face401b605932f093bc58ab6461130fdd",
      "ally": "0c37bbe3b5014ec365e9d393cf4791925e5ed94fb194305d74f064a8d7b50f0e",
      "graph": "5b89f0036ca22909471f1e6558eb42fa06e0c730a577bde5b058b40638f81dc9",
      "test.index": "b101d421688bbaecbd82e8a18f1e282378d6830f3a37666f28ebc47f844341b5",
    },
  ),
}


def load(name: str, directory: str | os.PathLike[str] | None = None, *, published: bool = True) -> NodeDataset:
  """Host. A citation graph with the public split: 20 training nodes a class, the next 500 validation, 1000 test.

  Args:
    name: "cora", "citeseer" or "pubmed".
    directory: folder with the eight files `ind.<name>.*`. Default: `JAXLAB_DATA/planetoid`, else a checked download.
    published: check that the files are the published ones, by SHA-256 and by size. False reads any files of the
      same format under any `name` from `directory`; validation nodes are still the 500 after the training nodes.

  Returns:
    Features in CSR (0 or 1; TF-IDF for PubMed; not yet row-normalised), the simple undirected graph, labels, masks.
    CiteSeer's 15 isolated test ids without an entry are rows of zeros with label -1 in no mask. Nodes, undirected
    edges, features, classes: Cora 2708, 5278, 1433, 7; CiteSeer 3327, 4552, 3703, 6; PubMed 19717, 44324, 500, 3.

  Raises:
    ValueError: unknown name, missing file (`files.MissingFile`), checksum or content that is not as published, a
      pickle that asks for anything but arrays, lists and dicts.
  """
  if published:
    checks.choice("name", name, tuple(PUBLISHED))
  elif directory is None:
    raise ValueError("directory: got None, expected the folder to read when published=False")
  sha256 = PUBLISHED[name].sha256 if published else {}

  def find(part: str) -> pathlib.Path:
    file = f"ind.{name}.{part}"
    return files.fetch("planetoid", file, url=URL + file, sha256=sha256.get(part), directory=directory)

  def read(part: str) -> Any:
    return files.parse(find(part), _unpickle, "a pickle of arrays, lists and dicts")

  x, tx, allx = (_matrix(find(part), read(part)) for part in ("x", "tx", "allx"))
  y, ty, ally = (_one_hot(find(part), read(part)) for part in ("y", "ty", "ally"))
  graph = read("graph")
  test = files.parse(find("test.index"), lambda path: np.loadtxt(path, dtype=np.int64, ndmin=1), "an integer a line")

  where = find("graph").parent / f"ind.{name}"
  n, known = _check_parts(where, x, tx, allx, y, ty, ally, graph, test)
  labels = np.full(n, -1, np.int32)
  labels[:known], labels[test] = ally, ty
  # Row i of `tx` belongs to node test[i]; rows without an entry stay empty.
  rows = np.concatenate([np.arange(known), test])
  place = scipy.sparse.csr_array((np.ones(len(rows), np.float32), (rows, np.arange(len(rows)))), shape=(n, len(rows)))
  features = scipy.sparse.csr_array(place @ scipy.sparse.vstack([allx, tx], format="csr"), dtype=np.float32)
  features.sort_indices()
  receivers = np.repeat(np.fromiter(graph, np.int64, n), [len(neighbours) for neighbours in graph.values()])
  senders = np.concatenate([np.asarray(neighbours, np.int64) for neighbours in graph.values()])
  edges = files.parse(find("graph"), lambda _: node.undirected(senders, receivers, n), "neighbours that exist")
  dataset = NodeDataset(
    features,
    *edges,
    labels,
    train_mask=node.mask(np.arange(len(y)), n),
    val_mask=node.mask(np.arange(len(y), len(y) + 500), n),
    test_mask=node.mask(test, n),
  )
  if published:
    got = (n, len(edges[0]) // 2, dataset.num_features, dataset.num_classes)
    if got != PUBLISHED[name][:4]:
      raise ValueError(f"{where}: got nodes, edges, features, classes {got}, expected {PUBLISHED[name][:4]}")
  return dataset


def _check_parts(
  where: pathlib.Path, x: Any, tx: Any, allx: Any, y: Any, ty: Any, ally: Any, graph: Any, test: Any
) -> tuple[int, int]:
  """Raises unless the eight parts fit together; returns the numbers of nodes and of nodes outside the test set."""
  wrong = []
  for part, matrix, labels in (("x", x, y), ("tx", tx, ty), ("allx", allx, ally)):
    if matrix.shape != (len(labels), allx.shape[1]):
      wrong.append(f"{part} is {list(matrix.shape)}, expected {[len(labels), allx.shape[1]]}")
  if len(ally) < len(y) + 500:
    wrong.append(f"allx has {len(ally)} rows, expected at least {len(y) + 500}: training and 500 validation nodes")
  plain = isinstance(graph, dict) and all(type(i) is int and isinstance(j, list) for i, j in graph.items())
  if not plain or not all(type(j) is int for neighbours in graph.values() for j in neighbours):
    raise ValueError(f"{where}.graph: got {type(graph).__name__}, expected a dict from node to list of nodes")
  n, known = len(graph), len(ally)
  if sorted(graph) != list(range(n)):
    wrong.append(f"graph has other keys than 0 to {n - 1}")
  if len(test) != len(ty) or len(np.unique(test)) != len(test):
    wrong.append(f"test.index has {len(test)} lines, expected {len(ty)} different ones, a row of tx each")
  elif test.min(initial=known) < known or test.max(initial=known) >= n:
    wrong.append(f"test.index spans {test.min()} to {test.max()}, expected {known} to {n - 1}")
  if wrong:
    raise ValueError(f"{where}.*: got parts that do not fit together: " + "; ".join(wrong))
  return n, known


class _Array:
  """Stand-in for a pickled ndarray or csr_matrix: remembers the state it is given."""

  state: Any = None

  def __setstate__(self, state: Any) -> None:
    self.state = state


class _Dtype(_Array):
  def __init__(self, name: str = "", *_: Any) -> None:
    self.name = name


# What the published files refer to, and `_codecs.encode`, by which Python 3 writes bytes in the same protocol.
_ADMITTED: dict[tuple[str, str], Any] = {
  ("numpy", "ndarray"): _Array,
  ("numpy", "dtype"): _Dtype,
  ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
  ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
  ("scipy.sparse.csr", "csr_matrix"): _Array,
  ("scipy.sparse._csr", "csr_matrix"): _Array,
  ("collections", "defaultdict"): collections.defaultdict,
  ("__builtin__", "list"): list,
  ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
}


class _Unpickler(pickle.Unpickler):
  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in _ADMITTED:
      raise pickle.UnpicklingError(f"refused: the pickle asks for {module}.{name}, which no Planetoid file needs")
    return _ADMITTED[module, name]


def _unpickle(path: pathlib.Path) -> Any:
  with open(path, "rb") as file:
    return _Unpickler(file, encoding="latin1").load()


def _array(value: Any) -> np.ndarray:
  """The array that a stand-in describes. Only plain integer and float types: no objects, no structures."""
  if not isinstance(value, _Array) or not isinstance(value.state, tuple) or len(value.state) != 5:
    raise ValueError(f"got {type(value).__name__}, expected a pickled array")
  _, shape, dtype, fortran, data = value.state
  order = dtype.state[1] if isinstance(dtype, _Dtype) and isinstance(dtype.state, tuple) else "?"
  if getattr(dtype, "name", None) not in ("i4", "i8", "u1", "u8", "f4", "f8", "b1") or order not in ("<", ">", "|"):
    raise ValueError(f"got dtype {getattr(dtype, 'name', dtype)!r}, expected integers or floats")
  raw = data.encode("latin1") if isinstance(data, str) else data
  return np.frombuffer(raw, order + dtype.name).reshape(shape, order="F" if fortran else "C")


def _matrix(path: pathlib.Path, value: Any) -> scipy.sparse.csr_array:
  def build(_: pathlib.Path) -> scipy.sparse.csr_array:
    parts = tuple(_array(value.state[key]) for key in ("data", "indices", "indptr"))
    matrix = scipy.sparse.csr_array(parts, shape=value.state["_shape"], dtype=np.float32)
    matrix.check_format()
    if not np.isfinite(matrix.data).all():
      raise ValueError("values that are not finite")
    return matrix

  return files.parse(path, build, "a pickled csr_matrix")


def _one_hot(path: pathlib.Path, value: Any) -> np.ndarray:
  """[M, C] one-hot rows as [M] classes, -1 where a row is zero."""

  def build(_: pathlib.Path) -> np.ndarray:
    rows = _array(value)
    if rows.ndim != 2 or not np.isin(rows, (0, 1)).all() or (rows.sum(axis=1) > 1).any():
      raise ValueError(f"shape {rows.shape} with other rows than one-hot")
    return np.where(rows.any(axis=1), rows.argmax(axis=1), -1).astype(np.int32)

  return files.parse(path, build, "one-hot labels")
