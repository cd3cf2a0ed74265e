"""The card's fixture and the bounds' properties, against gradients that are sampled or enumerated."""

import functools
import itertools
import json

import golden_rule
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from jaxlab.analysis import local_lipschitz as ll

METHODS = ("lip_crown", "recurjac", "interval")


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


# ---------------------------------------------------------------------------------------------- oracles, in plain NumPy


def dense(rng, sizes, bias=0.3):
  return tuple(
    ll.Dense(rng.standard_normal((i, o)) / i**0.5, bias * rng.standard_normal(o)) for i, o in itertools.pairwise(sizes)
  )


def conv(rng, bias=0.3):
  """3x3 with stride 2 and padding, then 2x2 without, on 5x5x2: 5x5x2 -> 3x3x3 -> 2x2x4 -> 3."""
  kernels = rng.standard_normal((3, 3, 2, 3)) / 4, rng.standard_normal((2, 2, 3, 4)) / 3
  shifts = bias * rng.standard_normal(3), bias * rng.standard_normal(4)
  first = ll.Conv(kernels[0], shifts[0], (2, 2), ((1, 1), (1, 1)))
  return first, ll.Conv(kernels[1], shifts[1], (1, 1), "VALID"), *dense(rng, (16, 3))


def matrices(network, shape):
  """W_k and b_k as matrices and vectors, a convolution's by its definition."""
  out = []
  for layer in network:
    kernel, bias = np.asarray(layer.kernel), np.asarray(layer.bias)
    if kernel.ndim == 2:
      out.append((kernel.T, bias))
      continue
    h, w, _ = shape
    pad = 1 if layer.padding != "VALID" else 0
    stride, (kh, kw, _, o) = layer.strides[0], kernel.shape
    oh, ow = (h + 2 * pad - kh) // stride + 1, (w + 2 * pad - kw) // stride + 1
    matrix = np.zeros((oh, ow, o, *shape))
    for y, x, dy, dx in itertools.product(range(oh), range(ow), range(kh), range(kw)):
      i, j = y * stride + dy - pad, x * stride + dx - pad
      if 0 <= i < h and 0 <= j < w:
        matrix[y, x, :, i, j] += kernel[dy, dx].T
    out.append((matrix.reshape(oh * ow * o, -1), np.tile(bias, oh * ow)))
    shape = (oh, ow, o)
  return out


def jacobians(weights, points):
  """Of every output at points [P, N]: [P, out, N]."""
  a, gates = points.T, []
  for w, b in weights[:-1]:
    z = w @ a + b[:, None]
    gates.append(z > 0)
    a = np.maximum(z, 0)
  g = np.repeat(weights[-1][0][None], len(points), 0)
  for (w, _), gate in zip(weights[-2::-1], gates[::-1], strict=True):
    g = (g * gate.T[:, None]) @ w
  return g


def sampled(weights, box, count, seed=0):
  """Jacobians at random points of a box, half of them at random corners."""
  rng = np.random.default_rng(seed)
  low, high = (np.asarray(side).reshape(-1) for side in box)
  share = rng.uniform(size=(count, low.size))
  share[::2] = np.round(share[::2])
  return jacobians(weights, low + share * (high - low))


@functools.partial(jax.jit, static_argnames=("steps",))
def everything(network, box, steps=0):
  """Forward bounds, and the bound of every method."""
  found = ll.optimize(network, box, steps=steps) if steps else ll.forward(network, box)
  return found, {method: ll.lipschitz(network, found, method=method) for method in METHODS}


# ------------------------------------------------------------------------------------------------------------- fixture


def fixture():
  layers = []
  for k, (i, o) in enumerate(((4, 6), (6, 5), (5, 3))):
    r, c = np.arange(1, o + 1)[:, None], np.arange(1, i + 1)
    layers.append(ll.Dense(np.sin(1.7 * r + 0.9 * c * (k + 1) + 0.3 * k).T, 0.2 * np.cos(1.3 * r[:, 0] + k)))
  return tuple(layers)


X = np.array([0.3, -0.2, 0.5, 0.1])
TABLE = {
  0.0: [[4.12811237, 7.31679502, 6.01356988]] * 3,
  0.05: [
    [6.21967914, 7.99590029, 6.87644960],
    [6.83071862, 7.99590029, 7.32881794],
    [7.153527, 8.320449, 7.890098],
  ],
  0.2: [
    [16.48793036, 14.65234769, 17.85418678],
    [18.55807350, 16.28519334, 19.95201948],
    [19.182303, 17.413951, 20.319361],
  ],
}
LIMITS = {0.05: [5.23102876, 7.83825435, 6.01356988], 0.2: [12.1087727, 12.0834583, 12.6313216]}
EXACT = {0.05: [4.12811237, 7.83825435, 6.01356988], 0.2: [7.91703009, 8.21200687, 8.25502779]}


@pytest.mark.parametrize("radius", TABLE)
def test_fixture(radius):
  found, bounds = everything(fixture(), ll.box(X, radius))
  for method, expected in zip(METHODS, TABLE[radius], strict=True):
    np.testing.assert_allclose(bounds[method], expected, atol=1e-6)
  if radius == 0.05:
    np.testing.assert_allclose(
      found[1].lower, [-0.413229, -0.426858, 0.094901, -0.008361, -0.289331, -0.062268], atol=1e-6
    )
    np.testing.assert_allclose(found[2].lower, [-0.009672, -0.441858, -0.383989, -0.005345, 0.105456], atol=1e-6)


def test_fixture_saturates_and_its_norms():
  assert float(ll.global_bound(fixture())) == pytest.approx(42.470680, abs=1e-6)
  for radius in (0.5, 1.0):
    np.testing.assert_allclose(everything(fixture(), ll.box(X, radius))[1]["lip_crown"], TABLE[0.2][0], atol=1e-6)


def test_fixture_with_alpha():
  """Not above what the official optimisation reaches, nor below what is exact."""
  for radius, official in ((0.05, [6.2197, 7.9959, 6.6200]), (0.2, TABLE[0.2][0])):
    bounds = np.asarray(everything(fixture(), ll.box(X, radius), steps=20)[1]["lip_crown"])
    assert (bounds <= np.array(official) + 1e-4).all() and (bounds >= np.array(EXACT[radius]) - 1e-8).all()
  assert bounds.sum() > 0


@pytest.mark.parametrize("heuristic, candidates", (("area", 1), ("babsr", 1), ("area", 3)))
def test_branch_and_bound_on_the_fixture(heuristic, candidates):
  for radius, limit in LIMITS.items():
    found, bounds = everything(fixture(), ll.box(X, radius))
    search = ll.branch_and_bound(fixture(), found, heuristic=heuristic, candidates=candidates, batch_size=16)
    assert search.complete
    np.testing.assert_allclose(search.bounds, limit, atol=1e-6)
    assert search.history[0, 2] == pytest.approx(float(bounds["lip_crown"].max()))
    assert (np.diff(search.history, axis=0) * [1, 1, -1] >= 0).all()


# -------------------------------------------------------------------------------------- what the official engine found

OFFICIAL = {  # layers, input shape, from_torch's options
  "mlp": (("1", "3", "5"), (8, 8, 3), {}),
  "deep": (("0", "2", "4", "6"), (12,), {}),
  "cnn": (("0", "2", "5", "7"), (8, 8, 2), {"strides": {"0": 2}, "padding": {"0": 1}}),
}


@jax.jit
def with_alpha(network, box):
  return ll.lipschitz(network, ll.optimize(network, box))


@jax.jit
def compared(network, box, v):
  found = ll.forward(network, box)
  recurjac = ll.lipschitz(network, found, method="recurjac")
  return ll.lipschitz(network, found), recurjac, ll.jacobian(network, found), ll.jvp(network, found, v)


def test_golden():
  """auto_LiRPA's own example network, a deeper one and a convolutional one: norms, Jacobians, products, alpha."""
  with np.load(golden_rule.GOLDEN / "local_lipschitz.npz") as file:
    reference = {name.removeprefix("reference."): file[name] for name in file if name.startswith("reference.")}
    radii = json.loads(str(file["manifest"]))["radii"]

  def convert(state):
    nets = {}
    for name, (layers, shape, options) in OFFICIAL.items():
      own = {k.removeprefix(f"{name}."): v.astype("float64") for k, v in state.items() if k.startswith(f"{name}.")}
      nets[name] = ll.from_torch(own, layers, shape, **options)
    return nets

  def apply(nets, inputs):
    last = lambda a: a.transpose(1, 2, 0) if a.ndim == 3 else a
    first = lambda a: a.transpose(0, 3, 1, 2) if a.ndim == 4 else a
    out = {}
    for name, net in nets.items():
      x, v = (last(inputs.get(key, inputs[name])).astype("float64") for key in (name, f"{name}.tangent"))
      for i, radius in enumerate(radii[name]):
        bounds, recurjac, slopes, along = compared(net, ll.box(x, radius), v)
        out[f"{name}.lip_crown.{i}"] = bounds
        # The official RecurJac is looser: see the module's "Differs".
        assert (recurjac <= reference[f"{name}.recurjac.{i}"] * (1 + 1e-6)).all()
        assert (recurjac >= bounds * (1 - 1e-12)).all()
      if name == "cnn":
        bounds = with_alpha(net, ll.box(x, radii[name][1]))
        np.testing.assert_allclose(bounds, reference["cnn.alpha"], rtol=1e-5)
        assert (bounds < 0.999 * out["cnn.lip_crown.1"]).any()
      out[f"{name}.jacobian"] = np.stack([first(np.asarray(s)).reshape(len(s), -1) for s in slopes])
      if f"{name}.tangent" in inputs:
        out[f"{name}.jvp"] = np.stack(along)
    return out

  golden_rule.check("local_lipschitz", convert, apply, atol=1e-5, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------ random networks


SIZES = (4, 6, 5, 3)  # the fixture's, so that its compiled programs serve random networks too
NETS = {"dense": ((4,), lambda rng: dense(rng, SIZES)), "conv": ((5, 5, 2), conv)}


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("radius", (0.03, 0.2))
def test_sound_and_in_order(kind, radius):
  """Over 10^4 points each: the gradient and its norm, sums along a direction, z itself, and the order of methods."""
  shape, make = NETS[kind]
  for seed in range(3):
    rng = np.random.default_rng(seed)
    network, box = make(rng), ll.box(rng.uniform(size=shape), radius)
    v = rng.standard_normal(shape)
    weights = matrices(network, shape)
    found, bounds = everything(network, box)
    tight, tighter = everything(network, box, steps=20)
    g = sampled(weights, box, 10_000)
    norm = np.abs(g).sum(2).max(0)
    assert (norm > 0).any()
    order = [norm, tighter["lip_crown"], *(bounds[m] for m in METHODS), np.full(3, ll.global_bound(network))]
    for below, above in itertools.pairwise(order):
      assert (np.asarray(below) <= np.asarray(above) * (1 + 1e-12)).all()
    slopes, along = derivatives(network, found, v)
    eps = 1e-12
    flat = [np.asarray(s).reshape(3, -1) for s in slopes]
    assert (g >= flat[0] - eps).all() and (g <= flat[1] + eps).all()
    products = g @ v.reshape(-1)
    assert (products >= np.asarray(along.lower) - eps).all() and (products <= np.asarray(along.upper) + eps).all()
    a = (np.asarray(box.lower) + rng.uniform(size=(2000, *shape)) * 2 * radius).reshape(2000, -1)
    for (w, b), loose, best in zip(weights, found[1:], tight[1:], strict=True):
      z = a @ w.T + b
      for z_bounds in (loose, best):
        assert (z >= np.asarray(z_bounds.lower).reshape(-1) - eps).all()
        assert (z <= np.asarray(z_bounds.upper).reshape(-1) + eps).all()
      assert (best.lower >= loose.lower).all() and (best.upper <= loose.upper).all()
      a = np.maximum(z, 0)


@jax.jit
def derivatives(network, found, v):
  return ll.jacobian(network, found), ll.jvp(network, found, v)


@pytest.mark.parametrize("kind", NETS)
def test_radius_zero_is_the_gradient(kind):
  shape, make = NETS[kind]
  rng = np.random.default_rng(5)
  network, x = make(rng), rng.uniform(size=shape)
  found, bounds = everything(network, ll.box(x, 0.0))
  gradient = jax.jit(jax.jacobian(ll.apply, 1))(network, x)
  for value in bounds.values():
    np.testing.assert_allclose(value, np.abs(gradient).reshape(3, -1).sum(1), rtol=1e-6)
  slopes, along = derivatives(network, found, x)
  np.testing.assert_allclose(slopes.lower, gradient, atol=1e-9)
  np.testing.assert_allclose(along.upper, np.sum(gradient * x, (1, 2, 3) if len(shape) == 3 else 1), atol=1e-9)
  np.testing.assert_allclose(jax.jit(ll.apply)(network, x), found[-1].upper, atol=1e-9)


def test_convolutions_are_matrices():
  """Unrolled, the network has the same bounds."""
  rng = np.random.default_rng(0)
  network, x = conv(rng), rng.uniform(size=(5, 5, 2))
  unrolled = tuple(ll.Dense(w.T, b) for w, b in matrices(network, x.shape))
  for radius in (0.05, 0.3):
    _, ours = everything(network, ll.box(x, radius))
    _, theirs = everything(unrolled, ll.box(x.reshape(-1), radius))
    for method in METHODS:
      np.testing.assert_allclose(ours[method], theirs[method], rtol=1e-5)


def test_one_stride_is_that_of_both_axes():
  first, *rest = conv(np.random.default_rng(0))
  again = ll.Conv(first.kernel, first.bias, 2, [[1, 1], [1, 1]])
  assert jax.tree.structure(again) == jax.tree.structure(first)
  x = np.random.default_rng(1).uniform(size=(5, 5, 2))
  np.testing.assert_array_equal(ll.apply((again, *rest), x), ll.apply((first, *rest), x))


def test_chunks_change_nothing():
  network, box = fixture(), ll.box(X, 0.05)
  found, bounds = everything(network, box)
  chunked = jax.jit(functools.partial(ll.forward, chunk=4))(network, box)
  for ours, whole in zip(chunked, found, strict=True):
    np.testing.assert_allclose(ours, whole, atol=1e-12)
  ours = jax.jit(functools.partial(ll.lipschitz, chunk=3))(network, chunked)
  np.testing.assert_allclose(ours, bounds["lip_crown"], rtol=1e-12)


def test_tighter_than_recurjac():
  """On 20 networks with several neurons of unknown phase each, and looser on none, for any output."""
  gains = []
  for seed in itertools.count():
    rng = np.random.default_rng(seed)
    network = dense(rng, SIZES)
    found, bounds = everything(network, ll.box(rng.uniform(size=4), 0.3))
    if sum(int(((b.lower < 0) & (b.upper > 0)).sum()) for b in found[1:-1]) < 4:
      continue
    if len(gains) == 20:
      break
    gains.append(1 - np.asarray(bounds["lip_crown"] / bounds["recurjac"]))
  assert np.min(gains) >= -1e-12 and np.mean(gains) > 0.01


def test_nested_boxes():
  """A larger box has a larger bound, as on the way from a point to saturation."""
  network = dense(np.random.default_rng(1), SIZES)
  bounds = [np.asarray(everything(network, ll.box(X, r))[1]["lip_crown"]) for r in np.geomspace(1e-3, 10, 9)]
  assert (np.diff(bounds, axis=0) >= -1e-12).all() and (bounds[-1] > bounds[0]).all()


@hypothesis.given(st.integers(0, 2**16), st.floats(0.01, 0.3))
@hypothesis.settings(max_examples=6)
def test_branch_and_bound_ends_at_the_patterns(seed, radius):
  """The largest gradient norm over all combinations of phases that the first bounds allow, by enumeration."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(seed)
    network = dense(rng, SIZES)
    weights = matrices(network, (4,))
    found, _ = everything(network, ll.box(rng.uniform(size=4), radius))
    choices = [
      [1.0] if low > 0 else [0.0] if u < 0 else [0.0, 1.0] for b in found[1:-1] for low, u in zip(*b, strict=True)
    ]
    norms = []
    for pattern in itertools.product(*choices):
      d = np.split(np.array(pattern), [6])
      g = (weights[2][0] * d[1]) @ weights[1][0]
      norms.append(np.abs((g * d[0]) @ weights[0][0]).sum(1))
    search = ll.branch_and_bound(network, found, batch_size=16)
    assert search.complete
    np.testing.assert_allclose(search.bounds, np.max(norms, 0), rtol=1e-9)
    largest = ll.branch_and_bound(network, found, batch_size=16, only_largest=True)
    assert largest.complete and largest.cases <= search.cases
    assert largest.bounds.max() == pytest.approx(np.max(norms))
    assert (largest.bounds >= np.max(norms, 0) * (1 - 1e-9)).all()  # of the other rows too, it is a bound


def test_branch_and_bound_stopped_early_is_sound():
  rng = np.random.default_rng(0)
  network = conv(rng)
  box = ll.box(rng.uniform(size=(5, 5, 2)), 0.2)
  found, bounds = everything(network, box)
  norm = np.abs(sampled(matrices(network, (5, 5, 2)), box, 10_000)).sum(2).max(0)
  before = np.asarray(bounds["lip_crown"])
  for cases in (1, 40, 200):
    search = ll.branch_and_bound(network, found, batch_size=16, max_cases=cases)
    assert not search.complete and search.cases >= cases
    assert (search.bounds >= norm).all() and (search.bounds <= before * (1 + 1e-12)).all()
    before = search.bounds
  assert before.max() < np.asarray(bounds["lip_crown"]).max()


@jax.jit
def of_rows(network, found, rows):
  return ll.lipschitz(network, found, rows=rows)


def test_rows_are_combinations():
  """A margin's bound is at most the sum of its two outputs' bounds; of twice an output it is twice as large."""
  network = fixture()
  found, bounds = everything(network, ll.box(X, 0.05))
  rows = np.array([[1.0, -1, 0], [0, 2, 0]])
  margin, twice = of_rows(network, found, rows)
  assert float(margin) <= float(bounds["lip_crown"][:2].sum()) and margin > 0
  assert float(twice) == pytest.approx(2 * float(bounds["lip_crown"][1]))
  g = sampled(matrices(network, (4,)), ll.box(X, 0.05), 10_000)
  assert np.abs(g[:, 0] - g[:, 1]).sum(1).max() <= margin


def test_monotonicity():
  """Positive weights rise, turned ones fall; what both do is unknown; no sampled derivative contradicts."""
  rng = np.random.default_rng(0)
  first = np.abs(rng.standard_normal((4, 6))) * np.array([1, -1, 0, 0])[:, None] + np.array([0, 0, 1, 0])[
    :, None
  ] * rng.standard_normal(6)
  network = (
    ll.Dense(first, np.full(6, 0.1)),
    ll.Dense(np.abs(rng.standard_normal((6, 5))), np.zeros(5)),
    ll.Dense(np.abs(rng.standard_normal((5, 2))), np.zeros(2)),
  )
  x = np.full(4, 0.4)
  certify = jax.jit(ll.monotonicity, static_argnames="method")
  found = certify(network, x, np.arange(4))
  assert found.direction.tolist() == [1, -1, 0, 1]  # the last moves nothing, so it never falls
  weights = matrices(network, (4,))
  for j in range(4):
    points = np.tile(x, (1000, 1))
    points[:, j] = np.linspace(0, 1, 1000)
    slope = jacobians(weights, points)[:, 1, j]
    assert found.slope.lower[j] - 1e-12 <= slope.min() and slope.max() <= found.slope.upper[j] + 1e-12
  loose = certify(network, x, np.arange(4), method="interval")
  assert (np.abs(loose.direction) <= np.abs(found.direction)).all()


def test_alpha_of_margins_and_one_layer():
  network = fixture()
  margins = jax.jit(functools.partial(ll.optimize, label=1, steps=5))(network, ll.box(X, 0.05))
  first, _ = everything(network, ll.box(X, 0.05))
  assert all((m.lower >= f.lower).all() for m, f in zip(margins, first, strict=True))
  linear = dense(np.random.default_rng(0), (4, 3))
  found, bounds = everything(linear, ll.box(X, 0.1))
  norm = np.abs(np.asarray(linear[0].kernel)).sum(0)
  np.testing.assert_allclose(bounds["lip_crown"], norm)
  np.testing.assert_allclose(derivatives(linear, found, X)[1].lower, X @ linear[0].kernel)
  search = ll.branch_and_bound(linear, found)
  np.testing.assert_allclose(search.bounds, norm)
  assert search.complete


def test_gradients_reach_the_weights():
  """The bound can be trained."""
  network = fixture()
  loss = lambda n: ll.lipschitz(n, ll.forward(n, ll.box(X, 0.2))).max()
  value, gradient = jax.jit(jax.value_and_grad(loss))(network)
  step = jax.tree.map(lambda w, g: w - 1e-3 * g, network, gradient)
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(gradient))
  assert jax.jit(loss)(step) < value
