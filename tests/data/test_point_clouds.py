import numpy as np
import pytest

from jaxlab.data import point_clouds


def points_of(kind, count=4000, seed=0):
  rng = np.random.default_rng(seed)
  mesh = point_clouds.solid(kind, rng)
  return mesh, *point_clouds.sample_surface(mesh, count, rng)


def closed(mesh):
  """Whether every edge belongs to two triangles. Degenerate ones at poles are left out."""
  corners = np.round(mesh.triangles, 6)
  edges = {}
  for triangle in corners.tolist():
    for a, b in zip(triangle, triangle[1:] + triangle[:1], strict=True):
      if a != b:
        edges[tuple(sorted((tuple(a), tuple(b))))] = edges.get(tuple(sorted((tuple(a), tuple(b)))), 0) + 1
  return all(count % 2 == 0 for count in edges.values())


@pytest.mark.parametrize("kind", ["superquadric", "torus", "cone", "cylinder", "capsule", "box"])
def test_solids_are_closed(kind):
  assert closed(points_of(kind)[0])


@pytest.mark.parametrize("kind", point_clouds.KINDS)
def test_every_part_has_points(kind):
  _, points, part = points_of(kind)
  assert points.shape == (4000, 3) and np.isfinite(points).all()
  assert set(np.unique(part)) == set(range(len(point_clouds.PARTS[kind])))
  share = np.bincount(part) / len(part)
  assert share.min() > 0.05


def test_points_are_uniform_on_the_surface():
  """On a cylinder parts have the share of their areas, heights are uniform on the side, squared radii on the caps."""
  _, points, part = points_of("cylinder", 40_000)
  radius, height = np.linalg.norm(points[:, :2], axis=1), points[:, 2]
  r, h = radius.max(), height.max()
  np.testing.assert_allclose((part == 0).mean(), h / (h + r), atol=0.01)
  np.testing.assert_allclose(np.quantile(height[part == 0] / h, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)
  np.testing.assert_allclose(np.quantile((radius[part == 1] / r) ** 2, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)
  assert set(np.round(height[part == 1] / h, 6)) == {0, 1}


def test_surfaces_are_those_named():
  _, points, part = points_of("torus")
  radius = np.linalg.norm(points[:, :2], axis=1)
  tube = np.hypot(radius - 1, points[:, 2])
  assert tube.max() / tube.min() < 1.03  # facets
  assert ((radius > 1 - 1e-2) == (part == 0)).mean() > 0.99
  _, points, _ = points_of("box")
  x = np.abs(points) / np.abs(points).max(0)
  np.testing.assert_allclose(x.max(1), 1, atol=1e-6)
  _, points, part = points_of("capsule")
  radius = np.linalg.norm(points[:, :2], axis=1)
  body = np.abs(points[part == 0, 2]).max()
  axis = np.clip(points[:, 2], -body, body)
  distance = np.hypot(radius, points[:, 2] - axis)
  assert distance.max() / distance.min() < 1.03
  _, points, part = points_of("T")
  assert points[part == 0, 2].max() <= points[part == 1, 2].min() + 1e-9


def test_dataset():
  kinds = ("cone", "mug", "L")
  made = point_clouds.solids(7, 50, kinds=kinds, seed=3)
  np.testing.assert_array_equal(made.label, [0, 1, 2, 0, 1, 2, 0])
  assert point_clouds.part_ranges(kinds) == [range(2), range(2, 5), range(5, 7)]
  for label, part in zip(made.label, made.part, strict=True):
    assert set(part) <= set(point_clouds.part_ranges(kinds)[label])
  np.testing.assert_allclose(made.points.mean(1), 0, atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(made.points, axis=-1).max(1), 1, rtol=1e-5)
  assert made.points.dtype == np.float32
  again, other = (point_clouds.solids(7, 50, kinds=kinds, seed=seed).points for seed in (3, 4))
  np.testing.assert_array_equal(again, made.points)
  assert (other != made.points).any()


def test_turns_and_stretches():
  points = point_clouds.solids(200, 20).points
  rng = np.random.default_rng(0)
  gram = lambda x: x @ x.swapaxes(1, 2)
  about_z, anyhow = (point_clouds.turned(points, turn, rng) for turn in ("z", "so3"))
  for moved in (about_z, anyhow):
    np.testing.assert_allclose(gram(moved), gram(points), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(moved[:, :3]), np.linalg.det(points[:, :3]), atol=1e-5)  # no reflection
  np.testing.assert_allclose(about_z[..., 2], points[..., 2], atol=1e-6)
  angle = np.arctan2(about_z[:, 0, 1], about_z[:, 0, 0]) - np.arctan2(points[:, 0, 1], points[:, 0, 0])
  assert abs(np.exp(1j * angle).mean()) < 0.2
  # A uniform rotation leaves no direction: the image of the z axis has mean 0 and spreads alike along all axes.
  same = np.broadcast_to(np.eye(3), (2000, 3, 3))
  image = point_clouds.turned(same, "so3", rng)[:, 2]
  np.testing.assert_allclose(image.mean(0), 0, atol=0.06)
  np.testing.assert_allclose((image**2).mean(0), 1 / 3, atol=0.03)
  np.testing.assert_array_equal(point_clouds.turned(points, "none", rng), points)
  factors = (point_clouds.stretched(points, 1.5, rng) / points)[:, 0]
  assert factors.min() >= 2 / 3 - 1e-5 and factors.max() <= 1.5 + 1e-5 and factors.std() > 0.2
  assert point_clouds.stretched(points, 1.5, rng).dtype == np.float32


@pytest.mark.parametrize(
  ("call", "argument"),
  [
    (lambda: point_clouds.solids(0, 5), "count"),
    (lambda: point_clouds.solids(2, 0), "num_points"),
    (lambda: point_clouds.solids(2, 5, kinds=("sphere",)), "kinds"),
    (lambda: point_clouds.solids(2, 5, kinds=()), "kinds"),
    (lambda: point_clouds.solid("sphere", np.random.default_rng(0)), "kind"),
    (lambda: point_clouds.turned(np.zeros((1, 2, 3)), "x", np.random.default_rng(0)), "turn"),
    (lambda: point_clouds.stretched(np.zeros((1, 2, 3)), 0.5, np.random.default_rng(0)), "most"),
  ],
)
def test_bad_input(call, argument):
  with pytest.raises(ValueError, match=f"^{argument}: got "):
    call()
