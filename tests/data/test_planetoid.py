"""Planetoid files: the published ones where they are at hand, and small ones written here in the same Python 2 form."""

import collections
import io
import os
import pathlib
import pickle
import struct

import numpy as np
import pytest
import scipy.sparse

from jaxlab.data import files, planetoid, random_split, row_normalize_features

REAL = pathlib.Path(os.environ.get("JAXLAB_DATA", "")) / "planetoid"
needs_files = pytest.mark.skipif(
  not (os.environ.get("JAXLAB_DATA") and REAL.is_dir()), reason="JAXLAB_DATA names no folder with planetoid/"
)


class Python2Pickler(pickle._Pickler):
  """Writes what Python 2 wrote: bytes as `str` opcodes, and the module names of the time."""

  dispatch = dict(pickle._Pickler.dispatch)

  def save_bytes(self, obj):
    self.write(b"T" + struct.pack("<i", len(obj)) + obj)
    self.memoize(obj)

  def save_global(self, obj, name=None):
    old = {"csr_matrix": "scipy.sparse.csr", "_reconstruct": "numpy.core.multiarray", "list": "__builtin__"}
    name = obj.__name__
    module = old.get(name, obj.__module__)
    self.write(f"c{module}\n{name}\n".encode())
    self.memoize(obj)

  dispatch[bytes] = save_bytes
  dispatch[type] = save_global


def python2(obj) -> bytes:
  buffer = io.BytesIO()
  Python2Pickler(buffer, protocol=2).dump(obj)
  return buffer.getvalue()


def citation_graph(rng):
  """A graph of 530 nodes in Planetoid's parts: 6 to train on, 516 others known, 7 to test, 1 without entry."""
  known, test = 522, np.array([528, 524, 522, 529, 523, 527, 525])  # 526 is missing
  allx = scipy.sparse.random(known, 12, 0.3, format="csr", random_state=1, dtype=np.float32)
  tx = scipy.sparse.csr_matrix(np.eye(7, 12, dtype=np.float32))
  ally = np.eye(3, dtype=np.int32)[rng.integers(0, 3, known)]
  ty = np.eye(3, dtype=np.int32)[np.arange(7) % 3]
  graph = collections.defaultdict(list, {i: [(i + 1) % 530] for i in range(530)})
  graph[0] += [0, 1, 5]  # a self-loop, a duplicate, and an edge listed in one direction only
  graph[526] = []
  graph[525] = [524]
  parts = {"x": allx[:6], "tx": tx, "allx": allx, "y": ally[:6], "ty": ty, "ally": ally, "graph": graph}
  return parts, test


def write(folder, parts, test, dump=python2, name="toy"):
  for part, value in parts.items():
    (folder / f"ind.{name}.{part}").write_bytes(value if isinstance(value, bytes) else dump(value))
  (folder / f"ind.{name}.test.index").write_text("".join(f"{i}\n" for i in test))


def toy(folder):
  return planetoid.load("toy", folder, published=False)


@pytest.fixture
def parts():
  return citation_graph(np.random.default_rng(0))


@pytest.mark.parametrize("dump", [python2, lambda value: pickle.dumps(value, protocol=2)], ids=["python2", "python3"])
def test_reads_parts_into_place(tmp_path, parts, dump):
  parts, test = parts
  write(tmp_path, parts, test, dump)
  dataset = toy(tmp_path)
  dense = dataset.features.toarray()
  np.testing.assert_array_equal(dense[:522], parts["allx"].toarray())
  np.testing.assert_array_equal(dense[test], parts["tx"].toarray())  # row i of tx is node test[i]
  np.testing.assert_array_equal(dataset.labels[test], np.arange(7) % 3)
  np.testing.assert_array_equal(dataset.labels[:522], parts["ally"].argmax(1))
  assert dataset.labels[526] == -1 and not dense[526].any()
  assert dataset.train_mask.nonzero()[0].tolist() == list(range(6))
  assert dataset.val_mask.nonzero()[0].tolist() == list(range(6, 506))
  assert dataset.test_mask.nonzero()[0].tolist() == sorted(test)
  expected = {frozenset((i, (i + 1) % 530)) for i in range(525)} | {frozenset((0, 5)), frozenset((525, 524))}
  expected |= {frozenset((i, (i + 1) % 530)) for i in (527, 528, 529)}
  pairs = list(zip(dataset.senders.tolist(), dataset.receivers.tolist(), strict=True))
  assert {frozenset(pair) for pair in pairs} == expected and len(pairs) == 2 * len(expected)
  assert dataset.features.dtype == np.float32 and dataset.senders.dtype == dataset.labels.dtype == np.int32


@needs_files
@pytest.mark.parametrize(
  ("name", "counts"), [("cora", (2708, 5278, 1433, 7, 0)), ("citeseer", (3327, 4552, 3703, 6, 15))]
)
def test_published_counts(name, counts):
  dataset = planetoid.load(name)
  unlabelled = int((dataset.labels < 0).sum())
  edges = len(dataset.senders) // 2
  assert (dataset.num_nodes, edges, dataset.num_features, dataset.num_classes, unlabelled) == counts
  assert (dataset.train_mask.sum(), dataset.val_mask.sum(), dataset.test_mask.sum()) == (20 * counts[3], 500, 1000)
  assert np.bincount(dataset.labels[dataset.train_mask]).tolist() == [20] * counts[3]
  assert not (dataset.train_mask & dataset.val_mask).any() and not (dataset.val_mask & dataset.test_mask).any()
  assert (dataset.labels[dataset.test_mask] >= 0).all()
  empty = dataset.features.sum(axis=1) == 0
  assert empty[dataset.labels < 0].all()
  sums = row_normalize_features(dataset).features.sum(axis=1)
  np.testing.assert_allclose(sums[~empty], 1, rtol=1e-5)
  assert not sums[empty].any()
  again = random_split(dataset, seed=3)
  assert np.bincount(again.labels[again.train_mask]).tolist() == [20] * counts[3]
  assert (again.labels[again.train_mask | again.val_mask | again.test_mask] >= 0).all()


@needs_files
def test_damaged_published_file_is_named(tmp_path):
  for file in REAL.glob("ind.cora.*"):
    (tmp_path / file.name).write_bytes(file.read_bytes())
  damaged = tmp_path / "ind.cora.allx"
  damaged.write_bytes(damaged.read_bytes()[:-1])
  with pytest.raises(ValueError, match=r"ind\.cora\.allx: got sha256 .* expected .*truncated or changed"):
    planetoid.load("cora", tmp_path)


def test_missing_file_names_the_two_ways(tmp_path):
  with pytest.raises(files.MissingFile, match=r"ind\.cora\.x.*download https://\S+ind\.cora\.x .*JAXLAB_DATA"):
    planetoid.load("cora", tmp_path)


class Call:
  """Pickles as a call of `function`."""

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


MARKER = "pickle_ran"
MALICIOUS = {
  "os.system": lambda: pickle.dumps(Call(os.system, f"touch {MARKER}"), protocol=2),
  "builtins.eval": lambda: pickle.dumps(Call(eval, f"open('{MARKER}', 'w')"), protocol=2),
  "builtins.exec, protocol 5": lambda: pickle.dumps(Call(exec, f"open('{MARKER}', 'w')"), protocol=5),
  "python 2 eval": lambda: f"c__builtin__\neval\n(S\"open('{MARKER}', 'w')\"\ntR.".encode(),
  "getattr": lambda: b"c__builtin__\ngetattr\n(c__builtin__\nlist\nS'__class__'\ntR.",
  "dotted name": lambda: b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__new__\x93.",
  "nested in the graph": lambda: pickle.dumps({0: [1], 1: [Call(os.system, f"touch {MARKER}")]}, protocol=2),
  "as a default factory": lambda: f"ccollections\ndefaultdict\n(cos\nsystem\ntR(S'touch {MARKER}'\nd.".encode(),
  "as an array's dtype": lambda: pickle.dumps(
    Call(np.zeros(1).__reduce__()[0], Call(os.system, f"touch {MARKER}")), protocol=2
  ),
  "instance opcode": lambda: f"(S'touch {MARKER}'\nios\nsystem\n.".encode(),
  "numpy.load": lambda: b"cnumpy\nload\n(S'x.npy'\ntR.",
  "copyreg": lambda: b"ccopy_reg\n_reconstructor\n(c__builtin__\nlist\nc__builtin__\nobject\nNtR.",
  "persistent id": lambda: b"Psomething\n.",
  "extension code": lambda: b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("part", ["allx", "ty", "graph"])
@pytest.mark.parametrize("attack", MALICIOUS)
def test_refuses_malicious_pickle(tmp_path, monkeypatch, parts, attack, part):
  monkeypatch.chdir(tmp_path)
  parts, test = parts
  write(tmp_path, parts | {part: MALICIOUS[attack]()}, test)
  with pytest.raises(ValueError, match=rf"ind\.toy\.{part}: got "):
    toy(tmp_path)
  assert not (tmp_path / MARKER).exists()


def test_published_folder_refuses_replaced_pickle(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for part in planetoid.PUBLISHED["cora"].sha256:
    (tmp_path / f"ind.cora.{part}").write_bytes(MALICIOUS["os.system"]())
  with pytest.raises(ValueError, match="sha256"):
    planetoid.load("cora", tmp_path)
  assert not (tmp_path / MARKER).exists()


def objects():
  return np.array([[1, None]], dtype=object)


BROKEN = {
  "truncated": ("allx", lambda p: python2(p["allx"])[:-20], "does not read"),
  "empty": ("y", lambda p: b"", "does not read"),
  "text": ("graph", lambda p: b"hello", "does not read"),
  "object array": ("ally", lambda p: pickle.dumps(objects(), protocol=2), "expected integers or floats"),
  "list for labels": ("y", lambda p: python2([1, 2]), "expected a pickled array"),
  "not one-hot": ("y", lambda p: python2(p["y"] + 1), "one-hot"),
  "array for matrix": ("tx", lambda p: python2(p["ty"]), "csr_matrix"),
  "other width": ("tx", lambda p: python2(p["tx"][:, :5].tocsr()), r"tx is \[7, 5\], expected \[7, 12\]"),
  "too few rows": ("x", lambda p: python2(p["x"][:5]), r"x is \[5, 12\], expected \[6, 12\]"),
  "nan": ("tx", lambda p: python2(scipy.sparse.csr_matrix(np.full((7, 12), np.nan, np.float32))), "not finite"),
  "list for graph": ("graph", lambda p: python2([[1], [0]]), "expected a dict"),
  "gap in graph": ("graph", lambda p: python2({i: [] for i in range(531) if i != 7}), "other keys than"),
  "neighbour out of range": ("graph", lambda p: python2({i: [530] for i in range(530)}), r"expected \[0, 530\)"),
  "neighbour is text": ("graph", lambda p: python2({0: ["1"], 1: [0]}), "list of nodes"),
  "test id twice": ("test.index", lambda p: b"522\n522\n523\n524\n525\n527\n528\n", "7 different ones"),
  "test id known": ("test.index", lambda p: b"1\n522\n523\n524\n525\n527\n528\n", "expected 522 to 529"),
  "test ids are text": ("test.index", lambda p: b"a\n", "an integer a line"),
  "index out of range": (
    "tx",
    lambda p: python2(_with_indices(p["tx"], 99)),
    "does not read|csr_matrix",
  ),
}


def _with_indices(matrix, value):
  matrix = matrix.copy()
  matrix.indices[0] = value
  return matrix


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named(tmp_path, parts, case):
  parts, test = parts
  part, make, message = BROKEN[case]
  write(tmp_path, parts, test)
  (tmp_path / f"ind.toy.{part}").write_bytes(make(parts))
  with pytest.raises(ValueError, match=message) as error:
    toy(tmp_path)
  assert "ind.toy" in str(error.value)
