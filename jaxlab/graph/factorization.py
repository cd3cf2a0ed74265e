"""Node embeddings by factorising a matrix of the graph: NetMF, with a randomised eigendecomposition.

    M = log max(1, vol / b * 1/T sum_{r=1..T} P^r D^-1),   P = D^-1 A,   M ~ U L U^T,   Z = U |L|^(1/2)

Qiu, Dong, Ma, Li, Wang and Tang, "Network embedding as matrix factorization: unifying DeepWalk, LINE, PTE, and
node2vec", WSDM 2018, arXiv:1710.02971: what skip-gram with windows of T steps and b negatives on random walks converges
to. M is dense, so graphs are small: N^2 floats, and T E N operations as T sparse products.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxlab import checks
from jaxlab.graph import sparse


def leading_eigenpairs(
  times: Callable[[Float[Array, "n k"]], Float[Array, "n k"]],
  start: Float[Array, "n k"],
  *,
  iterations: int,
) -> tuple[Float[Array, " k"], Float[Array, "n k"]]:
  """Eigenvalues of a symmetric matrix M and their vectors, the largest magnitudes first, by subspace iteration.

  Args:
    times: x -> M x.
    start: k random vectors, some more than are of use: the error of the j-th value falls as
      (|L_k| / |L_j|)^(2 iterations) (Halko, Martinsson and Tropp 2011, algorithm 4.4).
    iterations: of two products each.
  """

  def iterate(q: Array, _: None) -> tuple[Array, None]:
    return jnp.linalg.qr(times(jnp.linalg.qr(times(q))[0]))[0], None

  q, _ = jax.lax.scan(iterate, jnp.linalg.qr(times(start))[0], length=iterations)
  small = jnp.matmul(q.T, times(q), precision="highest")
  values, vectors = jnp.linalg.eigh((small + small.T) / 2)
  order = jnp.argsort(-jnp.abs(values), stable=True)
  return values[order], jnp.matmul(q, vectors[:, order], precision="highest")


def netmf(
  operator: sparse.Operator,
  key: PRNGKeyArray,
  *,
  dim: int,
  window: int = 5,
  negatives: float = 1.0,
  oversample: int = 8,
  iterations: int = 3,
) -> Float[Array, "n dim"]:
  """Embeds every node of a small undirected graph.

  M is symmetric, so its singular vectors are eigenvectors, found by subspace iteration (Halko, Martinsson and Tropp,
  2011) from a Gaussian start. Each column's sign makes its largest entry positive. A node without edges has zeros, so
  that padding nodes do not matter, nor do padding entries of value 0.

  Args:
    operator: A [N, N], symmetric, weights >= 0.
    key: of the start; its rows do not depend on N.
    dim: columns, largest |L| first. Those beyond N are zero.
    window: T.
    negatives: b.
    oversample: further columns that are computed, for accuracy.
    iterations: of the subspace; each is two products with M.

  Returns:
    [N, dim] in the dtype of the operator's values; computed in float32 at least.

  Raises:
    ValueError: an argument out of range; weights that are negative or not symmetric are seen on the host only.
  """
  _check(operator, dim, window, negatives, oversample, iterations)
  n = operator.shape[0]
  a = operator.replace_values(operator.values.astype(jnp.promote_types(operator.dtype, "float32")))
  degree = sparse.propagate(a, jnp.ones(n, a.dtype))
  inverse = jnp.where(degree > 0, 1 / jnp.where(degree > 0, degree, 1), 0)
  p = a.replace_values(a.values * inverse[a.rows])
  identity = jnp.eye(n, dtype=a.dtype)
  walks = sparse.propagate(p, identity)
  for _ in range(window - 1):  # Horner: P + P^2 + ... = P (I + P (I + ...))
    walks = sparse.propagate(p, identity + walks)
  m = jnp.log(jnp.maximum(degree.sum() / (negatives * window) * walks * inverse, 1))
  m = (m + m.T) / 2  # symmetric but for rounding

  rank = min(n, dim + oversample)
  start = jax.random.normal(key, (n, dim + oversample), a.dtype)[:, :rank]
  values, vectors = leading_eigenpairs(lambda x: jnp.matmul(m, x, precision="highest"), start, iterations=iterations)
  z = vectors[:, :dim]
  largest = jnp.take_along_axis(z, jnp.abs(z).argmax(axis=0)[None], axis=0)
  z = jnp.where(largest < 0, -z, z) * jnp.sqrt(jnp.abs(values[:dim]))
  z = jnp.where(degree[:, None] > 0, z, 0)
  return jnp.pad(z, ((0, 0), (0, max(0, dim - rank)))).astype(operator.dtype)


def _check(operator, dim, window, negatives, oversample, iterations):
  if not isinstance(operator, sparse.Operator):
    raise ValueError(f"operator: got a {type(operator).__name__}, expected a sparse.Operator; see sparse.from_scipy")
  if operator.shape[0] != operator.shape[1] or not operator.shape[0]:
    raise ValueError(f"operator: got shape {operator.shape}, expected a square one with nodes")
  for name, value, least in (
    ("dim", dim, 1),
    ("window", window, 1),
    ("oversample", oversample, 0),
    ("iterations", iterations, 0),
  ):
    checks.count(name, value, least)
  if not isinstance(negatives, jax.core.Tracer) and not negatives > 0:
    raise ValueError(f"negatives: got {negatives}, expected a number above 0")
  if isinstance(operator.values, jax.core.Tracer):
    return
  values, order = np.asarray(operator.values), np.asarray(operator.transpose_order)
  if (values < 0).any():
    raise ValueError("operator: got negative weights, expected none, or degrees would not be degrees")
  rows, columns = np.asarray(operator.rows), np.asarray(operator.columns)
  if (rows[order] != columns).any() or (columns[order] != rows).any() or (values[order] != values).any():
    raise ValueError("operator: got another matrix than its transpose, expected a symmetric one")
