"""Point clouds on the surfaces of parametric solids, with their kinds and parts; turning and stretching of clouds.

A solid is a list of triangles drawn from the random proportions of its kind, and points are uniform on it, so density
tells nothing about curvature or part. Curved surfaces are meshes of 48 by about 24 facets.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import scipy.spatial.transform
from jaxtyping import Float, Int

from jaxlab import checks

# Kinds and their parts. A superquadric and a box have one part each: nothing in them is to be told apart.
PARTS: dict[str, tuple[str, ...]] = {
  "superquadric": ("superquadric",),
  "torus": ("outside", "inside"),
  "cone": ("side", "base"),
  "cylinder": ("side", "caps"),
  "capsule": ("body", "domes"),
  "box": ("box",),
  "L": ("long arm", "short arm"),
  "T": ("stem", "bar"),
  "U": ("base", "arms"),
  "mug": ("wall", "bottom", "handle"),
}
KINDS = tuple(PARTS)
PARTED = tuple(kind for kind, parts in PARTS.items() if len(parts) > 1)

Turn = Literal["none", "z", "so3"]

_FACETS = 48  # around an axis


class Clouds(NamedTuple):
  """Clouds of the same number of points.

  Attributes:
    points: [B, N, 3] float32, centred, the farthest point at distance 1.
    label: [B], index into the kinds asked for.
    part: [B, N], index into the parts of these kinds, as `part_ranges` numbers them.
  """

  points: Float[np.ndarray, "b n 3"]
  label: Int[np.ndarray, " b"]
  part: Int[np.ndarray, "b n"]


class Mesh(NamedTuple):
  """Triangles, and to which part of the solid each belongs."""

  triangles: Float[np.ndarray, "t 3 3"]
  part: Int[np.ndarray, " t"]


def part_ranges(kinds: Sequence[str]) -> list[range]:
  """The numbers of the parts of each kind: consecutive, in the order of `kinds`."""
  ends = np.cumsum([0, *(len(PARTS[checks.choice("kinds", kind, KINDS)]) for kind in kinds)])
  return [range(a, b) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


def solids(count: int, num_points: int, *, kinds: Sequence[str] = KINDS, seed: int = 0) -> Clouds:
  """Host. Clouds of random solids, all upright (their axis is z), kinds in turn.

  Args:
    count: B.
    num_points: N.
    kinds: which to draw, from `KINDS`.
    seed: of everything.

  Returns:
    Clouds; equal seeds give equal clouds.

  Raises:
    ValueError: an argument out of range, or an unknown kind.
  """
  checks.count("count", count)
  checks.count("num_points", num_points)
  ranges = part_ranges(kinds)
  if not kinds:
    raise ValueError("kinds: got none, expected at least one")
  rng = np.random.default_rng(seed)
  points, part = np.empty((count, num_points, 3), np.float32), np.empty((count, num_points), np.int32)
  label = np.arange(count, dtype=np.int32) % len(kinds)
  for i, kind in enumerate(label.tolist()):
    places, numbers = sample_surface(solid(kinds[kind], rng), num_points, rng)
    points[i], part[i] = centred(places), numbers + ranges[kind].start
  return Clouds(points, label, part)


def solid(kind: str, rng: np.random.Generator) -> Mesh:
  """Host. One solid of a kind (`KINDS`), with proportions drawn from `rng`."""
  return _MAKERS[checks.choice("kind", kind, KINDS)](rng)


def sample_surface(
  mesh: Mesh, count: int, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "n 3"], Int[np.ndarray, " n"]]:
  """Host. Points uniform on the triangles, and the part of each."""
  a, b, c = np.moveaxis(mesh.triangles, 1, 0)
  area = np.linalg.norm(np.cross(b - a, c - a), axis=-1)
  chosen = rng.choice(len(area), count, p=area / area.sum())
  u, v = rng.random((2, count, 1))
  u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)  # the square folded onto the triangle
  return a[chosen] + u * (b - a)[chosen] + v * (c - a)[chosen], mesh.part[chosen]


def centred(points: Float[np.ndarray, "*b n 3"]) -> Float[np.ndarray, "*b n 3"]:
  """Host. Clouds moved to have their mean at the origin, and scaled to have their farthest point at distance 1."""
  points = points - points.mean(-2, keepdims=True)
  return points / np.linalg.norm(points, axis=-1).max(-1)[..., None, None]


def turned(points: Float[np.ndarray, "b n 3"], turn: Turn, rng: np.random.Generator) -> Float[np.ndarray, "b n 3"]:
  """Host. Each cloud under a rotation of its own: none, uniform about the z axis, or uniform in SO(3)."""
  checks.choice("turn", turn, Turn)
  rotation = scipy.spatial.transform.Rotation
  if turn == "none":
    return points
  if turn == "z":
    matrices = rotation.from_euler("z", rng.uniform(0, 2 * np.pi, (len(points), 1))).as_matrix()
  else:
    matrices = rotation.random(len(points), rng).as_matrix()
  return points @ matrices.astype(points.dtype)


def stretched(points: Float[np.ndarray, "b n 3"], most: float, rng: np.random.Generator) -> Float[np.ndarray, "b n 3"]:
  """Host. Each axis of each cloud times a factor uniform in [1 / most, most]."""
  checks.real("most", most, 1.0, 10.0)
  return points * rng.uniform(1 / most, most, (len(points), 1, 3)).astype(points.dtype)


# -------------------------------------------------------------------------------------------------------------- solids


def _grid(places: Float[np.ndarray, "u v 3"], part: Sequence[int]) -> Mesh:
  """Surface through a grid of places; `part` of each row of cells."""
  a, b, c, d = places[:-1, :-1], places[1:, :-1], places[1:, 1:], places[:-1, 1:]
  triangles = np.stack([np.stack([a, b, c], 2), np.stack([a, c, d], 2)], 2)
  return Mesh(triangles.reshape(-1, 3, 3), np.repeat(part, 2 * (places.shape[1] - 1)))


def _join(*meshes: Mesh) -> Mesh:
  return Mesh(np.concatenate([m.triangles for m in meshes]), np.concatenate([m.part for m in meshes]))


def _revolve(profile: Float[np.ndarray, "p 2"], part: Sequence[int]) -> Mesh:
  """Surface that a line of (radius, height) sweeps around the z axis; `part` of each piece of the line."""
  angle = np.linspace(0, 2 * np.pi, _FACETS + 1)
  radius, height = np.transpose(profile)[:, :, None]
  return _grid(np.stack([radius * np.cos(angle), radius * np.sin(angle), height + 0 * angle], -1), part)


def _prism(
  outline: Sequence[tuple[float, float]],
  edge_part: Sequence[int],
  rectangles: Sequence[tuple[float, float, float, float]],
  cap_part: Sequence[int],
  depth: float,
) -> Mesh:
  """Outline (x, z) drawn out along y, closed by caps that the rectangles (x0, z0, x1, z1) tile."""
  wall = np.array([[(x, y, z) for x, z in [*outline, outline[0]]] for y in (-depth / 2, depth / 2)])
  meshes = [_grid(wall.swapaxes(0, 1), edge_part)]
  for (x0, z0, x1, z1), part in zip(rectangles, cap_part, strict=True):
    for y in (-depth / 2, depth / 2):
      meshes.append(_grid(np.array([[(x0, y, z0), (x1, y, z0)], [(x0, y, z1), (x1, y, z1)]]), [part]))
  return _join(*meshes)


def _superquadric(rng: np.random.Generator) -> Mesh:
  power = lambda x, e: np.sign(x) * np.abs(x) ** e
  (e1, e2), axes = rng.uniform(1.3, 2.2, 2), rng.uniform(0.6, 1.0, 3)
  v, u = np.linspace(-np.pi / 2, np.pi / 2, 25)[:, None], np.linspace(0, 2 * np.pi, _FACETS + 1)
  x, y = power(np.cos(v), e1) * power(np.cos(u), e2), power(np.cos(v), e1) * power(np.sin(u), e2)
  return _grid(np.stack([x, y, power(np.sin(v), e1) + 0 * u], -1) * axes, [0] * 24)


def _torus(rng: np.random.Generator) -> Mesh:
  tube = rng.uniform(0.2, 0.45)
  angle = np.linspace(-np.pi / 2, 1.5 * np.pi, 25)  # first half away from the axis
  return _revolve(np.stack([1 + tube * np.cos(angle), tube * np.sin(angle)], -1), [0] * 12 + [1] * 12)


def _cone(rng: np.random.Generator) -> Mesh:
  return _revolve(np.array([(0, rng.uniform(1.2, 2.2)), (rng.uniform(0.5, 0.9), 0), (0, 0)]), [0, 1])


def _cylinder(rng: np.random.Generator) -> Mesh:
  radius, height = rng.uniform(0.4, 0.8), rng.uniform(1.2, 2.2)
  return _revolve(np.array([(0, 0), (radius, 0), (radius, height), (0, height)]), [1, 0, 1])


def _capsule(rng: np.random.Generator) -> Mesh:
  radius, height = rng.uniform(0.4, 0.6), rng.uniform(0.8, 1.6)
  angle = np.linspace(0, np.pi / 2, 13)
  dome = radius * np.stack([np.cos(angle), np.sin(angle)], -1)
  top, bottom = dome + [0, height / 2], dome[::-1] * [1, -1] - [0, height / 2]
  return _revolve(np.concatenate([bottom, top]), [1] * 12 + [0] + [1] * 12)


def _box(rng: np.random.Generator) -> Mesh:
  x, y, z = rng.uniform(0.5, 1.0, 3)
  return _prism([(-x, -z), (x, -z), (x, z), (-x, z)], [0] * 4, [(-x, -z, x, z)], [0], 2 * y)


def _l(rng: np.random.Generator) -> Mesh:
  thick, width, height = rng.uniform(0.25, 0.4), rng.uniform(0.9, 1.2), rng.uniform(1.5, 2.0)
  outline = [(0, 0), (thick, 0), (width, 0), (width, thick), (thick, thick), (thick, height), (0, height)]
  rectangles = [(0, 0, thick, height), (thick, 0, width, thick)]
  return _prism(outline, [0, 1, 1, 1, 0, 0, 0], rectangles, [0, 1], rng.uniform(0.3, 0.8))


def _t(rng: np.random.Generator) -> Mesh:
  half, wide, thick, height = (
    rng.uniform(0.12, 0.2),
    rng.uniform(0.6, 1.0),
    rng.uniform(0.25, 0.4),
    rng.uniform(0.9, 1.4),
  )
  top = height + thick
  outline = [
    (-half, 0),
    (half, 0),
    (half, height),
    (wide, height),
    (wide, top),
    (-wide, top),
    (-wide, height),
    (-half, height),
  ]
  rectangles = [(-half, 0, half, height), (-wide, height, wide, top)]
  return _prism(outline, [0, 0, 1, 1, 1, 1, 1, 0], rectangles, [0, 1], rng.uniform(0.3, 0.8))


def _u(rng: np.random.Generator) -> Mesh:
  wide, thick, arm, height = (
    rng.uniform(0.7, 1.0),
    rng.uniform(0.25, 0.4),
    rng.uniform(0.2, 0.35),
    rng.uniform(1.2, 1.8),
  )
  inner = wide - arm
  right = [(wide, 0), (wide, thick), (wide, height), (inner, height), (inner, thick)]
  left = [(-x, z) for x, z in reversed(right)]
  rectangles = [(-wide, 0, wide, thick), (-wide, thick, -inner, height), (inner, thick, wide, height)]
  edges = [0, 1, 1, 1, 0, 1, 1, 1, 0, 0]
  return _prism([*right, *left], edges, rectangles, [0, 1, 1], rng.uniform(0.3, 0.8))


def _mug(rng: np.random.Generator) -> Mesh:
  radius, height, tube = rng.uniform(0.5, 0.7), rng.uniform(1.1, 1.6), rng.uniform(0.08, 0.13)
  body = _revolve(np.array([(0, 0), (radius, 0), (radius, height)]), [1, 0])
  reach, rise = rng.uniform(0.35, 0.5), rng.uniform(0.25, 0.35) * height
  bend, around = np.linspace(-np.pi / 2, np.pi / 2, 25)[:, None], np.linspace(0, 2 * np.pi, 13)
  x = radius + (reach + tube * np.cos(around)) * np.cos(bend)
  z = height / 2 + (rise + tube * np.cos(around)) * np.sin(bend)
  handle = _grid(np.stack([x, tube * np.sin(around) + 0 * bend, z], -1), [2] * 24)
  return _join(body, handle)


_MAKERS: dict[str, Callable[[np.random.Generator], Mesh]] = dict(
  zip(KINDS, (_superquadric, _torus, _cone, _cylinder, _capsule, _box, _l, _t, _u, _mug), strict=True)
)
