import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.nn import batch_norm


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def made(module, x):
  """Variables of which none is that of an identity; scales of either sign."""
  leaves, structure = jax.tree.flatten(jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False)))
  rng = np.random.default_rng(1)
  tree = jax.tree.unflatten(structure, [rng.uniform(0.5, 1.5, leaf.shape).astype("float32") for leaf in leaves])
  tree["params"]["scale"][1::3] *= -1
  tree["params"]["bias"] -= 1
  return tree


def plain(pool, slope, train):
  """Flax and the maximum after it."""
  norm = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5)

  def run(variables, x):
    y, updated = norm.apply(variables, x, mutable=["batch_stats"])
    y = nn.leaky_relu(y, slope)
    return y.max(-2) if pool else y, updated

  return run


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(("train", "host"), [(False, True), (True, True), (True, False)])
def test_equals_flax_and_a_maximum(pool, train, host, monkeypatch):
  if not host:
    monkeypatch.setattr(batch_norm.kernels, "reads", lambda *arrays: False)
  # More rows than an item of the kernels reads, and not a multiple of it.
  x = normal(7, 9, 40, 6) + np.arange(6, dtype="float32")
  module = batch_norm.BatchNormAct(0.2, pool)
  variables = made(module, x)

  def mine(variables, x):
    return module.apply(variables, x, train=train, mutable=["batch_stats"])

  found = []
  for run in (mine, plain(pool, 0.2, train)):

    @jax.jit
    def both(variables, x, run=run):
      y, pull, updated = jax.vjp(run, variables, x, has_aux=True)
      g = jax.random.normal(jax.random.key(0), y.shape)
      (of_variables, of_x) = pull(g)
      return y, of_variables["params"], of_x, updated

    found.append(both(variables, x))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-4, rtol=1e-4), *found)


def test_the_first_of_equal_maxima_gets_the_gradient():
  x = np.zeros((1, 4, 2), "float32")
  x[0, 1:3] = 1
  for moments in (batch_norm._moments, batch_norm.moments_device):
    top, place, sums = moments(jnp.asarray(x), jnp.array([1.0, -1.0]))
    np.testing.assert_array_equal(top, [[1, 0]])
    np.testing.assert_array_equal(place, [[1, 0]])
    np.testing.assert_array_equal(sums, [[2, 2], [2, 2]])


@pytest.mark.parametrize("pool", [False, True])
def test_statistics_of_all_devices_are_one(pool):
  """Two halves of a batch on an axis equal the whole, gradients included."""
  x = normal(2, 5, 4, 3)

  def loss(scale, bias, x, axis):
    y, moments = batch_norm.normalize(x if pool else x.reshape(-1, 1, 3), scale, bias, 0.0, 1e-5, axis)
    return (y**3).sum(), moments

  scale, bias = jnp.array([1.0, -0.5, 2.0]), jnp.array([0.1, 0.2, -0.1])
  grad = jax.grad(loss, (0, 1, 2), has_aux=True)
  split = jax.vmap(functools.partial(grad, axis="d"), (None, None, 0), axis_name="d")

  @jax.jit
  def both(scale, bias, x):
    return split(scale, bias, x), grad(scale, bias, x.reshape(10, 4, 3), None)

  (halves, moments), (whole, expected) = both(scale, bias, x)
  np.testing.assert_allclose(moments[0], expected, atol=1e-6)
  np.testing.assert_allclose(halves[0].sum(0), whole[0], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(halves[1].sum(0), whole[1], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(halves[2].reshape(10, 4, 3), whole[2], rtol=1e-4, atol=1e-4)


def test_bfloat16():
  x = normal(4, 50, 8).astype(jnp.bfloat16)
  module = batch_norm.BatchNormAct(pool=True, dtype="bfloat16")
  variables = made(module, x)
  y, updated = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"]))(variables, x)
  expected = jax.jit(plain(True, 0.0, True))(variables, x.astype("float32"))
  assert y.dtype == jnp.bfloat16 and updated["batch_stats"]["mean"].dtype == jnp.float32
  np.testing.assert_allclose(y.astype("float32"), expected[0], atol=0.03)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-3), updated, expected[1])
