import jax
import jax.numpy as jnp
import numpy as np
from contract_case import Case

from jaxlab.graph.search import minhash_communities as mc

VERTICES, HASHES, SEEDS, SIZE = 24, 16, 3, 20


def stream(seed):
  """Vertices of three groups, each with its fans; vertex 5 has none."""
  rng = np.random.default_rng(seed)
  senders = rng.integers(0, 30, 200)
  receivers = (senders % 3) * 8 + rng.integers(0, 8, 200)
  return senders[receivers != 5], receivers[receivers != 5]


def index(seed):
  return mc.build(mc.signatures([stream(seed)], VERTICES, mc.hash_family(HASHES)), 8)


def inputs(seed):
  return jax.tree.map(jnp.asarray, index(seed)), jnp.array([seed % 5, 9, 17])


def function(params, given):
  active = mc.device.gather(*given, size=SIZE, bucket_size=VERTICES)
  order, score = mc.device.minrank(active, 10)
  return active.vertices, mc.device.initial_averages(active), order, score, mc.device.pagerank(active)


SIGNATURES = index(0).signatures
TABLE, CHOSEN = inputs(0)
ALL = np.arange(VERTICES)


def read(senders, receivers, vertices=VERTICES, hashes=None):
  return lambda: mc.signatures([(senders, receivers)], vertices, hashes or mc.hash_family(4))


def rank(method=mc.minrank, seeds=(0, 1), active=ALL, size=3, signatures=SIGNATURES, **options):
  return lambda: method(signatures, np.array(seeds), active, size, **options)


CASE = Case(
  function=function,
  params=(),
  inputs=inputs,
  bad={
    "no hashes": (lambda: mc.hash_family(0), "num_hashes"),
    "hashes of two lengths": (read(ALL, ALL, hashes=mc.HashFamily(np.ones(3), np.ones(2))), "hashes"),
    "no vertices": (read(ALL, ALL, 0), "num_vertices"),
    "three arrays a block": (lambda: mc.signatures([(ALL, ALL, ALL)], VERTICES, mc.hash_family(4)), "blocks"),
    "senders are floats": (read(ALL * 1.0, ALL), "blocks"),
    "negative sender": (read(ALL - 1, ALL), "blocks"),
    "a receiver beyond the graph": (read(ALL, ALL + 1), "blocks"),
    "fewer receivers": (read(ALL, ALL[1:]), "blocks"),
    "nothing to merge": (lambda: mc.merge(), "parts"),
    "merge of shapes": (lambda: mc.merge(SIGNATURES, SIGNATURES[1:]), "parts"),
    "bands that do not divide": (lambda: mc.build(SIGNATURES, 5), "bands"),
    "signed signatures": (lambda: mc.build(SIGNATURES.astype("int64"), 8), "signatures"),
    "a seed twice": (lambda: mc.candidates(index(0), np.array([1, 1])), "seeds"),
    "a seed beyond the graph": (lambda: mc.candidates(index(0), np.array([VERTICES])), "seeds"),
    "no seed": (rank(seeds=np.zeros(0, int)), "seeds"),
    "a seed that is not active": (rank(active=ALL[1:]), "active"),
    "active in disorder": (rank(active=ALL[::-1]), "active"),
    "active beyond the graph": (rank(active=np.arange(30)), "active"),
    "size of zero": (rank(size=0), "size"),
    "pairs beyond the limit": (rank(mc.pagerank, limit=10), "active"),
    "damping above one": (rank(mc.pagerank, damping=1.5), "damping"),
    "one member": (lambda: mc.assess(SIGNATURES, ALL[:1]), "members"),
    "weights to oneself": (lambda: mc.clustering(np.eye(3)), "weights"),
    "weights of one direction": (lambda: mc.walktrap(np.triu(np.ones((3, 3)), 1)), "weights"),
    "walks of no length": (lambda: mc.walktrap(np.zeros((3, 3)), length=0), "length"),
    "density of one": (lambda: mc.density(0.0, 1), "size"),
    "device: seeds are floats": (lambda: mc.device.gather(TABLE, CHOSEN * 1.0, size=9, bucket_size=9), "seeds"),
    "device: no room for seeds": (lambda: mc.device.gather(TABLE, CHOSEN, size=2, bucket_size=9), "size"),
    "device: no room in buckets": (lambda: mc.device.gather(TABLE, CHOSEN, size=9, bucket_size=0), "bucket_size"),
  },
)
