"""The Spark job: recursion over border graphs, one task for each leaf, fusion; nothing large reaches the driver."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pyspark.accumulators import Accumulator, AccumulatorParam
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jaxlab import checks
from jaxlab.graph.embedding.spark_embedding import leaf
from jaxlab.graph.embedding.spark_embedding.options import Options, leaf_seed, shrinks
from jaxlab.graph.embedding.spark_embedding.partition import kept, partition, stored

_VECTORS = "level int, part long, v long, z array<float>"


class Level(NamedTuple):
  """One level of the recursion: counts of nodes, edges and border nodes, and columns of its vectors."""

  nodes: int
  edges: int
  border: int
  dim: int


class Result(NamedTuple):
  """What `embed` returns.

  Attributes:
    vectors: (v long, z array<float> of `dim`), a row for each node; not yet computed but from stored pieces.
    labels: (level, part, v), a row for each node of each level.
    levels: counts, from the whole graph to the last border.
    peak_nodes: of the largest subgraph that a task embedded.
    peak_edges: likewise, which need not be the same.
  """

  vectors: DataFrame
  labels: DataFrame
  levels: tuple[Level, ...]
  peak_nodes: int
  peak_edges: int


def session(
  master: str = "local[*]", *, memory: str = "4g", shuffle_partitions: int = 16, **config: Any
) -> SparkSession:
  """A Spark session whose workers run this Python, with one thread each.

  Args:
    master: `local[n]` for n threads of this machine, or the URL of a cluster whose machines have this library.
    memory: heap of the driver and of each executor, where Spark keeps nodes and edges; what does not fit is on disk.
      Python workers come on top, and need what a leaf needs.
    shuffle_partitions: of a shuffle. A task joins about nodes / shuffle_partitions labels in memory.
    config: further settings, with "__" for each dot.

  Raises:
    ValueError: an argument out of range, or a session that runs already, whose memory could not be set.
  """
  checks.count("shuffle_partitions", shuffle_partitions, 1)
  if SparkSession.getActiveSession() is not None:
    raise ValueError("master: got a session that runs already, expected none; stop it first")
  # Workers must find the libraries of this process, and are forked before they import JAX.
  os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
  settings: dict[str, Any] = {
    "spark.driver.memory": memory,
    "spark.executor.memory": memory,
    "spark.sql.shuffle.partitions": str(shuffle_partitions),
    "spark.python.worker.reuse": "true",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.executorEnv.JAX_PLATFORMS": "cpu",
    "spark.executorEnv.OMP_NUM_THREADS": "1",
    "spark.executorEnv.OPENBLAS_NUM_THREADS": "1",
    "spark.executorEnv.NPROC": "1",  # threads of XLA
  }
  if master.startswith("local"):
    settings |= {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
  settings |= {key.replace("__", "."): str(value) for key, value in config.items()}
  builder = SparkSession.builder.master(master).appName("spark_embedding")
  return builder.config(map=settings).getOrCreate()


def embed(
  edges: DataFrame,
  options: Options = Options(),
  *,
  nodes: DataFrame | None = None,
  embedder: leaf.Embedder = leaf.netmf,
) -> Result:
  """Embeds every node of an undirected graph.

  The partition of all levels comes first, then all leaves of all levels in one stage, then the fusion.

  Args:
    edges: (src, dst) of integers, in any order and direction; loops and repeated edges are dropped.
    options: how to split, embed and fuse.
    nodes: (v) of integers; those without edges have vectors of zeros, which is all they are needed for.
    embedder: function (edges [2, E], num_nodes, dim, key) -> [num_nodes, dim] that embeds a leaf in a Python worker;
      its edges are there once each, in lexical order, between nodes numbered from 0. It must be picklable.

  Raises:
    ValueError: columns of another name or type, or ids that are null.
  """
  edges = _integers("edges", edges, ("src", "dst"))
  if nodes is not None:
    nodes = _integers("nodes", nodes, ("v",)).distinct()
  with _fixed_plans(edges.sparkSession), contextlib.ExitStack() as stack:
    return _embed(edges, options, nodes, embedder, lambda frame: kept(frame, stack))


def _embed(
  edges: DataFrame,
  options: Options,
  nodes: DataFrame | None,
  embedder: leaf.Embedder,
  keep: Callable[[DataFrame], DataFrame],
) -> Result:
  spark = edges.sparkSession
  partitions = int(spark.conf.get("spark.sql.shuffle.partitions"))  # type: ignore[arg-type]
  ends = [F.least("src", "dst").alias("src"), F.greatest("src", "dst").alias("dst")]
  edges = edges.filter("src != dst").select(*ends).distinct()
  arc = F.explode(F.array(F.struct("src", "dst"), F.struct(F.col("dst").alias("src"), F.col("src").alias("dst"))))
  arcs = keep(edges.select(arc.alias("arc")).select("arc.*").repartition(partitions, "src"))
  members, found = stored(arcs.select(F.col("src").alias("v")).distinct())

  levels: list[Level] = []
  labels: list[DataFrame] = []
  inner: list[DataFrame] = []
  dim, worth, count = options.dim, True, found["count"]
  scale = not options.is_leaf(count)  # the whole graph in one task has the base embedding as it is
  while True:
    level = len(levels)
    part = members.select("v", F.lit(0).cast("long").alias("part"))
    last = options.is_last(dim, count, level, worth)
    if not options.is_whole(count, level, last):
      part = partition(arcs, members, options, level)
    both = arcs
    for end in ("src", "dst"):
      both = both.join(part.select(F.col("v").alias(end), F.col("part").alias(f"{end}_part")).hint("shuffle_hash"), end)
    both = keep(both)
    cut = both.filter("src_part != dst_part").select("src", "dst")
    within = both.filter("src_part = dst_part and src < dst").select(F.col("src_part").alias("part"), "src", "dst")
    labels.append(part.select(F.lit(level).alias("level"), "part", "v"))
    inner.append(within.select(F.lit(level).alias("level"), "part", "src", "dst"))
    border, found = stored(cut.select(F.col("src").alias("v")).distinct())
    border_count = found["count"]
    dim_border = 0 if last else options.border_dim(dim, count, border_count)
    own = dim - dim_border if options.fusion == "concat" else dim
    levels.append(Level(count, both.filter("src < dst").count(), border_count, own))
    if not dim_border:
      break
    arcs = cut if options.border == "cross" else arcs
    for end in ("dst", "src") if options.border == "induced" else ():
      arcs = arcs.join(border.select(F.col("v").alias(end)).hint("shuffle_hash"), end)
    arcs = keep(arcs.select("src", "dst").repartition(partitions, "src"))
    dim, worth, members, count = dim_border, shrinks(count, border_count), border, border_count

  everyone, zero = _union(labels), spark.sparkContext.accumulator
  peaks = zero(0, _Maximum()), zero(0, _Maximum())
  everyone_apart, edges_apart = (f.repartition(partitions, "level", "part") for f in (everyone, _union(inner)))
  dims = [one.dim for one in levels]
  vectors = _embed_leaves(everyone_apart, edges_apart, dims, options.seed, embedder, scale, peaks)
  vectors = vectors.localCheckpoint()
  fused = _concat(vectors, dims) if options.fusion == "concat" else _sum(vectors, len(levels))
  if nodes is not None:
    alone = nodes.join(labels[0].select("v"), "v", "left_anti")
    fused = fused.union(alone.select("v", _zeros(options.dim).alias("z")))
  return Result(fused, everyone, tuple(levels), peaks[0].value, peaks[1].value)


def _embed_leaves(
  members: DataFrame,
  edges: DataFrame,
  dims: list[int],
  seed: int,
  embedder: leaf.Embedder,
  scale: bool,
  peaks: tuple[Accumulator, Accumulator],
) -> DataFrame:
  """(level, part, v, z): one group of nodes and edges, and so one call, for each part of each level."""

  def run(key: tuple[Any, ...], nodes: pd.DataFrame, edges: pd.DataFrame) -> pd.DataFrame:
    level, part = (int(number) for number in key)
    peaks[0].add(len(nodes))
    peaks[1].add(len(edges))
    ends = edges["src"].to_numpy(), edges["dst"].to_numpy()
    v, z = leaf.embed_leaf(nodes["v"].to_numpy(), *ends, dims[level], leaf_seed(seed, level, part), embedder, scale)
    return pd.DataFrame({"level": np.int32(level), "part": part, "v": v, "z": list(z)})

  nodes, inside = (frame.groupBy("level", "part") for frame in (members, edges))
  return nodes.cogroup(inside).applyInPandas(run, _VECTORS)


def _concat(vectors: DataFrame, dims: list[int]) -> DataFrame:
  """(v, z): blocks of all levels in order, zeros where a node is not on a level."""
  blocks = [
    F.coalesce(F.first(F.when(F.col("level") == number, F.col("z")), ignorenulls=True), _zeros(dim))
    for number, dim in enumerate(dims)
  ]
  return vectors.groupBy("v").agg(F.concat(*blocks).alias("z"))


def _sum(vectors: DataFrame, count: int) -> DataFrame:
  """(v, z): from the last level up, each part is rotated to the border's frame and the border's vectors are added."""

  def run(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows.sort_values("v")
    internal = np.stack(rows["z"].to_list())
    on_border = rows["border"].notna().to_numpy()
    border = np.zeros_like(internal)
    if on_border.any():
      border[on_border] = np.stack(rows["border"][on_border].to_list())
    return pd.DataFrame({"v": rows["v"].to_numpy(), "z": list(leaf.align(internal, border, on_border))})

  total = vectors.filter(F.col("level") == count - 1).select("v", "z")
  for level in reversed(range(count - 1)):
    mine = vectors.filter(F.col("level") == level).join(total.withColumnRenamed("z", "border"), "v", "left")
    total = mine.groupBy("part").applyInPandas(run, "v long, z array<float>").localCheckpoint()
  return total


def _zeros(dim: int) -> Any:
  return F.array_repeat(F.lit(0.0).cast("float"), dim)


def _union(frames: list[DataFrame]) -> DataFrame:
  first, *others = frames
  for frame in others:
    first = first.union(frame)
  return first


def _integers(name: str, frame: DataFrame, columns: tuple[str, ...]) -> DataFrame:
  """These columns as longs."""
  if not isinstance(frame, DataFrame):
    raise ValueError(f"{name}: got a {type(frame).__name__}, expected a Spark data frame of columns {columns}")
  types = dict(frame.dtypes)
  if any(types.get(column) not in ("tinyint", "smallint", "int", "bigint") for column in columns):
    raise ValueError(f"{name}: got columns {types}, expected integers in {columns}")
  if not frame.filter(" or ".join(f"{column} is null" for column in columns)).isEmpty():
    raise ValueError(f"{name}: got ids that are null, expected none")
  return frame.select(*(F.col(column).cast("long") for column in columns))


@contextlib.contextmanager
def _fixed_plans(spark: SparkSession) -> Iterator[None]:
  """Without adaptive execution, which plans each of many short steps anew, and merges leaves into few tasks."""
  name = "spark.sql.adaptive.enabled"
  before = spark.conf.get(name)
  spark.conf.set(name, "false")
  try:
    yield
  finally:
    spark.conf.set(name, before)  # type: ignore[arg-type]


class _Maximum(AccumulatorParam):
  """The largest number that any task adds."""

  def zero(self, value: int) -> int:
    """As it is."""
    return value

  def addInPlace(self, value1: int, value2: int) -> int:
    """Of two."""
    return max(value1, value2)
