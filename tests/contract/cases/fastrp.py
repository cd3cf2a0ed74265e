import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from contract_case import Case

from jaxlab.graph import sparse
from jaxlab.graph.embedding import fastrp

NODES, DIM = 16, 6


def inputs(seed):
  """A ring with chords and weights, as many edges for each seed, and a projection."""
  rng = np.random.default_rng(seed)
  ring, shift = np.arange(NODES), 2 + seed % 5
  a = scipy.sparse.coo_array(
    (rng.uniform(0.1, 1, 2 * NODES), (np.tile(ring, 2), np.concatenate([ring + 1, ring + shift]) % NODES)),
    shape=(NODES, NODES),
  )
  return sparse.from_scipy(a + a.T), fastrp.projection(jax.random.key(seed), NODES, DIM, "gaussian")


def relabel(given, order):
  operator, projection = given
  place = np.argsort(order)
  a = scipy.sparse.coo_array((operator.values, (place[operator.rows], place[operator.columns])), operator.shape)
  return sparse.from_scipy(a), projection[order]


def embed(**changes):
  """A call with the inputs of seed 0, changed."""
  operator, projection = changes.pop("operator", OPERATOR), changes.pop("projection", R)
  return lambda: fastrp.embed(operator, projection, **changes)


def projection(n=NODES, dim=DIM, kind="sparse", dtype="float32"):
  return lambda: fastrp.projection(jax.random.key(0), n, dim, kind, dtype=dtype)


OPERATOR, R = inputs(0)
CASE = Case(
  function=lambda params, given: fastrp.embed(*given),
  params=(),
  inputs=inputs,
  narrow=lambda params, given: fastrp.embed(given[0], given[1].astype("bfloat16")),
  relabel=relabel,
  num_nodes=NODES,
  bad={
    "a matrix that is no operator": (embed(operator=np.eye(NODES, dtype="float32")), "operator"),
    "operator not square": (embed(operator=sparse.from_scipy(np.ones((NODES, 3), "float32"))), "operator"),
    "negative weights of edges": (embed(operator=OPERATOR.replace_values(-OPERATOR.values)), "operator"),
    "a weight of an edge that is not a number": (
      embed(operator=OPERATOR.replace_values(OPERATOR.values.at[0].set(np.nan))),
      "operator",
    ),
    "infinite weights of edges": (embed(operator=OPERATOR.replace_values(OPERATOR.values + np.inf)), "operator"),
    "projection of other nodes": (embed(projection=R[:-1]), "projection"),
    "projection of one axis": (embed(projection=R[:, 0]), "projection"),
    "projection of integers": (embed(projection=jnp.ones((NODES, DIM), "int32")), "projection"),
    "no weights": (embed(weights=()), "weights"),
    "weights that are not numbers": (embed(weights=(float("nan"), 1.0)), "weights"),
    "infinite weights": (embed(weights=np.array([1.0, np.inf])), "weights"),
    "weights that are not numbers, of known powers": (
      lambda: fastrp.combine(fastrp.powers(OPERATOR, R, 2), (float("nan"), 1.0)),
      "weights",
    ),
    "one number as weights": (embed(weights=1.0), "weights"),
    "unknown similarity": (embed(similarity="cosine"), "similarity"),
    "positive degree exponent": (embed(degree_exponent=0.64), "degree_exponent"),
    "degree exponent not a number": (embed(degree_exponent=float("nan")), "degree_exponent"),
    "no hops": (lambda: fastrp.powers(OPERATOR, R, 0), "hops"),
    "a fraction of a hop": (lambda: fastrp.powers(OPERATOR, R, 2.5), "hops"),
    "weights of other powers": (lambda: fastrp.combine(fastrp.powers(OPERATOR, R, 2), (1.0, 2.0, 3.0)), "weights"),
    "one power alone": (lambda: fastrp.combine(R, (1.0,)), "powers"),
    "no nodes": (projection(n=0), "n"),
    "no columns": (projection(dim=0), "dim"),
    "a fraction of a column": (projection(dim=2.5), "dim"),
    "more orthogonal columns than nodes": (projection(dim=NODES + 1, kind="orthogonal"), "dim"),
    "projection of whole numbers": (projection(dtype="int32"), "dtype"),
    "unknown kind": (projection(kind="dense"), "kind"),
  },
)
