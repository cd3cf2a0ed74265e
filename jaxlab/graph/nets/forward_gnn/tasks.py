"""What the learners train on: one graph and several splits of its nodes or edges."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Bool, Float, Int
from sklearn.model_selection import KFold, train_test_split

from jaxlab.graph import evaluation, sparse, structure
from jaxlab.graph.nets.forward_gnn.convolution import Bordered

View = Literal["validation", "test"]


class NodeTask(NamedTuple):
  """Node classification on S splits.

  Attributes:
    features: [N, F], dense or sparse; the paper's rows sum to 1.
    adjacency: [N, N], values 1, no self-loops.
    labels: [N] classes.
    train: [S, N] masks; likewise the next two.
  """

  features: Float[Array, "n f"] | sparse.Operator
  adjacency: sparse.Operator
  labels: Int[Array, " n"]
  train: Bool[Array, "s n"]
  validation: Bool[Array, "s n"]
  test: Bool[Array, "s n"]

  @property
  def axes(self) -> "NodeTask":
    """The axis of splits of each field, for `jax.vmap`."""
    return NodeTask(*[None] * 3, *[0] * 3)  # type: ignore[arg-type]

  @property
  def splits(self) -> int:
    """S."""
    return self.train.shape[0]

  def metric(self, scores: Float[Array, "n c"], view: View) -> Float[Array, ""]:
    """Accuracy, a fraction, of one split."""
    return evaluation.accuracy(scores, self.labels, getattr(self, view))


class Pairs(NamedTuple):
  """Pairs of nodes that are joined by an edge, and as many that are not: each [S, 2, P] int32."""

  positive: Int[Array, "s 2 p"]
  negative: Int[Array, "s 2 p"]

  def products(self, z: Float[Array, "n h"]) -> Float[Array, "p2 h"]:
    """z_i z_j, entry by entry, in float32: of the positive pairs, then of the negative ones; of one split."""
    i, j = jnp.concatenate([self.positive, self.negative], axis=1)
    z = z.astype("float32")
    return z[i] * z[j]


class LinkTask(NamedTuple):
  """Link prediction on S splits.

  Splits differ in which edges carry messages. They share the pattern of the whole graph, where the other edges have
  weight 0, so that all of them run as one product.

  Attributes:
    features: [N, F], dense or sparse; the paper's rows sum to 1.
    adjacency: [N, N], every edge in both directions.
    messages: [S, E] 1 for training edges, seen in training and validation; else 0.
    test_messages: [S, E] 1 for training and validation edges.
    train: pairs to learn.
    validation: pairs for early stopping.
    test: pairs for the result.
  """

  features: Float[Array, "n f"] | sparse.Operator
  adjacency: sparse.Operator
  messages: Float[Array, "s e"]
  test_messages: Float[Array, "s e"]
  train: Pairs
  validation: Pairs
  test: Pairs

  @property
  def axes(self) -> "LinkTask":
    """The axis of splits of each field, for `jax.vmap`."""
    return LinkTask(*[None] * 2, *[0] * 5)  # type: ignore[arg-type]

  @property
  def splits(self) -> int:
    """S."""
    return self.messages.shape[0]

  def graph(self, view: View) -> Bordered:
    """The edges that carry messages, without virtual nodes; of one split."""
    values = self.test_messages if view == "test" else self.messages
    n = self.adjacency.shape[0]
    return Bordered(self.adjacency.replace_values(values), jnp.zeros((n, 0)), jnp.zeros(n))

  def metric(self, scores: Float[Array, " p2"], view: View) -> Float[Array, ""]:
    """Area under the ROC curve of one split: how often a positive pair scores above a negative one."""
    positive, negative = jnp.split(scores, 2)
    return 1 - (jnp.mean(evaluation.ranks(positive, negative)) - 1) / negative.shape[0]


def node_task(
  features: Float[np.ndarray, "n f"] | scipy.sparse.sparray,
  senders: Int[np.ndarray, " e"],
  receivers: Int[np.ndarray, " e"],
  labels: Int[np.ndarray, " n"],
  splits: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> NodeTask:
  """Host. A task from the arrays of a `data.NodeDataset`.

  Args:
    features: dense, or any scipy matrix, which stays sparse.
    senders: both directions of every edge, once; no self-loops.
    receivers: likewise.
    labels: class of each node, from 0.
    splits: masks of training, validation and test nodes for each run, such as `node_splits` draws.

  Raises:
    ValueError: on what `structure.from_edges` refuses, no split, an empty mask, or a masked node without a label.
  """
  if not splits:
    raise ValueError("splits: got none, expected at least one")
  masks = [np.stack(part) for part in zip(*splits, strict=True)]
  for name, mask in zip(("train", "validation", "test"), masks, strict=True):
    if mask.shape[1:] != labels.shape or mask.dtype != bool:
      raise ValueError(f"splits: got {name} masks {mask.dtype} of shape {mask.shape}, expected bool [S, {len(labels)}]")
    if not mask.any(axis=1).all() or (mask & (labels < 0)).any():
      raise ValueError(
        f"splits: got {name} masks that are empty or hold nodes without a label, expected labelled nodes"
      )
  adjacency = sparse.operator(structure.from_edges(senders, receivers, num_nodes=len(labels)))
  return NodeTask(_device(features), adjacency, *jax.tree.map(jnp.asarray, (np.maximum(labels, 0), *masks)))


def link_task(
  features: Float[np.ndarray, "n f"] | scipy.sparse.sparray,
  senders: Int[np.ndarray, " e"],
  receivers: Int[np.ndarray, " e"],
  seeds: Sequence[int],
  *,
  validation: float = 0.16,
  test: float = 0.2,
) -> LinkTask:
  """Host. A random split of the undirected edges for each seed, and as many pairs without an edge in each part.

  Args:
    features: as `node_task`; likewise the next two.
    senders: both directions of every edge, once.
    receivers: likewise.
    seeds: of the splits.
    validation: share of the edges.
    test: likewise.

  Raises:
    ValueError: on what `structure.from_edges`, `evaluation.edge_split` or `evaluation.negative_edges` refuse, or no
      seed.
  """
  if not len(seeds):
    raise ValueError("seeds: got none, expected at least one")
  n = features.shape[0]
  adjacency = sparse.operator(structure.from_edges(senders, receivers, num_nodes=n))
  ends = np.sort(np.stack([adjacency.columns, adjacency.rows]).astype("int64"), axis=0)
  code = ends[0] * n + ends[1]
  parts = []
  for seed in seeds:
    split = evaluation.edge_split(np.stack([senders, receivers]), seed, validation=validation, test=test)
    sizes = [part.shape[1] for part in split]
    negative = evaluation.negative_edges(np.concatenate(split, axis=1), n, sum(sizes), seed)
    pairs = [
      Pairs(*map(jnp.asarray, both))
      for both in zip(split, np.split(negative, np.cumsum(sizes)[:-1], axis=1), strict=True)
    ]
    seen = [np.isin(code, part[0].astype("int64") * n + part[1]).astype("float32") for part in split]
    parts.append((seen[0], seen[0] + seen[1], *pairs))
  return LinkTask(_device(features), adjacency, *jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *parts))


def _device(features):
  return sparse.from_scipy(features) if scipy.sparse.issparse(features) else jnp.asarray(features, "float32")


def node_splits(num_nodes: int, *, folds: int = 5) -> list[evaluation.NodeSplit]:
  """Host. The paper's splits, 64 / 16 / 20 %: test nodes are a fold, validation nodes a fifth of the others.

  Source: `src/datasets/datasplit.py` of the official code, whose seeds these are.
  """
  mask = lambda index: np.isin(np.arange(num_nodes), index)
  splits = []
  for i, (rest, test) in enumerate(KFold(folds, shuffle=True, random_state=101).split(np.arange(num_nodes))):
    train, validation = train_test_split(rest, test_size=0.2, random_state=127 * i, shuffle=True)
    splits.append(evaluation.NodeSplit(mask(train), mask(validation), mask(test)))
  return splits
