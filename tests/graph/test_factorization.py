import jax
import numpy as np
import pytest

from jaxlab.graph import factorization, sparse

N = 40
netmf = jax.jit(factorization.netmf, static_argnames=("dim", "window", "negatives", "oversample", "iterations"))


def graph(seed=0, n=N, density=0.15):
  """Weighted; the last node has no edges."""
  rng = np.random.default_rng(seed)
  a = np.triu(rng.uniform(0.5, 2, (n, n)) * (rng.random((n, n)) < density), 1)
  a[:, -1] = 0
  return a + a.T


def matrix(a, window, negatives):
  """M by powers, in float64."""
  degree = a.sum(axis=1)
  inverse = np.divide(1, degree, out=np.zeros_like(degree), where=degree > 0)
  p = inverse[:, None] * a
  walks = sum(np.linalg.matrix_power(p, r) for r in range(1, window + 1)) / window
  return np.log(np.maximum(degree.sum() / negatives * walks * inverse, 1))


@pytest.mark.parametrize(("window", "negatives"), [(1, 1.0), (5, 2.0)])
def test_all_columns_give_the_matrix_back(window, negatives):
  a = graph()
  z = netmf(sparse.from_scipy(a), jax.random.key(0), dim=N, window=window, negatives=negatives)
  left, values, right = np.linalg.svd(matrix(a, window, negatives))
  np.testing.assert_allclose(np.linalg.norm(z, axis=0) ** 2, values, atol=2e-3)
  # |M|, the matrix with the same eigenvectors and absolute eigenvalues.
  np.testing.assert_allclose(z @ z.T, right.T @ np.diag(values) @ right, atol=2e-3)
  assert not z[-1].any() and (np.abs(z).argmax(axis=0) == z.argmax(axis=0))[:20].all()


def test_few_columns_are_the_leading_ones():
  a = graph(1)
  z = netmf(sparse.from_scipy(a), jax.random.key(0), dim=4, iterations=12)
  left, values, _ = np.linalg.svd(matrix(a, 5, 1.0))
  expected = left[:, :4] * np.sqrt(values[:4])
  np.testing.assert_allclose(np.abs(z), np.abs(expected), atol=1e-3)


def test_more_columns_than_nodes_are_zero():
  z = netmf(sparse.from_scipy(graph(n=6, density=0.8)), jax.random.key(0), dim=9)
  assert z.shape == (6, 9) and not z[:, 6:].any() and z[:, :2].any()
