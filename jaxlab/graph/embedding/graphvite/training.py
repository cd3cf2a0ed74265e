"""Embeddings of a graph: episodes of sampling and training, one ahead of the other."""

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxlab import checks
from jaxlab.graph.embedding.graphvite import _kernels, device, partition
from jaxlab.graph.embedding.graphvite.sampling import Graph, Sampling, pool
from jaxlab.graph.embedding.graphvite.sampling import graph as prepare

Backend = Literal["host", "device"]
T = TypeVar("T")

_EPISODE = 20_000_000  # samples of an episode at most, or as many as 16 for each node
_EPISODES = 30  # at least, so that each block is trained at many learning rates, and sampling runs ahead
_CACHE = 8 * 2**20  # bytes that the two parts of a block should fit in
_PARTS, _ROWS = 4, 64  # parts that the host makes at least, if they have as many rows


@dataclasses.dataclass(frozen=True)
class Training:
  """How pairs are trained on.

  Attributes:
    epochs: passes of as many samples as there are edges. Too few are worse than none: see the experiment.
    learning_rate: at the start; falls linearly, to no less than a 10^-4 of it.
    num_negatives: K, negative pairs for each positive one.
    negative_weight: of a negative pair, in loss and decay.
    weight_decay: of the rows in use.
    negative_exponent: negatives are drawn proportional to degree to this power.
    batch_size: samples with the same learning rate.
    num_workers: W, blocks trained at once. None: P ("host"), or as many as devices of the mesh ("device").
    num_parts: P, a multiple of W. None: W ("device"); 4, or more for blocks that fit in the cache ("host").
    block_samples: Q, samples of a block in an episode (the official episode_size * batch_size), a multiple of the
      shuffle base. None: the samples to train in at least 30 episodes of at most 2 * 10^7, or 16 N, samples.
    micro_batch: B, samples whose updates are computed together ("device"); None: see `device.largest_micro_batch`.
  """

  epochs: float = 2000
  learning_rate: float = 0.025
  num_negatives: int = 1
  negative_weight: float = 5.0
  weight_decay: float = 0.005
  negative_exponent: float = 0.75
  batch_size: int = 100_000
  num_workers: int | None = None
  num_parts: int | None = None
  block_samples: int | None = None
  micro_batch: int | None = None

  def __post_init__(self) -> None:
    for name, low in (("num_negatives", 1), ("batch_size", 1)):
      checks.count(name, getattr(self, name), low)
    for name in ("num_workers", "num_parts", "block_samples", "micro_batch"):
      if getattr(self, name) is not None:
        checks.count(name, getattr(self, name), 1)
    for name, low in (("epochs", False), ("learning_rate", False), ("negative_weight", True), ("weight_decay", True)):
      value = getattr(self, name)
      if not (0 <= value < math.inf and (low or value > 0)):
        raise ValueError(f"{name}: got {value}, expected a number {'of at least' if low else 'above'} 0")


class Embedding(NamedTuple):
  """What `embed` learns.

  Attributes:
    vertex: [N, d], V: the embedding, and the heads of pairs.
    context: [N, d], C: the tails of pairs; those of a link score as vertex[h] . context[t].
    loss: [episodes] mean over some or all samples of each.
  """

  vertex: Float[np.ndarray, "N d"]
  context: Float[np.ndarray, "N d"]
  loss: Float[np.ndarray, " episodes"]


def embed(
  edges: Int[np.ndarray, "2 E"],
  num_nodes: int,
  dim: int,
  key: PRNGKeyArray,
  sampling: Sampling = Sampling(),
  training: Training = Training(),
  *,
  weights: Float[np.ndarray, " E"] | None = None,
  directed: bool = False,
  normalize: bool = False,
  backend: Backend | None = None,
  mesh: Mesh | None = None,
  threads: int | None = None,
  on_episode: Callable[[int, int, float], Any] | None = None,
) -> Embedding:
  """Host. Embeds the nodes of a graph; a pure function of its arguments.

  Walks of the next episode are drawn by threads while this one is trained.

  Args:
    edges: [2, E]; an undirected edge is given once.
    num_nodes: N.
    dim: d, columns of the embedding.
    key: the randomness.
    sampling: how positive pairs are drawn.
    training: how they are trained on.
    weights: [E] positive weights of edges; None: 1.
    directed: walk edges from row 0 to row 1 only.
    normalize: divide each weight by the square root of the product of both degrees.
    backend: "host": threads, each of which trains a block's samples one by one; "device": JAX, micro-batches, W workers
      on `mesh` or on one device. None: "host" where JAX computes on CPU and no mesh is given.
    mesh: devices for "device", one axis.
    threads: to draw and, on the host, to train with (W at most); None: as many as cores. Results do not depend on it.
    on_episode: called with (episodes done, episodes in all, loss) after each.

  Returns:
    Both matrices, float32. Nodes without edges keep what they started with: U(-1/2d, 1/2d), and 0.

  Raises:
    ValueError: an argument out of range, or parts that no walk joins (fewer `num_parts` help).
    FloatingPointError: the loss is not finite.
  """
  if backend is None:
    backend = "host" if jax.default_backend() == "cpu" and mesh is None else "device"
  checks.choice("backend", backend, Backend)
  if mesh is not None and backend == "host":
    raise ValueError("mesh: got one, expected none for the host backend")
  checks.count("dim", dim, 1)
  threads = checks.threads(threads)
  graph = prepare(edges, num_nodes, weights, directed=directed, normalize=normalize)
  sampling = sampling.resolve(num_nodes, graph.num_edges)
  plan = _plan(graph, dim, sampling, training, backend, mesh)
  parts = partition.zigzag(graph.degree, plan.num_parts)
  tables = partition.negatives(graph.degree, parts, training.negative_exponent)
  # Threefry on CPU would take longer for a large start than short training does.
  key_start, key_walks, key_negatives = jax.random.split(key, 3)
  start = np.random.default_rng(_seed(key_start)).random((num_nodes, dim), np.float32)
  vertex = partition.to_blocks((start - np.float32(0.5)) / dim, parts)
  state: Any = vertex, np.zeros_like(vertex)

  def draw(episode: int) -> np.ndarray:
    seed = _seed(jax.random.fold_in(key_walks, episode))
    return pool(graph, parts, plan.block_samples, seed, sampling, threads=threads)

  trainer = _host_trainer if backend == "host" else _device_trainer
  train = trainer(plan, training, tables, key_negatives, mesh, threads)
  losses = []
  for episode, samples in enumerate(_ahead(draw, plan.episodes)):
    state, loss = train(state, samples, episode)
    if not math.isfinite(loss):
      raise FloatingPointError(f"the loss became {loss} in episode {episode + 1}; learning_rate or micro_batch is high")
    losses.append(loss)
    if on_episode is not None:
      on_episode(episode + 1, plan.episodes, loss)
  vertex, context = (partition.from_blocks(np.asarray(x).reshape(plan.num_parts, -1, dim), parts) for x in state)
  return Embedding(vertex, context, np.array(losses, np.float32))


def link_scores(embedding: Embedding, pairs: Int[np.ndarray, "2 M"]) -> Float[np.ndarray, " M"]:
  """Host. V[h] . C[t] of each pair (h, t): the logit of a link."""
  heads, tails = pairs
  return np.einsum("md,md->m", embedding.vertex[heads], embedding.context[tails])


def train_samples(
  vertex: Float[np.ndarray, "n d"],
  context: Float[np.ndarray, "m d"],
  pairs: Int[np.ndarray, "Q 2"],
  negatives: Int[np.ndarray, "Q K"],
  learning_rate: float,
  *,
  negative_weight: float = 5.0,
  weight_decay: float = 0.005,
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "m d"], float]:
  """Host. Trains on given samples one after the other: the definition of the method.

  For each sample (h, t), for u in its negatives and then u = t, with y = 0 or 1 and w = `negative_weight` or 1:

      p = sigmoid(V[h] . C[u]),   V[h] -= lr w ((p - y) C[u] + decay V[h]),   C[u] -= lr w ((p - y) V[h] + decay C[u])

  where both right sides hold the values before the update.

  Args:
    vertex: V, float32 or float64.
    context: C, of the same dtype.
    pairs: (h, t).
    negatives: K rows of C for each sample.
    learning_rate: lr.
    negative_weight: w of negatives.
    weight_decay: of rows in use.

  Returns:
    New V and C, and the mean of (-log p_t - w sum_k log(1 - p_k)) / (1 + K w).
  """
  vertex, context, pairs, negatives = map(np.asarray, (vertex, context, pairs, negatives))
  for name, x in (("vertex", vertex), ("context", context)):
    if x.ndim != 2 or x.shape[1] != vertex.shape[-1]:
      raise ValueError(f"{name}: got shape {x.shape}, expected [n, d], d as of vertex {vertex.shape}")
    if x.dtype not in (np.float32, np.float64) or x.dtype != vertex.dtype:
      raise ValueError(f"{name}: got dtype {x.dtype}, expected float32 or float64, as vertex")
  if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
    raise ValueError(f"pairs: got shape {pairs.shape}, expected [Q, 2], Q at least 1")
  if negatives.ndim != 2 or len(negatives) != len(pairs):
    raise ValueError(f"negatives: got shape {negatives.shape}, expected [{len(pairs)}, K], a row for each sample")
  for name, rows, limit in (
    ("pairs", pairs[:, 0], len(vertex)),
    ("pairs", pairs[:, 1], len(context)),
    ("negatives", negatives, len(context)),
  ):
    if rows.size and (rows.min() < 0 or rows.max() >= limit):
      raise ValueError(f"{name}: got rows {rows.min()} to {rows.max()}, expected [0, {limit})")
  vertex, context = np.array(vertex, order="C"), np.array(context, order="C")
  indices = pairs.astype(np.int32), negatives.astype(np.int32)
  loss = _kernels.train(vertex, context, *indices, learning_rate, negative_weight, weight_decay, True)
  return vertex, context, loss / len(pairs)


# ----------------------------------------------------------------------------------------------------------- episodes


class _Plan(NamedTuple):
  num_workers: int
  num_parts: int
  block_samples: int
  micro_batch: int
  episodes: int
  total: float  # samples to train, without what rounding adds


def _plan(graph: Graph, dim: int, sampling: Sampling, training: Training, backend: Backend, mesh: Mesh | None) -> _Plan:
  """Sizes, with defaults where the caller left them open."""
  nodes, base = len(graph.degree), sampling.shuffle_base
  assert base is not None
  total = training.epochs * graph.num_edges
  episode = min(math.ceil(total / _EPISODES), max(_EPISODE, 16 * nodes))
  workers, parts = training.num_workers, training.num_parts
  if mesh is not None:
    workers = mesh.size if workers is None else workers
    if len(mesh.axis_names) != 1 or mesh.size != workers:
      raise ValueError(f"mesh: got {dict(mesh.shape)}, expected one axis of {workers} devices, as many as workers")
  if parts is None and backend == "host":
    # Parts that fit in the cache, but not so many that a block's samples would use each row only once or twice.
    fit = math.ceil(2 * nodes * dim * 4 / _CACHE)
    parts = min(max(_PARTS, min(fit, episode // (4 * nodes))), max(1, nodes // _ROWS))
    parts = math.ceil(parts / (workers or 1)) * (workers or 1)
  elif parts is None:
    parts = workers or 1
  if workers is None:
    workers = parts if backend == "host" else 1
  if parts % workers:
    raise ValueError(f"num_parts: got {parts}, expected a multiple of num_workers, {workers}")
  block = training.block_samples
  if block is None:
    episodes = math.ceil(total / episode)
    block = base * math.ceil(total / (episodes * parts**2 * base))
  episodes = max(1, math.ceil(total / (block * parts**2)))
  micro = training.micro_batch
  if micro is None:
    micro = device.largest_micro_batch(graph.degree, parts, training.num_negatives)
  return _Plan(workers, parts, block, min(micro, block), episodes, total)


def _ahead(make: Callable[[int], T], count: int) -> Iterator[T]:
  """make(0), ..., make(count - 1), each made by a thread while the one before is in use."""
  with concurrent.futures.ThreadPoolExecutor(1) as executor:
    following = executor.submit(make, 0)
    for number in range(count):
      result = following.result()
      if number + 1 < count:
        following = executor.submit(make, number + 1)
      yield result


def _host_trainer(plan, training, tables, key, mesh, threads):
  """Blocks of a step on threads; they share no rows, so neither locks nor luck are involved."""
  steps = partition.schedule(plan.num_parts, plan.num_workers)

  def train(state, samples, episode):
    vertex, context = state  # owned by `embed`, changed in place
    seeds = np.random.SeedSequence(_seed(jax.random.fold_in(key, episode))).generate_state(plan.num_parts**2, np.uint64)
    first = episode * plan.num_parts**2 * plan.block_samples

    def block(step, worker):
      head, tail = steps[step, worker]
      return _kernels.train_block(
        vertex[head],
        context[tail],
        samples[tail, head],
        tables.accept[tail],
        tables.alias[tail],
        seeds[tail * plan.num_parts + head],
        training.num_negatives,
        training.learning_rate,
        first + step * plan.num_workers * plan.block_samples + worker,
        plan.num_workers,
        training.batch_size,
        plan.total,
        training.negative_weight,
        training.weight_decay,
      )

    with concurrent.futures.ThreadPoolExecutor(min(threads, plan.num_workers)) as executor:
      sums = [
        one
        for step in range(len(steps))
        for one in executor.map(block, [step] * plan.num_workers, range(plan.num_workers))
      ]
    loss, measured = np.sum(sums, axis=0)
    return state, float(loss / measured)

  return train


def _device_trainer(plan, training, tables, key, mesh, threads):
  """Episodes of `device.train_pool`."""
  objective = device.Objective(training.num_negatives, training.negative_weight, training.weight_decay)
  split = None if mesh is None else NamedSharding(mesh, PartitionSpec(None, mesh.axis_names[0]))

  def place(x):
    # By groups of as many parts as workers; what was placed before stays where it is.
    return jax.device_put(x if isinstance(x, jax.Array) else x.reshape(-1, plan.num_workers, *x.shape[1:]), split)

  tables = jax.tree.map(place, tables)
  scalar = lambda x: jnp.asarray(x, jnp.float32)

  def train(state, samples, episode):
    state, loss = device.train_pool(
      device.State(*map(place, state)),
      place(samples),
      tables,
      jax.random.fold_in(key, episode),
      scalar(episode * plan.num_parts**2 * plan.block_samples),
      scalar(plan.total),
      scalar(training.learning_rate),
      micro_batch=plan.micro_batch,
      batch_size=training.batch_size,
      objective=objective,
      mesh=mesh,
    )
    return state, float(loss)

  return train


def _seed(key: Array) -> int:
  """A whole number from a key."""
  high, low = (int(x) for x in jax.random.bits(key, (2,), "uint32"))
  return (high << 32) | low
