"""Which client holds which examples: partitions of one data set, IID or by Dirichlet draws over labels.

A partition is an index table into the examples, `Clients`, so that a thousand clients cost no copy of the data. The
partitions are host code; `draw` makes a fresh table on a device.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlab import checks


class Clients(NamedTuple):
  """The data of N clients; what a learner of this room takes as its batch.

  Attributes:
    examples: arrays [E, ...] of one data set, by name.
    index: [N, M] rows of `examples`, a client's first `count` ones real, the rest 0.
    count: [N] examples of each client; 0 where it has none.
  """

  examples: dict[str, Any]
  index: Int[Any, "n m"]
  count: Int[Any, " n"]

  @property
  def num_clients(self) -> int:
    """N."""
    return self.index.shape[0]

  @property
  def capacity(self) -> int:
    """M, the size of the largest client."""
    return self.index.shape[1]


class Classes(NamedTuple):
  """The examples of each class as a padded table, for `draw`: rows [C, K] and how many are real [C]."""

  rows: Int[Any, "c k"]
  count: Int[Any, " c"]


def clients(examples: dict[str, Any], parts: list[Int[np.ndarray, " _"]], *, capacity: int | None = None) -> Clients:
  """Host. Clients from lists of rows.

  Args:
    examples: arrays [E, ...].
    parts: rows of each client.
    capacity: M; None for the size of the largest part.
  """
  if not parts:
    raise ValueError("parts: got none, expected at least one client")
  size = {checks.leading(name, array) for name, array in examples.items()}
  if len(size) != 1:
    raise ValueError(f"examples: got arrays of {sorted(size)} rows, expected one number")
  count = np.array([len(part) for part in parts], np.int32)
  most = max(1, int(count.max())) if capacity is None else checks.count("capacity", capacity)
  if count.max() > most:
    raise ValueError(f"capacity: got {most}, expected at least {count.max()}, the size of the largest part")
  index = np.zeros((len(parts), most), np.int32)
  for row, part in zip(index, parts, strict=True):
    part = np.asarray(part, np.int64)
    if len(part) and not 0 <= part.min() <= part.max() < min(size):
      raise ValueError(f"parts: got rows {part.min()} to {part.max()}, expected 0 to {min(size) - 1}")
    row[: len(part)] = part
  return Clients(examples, index, count)


def iid(
  labels: Int[np.ndarray, " e"], num_clients: int, *, holders: Bool[np.ndarray, " n"] | None = None, seed: int
) -> list[Int[np.ndarray, " _"]]:
  """Host. Every holder of data gets the same number of examples of each class; what does not divide is left out.

  Args:
    labels: of the examples, 0 to C - 1.
    num_clients: N.
    holders: which clients hold data; None for all.
    seed: of the shuffle.

  Returns:
    Rows of each client, disjoint; none for a client that holds no data.

  Raises:
    ValueError: a class with fewer examples than holders, or no holders.
  """
  labels = _check_labels(labels)
  checks.count("num_clients", num_clients)
  holds = np.ones(num_clients, bool) if holders is None else np.asarray(holders, bool)
  if holds.shape != (num_clients,) or not holds.any():
    raise ValueError(f"holders: got shape {holds.shape} with {holds.sum()} holders, expected [{num_clients}], some")
  rng, number = np.random.default_rng(seed), int(holds.sum())
  shares = []
  for rows in _by_class(labels):
    each = len(rows) // number
    if not each:
      raise ValueError(f"labels: got {len(rows)} examples of a class, expected one for each of {number} holders")
    shares.append(rng.permutation(rows)[: each * number].reshape(number, each))
  mine = iter(rng.permuted(np.concatenate(shares, axis=1), axis=1))
  return [next(mine) if h else np.zeros(0, np.int64) for h in holds]


def dirichlet(
  labels: Int[np.ndarray, " e"], num_clients: int, alpha: float, *, min_size: int = 1, seed: int
) -> list[Int[np.ndarray, " _"]]:
  """Host. Each class is cut over the clients in shares from a Dirichlet distribution; every example has one owner.

  Args:
    labels: of the examples, 0 to C - 1.
    num_clients: N.
    alpha: concentration: small for clients of few classes, large for nearly IID.
    min_size: the draw is repeated until each client has as many examples.
    seed: of the draws.

  Raises:
    ValueError: also if a thousand draws give some client too few.
  """
  labels = _check_labels(labels)
  checks.count("num_clients", num_clients)
  checks.count("min_size", min_size, 0)
  _check_alpha(alpha)
  rng = np.random.default_rng(seed)
  for _ in range(1000):
    parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for rows in _by_class(labels):
      cuts = np.cumsum(rng.dirichlet(np.full(num_clients, alpha)))[:-1] * len(rows)
      for part, share in zip(parts, np.split(rng.permutation(rows), np.rint(cuts).astype(int)), strict=True):
        part.append(share)
    whole = [rng.permutation(np.concatenate(part)) for part in parts]
    if min(map(len, whole)) >= min_size:
      return whole
  raise ValueError(f"min_size: got {min_size}, expected one that some draw of alpha {alpha} reaches")


def class_weights(num_clients: int, num_classes: int, alpha: float, *, seed: int) -> Float[np.ndarray, "n c"]:
  """Host. The share of each class in each client's stream: rows from Dirichlet(alpha, ..., alpha)."""
  checks.count("num_clients", num_clients)
  checks.count("num_classes", num_classes)
  _check_alpha(alpha)
  weights = np.random.default_rng(seed).dirichlet(np.full(num_classes, alpha), num_clients)
  return weights.astype(np.float32)


def classes(labels: Int[np.ndarray, " e"]) -> Classes:
  """Host. The table that `draw` draws from.

  Args:
    labels: of the examples, 0 to C - 1, each class with some.
  """
  groups = _by_class(_check_labels(labels))
  count = np.array([len(rows) for rows in groups], np.int32)
  if not count.all():
    raise ValueError(
      f"labels: got none of {np.flatnonzero(count == 0).tolist()}, expected each of 0 to {len(count) - 1}"
    )
  rows = np.zeros((len(groups), count.max()), np.int32)
  for row, group in zip(rows, groups, strict=True):
    row[: len(group)] = group
  return Classes(rows, count)


def draw(key: Key[Array, ""], weights: Float[Any, "n c"], table: Classes, size: int) -> Int[Array, "n size"]:
  """A fresh data set for every client: a class by the client's weights, then one of its examples, with replacement.

  Args:
    key: random.
    weights: [N, C] rows that sum to 1.
    table: the examples, from `classes`.
    size: of each client's data set.

  Returns:
    Rows of the examples, for `Clients.index`.
  """
  if weights.shape[1] != table.count.shape[0]:
    raise ValueError(f"weights: got {weights.shape[1]} classes, expected {table.count.shape[0]}, those of the table")
  first, second = jax.random.split(key)
  label = jax.random.categorical(first, jnp.log(weights)[:, None, :], shape=(weights.shape[0], size))
  count = jnp.asarray(table.count)[label]
  place = jnp.minimum((jax.random.uniform(second, label.shape) * count).astype(jnp.int32), count - 1)
  return jnp.asarray(table.rows)[label, place]


def _by_class(labels: np.ndarray) -> list[np.ndarray]:
  return [np.flatnonzero(labels == c) for c in range(labels.max() + 1)]


def _check_labels(labels: Any) -> np.ndarray:
  labels = np.asarray(labels)
  if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iu" or labels.min() < 0:
    raise ValueError(f"labels: got {labels.dtype} of shape {labels.shape}, expected class numbers [E] from 0")
  return labels


def _check_alpha(alpha: float) -> None:
  if not 0 < alpha < np.inf:
    raise ValueError(f"alpha: got {alpha}, expected a finite number above 0")
