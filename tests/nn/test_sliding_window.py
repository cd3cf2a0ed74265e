import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from jaxlab.nn import sliding_window as sw


def test_importance_is_a_filtered_impulse():
  for patch in ((16, 24, 8), (32, 32, 32)):
    impulse = np.zeros(patch)
    impulse[tuple(n // 2 for n in patch)] = 1
    expected = scipy.ndimage.gaussian_filter(impulse, [n / 8 for n in patch], mode="constant")
    np.testing.assert_allclose(sw.importance(patch), expected / expected.max(), atol=1e-6)
    assert sw.importance(patch).min() > 0


def test_positions_cover_an_axis_evenly():
  assert sw.positions(110, 64) == [0, 23, 46]
  assert sw.positions(64, 64) == [0] and sw.positions(65, 64) == [0, 1]
  for length in range(8, 40):
    starts = sw.positions(length, 8, 0.5)
    assert starts[0] == 0 and starts[-1] == length - 8
    assert max(np.diff(starts), default=0) <= 5


def test_a_volume_of_one_patch_is_one_pass():
  predict = lambda x: jnp.cumsum(x, 2) * jnp.array([1.0, 2.0])
  x = jax.random.normal(jax.random.key(0), (2, 4, 6, 8, 1))
  np.testing.assert_allclose(sw.sliding_window(predict, x, (4, 6, 8)), predict(x), atol=1e-5)


def test_weighted_mean_over_patches():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((1, 7, 9, 8, 1)).astype("float32")
  predict = lambda p: jnp.cumsum(p, 3)  # depends on where a patch begins
  patch = (4, 6, 8)
  total, weights = np.zeros(x.shape), np.zeros(x.shape)
  for i in (0, 2, 3):  # 3 voxels in steps of at most 2: 0, 1.5, 3, rounded to even
    for j in (0, 3):
      where = np.s_[:, i : i + 4, j : j + 6]
      weight = sw.importance(patch)[None, ..., None]
      total[where] += weight * np.cumsum(x[where], 3)
      weights[where] += weight
  np.testing.assert_allclose(jax.jit(lambda x: sw.sliding_window(predict, x, patch))(x), total / weights, atol=1e-5)


def test_no_seams_and_no_padding_left():
  # What patches say differs by where they begin; with weights the mean has no jump at a patch's border.
  x = jnp.broadcast_to(jnp.arange(64.0)[None, None, None, :, None], (1, 2, 2, 64, 1))
  predict = lambda p: p - p.mean((1, 2, 3), keepdims=True)
  smooth = np.asarray(sw.sliding_window(predict, x, (2, 2, 32)))[0, 0, 0, :, 0]
  borders = np.abs(np.diff(smooth) - 1)[[15, 31, 47]]
  assert borders.max() < 0.05 * 16  # patches are 16 apart, a mean without weights would jump by 8
  constant = sw.sliding_window(lambda p: 0 * p + 3, x[:, :1, :1, :5], (4, 4, 8))
  assert constant.shape == (1, 1, 1, 5, 1)
  np.testing.assert_allclose(constant, 3, rtol=1e-6)


def test_mirrored_is_the_mean_over_flips():
  x = jax.random.normal(jax.random.key(0), (1, 3, 4, 5, 2))
  predict = lambda p: jnp.cumsum(jnp.cumsum(p, 1), 3)
  got = sw.mirrored(predict, (0, 2))(x)
  expected = sum(
    np.flip(np.asarray(predict(jnp.flip(x, way))), way) for way in ((), (1,), (3,), (1, 3))
  ) / 4  # fmt: skip
  np.testing.assert_allclose(got, expected, atol=1e-5)
  np.testing.assert_allclose(sw.mirrored(predict, ())(x), predict(x))
  symmetric = sw.mirrored(predict)
  np.testing.assert_allclose(symmetric(x[:, ::-1]), symmetric(x)[:, ::-1], atol=1e-5)


@pytest.mark.parametrize(
  ("call", "argument"),
  [
    (lambda: sw.sliding_window(lambda p: p, jnp.zeros((2, 2, 2, 1)), (2, 2, 2)), "volumes"),
    (lambda: sw.sliding_window(lambda p: p, jnp.zeros((1, 2, 2, 2, 1)), (2, 2)), "patch"),
    (lambda: sw.sliding_window(lambda p: p, jnp.zeros((1, 2, 2, 2, 1)), (2, 2, 0)), "patch"),
    (lambda: sw.sliding_window(lambda p: p, jnp.zeros((1, 2, 2, 2, 1)), (2, 2, 2), step=0), "step"),
    (lambda: sw.mirrored(lambda p: p, (0, 3)), "axes"),
    (lambda: sw.mirrored(lambda p: p, (0, 0)), "axes"),
  ],
)
def test_bad_arguments(call, argument):
  with pytest.raises(ValueError, match=f"{argument}: got"):
    call()
