import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.data import synthetic
from jaxlab.graph import sparse
from jaxlab.graph.search import noisy_label_clustering as lfd


def graph(n=60, seed=0, degree=5):
  """A connected random graph: a ring and random chords."""
  rng = np.random.default_rng(seed)
  ring = np.arange(n)
  rows = np.concatenate([ring, rng.integers(0, n, n * (degree - 2) // 2)])
  columns = np.concatenate([(ring + 1) % n, rng.integers(0, n, n * (degree - 2) // 2)])
  rows, columns = rows[rows != columns], columns[rows != columns]
  a = scipy.sparse.coo_array((np.ones(len(rows)), (rows, columns)), (n, n)).tocsr()
  return ((a + a.T) > 0).astype("float32").tocsr()


def weighted(adjacency, labels, epsilon):
  """Dense."""
  a = adjacency.toarray().astype(float)
  return a if labels is None else a * np.where(labels[:, None] == labels[None, :], 1, epsilon)


def wfd(w, source, sink, tolerance=1e-11, seed=0):
  """The official method: nodes in excess, in random order, send it to their neighbours."""
  rng, x, m = np.random.default_rng(seed), np.zeros(len(w)), source.astype(float).copy()
  degree = w.sum(axis=1)
  while (m > sink + tolerance).any():
    for i in rng.permutation(np.flatnonzero(m > sink + tolerance)):
      p = (m[i] - sink[i]) / degree[i]
      x[i] += p
      m[i] = sink[i]
      m += w[i] * p
  return x, m


def full(found, n):
  """Heights and masses of all nodes."""
  x, m = np.zeros(n), np.zeros(n)
  x[found.nodes], m[found.nodes] = found.height, found.mass
  return x, m


CASES = [(None, 1.0), ("labels", 0.05), ("labels", 0.0)]


@pytest.mark.parametrize(("kind", "epsilon"), CASES)
@pytest.mark.parametrize("sink", ["degree", "one"])
def test_heights_are_those_of_the_official_method_and_of_a_quadratic_program(kind, epsilon, sink):
  a, rng = graph(), np.random.default_rng(1)
  labels = None if kind is None else rng.integers(0, 2, 60) * (np.arange(60) > 30)
  w = weighted(a, labels, epsilon)
  capacity = np.asarray(a.sum(axis=1)) if sink == "degree" else np.ones(60)
  source = np.zeros(60)
  source[5] = 0.3 * capacity[:31].sum()
  found = lfd.diffuse(a, 5, source[5], sink=sink, labels=labels, epsilon=epsilon, tolerance=1e-11)
  x, m = full(found, 60)
  assert found.converged and found.feasible
  again, left = wfd(w, source, capacity)
  np.testing.assert_allclose(x, again, atol=1e-6)
  np.testing.assert_allclose(m, left, atol=1e-6)
  laplacian = np.diag(w.sum(axis=1)) - w

  def dual(x):
    return x @ laplacian @ x / 2 + x @ (capacity - source), laplacian @ x + capacity - source

  oracle = scipy.optimize.minimize(
    dual, np.zeros(60), jac=True, method="L-BFGS-B", bounds=[(0, None)] * 60,
    options={"maxiter": 20000, "maxfun": 40000, "ftol": 1e-16, "gtol": 1e-10},
  )  # fmt: skip
  np.testing.assert_allclose(x, oracle.x, atol=1e-4)
  assert dual(x)[0] <= oracle.fun + 1e-9


def test_another_order_of_updates_gives_the_same():
  a = graph()
  capacity, source = np.asarray(a.sum(axis=1)), np.zeros(60)
  source[3] = 50
  heights = [wfd(a.toarray(), source, capacity, seed=s)[0] for s in (1, 2)]
  found = lfd.diffuse(a, 3, 50.0, tolerance=1e-11)
  np.testing.assert_allclose(heights[0], heights[1], atol=1e-7)
  np.testing.assert_allclose(full(found, 60)[0], heights[0], atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 80), st.integers(0, 10**6), st.floats(0.05, 0.9), st.floats(0, 1), st.booleans())
def test_optimality_conservation_and_bounded_support(n, seed, share, epsilon, unit):
  a, rng = graph(n, seed), np.random.default_rng(seed)
  labels = rng.integers(0, 2, n)
  sink = "one" if unit else "degree"
  capacity = np.ones(n) if unit else np.asarray(a.sum(axis=1))
  source = share * capacity.sum()
  found = lfd.diffuse(a, 0, source, sink=sink, labels=labels, epsilon=max(epsilon, 1e-2), tolerance=1e-7)
  x, m = full(found, n)
  assert found.converged and found.feasible
  assert x.min() >= 0 and (m - capacity).max() <= 1e-7
  np.testing.assert_allclose(m[x > 0], capacity[x > 0], atol=1.1e-7)
  np.testing.assert_allclose(m.sum(), source, rtol=1e-9)
  assert capacity[x > 0].sum() <= source + n * 1e-7


def test_more_mass_reaches_further_and_scaled_weights_scale_heights():
  a = graph()
  before = np.zeros(60)
  for source in (10, 20, 60, 120):
    x, m = full(lfd.diffuse(a, 0, source, tolerance=1e-11), 60)
    assert (x >= before - 1e-9).all() and x.sum() > before.sum()
    before = x
  scaled, left = full(lfd.diffuse(a * np.float32(4), 0, 120, tolerance=1e-11), 60)
  np.testing.assert_allclose(scaled, x / 4, atol=1e-8)
  np.testing.assert_allclose(left, m, atol=1e-8)


def test_without_disagreement_labels_change_nothing():
  a, labels = graph(), np.random.default_rng(0).integers(0, 2, 60)
  plain = full(lfd.diffuse(a, 0, 40.0), 60)
  for options in ({"labels": labels, "epsilon": 1.0}, {"labels": np.ones(60, bool), "epsilon": 0.0}):
    np.testing.assert_array_equal(full(lfd.diffuse(a, 0, 40.0, **options), 60), plain)


@pytest.mark.parametrize("nodes", [[60], [-1], [3, 3], [0.5]])
def test_sweeps_refuse_what_is_no_set_of_nodes(nodes):
  with pytest.raises(ValueError, match="^nodes: got"):
    lfd.sweep_conductance(graph(), np.array(nodes))


def test_perfect_labels_hold_all_mass_inside_until_it_does_not_fit():
  a, inside = graph(), np.arange(60) < 20
  room = a.sum(axis=1)[:20].sum()
  found = lfd.diffuse(a, 4, 0.99 * room, labels=inside, epsilon=0.0)
  assert found.feasible and set(found.support) <= set(range(20)) and lfd.f1(found.support, np.arange(20)) > 0.8
  found = lfd.diffuse(a, 4, 1.5 * room, labels=inside, epsilon=0.0)
  assert not found.feasible and not found.converged
  with pytest.raises(ValueError, match="^sources: got"):
    lfd.cluster(a, 4, [1.5 * room, 2 * room], labels=inside, epsilon=0.0)
  assert lfd.cluster(a, 4, [0.5 * room, 2 * room], labels=inside, epsilon=0.0).source == 0.5 * room


def test_only_the_neighbourhood_is_read():
  """Ten times the graph around the same cluster, joined by one edge: same result, same work."""
  a = graph()
  bigger = scipy.sparse.lil_array(scipy.sparse.block_diag([a, *[graph(600, s) for s in range(5)]], dtype="float32"))
  bigger[59, 60] = bigger[60, 59] = 1
  bigger = bigger.tocsr()
  small, large = lfd.diffuse(a, 10, 15.0), lfd.diffuse(bigger, 10, 15.0)
  assert set(small.nodes) <= set(small.support) | set(a[small.support].indices)
  assert 59 not in small.nodes
  np.testing.assert_array_equal(small.nodes, large.nodes)
  np.testing.assert_array_equal(small.height, large.height)
  assert small.work == large.work


def test_a_mass_that_fits_stays_on_the_seed():
  found = lfd.diffuse(graph(), 7, 1.0, sink="one")
  assert found.converged
  np.testing.assert_array_equal(found.support, [7])
  found = lfd.diffuse(graph(), [7, 9], np.array([1.0, 0.5]), sink=np.ones(60))
  np.testing.assert_array_equal(found.support, [7])


@pytest.mark.parametrize(("sink", "room"), [("degree", graph().nnz), ("one", 60), (np.full(60, 0.5), 30)])
def test_more_than_the_graph_holds_is_refused_at_once(sink, room):
  found = lfd.diffuse(graph(), [3, 4], np.array([room, 1.0]), sink=sink)
  assert not found.feasible and not found.converged and found.work == 0
  assert lfd.diffuse(graph(), [3, 4], np.array([0.9 * room, 0.0]), sink=sink).converged


def test_work_is_capped():
  found = lfd.diffuse(graph(), 0, 100.0, max_work=50)
  assert not found.converged and found.feasible and found.work < 80


@pytest.mark.parametrize(("kind", "epsilon"), CASES[:2])
def test_pagerank_is_the_minimum(kind, epsilon):
  a, labels = graph(), None if kind is None else np.random.default_rng(0).integers(0, 2, 60)
  w, alpha, rho = weighted(a, labels, epsilon), 0.2, 2e-3
  found = lfd.pagerank(a, [3, 8], alpha=alpha, rho=rho, labels=labels, epsilon=epsilon, tolerance=1e-10)
  p, r = full(found, 60)
  degree, s = w.sum(axis=1), np.isin(np.arange(60), [3, 8]) / 2
  matrix = np.eye(60) - (1 - alpha) / 2 * (np.eye(60) + w / degree)
  np.testing.assert_allclose(alpha * s - matrix @ p, r, atol=1e-12)

  def objective(p):
    slope = (matrix @ p - alpha * s) / degree
    return p @ (slope - alpha * s / degree) / 2 + rho * alpha * p.sum(), slope + rho * alpha

  oracle = scipy.optimize.minimize(
    objective, np.zeros(60), jac=True, method="L-BFGS-B", bounds=[(0, None)] * 60,
    options={"maxiter": 20000, "ftol": 1e-18, "gtol": 1e-13},
  )  # fmt: skip
  np.testing.assert_allclose(p, oracle.x, atol=1e-6)
  assert degree[p > 0].sum() <= 1 / rho and 0 < (p > 0).sum() < 60


def test_device_solution_is_the_hosts():
  a, rng = graph(), np.random.default_rng(3)
  labels = rng.integers(0, 2, 60)
  sink, source = np.asarray(a.sum(axis=1)), np.zeros((4, 60))
  source[np.arange(4), [0, 7, 30, 59]] = (10, 30, 60, 100)
  with jax.enable_x64(True):
    op = lfd.label_weights(sparse.from_scipy(a, "float64"), jnp.asarray(labels), 0.1)
    solve = jax.jit(jax.vmap(lambda op, source, sink: lfd.solve(op, source, sink, tolerance=1e-9), (None, 0, None)))
    many = jax.tree.map(np.asarray, solve(op, jnp.asarray(source), jnp.asarray(sink, "float64")))
  assert (many.excess <= 1e-9).all() and (many.steps < 3000).all()
  for s, seed in enumerate([0, 7, 30, 59]):
    found = lfd.diffuse(a, seed, source[s, seed], labels=labels, epsilon=0.1, tolerance=1e-11)
    x, m = full(found, 60)
    np.testing.assert_allclose(many.height[s], x, atol=1e-6)
    np.testing.assert_allclose(many.mass[s], m, atol=1e-6)


def test_device_gives_up_on_what_does_not_fit():
  a = graph()
  solution = lfd.solve(sparse.from_scipy(a), jnp.zeros(60).at[0].set(1000.0), jnp.asarray(a.sum(axis=1)), max_steps=200)
  assert solution.steps == 200 and solution.excess > 1


def test_conductance_of_prefixes():
  a, labels = graph(), np.random.default_rng(0).integers(0, 2, 60)
  order = np.random.default_rng(1).permutation(60)
  w = weighted(a, labels, 0.2)
  values = lfd.sweep_conductance(a, order, labels=labels, epsilon=0.2)
  for k in (1, 7, 30, 59):
    inside = np.isin(np.arange(60), order[:k])
    cut, vol = w[inside][:, ~inside].sum(), w[inside].sum()
    np.testing.assert_allclose(values[k - 1], cut / min(vol, w.sum() - vol), rtol=1e-6)
  assert values[-1] == np.inf
  np.testing.assert_allclose(lfd.volume(a, labels, 0.2), w.sum(), rtol=1e-6)


def test_cluster_keeps_the_lowest_conductance():
  a = graph(200, 4)
  sources = np.array([5.0, 40.0, 160.0])
  found = lfd.cluster(a, 0, sources)
  supports = [lfd.diffuse(a, 0, s).support for s in sources]
  conductance = [lfd.sweep_conductance(a, s)[-1] for s in supports]
  assert found.conductance == pytest.approx(min(conductance)) and found.source == sources[np.argmin(conductance)]
  np.testing.assert_array_equal(found.nodes, supports[int(np.argmin(conductance))])
  swept = lfd.cluster(a, 0, sources, sweep=True)
  assert swept.conductance <= found.conductance
  np.testing.assert_allclose(lfd.sweep_conductance(a, swept.nodes)[-1], swept.conductance, rtol=1e-6)


def test_labels_help_on_a_block_model():
  """F1 grows with the labels' accuracy, from seeds whose own label is right."""
  n, k = 2000, 100
  senders, receivers = synthetic.stochastic_blocks((k, n - k), np.array([[0.12, 0.006], [0.006, 0.01]]))
  a = scipy.sparse.csr_array((np.ones(len(senders), "float32"), (receivers, senders)), (n, n))
  inside, rng = np.arange(n) < k, np.random.default_rng(0)

  def score(labels, seeds):
    found = (lfd.diffuse(a, s, 1.5 * k, sink="one", labels=labels).support for s in seeds)
    return np.mean([lfd.f1(f, np.arange(k)) for f in found])

  plain, scores = score(None, range(10)), []
  for accuracy in (0.7, 0.8, 0.9):
    y = inside ^ (rng.random(n) > accuracy)
    scores.append(score(y, np.flatnonzero(y & inside)[:10]))
  assert plain < scores[0] < scores[1] < scores[2] and scores[2] > plain + 0.15
