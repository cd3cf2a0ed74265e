import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.nn.resize import adaptive_average_pool, resize

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "resize.npz")  # outputs of torch.nn.functional
CASES = [name for name in GOLDEN.files if name not in ("image", "volume")]


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
  kind, corners, sides = name.split()
  size = tuple(map(int, sides.split("x")))
  x = GOLDEN["volume" if len(size) == 3 else "image"]
  out = adaptive_average_pool(x, size) if kind == "pool" else resize(x, size, kind, align_corners=corners == "1")
  np.testing.assert_allclose(out, GOLDEN[name], atol=3e-6)


def test_constants_and_sizes_that_stay():
  x = jnp.full((2, 5, 6, 3), 7.0)
  for method in ("nearest", "linear", "cubic"):
    np.testing.assert_allclose(resize(x, (8, 3), method), 7, rtol=1e-6)
  image = jnp.asarray(GOLDEN["image"])
  np.testing.assert_array_equal(resize(image, (5, 7), "cubic"), image)
  np.testing.assert_array_equal(adaptive_average_pool(image, (5, 7)), image)


def test_bfloat16_and_gradient():
  assert resize(jnp.ones((1, 4, 4, 2), "bfloat16"), (8, 8)).dtype == "bfloat16"
  # The mean's gradient reaches every pixel that a linear kernel touches, with weights that sum to 1.
  gradient = jax.grad(lambda x: resize(x, (10, 4)).mean())(jnp.ones((1, 5, 8, 1)))
  np.testing.assert_allclose(gradient.sum(), 1, rtol=1e-6)


@pytest.mark.parametrize(("length", "size"), [(5, 9), (9, 4), (60, 3), (3, 60)])
def test_cotangents_meet_the_transposed_matrix(length, size):
  # <R x, g> = <x, R^T g>, with few entries a row and with many (60 to 3 in a mean, and back).
  x, g = (
    np.random.default_rng(i).standard_normal((2, n, 4, 3)).astype("float32") for i, n in enumerate((length, size))
  )
  for function in (lambda x: resize(x, (size, 4)), lambda x: adaptive_average_pool(x, (size, 4))):
    y, back = jax.vjp(function, x)
    np.testing.assert_allclose(np.vdot(y, g), np.vdot(x, back(g)[0]), atol=1e-4)
    np.testing.assert_allclose(jax.grad(lambda g, back=back: (back(g)[0] * x).sum())(jnp.asarray(g)), y, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(function)(x[None])[0], y, atol=1e-6)


def test_bad_arguments():
  x = jnp.zeros((1, 4, 4, 2))
  for size in ((4,), (0, 4), (4, 4, 4)):
    with pytest.raises(ValueError, match="size: got"):
      resize(x, size)
  with pytest.raises(ValueError, match="method: got 'area'"):
    resize(x, (2, 2), "area")
  with pytest.raises(ValueError, match="method: got 'nearest'"):
    resize(x, (2, 2), "nearest", align_corners=True)


def test_a_pixel_without_a_value_spoils_no_other_place():
  x = jnp.ones((1, 7, 1)).at[0, 0].set(jnp.nan)
  np.testing.assert_array_equal(np.isnan(adaptive_average_pool(x, (5,))[0, :, 0]), [True, False, False, False, False])
  for method, few in (("linear", 2), ("cubic", 5)):
    wide = resize(jnp.ones((1, 8, 1)).at[0, 0].set(jnp.nan), (16,), method)[0, :, 0]
    assert np.isfinite(wide[few + 1 :]).all() and np.isnan(wide[0])
