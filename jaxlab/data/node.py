"""What every node-classification loader returns, and what is done to it before training."""

from typing import NamedTuple

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int

from jaxlab import checks


class NodeDataset(NamedTuple):
  """One undirected graph with features, labels and a split. Everything is NumPy or SciPy, on the host.

  Attributes:
    features: [N, F] float32, dense or CSR where mostly zero.
    senders: [E] int32. Each undirected edge appears in both directions; no duplicates, no self-loops; sorted by
      receiver, then sender.
    receivers: [E] int32.
    labels: [N] int32 class, or -1 for a node without one (which no mask selects).
    train_mask: [N] bool.
    val_mask: [N] bool.
    test_mask: [N] bool. The three are disjoint.
  """

  features: Float[np.ndarray, "n f"] | scipy.sparse.csr_array
  senders: Int[np.ndarray, " e"]
  receivers: Int[np.ndarray, " e"]
  labels: Int[np.ndarray, " n"]
  train_mask: Bool[np.ndarray, " n"]
  val_mask: Bool[np.ndarray, " n"]
  test_mask: Bool[np.ndarray, " n"]

  @property
  def num_nodes(self) -> int:
    """N."""
    return len(self.labels)

  @property
  def num_classes(self) -> int:
    """C, one more than the largest label."""
    return int(self.labels.max()) + 1

  @property
  def num_features(self) -> int:
    """F."""
    return self.features.shape[1]

  @property
  def adjacency(self) -> scipy.sparse.csr_array:
    """[N, N] float32 of ones, symmetric: row = receiver, column = sender."""
    ones = np.ones(len(self.senders), np.float32)
    return scipy.sparse.csr_array((ones, (self.receivers, self.senders)), shape=(self.num_nodes, self.num_nodes))


def row_normalize_features(dataset: NodeDataset) -> NodeDataset:
  """Divides each feature row by its sum, as the citation benchmarks do; rows that sum to 0 stay as they are."""
  sums = np.asarray(dataset.features.sum(axis=1), np.float32).reshape(-1)
  scale = np.divide(1.0, sums, out=np.ones_like(sums), where=sums != 0)
  if scipy.sparse.issparse(dataset.features):
    return dataset._replace(features=scipy.sparse.csr_array(scipy.sparse.diags_array(scale) @ dataset.features))
  return dataset._replace(features=dataset.features * scale[:, None])


def random_split(
  dataset: NodeDataset, *, seed: int, train_per_class: int = 20, val: int = 500, test: int | None = 1000
) -> NodeDataset:
  """A fresh split of the labelled nodes: so many a class for training, then validation and test from the shuffled rest.

  Args:
    dataset: any.
    seed: of the shuffle.
    train_per_class: training nodes of each class.
    val: validation nodes in total.
    test: test nodes in total; None for all that remain.

  Returns:
    The dataset with new masks.

  Raises:
    ValueError: a negative count, or more nodes asked for than there are.
  """
  checks.count("train_per_class", train_per_class, 1)
  checks.count("val", val, 0)
  rng = np.random.default_rng(checks.count("seed", seed, 0))
  labelled = rng.permutation(np.flatnonzero(dataset.labels >= 0))
  labels = dataset.labels[labelled]
  sizes = np.bincount(labels, minlength=dataset.num_classes)
  if sizes.min() < train_per_class:
    smallest = int(sizes.argmin())
    raise ValueError(
      f"train_per_class: got {train_per_class}, expected at most {sizes[smallest]}, the size of class {smallest}"
    )
  # Rank of each node among those of its class, in shuffled order.
  order = np.argsort(labels, kind="stable")
  rank = np.empty(len(labels), np.int64)
  rank[order] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
  train, rest = labelled[rank < train_per_class], labelled[rank >= train_per_class]
  if val > len(rest):
    raise ValueError(f"val: got {val}, expected at most {len(rest)}, the labelled nodes left after training")
  test = len(rest) - val if test is None else checks.count("test", test, 0)
  if val + test > len(rest):
    raise ValueError(f"test: got {test}, expected at most {len(rest) - val}, the labelled nodes left")
  return dataset._replace(
    train_mask=mask(train, dataset.num_nodes),
    val_mask=mask(rest[:val], dataset.num_nodes),
    test_mask=mask(rest[val : val + test], dataset.num_nodes),
  )


def undirected(
  rows: Int[np.ndarray, " e"], columns: Int[np.ndarray, " e"], num_nodes: int
) -> tuple[Int[np.ndarray, " e2"], Int[np.ndarray, " e2"]]:
  """Senders and receivers of the simple undirected graph under an edge list: both directions, each once, no self-loops.

  Args:
    rows: [E] integers in [0, num_nodes), one end of each edge.
    columns: [E], the other end.
    num_nodes: N.

  Returns:
    (senders, receivers) int32, sorted by receiver, then sender.

  Raises:
    ValueError: different lengths, or an index out of range.
  """
  rows, columns = np.asarray(rows, np.int64), np.asarray(columns, np.int64)
  if rows.shape != columns.shape:
    raise ValueError(f"columns: got shape {columns.shape}, expected that of rows, {rows.shape}")
  for name, ids in (("rows", rows), ("columns", columns)):
    if ids.size and (ids.min() < 0 or ids.max() >= num_nodes):
      raise ValueError(f"{name}: got indices in [{ids.min()}, {ids.max()}], expected [0, {num_nodes})")
  ends = rows != columns
  rows, columns = rows[ends], columns[ends]
  keys = unique(np.concatenate([rows * num_nodes + columns, columns * num_nodes + rows]))
  return (keys % num_nodes).astype(np.int32), (keys // num_nodes).astype(np.int32)


def mask(indices: Int[np.ndarray, " m"], num_nodes: int) -> Bool[np.ndarray, " n"]:
  """Boolean mask of [num_nodes] that is true at `indices`."""
  out = np.zeros(num_nodes, bool)
  out[indices] = True
  return out


def unique(keys: Int[np.ndarray, " k"]) -> Int[np.ndarray, " u"]:
  """Sorted distinct values. As `np.unique`, whose hash table is several times slower on tens of millions of keys."""
  keys = np.sort(keys)
  return keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if len(keys) else keys
