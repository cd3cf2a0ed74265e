import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from contract_case import Case

from jaxlab.graph import factorization, sparse
from jaxlab.graph.embedding import spark_embedding as se

NODES, EDGES, DIM = 16, 40, 4


def inputs(seed):
  """What a task embeds: a leaf, and the key of its level and part."""
  rng = np.random.default_rng(seed)
  pairs = np.stack(np.triu_indices(NODES, 1))
  a, b = pairs[:, rng.choice(pairs.shape[1], EDGES, replace=False)]
  weights = rng.uniform(0.2, 2, EDGES)
  one = scipy.sparse.coo_array((weights, (a, b)), shape=(NODES, NODES))
  return sparse.from_scipy(one + one.T), jax.random.key(se.leaf_seed(0, 0, seed))


def pad(given):
  """Nodes without edges, and entries of weight 0 at the last of them."""
  operator, key = given
  more, last = 8, NODES + 7

  def longer(x, value):
    return jnp.concatenate([x, jnp.full(more, value, x.dtype)])

  entries = 2 * EDGES + more

  def starts(x):
    return longer(x, 2 * EDGES).at[-1].set(entries)

  order = longer(operator.transpose_order, 0).at[-more:].set(jnp.arange(2 * EDGES, entries, dtype="int32"))
  rows, columns = longer(operator.rows, last), longer(operator.columns, last)
  begins = starts(operator.row_starts), starts(operator.transpose_starts)
  return sparse.Operator(
    rows, columns, longer(operator.values, 0), begins[0], order, longer(operator.transpose_rows, last), begins[1]
  ), key


def embed(params, given):
  return factorization.netmf(*given, dim=DIM, iterations=8)


def narrow(params, given):
  operator, key = given
  return embed(params, (operator.replace_values(operator.values.astype("bfloat16")), key))


OPERATOR, _ = inputs(0)


def netmf(operator=OPERATOR, **changes):
  return lambda: factorization.netmf(operator, jax.random.key(0), **{"dim": DIM} | changes)


def options(**changes):
  return lambda: se.Options(**changes)


DIRECTED = sparse.from_scipy(np.triu(np.ones((3, 3), "float32")))
CASE = Case(
  function=embed,
  params=(),
  inputs=inputs,
  narrow=narrow,
  pad=pad,
  unpad=lambda z: z[:NODES],
  tolerance=2e-4,  # of eigenvectors
  bad={
    "no columns": (options(dim=0), "dim"),
    "half a part": (options(parts=1.5), "parts"),
    "leaves of one node": (options(leaf_nodes=1), "leaf_nodes"),
    "no least dimension": (options(min_dim=0), "min_dim"),
    "negative depth": (options(max_depth=-1), "max_depth"),
    "parts below their share": (options(slack=-0.1), "slack"),
    "growth backwards": (options(grow_steps=-1), "grow_steps"),
    "negative rounds": (options(refine_rounds=-1), "refine_rounds"),
    "a share above one": (options(stall=1.5), "stall"),
    "unknown border": (options(border="none"), "border"),
    "unknown fusion": (options(fusion="mean"), "fusion"),
    "unknown last border": (options(last="none"), "last"),
    "a seed that is no number": (options(seed="0"), "seed"),
    "a list as edges": (lambda: se.embed([(0, 1)]), "edges"),
    "no shuffle partitions": (lambda: se.session("local[1]", shuffle_partitions=0), "shuffle_partitions"),
    "netmf: a matrix that is no operator": (netmf(np.eye(3)), "operator"),
    "netmf: a directed graph": (netmf(DIRECTED), "operator"),
    "netmf: not square": (netmf(sparse.from_scipy(np.ones((2, 3), "float32"))), "operator"),
    "netmf: negative weights": (netmf(OPERATOR.replace_values(-OPERATOR.values)), "operator"),
    "netmf: no columns": (netmf(dim=0), "dim"),
    "netmf: no window": (netmf(window=0), "window"),
    "netmf: no negatives": (netmf(negatives=0.0), "negatives"),
    "netmf: negative oversampling": (netmf(oversample=-1), "oversample"),
    "netmf: iterations backwards": (netmf(iterations=-1), "iterations"),
  },
)
