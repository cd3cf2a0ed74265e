import numpy as np
from contract_case import Case

from jaxlab.graph.search import hnsw

DIM = 4


def vectors(seed, n=40):
  return np.random.default_rng(seed).random((n, DIM)).astype("float32")


def build(**changes):
  return hnsw.build(vectors(0), **{"max_links": 4, "ef_construction": 10} | changes)


def with_nan():
  x = vectors(0)
  x[3, 1] = np.nan
  return x


INDEX, QUERIES = build(), vectors(1, 3)
CASE = Case(
  function=lambda params, queries: hnsw.device_search(INDEX, queries, k=3, ef=8),
  params=(),
  inputs=lambda seed: vectors(seed + 5, 6),
  bad={
    "vectors of one axis": (lambda: hnsw.build(np.ones(3)), "vectors"),
    "vectors of another length": (lambda: hnsw.add(INDEX, np.ones((2, 3))), "vectors"),
    "not a number": (lambda: hnsw.build(with_nan()), "vectors"),
    "a zero vector under cosine": (lambda: hnsw.build(np.zeros((2, 3)), space="cosine"), "vectors"),
    "unknown space": (lambda: build(space="l1"), "space"),
    "one link": (lambda: build(max_links=1), "max_links"),
    "no beam": (lambda: build(ef_construction=0), "ef_construction"),
    "a seed that the generator does not have": (lambda: build(seed=0), "seed"),
    "no dimension": (lambda: hnsw.create(0), "dim"),
    "no threads": (lambda: build(threads=0), "threads"),
    "labels of other points": (lambda: build(labels=np.arange(3)), "labels"),
    "a label twice": (lambda: build(labels=np.zeros(40, int)), "labels"),
    "too small a capacity": (lambda: hnsw.add(INDEX, vectors(2), capacity=41), "capacity"),
    "deletion of an unknown label": (lambda: hnsw.delete(INDEX, [1000]), "labels"),
    "deletion twice": (lambda: hnsw.delete(hnsw.delete(INDEX, [1]), [1]), "labels"),
    "undeletion of what is there": (lambda: hnsw.delete(INDEX, [1], undo=True), "labels"),
    "a deleted label again": (lambda: hnsw.add(hnsw.delete(INDEX, [1]), vectors(1, 1), np.array([1])), "labels"),
    "more neighbours than points": (lambda: hnsw.search(INDEX, QUERIES, k=41), "k"),
    "no neighbours": (lambda: hnsw.search(INDEX, QUERIES, k=0), "k"),
    "a search without a beam": (lambda: hnsw.search(INDEX, QUERIES, ef=0), "ef"),
    "queries of another length": (lambda: hnsw.search(INDEX, np.ones((2, 3))), "queries"),
    "queries that are not numbers": (lambda: hnsw.search(INDEX, with_nan()), "queries"),
    "a filter of other points": (lambda: hnsw.search(INDEX, QUERIES, allowed=np.ones(3, bool)), "allowed"),
    "device: queries of another length": (lambda: hnsw.device_search(INDEX, np.ones((2, 3))), "queries"),
    "device: no neighbours": (lambda: hnsw.device_search(INDEX, QUERIES, k=0), "k"),
    "device: a filter of other points": (
      lambda: hnsw.device_search(INDEX, QUERIES, allowed=np.ones(3, bool)),
      "allowed",
    ),
    "a missing file": (lambda: hnsw.load("no-such-index.npz"), "no-such-index.npz"),
  },
)
