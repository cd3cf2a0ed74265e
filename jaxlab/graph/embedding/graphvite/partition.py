"""Nodes dealt to partitions, blocks to workers, negatives to blocks. Host."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxlab import checks
from jaxlab.graph.embedding.graphvite import _kernels


class Partition(NamedTuple):
  """Where each node is kept.

  Attributes:
    place: [N, 2] int32: part, and row within the part.
    sizes: [P] nodes of each part; parts are padded to n = max(sizes) rows.
  """

  place: Int[np.ndarray, "N 2"]
  sizes: Int[np.ndarray, " P"]


class Negatives(NamedTuple):
  """Alias tables of the distribution of negatives in each part, proportional to degree^0.75.

  Attributes:
    accept: [P, n] float32, probability to keep a row that was drawn uniformly.
    alias: [P, n] int32, the row to take otherwise.
  """

  accept: Float[np.ndarray, "P n"]
  alias: Int[np.ndarray, "P n"]


def zigzag(degree: Float[np.ndarray, " N"], num_parts: int) -> Partition:
  """Deals nodes out by falling degree: rank r goes to part min(q, 2P - 1 - q), q = r mod 2P.

  Sizes differ by at most one, and sums of degrees little. The first rows of a part are its largest degrees.

  Args:
    degree: of each node.
    num_parts: P, in [1, N].

  Raises:
    ValueError: an argument out of range.
  """
  degree = np.asarray(degree)
  if degree.ndim != 1:
    raise ValueError(f"degree: got shape {degree.shape}, expected [N]")
  checks.count("num_parts", num_parts, 1)
  if num_parts > len(degree):
    raise ValueError(f"num_parts: got {num_parts}, expected at most {len(degree)}, the number of nodes")
  rank = np.empty(len(degree), np.int64)
  rank[np.argsort(-degree, kind="stable")] = np.arange(len(degree))
  turn, q = np.divmod(rank, 2 * num_parts)
  place = np.stack([np.minimum(q, 2 * num_parts - 1 - q), 2 * turn + (q >= num_parts)], axis=1)
  return Partition(place.astype(np.int32), np.bincount(place[:, 0], minlength=num_parts))


def schedule(num_parts: int, num_workers: int) -> Int[np.ndarray, "steps W 2"]:
  """The (head part, tail part) of each worker at each step of an episode.

  At a step all heads differ and all tails differ, so that workers share no row of either matrix; over the steps every
  block comes once. A worker keeps its tail part for as many steps as there are workers.

  Args:
    num_parts: P, a multiple of W.
    num_workers: W.

  Returns:
    [P^2 / W, W, 2].

  Source: `get_schedule` of the official code.
  """
  checks.count("num_workers", num_workers, 1)
  checks.count("num_parts", num_parts, 1)
  if num_parts % num_workers:
    raise ValueError(f"num_parts: got {num_parts}, expected a multiple of num_workers, {num_workers}")
  groups, i = range(0, num_parts, num_workers), np.arange(num_workers)
  steps = [
    np.stack([x + (i + offset) % num_workers, y + i], axis=1)
    for x in groups
    for y in groups
    for offset in range(num_workers)
  ]
  return np.stack(steps)


def negatives(degree: Float[np.ndarray, " N"], partition: Partition, exponent: float = 0.75) -> Negatives:
  """Tables to draw negatives within each part, proportional to degree^exponent.

  Raises:
    ValueError: a part of nodes without edges.
  """
  weights = to_blocks(np.asarray(degree, np.float64)[:, None] ** exponent * (degree > 0)[:, None], partition)[..., 0]
  if not (weights.sum(axis=1) > 0).all():
    raise ValueError(f"num_parts: got {len(weights)}, expected few enough for each part to have nodes with edges")
  parts, rows = weights.shape
  accept, alias = _kernels.alias_tables(weights.reshape(-1), np.arange(parts + 1) * rows)
  return Negatives(accept.reshape(parts, rows), alias.reshape(parts, rows))


def to_blocks(x: Float[np.ndarray, "N d"], partition: Partition) -> Float[np.ndarray, "P n d"]:
  """Rows of nodes as rows of parts; padding is zero."""
  blocks = np.zeros((len(partition.sizes), partition.sizes.max(), *x.shape[1:]), x.dtype)
  blocks[partition.place[:, 0], partition.place[:, 1]] = x
  return blocks


def from_blocks(blocks: Float[np.ndarray, "P n d"], partition: Partition) -> Float[np.ndarray, "N d"]:
  """Inverse of `to_blocks`."""
  rows = partition.place[:, 0] * np.int64(blocks.shape[1]) + partition.place[:, 1]
  return np.take(blocks.reshape(-1, *blocks.shape[2:]), rows, axis=0)
