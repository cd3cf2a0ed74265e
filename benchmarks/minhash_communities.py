"""Signatures and queries on 10,000 accounts with about 200,000 followers' edges, H = 128, beside datasketch and NumPy.

datasketch is given followers grouped by account, as integers that it need not hash to bytes (its fastest way) or as
bytes for SHA-1 (its documented way); we are given edges in the order of the fans. Queries ask for the 20 accounts most
similar to five seeds on average, among those that share one of 64 bands of 2 with a seed. `datasketch` comes from PyPI.
"""

import functools

import numpy as np

from benchmarks.harness import Case

ACCOUNTS, FANS, HASHES, BANDS, SEEDS, QUERIES, SIZE = 10_000, 12_500, 128, 64, 5, 20, 20


@functools.cache
def edges():
  """Fans and their accounts."""
  from jaxlab.data import synthetic

  return synthetic.fans(ACCOUNTS, FANS, 100)


@functools.cache
def queries():
  """Seeds of one community each."""
  labels, rng = edges().labels, np.random.default_rng(0)
  return [rng.choice(np.flatnonzero(labels == community), SEEDS, replace=False) for community in range(QUERIES)]


@functools.cache
def index():
  """Ours."""
  from jaxlab.graph.search import minhash_communities as mc

  return mc.build(mc.signatures([edges()[:2]], ACCOUNTS, mc.hash_family(HASHES)), BANDS)


def grouped():
  """Fans of each account."""
  senders, receivers, _ = edges()
  order = np.argsort(receivers, kind="stable")
  return np.split(senders[order], np.cumsum(np.bincount(receivers, minlength=ACCOUNTS))[:-1])


def identity(value):
  """No hash: permutations follow anyway."""
  return value


def ingest():
  """signatures."""
  from jaxlab.graph.search import minhash_communities as mc

  hashes, stream = mc.hash_family(HASHES), [edges()[:2]]
  return lambda: mc.signatures(stream, ACCOUNTS, hashes)


def datasketch_ingest():
  """MinHash.bulk, integers."""
  import datasketch

  groups = [group.tolist() for group in grouped()]
  return lambda: datasketch.MinHash.bulk(groups, num_perm=HASHES, hashfunc=identity)


def datasketch_ingest_bytes():
  """MinHash.bulk, SHA-1."""
  import datasketch

  groups = [[int(fan).to_bytes(8, "little") for fan in group] for group in grouped()]
  return lambda: datasketch.MinHash.bulk(groups, num_perm=HASHES)


def table():
  """build."""
  from jaxlab.graph.search import minhash_communities as mc

  signed = index().signatures
  return lambda: mc.build(signed, BANDS)


def datasketch_table():
  """MinHashLSH.insert."""
  import datasketch

  hashes = datasketch.MinHash.bulk([group.tolist() for group in grouped()], num_perm=HASHES, hashfunc=identity)

  def run():
    lsh = datasketch.MinHashLSH(num_perm=HASHES, params=(BANDS, HASHES // BANDS))
    for account, one in enumerate(hashes):
      lsh.insert(account, one, check_duplication=False)
    return lsh

  return run


def query():
  """candidates and initial_averages."""
  from jaxlab.graph.search import minhash_communities as mc

  found = index()

  def run():
    for seeds in queries():
      mc.initial_averages(found.signatures, seeds, mc.candidates(found, seeds), SIZE)

  return run


def datasketch_query():
  """MinHashLSH.query and MinHash.jaccard."""
  import datasketch

  hashes = datasketch.MinHash.bulk([group.tolist() for group in grouped()], num_perm=HASHES, hashfunc=identity)
  lsh = datasketch.MinHashLSH(num_perm=HASHES, params=(BANDS, HASHES // BANDS))
  for account, one in enumerate(hashes):
    lsh.insert(account, one)
  asked = [seeds.tolist() for seeds in queries()]

  def run():
    for seeds in asked:
      active = set().union(*(lsh.query(hashes[s]) for s in seeds)).difference(seeds)
      score = {x: sum(hashes[s].jaccard(hashes[x]) for s in seeds) for x in active}
      sorted(active, key=score.__getitem__, reverse=True)[:SIZE]

  return run


def numpy_query():
  """The official code's way with arrays, without its data frames: a dictionary for each band, NumPy for the rest."""
  signed = index().signatures
  keys = np.ascontiguousarray(signed).view(np.uint64).T
  tables: list[dict[int, list[int]]] = [{} for _ in range(BANDS)]
  for table_, key in zip(tables, keys, strict=True):
    for account, value in enumerate(key.tolist()):
      table_.setdefault(value, []).append(account)

  def run():
    for seeds in queries():
      found: set[int] = set()
      for seed in seeds:
        for table_, value in zip(tables, keys[:, seed].tolist(), strict=True):
          found.update(table_[value])
      active = np.array(sorted(found.difference(seeds.tolist())))
      mean = np.mean([(signed[active] == signed[s]).mean(axis=1) for s in seeds], axis=0)
      active[np.argsort(-mean)[:SIZE]]

  return run


def cases():
  """Ingest, table, queries."""
  integers, sha1 = "datasketch, integers", "datasketch, SHA-1"
  return [
    Case("signatures of 10,000 accounts", ingest, {integers: datasketch_ingest, sha1: datasketch_ingest_bytes}),
    Case("table of 64 bands", table, {"datasketch": datasketch_table}),
    Case("20 queries of 5 seeds", query, {"datasketch": datasketch_query, "NumPy and dictionaries": numpy_query}),
  ]
