"""What the Spark job and its single-process reference agree on: options, dimensions, hashes and random keys."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int

from jaxlab import checks

Border = Literal["induced", "cross"]
Fusion = Literal["concat", "sum"]
Last = Literal["parts", "whole"]

# Where randomness is drawn: different numbers give independent draws.
SEEDS, TIES, ADMISSION, LEFT, TURNS, LEAF = range(6)
_P1, _P2, _P3, _P4, _P5 = (
  np.uint64(p)
  for p in (
    0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
  )
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
  """How to split, embed and fuse. The paper's own settings are not known; the defaults are this library's choice.

  Attributes:
    dim: d, columns of the result.
    parts: k, parts of the first split; 1 embeds the whole graph in one task.
    leaf_nodes: largest subgraph that a task embeds. Larger parts are split again.
    min_dim: a level of fewer than twice as many columns has no border of its own.
    max_depth: border graphs within border graphs; 0 is "partition only".
    slack: a part of a split holds up to (1 + slack) times its even share of nodes.
    grow_steps: supersteps of the growth, each one hop; what is not reached then goes to the smallest part.
    refine_rounds: rounds of label propagation after the growth, in each of which half of the nodes may move.
    stall: growth and refinement end when a step moves no larger share of the nodes; 0 for graphs of large diameter.
    border: graph on the border nodes: "induced", or only edges between parts, "cross".
    fusion: "concat" levels, their dimensions in proportion to their nodes; or "sum" levels of full dimension, each
      part rotated (orthogonal Procrustes on its border nodes) to the frame of the border.
    last: the last border is embedded in "parts" if it has more than `leaf_nodes`, or "whole" in one task, which then
      needs memory for a graph that nothing bounds but gives all border nodes one frame.
    seed: of partition and embedding.
  """

  dim: int = 128
  parts: int = 8
  leaf_nodes: int = 1500
  min_dim: int = 16
  max_depth: int = 3
  slack: float = 0.1
  grow_steps: int = 32
  refine_rounds: int = 5
  stall: float = 0.01
  border: Border = "induced"
  fusion: Fusion = "concat"
  last: Last = "parts"
  seed: int = 0

  def __post_init__(self):
    """Raises ValueError for what is out of range."""
    for name, least in (("dim", 1), ("parts", 1), ("leaf_nodes", 2), ("min_dim", 1), ("max_depth", 0)):
      checks.count(name, getattr(self, name), least)
    for name, least in (("grow_steps", 0), ("refine_rounds", 0), ("seed", 0)):
      checks.count(name, getattr(self, name), least, 2**31 - 1)
    checks.real("slack", self.slack, 0.0, 10.0)
    checks.real("stall", self.stall)
    checks.choice("border", self.border, Border)
    checks.choice("fusion", self.fusion, Fusion)
    checks.choice("last", self.last, Last)

  def border_dim(self, dim: int, nodes: int, border: int) -> int:
    """d_B: columns for the border among `dim` of a level."""
    return dim if self.fusion == "sum" and border else dim * border // (nodes + border)

  def is_last(self, dim: int, nodes: int, depth: int, shrinks: bool) -> bool:
    """Whether a level has no border: a leaf, too few columns, too deep, or hardly smaller than the one before."""
    return (
      self.is_leaf(nodes)
      or (self.fusion == "concat" and dim < 2 * self.min_dim)
      or depth >= self.max_depth
      or not shrinks
    )

  def is_slow(self, moved: int, nodes: int) -> bool:
    """Whether a step of the partition moved so few nodes that it is not worth another."""
    return moved <= self.stall * nodes

  def is_leaf(self, nodes: int) -> bool:
    """Whether a graph is small enough to be embedded as it is."""
    return nodes <= self.leaf_nodes or self.parts == 1

  def is_whole(self, nodes: int, depth: int, last: bool) -> bool:
    """Whether a graph is embedded in one task."""
    return self.is_leaf(nodes) or (self.last == "whole" and last and depth > 0)


def shrinks(nodes: int, border: int) -> bool:
  """Whether a border is worth a recursion of its own."""
  return border <= 0.95 * nodes


def salt(*numbers: int) -> int:
  """A number of up to 18 decimal digits from small ones: seed, purpose, level, round, step."""
  return int(xxhash64(*(np.array([n]) for n in numbers))[0]) % 10**18


def leaf_seed(seed: int, level: int, part: int) -> int:
  """What the key of a leaf is made of: `jax.random.key(leaf_seed(...))`. Of the whole graph: level 0, part 0."""
  return salt(seed, LEAF, level, part) & 0x7FFFFFFF


def xxhash64(*columns: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
  """Host. What Spark's `xxhash64` gives for columns of longs: XXH64 of each, seeded by the one before, 42 at first."""
  h = np.uint64(42)
  with np.errstate(over="ignore"):
    for column in columns:
      h = h + _P5 + np.uint64(8)
      h = h ^ (_rotate(np.asarray(column).astype(np.int64).view(np.uint64) * _P2, 31) * _P1)
      h = _rotate(h, 27) * _P1 + _P4
      for shift, prime in ((33, _P2), (29, _P3)):
        h = (h ^ (h >> np.uint64(shift))) * prime
      h = h ^ (h >> np.uint64(32))
  return np.asarray(h).view(np.int64)


def _rotate(x, bits):
  return (x << np.uint64(bits)) | (x >> np.uint64(64 - bits))
