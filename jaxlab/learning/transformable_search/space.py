"""What is searched: widths of all convolutions and depths of the stages of a CIFAR ResNet, and what they cost."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab import checks
from jaxlab.nn.module import check_images

_FRACTIONS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CHOICES = len(_FRACTIONS)


def width_choices(width: int) -> tuple[int, ...]:
  """The eight widths that a convolution of `width` channels may have, in increasing order.

  Raises:
    ValueError: fewer than eight, as of 8 channels, where 0.5 c and 0.6 c round down to one number.
  """
  checks.count("width", width)
  choices = tuple(sorted({int(width * fraction) for fraction in _FRACTIONS}))
  if len(choices) < CHOICES or choices[0] < 1:
    raise ValueError(
      f"width: got {width}, expected one whose {CHOICES} tenths from 0.3 to 1 round down to unequal numbers"
    )
  return choices


def depth_choices(blocks: int) -> tuple[int, ...]:
  """The depths that a stage of `blocks` blocks may have: 1, 2, 3 or fewer, else the odd ones and the last."""
  checks.count("blocks", blocks, 2)
  return tuple(range(1, blocks + 1)) if blocks <= 3 else tuple(sorted({*range(1, blocks + 1, 2), blocks}))


class Block(NamedTuple):
  """A residual block at full width.

  Attributes:
    stage: 0, 1, 2.
    position: in its stage, from 1.
    stride: 2 where it halves the image.
    first: index of its first convolution; the stem's is 0.
    widths: channels in, then out of each convolution.
    kernels: of the convolutions.
    strides: of the convolutions.
    side: of the image that comes in.
  """

  stage: int
  position: int
  stride: int
  first: int
  widths: tuple[int, ...]
  kernels: tuple[int, ...]
  strides: tuple[int, ...]
  side: int

  @property
  def shortcut(self) -> bool:
    """Whether the full block has a convolution on its shortcut."""
    return self.stride != 1 or self.widths[0] != self.widths[-1]


class Layers(NamedTuple):
  """Every product of a network, so that its cost is the sum of `area * w[source] * w[target]`.

  w is [channels of the image, width of each convolution ..., number of classes].

  Attributes:
    area: multiplications for a pair of channels: window times pixels out.
    source: place in w of the channels in.
    target: place in w of the channels out.
    block: 0, or 1 + the block that it belongs to.
    extra: whether it is a shortcut that only blocks with unequal widths in and out have.
  """

  area: Int[np.ndarray, " l"]
  source: Int[np.ndarray, " l"]
  target: Int[np.ndarray, " l"]
  block: Int[np.ndarray, " l"]
  extra: Int[np.ndarray, " l"]


class Genotype(NamedTuple):
  """A network of a space.

  Attributes:
    widths: channels out of each convolution, the stem's first, also those of blocks beyond the depth.
    depths: blocks of the three stages.
  """

  widths: tuple[int, ...]
  depths: tuple[int, ...]


class Architecture(NamedTuple):
  """Logits of the distributions over widths and depths.

  Attributes:
    widths: [convolutions, 8].
    depths: [3, choices].
  """

  widths: Float[Array, "n 8"]
  depths: Float[Array, "3 d"]


@dataclasses.dataclass(frozen=True)
class Space:
  """A CIFAR ResNet and the choices that it has.

  Attributes:
    blocks: n in each of three stages.
    widths: of the stem, and planes of the stages; a bottleneck puts out four times as many.
    bottleneck: whether blocks are 1x1, 3x3, 1x1 convolutions instead of two 3x3.
    num_classes: logits.
    image_size: side of the images, on which the cost depends; divides by 4.
    in_channels: of the images.
  """

  blocks: int
  widths: tuple[int, int, int, int] = (16, 16, 32, 64)
  bottleneck: bool = False
  num_classes: int = 10
  image_size: int = 32
  in_channels: int = 3

  def __post_init__(self) -> None:
    depth_choices(self.blocks)
    if len(self.widths) != 4:
      raise ValueError(f"widths: got {self.widths}, expected one for the stem and for each of three stages")
    for width in self.widths:
      width_choices(width)
    checks.count("num_classes", self.num_classes)
    checks.count("in_channels", self.in_channels)
    if checks.count("image_size", self.image_size, 4) % 4:
      raise ValueError(f"image_size: got {self.image_size}, expected a multiple of 4, to be halved twice")

  @functools.cached_property
  def layout(self) -> tuple[Block, ...]:
    """All blocks."""
    made, side, width, first = [], self.image_size, self.widths[0], 1
    for stage, planes in enumerate(self.widths[1:]):
      for i in range(self.blocks):
        stride = 2 if stage and i == 0 else 1
        if self.bottleneck:
          block = Block(
            stage, i + 1, stride, first, (width, planes, planes, 4 * planes), (1, 3, 1), (1, stride, 1), side
          )
        else:
          block = Block(stage, i + 1, stride, first, (width, planes, planes), (3, 3), (stride, 1), side)
        made.append(block)
        side, width, first = side // stride, block.widths[-1], first + len(block.kernels)
    return tuple(made)

  @functools.cached_property
  def convolutions(self) -> tuple[int, ...]:
    """Full widths of the stem and of the blocks' convolutions, shortcuts left out."""
    return (self.widths[0], *(width for block in self.layout for width in block.widths[1:]))

  @functools.cached_property
  def table(self) -> Int[np.ndarray, "n 8"]:
    """Widths that each convolution may have."""
    return np.array([width_choices(width) for width in self.convolutions])

  @functools.cached_property
  def depths(self) -> tuple[int, ...]:
    """Depths that a stage may have."""
    return depth_choices(self.blocks)

  @functools.cached_property
  def layers(self) -> Layers:
    """Every product of the full network."""
    rows = [(9 * self.image_size**2, 0, 1, 0, 0)]
    for number, block in enumerate(self.layout):
      side = block.side
      for i, (kernel, stride) in enumerate(zip(block.kernels, block.strides, strict=True)):
        side //= stride
        rows.append(((kernel * side) ** 2, block.first + i, block.first + i + 1, number + 1, 0))
      rows.append((side**2, block.first, block.first + len(block.kernels), number + 1, int(not block.shortcut)))
    last = len(self.convolutions)
    rows.append((1, last, last + 1, 0, 0))
    return Layers(*np.array(rows, np.int64).T)

  @property
  def full(self) -> Genotype:
    """The network that nothing was taken from."""
    return Genotype(self.convolutions, (self.blocks,) * 3)


def resnet(layers: int, num_classes: int = 10, *, bottleneck: bool = False, **changes: Any) -> Space:
  """ResNet of `layers` = 6 n + 2, or 9 n + 2 with bottlenecks; changes are attributes of `Space`."""
  checks.count("layers", layers)
  step = 9 if bottleneck else 6
  if layers % step != 2 or layers < 2 * step:
    raise ValueError(f"layers: got {layers}, expected {step} n + 2 with n of at least 2")
  return Space((layers - 2) // step, bottleneck=bottleneck, num_classes=num_classes, **changes)


# ------------------------------------------------------------------------------------------------------------- its cost


def macs(space: Space, genotype: Genotype, *, connected: bool = True) -> int:
  """Host. Multiplications of a derived network for an image, of convolutions and the dense layer.

  Args:
    space: where it is from.
    genotype: the network.
    connected: False for the count that the search steers by (F, `found_macs`): what follows a stage that is cut short
      is there charged for the width of the last block that was dropped, not of the last one kept.
  """
  check(space, genotype)
  layers, per_block = space.layers, len(space.layout[0].kernels)
  source = layers.source.copy()
  if connected:
    for stage, depth in enumerate(genotype.depths):
      end = 1 + per_block * space.blocks * (stage + 1)
      source[layers.source == end] = end - per_block * (space.blocks - depth)
  keep = [block.position <= genotype.depths[block.stage] for block in space.layout]
  return int(_cost(space, np.array(genotype.widths), np.array(keep), source, extra=True, xp=np))


def expected_macs(space: Space, architecture: Architecture) -> Float[Array, ""]:
  """E_F: `found_macs` with expected widths, and each block's part times the probability that its stage is that deep.

  Shortcuts that only some genotypes have are left out, as in the official code. No noise, no temperature.
  """
  widths = jnp.sum(jax.nn.softmax(architecture.widths.astype(jnp.float32)) * space.table, -1)
  depths = jax.nn.softmax(architecture.depths.astype(jnp.float32))
  at_least = jnp.cumsum(depths[:, ::-1], 1)[:, ::-1]  # P(the stage is no shallower than each choice)
  return _cost(space, widths, at_least[_stages(space), _covers(space)], space.layers.source, extra=False, xp=jnp)


def found_macs(space: Space, architecture: Architecture) -> Float[Array, ""]:
  """F: the cost of the most likely genotype, as `macs(..., connected=False)` counts it."""
  widths = jnp.asarray(space.table)[jnp.arange(len(space.table)), jnp.argmax(architecture.widths, -1)]
  depth = jnp.argmax(architecture.depths, -1)
  keep = _covers(space) <= depth[_stages(space)]
  return _cost(space, widths.astype(jnp.float32), keep, space.layers.source, extra=True, xp=jnp)


def _cost(space: Space, widths: Any, keep: Any, source: np.ndarray, *, extra: bool, xp: Any) -> Any:
  layers = space.layers
  w = xp.concatenate([xp.array([space.in_channels]), widths, xp.array([space.num_classes])])
  keep = xp.concatenate([xp.array([1]), keep])[layers.block]
  there = xp.where(layers.extra == 1, (w[source] != w[layers.target]) & extra, True)
  area = layers.area if xp is np else layers.area.astype(np.float32)
  return xp.sum(area * w[source] * w[layers.target] * keep * there)


def _stages(space: Space) -> np.ndarray:
  return np.array([block.stage for block in space.layout])


def _covers(space: Space) -> np.ndarray:
  """For each block the first choice of depth that has it."""
  return np.searchsorted(space.depths, [block.position for block in space.layout])


# ----------------------------------------------------------------------------------------------------------- genotypes


def initial(space: Space, key: Array) -> Architecture:
  """Logits from a normal distribution of deviation 0.01."""
  width_key, depth_key = jax.random.split(key)
  return Architecture(
    0.01 * jax.random.normal(width_key, space.table.shape),
    0.01 * jax.random.normal(depth_key, (3, len(space.depths))),
  )


def extract(space: Space, architecture: Architecture) -> Genotype:
  """Host. The most likely widths and depths."""
  check_architecture(space, architecture)
  widths = space.table[np.arange(len(space.table)), np.argmax(np.asarray(architecture.widths), -1)]
  depths = np.array(space.depths)[np.argmax(np.asarray(architecture.depths), -1)]
  return Genotype(tuple(widths.tolist()), tuple(depths.tolist()))


def uniform(space: Space, budget: float) -> Genotype:
  """Host. The network of full depth that has one fraction of all widths, and costs at most `budget`.

  Widths are rounded down; those of a stage's residual stream together, then the others one by one, are rounded up
  instead, from the last on, as long as the budget lasts.

  Raises:
    ValueError: a budget below that of one channel everywhere.
  """
  full, depths = space.convolutions, space.full.depths
  narrowed = lambda f: [max(1, int(f * width)) for width in full]
  fits = lambda widths: macs(space, Genotype(tuple(widths), depths)) <= budget
  if not fits(narrowed(0.0)):
    raise ValueError(f"budget: got {budget}, expected at least that of one channel in each convolution")
  low, high = 0.0, 1.0
  for _ in range(40):
    middle = (low + high) / 2
    low, high = (middle, high) if fits(narrowed(middle)) else (low, middle)
  widths = narrowed(1.0) if fits(full) else narrowed(low)
  streams: dict[int, list[int]] = {stage: [] for stage in range(-1, 3)}
  streams[0 if full[0] == full[space.layout[0].first + len(space.layout[0].kernels) - 1] else -1].append(0)
  inner = []
  for block in space.layout:
    last = block.first + len(block.kernels) - 1
    streams[block.stage].append(last)
    inner += [[i] for i in range(block.first, last)]
  for group in (*(streams[stage] for stage in (2, 1, 0, -1)), *inner[::-1]):
    wider = [width + (i in group and width < full[i]) for i, width in enumerate(widths)]
    widths = wider if fits(wider) else widths
  return Genotype(tuple(widths), depths)


def random(
  space: Space, budget: float, rng: np.random.Generator, *, tolerance: float = 0.01, attempts: int = 100_000
) -> Genotype:
  """Host. Widths and depths drawn evenly from all choices, until they cost `budget` up to a `tolerance` of it.

  Args:
    space: the choices.
    budget: multiplications.
    rng: of the draws.
    tolerance: over the budget.
    attempts: draws.

  Raises:
    ValueError: nothing that fits among all attempts.
  """
  checks.real("tolerance", tolerance)
  for _ in range(attempts):
    widths = space.table[np.arange(len(space.table)), rng.integers(CHOICES, size=len(space.table))]
    depths = rng.choice(space.depths, 3)
    genotype = Genotype(tuple(widths.tolist()), tuple(depths.tolist()))
    if abs(macs(space, genotype) - budget) <= tolerance * budget:
      return genotype
  raise ValueError(f"budget: got {budget}, expected a cost that genotypes of this space come near to")


def check(space: Space, genotype: Genotype) -> None:
  """Raises a ValueError unless the genotype is one of the space; its widths may be any up to the full ones."""
  widths, full = genotype.widths, space.convolutions
  inside = lambda value, most: isinstance(value, int | np.integer) and 1 <= value <= most
  if len(widths) != len(full) or not all(map(inside, widths, full)):
    raise ValueError(f"genotype: got widths {widths}, expected {len(full)} integers from 1 to {full}")
  if len(genotype.depths) != 3 or not all(inside(depth, space.blocks) for depth in genotype.depths):
    raise ValueError(f"genotype: got depths {genotype.depths}, expected three integers from 1 to {space.blocks}")


def check_inputs(space: Space, images: Array) -> None:
  """Raises a ValueError unless these are images of the space, whose costs are those of its image size."""
  check_images(images, space.in_channels)
  if images.shape[1:3] != (space.image_size,) * 2:
    raise ValueError(f"images: got {images.shape[1:3]} pixels, expected the space's image_size, {space.image_size}")


def check_architecture(space: Space, architecture: Architecture) -> None:
  """Raises a ValueError unless the logits are those of the space."""
  got = architecture.widths.shape, architecture.depths.shape
  expected = space.table.shape, (3, len(space.depths))
  if got != expected:
    raise ValueError(f"architecture: got logits of shapes {got}, expected {expected}")


# What the official code released (`configs/NeurIPS-2019`): depths, and of each convolution which of its eight widths.
_REFERENCES = {
  "C10-R20": ((3, 3, 3), "7100000771376777774"),
  "C10-R32": ((5, 5, 5), "7105007331677036073707777777232"),
  "C10-R56": ((5, 5, 5), "7776437571702061000777777467730320520777777777500200201"),
  "C10-R110": (
    (11, 11, 9),
    "7676777776777577737270700070000110140777777776776444775600610170041201000777777777777777371000001200110033005",
  ),
  "C10-R164": (
    (13, 15, 13),
    "7277177677277077177177447067006077356077026115104106110777777777077777566177777777775677277637701215146011120"
    "777777777777777777777777777777765714015403310022050620",
  ),
  "C100-R20": ((3, 3, 3), "7000010770376777777"),
  "C100-R32": ((5, 5, 5), "7001410200077066666777777777777"),
  "C100-R56": ((5, 5, 7), "7736767272600020100777677747770535100777777777500001300"),
  "C100-R110": (
    (13, 9, 11),
    "7674677473657772767504700075020301600777766777776765777007705676007110410777777777777777476000010101001000110",
  ),
  "C100-R164": (
    (15, 15, 15),
    "7776147015137027067027027157177277657077067477067407000577676677577777577177577677567777637777367037604637020"
    "777777777777777777777777777775774771771400000030133416",
  ),
}


def reference(name: str) -> tuple[Space, Genotype]:
  """A network that the authors found, such as "C10-R32": for CIFAR-10 or C100; R20, R32, R56, R110 or R164."""
  depths, digits = _REFERENCES[checks.choice("name", name, tuple(_REFERENCES))]
  dataset, layers = name.split("-R")
  space = resnet(int(layers), int(dataset[1:]), bottleneck=layers == "164")
  return space, Genotype(tuple(int(space.table[i, int(d)]) for i, d in enumerate(digits)), depths)


REFERENCES: tuple[str, ...] = tuple(_REFERENCES)
