import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.nn.rotary import rotary_2d


def test_products_depend_on_differences_of_places():
  rng = np.random.default_rng(0)
  q, k = rng.standard_normal((2, 16)).astype("float32")
  everywhere = lambda x: rotary_2d(jnp.broadcast_to(x, (1, 6, 7, 16)), num_heads=2)[0]
  logits = jnp.einsum("abhd,cehd->habce", *(everywhere(x).reshape(6, 7, 2, 8) for x in (q, k)))
  np.testing.assert_allclose(logits[:, :4, :5, :4, :5], logits[:, 2:, 2:, 2:, 2:], atol=1e-5)
  assert np.abs(logits[:, 0, 0] - logits[:, 0, 1]).max() > 0.1
  np.testing.assert_allclose(jnp.linalg.norm(everywhere(q), axis=-1), np.linalg.norm(q), rtol=1e-5)


def test_pairs_are_complex_numbers_turned_by_row_and_column():
  x = np.random.default_rng(1).standard_normal((1, 3, 4, 8)).astype("float32")
  z = x.astype(np.float64).view(np.complex128)[0]
  turned = np.stack(
    [
      [[z[r, c, f] * np.exp(1j * (r, c)[f // 2] * (1, 1e-4)[f % 2]) for f in range(4)] for c in range(4)]
      for r in range(3)
    ]
  )
  np.testing.assert_allclose(rotary_2d(jnp.asarray(x), num_heads=1)[0], turned.view(np.float64), atol=1e-6)


def test_bfloat16_and_bad_shapes():
  assert rotary_2d(jnp.ones((1, 2, 2, 8), "bfloat16"), num_heads=2).dtype == "bfloat16"
  with pytest.raises(ValueError, match="x: got shape"):
    rotary_2d(jnp.ones((1, 2, 2, 8)), num_heads=3)
