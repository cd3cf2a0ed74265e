"""Positional and structural encodings of nodes, for networks that else could not tell nodes apart. Host.

Each is computed for every graph of a tuple by itself, before padding; concatenate the result to the node features.
"""

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from jaxtyping import Array, Float, Int, Key

from jaxlab import checks
from jaxlab.graph import structure


def laplacian_eigenvectors(graph: jraph.GraphsTuple, k: int) -> Float[np.ndarray, "n k"]:
  """Eigenvectors 2 to k + 1 of I - D^-1/2 A D^-1/2, by ascending eigenvalue; the first is the trivial one.

  Each has unit norm and a sign of no meaning: flip signs at random in training (`random_signs`). Columns that a graph
  of k nodes or fewer has not are 0. Source: Dwivedi et al., "Benchmarking Graph Neural Networks", arXiv:2003.00982.

  Args:
    graph: undirected.
    k: how many.

  Raises:
    ValueError: k below 1, or a directed graph.
  """
  _positive(k)
  if not structure.is_symmetric(graph._replace(edges=None)):
    raise ValueError("graph: got a directed graph, expected every edge in both directions")
  out = np.zeros((structure.num_nodes(graph), k), "float32")
  for first, matrix in _parts(graph):
    n = matrix.shape[0]
    normalized = _scaled(matrix, -0.5) @ matrix @ _scaled(matrix, -0.5)
    if n <= max(2 * k + 2, 500):
      vectors = np.linalg.eigh(np.eye(n) - normalized.toarray())[1]
    else:
      # The largest of I + D^-1/2 A D^-1/2 are the smallest of the Laplacian; the start vector makes it reproducible.
      values, vectors = scipy.sparse.linalg.eigsh(
        scipy.sparse.eye_array(n) + normalized, k + 1, which="LA", v0=np.random.default_rng(0).standard_normal(n)
      )
      vectors = vectors[:, np.argsort(-values)]
    wanted = vectors[:, 1 : k + 1]
    out[first : first + n, : wanted.shape[1]] = wanted
  return out


def random_signs(
  key: Key[Array, ""], x: Float[Array, "n k"], graph_ids: Int[Array, " n"], num_graphs: int
) -> Float[Array, "n k"]:
  """Each column of each graph times 1 or -1. Traceable."""
  signs = jax.random.rademacher(key, (num_graphs, x.shape[1]), jnp.int8)
  return x * signs[graph_ids].astype(x.dtype)


def random_walk(graph: jraph.GraphsTuple, k: int) -> Float[np.ndarray, "n k"]:
  """Probability to be back after 1, ..., k steps of a random walk: diag(P), ..., diag(P^k) with P = D^-1 A.

  Source: Dwivedi et al., "Graph Neural Networks with Learnable Structural and Positional Representations",
  arXiv:2110.07875.

  Raises:
    ValueError: k below 1.
  """
  _positive(k)
  out = np.zeros((structure.num_nodes(graph), k), "float32")
  for first, matrix in _parts(graph):
    p = _scaled(matrix.T, -1) @ matrix.T  # row = sender: where the walk goes from there
    powers, transposed = [scipy.sparse.csr_array(p)], [scipy.sparse.csr_array(p.T)]
    for i in range(1, k + 1):
      # diag(P^(a + b)) is the row sum of P^a and the transpose of P^b: half of the powers, which fill in.
      a, b = (i + 1) // 2, i // 2
      if a > len(powers):
        powers.append(scipy.sparse.csr_array(powers[-1] @ p))
        transposed.append(scipy.sparse.csr_array(powers[-1].T))
      diagonal = p.diagonal() if b == 0 else (powers[a - 1] * transposed[b - 1]).sum(1)
      out[first : first + len(diagonal), i - 1] = diagonal
  return out


def pagerank(graph: jraph.GraphsTuple, *, damping: float = 0.85, steps: int = 100) -> Float[np.ndarray, " n"]:
  """PageRank of each node in its graph, an order of nodes other than by degree; sums to 1 in each graph.

  Args:
    graph: any direction.
    damping: probability to follow an edge.
    steps: of the power iteration.

  Raises:
    ValueError: damping outside [0, 1).
  """
  checks.rate("damping", damping)
  out = np.zeros(structure.num_nodes(graph))
  for first, matrix in _parts(graph):
    n = matrix.shape[0]
    out_degree = matrix.sum(0)
    move = matrix @ scipy.sparse.diags_array(np.divide(1.0, out_degree, out=np.zeros(n), where=out_degree > 0))
    rank = np.full(n, 1 / n)
    for _ in range(steps):
      rank = damping * (move @ rank + rank[out_degree == 0].sum() / n) + (1 - damping) / n
    out[first : first + n] = rank
  return out.astype("float32")


def _parts(graph):
  """First node and adjacency of each graph of a tuple, row = receiver."""
  matrix = structure.to_scipy(graph._replace(edges=None)).astype("float64")
  first = 0
  for n in np.asarray(graph.n_node):
    if n:
      yield first, scipy.sparse.csr_array(matrix[first : first + n, first : first + n])
    first += int(n)


def _scaled(matrix, power):
  """diag(row sums)^power; 0 for an empty row."""
  degree = np.asarray(matrix.sum(1), "float64")
  return scipy.sparse.diags_array(np.power(degree, power, out=np.zeros_like(degree), where=degree > 0))


def _positive(k):
  if k < 1:
    raise ValueError(f"k: got {k}, expected a positive integer")
