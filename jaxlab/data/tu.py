"""MUTAG and PROTEINS: sets of small graphs with a class each, and the ten folds that the literature shares.

Read in the text form of `muhanzhang/pytorch_DGCNN` (Zhang et al., "An End-to-End Deep Learning Architecture for Graph
Classification", AAAI 2018), which `weihua916/powerful-gnns` uses too: the number of graphs; for each graph a line
"nodes label", then for each node a line "tag degree neighbours".
"""

import os
import pathlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxlab import checks
from jaxlab.data import files

URL = "https://github.com/muhanzhang/pytorch_DGCNN/raw/master/data/"
NUM_FOLDS = 10


class Published(NamedTuple):
  """Sizes that a published set must come out with, and its file's checksum."""

  graphs: int
  nodes: int
  edges: int
  tags: int
  sha256: str


PUBLISHED = {
  "MUTAG": Published(188, 3371, 3721, 7, "5897dae243f6c773aab54ec99e86551c3b1e8601acef254714073042c632d30e"),
  "PROTEINS": Published(1113, 43471, 81044, 3, "ed0730f9bf9da68aa6a8c80f2f2b6ecea5d05791ca254c709f3efab3b45d937b"),
}


class Graph(NamedTuple):
  """One undirected graph.

  Attributes:
    features: [N, F] float32, one-hot node tags.
    senders: [E] int32, each edge in both directions, sorted by receiver, then sender.
    receivers: [E] int32.
  """

  features: Float[np.ndarray, "n f"]
  senders: Int[np.ndarray, " e"]
  receivers: Int[np.ndarray, " e"]


class GraphDataset(NamedTuple):
  """A set of graphs.

  Attributes:
    graphs: all of them.
    labels: [G] int32 classes.
    folds: for each of ten folds, the numbers of its training and of its test graphs.
  """

  graphs: list[Graph]
  labels: Int[np.ndarray, " g"]
  folds: list[tuple[Int[np.ndarray, " a"], Int[np.ndarray, " b"]]]

  @property
  def num_classes(self) -> int:
    """C."""
    return int(self.labels.max()) + 1


def load(name: str, directory: str | os.PathLike[str] | None = None, *, published: bool = True) -> GraphDataset:
  """Host. A set of graphs.

  Args:
    name: a key of `PUBLISHED`.
    directory: folder with `<name>.txt` and `10fold_idx/`. Default: `JAXLAB_DATA/tu/<name>`, else checked downloads.
    published: check that the file is the published one. False reads any file of the format from `directory`.

  Raises:
    ValueError: unknown name, missing file (`files.MissingFile`), damaged or ill-formed content.
  """
  if published:
    checks.choice("name", name, tuple(PUBLISHED))
  elif directory is None:
    raise ValueError("directory: got None, expected the folder to read when published=False")
  sha256 = PUBLISHED[name].sha256 if published else None

  def fetch(place, file, sha256=None):
    local = None if directory is None else pathlib.Path(directory) / place
    url = URL + str(pathlib.PurePosixPath(name, place, file))
    return files.fetch(str(pathlib.PurePath("tu", name, place)), file, url=url, sha256=sha256, directory=local)

  path = fetch(".", f"{name}.txt", sha256)
  graphs, labels = files.parse(path, _read, "graphs as `number`, then `nodes label` and a line a node for each")
  folds = []
  for fold in range(1, NUM_FOLDS + 1):
    parts = [fetch("10fold_idx", f"{part}_idx-{fold}.txt") for part in ("train", "test")]
    train, test = (files.parse(part, _indices, "a graph number a line") for part in parts)
    if not np.array_equal(np.sort(np.concatenate([train, test])), np.arange(len(graphs))):
      raise ValueError(f"{parts[0]}: got folds that do not divide {len(graphs)} graphs, expected each graph once")
    folds.append((train, test))
  nodes, edges = sum(len(graph.features) for graph in graphs), sum(len(graph.senders) for graph in graphs) // 2
  got = (len(graphs), nodes, edges, graphs[0].features.shape[1] if graphs else 0)
  if published and got != PUBLISHED[name][:4]:
    raise ValueError(f"{path}: got graphs, nodes, edges, tags {got}, expected {PUBLISHED[name][:4]}")
  return GraphDataset(graphs, labels, folds)


def _indices(path: pathlib.Path) -> Int[np.ndarray, " n"]:
  return np.array(path.read_text().split(), np.int64)


def _read(path: pathlib.Path) -> tuple[list[Graph], Int[np.ndarray, " g"]]:
  lines = iter(path.read_text().splitlines())
  raw, labels = [], []
  for _ in range(int(next(lines))):
    n, label = map(int, next(lines).split())
    rows = [np.array(next(lines).split(), np.int64) for _ in range(n)]
    if any(len(row) < 2 or len(row) - 2 < row[1] for row in rows):
      raise ValueError("a node line with fewer neighbours than its degree")
    neighbours = [row[2 : 2 + row[1]] for row in rows]
    receivers = np.repeat(np.arange(n), [len(row) for row in neighbours])
    senders = np.concatenate(neighbours)
    if senders.size and not 0 <= senders.min() <= senders.max() < n:
      raise ValueError("a neighbour that is not a node")
    # Both directions of an edge that is not a loop, once.
    pairs = np.unique(np.stack([np.append(receivers, senders), np.append(senders, receivers)]), axis=1)
    receivers, senders = pairs[:, pairs[0] != pairs[1]]
    raw.append((np.array([row[0] for row in rows]), senders.astype("int32"), receivers.astype("int32")))
    labels.append(label)
  tags = np.unique(np.concatenate([tag for tag, _, _ in raw]))
  one_hot = np.eye(len(tags), dtype="float32")
  graphs = [Graph(one_hot[np.searchsorted(tags, tag)], senders, receivers) for tag, senders, receivers in raw]
  return graphs, np.searchsorted(np.unique(labels), labels).astype("int32")
