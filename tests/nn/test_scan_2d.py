import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.nn import scan_2d
from jaxlab.nn.scan_2d import CS2D, SS2D, SelectiveScan2D

KINDS = [kind for kind, _ in CS2D]


def layer(directions, seed=0, shape=(2, 3, 5, 6)):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal(shape).astype("float32")
  model = SelectiveScan2D(3, 2, directions)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  params = jax.tree.map(lambda s: (0.5 * rng.standard_normal(s.shape)).astype("float32"), shapes)
  return model, params, x


def by_steps(params, x, directions):
  """Every direction's pixels one after the other, in float64."""
  p = {name: np.asarray(value, np.float64) for name, value in params["params"].items()}
  batch, height, width, channels = x.shape
  rank, states = p["dt_proj"].shape[1], p["A_log"].shape[2]
  out = np.zeros(x.shape)
  keys = {
    "rows": lambda p: p, "columns": lambda p: (p[1], p[0]),
    "diagonals": lambda p: (p[0] + p[1], p[0]), "antidiagonals": lambda p: (p[0] - p[1], p[0]),
  }  # fmt: skip
  for k, (kind, backwards) in enumerate(directions):
    pixels = sorted(np.ndindex(height, width), key=keys[kind], reverse=backwards)
    h = np.zeros((batch, channels, states))
    for y, c in pixels:
      u = x[:, y, c].astype(np.float64)
      d, b, r = np.split(u @ p["x_proj"][k], [rank, rank + states], -1)
      delta = np.log1p(np.exp(d @ p["dt_proj"][k] + p["dt_bias"][k]))
      h = np.exp(-delta[..., None] * np.exp(p["A_log"][k])) * h + (delta * u)[..., None] * b[:, None]
      out[:, y, c] += (h * r[:, None]).sum(-1) + p["D"][k] * u
  return out


@pytest.mark.parametrize("directions", [SS2D, CS2D, (("columns", True),)])
def test_is_the_recurrence_along_each_order(directions):
  model, params, x = layer(directions)
  np.testing.assert_allclose(jax.jit(model.apply)(params, x), by_steps(params, x, directions), atol=2e-5)


def test_gradient_is_the_derivative():
  model, params, x = layer(CS2D, shape=(1, 3, 4, 3))
  target = np.random.default_rng(1).standard_normal(x.shape)
  gradient = jax.jit(jax.grad(lambda p, x: jnp.vdot(model.apply(p, x), target.astype("float32")), (0, 1)))(params, x)
  moved = jax.tree.map(lambda a: np.random.default_rng(a.size).standard_normal(a.shape), (params, x))
  loss = lambda t: np.vdot(by_steps(*jax.tree.map(lambda a, m: a + t * m, (params, x), moved), CS2D), target)
  slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
  pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(moved), strict=True)
  np.testing.assert_allclose(sum(np.vdot(g, m) for g, m in pairs), slope, rtol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (1, 6)])
def test_orders_are_permutations_that_write_undoes(kind, shape):
  assert sorted(scan_2d.order(kind, *shape)) == list(range(np.prod(shape)))
  x = jnp.arange(2.0 * np.prod(shape) * 3).reshape(2, *shape, 3)
  np.testing.assert_array_equal(scan_2d.write(scan_2d.read(x, kind), kind, *shape), x)


def test_orders_and_symmetries_of_the_image():
  np.testing.assert_array_equal(scan_2d.order("diagonals", 2, 3), [0, 1, 3, 2, 4, 5])
  np.testing.assert_array_equal(scan_2d.order("antidiagonals", 2, 3), [2, 1, 5, 0, 4, 3])
  x = jnp.arange(20.0).reshape(1, 4, 5)
  np.testing.assert_array_equal(scan_2d.read(x[:, :, ::-1], "diagonals"), scan_2d.read(x, "antidiagonals"))
  square = x[:, :, :4]
  np.testing.assert_array_equal(scan_2d.read(jnp.swapaxes(square, 1, 2), "rows"), scan_2d.read(square, "columns"))
  turned, sums = scan_2d.read(jnp.swapaxes(square, 1, 2), "diagonals")[0], np.add.outer(range(4), range(4)).ravel()
  diagonals = np.split(np.asarray(scan_2d.read(square, "diagonals")[0]), np.cumsum(np.bincount(sums))[:-1])
  np.testing.assert_array_equal(turned, np.concatenate([one[::-1] for one in diagonals]))
  both = [scan_2d.write(scan_2d.read(x, kind), kind, 4, 5) for kind, _ in CS2D]
  np.testing.assert_array_equal(sum(both), 4 * x)


def test_start_and_sizes():
  params = SelectiveScan2D(4).init(jax.random.key(0), jnp.zeros((1, 2, 2, 20)))["params"]
  shapes = {"x_proj": (4, 20, 10), "dt_proj": (4, 2, 20), "dt_bias": (4, 20), "A_log": (4, 20, 4), "D": (4, 20)}
  assert {name: value.shape for name, value in params.items()} == shapes
  np.testing.assert_allclose(np.exp(params["A_log"]), np.broadcast_to(np.arange(1, 5), (4, 20, 4)), rtol=1e-6)
  steps = jax.nn.softplus(params["dt_bias"])
  assert steps.min() >= 0.00099 and steps.max() <= 0.101
  with pytest.raises(ValueError, match="directions: got 'spiral'"):
    scan_2d.order("spiral", 2, 2)
  with pytest.raises(ValueError, match="directions: got"):
    SelectiveScan2D(4, directions=()).init(jax.random.key(0), jnp.zeros((1, 2, 2, 20)))
  with pytest.raises(ValueError, match="state_size: got 0"):
    SelectiveScan2D(0).init(jax.random.key(0), jnp.zeros((1, 2, 2, 20)))


def test_bfloat16_scans_in_float32():
  model, params, x = layer(SS2D)
  low = SelectiveScan2D(3, 2, SS2D, dtype="bfloat16").apply(params, x)
  assert low.dtype == "bfloat16"
  np.testing.assert_allclose(low.astype("float32"), model.apply(params, x), rtol=0.1, atol=0.1)
