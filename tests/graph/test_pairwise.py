"""Sums of pairwise messages: the host kernels beside XLA's form and beside a loop over edges."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import scipy.special
from jax.test_util import check_grads

from jaxlab import kernels
from jaxlab.graph import pairwise, sparse

PHI = {
  "identity": lambda z: z,
  "relu": lambda z: np.maximum(z, 0),
  "leaky_relu": lambda z: np.where(z > 0, z, 0.2 * z),
  "gelu": lambda z: z * scipy.special.ndtr(z),
}
R, C, E, F = 9, 70, 200, 5  # columns in two items of work


def make(seed=0, f=F, entries=E):
  """A pattern with repeated entries, empty rows 0 and 8, empty columns; float64 arrays."""
  rng = np.random.default_rng(seed)
  rows = np.sort(rng.integers(1, R - 1, entries)).astype("int32")
  columns = rng.integers(0, C - 3, entries).astype("int32")
  order = np.argsort(columns, kind="stable").astype("int32")
  op = sparse.Operator(
    *map(
      jnp.asarray,
      (
        rows, columns, np.zeros(entries, "float32"), np.searchsorted(rows, np.arange(R + 1)).astype("int32"), order,
        rows[order], np.searchsorted(columns[order], np.arange(C + 1)).astype("int32"),
      ),
    )
  )  # fmt: skip
  return op, rng.normal(size=(R, f)) * 2, rng.normal(size=(C, f)) * 2, rng.normal(size=entries)


def loop(op, q, k, phi, w):
  y = np.zeros((R, q.shape[1]))
  for e in range(len(op.rows)):
    y[op.rows[e]] += w[e] * phi(q[op.rows[e]] + k[op.columns[e]])
  return y


@functools.partial(jax.jit, static_argnums=3)
def sum_of(op, q, k, activation, w):
  return pairwise.sum_of(op, q, k, activation, w)


def f32(*arrays):
  return [jnp.asarray(a, "float32") for a in arrays]


@pytest.mark.parametrize("activation", sorted(PHI))
def test_value_and_gradients(activation):
  op, q, k, w = make()
  q, k, w = f32(q, k, w)
  expected = loop(op, *(np.asarray(a, "float64") for a in (q, k)), PHI[activation], np.asarray(w, "float64"))
  np.testing.assert_allclose(sum_of(op, q, k, activation, w), expected, atol=2e-5)
  assert not expected[0].any() and not np.asarray(sum_of(op, q, k, activation, w))[0].any()

  g = jnp.asarray(np.random.default_rng(1).normal(size=(R, F)), "float32")
  pull = lambda function: jax.vjp(function, q, k, w)[1](g)
  mine = jax.jit(lambda: pull(lambda q, k, w: pairwise.sum_of(op, q, k, activation, w)))()
  plain = jax.jit(lambda: pull(lambda q, k, w: pairwise.device(activation, op, w, q, k)))()
  for a, b in zip(mine, plain, strict=True):
    np.testing.assert_allclose(a, b, atol=3e-5)
    assert np.abs(b).max() > 0.5


def test_gradients_by_differences():
  op, q, k, w = make(entries=20, f=2)
  check_grads(lambda q, k, w: sum_of(op, q, k, "gelu", w), f32(q, k, w), order=1, modes=["rev"], rtol=2e-2, atol=2e-2)


@hypothesis.given(st.sampled_from([1, 3, 8, 16, 17, 33]), st.integers(0, 10))
@hypothesis.settings(max_examples=10, deadline=None)
def test_any_width(f, seed):
  op, q, k, w = make(seed, f)
  np.testing.assert_allclose(
    sum_of(op, *f32(q, k), "gelu", *f32(w)), loop(op, q, k, PHI["gelu"], w), atol=5e-5, rtol=1e-5
  )


def test_gelu_over_its_whole_range():
  """One edge with q = z and k = 0: value and slope to a few units of the last place of 1, infinitely far out too."""
  z = np.concatenate([np.linspace(-15, 15, 6001), [-1e4, -200.0, 200.0, 1e4, 0.0]]).astype("float32")[None]
  op = sparse.from_scipy(np.ones((1, 1), "float32"))
  function = lambda q: pairwise.sum_of(op, q, jnp.zeros_like(q), "gelu", jnp.ones(1))
  value, pull = jax.vjp(function, jnp.asarray(z))
  wide = z.astype("float64")
  density = np.exp(-(wide**2) / 2) / np.sqrt(2 * np.pi)
  np.testing.assert_allclose(value, wide * scipy.special.ndtr(wide), atol=1e-6, rtol=5e-7)
  np.testing.assert_allclose(pull(jnp.ones_like(z))[0], scipy.special.ndtr(wide) + wide * density, atol=1e-6)


def test_forms_of_other_backends(monkeypatch):
  op, q, k, w = make()
  q, k, w = f32(q, k, w)
  loss = lambda q, k, w: (pairwise.sum_of(op, q, k, "gelu", w) ** 2).sum()
  host = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, w)
  monkeypatch.setattr(kernels, "available", lambda: False)
  other = jax.jit(jax.grad(lambda q, k, w: loss(q, k, w), (0, 1, 2)))(q, k, w)
  for a, b in zip(host, other, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_half_precision_sums_in_single():
  op, q, k, w = make()
  narrow = sum_of(op, *(a.astype("bfloat16") for a in f32(q, k)), "relu", *f32(w))
  assert narrow.dtype == jnp.bfloat16
  rounded = [np.asarray(jnp.asarray(a, "bfloat16"), "float64") for a in (q, k)]
  expected = loop(op, *rounded, PHI["relu"], w)
  assert np.abs(np.asarray(narrow, "float64") - expected).max() < 2**-8 * np.abs(expected).max()


def test_vmap_is_a_loop():
  op, q, k, w = make()
  q, k, w = f32(np.stack([q, -q, 2 * q]), k, w)
  both = lambda q: jax.value_and_grad(lambda q: (pairwise.sum_of(op, q, k, "relu", w) ** 2).sum())(q)
  value, grad = jax.jit(jax.vmap(both))(q)
  for i in range(3):
    one = jax.jit(both)(q[i])
    np.testing.assert_allclose(value[i], one[0], rtol=1e-5)
    np.testing.assert_allclose(grad[i], one[1], rtol=1e-4, atol=1e-4)


def test_ends_of_edges():
  op, q, k, _ = make()
  q, k = f32(q, k)
  np.testing.assert_array_equal(pairwise.at_receivers(op, q), q[op.rows])
  np.testing.assert_array_equal(pairwise.at_senders(op, k), k[op.columns])
  g = jnp.asarray(np.random.default_rng(2).normal(size=(E, F)), "float32")
  for function, index, x in ((pairwise.at_receivers, op.rows, q), (pairwise.at_senders, op.columns, k)):
    expected = np.zeros(x.shape)
    np.add.at(expected, np.asarray(index), np.asarray(g, "float64"))
    got = jax.jit(lambda x, function=function: jax.vjp(lambda x: function(op, x), x)[1](g)[0])(x)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_no_array_over_edges_is_made():
  """Value and gradient of 40 times as many edges need the same memory, less than one such array has."""
  if not kernels.available():
    return
  width, temporary = 64, []
  for count in (500, 20_000):
    rng = np.random.default_rng(0)
    op = sparse.from_scipy(scipy.sparse.coo_array((np.ones(count), rng.integers(0, 300, (2, count))), (300, 300)))
    x, w = jnp.ones((300, width)), jnp.ones(op.rows.shape[0])
    loss = lambda op, q, k, w: (pairwise.sum_of(op, q, k, "relu", w) ** 2).sum()
    temporary.append(jax.jit(jax.grad(loss, (1, 2))).lower(op, x, x, w).compile().memory_analysis().temp_size_in_bytes)
  assert temporary[1] - temporary[0] < 3 * 4 * op.rows.shape[0]  # vectors of weights only
  assert temporary[1] < 4 * op.rows.shape[0] * width / 4


@pytest.mark.parametrize(
  "change, argument",
  [
    ({"activation": "tanh"}, "activation"),
    ({"q": jnp.ones((R + 1, F))}, "q"),
    ({"k": jnp.ones((C, F + 1))}, "k"),
    ({"k": jnp.ones((C, F, 1))}, "k"),
    ({"weights": jnp.ones(E - 1)}, "weights"),
  ],
)
def test_bad_input(change, argument):
  op, q, k, w = make()
  arguments = {"q": jnp.asarray(q), "k": jnp.asarray(k), "activation": "relu", "weights": jnp.asarray(w)} | change
  with pytest.raises(ValueError, match=f"^{argument}: got "):
    pairwise.sum_of(op, **arguments)
