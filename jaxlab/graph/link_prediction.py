"""Link prediction on one graph: batches whose target edges are taken out of it, a learner for pair scorers, Hits@K.

The protocol is that of the Open Graph Benchmark (arXiv:2005.00687) as `GraphPKU/NeuralCommonNeighbor` follows it. Every
epoch draws one negative pair for each training edge and a new order of the edges, in batches of which the last, smaller
one is left out. A batch's positive edges leave the graph, both directions, before anything is computed from it, for the
pairs that are tested are not edges of the graph either. Reported is the test score at the epoch of best validation.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import jraph
import numpy as np
import optax
import scipy.sparse
from jaxtyping import Array, Float, Int

from jaxlab.graph import common_neighbors, evaluation, sparse, structure
from jaxlab.graph.common_neighbors import Pairs, Sizes
from jaxlab.train.learner import Learner, TrainState, supervised


class Task(NamedTuple):
  """A graph of training edges and what to predict. Host, apart from what `graph` and `operator` hold.

  Attributes:
    graph: training edges in both directions, with features or ids as nodes, on the device.
    operator: of the graph, every value 1, on the device.
    adjacency: the same as a scipy matrix; entry e of it is edge e of the graph.
    entries: [2, E] where each training edge of the split stands in both, one row for each direction.
    split: pairs.
  """

  graph: jraph.GraphsTuple
  operator: sparse.Operator
  adjacency: scipy.sparse.csr_array
  entries: Int[np.ndarray, "2 e"]
  split: evaluation.LinkSplit


class Batch(NamedTuple):
  """Pairs to learn from.

  Attributes:
    graph: as the task's.
    operator: as the task's, with value 0 at edges that are taken out.
    pairs: P of them.
    labels: [P] 1 for an edge, 0 for none.
    weight: [P] adding up to 1 over the positives and over the negatives; 0 at padding.
  """

  graph: jraph.GraphsTuple
  operator: sparse.Operator
  pairs: Pairs
  labels: Float[Array, " p"]
  weight: Float[Array, " p"]


@flax.struct.dataclass
class Ranking:
  """Pairs to be ranked.

  Attributes:
    graph: as the task's.
    operator: as the task's.
    pairs: of all parts, one after the other.
    parts: name, number of positives, number of negatives after them.
  """

  graph: jraph.GraphsTuple
  operator: sparse.Operator
  pairs: Pairs
  parts: tuple[tuple[str, int, int], ...] = flax.struct.field(pytree_node=False)


def task(nodes: Any, num_nodes: int, split: evaluation.LinkSplit) -> Task:
  """Host. A task from features and a split.

  Args:
    nodes: [N, F] dense or scipy, which stays sparse, or ids [N].
    num_nodes: N.
    split: with at least one training edge, none of them twice.

  Raises:
    ValueError: on what `common_neighbors.adjacency` refuses, or training edges that repeat.
  """
  adjacency = common_neighbors.adjacency(split.train, num_nodes)
  if adjacency.nnz != 2 * split.train.shape[1]:
    raise ValueError(f"split: got {split.train.shape[1]} training edges, {adjacency.nnz // 2} distinct, expected equal")
  nodes = sparse.from_scipy(nodes) if scipy.sparse.issparse(nodes) else nodes
  graph = structure.from_scipy(adjacency, nodes=nodes)._replace(edges=None)
  train = split.train.astype("int64")
  codes = graph.receivers.astype("int64") * num_nodes + graph.senders
  entries = np.stack([np.searchsorted(codes, a * num_nodes + b) for a, b in (train, train[::-1])])
  graph, operator = jax.tree.map(jnp.asarray, (graph, sparse.operator(graph)))
  return Task(graph, operator, adjacency, entries, split)


class Batches:
  """Host. Step -> `Batch`: the same for the same step, in any order, so that a run resumes exactly.

  Attributes:
    steps: batches of an epoch.
    sizes: static sizes of the batches' pairs. A batch that needs more gets the next bucket, which compiles once more.
  """

  def __init__(
    self,
    task: Task,
    *,
    batch_size: int,
    seed: int,
    needs: dict[str, Any],
    edge_dropout: float = 0.0,
    remove_targets: bool = True,
    max_exclusive: int | None = None,
    sizes: Sizes | None = None,
  ) -> None:
    """Tries a few batches to learn their sizes, unless these are given.

    Args:
      task: what to learn.
      batch_size: positive pairs, and as many negative ones.
      seed: of orders, negatives and drops.
      needs: arguments of `common_neighbors.pairs`: which sets the model reads.
      edge_dropout: rate on the edges that sets are listed from.
      remove_targets: take the batch's positives out of the graph.
      max_exclusive: as `common_neighbors.pairs`.
      sizes: for instance those of another run, to share its compilation.

    Raises:
      ValueError: `batch_size` is not in [1, number of training edges].
    """
    count = task.split.train.shape[1]
    if not 1 <= batch_size <= count:
      raise ValueError(f"batch_size: got {batch_size}, expected 1 to {count}, the training edges")
    self._task, self._batch_size, self._seed = task, batch_size, seed
    self._remove = remove_targets
    self._options = {"edge_dropout": edge_dropout, "max_exclusive": max_exclusive, **needs}
    self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
    self.steps = count // batch_size
    self.sizes = Sizes(pairs=2 * batch_size)
    if sizes is None:
      tried = common_neighbors.largest([common_neighbors.sizes(self(i).pairs) for i in range(max(3, self.steps))])
      sizes = common_neighbors.grown(tried)._replace(pairs=2 * batch_size)
    self.sizes = sizes

  def __call__(self, step: int) -> Batch:
    """The batch of a step (0, 1, ...)."""
    epoch, i = divmod(step, self.steps)
    order, negatives = self._of_epoch(epoch)
    chosen = order[i * self._batch_size : (i + 1) * self._batch_size]
    ends = np.concatenate([self._task.split.train[:, chosen], negatives[:, chosen]], axis=1)
    adjacency, operator = self._task.adjacency, self._task.operator
    if self._remove:
      keep = np.ones(adjacency.nnz, bool)
      keep[self._task.entries[:, chosen]] = False
      adjacency = common_neighbors.masked(adjacency, keep)
      operator = operator.replace_values(keep.astype("float32"))  # type: ignore[arg-type]
    rng = np.random.default_rng([self._seed, 1, step])
    pairs = common_neighbors.pairs(adjacency, ends, rng=rng, at_least=self.sizes, **self._options)
    labels = np.arange(pairs.left.size) < self._batch_size
    weight = pairs.mask / np.float32(self._batch_size)
    return Batch(self._task.graph, operator, pairs, labels.astype("float32"), weight.astype("float32"))  # type: ignore[arg-type]

  def _of_epoch(self, epoch):
    if self._epoch is None or self._epoch[0] != epoch:
      train, num_nodes = self._task.split.train, self._task.adjacency.shape[0]
      order = np.random.default_rng([self._seed, 0, epoch]).permutation(train.shape[1])
      seed = int(np.random.SeedSequence([self._seed, 2, epoch]).generate_state(1)[0])
      self._epoch = epoch, order, evaluation.negative_edges(train, num_nodes, train.shape[1], seed)
    return self._epoch[1:]


def ranking(
  task: Task,
  needs: dict[str, Any],
  *,
  validation_edges: bool = False,
  max_exclusive: int | None = None,
  seed: int = 0,
  sizes: Sizes | None = None,
) -> dict[str, Ranking]:
  """Host. What `evaluate` of the learner takes: validation and test pairs on the graph of training edges.

  Args:
    task: what to rank.
    needs: arguments of `common_neighbors.pairs`: which sets the model reads.
    validation_edges: tests see the graph of training and validation edges, as ogbl-collab allows.
    max_exclusive: as `common_neighbors.pairs`.
    seed: of what is drawn with `max_exclusive`.
    sizes: least sizes, for instance those of another split, to share its compilation.
  """
  split, graphs = task.split, {"both": (task.operator, task.adjacency)}
  parts = {
    "validation": [split.validation, split.validation_negative],
    "test": [split.test, split.test_negative],
  }
  groups = {"both": list(parts)}
  if validation_edges:
    every = common_neighbors.adjacency(np.concatenate([split.train, split.validation], axis=1), task.adjacency.shape[0])
    full = jax.tree.map(jnp.asarray, sparse.from_scipy(every))
    graphs, groups = {"validation": graphs["both"], "test": (full, every)}, {name: [name] for name in parts}
  out = {}
  for name, members in groups.items():
    operator, adjacency = graphs[name]
    ends = np.concatenate([pair for member in members for pair in parts[member]], axis=1)
    pairs = common_neighbors.pairs(
      adjacency, ends, max_exclusive=max_exclusive, rng=np.random.default_rng(seed), at_least=sizes, **needs
    )
    counts = tuple((member, parts[member][0].shape[1], parts[member][1].shape[1]) for member in members)
    out[name] = Ranking(task.graph, operator, pairs, counts)
  return out


class _OnBatch(nn.Module):
  """A scorer called with a batch, under the scorer's own parameter names."""

  net: nn.Module

  def setup(self) -> None:
    nn.share_scope(self, self.net)

  def __call__(self, batch, *, train=False):
    return self.net(batch.graph, batch.pairs, batch.operator, train=train)


def learner(
  model: nn.Module, *, encoder_rate: float, head_rate: float, k: int = 100, axis_name: str | None = None
) -> Learner:
  """Adam on mean softplus(-logit) over positives plus mean softplus(logit) over negatives.

  Args:
    model: called as `model(graph, pairs, operator, train=...)`, with parameters under "encoder" and "head".
    encoder_rate: learning rate of the one.
    head_rate: of the other.
    k: `evaluate` measures Hits@K of every part of a ranking; 0 for the mean reciprocal rank, each positive among its
      own M / P of the negatives.
    axis_name: device axis over which gradients are averaged.

  Returns:
    A learner on `Batch`es; `evaluate` takes what `ranking` gives, and its metrics are named as the parts.
  """
  if k < 0:
    raise ValueError(f"k: got {k}, expected 1 or more for Hits@K, 0 for the mean reciprocal rank")
  rates = {"encoder": optax.adam(encoder_rate), "head": optax.adam(head_rate)}
  tx = optax.multi_transform(rates, lambda params: {name: name for name in params})

  def evaluate(state: TrainState, rankings: dict[str, Ranking]) -> dict[str, Float[Array, ""]]:
    return {
      name: hits(positive, negative, k)
      for one in rankings.values()
      for name, positive, negative in scores(model, state.best_variables, one)
    }

  trained = supervised(_OnBatch(model), _loss, tx, inputs=lambda batch: batch, axis_name=axis_name)
  return trained._replace(evaluate=evaluate)


def scores(model: nn.Module, variables: Any, one: Ranking) -> list[tuple[str, Float[Array, " p"], Float[Array, " m"]]]:
  """For each part of a ranking its name, and logits of its positives and negatives."""
  logits = jnp.asarray(model.apply(variables, one.graph, one.pairs, one.operator), "float32")
  out, start = [], 0
  for name, positives, negatives in one.parts:
    middle, end = start + positives, start + positives + negatives
    out.append((name, logits[start:middle], logits[middle:end]))
    start = end
  return out


def hits(positive: Float[Array, " p"], negative: Float[Array, " m"], k: int) -> Float[Array, ""]:
  """Hits@K, or for k = 0 the mean reciprocal rank of each positive among its own M / P negatives, in order."""
  if k:
    return evaluation.hits_at_k(positive, negative, k)
  return evaluation.mean_reciprocal_rank(positive, negative.reshape(positive.shape[0], -1))


def _loss(logits, batch):
  logits = logits.astype("float32")
  each = nn.softplus(jnp.where(batch.labels > 0, -logits, logits))
  return jnp.sum(batch.weight * each), {}
