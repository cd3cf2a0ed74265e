"""HNSW: approximate nearest neighbours by greedy search on a hierarchy of proximity graphs.

Layer 0 links every point to near ones, each layer above holds a share 1 / M of the points of the one below. A search
walks greedily down to layer 0 and there keeps the `ef` best points in a beam. A new point is searched for in the same
way and linked to those found that are nearer to it than to each other.

Malkov and Yashunin, "Efficient and robust approximate nearest neighbor search using Hierarchical Navigable Small World
graphs", TPAMI 2018, arXiv:1603.09320; code `nmslib/hnswlib`, which this follows link by link. Symbols: M is
`max_links`, M_max0 twice that, efConstruction `ef_construction`, mL = 1 / ln(M).

    index = hnsw.build(vectors)                                   # host; one thread gives the graph of hnswlib
    labels, distances = hnsw.search(index, queries, k=10, ef=50)  # host, in parallel
    labels, distances = hnsw.device_search(jax.device_put(index), queries, k=10, ef=50)

`Index` is one pytree for both searches. Functions return new indices and leave the given one as it was; `donate=True`
lets `add` and `delete` write into its arrays. Spaces: "l2" is the squared Euclidean distance, "ip" 1 - <a, b>, "cosine"
that of vectors of length one (which are what is stored).

Differs from the paper: as in the code, neighbours are chosen by Algorithm 4 without its two extensions. Differs from
the official code: inputs are checked; a search that finds fewer than k points (few pass a filter) fills up with label
-1 at infinite distance; a zero vector has no cosine and is refused.
"""

import concurrent.futures
import os
import pathlib
from typing import Any, Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlab import checks
from jaxlab.data import files
from jaxlab.graph.search import _hnsw

Space = Literal["l2", "ip", "cosine"]


@flax.struct.dataclass
class Index:
  """Points and their links, N of them, of which the first `size` rows are used.

  Attributes:
    vectors: [N, d] float32, of length one for "cosine".
    labels: [N] int64, the caller's numbers, distinct.
    links: [N, 2M] int32, layer 0; -1 where a row is not full.
    upper: [U, M] int32, layers 1 and above.
    first_upper: [N] int32; layer l of a point is row `first_upper + l - 1` of `upper`. -1 without upper layers.
    levels: [N] int8, highest layer of each point; -1 for unused rows.
    deleted: [N] bool.
    head: [3] int64: entry point (-1 for an empty index), its level, number of points.
    random: [] int64, state of the generator of levels.
    space: of distances.
    ef_construction: width of the beam at insertion.
    diverse: how neighbours are chosen.
  """

  vectors: Float[Any, "n d"]
  labels: Int[Any, " n"]
  links: Int[Any, "n m2"]
  upper: Int[Any, "u m"]
  first_upper: Int[Any, " n"]
  levels: Int[Any, " n"]
  deleted: Bool[Any, " n"]
  head: Int[Any, "3"]
  random: Int[Any, ""]
  space: Space = flax.struct.field(pytree_node=False)
  ef_construction: int = flax.struct.field(pytree_node=False)
  diverse: bool = flax.struct.field(pytree_node=False, default=True)

  @property
  def size(self) -> int:
    """Number of points, deleted ones included. Host."""
    return int(self.head[_hnsw.COUNT])

  @property
  def max_links(self) -> int:
    """M."""
    return self.upper.shape[1]

  @property
  def nbytes(self) -> int:
    """Bytes of all arrays."""
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(self))


# --------------------------------------------------------------------------------------------------------- building


def create(
  dim: int,
  *,
  space: Space = "l2",
  max_links: int = 16,
  ef_construction: int = 200,
  diverse: bool = True,
  seed: int = 100,
) -> Index:
  """Host. An empty index.

  Args:
    dim: d.
    space: of distances.
    max_links: M, at least 2; 5 to 48 are useful, more for higher dimensions.
    ef_construction: width of the beam at insertion, raised to M.
    diverse: choose neighbours that are nearer to a point than to each other (Algorithm 4); False takes the nearest
      (Algorithm 3), which leaves clusters unconnected.
    seed: of the levels, in [1, 2^31 - 2].
  """
  for name, value, low in (("dim", dim, 1), ("max_links", max_links, 2), ("ef_construction", ef_construction, 1)):
    checks.count(name, value, low)
  checks.choice("space", space, Space)
  checks.count("seed", seed, 1, _MODULUS - 1)
  return Index(
    np.zeros((0, dim), np.float32),
    np.zeros(0, np.int64),
    np.zeros((0, 2 * max_links), np.int32),
    np.zeros((0, max_links), np.int32),
    np.zeros(0, np.int32),
    np.zeros(0, np.int8),
    np.zeros(0, bool),
    np.array([-1, -1, 0]),
    np.array(seed),
    space=space,
    ef_construction=max(int(ef_construction), int(max_links)),
    diverse=diverse,
  )


def build(
  vectors: Float[np.ndarray, "n d"],
  labels: Int[np.ndarray, " n"] | None = None,
  *,
  space: Space = "l2",
  max_links: int = 16,
  ef_construction: int = 200,
  diverse: bool = True,
  seed: int = 100,
  threads: int = 1,
) -> Index:
  """Host. An index of vectors; arguments as those of `create` and `add`."""
  vectors = np.asarray(vectors)
  if vectors.ndim != 2:
    raise ValueError(f"vectors: got shape {vectors.shape}, expected [N, d]")
  options: dict[str, Any] = {"max_links": max_links, "ef_construction": ef_construction, "diverse": diverse}
  empty = create(vectors.shape[1], space=space, seed=seed, **options)
  return add(empty, vectors, labels, threads=threads)


def add(
  index: Index,
  vectors: Float[np.ndarray, "n d"],
  labels: Int[np.ndarray, " n"] | None = None,
  *,
  replace_deleted: bool = False,
  threads: int = 1,
  capacity: int | None = None,
  donate: bool = False,
) -> Index:
  """Host. Inserts points; a label that the index has already gets the new vector, and the graph is repaired.

  Args:
    index: any.
    vectors: [N, d], finite.
    labels: [N] distinct integers, at least 0; default the next unused numbers.
    replace_deleted: let new points take the places of deleted ones first.
    threads: insert so many at once. With one thread the result depends on arguments alone; with more, as in hnswlib,
      also on timing. Replacements are made one by one.
    capacity: rows of the result, to make room for later; default as many as are needed.
    donate: write into the arrays of `index`, which must not be used afterwards, as far as there is room.

  Raises:
    ValueError: an argument of another shape or out of range.
  """
  x = _vectors("vectors", index, vectors)
  labels = np.arange(len(x)) + (index.labels[: index.size].max() + 1 if index.size else 0) if labels is None else labels
  labels = np.asarray(labels)
  if labels.shape != (len(x),) or not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f"labels: got {labels.dtype} of shape {labels.shape}, expected integers [{len(x)}]")
  if (labels < 0).any() or len(np.unique(labels)) < len(labels):
    raise ValueError("labels: got negative or repeated numbers, expected distinct numbers, at least 0")
  checks.count("threads", threads)

  order = np.argsort(index.labels[: index.size], kind="stable")
  known = np.searchsorted(index.labels[: index.size], labels, sorter=order)
  place = order[np.minimum(known, index.size - 1)] if index.size else np.zeros(len(x), np.int64)
  exists = (index.labels[place] == labels) if index.size else np.zeros(len(x), bool)
  if (exists & index.deleted[place] if index.size else exists).any():
    raise ValueError("labels: got a deleted label, expected it to be undeleted first, or another one")
  fresh = np.flatnonzero(~exists)
  free = np.flatnonzero(index.deleted[: index.size]) if replace_deleted else np.zeros(0, np.int64)
  reused, fresh = fresh[: len(free)], fresh[len(free) :]

  index = _grown(index, len(fresh), capacity, donate)
  graph = _graph(index)
  options = index.space != "l2", index.diverse, index.max_links, index.ef_construction
  scratch = _hnsw.work(len(index.labels), index.ef_construction, 2 * index.max_links)
  for i, node in [*zip(np.flatnonzero(exists), place[exists], strict=True), *zip(reused, free, strict=False)]:
    index.vectors[node], index.labels[node], index.deleted[node] = x[i], labels[i], False
    _hnsw.update(graph, scratch, *options, int(node), np.zeros(0, np.int64))

  first = index.size
  last = first + len(fresh)
  index.vectors[first:last], index.labels[first:last] = x[fresh], labels[fresh]
  index.head[_hnsw.COUNT] = last
  counter = np.zeros(1, np.int64)
  if first == 0 and last:  # the entry point, before others look for it
    _hnsw.insert(graph, scratch, *options, 0, 1, np.zeros(0, np.int64), counter)
    counter[0], first = 0, 1
  locks = np.zeros(len(index.labels) + 1 if threads > 1 else 0, np.int64)

  def insert(scratch: _hnsw.Work) -> None:
    _hnsw.insert(graph, scratch, *options, first, last, locks, counter)

  _parallel(insert, [scratch, *(_fresh(scratch) for _ in range(min(threads, last - first) - 1))])
  return index


def delete(index: Index, labels: Int[np.ndarray, " m"], *, undo: bool = False, donate: bool = False) -> Index:
  """Host. Marks points as deleted: searches walk through them but never return them.

  Args:
    index: any.
    labels: [M] of points that are there and not deleted.
    undo: unmark points that are deleted.
    donate: write into the arrays of `index`.

  Raises:
    ValueError: a label that is unknown, or deleted already (with `undo`: not deleted).
  """
  labels = np.atleast_1d(np.asarray(labels))
  place = {int(label): i for i, label in enumerate(index.labels[: index.size])}
  unknown = [int(label) for label in labels if int(label) not in place]
  if unknown:
    raise ValueError(f"labels: got {unknown[:5]}, expected labels of the index")
  rows = np.array([place[int(label)] for label in labels], np.int64)
  if (index.deleted[rows] != undo).any():
    raise ValueError(f"labels: got points {'not deleted' if undo else 'deleted'} already, expected others")
  deleted = index.deleted if donate else index.deleted.copy()
  deleted[rows] = not undo
  return index.replace(deleted=deleted)  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------------- on the host


def search(
  index: Index,
  queries: Float[np.ndarray, "q d"],
  *,
  k: int = 10,
  ef: int = 50,
  allowed: Bool[np.ndarray, " n"] | None = None,
  threads: int = 0,
) -> tuple[Int[np.ndarray, "q k"], Float[np.ndarray, "q k"]]:
  """Host. The k nearest points of each query, as far as a beam of `ef` finds them.

  Args:
    index: of at least k points that are not deleted.
    queries: [Q, d], finite.
    k: neighbours of each.
    ef: width of the beam, raised to k: recall against time.
    allowed: [N] rows of the index that may be returned (`index.labels` tells which is which); default all.
    threads: at once; 0 for one per core.

  Returns:
    Labels and distances, nearest first.

  Raises:
    ValueError: an argument of another shape or out of range.
  """
  nodes, distances, _ = _searched(index, queries, k, ef, allowed, threads)
  return np.where(nodes < 0, -1, index.labels[nodes]), distances


def count_distances(index: Index, queries: Float[np.ndarray, "q d"], *, k: int = 10, ef: int = 50) -> float:
  """Host. How many distances `search` evaluates, the mean over queries, of which there is at least one."""
  if not len(queries):
    raise ValueError("queries: got none, expected at least one")
  return _searched(index, queries, k, ef, None, 1)[2] / len(queries)


def _searched(index, queries, k, ef, allowed, threads):
  x = _vectors("queries", index, queries)
  _check_search(index, k, ef)
  hidden = index.deleted if allowed is None else index.deleted | ~_allowed(index, allowed)
  hidden = hidden if hidden.any() else hidden[:0]
  nodes, distances = np.empty((len(x), k), np.int32), np.empty((len(x), k), np.float32)
  counter, graph = np.zeros(1, np.int64), _graph(index)
  scratch = [
    _hnsw.work(len(index.labels), max(ef, k), 2 * index.max_links)
    for _ in range(min(checks.count("threads", threads, 0) or os.cpu_count() or 1, max(len(x), 1)))
  ]

  def run(work: _hnsw.Work) -> None:
    _hnsw.search(graph, work, index.space != "l2", x, max(ef, k), hidden, nodes, distances, counter)

  _parallel(run, scratch)
  return nodes, distances, sum(int(work.clock[1]) for work in scratch)


# ---------------------------------------------------------------------------------------------------------- on a device


def device_search(
  index: Index,
  queries: Float[Array, "q d"],
  *,
  k: int = 10,
  ef: int = 50,
  allowed: Bool[Array, " n"] | None = None,
) -> tuple[Int[Array, "q k"], Float[Array, "q k"]]:
  """The same search for a batch, in JAX; jit it with `k` and `ef` static. Returns what `search` does, up to ties.

  The beam is a sorted array of `ef` points, and nodes to expand are another, both merged with a node's neighbours by a
  sort; a query's visited nodes are bits. All queries of a batch step together until the last is done.

  Args:
    index: on the device; its labels have 32 bits there unless x64 is enabled.
    queries: [Q, d]; not checked for numbers that are not finite.
    k: neighbours of each.
    ef: width of the beam, raised to k.
    allowed: [N] rows that may be returned.

  Raises:
    ValueError: while tracing, an argument of another shape or out of range.
  """
  _check_shapes(index, queries)
  _check_counts(k, ef)
  if allowed is not None and allowed.shape != index.deleted.shape:
    raise ValueError(f"allowed: got shape {allowed.shape}, expected {index.deleted.shape}")
  if index.space == "cosine":
    queries = queries / (jnp.linalg.norm(queries, axis=1, keepdims=True) + 1e-30)
  index = jax.tree.map(jnp.asarray, index)
  hidden = index.deleted if allowed is None else index.deleted | ~allowed
  nodes, distances = jax.vmap(lambda q: _beam(index, hidden, q.astype("float32"), max(ef, k)))(queries)
  nodes, distances = nodes[:, :k], distances[:, :k]
  return jnp.where(nodes < 0, -1, index.labels[nodes]), distances


def _beam(index, hidden, query, ef):
  """Nodes and distances [ef] found for one query, sorted, -1 and infinity where there are fewer."""

  def distance(nodes):
    x = index.vectors[nodes]
    if index.space == "l2":
      return jnp.sum(jnp.square(x - query), axis=-1)
    return 1 - jnp.sum(x * query, axis=-1)

  def descend(state):
    layer, node, d, _ = state
    near = index.upper[index.first_upper[node] + layer - 1]
    far = jnp.where(near >= 0, distance(near), jnp.inf)
    best = jnp.argmin(far)
    moved = far[best] < d
    node, d = jnp.where(moved, near[best], node), jnp.where(moved, far[best], d)
    return jnp.where(moved, layer, layer - 1), node, d, moved

  entry = index.head[_hnsw.ENTRY].astype("int32")
  start = index.head[_hnsw.TOP].astype("int32"), entry, distance(entry), True
  _, entry, d, _ = jax.lax.while_loop(lambda state: state[0] > 0, descend, start) if len(index.upper) else start

  words = -(-index.links.shape[0] // 32)
  found_d = jnp.full(ef, jnp.inf).at[0].set(jnp.where(hidden[entry], jnp.inf, d))
  found = jnp.full(ef, -1, "int32").at[0].set(jnp.where(hidden[entry], -1, entry))
  wait_d, wait = jnp.full(2 * ef, jnp.inf).at[0].set(d), jnp.full(2 * ef, -1, "int32").at[0].set(entry)
  seen = jnp.zeros(words, "uint32").at[entry // 32].set(jnp.uint32(1) << (entry % 32).astype("uint32"))

  def unfinished(state):
    found_d, _, wait_d, _, _ = state
    return (wait_d[0] < jnp.inf) & (wait_d[0] <= found_d[-1])

  def expand(state):
    found_d, found, wait_d, wait, seen = state
    near = index.links[wait[0]]
    bit = jnp.uint32(1) << (near % 32).astype("uint32")
    new = (near >= 0) & (seen[near // 32] & bit == 0)
    seen = seen.at[near // 32].add(jnp.where(new, bit, 0))  # bits that are not set yet, each once: a sum is a union
    d = jnp.where(new, distance(near), jnp.inf)
    d = jnp.where(d < found_d[-1], d, jnp.inf)
    near = jnp.where(d < jnp.inf, near, -1)
    shown = jnp.where(hidden[near], jnp.inf, d)
    found_d, found = _merge(found_d, found, shown, jnp.where(shown < jnp.inf, near, -1))
    wait_d, wait = _merge(jnp.append(wait_d[1:], jnp.inf), jnp.append(wait[1:], -1), d, near)
    return found_d, found, wait_d, wait, seen

  found_d, found, *_ = jax.lax.while_loop(unfinished, expand, (found_d, found, wait_d, wait, seen))
  return found, found_d


def _merge(d, nodes, more_d, more):
  """The smallest of both lists, as many as the first has, sorted."""
  every_d, every = jax.lax.sort((jnp.concatenate([d, more_d]), jnp.concatenate([nodes, more])), num_keys=1)
  return every_d[: len(d)], every[: len(d)]


def exact_search(
  index: Index, queries: Float[Array, "q d"], *, k: int = 10
) -> tuple[Int[Array, "q k"], Float[Array, "q k"]]:
  """The k nearest points by brute force, deleted ones left out: the oracle for recall. In blocks of 256 queries.

  Where there are fewer than k points, labels are -1 and distances infinite.

  Raises:
    ValueError: queries of another shape, k that is not in [1, N].
  """
  _check_shapes(index, queries)
  checks.count("k", k, 1, len(index.labels))
  if index.space == "cosine":
    queries = queries / (jnp.linalg.norm(queries, axis=1, keepdims=True) + 1e-30)
  x = jnp.asarray(index.vectors)
  hidden = jnp.asarray(index.deleted) | (jnp.asarray(index.levels) < 0)

  def one(query):
    inner = x @ query
    d = 1 - inner if index.space != "l2" else jnp.sum(jnp.square(x - query), axis=-1)
    largest, nodes = jax.lax.top_k(jnp.where(hidden, -jnp.inf, -d), k)
    return nodes, -largest

  nodes, distances = jax.lax.map(one, jnp.asarray(queries, "float32"), batch_size=256 if index.space != "l2" else None)
  return jnp.where(jnp.isinf(distances), -1, jnp.asarray(index.labels)[nodes]), distances


# --------------------------------------------------------------------------------------------------------------- files


_STATIC = {"space": str, "ef_construction": int, "diverse": bool}


def save(index: Index, path: str | os.PathLike[str]) -> None:
  """Host. Writes an index to one .npz file, atomically."""
  fields: dict[str, Any] = {name: np.asarray(value) for name, value in vars(index).items()}

  def fill(target: pathlib.Path) -> None:
    with open(target, "wb") as file:  # given a path, NumPy would append .npz to it
      np.savez(file, **fields)

  files.write(path, fill)


def load(path: str | os.PathLike[str]) -> Index:
  """Host. Reads what `save` wrote; nothing in the file is executed.

  Raises:
    ValueError: the file is missing, damaged or no index.
  """

  def read(path: pathlib.Path) -> Index:
    with np.load(path, allow_pickle=False) as content:
      fields: dict[str, Any] = dict(content)
    fields |= {name: kind(fields[name]) for name, kind in _STATIC.items()}
    index = Index(**fields)
    _check(index)
    return index

  return files.parse(pathlib.Path(path), read, "an index that `hnsw.save` wrote")


# --------------------------------------------------------------------------------------------------------------- parts

_MODULUS, _MULTIPLIER = 2**31 - 1, 16807  # of the C++ standard library's default generator


def _levels(state: int, count: int, max_links: int) -> tuple[np.ndarray, int]:
  """Levels of the next points, and the generator's next state: floor(-ln(u) / ln(M)), u from two draws each."""
  x, draws = state, np.empty(2 * count)
  for i in range(2 * count):
    x = _MULTIPLIER * x % _MODULUS
    draws[i] = x - 1
  r = float(_MODULUS - 1)
  u = (draws[::2] + draws[1::2] * r) / (r * r)
  with np.errstate(divide="ignore"):
    return np.minimum(-np.log(u) / np.log(max_links), 60).astype(np.int8), x


def _grown(index: Index, more: int, capacity: int | None, donate: bool) -> Index:
  """A copy, unless donated, with levels and rows for new points, which are not counted yet."""
  size, levels_of = index.size, None
  rows = max(size + more, len(index.labels) if capacity is None else capacity)
  if capacity is not None and capacity < size + more:
    raise ValueError(f"capacity: got {capacity}, expected at least {size + more}, the points of the result")
  levels_of, state = _levels(int(index.random), more, index.max_links)
  used = int(np.maximum(index.levels[:size], 0).sum(dtype=np.int64))
  starts = used + np.append(0, np.cumsum(levels_of[:-1], dtype=np.int64)) if more else np.zeros(0, np.int64)
  upper_rows = max(used + int(levels_of.sum(dtype=np.int64)), len(index.upper))

  def resized(a: np.ndarray, rows: int, fill: int) -> np.ndarray:
    if donate and len(a) == rows:
      return a
    out = np.full((rows, *a.shape[1:]), fill, a.dtype)
    kept = min(len(a), rows)
    out[:kept] = a[:kept]
    return out

  levels, first_upper = resized(index.levels, rows, -1), resized(index.first_upper, rows, -1)
  levels[size : size + more] = levels_of
  first_upper[size : size + more] = np.where(levels_of > 0, starts, -1)
  return Index(
    resized(index.vectors, rows, 0),
    resized(index.labels, rows, -1),
    resized(index.links, rows, -1),
    resized(index.upper, upper_rows, -1),
    first_upper,
    levels,
    resized(index.deleted, rows, 0),
    index.head if donate else np.array(index.head),
    np.array(state),
    space=index.space,
    ef_construction=index.ef_construction,
    diverse=index.diverse,
  )


def _graph(index: Index) -> _hnsw.Graph:
  return _hnsw.Graph(
    index.vectors, index.links, index.upper, index.first_upper, index.levels, index.deleted, index.head
  )


def _fresh(work: _hnsw.Work) -> _hnsw.Work:
  """Scratch like another's."""
  return _hnsw.Work(*(np.zeros_like(array) for array in work))


def _parallel(run, scratch):
  """Runs a function, which shares work by a counter, once in a thread for each scratch."""
  if len(scratch) == 1:
    return run(scratch[0])
  with concurrent.futures.ThreadPoolExecutor(len(scratch)) as pool:
    for done in [pool.submit(run, work) for work in scratch]:
      done.result()


def _vectors(name: str, index: Index, vectors: Any) -> np.ndarray:
  """Rows as they are stored."""
  x = np.ascontiguousarray(vectors, np.float32)
  if x.ndim != 2 or x.shape[1] != index.vectors.shape[1]:
    raise ValueError(f"{name}: got shape {x.shape}, expected [N, {index.vectors.shape[1]}]")
  if not np.isfinite(x).all():
    raise ValueError(f"{name}: got NaN or infinity, expected finite numbers")
  if index.space == "cosine":
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if not length.all():
      raise ValueError(f"{name}: got a zero vector in row {int(np.argmin(length))}, expected a direction")
    x = x / (length + np.float32(1e-30))
  return x


def _check_shapes(index, queries):
  if not len(index.labels):
    raise ValueError("index: got no points, expected at least one")
  if queries.ndim != 2 or queries.shape[1] != index.vectors.shape[1]:
    raise ValueError(f"queries: got shape {queries.shape}, expected [Q, {index.vectors.shape[1]}]")


def _check_counts(k, ef):
  checks.count("k", k)
  checks.count("ef", ef)


def _check_search(index, k, ef):
  _check_counts(k, ef)
  there = index.size - int(np.count_nonzero(index.deleted[: index.size]))
  if k > there:
    raise ValueError(f"k: got {k}, expected at most {there}, the points that are not deleted")


def _allowed(index, allowed):
  allowed = np.asarray(allowed)
  if allowed.shape != index.deleted.shape or allowed.dtype != bool:
    raise ValueError(f"allowed: got {allowed.dtype} of shape {allowed.shape}, expected bool {index.deleted.shape}")
  return allowed


def _check(index: Index) -> None:
  """Refuses arrays that do not fit each other or point outside: the loops do not check again."""
  n, size = len(index.labels), index.size
  m = index.max_links
  shapes = {
    "vectors": (n, index.vectors.shape[1]), "links": (n, 2 * m), "first_upper": (n,), "levels": (n,), "deleted": (n,),
    "head": (3,), "random": (),
  }  # fmt: skip
  for name, shape in shapes.items():
    if getattr(index, name).shape != shape:
      raise ValueError(f"{name}: got shape {getattr(index, name).shape}, expected {shape}")
  dtypes = {"vectors": "f4", "labels": "i8", "levels": "i1", "deleted": "?", "head": "i8", "random": "i8"}
  for name in (*shapes, "labels", "upper"):
    dtype = np.dtype(dtypes.get(name, "i4"))
    if getattr(index, name).dtype != dtype:
      raise ValueError(f"{name}: got {getattr(index, name).dtype}, expected {dtype}")
  top = np.maximum(index.levels.astype(np.int64), 0)
  inside = (
    index.space in get_args(Space)
    and 0 <= size <= n
    and -1 <= index.head[_hnsw.ENTRY] < max(size, 1)
    and (size == 0 or index.head[_hnsw.TOP] == index.levels[index.head[_hnsw.ENTRY]])
    and all(a.min(initial=-1) >= -1 and a.max(initial=-1) < max(size, 1) for a in (index.links, index.upper))
    and (index.first_upper[top > 0] >= 0).all()
    and (index.first_upper + top <= len(index.upper)).all()
  )
  if not inside:
    raise ValueError("index: got links, levels or counts out of range, expected those of an index")
