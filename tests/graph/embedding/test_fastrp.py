"""What the specification says must hold, as far as seconds suffice; scores and times: `experiments/fastrp.py`."""

import functools
import itertools
import pathlib

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from jaxlab.graph import sparse
from jaxlab.graph.embedding import fastrp

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[2] / "golden/fastrp.npz"))
N, DIM = 24, 6
WEIGHTS = (0.5, 1.0, 2.0, 6.67)
OPTIONS = ("similarity", "normalize")
embed = jax.jit(fastrp.embed, static_argnames=OPTIONS)
powers = jax.jit(fastrp.powers, static_argnames=("hops", *OPTIONS))


def weighted_graph(seed, directed=False):
  """Dense S with weights in [0.1, 1] at 122 places, whatever the seed; loops at nodes 0 and 5; node 3 is isolated."""
  rng = np.random.default_rng(seed)
  nodes = np.delete(np.arange(N), 3)
  a, b = np.meshgrid(nodes, nodes)
  a, b = (a[a != b], b[a != b]) if directed else (a[a < b], b[a < b])
  chosen = rng.permutation(a.size)[: 120 if directed else 60]
  s = np.zeros((N, N))
  s[a[chosen], b[chosen]] = rng.uniform(0.1, 1, chosen.size)
  s = s if directed else s + s.T
  s[[0, 5], [0, 5]] = 0.7
  return s


def operator(s, dtype="float32"):
  return sparse.from_scipy(scipy.sparse.csr_array(s), dtype)


def dense_powers(s, r, hops, similarity, exponent):
  """P^k D^b R for k = 1..hops, with matrices that are multiplied by themselves first."""
  degree = s.sum(axis=1)
  with np.errstate(divide="ignore"):
    p = np.where(degree > 0, 1 / degree, 0)[:, None] * s if similarity == "transition" else s
    scaling = np.diag(np.where(degree > 0, degree**exponent, 0))
  return np.stack([np.linalg.matrix_power(p, k) @ scaling @ r for k in range(1, hops + 1)])


def standardized(x):
  return (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)


# ------------------------------------------------------------------------------------------------------- definition


@pytest.mark.parametrize("name", [k for k in GOLDEN if " " in k])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_official_outputs(name, dtype, tolerance):
  kind, similarity, rows, exponent, merge = name.split()
  options = {"similarity": similarity, "normalize": rows == "unit", "degree_exponent": float(exponent)}
  with jax.enable_x64(dtype == "float64"):
    s, r = operator(GOLDEN["adjacency"], dtype), jnp.asarray(GOLDEN[f"projection_{kind}"], dtype)
    if merge == "weighted":
      got = embed(s, r, weights=GOLDEN["weights"], **options)
    else:
      got = fastrp.combine(powers(s, r, 4, **options), None)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, GOLDEN[name], atol=tolerance * np.abs(GOLDEN[name]).max(), rtol=0)


def test_golden_holds_every_option_and_an_isolated_node():
  names = itertools.product(
    ("sparse", "gaussian"), ("transition", "adjacency"), ("unit", "raw"), ("-0.64", "0.0"), ("weighted", "concatenated")
  )
  assert {" ".join(n) for n in names} == {k for k in GOLDEN if " " in k}
  assert (GOLDEN["adjacency"].sum(axis=1) == 0).any()


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("similarity", ["transition", "adjacency"])
@pytest.mark.parametrize("exponent", [0.0, -0.37, -1.0])
def test_dense_closed_form(directed, similarity, exponent):
  s, r = weighted_graph(1, directed), np.random.default_rng(2).normal(size=(N, DIM))
  want = dense_powers(s, r, 4, similarity, exponent)
  options = {"similarity": similarity, "degree_exponent": exponent, "normalize": False}
  with jax.enable_x64(True):
    op = operator(s, "float64")
    np.testing.assert_allclose(powers(op, r, 4, **options), want, atol=1e-10 * np.abs(want).max(), rtol=0)
    got = embed(op, r, weights=WEIGHTS, **options)
    np.testing.assert_allclose(got, standardized(np.tensordot(WEIGHTS, want, 1)), atol=1e-10)


def test_each_power_is_normalized_and_not_their_sum():
  s, r = weighted_graph(3), np.random.default_rng(4).normal(size=(N, DIM))
  u = dense_powers(s, r, 4, "transition", -0.64)
  length = np.linalg.norm(u, axis=2, keepdims=True)
  unit = u / np.where(length > 0, length, 1)
  got = powers(operator(s), jnp.float32(r))
  np.testing.assert_allclose(got, unit, atol=1e-5)
  assert not np.asarray(got[:, 3]).any()  # the isolated node
  want = standardized(np.tensordot(WEIGHTS, unit, 1))
  np.testing.assert_allclose(embed(operator(s), jnp.float32(r), weights=WEIGHTS), want, atol=1e-5)


@pytest.mark.parametrize("weights", [WEIGHTS, (0.0, 0.0, 1.0, 6.67), (1.0,)])
@pytest.mark.parametrize("normalize", [True, False])
def test_combined_powers_are_the_embedding(weights, normalize):
  op, r = operator(weighted_graph(5)), fastrp.projection(jax.random.key(0), N, DIM, "gaussian")
  got = fastrp.combine(powers(op, r, len(weights), normalize=normalize), weights)
  np.testing.assert_allclose(got, embed(op, r, weights=weights, normalize=normalize), atol=1e-5)


def test_default_options_are_those_of_the_notebook():
  op, r = operator(weighted_graph(5)), fastrp.projection(jax.random.key(0), N, DIM, "gaussian")
  notebook = {"weights": (0, 0, 1, 6.67), "similarity": "transition", "degree_exponent": -0.64, "normalize": True}
  np.testing.assert_array_equal(embed(op, r), embed(op, r, **notebook))


def test_isolated_nodes_share_an_embedding():
  s = weighted_graph(6)
  s[10] = s[:, 10] = 0
  r = fastrp.projection(jax.random.key(1), N, DIM, "gaussian")
  got = np.asarray(embed(operator(s), r))
  assert np.isfinite(got).all()
  np.testing.assert_array_equal(got[3], got[10])
  # They send nothing either: their rows of R do not matter.
  np.testing.assert_array_equal(got, embed(operator(s), r.at[jnp.array([3, 10])].set(100.0)))


def test_a_graph_without_edges_is_embedded_at_zero():
  assert not np.asarray(embed(operator(np.zeros((N, N))), jnp.ones((N, DIM)))).any()


# ------------------------------------------------------------------------------------------------------- properties


@hypothesis.given(seed=st.integers(0, 10**6), order=st.permutations(range(N)), directed=st.booleans())
def test_relabelling_nodes_relabels_rows(seed, order, directed):
  s, order = weighted_graph(seed, directed), np.array(order)
  r = fastrp.projection(jax.random.key(seed), N, DIM, "gaussian")
  got = embed(operator(s[np.ix_(order, order)]), r[order], normalize=False)
  np.testing.assert_allclose(got, embed(operator(s), r, normalize=False)[order], atol=1e-4)


@hypothesis.given(seed=st.integers(0, 10**6), similarity=st.sampled_from(["transition", "adjacency"]))
def test_columns_have_mean_0_and_deviation_1(seed, similarity):
  r = fastrp.projection(jax.random.key(seed), N, DIM, "gaussian")
  got = np.asarray(embed(operator(weighted_graph(seed)), r, similarity=similarity))
  np.testing.assert_allclose(got.mean(0), 0, atol=1e-6)
  np.testing.assert_allclose(got.std(0), 1, atol=1e-6)


@hypothesis.given(
  seed=st.integers(0, 10**6), unit=st.floats(1e-4, 1e4), weight=st.floats(0.1, 10), exponent=st.floats(-1, 0)
)
def test_units_of_edges_and_weights_do_not_matter(seed, unit, weight, exponent):
  s, r = weighted_graph(seed), fastrp.projection(jax.random.key(seed), N, DIM, "gaussian")
  got = embed(operator(unit * s), r, weights=weight * np.array(WEIGHTS), degree_exponent=exponent)
  np.testing.assert_allclose(got, embed(operator(s), r, weights=WEIGHTS, degree_exponent=exponent), atol=1e-4)


@pytest.mark.parametrize("unit", [1e-8, 1e8])
def test_powers_of_large_and_small_weights_keep_their_rows(unit):
  """U_4 is of order unit^4, the square of which float32 does not hold."""
  s, r = weighted_graph(0), fastrp.projection(jax.random.key(0), N, DIM, "gaussian")
  got = embed(operator(unit * s), r, similarity="adjacency")
  np.testing.assert_allclose(got, embed(operator(s), r, similarity="adjacency"), atol=1e-4)


@hypothesis.given(hnp.arrays("float32", (40, 3), elements=st.floats(-1, 1, width=32)), st.floats(-1e3, 1e3))
def test_standardize(x, shift):
  x = np.float32(x + np.float32(shift))
  got = np.asarray(fastrp.standardize(jnp.asarray(x)))
  std = np.float64(x).std(0)
  varies = std > 1e-4 * np.abs(x).max(0) + 1e-12
  np.testing.assert_allclose(got[:, varies], standardized(np.float64(x))[:, varies], atol=2e-3)
  assert not got[:, x.min(0) == x.max(0)].any()  # constant, whatever the constant


def test_rounding_noise_is_not_a_signal():
  x = np.tile(np.float32([0.1, -3.7, 1e4]), (50, 1))
  x[::2] = np.nextafter(x[::2], np.float32(np.inf))
  assert not np.asarray(fastrp.standardize(jnp.asarray(x))).any()


def test_what_is_not_a_number_stays_so():
  x = np.float32([[1, np.nan, 0], [2, 1, np.inf], [4, 2, 1]])
  got = np.asarray(fastrp.standardize(jnp.asarray(x)))
  assert np.isfinite(got[:, 0]).all() and np.isnan(got[:, 1:]).all()
  op, r = operator(weighted_graph(0)), fastrp.projection(jax.random.key(0), N, DIM, "gaussian")
  assert np.isnan(embed(op, r, weights=jnp.array([np.nan, 1]))).all()  # traced, so not refused
  with pytest.raises(ValueError, match="^weights: got"):  # a constant of the traced function
    jax.jit(lambda op, r: fastrp.embed(op, r, weights=(np.nan, 1)))(op, r)


def test_one_trace_for_all_weights_and_exponents():
  traces = []

  @jax.jit
  def run(op, r, weights, exponent):
    traces.append(1)
    return fastrp.embed(op, r, weights=weights, degree_exponent=exponent)

  op, r = operator(weighted_graph(0)), fastrp.projection(jax.random.key(0), N, DIM)
  for weight, exponent in ((1.0, -0.5), (30.0, 0.0)):
    run(op, r, jnp.array([0, 0, 1, weight]), exponent)
  assert len(traces) == 1
  exponents = jnp.linspace(-1, 0, 5)
  many = jax.vmap(lambda b: fastrp.embed(op, r, degree_exponent=b))(exponents)
  np.testing.assert_allclose(many[2], embed(op, r, degree_exponent=exponents[2]), atol=1e-5)


def test_gradient_towards_edges_is_finite_and_right():
  s, r = weighted_graph(2), fastrp.projection(jax.random.key(0), N, DIM, "gaussian")
  target = jax.random.normal(jax.random.key(1), (N, DIM))
  with jax.enable_x64(True):
    op, r, target = operator(s, "float64"), jnp.float64(r), jnp.float64(target)

    def loss(values):
      return jnp.sum(target * fastrp.embed(op.replace_values(values), r))

    gradient = jax.jit(jax.grad(loss))(op.values)
    assert np.isfinite(gradient).all()
    step = 1e-6 * jnp.asarray(np.random.default_rng(0).normal(size=op.values.shape))
    slope = (loss(op.values + step) - loss(op.values - step)) / 2
    np.testing.assert_allclose(jnp.vdot(gradient, step), slope, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- projection


def test_very_sparse_entries():
  n, dim = 2500, 400
  r = np.asarray(fastrp.projection(jax.random.key(0), n, dim))
  assert r.shape == (n, dim) and r.dtype == np.float32
  count, share = r.size, n**-0.5
  nonzero = np.count_nonzero(r)
  assert abs(nonzero - count * share) < 4 * np.sqrt(count * share * (1 - share))
  assert abs(np.count_nonzero(r > 0) - nonzero / 2) < 4 * np.sqrt(nonzero / 4)
  np.testing.assert_allclose(np.abs(r[r != 0]), n**0.25 / dim**0.5, rtol=1e-6)
  # Independent draws: counts of rows and of columns scatter as binomial ones do.
  for axis in (0, 1):
    counts = np.count_nonzero(r, axis=axis)
    assert 0.8 < counts.var() / (r.shape[axis] * share * (1 - share)) < 1.25


def test_gaussian_entries():
  r = np.asarray(fastrp.projection(jax.random.key(0), 1000, 100, "gaussian")) * 10
  assert abs(r.mean()) < 4 / np.sqrt(r.size)
  assert abs((r**2).mean() - 1) < 4 * np.sqrt(2 / r.size)
  assert abs((r**4).mean() - 3) < 4 * np.sqrt(96 / r.size)


def test_orthogonal_columns_favour_no_direction():
  n, dim, draws = 20, 4, 400
  draw = jax.vmap(functools.partial(fastrp.projection, n=n, dim=dim, kind="orthogonal"))
  r = np.asarray(draw(jax.random.split(jax.random.key(0), draws)))
  np.testing.assert_allclose(r[0].T @ r[0], np.eye(dim) * n / dim, atol=1e-5)
  assert np.abs(r.mean(0)).max() < 5 / np.sqrt(dim * draws)


@pytest.mark.parametrize("kind", ["sparse", "gaussian", "orthogonal"])
def test_projection_keeps_inner_products(kind):
  """E[x R R^T y] = x y, with a deviation of about 1 / sqrt(dim)."""
  n, draws = 100, 300
  rng = np.random.default_rng(0)
  x = rng.normal(size=n)
  y = x + rng.normal(size=n)
  x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
  for dim in (8, 32):
    draw = jax.jit(jax.vmap(functools.partial(fastrp.projection, n=n, dim=dim, kind=kind)))
    r = np.asarray(draw(jax.random.split(jax.random.key(dim), draws)), "float64")
    products = np.einsum("i,bid,bjd,j->b", x, r, r, y, optimize=True)
    # Exact for independent entries, with their kurtosis; orthogonal columns do a little better.
    kurtosis = {"sparse": n**0.5, "gaussian": 3, "orthogonal": 3}[kind]
    deviation = np.sqrt((1 + (x @ y) ** 2 + (kurtosis - 3) * np.sum(x**2 * y**2)) / dim)
    assert abs(products.mean() - x @ y) < 4 * deviation / np.sqrt(draws)
    assert (0.7 if kind == "orthogonal" else 0.85) < products.std() / deviation < 1.15
    second_moment = np.einsum("bid,bjd->ij", r, r, optimize=True) / draws
    assert abs(np.trace(second_moment) / n - 1) < 0.02


# ------------------------------------------------------------------------------------------------------------- cost


def ring(n, reach):
  """Every node with its `reach` nearest on each side: 2 n reach entries."""
  offsets = np.concatenate([np.arange(1, reach + 1), -np.arange(1, reach + 1)])
  columns = (np.arange(n)[:, None] + offsets).ravel() % n
  return operator(
    scipy.sparse.csr_array((np.ones(columns.size), (np.repeat(np.arange(n), 2 * reach), columns)), (n, n))
  )


def temporary(op, r, function=embed, **options):
  """Bytes that the compiled function needs beside its arguments and its result, and those of the result."""
  memory = function.lower(op, r, **options).compile().memory_analysis()
  return memory.temp_size_in_bytes, memory.output_size_in_bytes


def sizes(jaxpr):
  """Number of elements of every intermediate, also in loops and calls."""
  for equation in jaxpr.eqns:
    yield from (v.aval.size for v in equation.outvars)
    for inner in jax.core.jaxprs_in_params(equation.params):
      yield from sizes(inner)


def test_memory_is_linear_in_nodes_and_edges():
  n, dim = 20_000, 16
  r = fastrp.projection(jax.random.key(0), n, dim)
  small, large = ring(n, 2), ring(n, 20)
  few, many = temporary(small, r)[0], temporary(large, r)[0]
  assert few < 6 * 4 * n * dim
  assert many - few <= 3 * 4 * (large.rows.size - small.rows.size)  # a few numbers for each edge, none times dim
  # The second power has twice as many entries as the matrix; nothing of that size, or of n x n, ever exists.
  found = max(sizes(jax.make_jaxpr(fastrp.embed)(large, r).jaxpr))
  assert found <= max(n * dim, large.rows.size)


def test_memory_does_not_grow_with_the_number_of_powers():
  n, dim = 5000, 16
  op, r = ring(n, 2), fastrp.projection(jax.random.key(0), n, dim)
  short, long = (temporary(op, r, weights=np.ones(q, "float32"))[0] for q in (2, 12))
  assert long <= short + 1024
  assert temporary(op, r, powers, hops=12)[1] == 12 * 4 * n * dim


def test_operations_are_linear_in_edges():
  """One product an edge, column and power: the same program whatever the number of edges."""

  def products(op, q):
    jaxpr = jax.make_jaxpr(lambda op, r: fastrp.embed(op, r, weights=np.ones(q)))(op, jnp.ones((500, 4))).jaxpr
    loops = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    return [e.params["length"] for e in loops], len(jaxpr.eqns), str(loops[0].params["jaxpr"]).count("ffi_call[")

  assert products(ring(500, 2), 3) == products(ring(500, 40), 3)
  assert products(ring(500, 2), 3)[::2] == ([3], 1)
