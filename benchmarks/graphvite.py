"""GraphVite beside gensim's skip-gram and a plain loop: 128 columns, one negative a pair, pairs at most 5 steps apart.

With gensim the walks, pairs and threads are the same for both; it reads the walks from a file, its fastest form, and
trains on each pair in both directions. Our side is everything that `embed` does, walks, pool and training, or training
on a pool that is ready. The plain loop is the method's definition in numba on one core, with the samples ready, as they
are for our side there.
"""

import functools
import pathlib
import tempfile

import numpy as np

from benchmarks.harness import Case

DIM, STEP, LENGTH = 128, 5, 40
GRAPHS = {"BlogCatalog": 8_000_000, "power law, 100k nodes, 500k edges": 8_000_000}
NODES, THREADS = 100_000, 2
PAIRS = sum(LENGTH + 1 - k for k in range(1, STEP + 1))  # of a walk, in one direction


@functools.cache
def graph(name):
  """Undirected edges, each once, and the number of nodes."""
  import scipy.sparse

  from jaxlab.data import networks, synthetic

  if name == "BlogCatalog":
    adjacency = networks.blogcatalog().adjacency
    return np.stack(scipy.sparse.triu(adjacency, 1).nonzero()), adjacency.shape[0]
  edges = np.stack(synthetic.barabasi_albert(NODES, 5))
  return edges[:, edges[0] < edges[1]], NODES


def sampling(step=STEP):
  """Of pairs."""
  from jaxlab.graph.embedding import graphvite

  return graphvite.Sampling(augmentation_step=step, walk_length=LENGTH)


def start(nodes):
  """Vertex rows before training; those of the context are zeros."""
  return ((np.random.default_rng(0).random((nodes, DIM)) - 0.5) / DIM).astype("float32")


def ours(name, samples):
  """embed, from edges to both matrices."""
  import jax

  from jaxlab.graph.embedding import graphvite

  edges, nodes = graph(name)
  training = graphvite.Training(epochs=samples / edges.shape[1])
  key = jax.random.key(0)
  return lambda: graphvite.embed(edges, nodes, DIM, key, sampling(), training, backend="host", threads=THREADS)


def our_training(name, samples):
  """What `embed` does with the pool of an episode."""
  import jax

  from jaxlab.graph.embedding import graphvite
  from jaxlab.graph.embedding.graphvite import partition, training

  edges, nodes = graph(name)
  prepared, options = graphvite.graph(edges, nodes), graphvite.Training(epochs=samples / edges.shape[1])
  asked = sampling().resolve(nodes, edges.shape[1])
  plan = training._plan(prepared, DIM, asked, options, "host", None)
  parts = partition.zigzag(prepared.degree, plan.num_parts)
  tables = partition.negatives(prepared.degree, parts)
  pools = [graphvite.pool(prepared, parts, plan.block_samples, seed, asked) for seed in range(plan.episodes)]
  vertex = partition.to_blocks(start(nodes), parts)
  state = vertex, np.zeros_like(vertex)
  train = training._host_trainer(plan, options, tables, jax.random.key(0), None, THREADS)
  return lambda: [train(state, ready, episode) for episode, ready in enumerate(pools)]


def gensim(name, samples):
  """Word2Vec on a file of walks; its workers and ours are as many."""
  from gensim.models import Word2Vec

  from jaxlab.graph.embedding import graphvite

  edges, nodes = graph(name)
  chains, _ = graphvite.walks(graphvite.graph(edges, nodes), samples // (2 * PAIRS), 0, sampling())
  path = pathlib.Path(tempfile.mkdtemp()) / "walks.txt"
  np.savetxt(path, chains, "%d")
  model = Word2Vec(
    vector_size=DIM,
    window=STEP,
    shrink_windows=False,
    min_count=0,
    sample=0,
    sg=1,
    negative=1,
    ns_exponent=0.75,
    workers=THREADS,
  )
  model.build_vocab(corpus_file=str(path))
  options = {"total_examples": model.corpus_count, "total_words": model.corpus_total_words, "epochs": 1}
  return lambda: model.train(corpus_file=str(path), **options)


def ready(name, samples):
  """State, pairs and tables of one block that is the whole graph."""
  from jaxlab.graph.embedding import graphvite
  from jaxlab.graph.embedding.graphvite import partition

  edges, nodes = graph(name)
  prepared = graphvite.graph(edges, nodes)
  parts = partition.zigzag(prepared.degree, 1)
  pairs = graphvite.pool(prepared, parts, samples, 0, sampling())[0, 0]
  vertex = start(nodes)
  tables = partition.negatives(prepared.degree, parts)
  return vertex, np.zeros_like(vertex), pairs, tables.accept[0], tables.alias[0]


def our_block(name, samples):
  """The loop that a worker runs."""
  from jaxlab.graph.embedding.graphvite import _kernels

  given = ready(name, samples)
  rest = np.uint64(1), 1, 0.025, 0, 1, 100_000, 10.0 * samples, 5.0, 0.005
  return lambda: _kernels.train_block(*given, *rest)


def plain_loop(name, samples):
  """The definition as one would write it."""
  import numba

  vertex, context, pairs, accept, alias = ready(name, samples)

  @numba.njit(fastmath=True)
  def train(vertex, context, pairs, accept, alias):
    rows, dim = vertex.shape
    one, weight, decay = np.float32(1), np.float32(5), np.float32(0.005)
    for i in range(len(pairs)):
      lr = np.float32(0.025 * max(1 - i // 100_000 * 100_000 / (10 * len(pairs)), 1e-4))
      v = vertex[pairs[i, 0]]
      for k in range(2):
        if k == 0:
          u = np.random.randint(rows)
          if np.random.random() >= accept[u]:
            u = alias[u]
        else:
          u = pairs[i, 1]
        c = context[u]
        logit = np.float32(0)
        for d in range(dim):
          logit += v[d] * c[d]
        p = one / (one + np.exp(-logit))
        w = weight if k == 0 else one
        error = p if k == 0 else p - one
        for d in range(dim):
          a, b = v[d], c[d]
          v[d] -= lr * w * (error * b + decay * a)
          c[d] -= lr * w * (error * a + decay * b)

  return lambda: train(vertex, context, pairs, accept, alias)


def cases():
  """All of a run and its training alone beside gensim, and one block on one core beside the loop."""
  found = [
    Case(
      f"{name}: {samples // 10**6}M pairs, 2 threads{what}",
      functools.partial(side, name, samples),
      {"gensim skip-gram, training only": functools.partial(gensim, name, samples)},
    )
    for name, samples in GRAPHS.items()
    for what, side in (("", ours), (", training only", our_training))
  ]
  return found + [
    Case(
      f"{name}: block of 2M pairs, 1 thread",
      functools.partial(our_block, name, 2_000_000),
      {"plain numba loop": functools.partial(plain_loop, name, 2_000_000)},
    )
    for name in GRAPHS
  ]
