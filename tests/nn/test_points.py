import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.nn import points


def cloud(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal((*shape, 3)).astype("float32")


farthest = jax.jit(points.farthest_points, static_argnums=1)
nearest = jax.jit(points.nearest_points, static_argnums=2)


def brute_farthest(x, count, start):
  """One cloud, from the definition."""
  chosen = [start]
  while len(chosen) < count:
    chosen.append(int(np.argmax(scipy.spatial.distance.cdist(x, x[chosen]).min(1))))
  return chosen


@pytest.mark.parametrize("form", [points.farthest_points, points.farthest_points_device])
def test_farthest_points_are_those_of_the_definition(form):
  x, start = cloud(3, 50), np.array([4, 0, 49])
  found = jax.jit(form, static_argnums=1)(x, 20, start)
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, [brute_farthest(*one) for one in zip(x, [20] * 3, start, strict=True)])


def test_farthest_points_start_far_from_the_origin():
  x = cloud(3, 50)
  found = farthest(x, 7)
  np.testing.assert_array_equal(found[:, 0], np.linalg.norm(x, axis=-1).argmax(1))
  np.testing.assert_array_equal(found[:, :4], farthest(x, 4))  # a prefix
  order = np.random.default_rng(0).permutation(50)
  moved = farthest(x[:, order], 7)
  np.testing.assert_array_equal(order[moved], found)
  # Every point is nearer to a chosen one than the chosen are to each other.
  distance = np.stack([scipy.spatial.distance.cdist(a, a[i]) for a, i in zip(x, found, strict=True)])
  among = np.stack([scipy.spatial.distance.pdist(a[i]).min() for a, i in zip(x, found, strict=True)])
  assert (distance.min(2).max(1) <= among).all()


def test_traced_starts_are_clipped():
  x = cloud(1, 5)
  sample = jax.jit(lambda start: points.farthest_points(x, 3, start))
  np.testing.assert_array_equal(sample(jnp.array([10**6])), sample(jnp.array([4])))


def test_all_points_and_equal_points():
  x = cloud(1, 6)
  assert sorted(farthest(x, 6)[0].tolist()) == list(range(6))
  same = np.zeros((1, 6, 3), "float32")
  for form in (points.farthest_points, points.farthest_points_device):
    np.testing.assert_array_equal(form(same, 3, np.array([2])), [[2, 0, 0]])
  for form in (points.nearest_points, points.nearest_points_device):
    np.testing.assert_array_equal(form(same[:, :1], same, 4), [[[0, 1, 2, 3]]])  # ties in order


@settings(max_examples=6)
@given(st.integers(1, 90), st.integers(1, 40), st.data())
def test_nearest_points_equal_brute_force(count, n, data):
  k = data.draw(st.integers(1, n))
  queries, x = cloud(2, count, seed=1), cloud(2, n)
  for form in (points.nearest_points, points.nearest_points_device):
    found = form(queries, x, k)
    expected = np.stack(
      [scipy.spatial.distance.cdist(*pair).argsort(1)[:, :k] for pair in zip(queries, x, strict=True)]
    )
    np.testing.assert_array_equal(found, expected)


def test_a_point_is_its_own_nearest():
  x = cloud(2, 70)
  found = nearest(x, x, 5)
  np.testing.assert_array_equal(found[..., 0], np.tile(np.arange(70), (2, 1)))
  near = points.gather_points(x, found)
  distance = np.linalg.norm(near - x[:, :, None], axis=-1)
  assert (np.diff(distance, axis=-1) >= 0).all()


def test_choices_pass_no_gradient_and_gathering_does():
  x = cloud(2, 12)

  def loss(x):
    i = points.farthest_points(x, 3)
    return (points.gather_points(x, points.nearest_points(points.gather_points(x, i), x, 2)) ** 2).sum()

  grad = jax.jit(jax.grad(loss))(x)
  chosen = nearest(points.gather_points(x, farthest(x, 3)), x, 2)
  times = np.stack([np.bincount(np.ravel(i), minlength=12) for i in chosen])
  np.testing.assert_allclose(grad, 2 * x * times[..., None], rtol=1e-5)


def test_maps_over_batches():
  x = cloud(2, 3, 12)
  both = jax.jit(jax.vmap(functools.partial(points.farthest_points, count=4)))(x)
  np.testing.assert_array_equal(both, [farthest(a, 4) for a in x])
  both = jax.jit(jax.vmap(lambda a: points.nearest_points(a, a, 3)))(x)
  np.testing.assert_array_equal(both, [nearest(a, a, 3) for a in x])


def test_interpolation():
  x, queries, features = cloud(2, 9), cloud(2, 5, seed=1), np.random.default_rng(2).standard_normal((2, 9, 4))
  features = features.astype("float32")
  run = jax.jit(points.interpolate_features, static_argnums=3)
  expected = np.zeros((2, 5, 4))
  for b in range(2):
    tree = scipy.spatial.KDTree(x[b])
    distance, index = tree.query(queries[b], 3)
    weight = 1 / (distance**2 + 1e-8)
    expected[b] = (weight[..., None] * features[b][index]).sum(1) / weight.sum(1, keepdims=True)
  np.testing.assert_allclose(run(queries, x, features, 3), expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(run(x, x, features, 3), features, atol=1e-4)  # known places keep what is known


def test_rotations_are_uniform():
  r = np.asarray(points.random_rotations(jax.random.key(0), (4000,)))
  np.testing.assert_allclose(r @ r.swapaxes(-1, -2), np.tile(np.eye(3), (4000, 1, 1)), atol=1e-5)
  np.testing.assert_allclose(np.linalg.det(r), 1, atol=1e-5)
  # Haar: every entry is uniform in [-1, 1], so its square has the mean 1/3; the angle has density (1 - cos t) / pi.
  np.testing.assert_allclose((r**2).mean(0), 1 / 3, atol=0.02)
  np.testing.assert_allclose(r.mean(0), 0, atol=0.04)
  angle = np.arccos(np.clip((np.trace(r, axis1=1, axis2=2) - 1) / 2, -1, 1))
  share = [(angle < t).mean() for t in (0.5, 1.5, 2.5)]
  np.testing.assert_allclose(share, [(t - np.sin(t)) / np.pi for t in (0.5, 1.5, 2.5)], atol=0.025)


@pytest.mark.parametrize(
  ("call", "argument"),
  [
    (lambda: points.farthest_points(cloud(5), 2), "points"),
    (lambda: points.farthest_points(np.zeros((1, 5, 3), "int32"), 2), "points"),
    (lambda: points.farthest_points(cloud(1, 5), 6), "count"),
    (lambda: points.farthest_points(cloud(1, 5), 0), "count"),
    (lambda: points.farthest_points(cloud(2, 5), 2, np.zeros(1, "int32")), "start"),
    (lambda: points.farthest_points(cloud(1, 5), 2, np.array([5])), "start"),
    (lambda: points.farthest_points(cloud(1, 5), 2, np.array([-1])), "start"),
    (lambda: points.nearest_points(cloud(1, 5), cloud(1, 5), 6), "k"),
    (lambda: points.nearest_points(cloud(2, 5), cloud(1, 5), 2), "queries"),
    (lambda: points.interpolate_features(cloud(1, 5), cloud(1, 5), cloud(1, 4)), "features"),
  ],
)
def test_bad_input(call, argument):
  with pytest.raises(ValueError, match=f"^{argument}: got "):
    call()
