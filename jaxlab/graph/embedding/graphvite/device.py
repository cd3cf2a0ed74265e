"""Training of blocks in JAX: micro-batches within a block, workers on a mesh axis."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxlab.graph.embedding.graphvite.partition import Negatives

_WORKERS = "workers"


class State(NamedTuple):
  """Both matrices by parts: [P, n, d], or [n, d] of one part each."""

  vertex: Float[Array, "*P n d"]
  context: Float[Array, "*P n d"]


class Objective(NamedTuple):
  """Constants of the loss and its descent; see `embedding.Training`."""

  num_negatives: int = 1
  negative_weight: float = 5.0
  weight_decay: float = 0.005


def train_samples(
  state: State,
  pairs: Int[Array, "Q 2"],
  negatives: Int[Array, "Q K"],
  rates: Float[Array, " M"],
  *,
  negative_weight: float = 5.0,
  weight_decay: float = 0.005,
) -> tuple[State, Float[Array, ""]]:
  """Trains one block on given samples, M micro-batches of Q / M one after the other.

  A micro-batch descends as `embedding.train_samples` does for one sample, with the rows as they were before it: with
  M = Q both agree. Updates of one row add up. Sums are in float32 (float64 for float64), whatever the matrices' dtype.

  Args:
    state: rows of the head part and the tail part.
    pairs: (head, tail), rows of `state.vertex` and `state.context`.
    negatives: rows of `state.context`.
    rates: learning rate of each micro-batch.
    negative_weight: of a negative pair, loss and decay.
    weight_decay: of rows in use.

  Returns:
    The new state, and the mean loss.
  """
  _check(state, pairs)
  count, batches = len(pairs), rates.shape[0] if rates.ndim == 1 else 0
  if negatives.ndim != 2 or len(negatives) != count:
    raise ValueError(f"negatives: got shape {negatives.shape}, expected [{count}, K], a row for each sample")
  if not batches or count % batches:
    raise ValueError(f"rates: got shape {rates.shape}, expected [M], M a divisor of {count}, the number of samples")

  def step(state, batch):
    pairs, negatives, rate = batch
    return _descend(state, pairs, negatives, rate, jnp.ones(len(pairs)), negative_weight, weight_decay)

  split = (batches, count // batches, -1)
  state, losses = jax.lax.scan(step, state, (pairs.reshape(split), negatives.reshape(split), rates))
  return state, losses.sum() / count


def train_block(
  state: State,
  pairs: Int[Array, "Q 2"],
  negatives: Negatives,
  key: PRNGKeyArray,
  rates: Float[Array, " M"],
  objective: Objective = Objective(),
) -> tuple[State, Float[Array, ""]]:
  """As `train_samples`, with negatives drawn from the tail part; the last of M micro-batches may be short.

  Args:
    state: rows of the head part and the tail part, [n, d] each.
    pairs: (head, tail).
    negatives: [n] tables of the tail part.
    key: of the negatives.
    rates: learning rate of each micro-batch.
    objective: constants.
  """
  _check(state, pairs)
  count, batches = len(pairs), len(rates)
  size = -(-count // batches)
  padded = jnp.pad(pairs, ((0, batches * size - count), (0, 0))).reshape(batches, size, 2)

  def step(state, batch):
    pairs, rate, number = batch
    which, keep = jax.random.split(jax.random.fold_in(key, number))
    shape = (size, objective.num_negatives)
    row = jax.random.randint(which, shape, 0, len(negatives.accept))
    row = jnp.where(jax.random.uniform(keep, shape) < negatives.accept[row], row, negatives.alias[row])
    mask = (number * size + jnp.arange(size) < count).astype("float32")
    return _descend(state, pairs, row, rate, mask, objective.negative_weight, objective.weight_decay)

  state, losses = jax.lax.scan(step, state, (padded, rates, jnp.arange(batches)))
  return state, losses.sum() / count


def _descend(state, pairs, negatives, rate, mask, negative_weight, weight_decay):
  """One micro-batch; the sum of its losses. Negatives come first, and see v as updates left it."""
  wide = jnp.promote_types(state.vertex.dtype, "float32")
  vertex, context = state
  heads, tails = pairs[:, 0], pairs[:, 1]
  rate = (rate * mask)[:, None].astype(wide)
  before = v = vertex[heads].astype(wide)
  loss = 0.0
  for rows, label, weight in [(row, 0.0, negative_weight) for row in negatives.T] + [(tails, 1.0, 1.0)]:
    c = context[rows].astype(wide)
    logit = jnp.sum(v * c, axis=1, keepdims=True)
    error = jax.nn.sigmoid(logit) - label
    dv = weight * (error * c + weight_decay * v)
    dc = weight * (error * v + weight_decay * c)
    v -= rate * dv
    context = context.at[rows].add((-rate * dc).astype(context.dtype))
    loss += weight * jax.nn.softplus(-logit if label else logit)[:, 0]
  vertex = vertex.at[heads].add((v - before).astype(vertex.dtype))
  return State(vertex, context), jnp.sum(loss * mask) / (1 + negatives.shape[1] * negative_weight)


@functools.partial(jax.jit, static_argnames=("micro_batch", "batch_size", "objective", "mesh"), donate_argnames="state")
def train_pool(
  state: State,
  pool: Int[Array, "G W P Q 2"],
  negatives: Negatives,
  key: PRNGKeyArray,
  first: Float[Array, ""],
  total: Float[Array, ""],
  learning_rate: Float[Array, ""],
  *,
  micro_batch: int,
  batch_size: int = 100_000,
  objective: Objective = Objective(),
  mesh: Mesh | None = None,
) -> tuple[State, Float[Array, ""]]:
  """One episode: every block of the pool, W of them at a time that share no rows.

  The parts are G groups of W, [G, W, ...] = [P, ...] reshaped. Worker i holds tail parts [:, i] for good; head parts
  go round: after each block a worker hands its head part to worker i - 1, so that after W blocks all are back. Workers
  are devices of `mesh`, over which the second axis should be split, or a mapped axis of one device.

  Args:
    state: [G, W, n, d] each. Donated.
    pool: as of `sampling.pool`, by tail part [G, W] and head part [P].
    negatives: [G, W, n] tables.
    key: of the negatives; a block's draws depend on it and on the block alone.
    first: samples trained before this episode.
    total: samples to train in all, for the schedule of learning rates.
    learning_rate: at the start.
    micro_batch: B, samples whose updates add up.
    batch_size: samples with the same learning rate.
    objective: constants.
    mesh: of one axis and W devices.

  Returns:
    The new state, and the mean loss.
  """
  if pool.ndim != 5 or pool.shape[2] != pool.shape[0] * pool.shape[1]:
    raise ValueError(f"pool: got shape {pool.shape}, expected [G, W, G W, Q, 2]")
  groups, num_workers, parts, count = pool.shape[:4]
  for name, x in state._asdict().items():
    if x.ndim != 4 or x.shape[:2] != (groups, num_workers):
      raise ValueError(f"{name}: got shape {x.shape}, expected [{groups}, {num_workers}, n, d], as the pool's parts")
  if mesh is not None and (len(mesh.axis_names) != 1 or mesh.size != num_workers):
    raise ValueError(f"mesh: got {dict(mesh.shape)}, expected one axis of {num_workers} devices, as many as workers")
  batches = -(-count // micro_batch)
  axis = _WORKERS if mesh is None else mesh.axis_names[0]
  round_trip = [((j + 1) % num_workers, j) for j in range(num_workers)]

  def schedule(number):
    done = jnp.floor(number / batch_size) * batch_size / total
    return learning_rate * jnp.maximum(1 - done, 1e-4)

  def worker(state, pool, negatives):
    # [G, ...] arrays of this worker's parts.
    i = jax.lax.axis_index(axis)

    def train_and_pass(carry, step):
      (head, tail), y = carry
      x, offset, number = step
      part = x * num_workers + (i + offset) % num_workers
      start = first + number.astype("float32") * num_workers * count + i  # workers' samples interleave
      rates = schedule(start + num_workers * micro_batch * jnp.arange(batches))
      tables = Negatives(negatives.accept[y], negatives.alias[y])
      block = jax.random.fold_in(key, (y * num_workers + i) * parts + part)
      (head, tail), loss = train_block(State(head, tail), pool[y, part], tables, block, rates, objective)
      return ((jax.lax.ppermute(head, axis, round_trip), tail), y), loss

    def pair_groups(state, group):
      x, y, number = group
      offsets = jnp.arange(num_workers)
      steps = jnp.full(num_workers, x), offsets, number + offsets
      ((head, tail), _), losses = jax.lax.scan(train_and_pass, ((state.vertex[x], state.context[y]), y), steps)
      return State(state.vertex.at[x].set(head), state.context.at[y].set(tail)), losses.mean()

    x, y = jnp.divmod(jnp.arange(groups**2), groups)
    state, losses = jax.lax.scan(pair_groups, state, (x, y, num_workers * jnp.arange(groups**2)))
    return state, losses.mean()[None]

  if mesh is None:
    run = jax.vmap(worker, in_axes=1, out_axes=(1, 0), axis_name=axis)
  else:
    held = PartitionSpec(None, axis)

    def on_device(*arrays):
      state, loss = worker(*jax.tree.map(lambda a: a[:, 0], arrays))
      return jax.tree.map(lambda a: a[:, None], state), loss

    run = jax.shard_map(on_device, mesh=mesh, in_specs=held, out_specs=(held, PartitionSpec(axis)), check_vma=False)
  state, losses = run(state, pool, negatives)
  return state, losses.mean()


def largest_micro_batch(degree: Float[np.ndarray, " N"], num_parts: int, num_negatives: int = 1) -> int:
  """B at which the row in most demand gets 16 updates in a micro-batch, at most an eighth of a part's rows.

  Updates of one row are computed from the same values and add up; beyond about 20 of them training diverges.
  """
  noise = np.where(degree > 0, degree, 1) ** 0.75 * (degree > 0)
  share = degree.max() / degree.sum() + num_negatives * noise.max() / noise.sum()
  return max(1, min(int(16 / (num_parts * share)), len(degree) // (8 * num_parts)))


def _check(state, pairs):
  for name, x in state._asdict().items():
    if x.ndim != 2 or x.shape[1] != state.vertex.shape[-1]:
      raise ValueError(f"{name}: got shape {x.shape}, expected [n, d], d as of vertex {state.vertex.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name}: got dtype {x.dtype}, expected a floating one")
  if pairs.ndim != 2 or pairs.shape[1] != 2:
    raise ValueError(f"pairs: got shape {pairs.shape}, expected [Q, 2]")
