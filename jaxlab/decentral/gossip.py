"""Who averages with whom: gossip matrices, and what they do to stacked models.

A gossip matrix W [N, N] has rows that sum to 1; client i's new model is sum_j W_ij model_j. Models are pytrees whose
leaves have a leading axis of clients. Fixed matrices are NumPy; those drawn anew each round are made on the device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxlab import checks

_MANY = 64  # models from which on a matrix product costs more than gathering a few of them


def neighbours(n: int, offsets: list[int]) -> Bool[np.ndarray, "n n"]:
  """Host. The circulant graph in which client i hears i + d (mod N) for each offset d, and itself."""
  checks.count("n", n)
  row = np.zeros(n, bool)
  row[[0, *(offset % n for offset in offsets)]] = True
  return np.stack([np.roll(row, i) for i in range(n)])


def uniform(hears: Bool[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
  """Host. Equal weights over each client's set, itself always included."""
  hears = np.asarray(hears, bool)
  if hears.ndim != 2 or hears.shape[0] != hears.shape[1]:
    raise ValueError(f"hears: got shape {hears.shape}, expected [N, N]")
  hears = hears | np.eye(len(hears), dtype=bool)
  return (hears / hears.sum(1, keepdims=True)).astype(np.float32)


def local(n: int) -> Float[np.ndarray, "n n"]:
  """Host. Nobody hears anybody."""
  return uniform(neighbours(n, []))


def left(n: int) -> Float[np.ndarray, "n n"]:
  """Host. Each hears the one before."""
  return uniform(neighbours(n, [-1]))


def ring(n: int) -> Float[np.ndarray, "n n"]:
  """Host. Each hears both neighbours on a ring."""
  return uniform(neighbours(n, [-1, 1]))


def exponential(n: int) -> Float[np.ndarray, "n n"]:
  """Host. Each hears those at distance 1, 2, 4, ... below N ahead."""
  return uniform(neighbours(n, [2**m for m in range(n.bit_length()) if 2**m < n]))


def complete(n: int) -> Float[np.ndarray, "n n"]:
  """Host. Each hears all."""
  return uniform(np.ones((n, n), bool))


def one_peer_exponential(n: int) -> Float[np.ndarray, "period n n"]:
  """Host. The matrices of rounds 0, 1, ..., period - 1, in which each hears one: at distance 2^round behind."""
  period = max(1, int(np.ceil(np.log2(checks.count("n", n)))))
  return np.stack([uniform(neighbours(n, [-(2**m)])) for m in range(period)])


def random(key: Key[Array, ""], peers: Float[Any, ""], hears: Bool[Any, "n n"]) -> Float[Array, "n n"]:
  """Each client hears itself and `peers` random others of its set, on average; drawn independently for each row.

  The whole part of `peers` is certain, one more comes with the fractional part as its probability, and a set that is
  smaller is taken whole. Rows sum to 1; columns do so only on average.

  Args:
    key: random.
    peers: r, how many others; may be traced, so that a schedule needs no new compilation.
    hears: whom each may hear; the diagonal is ignored.

  Returns:
    The gossip matrix, equal weights in each row.
  """
  n = hears.shape[0]
  first, second = jax.random.split(key)
  others = jnp.asarray(hears) & ~jnp.eye(n, dtype=bool)
  # The rank of each candidate in a random order; those that may not be heard come last.
  order = jnp.argsort(jnp.where(others, jax.random.uniform(first, (n, n)), 2.0), axis=1)
  rank = jnp.argsort(order, axis=1)
  certain = jnp.floor(peers)
  wanted = certain + jax.random.bernoulli(second, peers - certain, (n, 1))
  chosen = ((rank < wanted) & others) | jnp.eye(n, dtype=bool)
  return chosen / jnp.sum(chosen, axis=1, keepdims=True, dtype=jnp.float32)


def restrict(
  adjacency: Bool[Any, "n n"], alive: Bool[Any, " n"], weight: Float[Any, " n"] | None = None
) -> Float[Array, "n n"]:
  """The neighbourhood average among the clients that are alive.

      W_ij = a_ij weight_j / sum_k a_ik weight_k,   a = adjacency with a diagonal, rows and columns of the dead zero

  Args:
    adjacency: [N, N].
    alive: [N].
    weight: [N] of each sender, not negative; None for equal ones. A set whose weights are all zero is averaged equally.

  Returns:
    The gossip matrix; the rows of the dead are those of the identity.
  """
  n = adjacency.shape[0]
  eye = jnp.eye(n, dtype=jnp.float32)
  hears = ((adjacency != 0) | (eye > 0)) & alive[:, None] & alive[None, :]
  hears = hears.astype(jnp.float32)
  weighted = hears if weight is None else hears * weight[None, :].astype(jnp.float32)
  weighted = jnp.where(jnp.sum(weighted, axis=1, keepdims=True) > 0, weighted, hears)
  total = jnp.sum(weighted, axis=1, keepdims=True)
  return jnp.where(alive[:, None], weighted / jnp.where(total > 0, total, 1.0), eye)


def mix(matrix: Float[Any, "m n"], models: PyTree) -> PyTree:
  """sum_j W_ij model_j for every floating leaf, accumulated in float32; whole numbers are not averaged.

  Args:
    matrix: W; with M rows where M new models are made of N. With many models, rows of few entries are gathered.
    models: leaves [N, ...]. Leaves of whole numbers and keys stay as they are, which needs M = N. One that is not
      finite makes that leaf NaN for the models that have a share of it, and for no others.
  """
  w = jnp.asarray(matrix, jnp.float32)
  leaves, structure = jax.tree.flatten(models)
  floating = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
  if len(floating) < len(leaves) and w.shape[0] != w.shape[1]:
    raise ValueError(f"matrix: got {w.shape[0]} rows for {w.shape[1]} models of whole numbers, expected as many")

  def dense(w: Array, xs: list[Array]) -> list[Array]:
    return [jnp.dot(w, x, precision=jax.lax.Precision.HIGHEST) for x in xs]

  def few(count: int) -> Callable[[Array, list[Array]], list[Array]]:
    def gather(w: Array, xs: list[Array]) -> list[Array]:
      place = jax.lax.top_k(jnp.abs(w), count)[1]
      share = jnp.take_along_axis(w, place, axis=1)
      return [
        sum((share[:, k, None] * x[place[:, k]] for k in range(1, count)), share[:, :1] * x[place[:, 0]]) for x in xs
      ]

    return gather

  flat = [leaves[i].reshape(leaves[i].shape[0], -1).astype(jnp.float32) for i in floating]

  def sums(w: Array, xs: list[Array]) -> list[Array]:
    if w.shape[1] < _MANY:
      return dense(w, xs)
    entries = jnp.max(jnp.sum(w != 0, axis=1))
    branch = jnp.where(entries <= 2, 0, jnp.where(entries <= 8, 1, 2))
    return jax.lax.switch(branch, [few(2), few(8), dense], w, xs)

  # A model that has diverged reaches those that hear it alone, but a weight of 0 times infinity would be no number.
  # A product finds such models faster than a comparison of all numbers.
  sound = [jnp.isfinite(x @ jnp.full(x.shape[1], 1e-20)) for x in flat]

  def apart(w: Array, xs: list[Array]) -> list[Array]:
    new = sums(w, [jnp.where(ok[:, None], x, 0) for ok, x in zip(sound, xs, strict=True)])
    return [jnp.where(((w != 0) & ~ok).any(1)[:, None], jnp.nan, y) for ok, y in zip(sound, new, strict=True)]

  mixed = jax.lax.cond(jnp.stack(sound).all(), sums, apart, w, flat) if flat else []
  for i, new in zip(floating, mixed, strict=True):
    leaves[i] = new.reshape(w.shape[0], *leaves[i].shape[1:]).astype(leaves[i].dtype)
  return jax.tree.unflatten(structure, leaves)


def mean(models: PyTree, weight: Float[Any, " n"] | None = None) -> PyTree:
  """The average model, leaves [...]. With weights, not negative: sum_i w_i model_i / sum_i w_i, or 0 if all are 0."""
  count = jax.tree.leaves(models)[0].shape[0]
  if weight is None:
    w = jnp.full(count, 1 / count, jnp.float32)
  else:
    total = jnp.sum(weight)
    w = weight / jnp.where(total > 0, total, 1.0)
  return jax.tree.map(lambda leaf: leaf[0], mix(w[None, :], models))


def consensus(models: PyTree) -> Float[Array, ""]:
  """(1/N) sum_i |model_i - mean|^2, over all floating leaves."""
  floating = [x.astype(jnp.float32) for x in jax.tree.leaves(models) if jnp.issubdtype(x.dtype, jnp.floating)]
  terms = [jnp.sum((x - jnp.mean(x, axis=0)) ** 2) / x.shape[0] for x in floating]
  return jnp.sum(jnp.stack(terms)) if terms else jnp.zeros(())


def transfers(matrix: Float[Any, "n n"]) -> Int[Array, ""]:
  """How many models are sent for one averaging: the entries off the diagonal."""
  sent = (jnp.asarray(matrix) != 0) & ~jnp.eye(matrix.shape[0], dtype=bool)
  return jnp.sum(sent, dtype=jnp.int32)


TOPOLOGIES: dict[str, Callable[[int], Float[np.ndarray, "n n"]]] = {
  "local": local,
  "left": left,
  "ring": ring,
  "exponential": exponential,
  "complete": complete,
}
