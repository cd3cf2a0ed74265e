"""Depthwise and grouped convolution against NumPy loops, and both of their forms against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxlab import kernels
from jaxlab.nn import conv


def random(*shape, seed=0, dtype="float32"):
  return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def depthwise_loops(x, w, b, stride=1):
  """Cross-correlation, written as its definition."""
  k = w.shape[0]
  padded = np.pad(x.astype("float64"), ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
  y = np.zeros(x.shape)
  for i in range(k):
    for j in range(k):
      y += padded[:, i : i + x.shape[1], j : j + x.shape[2]] * w[i, j, 0]
  return (y + b)[:, ::stride, ::stride]


# Widths around a tile and a vector, images smaller than the filter, channels that need padding.
SHAPES = [(2, 5, 11, 16), (1, 3, 2, 8), (1, 9, 8, 24), (3, 1, 1, 5), (1, 10, 17, 33)]


@pytest.mark.parametrize("k", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_depthwise_is_its_definition(shape, k):
  x, w, b = random(*shape), random(k, k, 1, shape[-1]), random(shape[-1])
  expected = depthwise_loops(x, w, b)
  np.testing.assert_allclose(conv.depthwise(x, w, b), expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(conv.depthwise(x, w), expected - b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [2, 3])
def test_strided_output_is_a_subset(stride):
  x, w = random(2, 8, 7, 8), random(3, 3, 1, 8)
  np.testing.assert_allclose(
    conv.depthwise(x, w, stride=stride), depthwise_loops(x, w, 0, stride), rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize("k", [3, 5, 7])
def test_depthwise_gradients(k):
  x, w, b = random(2, 6, 9, 8), random(k, k, 1, 8), random(8)
  check_grads(conv.depthwise, (x, w, b), order=2, modes=["rev"], rtol=0.02, atol=0.02)


def test_filters_larger_than_the_image_get_no_gradient_from_outside():
  grad = jax.grad(lambda w: conv.depthwise(jnp.ones((1, 2, 2, 8)), w).sum())(jnp.ones((9, 9, 1, 8)))
  reached = np.asarray(grad[..., 0, 0]) != 0
  assert reached[3:6, 3:6].all()
  assert reached.sum() == 9


def test_host_form_equals_xla_form():
  x, w, b, g = random(2, 7, 10, 16), random(5, 5, 1, 16), random(16), random(2, 7, 10, 16)
  y, vjp = jax.vjp(conv.depthwise, x, w, b)
  mix = random(1, 1, 4, 24)
  z, grouped_vjp = jax.vjp(conv.grouped_pointwise, x, mix)
  mine = (y, *vjp(g), z, *grouped_vjp(random(*z.shape)))
  with kernels.disabled():
    y, vjp = jax.vjp(conv.depthwise, x, w, b)
    z, grouped_vjp = jax.vjp(conv.grouped_pointwise, x, mix)
    xla = (y, *vjp(g), z, *grouped_vjp(random(*z.shape)))
  for a, c in zip(mine, xla, strict=True):
    np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("groups", "size", "out"), [(1, 3, 5), (4, 4, 8), (6, 1, 2), (2, 8, 4)])
def test_grouped_pointwise_is_block_diagonal(groups, size, out):
  x, w, b = random(2, 3, 5, groups * size), random(1, 1, size, groups * out), random(groups * out)
  dense = np.zeros((groups * size, groups * out))
  for j in range(groups):
    dense[j * size : (j + 1) * size, j * out : (j + 1) * out] = w[0, 0, :, j * out : (j + 1) * out]
  np.testing.assert_allclose(conv.grouped_pointwise(x, w, b), x @ dense + b, rtol=1e-5, atol=1e-5)
  check_grads(conv.grouped_pointwise, (x, w), order=2, modes=["rev"], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_accumulate_in_float32(dtype):
  x, w = jnp.asarray(random(1, 6, 6, 8), dtype), jnp.asarray(random(9, 9, 1, 8), dtype)
  y = conv.depthwise(x, w)
  assert y.dtype == dtype
  exact = depthwise_loops(np.asarray(x, "float64"), np.asarray(w, "float64"), 0)
  np.testing.assert_allclose(np.asarray(y, "float64"), exact, rtol=float(jnp.finfo(dtype).eps), atol=1e-6)


def test_float64_stays_float64():
  with jax.enable_x64(True):
    x, w = random(1, 5, 5, 3, dtype="float64"), random(3, 3, 1, 3, dtype="float64")
    np.testing.assert_allclose(conv.depthwise(x, w), depthwise_loops(x, w, 0), rtol=1e-12)


def test_vmap_over_images_and_over_filters():
  x, w = random(3, 2, 6, 6, 8), random(3, 3, 3, 1, 8)
  over_both = jax.vmap(conv.depthwise)(x, w)
  over_images = jax.vmap(conv.depthwise, (0, None))(x, w[0])
  for i in range(3):
    np.testing.assert_allclose(over_both[i], depthwise_loops(x[i], w[i], 0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(over_images[i], depthwise_loops(x[i], w[0], 0), rtol=1e-5, atol=1e-5)


def test_modules_have_the_documented_parameters():
  x = jnp.ones((1, 4, 4, 8))
  depthwise = conv.DepthwiseConv(kernel_size=3).init(jax.random.key(0), x)["params"]
  grouped = conv.GroupedPointwiseConv(features=16, groups=2).init(jax.random.key(0), x)["params"]
  shapes = lambda tree: {name: leaf.shape for name, leaf in tree.items()}
  assert shapes(depthwise) == {"kernel": (3, 3, 1, 8), "bias": (8,)}
  assert shapes(grouped) == {"kernel": (1, 1, 4, 16), "bias": (16,)}


@pytest.mark.parametrize(
  ("call", "argument"),
  [
    (lambda: conv.depthwise(jnp.ones((4, 4)), jnp.ones((3, 3, 1, 4))), "kernel"),
    (lambda: conv.depthwise(jnp.ones((1, 4, 4, 8)), jnp.ones((3, 3, 1, 4))), "kernel"),
    (lambda: conv.depthwise(jnp.ones((1, 4, 4, 8)), jnp.ones((2, 2, 1, 8))), "kernel"),
    (lambda: conv.depthwise(jnp.ones((1, 4, 4, 8)), jnp.ones((3, 5, 1, 8))), "kernel"),
    (lambda: conv.depthwise(jnp.ones((1, 4, 4, 8)), jnp.ones((3, 3, 1, 8)), jnp.ones(4)), "bias"),
    (lambda: conv.depthwise(jnp.ones((1, 4, 4, 8)), jnp.ones((3, 3, 1, 8)), stride=0), "stride"),
    (lambda: conv.grouped_pointwise(jnp.ones((2, 8)), jnp.ones((4, 16))), "kernel"),
    (lambda: conv.grouped_pointwise(jnp.ones((2, 8)), jnp.ones((1, 1, 3, 16))), "kernel"),
    (lambda: conv.grouped_pointwise(jnp.ones((2, 8)), jnp.ones((1, 1, 4, 15))), "kernel"),
    (lambda: conv.grouped_pointwise(jnp.ones((2, 8)), jnp.ones((1, 1, 4, 16)), jnp.ones(8)), "bias"),
    (lambda: conv.GroupedPointwiseConv(features=9, groups=2).init(jax.random.key(0), jnp.ones((1, 8))), "groups"),
  ],
)
def test_bad_input(call, argument):
  with pytest.raises(ValueError, match=f"^{argument}: got"):
    call()


# By patches, and by the host kernel: channels decide.
@pytest.mark.parametrize(
  ("k", "stride", "padding", "size", "inputs", "outputs"),
  [
    (3, 2, 1, (7, 8), 3, 5),
    (2, 2, 0, (6, 5), 3, 5),
    (7, 4, 3, (9, 9), 3, 5),
    (3, 1, 1, (9, 10), 16, 24),
    (4, 2, 0, (18, 19), 16, 24),
  ],
)
def test_dense_form_equals_xla(k, stride, padding, size, inputs, outputs, monkeypatch):
  x, w, b = random(2, *size, inputs), random(k, k, inputs, outputs), random(outputs)
  function = lambda x, w, b: conv.dense(x, w, b, stride=stride, padding=padding)
  y, vjp = jax.vjp(function, x, w, b)
  g = random(*y.shape)
  mine = (y, *vjp(g))
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  y, vjp = jax.vjp(function, x, w, b)
  for a, c in zip(mine, (y, *vjp(g)), strict=True):
    np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-4)
  assert y.shape == (2, *((s + 2 * padding - k) // stride + 1 for s in size), outputs)


@pytest.mark.parametrize(
  ("call", "argument"),
  [
    (lambda x, w: conv.dense(x[0], w, stride=2), "kernel"),
    (lambda x, w: conv.dense(x, w[:, :, :1], stride=2), "kernel"),
    (lambda x, w: conv.dense(x, w, jnp.ones(1), stride=2), "bias"),
    (lambda x, w: conv.dense(x, w, stride=0), "stride"),
    (lambda x, w: conv.dense(x, w, stride=2, padding=-1), "padding"),
  ],
)
def test_bad_dense_input(call, argument):
  with pytest.raises(ValueError, match=f"^{argument}: got"):
    call(jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 5)))


@pytest.mark.parametrize("k", [1, 3])
def test_the_gradient_of_a_narrow_bias_is_the_whole_sum(k):
  x, kernel = jnp.ones((1, 96, 96, 4), jnp.bfloat16), jnp.ones((k, k, 4, 4), jnp.bfloat16)
  total = lambda bias: conv.dense(x, kernel, bias, padding=k // 2).astype("float32").sum()
  np.testing.assert_array_equal(jax.jit(jax.grad(total))(jnp.zeros(4, jnp.bfloat16)), 96**2)
