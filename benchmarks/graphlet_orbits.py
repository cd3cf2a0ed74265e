"""All 28 orbit adjacencies of Barabasi-Albert graphs with ten edges a node, beside the official code (`gradco`).

gradco needs NumPy below 2, which the library does not support, so it runs in a process of its own: set `GRADCO_PYTHON`
to the Python of an environment with `gradco` and `numpy<2` from PyPI. Its time is the one that process takes for
counting and for generating the matrices, without starting up; its memory is not seen here. Without the variable it is
left out, with a word. The other peer is our own dense form on the device, at the smaller size.

gradco yields whole sparse matrices of int32 one after another; we are measured twice, making whole matrices of int64
(`orbit_adjacencies`) and streaming blocks of rows.
"""

import functools
import os
import subprocess

from benchmarks.harness import Case

SIZES = (1000, 4000)
VARIABLE = "GRADCO_PYTHON"
SERVE = """
import os, sys
import numpy as np, scipy.sparse
import gradco
answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # it prints while it counts
n = int(sys.argv[1])
senders, receivers = np.load(sys.argv[2])
graph = scipy.sparse.csr_array((np.ones(len(senders), np.int32), (receivers, senders)), (n, n))
for _ in sys.stdin:
  counter = gradco.Counter(graph)
  counter.count()
  total = sum(matrix.nnz for *_, matrix in counter.generate_orbit_adjacencies())
  print(total, file=answers, flush=True)
"""


def graph(n):
  """Symmetric adjacency."""
  import numpy as np

  from jaxlab.data import synthetic
  from jaxlab.graph import common_neighbors

  return common_neighbors.adjacency(np.stack(synthetic.barabasi_albert(n, 10, seed=42)), n)


def whole(n):
  """orbit_adjacencies."""
  from jaxlab.graph.embedding import graphlet_orbits as go

  a = graph(n)
  return lambda: go.orbit_adjacencies(a, threads=_threads())


def streamed(n):
  """stream."""
  from jaxlab.graph.embedding import graphlet_orbits as go

  a = graph(n)

  def run():
    for _ in go.stream(a, threads=_threads()):
      pass

  return run


def _threads():
  return len(os.sched_getaffinity(0))


def gradco(n):
  """The official code in its own process, which inherits this one's cores."""
  import tempfile

  import numpy as np

  from jaxlab.data import synthetic

  with tempfile.NamedTemporaryFile(suffix=".npy") as file:
    np.save(file, np.stack(synthetic.barabasi_albert(n, 10, seed=42)))
    file.flush()
    process = subprocess.Popen(
      [os.environ[VARIABLE], "-c", SERVE, str(n), file.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run():
      process.stdin.write("again\n")
      process.stdin.flush()
      answer = process.stdout.readline()
      if not answer:
        raise RuntimeError(f"gradco's process ended with code {process.wait()}")
      return int(answer)

    entries = run()  # it has read the file by now
  expected = sum(matrix.nnz for matrix in whole(n)().values())
  if entries != expected:
    raise RuntimeError(f"gradco made {entries} entries, we {expected}")
  return run


def dense(n):
  """device_orbit_adjacencies."""
  import jax
  import numpy as np

  from jaxlab.data import synthetic
  from jaxlab.graph.embedding import graphlet_orbits as go

  senders, receivers = synthetic.barabasi_albert(n, 10, seed=42)
  edges = jax.numpy.asarray(np.stack([senders, receivers])[:, senders < receivers])
  count = jax.jit(go.device_orbit_adjacencies, static_argnums=1)
  return lambda: jax.block_until_ready(count(edges, n))


def cases():
  """Two sizes, made whole and streamed."""
  part, official = functools.partial, VARIABLE in os.environ
  if not official:
    print(f"graphlet_orbits: {VARIABLE} is not set, so gradco is left out; it names a Python that has gradco")
  made = []
  for n in SIZES:
    peers = {"gradco": part(gradco, n)} if official else {}
    if n <= 1000:
      peers["dense on the device"] = part(dense, n)
    for how, side in (("whole", whole), ("streamed", streamed)):
      if peers:
        made.append(Case(f"28 matrices of {n} nodes, {n * 10} edges, {how}", part(side, n), peers))
  return made
