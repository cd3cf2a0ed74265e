"""A leaf by NetMF beside SciPy, and the job on two threads beside one thread and beside SciPy on the whole graph.

The leaf has 2,000 nodes and 20,000 edges in communities. Peers form the same matrix in float32, by sparse products, and
take its leading singular vectors from ARPACK (as NetMF's own code does) or from scikit-learn's randomised SVD with as
many iterations as ours.

The job has 8,000 nodes and 80,000 edges, four parts that are embedded in tasks of up to 2,600 nodes each, and a border
that is embedded in parts; one run splits, embeds and fuses. Needs Java. Its memory is the driver's Python alone.
"""

import functools

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from benchmarks.harness import Case

DIM, WINDOW = 64, 5


@functools.cache
def edges(nodes):
  """Each once; mean degree 20, communities of 250."""
  rng = np.random.default_rng(0)
  a = rng.integers(0, nodes, 12 * nodes)
  inside = a - a % 250 + rng.integers(0, 250, len(a))
  b = np.where(rng.random(len(a)) < 0.05, rng.integers(0, nodes, len(a)), inside)
  pairs = np.unique(np.sort(np.stack([a, b]), axis=0)[:, a != b], axis=1)
  return rng.permutation(pairs, axis=1)[:, : 10 * nodes]


def leaf(nodes):
  """netmf, with padding."""
  import jax

  from jaxlab.graph.embedding import spark_embedding as se

  pairs, key = edges(nodes), jax.random.key(0)
  return lambda: se.netmf(pairs, nodes, DIM, key)


def scipy_netmf(nodes, solver):
  """The same in SciPy."""
  from sklearn.utils.extmath import randomized_svd

  a, b = edges(nodes)
  ones = np.ones(2 * len(a), "float32")

  def run():
    s = scipy.sparse.csr_array((ones, (np.append(a, b), np.append(b, a))), (nodes, nodes))
    degree = np.asarray(s.sum(axis=1))
    inverse = np.divide(1, degree, out=np.zeros_like(degree), where=degree > 0)
    p = scipy.sparse.diags_array(inverse).tocsr() @ s
    power = p.toarray()
    walks = power.copy()
    for _ in range(WINDOW - 1):
      power = p @ power
      walks += power
    walks *= degree.sum() / WINDOW * inverse
    m = np.log(np.maximum(walks, 1, out=walks), out=walks)
    if solver == "ARPACK":
      left, values, _ = scipy.sparse.linalg.svds(m, DIM)
    else:
      left, values, _ = randomized_svd(
        m, DIM, n_oversamples=8, n_iter=3, power_iteration_normalizer="QR", random_state=0
      )
    return left * np.sqrt(values)

  return run


def job(nodes, threads):
  """embed, on local threads."""
  import pandas as pd

  from jaxlab.graph.embedding import spark_embedding as se

  spark = se.session(f"local[{threads}]", memory="2g", shuffle_partitions=8)
  spark.sparkContext.setLogLevel("ERROR")
  src, dst = edges(nodes)
  frame = spark.createDataFrame(pd.DataFrame({"src": src, "dst": dst})).localCheckpoint()
  options = se.Options(dim=DIM, parts=4, leaf_nodes=2600, max_depth=1, slack=0.3, grow_steps=8, refine_rounds=1)
  return lambda: se.embed(frame, options).vectors.write.format("noop").mode("overwrite").save()


def cases():
  """Leaf and job."""
  return [
    Case(
      "leaf, 2,000 nodes, 64 columns",
      functools.partial(leaf, 2000),
      {f"SciPy, {solver}": functools.partial(scipy_netmf, 2000, solver) for solver in ("ARPACK", "randomised")},
    ),
    Case(
      "job, 8,000 nodes on local[2]",
      functools.partial(job, 8000, 2),
      {
        "local[1]": functools.partial(job, 8000, 1),
        "SciPy, whole graph, ARPACK": functools.partial(scipy_netmf, 8000, "ARPACK"),
      },
    ),
  ]
