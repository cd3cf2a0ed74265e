"""FastRP beside its algorithm in SciPy, with the same projection: BlogCatalog at 512 columns, a random graph at 128.

BlogCatalog is read by `jaxlab.data.networks`. One peer computes as the official code does: float64, the projection
sparse, products of sparse matrices (which fill up after two hops). The other is SciPy at its best: float32, products of
a sparse and a dense matrix.
"""

import functools

import numpy as np
import scipy.sparse

from benchmarks.harness import Case

WEIGHTS, EXPONENT = (0.0, 0.0, 1.0, 6.67), -0.64


def adjacency(graph):
  """S."""
  from jaxlab.data import networks, synthetic

  if graph == "blogcatalog":
    return networks.blogcatalog().adjacency
  nodes = 100_000
  senders, receivers = synthetic.erdos_renyi(nodes, 500_000)
  return scipy.sparse.csr_array((np.ones(len(senders), np.float32), (receivers, senders)), (nodes, nodes))


def very_sparse(n, dim):
  """R, the same on all sides."""
  rng, density = np.random.default_rng(0), n**-0.5
  signs = rng.choice([-1, 0, 1], (n, dim), p=[density / 2, 1 - density, density / 2])
  return (signs / np.sqrt(density * dim)).astype("float32")


def ours(graph, dim):
  """embed."""
  import jax
  import jax.numpy as jnp

  from jaxlab.graph import sparse
  from jaxlab.graph.embedding import fastrp

  s = adjacency(graph)
  op, r = sparse.from_scipy(s), jnp.asarray(very_sparse(s.shape[0], dim))
  embed = jax.jit(functools.partial(fastrp.embed, degree_exponent=EXPONENT))
  weights = jnp.asarray(WEIGHTS)
  return lambda: jax.block_until_ready(embed(op, r, weights=weights))


def scipy_form(graph, dim, official):
  """The same with SciPy and NumPy."""
  dtype = "float64" if official else "float32"
  s, r = adjacency(graph).astype(dtype), very_sparse(adjacency(graph).shape[0], dim).astype(dtype)
  r = scipy.sparse.csr_array(r) if official else r

  def run():
    degree = np.asarray(s.sum(axis=1))
    with np.errstate(divide="ignore"):
      inverse, scale = (np.where(degree > 0, degree**power, 0).astype(dtype) for power in (-1.0, EXPONENT))
    p = scipy.sparse.diags_array(inverse) @ s
    u = scipy.sparse.diags_array(scale) @ r
    total = np.zeros(r.shape, dtype)
    for weight in WEIGHTS:
      u = p @ u
      dense = u.toarray() if official else u
      norm = np.sqrt(np.einsum("nd,nd->n", dense, dense))
      total += weight * (dense / np.where(norm > 0, norm, 1)[:, None])
    centered = total - total.mean(axis=0)
    std = centered.std(axis=0)
    return centered / np.where(std > 0, std, 1)

  return run


def cases():
  """Both graphs."""
  return [
    Case(
      name,
      functools.partial(ours, graph, dim),
      {
        "SciPy, as the official code": functools.partial(scipy_form, graph, dim, True),
        "SciPy, dense products": functools.partial(scipy_form, graph, dim, False),
      },
    )
    for name, graph, dim in (
      ("BlogCatalog, 10k nodes, 668k entries, 512 columns", "blogcatalog", 512),
      ("random graph, 100k nodes, 1M entries, 128 columns", "random", 128),
    )
  ]
