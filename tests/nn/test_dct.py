import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from jaxlab.nn import dct


@pytest.mark.parametrize("shape", [(2, 7, 7, 3), (5, 8, 1)])
def test_is_scipys_orthonormal_transform_and_back(shape):
  x = np.random.default_rng(0).standard_normal(shape).astype("float32")
  got = dct.dct_2d(x)
  np.testing.assert_allclose(got, scipy.fft.dctn(x.astype("float64"), axes=(-3, -2), norm="ortho"), atol=2e-6)
  np.testing.assert_allclose(dct.idct_2d(got), x, atol=2e-6)
  assert dct.dct_2d(jnp.asarray(x, "bfloat16")).dtype == "bfloat16"


def test_gradient_is_the_inverse():
  x, g = np.random.default_rng(1).standard_normal((2, 4, 6, 2)).astype("float32")
  (gx,) = jax.vjp(dct.dct_2d, jnp.asarray(x))[1](jnp.asarray(g))
  np.testing.assert_allclose(gx, scipy.fft.idctn(g.astype("float64"), axes=(0, 1), norm="ortho"), atol=2e-6)


def test_basis_images_are_orthonormal_rows_of_the_transform():
  pairs = [(0, 0), (3, 1), (6, 4), (0, 2)]
  images = dct.basis(pairs, 7, 5)
  np.testing.assert_allclose(np.einsum("fij,gij->fg", images, images), np.eye(4), atol=1e-12)
  x = np.random.default_rng(2).standard_normal((7, 5))
  coefficients = scipy.fft.dctn(x, norm="ortho")
  np.testing.assert_allclose(np.einsum("fij,ij->f", images, x), [coefficients[p] for p in pairs], atol=1e-12)


def test_bad_arguments():
  with pytest.raises(ValueError, match="size: got 0"):
    dct.matrix(0)
  for pairs in ([], [(0, 5)], [(-1, 0)]):
    with pytest.raises(ValueError, match="frequencies: got"):
      dct.basis(pairs, 7, 5)
  with pytest.raises(ValueError, match="x: got shape"):
    dct.dct_2d(jnp.zeros((3, 3)))
