"""Sparse products and segment reductions against dense matrices."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest
import scipy.sparse

from jaxlab import kernels
from jaxlab.graph import sparse


def matrix(rows, columns, density=0.2, seed=0):
  rng = np.random.default_rng(seed)
  return scipy.sparse.random_array((rows, columns), density=density, rng=rng, dtype="float32").tocsr()


def random(*shape, seed=1):
  return np.random.default_rng([seed, *shape]).standard_normal(shape).astype("float32")


def dense(op, values):
  return jnp.zeros(op.shape).at[op.rows, op.columns].add(values)


@pytest.fixture(params=["host", "xla"], autouse=True, scope="module")
def form(request):
  """Every test runs with the host kernels and with XLA's operations."""
  if request.param == "host" and not kernels.available():
    pytest.skip("host kernels are for the CPU backend")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(kernels, "available", lambda: request.param == "host")
    jax.clear_caches()  # or programs traced in the other form would be used again
    yield
  jax.clear_caches()


@hypothesis.given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 70), st.floats(0, 1), st.integers(0, 99))
def test_propagate_is_the_matrix_product(rows, columns, width, density, seed):
  a, x = matrix(rows, columns, density, seed), random(columns, width)
  np.testing.assert_allclose(sparse.propagate(sparse.from_scipy(a), x), a.toarray() @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 7, 16, 33, 64, 130])
def test_first_and_second_gradients(width):
  op, x = sparse.from_scipy(matrix(12, 9)), random(9, width)
  loss = lambda v, x: (jnp.sin(sparse.propagate(op, x, v)) ** 2).mean()
  reference = lambda v, x: (jnp.sin(dense(op, v) @ x) ** 2).mean()
  second = lambda f: jax.grad(lambda v, x: sum(jnp.cos(g).sum() for g in jax.grad(f, (0, 1))(v, x)), (0, 1))
  for mine, theirs in ((jax.grad(loss, (0, 1)), jax.grad(reference, (0, 1))), (second(loss), second(reference))):
    chex.assert_trees_all_close(mine(op.values, x), theirs(op.values, x), rtol=1e-4, atol=1e-6)


def test_gradient_reaches_the_stored_values():
  op, x = sparse.from_scipy(matrix(6, 5, 0.5)), random(5, 3)
  grad = jax.grad(lambda op: sparse.propagate(op, x).sum(), allow_int=True)(op)
  np.testing.assert_allclose(grad.values, x.sum(1)[op.columns], rtol=1e-5)


@pytest.mark.parametrize("axes", [(None, 0), (0, None), (0, 0)])
def test_vmap_over_features_and_weights(axes):
  op = sparse.from_scipy(matrix(8, 8))
  values = random(4, op.values.shape[0]) if axes[0] == 0 else op.values
  x = random(4, 8, 5) if axes[1] == 0 else random(8, 5)

  def value_and_grads(v, x):
    return jax.value_and_grad(lambda v, x: (sparse.propagate(op, x, v) ** 2).sum(), (0, 1))(v, x)

  many = jax.vmap(value_and_grads, axes)(values, x)
  pick = lambda a, axis, i: a[i] if axis == 0 else a
  for i in range(4):
    one = value_and_grads(pick(values, axes[0], i), pick(x, axes[1], i))
    chex.assert_trees_all_close(jax.tree.map(lambda a, i=i: a[i], many), one, rtol=1e-5)


def test_vmap_of_vmap_and_over_operators():
  op, x = sparse.from_scipy(matrix(8, 8)), random(2, 3, 8, 5)
  y = jax.vmap(jax.vmap(sparse.propagate, (None, 0)), (None, 0))(op, x)
  np.testing.assert_allclose(y, np.einsum("rc,abcf->abrf", dense(op, op.values), x), rtol=1e-5, atol=1e-5)
  a, b = (sparse.from_scipy(scipy.sparse.csr_array(np.roll(np.diag(np.ones(6, "float32")), s, 1))) for s in (0, 2))
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), a, b)
  z = jax.vmap(sparse.propagate)(stacked, random(2, 6, 3))
  np.testing.assert_allclose(z[1], np.roll(random(2, 6, 3)[1], -2, 0), rtol=1e-6)


@pytest.mark.parametrize(("batch", "width"), [(2, 1), (5, 8), (7, 3), (23, 5)])
def test_vmap_of_many_narrow_arrays(batch, width):
  a, x = matrix(70, 6), random(batch, 6, width)
  y = jax.vmap(sparse.propagate, (None, 0))(sparse.from_scipy(a), x)
  np.testing.assert_allclose(y, a.toarray() @ x, rtol=1e-5, atol=1e-6)


def test_trailing_axes_and_dtypes():
  op, x = sparse.from_scipy(matrix(8, 6)), random(6, 2, 3)
  y = sparse.propagate(op, x)
  np.testing.assert_allclose(y, np.einsum("rc,cij->rij", dense(op, op.values), x), rtol=1e-5, atol=1e-6)
  half = sparse.propagate(op, jnp.asarray(x, "bfloat16"))
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(half, "float32"), y, rtol=0.02, atol=0.02)
  assert sparse.propagate(op, x[:, 0, 0]).shape == (8,)
  with jax.enable_x64(True):
    exact = sparse.from_scipy(matrix(8, 6), "float64")
    z = np.random.default_rng(0).standard_normal((6, 4))
    np.testing.assert_allclose(sparse.propagate(exact, z), dense(exact, exact.values) @ z, rtol=1e-12, atol=1e-14)


def test_bfloat16_sums_do_not_saturate():
  """A thousand ones: a bfloat16 accumulator stops at 256."""
  op = sparse.from_scipy(np.ones((1, 1000), "float32"))
  assert sparse.propagate(op, jnp.ones((1000, 1), "bfloat16"))[0, 0] == 1000


def test_transpose():
  a, g = matrix(7, 5), random(7, 4)
  op = sparse.from_scipy(a)
  flipped = sparse.transpose(op)
  assert flipped.shape == (5, 7)
  np.testing.assert_allclose(sparse.propagate(flipped, g), a.T @ g, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_equal(sparse.transpose(flipped), op)


def graph(senders, receivers, n, edges=None):
  order = np.argsort(receivers, kind="stable")
  return jraph.GraphsTuple(
    np.zeros((n, 1), "float32"), None if edges is None else edges[order], receivers[order], senders[order], None,
    np.array([n]), np.array([len(senders)]),
  )  # fmt: skip


def test_graph_and_operator_agree_eager_and_traced():
  rng = np.random.default_rng(0)
  g = graph(rng.integers(0, 9, 30), rng.integers(0, 9, 30), 9, rng.standard_normal(30).astype("float32"))
  x = random(9, 4)
  expected = np.zeros((9, 4))
  np.add.at(expected, g.receivers, g.edges[:, None] * x[g.senders])
  for y in (
    sparse.propagate(g, x),
    sparse.propagate(sparse.operator(g), x),
    jax.jit(sparse.propagate)(g, x),
    jax.jit(lambda g, x: sparse.propagate(sparse.operator(g), x))(g, x),
    jax.jit(lambda x: sparse.propagate(g._replace(nodes=x), x))(x),  # edges that are not traced
  ):
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_sparse_node_features_are_counted_by_row():
  g = graph(np.arange(3), np.arange(3), 3)._replace(nodes=sparse.from_scipy(matrix(3, 40, 0.1)))
  assert sparse.operator(g).shape == (3, 3)


def test_no_retrace_on_another_graph():
  chex.clear_trace_counter()
  traced = chex.assert_max_traces(lambda op, x: sparse.propagate(op, x), n=1)
  f = jax.jit(traced)
  rng = np.random.default_rng(0)
  for _ in range(3):
    f(sparse.operator(graph(rng.integers(0, 9, 30), rng.integers(0, 9, 30), 9)), random(9, 2))


def test_segments():
  op = sparse.from_scipy(matrix(10, 10, 0.3))  # some rows are empty
  rows, data = np.asarray(op.rows), random(op.rows.shape[0], 3)
  total, mean, largest = np.zeros((10, 3)), np.zeros((10, 3)), np.zeros((10, 3))
  soft = np.zeros_like(data)
  for r in np.unique(rows):
    mine = data[rows == r]
    total[r], mean[r], largest[r] = mine.sum(0), mine.mean(0), mine.max(0)
    soft[rows == r] = np.exp(mine) / np.exp(mine).sum(0)
  assert len(np.unique(rows)) < 10
  np.testing.assert_allclose(sparse.segment_sum(op, data), total, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(sparse.segment_mean(op, data), mean, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(sparse.segment_max(op, data), largest, rtol=1e-5)
  np.testing.assert_allclose(sparse.segment_softmax(op, data), soft, rtol=1e-5)


def test_no_edges():
  op = sparse.operator(graph(np.zeros(0, int), np.zeros(0, int), 3))
  for f in (sparse.segment_sum, sparse.segment_mean, sparse.segment_max):
    np.testing.assert_array_equal(f(op, jnp.ones((0, 2, 4))), np.zeros((3, 2, 4)))
  assert sparse.segment_softmax(op, jnp.ones((0, 2))).shape == (0, 2)
  np.testing.assert_array_equal(sparse.propagate(op, jnp.ones((3, 2))), np.zeros((3, 2)))


def test_softmax_is_stable_and_has_the_right_gradient():
  op = sparse.from_scipy(np.ones((1, 4), "float32"))
  huge = jnp.asarray([1e4, 1e4, -1e4, 0.0])
  np.testing.assert_allclose(sparse.segment_softmax(op, huge), [0.5, 0.5, 0, 0])
  x, c = random(4), random(4, seed=2)
  mine = jax.grad(lambda x: (sparse.segment_softmax(op, x) * c).sum())(x)
  np.testing.assert_allclose(mine, jax.grad(lambda x: (jax.nn.softmax(x) * c).sum())(x), rtol=1e-4, atol=1e-6)


BAD = scipy.sparse.csr_array(np.array([[1.0, np.nan]], "float32"))


@pytest.mark.parametrize(
  ("call", "argument"),
  [
    (lambda op: sparse.from_scipy(BAD), "matrix"),
    (lambda op: sparse.propagate(op, jnp.ones((3, 2))), "x"),
    (lambda op: sparse.propagate(op, jnp.ones(())), "x"),
    (lambda op: sparse.propagate(op, jnp.ones((6, 2), int)), "x"),
    (lambda op: sparse.propagate(op, jnp.ones((6, 2)), jnp.ones(1)), "weights"),
    (lambda op: sparse.operator(graph(np.arange(3), np.arange(3), 3), np.ones(2)), "weights"),
    (lambda op: sparse.operator(graph(np.arange(3), np.arange(3), 3)._replace(receivers=np.array([2, 1, 0]))), "graph"),
    (lambda op: sparse.segment_sum(op, jnp.ones((1, 2))), "data"),
    (lambda op: sparse.segment_max(op, jnp.ones(())), "data"),
    (lambda op: sparse.segment_softmax(op, jnp.ones(1)), "data"),
  ],
)
def test_bad_input(call, argument):
  with pytest.raises(ValueError, match=f"^{argument}: got"):
    call(sparse.from_scipy(matrix(8, 6)))
