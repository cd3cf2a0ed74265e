"""Training of the link predictor, with re-weighting between epochs, and the ranking of all nodes for each node.

A step's loss is (mean softplus(-logit) over positives + mean softplus(logit) over negatives) / 2. After the last step
of an epoch the state is validated by Hits@K, kept if it is the best so far, and only then are messages re-weighted.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import jraph
import numpy as np
import optax
import scipy.sparse
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlab import checks
from jaxlab.graph import common_neighbors, evaluation, sparse, structure
from jaxlab.graph.links.topological_concentration.predictor import Conv, LinkPredictor, Reweighting, reweight
from jaxlab.train.learner import Learner, TrainState, supervised

# --------------------------------------------------------------------------------------------------------------- data


class Task(NamedTuple):
  """Train edges as messages, and what to predict.

  Attributes:
    graph: train edges in both directions and self-loops, weighted, with features or ids as nodes; on the device.
    operator: of the graph, on the device.
    adjacency: [N, N] train edges alone, on the host: what TC is computed from.
    split: pairs, on the host.
  """

  graph: jraph.GraphsTuple
  operator: sparse.Operator
  adjacency: scipy.sparse.csr_array
  split: evaluation.LinkSplit


class Batch(NamedTuple):
  """Pairs to learn from, and pairs to validate on after the last step of an epoch.

  Attributes:
    graph: as the task's.
    operator: as the task's.
    positive: [2, P] edges.
    negative: [2, P] strangers.
    validation: [2, V] edges.
    validation_negative: [2, M] strangers.
  """

  graph: jraph.GraphsTuple
  operator: sparse.Operator
  positive: Int[Array, "2 p"]
  negative: Int[Array, "2 p"]
  validation: Int[Array, "2 v"]
  validation_negative: Int[Array, "2 m"]


def task(nodes: Any, num_nodes: int, split: evaluation.LinkSplit, conv: Conv = "gcn") -> Task:
  """Host. A task from features and a split.

  Args:
    nodes: [N, F] dense or scipy, which stays sparse, or ids [N]. The published runs scale rows to sum 1.
    num_nodes: N.
    split: pairs.
    conv: which weights messages have.

  Raises:
    ValueError: on nodes or edges that do not fit.
  """
  checks.choice("conv", conv, Conv)
  adjacency = common_neighbors.adjacency(split.train, num_nodes)
  nodes = sparse.from_scipy(nodes) if scipy.sparse.issparse(nodes) else nodes
  graph = structure.from_scipy(adjacency, nodes=nodes)
  graph = structure.normalize(graph, "symmetric" if conv == "gcn" else "row")
  graph, operator = jax.tree.map(jnp.asarray, (graph, sparse.operator(graph)))
  return Task(graph, operator, adjacency, split)


class Batches:
  """Host. Step -> `Batch`: the same for the same step, in any order, so that a run resumes exactly.

  Each epoch draws a new order and one negative for each train edge, none of them a train edge.

  Attributes:
    steps: batches of an epoch; the last, smaller one is left out.
  """

  def __init__(self, task: Task, *, batch_size: int, seed: int) -> None:
    """Batches of one seed.

    Args:
      task: what to learn.
      batch_size: P.
      seed: of orders and negatives.

    Raises:
      ValueError: `batch_size` is not in [1, number of train edges].
    """
    count = task.split.train.shape[1]
    if not 1 <= batch_size <= count:
      raise ValueError(f"batch_size: got {batch_size}, expected 1 to {count}, the train edges")
    self._task, self._batch_size, self._seed = task, batch_size, seed
    self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
    self._validation = jnp.asarray(task.split.validation), jnp.asarray(task.split.validation_negative)
    self.steps = count // batch_size

  def __call__(self, step: int) -> Batch:
    """The batch of a step (0, 1, ...)."""
    epoch, i = divmod(step, self.steps)
    train = self._task.split.train
    if self._epoch is None or self._epoch[0] != epoch:
      order = np.random.default_rng([self._seed, 0, epoch]).permutation(train.shape[1])
      seed = int(np.random.SeedSequence([self._seed, 1, epoch]).generate_state(1)[0])
      negatives = evaluation.negative_edges(train, self._task.adjacency.shape[0], train.shape[1], seed)
      self._epoch = epoch, order, negatives
    chosen = self._epoch[1][i * self._batch_size : (i + 1) * self._batch_size]
    negative = self._epoch[2][:, i * self._batch_size : (i + 1) * self._batch_size]
    return Batch(self._task.graph, self._task.operator, train[:, chosen], negative, *self._validation)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ learner


@flax.struct.dataclass
class Best:
  """The epoch of highest validation Hits@K.

  Attributes:
    hits: that score, -1 before the first.
    epoch: from 1.
    params: weights of the model.
    weights: [E] of messages.
  """

  hits: Float[Array, ""]
  epoch: Int[Array, ""]
  params: Any
  weights: Float[Array, " e"]

  @property
  def variables(self) -> dict[str, Any]:
    """What `model.apply` takes."""
    return {"params": self.params}


@flax.struct.dataclass
class State:
  """State of the learner.

  Attributes:
    trained: model and optimizer.
    weights: [E] of messages, in force.
    hits: validation Hits@K after the last complete epoch.
    best: what `evaluate` uses.
  """

  trained: TrainState
  weights: Float[Array, " e"]
  hits: Float[Array, ""]
  best: Best


class _OnBatch(nn.Module):
  """The model called with a batch, under the model's own parameter names."""

  net: nn.Module

  def setup(self) -> None:
    nn.share_scope(self, self.net)

  def __call__(self, batch, *, train=False):
    return self.net(batch.graph, jnp.concatenate([batch.positive, batch.negative], axis=1), batch.operator, train=train)


def learner(
  model: LinkPredictor,
  *,
  steps_per_epoch: int,
  reweighting: Reweighting | None = None,
  encoder_rate: float = 1e-3,
  head_rate: float = 1e-3,
  clip: float = 1.0,
  k: int = 100,
  axis_name: str | None = None,
) -> Learner:
  """Adam, gradients of encoder and MLP clipped each by itself; a table of embeddings learns at the encoder's rate.

  Args:
    model: what to train.
    steps_per_epoch: `Batches.steps`.
    reweighting: None leaves messages as they are.
    encoder_rate: learning rate.
    head_rate: of the MLP.
    clip: largest global norm.
    k: of Hits@K.
    axis_name: device axis over which gradients are averaged.

  Returns:
    A learner on `Batch`es. Metrics of a step: the loss and the last epoch's validation Hits@K. `evaluate` takes a dict
    of names to (positive [2, P], negative [2, M]) pairs under "pairs", and "graph" and "operator"; it gives Hits@K of
    each at the best epoch.

  Raises:
    ValueError: on an argument out of range.
  """
  for name, value in (("steps_per_epoch", steps_per_epoch), ("k", k)):
    if value < 1:
      raise ValueError(f"{name}: got {value}, expected at least 1")
  if not clip > 0:
    raise ValueError(f"clip: got {clip}, expected a positive norm")
  if reweighting is not None and (reweighting.interval < 1 or reweighting.alpha < 0):
    raise ValueError(f"reweighting: got {reweighting}, expected an interval of 1 or more and an alpha of 0 or more")
  clipped = lambda rate: optax.chain(optax.clip_by_global_norm(clip), optax.adam(rate))
  rates = {"encoder": clipped(encoder_rate), "head": clipped(head_rate), "embedding": optax.adam(encoder_rate)}
  tx = optax.multi_transform(rates, lambda params: {name: name for name in params})
  inner = supervised(_OnBatch(model), _loss, tx, inputs=lambda batch: batch, axis_name=axis_name)

  def init(key: Key[Array, ""], batch: Batch) -> State:
    trained = inner.init(key, batch)
    weights = jnp.asarray(batch.operator.values, "float32")
    best = Best(-jnp.ones(()), jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, trained.params), jnp.copy(weights))
    return State(trained, weights, jnp.zeros(()), best)

  def step(state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
    trained, metrics = inner.step(state.trained, batch._replace(operator=batch.operator.replace_values(state.weights)))
    state = state.replace(trained=trained)  # type: ignore[attr-defined]
    state = jax.lax.cond(trained.step % steps_per_epoch == 0, finish_epoch, lambda state, batch: state, state, batch)
    return state, {**metrics, "validation": state.hits}

  def finish_epoch(state: State, batch: Batch) -> State:
    params, weights = state.trained.params, state.weights
    epoch = state.trained.step // steps_per_epoch
    pairs = {"validation": (batch.validation, batch.validation_negative)}
    hits = _hits(model, {"params": params}, batch.graph, batch.operator.replace_values(weights), pairs, k)["validation"]
    now = Best(hits, epoch, params, weights)
    best = jax.tree.map(lambda new, old: jnp.where(hits > state.best.hits, new, old), now, state.best)
    if reweighting is not None:
      due = (epoch >= reweighting.warm_up) & (epoch % reweighting.interval == 0)
      options = {name: getattr(reweighting, name) for name in ("alpha", "context", "receiver")}
      weights = jax.lax.cond(
        due,
        lambda: reweight(model, {"params": params}, batch.graph, batch.operator, weights, **options),
        lambda: weights,
      )
    return state.replace(weights=weights, hits=hits, best=best)  # type: ignore[attr-defined]

  def evaluate(state: State, on: dict[str, Any]) -> dict[str, Array]:
    operator = on["operator"].replace_values(state.best.weights)
    return _hits(model, state.best.variables, on["graph"], operator, on["pairs"], k)

  return Learner(init, step, evaluate, axis_name)


def _hits(model, variables, graph, operator, pairs, k):
  """Hits@K of several (positive, negative) pairs from one encoding."""
  h = model.apply(variables, graph, operator, method="encode")
  score = lambda ends: model.apply(variables, h[ends[0]] * h[ends[1]], method="score").astype("float32")
  return {name: evaluation.hits_at_k(score(yes), score(no), k) for name, (yes, no) in pairs.items()}


def _loss(logits, batch):
  positive, negative = jnp.split(logits.astype("float32"), 2)
  return (jnp.mean(nn.softplus(-positive)) + jnp.mean(nn.softplus(negative))) / 2, {}


# ------------------------------------------------------------------------------------------------------------ ranking


class NodeMetrics(NamedTuple):
  """How well each of B nodes' true neighbours are ranked among all nodes, at K cutoffs: [B, K], all in [0, 1].

  Attributes:
    recall: share of the true neighbours that are in the first k.
    precision: share of the first k that are true.
    f1: of the two; 0 where both are.
    ndcg: discounted gain over the best that is possible.
    hits: whether any is.
    reciprocal_rank: [B] of the true neighbour that comes first.
  """

  recall: Float[Array, "b k"]
  precision: Float[Array, "b k"]
  f1: Float[Array, "b k"]
  ndcg: Float[Array, "b k"]
  hits: Float[Array, "b k"]
  reciprocal_rank: Float[Array, " b"]


def node_metrics(
  scores: Float[Array, "b n"],
  truth: Bool[Array, "b n"],
  known: Bool[Array, "b n"] | None = None,
  *,
  ks: tuple[int, ...] = (5, 10, 20, 50, 100),
) -> NodeMetrics:
  """Metrics of rankings; of equal scores the lower node comes first.

  Args:
    scores: of every node, for each of B.
    truth: neighbours to find; a row without any has 0 everywhere.
    known: neighbours that the model has seen, which go to the bottom; None for none. The node itself stays.
    ks: cutoffs, up to N.

  Raises:
    ValueError: on shapes that differ, or cutoffs out of range.
  """
  for name, mask in (("truth", truth), ("known", known)):
    if mask is not None and (mask.shape != scores.shape or mask.dtype != bool):
      raise ValueError(f"{name}: got {mask.dtype} of shape {mask.shape}, expected bool {scores.shape}, as scores")
  if not ks or min(ks) < 1 or max(ks) > scores.shape[-1]:
    raise ValueError(f"ks: got {ks}, expected cutoffs in [1, {scores.shape[-1]}]")
  scores = scores.astype("float32")
  if known is not None:
    scores = jnp.where(known & ~truth, -jnp.inf, scores)
  count = jnp.sum(truth, axis=1)
  some = count > 0
  top = jax.lax.top_k(scores, max(ks))[1]
  hit = jnp.take_along_axis(truth, top, axis=1).astype("float32")
  discount = 1 / jnp.log2(jnp.arange(max(ks)) + 2.0)
  ideal = jnp.append(0.0, jnp.cumsum(discount))
  found, gain = jnp.cumsum(hit, axis=1), jnp.cumsum(hit * discount, axis=1)
  at, cut = jnp.asarray(ks) - 1, jnp.asarray(ks)
  found, gain = found[:, at], gain[:, at]
  recall, precision = found / jnp.maximum(count, 1)[:, None], found / cut
  best = jnp.argmax(jnp.where(truth, scores, -jnp.inf), axis=1)[:, None]
  first = jnp.take_along_axis(scores, best, axis=1)
  before = (scores > first) | ((scores == first) & (jnp.arange(scores.shape[1]) < best))
  return NodeMetrics(
    recall=recall,
    precision=precision,
    f1=2 * recall * precision / jnp.where(found > 0, recall + precision, 1),
    ndcg=gain / jnp.where(some[:, None], ideal[jnp.minimum(count[:, None], cut)], 1),
    hits=(found > 0).astype("float32"),
    reciprocal_rank=jnp.where(some, 1 / (1 + jnp.sum(before, axis=1)), 0.0),
  )


def rank_nodes(
  model: LinkPredictor,
  variables: Any,
  task: Task,
  weights: Float[Array, " e"] | None = None,
  *,
  ks: tuple[int, ...] = (5, 10, 20, 50, 100),
  exclude_known: bool = True,
  block: int = 16,
) -> tuple[Int[np.ndarray, " b"], NodeMetrics]:
  """Host. Ranks all nodes for every node with a test edge: train and validation neighbours go to the bottom.

  Args:
    model: link predictor.
    variables: its, such as those of `State.best`.
    task: with a test split.
    weights: [E] of messages; None for the task's.
    ks: cutoffs.
    exclude_known: the official code has it so except on ogbl-collab.
    block: nodes ranked at once; products take block * N * H numbers.

  Returns:
    The nodes, sorted, and their metrics as NumPy arrays.
  """
  n, split = task.adjacency.shape[0], task.split
  truth = common_neighbors.adjacency(split.test, n)
  known = common_neighbors.adjacency(np.concatenate([split.train, split.validation], axis=1), n)
  nodes = np.flatnonzero(np.diff(truth.indptr))
  if block < 1 or not nodes.size:
    raise ValueError(f"block: got {block} for {nodes.size} nodes with a test edge, expected at least 1 of each")
  operator = task.operator if weights is None else task.operator.replace_values(weights)
  h = _encode(model, variables, task.graph, operator)
  parts = []
  for start in range(0, nodes.size, block):
    chosen = nodes[np.minimum(np.arange(start, start + block), nodes.size - 1)]  # the last node fills the last block
    masks = truth[chosen].toarray() > 0, (known[chosen].toarray() > 0) & exclude_known
    parts.append(jax.device_get(_rank(model, variables, h, chosen, *masks, ks=ks)))
  joined = jax.tree.map(lambda *leaves: np.concatenate(leaves)[: nodes.size], *parts)
  return nodes, joined


@functools.partial(jax.jit, static_argnums=0)
def _encode(model, variables, graph, operator):
  return model.apply(variables, graph, operator, method="encode")


@functools.partial(jax.jit, static_argnums=0, static_argnames="ks")
def _rank(model, variables, h, nodes, truth, known, *, ks):
  products = (h[nodes][:, None] * h[None]).reshape(-1, h.shape[1])
  scores = model.apply(variables, products, method="score").reshape(truth.shape)
  return node_metrics(scores, truth, known, ks=ks)
