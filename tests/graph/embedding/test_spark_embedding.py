"""The job on a real Spark session beside the single-process reference, and both beside definitions."""

import shutil
import sys

import jax
import networkx as nx
import numpy as np
import pandas as pd
import pytest
from pyspark import cloudpickle
from pyspark.sql import functions as F

from jaxlab.graph.embedding import spark_embedding as se
from jaxlab.graph.embedding.spark_embedding import leaf
from jaxlab.graph.embedding.spark_embedding.options import SEEDS, salt
from jaxlab.graph.embedding.spark_embedding.reference import partition

SMALL = se.Options(dim=12, parts=4, leaf_nodes=20, min_dim=3, max_depth=1, grow_steps=2, refine_rounds=1)


def communities(n=60, groups=5, edges=240, mixing=0.05, seed=0):
  """Ids are not consecutive, some edges come twice or as loops."""
  rng = np.random.default_rng(seed)
  a = rng.integers(0, n, edges)
  b = np.where(
    rng.random(edges) < mixing, rng.integers(0, n, edges), a % groups + groups * rng.integers(0, n // groups, edges)
  )
  return 7 * a - 50, 7 * b - 50


def counting(edges, num_nodes, dim, key):
  """An embedder that needs no compilation: powers of the adjacency times a vector of hashes."""
  draw = np.asarray(jax.random.bits(key, (1,)), np.int64)[0]
  x = se.xxhash64(np.full(num_nodes, draw), np.arange(num_nodes)) / 2.0**63
  columns = []
  for _ in range(dim):
    columns.append(x)
    x = np.bincount(edges[0], x[edges[1]], num_nodes) + np.bincount(edges[1], x[edges[0]], num_nodes)
    x /= np.abs(x).max() + 1e-9
  return np.stack(columns, axis=1)


def simple(src, dst):
  """Distinct undirected edges."""
  return {(min(a, b), max(a, b)) for a, b in zip(src.tolist(), dst.tolist(), strict=True) if a != b}


# ---------------------------------------------------------------------------------------------- reference alone


@pytest.mark.parametrize("options", [{}, {"slack": 0.0}, {"grow_steps": 0, "refine_rounds": 0}, {"parts": 5}])
def test_partition(options):
  options = se.Options(**{"parts": 3, "leaf_nodes": 20} | options)
  src, dst = communities(200, 10, 500)
  ids, ends = np.unique(np.concatenate([src, dst]), return_inverse=True)
  arcs = np.concatenate([ends.reshape(2, -1), ends.reshape(2, -1)[::-1]], axis=1)
  part = partition(arcs[:, arcs[0] != arcs[1]], ids, options)
  # Undo the numbering: child c of p is p * k + c.
  depth, sizes = 0, {0: len(ids)}
  path = [part]
  while path[-1].any():
    path.append(path[-1] // options.parts)
  for labels in reversed(path[:-1]):
    found = dict(zip(*np.unique(labels, return_counts=True), strict=True))
    for parent, size in sizes.items():
      children = {c: s for c, s in found.items() if c // options.parts == parent}
      assert sum(children.values()) == size
      if len(children) > 1:
        assert max(children.values()) <= np.ceil((1 + options.slack) * size / len(children))
    sizes, depth = found, depth + 1
  assert depth > 1 and max(sizes.values()) <= options.leaf_nodes


def test_growth_by_hand():
  """On a path with room, parts are what is nearer to which seed."""
  n = 40
  arcs = np.stack([np.arange(n - 1), np.arange(1, n)])
  arcs = np.concatenate([arcs, arcs[::-1]], axis=1)
  options = se.Options(parts=2, leaf_nodes=39, slack=1.0, grow_steps=n, stall=0.0, refine_rounds=0)
  part = partition(arcs, np.arange(n), options)
  assert (np.diff(part) != 0).sum() == 1 and set(part) == {0, 1}
  draw = se.xxhash64(np.full(n, salt(0, SEEDS, 0, 0, 0)), np.arange(n))
  first, second = np.argsort(draw)[:2]
  assert part[first] == 0 and part[second] == 1
  switch = np.flatnonzero(np.diff(part))[0] + 0.5
  assert abs(switch - (first + second) / 2) <= 0.5


def test_refinement_cuts_fewer_edges():
  src, dst = communities(600, 6, 4000, seed=1)
  options = se.Options(parts=6, leaf_nodes=500, slack=0.2, refine_rounds=0)
  cuts = []
  for rounds in (0, 10):
    changed = options_with(options, refine_rounds=rounds, max_depth=0, stall=0.0)
    level = se.reference(src, dst, changed, embedder=counting).levels[0]
    part = dict(zip(level.nodes.tolist(), level.part.tolist(), strict=True))
    cuts.append(sum(part[a] != part[b] for a, b in simple(src, dst)))
  assert cuts[1] < 0.9 * cuts[0]


def options_with(options, **changes):
  return se.Options(**{**vars(options), **changes})


def test_levels_against_networkx():
  src, dst = communities(300, 6, 1500)
  options = se.Options(dim=64, parts=4, leaf_nodes=60, min_dim=4, max_depth=3)
  for border in ("induced", "cross"):
    result = se.reference(src, dst, options_with(options, border=border), embedder=counting)
    graph, dim = nx.Graph(list(simple(src, dst))), 64
    assert sum(level.dim for level in result.levels) == 64 and len(result.levels) > 1
    start = 0
    for level in result.levels:
      assert set(level.nodes.tolist()) == set(graph)
      assert np.unique(level.part, return_counts=True)[1].max() <= 60
      part = dict(zip(level.nodes.tolist(), level.part.tolist(), strict=True))
      cut = [(a, b) for a, b in graph.edges if part[a] != part[b]]
      on_border = {v for edge in cut for v in edge}
      assert level.border == len(on_border)
      if level is not result.levels[-1]:
        assert level.dim == dim - dim * len(on_border) // (len(graph) + len(on_border))
      outside = ~np.isin(result.nodes, level.nodes)
      assert not result.vectors[outside, start : start + level.dim].any()
      start, dim = start + level.dim, dim - level.dim
      graph = graph.subgraph(on_border) if border == "induced" else nx.Graph(cut)


def test_border_shrinks_on_communities():
  src, dst = communities(2000, 20, 20_000, mixing=0.02)
  options = se.Options(dim=128, parts=5, leaf_nodes=200, min_dim=4, slack=0.3, refine_rounds=10)
  levels = se.reference(src, dst, options, embedder=counting).levels
  sizes = [len(level.nodes) for level in levels]
  assert len(sizes) > 2 and all(b < a for a, b in zip(sizes[:-1], sizes[1:], strict=True))


@pytest.mark.parametrize("graph", [nx.complete_graph(50), nx.star_graph(49), nx.path_graph(50), nx.empty_graph(5)])
@pytest.mark.parametrize("fusion", ["concat", "sum"])
def test_recursion_ends(graph, fusion):
  edges = np.array(list(graph.edges), int).reshape(-1, 2).T
  options = se.Options(dim=8, parts=3, leaf_nodes=10, min_dim=1, max_depth=5, fusion=fusion)
  result = se.reference(*edges, options, nodes=np.arange(len(graph)), embedder=counting)
  assert result.vectors.shape == (len(graph), 8) and np.isfinite(result.vectors).all() and len(result.levels) <= 6


def test_one_part_is_the_base_embedding():
  src, dst = communities()
  result = se.reference(src, dst, se.Options(dim=8, parts=1, leaf_nodes=2, seed=3), embedder=counting)
  nodes, ends = np.unique(np.array(sorted(simple(src, dst))), return_inverse=True)
  z = counting(ends.reshape(-1, 2).T, len(nodes), 8, jax.random.key(se.leaf_seed(3, 0, 0)))
  np.testing.assert_array_equal(result.vectors, z.astype("float32"))
  np.testing.assert_array_equal(result.nodes, nodes)


def test_leaf_ignores_order_and_padding():
  rng = np.random.default_rng(0)
  nodes = np.arange(40) * 3 - 20
  edges = nodes[np.array(sorted({(a, b) for a, b in rng.integers(0, 40, (90, 2)).tolist() if a < b})).T]
  v, z = leaf.embed_leaf(nodes, *edges, 5, 1, se.netmf, True)
  order, shuffled = rng.permutation(edges.shape[1]), rng.permutation(40)
  again = leaf.embed_leaf(nodes[shuffled], *edges[::-1][:, order], 5, 1, se.netmf, True)
  np.testing.assert_array_equal(again[0], nodes)
  np.testing.assert_array_equal(again[1], z)
  assert np.linalg.norm(z, axis=1).mean() == pytest.approx(1, abs=1e-5) and z.shape == (40, 5)
  with pytest.raises(ValueError, match="^embedder: got"):
    leaf.embed_leaf(nodes, *edges, 5, 1, lambda *given: counting(*given)[:, :4], True)


def test_alignment_undoes_a_rotation():
  rng = np.random.default_rng(0)
  border, (rotation, _) = rng.normal(size=(20, 4)), np.linalg.qr(rng.normal(size=(4, 4)))
  some = np.arange(20) < 12
  z = leaf.align((border @ rotation).astype("float32"), np.where(some[:, None], border, 9.0), some)
  np.testing.assert_allclose(z[some], 2 * border[some], atol=1e-5)
  np.testing.assert_allclose(z[~some], border[~some], atol=1e-5)


# -------------------------------------------------------------------------------------------------------- on Spark

spark_test = pytest.mark.xdist_group("spark")


@pytest.fixture(scope="module")
def spark():
  if shutil.which("java") is None:
    pytest.skip("Spark needs Java, and there is no `java` on the path")
  # The machine code of plans that run once is not worth its compilation.
  quick = {
    "spark__driver__extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
    "spark__sql__codegen__wholeStage": False,
  }
  session = se.session("local[2]", memory="1g", shuffle_partitions=2, **quick)
  session.sparkContext.setLogLevel("ERROR")
  cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
  yield session
  session.stop()
  cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def frame(spark, src, dst):
  return spark.createDataFrame(pd.DataFrame({"src": src, "dst": dst}))


def collected(result):
  out = result.vectors.toPandas().sort_values("v")
  return out["v"].to_numpy(), np.stack(out["z"].to_list())


@spark_test
def test_hash_is_sparks(spark):
  a, b = np.array([0, 1, -1, 2**62, -(2**63), 2**63 - 1]), np.arange(6) - 3
  rows = spark.createDataFrame(pd.DataFrame({"a": a, "b": b})).select(F.xxhash64("a", "b")).toPandas()
  np.testing.assert_array_equal(rows.iloc[:, 0], se.xxhash64(a, b))


@spark_test
def test_job_equals_reference_on_any_partitions(spark, monkeypatch):
  """Netmf in JAX inside the workers; and the driver gets no more than a row at a time."""
  src, dst = communities()
  expected = se.reference(src, dst, SMALL, nodes=np.array([4, 5]))
  assert len(expected.levels) > 1
  classic = type(frame(spark, src, dst))
  collect, seen = classic.collect, []
  monkeypatch.setattr(classic, "toPandas", None)
  monkeypatch.setattr(classic, "collect", lambda self: seen.append(collect(self)) or seen[-1])
  results = []
  for partitions, rows in ((2, 1), (5, 3)):
    spark.conf.set("spark.sql.shuffle.partitions", partitions)
    order = np.random.default_rng(partitions).permutation(len(src))
    nodes = spark.createDataFrame([(4,), (5,), (int(src[0]),)], "v int")
    results.append(se.embed(frame(spark, src[order], dst[order]).repartition(rows), SMALL, nodes=nodes))
  spark.conf.set("spark.sql.shuffle.partitions", 2)
  monkeypatch.undo()
  assert max(map(len, seen), default=0) <= 1
  for result in results:
    v, z = collected(result)
    np.testing.assert_array_equal(v, expected.nodes)
    np.testing.assert_array_equal(z, expected.vectors)
    assert not z[np.isin(v, (4, 5))].any() and z.any(axis=1).mean() > 0.8
  found = results[0]
  assert [(one.nodes, one.border, one.dim) for one in found.levels] == [
    (len(one.nodes), one.border, one.dim) for one in expected.levels
  ]
  assert found.levels[0].edges == len(simple(src, dst))
  assert found.labels.count() == sum(one.nodes for one in found.levels)
  sizes = np.concatenate([np.unique(one.part, return_counts=True)[1] for one in expected.levels])
  assert found.peak_nodes == sizes.max() <= SMALL.leaf_nodes and found.peak_edges > 0


@spark_test
def test_sum_and_cross_equal_the_reference(spark):
  src, dst = communities(seed=2)
  options = options_with(SMALL, fusion="sum", border="cross", leaf_nodes=12, last="whole", grow_steps=1)
  expected = se.reference(src, dst, options, embedder=counting)
  assert len(expected.levels) == 2
  v, z = collected(se.embed(frame(spark, src, dst), options, embedder=counting))
  np.testing.assert_array_equal(v, expected.nodes)
  np.testing.assert_array_equal(z, expected.vectors)


@spark_test
def test_bad_frames(spark):
  good = frame(spark, np.arange(3), np.arange(3) + 1)
  for bad in (
    good.withColumnRenamed("dst", "to"),
    good.selectExpr("src", "cast(dst as double) dst"),
    spark.createDataFrame([(1, None), (2, 3)], "src long, dst long"),
    [(1, 2)],
  ):
    with pytest.raises(ValueError, match="^edges: got"):
      se.embed(bad)
  with pytest.raises(ValueError, match="^nodes: got"):
    se.embed(good, nodes=good)
  with pytest.raises(ValueError, match="^options: got 1 parts"):
    se.partition(good, good.selectExpr("src v"), se.Options(parts=1))
  with pytest.raises(ValueError, match="^master: got"):
    se.session("local[1]")
