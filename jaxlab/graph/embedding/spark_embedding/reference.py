"""The same algorithm in one process, in NumPy: what the Spark job must reproduce to the last bit.

Nothing of `partition.py` and `distributed.py` is used here, only the options, hashes and the work of one task.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxlab.graph.embedding.spark_embedding import leaf
from jaxlab.graph.embedding.spark_embedding.options import (
  ADMISSION,
  LEFT,
  SEEDS,
  TIES,
  TURNS,
  Options,
  leaf_seed,
  salt,
  shrinks,
  xxhash64,
)


class LocalLevel(NamedTuple):
  """One level of the recursion: `nodes` [n] ascending, their `part` [n], how many are on the `border`, its columns."""

  nodes: Int[np.ndarray, " n"]
  part: Int[np.ndarray, " n"]
  border: int
  dim: int


class LocalResult(NamedTuple):
  """What `reference` returns: `nodes` [n] ascending, `vectors` [n, d], and the levels."""

  nodes: Int[np.ndarray, " n"]
  vectors: Float[np.ndarray, "n d"]
  levels: list[LocalLevel]


def reference(
  sources: Int[np.ndarray, " e"],
  targets: Int[np.ndarray, " e"],
  options: Options = Options(),
  *,
  nodes: Int[np.ndarray, " n"] | None = None,
  embedder: leaf.Embedder = leaf.netmf,
) -> LocalResult:
  """Host. Embeds a graph that fits in memory; arguments as of `embed`, with arrays for data frames."""
  low, high = np.minimum(sources, targets), np.maximum(sources, targets)
  edges = np.unique(np.stack([low, high])[:, low != high].astype(np.int64), axis=1)
  connected = np.unique(edges)
  everyone = connected if nodes is None else np.union1d(connected, nodes)

  levels: list[LocalLevel] = []
  inner, members, dim, worth = [], connected, options.dim, True
  while True:
    level = len(levels)
    here = np.searchsorted(members, edges)
    part = np.zeros(len(members), np.int64)
    last = options.is_last(dim, len(members), level, worth)
    if not options.is_whole(len(members), level, last):
      part = partition(np.concatenate([here, here[::-1]], axis=1), members, options, level)
    cut = part[here[0]] != part[here[1]]
    inner.append(edges[:, ~cut])
    border = np.zeros(len(members), bool)
    border[here[:, cut]] = True
    dim_border = 0 if last else options.border_dim(dim, len(members), int(border.sum()))
    own = dim - dim_border if options.fusion == "concat" else dim
    levels.append(LocalLevel(members, part, int(border.sum()), own))
    if not dim_border:
      break
    dim, worth = dim_border, shrinks(len(members), int(border.sum()))
    edges = edges[:, border[here].all(axis=0) if options.border == "induced" else cut]
    members = members[border]

  scale = not options.is_leaf(len(connected))
  vectors = [
    _embed(number, one, within, options, embedder, scale)
    for number, (one, within) in enumerate(zip(levels, inner, strict=True))
  ]
  if options.fusion == "concat":
    result = np.zeros((len(everyone), options.dim), np.float32)
    start = 0
    for one, z in zip(levels, vectors, strict=True):
      result[np.searchsorted(everyone, one.nodes), start : start + one.dim] = z
      start += one.dim
    return LocalResult(everyone, result, levels)
  total, where = vectors[-1], levels[-1].nodes
  for one, z in zip(levels[-2::-1], vectors[-2::-1], strict=True):
    on_border = np.isin(one.nodes, where)
    border_z = np.zeros_like(z)
    border_z[on_border] = total
    total, where = np.zeros_like(z), one.nodes
    for p in np.unique(one.part):
      rows = one.part == p
      total[rows] = leaf.align(z[rows], border_z[rows], on_border[rows])
  result = np.zeros((len(everyone), options.dim), np.float32)
  result[np.searchsorted(everyone, where)] = total
  return LocalResult(everyone, result, levels)


def _embed(number, level, edges, options, embedder, scale):
  z = np.zeros((len(level.nodes), level.dim), np.float32)
  edge_part = level.part[np.searchsorted(level.nodes, edges[0])]
  edge_order, order = np.argsort(edge_part, kind="stable"), np.argsort(level.part, kind="stable")
  edges, edge_part, part = edges[:, edge_order], edge_part[edge_order], level.part[order]
  for p in np.unique(part):
    rows = order[slice(*np.searchsorted(part, [p, p + 1]))]
    within = edges[:, slice(*np.searchsorted(edge_part, [p, p + 1]))]
    seed = leaf_seed(options.seed, number, int(p))
    z[rows] = leaf.embed_leaf(level.nodes[rows], *within, level.dim, seed, embedder, scale)[1]
  return z


# -------------------------------------------------------------------------------------------------------- partition


def partition(
  arcs: Int[np.ndarray, "2 a"], ids: Int[np.ndarray, " n"], options: Options, level: int = 0
) -> Int[np.ndarray, " n"]:
  """Host. Parts of nearly even size, none larger than `leaf_nodes`; labels as of `partition.partition`.

  Args:
    arcs: [2, A] both directions of each edge, as positions in `ids`.
    ids: [N] of the nodes, ascending.
    options: of the split.
    level: of the recursion.
  """
  k = options.parts
  part, round_ = np.zeros(len(ids), np.int64), 0
  while True:
    groups, parent, size = np.unique(part, return_inverse=True, return_counts=True)
    wanted = np.ceil(size * (1 + options.slack) / options.leaf_nodes).astype(np.int64)
    children = np.minimum(k, size) if round_ == 0 else np.minimum(k, np.where(size > options.leaf_nodes, wanted, 1))
    if (children == 1).all():
      return part
    cap = np.ceil(size * (1 + options.slack) / children).astype(np.int64)
    within = arcs[:, (parent[arcs[0]] == parent[arcs[1]]) & (children[parent[arcs[0]]] > 1)]
    part = _split(within, ids, groups, parent, children, cap, options, level, round_)
    round_ += 1


def _split(arcs, ids, groups, parent, children, cap, options, level, round_):
  """Children of each group, numbered group * k + child."""
  draw = lambda purpose, step=0: salt(options.seed, purpose, level, round_, step)
  base = np.concatenate([[0], np.cumsum(children)])  # places of children
  labels = np.concatenate([g * options.parts + np.arange(c) for g, c in zip(groups, children, strict=True)])
  caps = np.repeat(cap, children)
  part = np.full(len(ids), -1)
  rank = _rank(parent, xxhash64(np.full(len(ids), draw(SEEDS)), ids))
  part[rank < children[parent]] = (base[parent] + rank)[rank < children[parent]]
  part[children[parent] == 1] = base[parent][children[parent] == 1]

  fresh, stalled = part >= 0, False
  for step in range(options.grow_steps):
    room = caps - np.bincount(part[part >= 0], minlength=len(labels))
    voters = fresh & (room[part] > 0)
    v, p, votes = _ballots(arcs[:, voters[arcs[0]] & (part[arcs[1]] < 0)], part, len(labels))
    tie = xxhash64(np.full(len(v), draw(TIES, step)), ids[v], labels[p])
    best = _argmax(v, votes, tie)
    v, p = v[best], p[best]
    v, p = _admit(v, p, ids, room, draw(ADMISSION, step))
    fresh = np.zeros(len(ids), bool)
    part[v], fresh[v] = p, True
    if (part >= 0).all():
      break
    if options.is_slow(len(v), len(ids)):
      if stalled:
        break
      fresh = part >= 0
    stalled = options.is_slow(len(v), len(ids))

  left = np.flatnonzero(part < 0)
  if len(left):
    size = np.bincount(part[part >= 0], minlength=len(labels))
    rank = _rank(parent[left], xxhash64(np.full(len(left), draw(LEFT)), ids[left]))
    for g in np.unique(parent[left]):
      places = np.arange(base[g], base[g + 1])
      free = [(s, place) for place in places for s in range(size[place], caps[place])]
      rows = parent[left] == g
      part[left[rows]] = np.array([place for _, place in sorted(free)])[rank[rows]]

  for step in range(options.refine_rounds):
    room = caps - np.bincount(part, minlength=len(labels))
    turn = xxhash64(np.full(len(ids), draw(TURNS, step)), ids) % 2 == 0
    v, p, votes = _ballots(arcs[:, turn[arcs[1]]], part, len(labels))
    own = p == part[v]
    stay = np.zeros(len(ids), np.int64)
    stay[v[own]] = votes[own]
    votes = np.where(room[p] > 0, votes, 0)
    best = _argmax(v, votes, xxhash64(np.full(len(v), draw(TIES, options.grow_steps + step)), ids[v], labels[p]))
    best = best[votes[best] > stay[v[best]]]
    v, p = _admit(v[best], p[best], ids, room, draw(ADMISSION, options.grow_steps + step))
    part[v] = p
    if options.is_slow(len(v), len(ids)):
      break
  return labels[part]


def _ballots(arcs, part, count):
  """Nodes, parts and how many arcs lead from the part to the node."""
  pairs, votes = np.unique(arcs[1].astype(np.int64) * count + part[arcs[0]], return_counts=True)
  return pairs // count, pairs % count, votes


def _argmax(v, score, tie):
  """Positions of the best entry of each v, v ascending."""
  order = np.lexsort((tie, score, v))
  return order[np.append(v[order][1:] != v[order][:-1], True)] if len(v) else order


def _admit(v, p, ids, room, draw):
  """As many as there is room for."""
  accepted = _rank(p, xxhash64(np.full(len(v), draw), ids[v])) < room[p]
  return v[accepted], p[accepted]


def _rank(group, value):
  """From 0, of each entry in its group."""
  order = np.lexsort((value, group))
  start = np.searchsorted(group[order], group[order])
  rank = np.empty(len(group), np.int64)
  rank[order] = np.arange(len(group)) - start
  return rank
