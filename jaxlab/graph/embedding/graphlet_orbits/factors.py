"""From co-occurrence to vectors: positive mutual information and its rank-k factor. Also that of random walks."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Float, Num, PRNGKeyArray

from jaxlab import checks
from jaxlab.graph import factorization, sparse


def ppmi(matrix: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
  """Host. Positive pointwise mutual information max(0, log(M_ij sum(M) / (r_i r_j))) of M, with row sums r.

  A matrix that is not symmetric, as of two different orbits, is added to its transpose first. Zeros stay zeros.

  Args:
    matrix: [N, N], entries >= 0.

  Returns:
    [N, N] float32, symmetric; computed in float64.

  Raises:
    ValueError: not square, or entries that are negative or not finite.
  """
  if not scipy.sparse.issparse(matrix) or matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
    raise ValueError(f"matrix: got a {type(matrix).__name__} of {np.shape(matrix)}, expected a sparse [N, N]")
  m = scipy.sparse.csr_array(matrix, dtype=np.float64)
  if not (np.isfinite(m.data).all() and (m.data >= 0).all()):
    raise ValueError("matrix: got entries below 0 or not finite, expected counts")
  m.eliminate_zeros()
  difference = abs(m - m.T)
  if difference.nnz and difference.max() > 1e-9 * m.max():
    m = m + m.T
  m = scipy.sparse.coo_array(m)
  sums = m.sum(axis=1)
  rows, columns = m.coords
  # The logarithm of each factor, as their product may leave the range.
  information = np.log(m.data) + np.log(max(sums.sum(), 1)) - np.log(sums[rows]) - np.log(sums[columns])
  kept = information > 0
  values = information[kept].astype(np.float32)
  return scipy.sparse.csr_array((values, (rows[kept], columns[kept])), shape=m.shape)


def device_ppmi(matrix: Num[Array, "n n"]) -> Float[Array, "n n"]:
  """`ppmi` of a dense matrix, in float32, for counts that float32 holds: below 2^24 exactly, above to seven digits.

  Raises:
    ValueError: not square.
  """
  if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
    raise ValueError(f"matrix: got shape {matrix.shape}, expected [N, N]")
  m = matrix.astype("float32")
  m = m + m.T  # twice a symmetric one, whose information is the same
  sums = m.sum(1)
  log = lambda x: jnp.log(jnp.where(x > 0, x, 1))
  return jnp.where(m > 0, jax.nn.relu(log(m) + log(sums.sum()) - log(sums)[:, None] - log(sums)), 0)


def walk_adjacency(graph: scipy.sparse.csr_array, steps: int) -> scipy.sparse.csr_array:
  """Host. How often long random walks see two nodes within a window: sum_{k=1..steps} D (D^-1 A)^k, in float64.

  `ppmi` of it is what DeepWalk factorises (Qiu et al., "Network embedding as matrix factorization", WSDM 2018,
  arXiv:1710.02971, up to a factor of the number of negative samples).

  Args:
    graph: [N, N] A.
    steps: the window, at least 1.

  Raises:
    ValueError: steps out of range.
  """
  steps = checks.count("steps", steps, 1)
  a = scipy.sparse.csr_array(graph, dtype=np.float64)
  degree = a.sum(axis=1)
  transition = scipy.sparse.diags_array(np.divide(1, degree, out=np.zeros_like(degree), where=degree > 0)) @ a
  total = power = a
  for _ in range(steps - 1):
    power = power @ transition
    total = total + power
  return scipy.sparse.csr_array(total)


def embed(
  matrix: sparse.Operator | Float[Array, "n n"],
  key: PRNGKeyArray,
  *,
  dim: int,
  iterations: int = 8,
  oversampling: int = 16,
) -> Float[Array, "n dim"]:
  """U_k sqrt(S_k) of a symmetric matrix M, from its k largest singular values: a node's vector is its row.

  By orthogonal iteration from a random start (Halko, Martinsson and Tropp 2011, algorithm 4.4); the order is that of
  the singular values, largest first, and a column's sign is free.

  Args:
    matrix: M [N, N], symmetric and floating: an operator, as of `sparse.from_scipy`, or dense.
    key: of the start.
    dim: k.
    iterations: products with M^2; the error falls as (S_{k + oversampling} / S_k)^(2 iterations).
    oversampling: more columns to iterate on, as far as there are nodes.

  Raises:
    ValueError: a matrix of another kind or shape, an option out of range.
  """
  dense = not isinstance(matrix, sparse.Operator)
  if len(np.shape(matrix)) != 2 or matrix.shape[0] != matrix.shape[1] or scipy.sparse.issparse(matrix):
    raise ValueError(
      f"matrix: got a {type(matrix).__name__} of {np.shape(matrix)}, expected [N, N], an Operator if sparse"
    )
  n = matrix.shape[0]
  dim = checks.count("dim", dim, 1, n)
  iterations, oversampling = checks.count("iterations", iterations, 1), checks.count("oversampling", oversampling, 0)
  start = jax.random.normal(key, (n, min(n, dim + oversampling)))

  def multiply(x):
    return jnp.matmul(matrix, x, precision="highest") if dense else sparse.propagate(matrix, x)

  values, vectors = factorization.leading_eigenpairs(multiply, start, iterations=iterations)
  return vectors[:, :dim] * jnp.sqrt(jnp.abs(values[:dim]))
