"""Even-sized parts of a graph by Spark: growth from random seeds, then label propagation between parts with room.

Each superstep is a join of arcs and labels, a count of votes and an admission. All randomness is a hash of the seed
and of node ids, and equal votes are resolved by it, so that no result depends on how Spark distributes rows.
"""

import contextlib
import decimal

from pyspark.sql import Column, DataFrame, Row, Window
from pyspark.sql import functions as F

from jaxlab.graph.embedding.spark_embedding.options import ADMISSION, LEFT, SEEDS, TIES, TURNS, Options, salt


def partition(arcs: DataFrame, nodes: DataFrame, options: Options, level: int = 0) -> DataFrame:
  """Parts of nearly even size, none larger than `leaf_nodes`.

  All nodes are split into `parts`; then parts that are too large are split again, all at once, into as many as they
  need. A part of a split holds at most ceil((1 + slack) size / children) nodes.

  Args:
    arcs: (src, dst) longs, both directions of each edge, no loops.
    nodes: (v) long, all different.
    options: of the split; at least two parts.
    level: of the recursion, so that each level draws anew.

  Returns:
    (v, part) longs, a row for each node. Child c of part p is p * parts + c.
  """
  if options.parts < 2:
    raise ValueError(f"options: got {options.parts} parts, expected at least 2")
  labels, round_ = nodes.select("v", F.lit(0).cast("long").alias("part")), 0
  with contextlib.ExitStack() as stack:
    while True:
      size = F.count("*")
      wanted = F.ceil(size * F.lit(1 + options.slack) / F.lit(options.leaf_nodes))
      wanted = size if round_ == 0 else F.when(size <= options.leaf_nodes, 1).otherwise(wanted)
      children = F.least(F.lit(options.parts), wanted).cast("long")
      groups = labels.groupBy(F.col("part").alias("parent")).agg(size.alias("size"), children.alias("children"))
      cap = F.ceil(F.col("size") * F.lit(1 + options.slack) / F.col("children"))
      groups, found = stored(groups.select("parent", "children", cap.alias("cap")), F.max("children").alias("most"))
      if found["most"] == 1:
        return labels
      state, _ = stored(labels.withColumnRenamed("part", "parent").join(_small(groups), "parent"))
      if round_:
        arcs = kept(_within(arcs, state.filter("children > 1")), stack)
      labels = _split(arcs, state, options, level, round_)
      round_ += 1


def kept(frame: DataFrame, stack: contextlib.ExitStack) -> DataFrame:
  """A large frame, stored by columns from its first use until the stack closes."""
  stack.callback(frame.persist().unpersist)
  return frame


def stored(frame: DataFrame, *what: Column) -> tuple[DataFrame, Row]:
  """A frame that is computed once and forgets where it comes from; and its number of rows, `count`, with aggregates.

  A checkpoint alone inherits the estimate of its size, to which each join is a product: in a loop its digits double
  with each step, and soon planning takes for ever. Of what lies in the cache the size is known.
  """
  frame.persist()
  row = frame.agg(F.count("*").alias("count"), *what).first()
  assert row is not None
  result = frame.select("*").localCheckpoint()
  frame.unpersist()
  return result, row


def _within(arcs: DataFrame, split: DataFrame) -> DataFrame:
  """Arcs inside parents that are split."""
  for end in ("dst", "src"):
    labels = split.select(F.col("v").alias(end), F.col("parent").alias(f"{end}_parent"))
    arcs = arcs.join(_small(labels), end)
  return arcs.filter("src_parent = dst_parent").select("src", "dst")


def _split(arcs: DataFrame, state: DataFrame, options: Options, level: int, round_: int) -> DataFrame:
  """Labels (v, part) from a state (v, parent, children, cap): grow, place what is left, refine."""

  def hashed(purpose: int, step: int, *columns: str) -> Column:
    # Spark writes numbers into the code it generates, but not decimals, which have the hash of a long: with them all
    # steps share their code, which is compiled once.
    draw = decimal.Decimal(salt(options.seed, purpose, level, round_, step))
    return F.xxhash64(F.lit(draw).cast("decimal(18,0)"), *columns)

  # Seeds. The inequality with a constant lets Spark keep few rows of each partition before it shuffles.
  seeds = state.filter("children > 1")
  seeds = seeds.withColumn("rank", _rank("parent", hashed(SEEDS, 0, "v"), "v")).filter(F.col("rank") <= options.parts)
  seeds = seeds.filter("rank <= children").select(
    "v", (F.col("parent") * options.parts + F.col("rank") - 1).alias("new")
  )
  first = F.when(F.col("children") == 1, F.col("parent") * options.parts).otherwise(F.col("new"))
  state = state.join(seeds, "v", "left").withColumn("part", first).drop("new")
  state, _ = stored(state.withColumn("fresh", F.col("part").isNotNull()))

  moved, unplaced = F.count_if("fresh").alias("moved"), F.count_if(F.col("part").isNull()).alias("left")
  stalled, left = False, None
  for step in range(options.grow_steps):
    voters = _with_room(state, "part is not null").filter("fresh and room > 0")
    open_ = _small(state.filter("part is null").select("v"))
    votes = _ballots(arcs, voters).join(open_, "v").groupBy("v", "part").agg(F.count("*").alias("score"), _the("room"))
    votes = votes.withColumn("tie", hashed(TIES, step, "v", "part"))
    best = votes.groupBy("v").agg(F.max(F.struct("score", "tie", "part", "room")).alias("best")).select("v", "best.*")
    state, count = stored(_move(state, _admitted(best, hashed(ADMISSION, step, "v"))), moved, unplaced)
    left, slow = count["left"], options.is_slow(count["moved"], count["count"])
    if not left or (stalled and slow):
      break
    stalled = slow
    if stalled:
      state = state.withColumn("fresh", F.col("part").isNotNull())

  if left is None or left:
    state, _ = stored(_place(state, hashed(LEFT, 0, "v")))

  for step in range(options.refine_rounds):
    voters = _with_room(state, "true")
    turn = [F.pmod(hashed(TURNS, step, node), F.lit(2)) == 0 for node in ("dst", "v")]
    movers = _small(state.filter(turn[1]).filter("children > 1").select("v", F.col("part").alias("own")))
    votes = _ballots(arcs.filter(turn[0]), voters).join(movers, "v")
    votes = votes.groupBy("v", "own", "part").agg(F.count("*").alias("votes"), _the("room"))
    score = F.when(F.col("room") > 0, F.col("votes")).otherwise(0)
    votes = votes.withColumn("score", score).withColumn("tie", hashed(TIES, options.grow_steps + step, "v", "part"))
    stay = F.coalesce(F.max(F.when(F.col("part") == F.col("own"), F.col("votes"))), F.lit(0))
    most = F.max(F.struct("score", "tie", "part", "room"))
    best = votes.groupBy("v", "own").agg(most.alias("best"), stay.alias("stay")).filter("best.score > stay")
    admitted = _admitted(best.select("v", "best.*"), hashed(ADMISSION, options.grow_steps + step, "v"))
    state, count = stored(_move(state, admitted), moved)
    if options.is_slow(count["moved"], count["count"]):
      break
  return state.select("v", "part")


def _small(frame: DataFrame) -> DataFrame:
  """The side of a join to hash, so that arcs are streamed and never sorted."""
  return frame.hint("shuffle_hash")


def _the(column: str) -> Column:
  """The value of a column that is the same throughout a group."""
  return F.max(column).alias(column)


def _rank(group: str, *order: Column | str) -> Column:
  """From 1, within a group."""
  return F.row_number().over(Window.partitionBy(group).orderBy(*order))


def _with_room(state: DataFrame, condition: str) -> DataFrame:
  """State of nodes that have a part, and how many more nodes that part may take."""
  state = state.filter(condition)
  rooms = state.groupBy("part").agg((F.max("cap") - F.count("*")).alias("room"))
  return state.join(_small(rooms), "part")


def _ballots(arcs: DataFrame, voters: DataFrame) -> DataFrame:
  """(v, part, room): a row for each arc from a voter."""
  voters = voters.select(F.col("v").alias("src"), "part", "room")
  return arcs.join(_small(voters), "src").select(F.col("dst").alias("v"), "part", "room")


def _admitted(candidates: DataFrame, order: Column) -> DataFrame:
  """(v, new): as many candidates of each part as there is room for."""
  ranked = candidates.withColumn("rank", _rank("part", order, "v"))
  return ranked.filter("rank <= room").select("v", F.col("part").alias("new"))


def _move(state: DataFrame, moved: DataFrame) -> DataFrame:
  """The state with new parts."""
  state = state.join(_small(moved), "v", "left")
  state = state.withColumn("part", F.coalesce("new", "part")).withColumn("fresh", F.col("new").isNotNull())
  return state.drop("new")


def _place(state: DataFrame, order: Column) -> DataFrame:
  """Puts each node without part into its parent's smallest part at that moment.

  A part of s nodes offers places s, s + 1, ... below its cap; nodes in hash order take places in ascending order.
  """
  parts = state.filter("part is not null and children > 1").groupBy("part", "parent")
  sizes = parts.agg(F.count("*").alias("size"), _the("cap")).filter("size < cap")
  free = sizes.select("part", "parent", F.explode(F.expr("sequence(size, cap - 1)")).alias("place"))
  free = free.select(F.col("part").alias("new"), "parent", _rank("parent", "place", "part").alias("rank"))
  left = state.filter("part is null").select("v", "parent", _rank("parent", order, "v").alias("rank"))
  return _move(state, left.join(free, ["parent", "rank"]).select("v", "new"))
