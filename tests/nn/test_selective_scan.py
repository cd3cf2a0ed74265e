"""The selective scan in both forms beside a float64 loop, a convolution and each other."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import kernels
from jaxlab.nn import _selective_scan as host
from jaxlab.nn import selective_scan as module
from jaxlab.nn.selective_scan import selective_scan

FORMS = ["host", "chunked"] if kernels.available() else ["chunked"]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
  if request.param == "chunked":
    monkeypatch.setattr(module, "_use_host", lambda u: False)
    monkeypatch.setattr(module, "CHUNK", 16)  # compiles sooner
  return request.param


def arguments(seed, batch, length, channels, states, groups):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape).astype("float32")
  return {
    "u": normal(batch, length, channels),
    "delta": normal(batch, length, channels),
    "A": -np.exp(normal(channels, states)),
    "B": normal(batch, length, groups, states),
    "C": normal(batch, length, groups, states),
    "D": normal(channels),
    "z": normal(batch, length, channels),
    "delta_bias": normal(channels) - 3,
  }


def loop(u, delta, A, B, C, D, z, delta_bias, starts, reverse=False, zoh=False):
  """The definition, in float64."""
  u, delta, A, B, C, D, z, delta_bias = (np.asarray(a, "float64") for a in (u, delta, A, B, C, D, z, delta_bias))
  delta = np.log1p(np.exp(delta + delta_bias))
  group = np.repeat(np.arange(B.shape[2]), u.shape[2] // B.shape[2])
  y = np.zeros_like(u)
  for b in range(u.shape[0]):
    h = np.zeros_like(A)
    for t in reversed(range(u.shape[1])) if reverse else range(u.shape[1]):
      if starts[b, t] and not reverse:
        h[:] = 0
      decay = np.exp(delta[b, t, :, None] * A)
      w = (decay - 1) / A if zoh else delta[b, t, :, None]
      h = decay * h + w * u[b, t, :, None] * B[b, t, group]
      y[b, t] = (C[b, t, group] * h).sum(1)
      if starts[b, t] and reverse:
        h[:] = 0
  return (y + D * u) * z / (1 + np.exp(-z))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("discretization", ["mamba", "zoh"])
def test_scan_is_the_recurrence(form, reverse, discretization):
  inputs = arguments(0, 2, 150, 20, 3, 2)
  starts = np.random.default_rng(1).random((2, 150)) < 0.05
  y = jax.jit(functools.partial(selective_scan, delta_softplus=True, reverse=reverse, discretization=discretization))(
    **inputs, starts=starts
  )
  np.testing.assert_allclose(y, loop(**inputs, starts=starts, reverse=reverse, zoh=discretization == "zoh"), atol=1e-5)


def test_long_sequence(form):
  inputs = arguments(0, 1, 4096, 5, 2, 1)
  y = jax.jit(functools.partial(selective_scan, delta_softplus=True))(**inputs)
  np.testing.assert_allclose(y, loop(**inputs, starts=np.zeros((1, 4096), bool)), atol=1e-5)


@pytest.mark.skipif(not kernels.available(), reason="host kernels are for the CPU backend")
@pytest.mark.parametrize(
  "channels, states, groups, discretization, reverse",
  [(40, 4, 1, "mamba", False), (12, 1, 4, "zoh", True), (16, 16, 1, "mamba", True), (20, 2, 2, "zoh", False)],
)
def test_forms_have_one_gradient(channels, states, groups, discretization, reverse, monkeypatch):
  inputs = arguments(2, 2, 70, channels, states, groups)
  starts = np.random.default_rng(3).random((2, 70)) < 0.1
  weight = np.random.default_rng(4).standard_normal((2, 70, channels)).astype("float32")

  def gradient():
    def objective(inputs):
      y = selective_scan(**inputs, delta_softplus=True, starts=starts, reverse=reverse, discretization=discretization)
      return (weight * y).sum()

    return jax.jit(jax.grad(objective))(inputs)

  mine = gradient()
  monkeypatch.setattr(module, "CHUNK", 16)
  monkeypatch.setattr(module, "_use_host", lambda u: False)
  for name, expected in gradient().items():
    np.testing.assert_allclose(mine[name], expected, atol=2e-6 * np.abs(expected).max(), rtol=2e-5, err_msg=name)


@pytest.mark.skipif(not kernels.available(), reason="host kernels are for the CPU backend")
def test_kernels_read_no_memory_that_they_have_freed(tmp_path):
  """With glibc's freed memory overwritten, and kept in the process, where reading it would go unnoticed otherwise."""
  script = tmp_path / "run.py"
  script.write_text(
    """
import jax, numpy as np
from jaxlab import memory
from jaxlab.nn.selective_scan import selective_scan
memory.keep()
f = jax.jit(jax.value_and_grad(lambda u, A, B: selective_scan(u, abs(u), -A, B, B).sum(), (0, 1, 2)))
rng = np.random.default_rng(0)
u, A, B = (abs(rng.standard_normal(s)).astype("float32") for s in ((2, 600, 64), (64, 16), (2, 600, 16)))
first, *others = (jax.device_get(f(u, A, B)) for _ in range(4))
for other in others:
  jax.tree.map(np.testing.assert_array_equal, first, other)
assert np.isfinite(first[0]) and abs(first[0]) < 1e8, first[0]
"""
  )
  environment = os.environ | {"MALLOC_PERTURB_": "165"}
  done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-2000:]


def test_gradient_by_finite_differences(form):
  inputs = arguments(5, 1, 40, 3, 2, 1)
  starts = np.arange(40)[None] % 13 == 0
  direction = arguments(6, 1, 40, 3, 2, 1)
  objective = lambda inputs: selective_scan(**inputs, delta_softplus=True, starts=starts).sum()
  slope = sum(np.vdot(g, direction[name]) for name, g in jax.jit(jax.grad(objective))(inputs).items())
  moved = lambda e: {name: np.float64(a) + e * direction[name] for name, a in inputs.items()}
  difference = loop(**moved(1e-5), starts=starts).sum() - loop(**moved(-1e-5), starts=starts).sum()
  np.testing.assert_allclose(slope, difference / 2e-5, rtol=1e-4)


def test_constant_coefficients_are_a_convolution(form):
  length, channels, states = 256, 6, 3
  rng = np.random.default_rng(7)
  u = rng.standard_normal((length, channels)).astype("float32")
  delta, A = 0.1 * np.exp(rng.standard_normal(channels)), -np.exp(rng.standard_normal((channels, states)))
  B, C = rng.standard_normal((2, states))
  filters = np.einsum(
    "n,kcn,cn->kc", C, np.exp(delta[:, None] * A * np.arange(length)[:, None, None]), delta[:, None] * B
  )
  spectrum = np.fft.rfft(filters, 2 * length, axis=0) * np.fft.rfft(u, 2 * length, axis=0)
  tile = lambda row: np.tile(np.float32(row), (length, 1))
  y = jax.jit(selective_scan)(u, tile(delta), np.float32(A), tile(B), tile(C))
  np.testing.assert_allclose(y, np.fft.irfft(spectrum, axis=0)[:length], atol=1e-5)


def test_zero_order_hold_is_exact_for_a_held_input(form):
  """Two steps of half the size change nothing while the input is held; Mamba's rule is not exact."""
  A, u, B, C = (
    np.float32([[-2.0, -0.5]]),
    np.ones((8, 1), "float32"),
    np.ones((8, 2), "float32"),
    np.ones((8, 2), "float32"),
  )
  once = lambda **how: selective_scan(u, np.full((8, 1), 0.5, "float32"), A, B, C, **how)[3, 0]
  twice = lambda **how: selective_scan(u, np.full((8, 1), 0.25, "float32"), A, B, C, **how)[7, 0]
  np.testing.assert_allclose(once(discretization="zoh"), twice(discretization="zoh"), rtol=1e-6)
  np.testing.assert_allclose(once(discretization="zoh"), ((np.exp(A[0] * 2) - 1) / A[0]).sum(), rtol=1e-6)
  assert abs(once() - twice()) > 0.1


@pytest.mark.parametrize("reverse", [False, True])
def test_segments_are_scanned_alone(form, reverse):
  inputs = arguments(8, 1, 90, 8, 2, 1)
  cuts = [0, 1, 33, 90]
  starts = np.isin(np.arange(90), cuts)[None]
  scan = jax.jit(functools.partial(selective_scan, delta_softplus=True, reverse=reverse))
  whole = scan(**inputs, starts=starts)
  for a, b in zip(cuts, cuts[1:], strict=False):
    part = {name: v[:, a:b] if v.ndim > 2 else v for name, v in inputs.items()}
    alone = scan(**part)
    np.testing.assert_allclose(whole[:, a:b], alone, atol=1e-6)


def test_reverse_is_the_flipped_scan(form):
  inputs = arguments(9, 1, 50, 4, 2, 1)
  flipped = {name: v[:, ::-1] if v.ndim > 2 else v for name, v in inputs.items()}
  a, b = (
    jax.jit(functools.partial(selective_scan, delta_softplus=True, reverse=r))(**i)
    for i, r in ((inputs, False), (flipped, True))
  )
  np.testing.assert_allclose(a, b[:, ::-1], atol=1e-6)


def test_outputs_see_no_later_token(form):
  inputs = arguments(10, 1, 70, 4, 2, 1)

  def influence(reverse):
    f = lambda u: selective_scan(**inputs | {"u": u}, delta_softplus=True, reverse=reverse)[0, 40].sum()
    return np.abs(jax.jit(jax.grad(f))(inputs["u"])[0]).sum(1) > 0

  np.testing.assert_array_equal(influence(False), np.arange(70) <= 40)
  np.testing.assert_array_equal(influence(True), np.arange(70) >= 40)


@pytest.mark.parametrize("mapped", [("u",), ("A", "z"), ("u", "delta", "A", "B", "C")])
def test_vmap_is_a_loop(form, mapped):
  inputs = arguments(11, 2, 35, 6, 2, 1)
  stacked = inputs | {name: np.stack([inputs[name] * s for s in (1.0, 0.5, 1.5)]).astype("float32") for name in mapped}
  axes = {name: 0 if name in mapped else None for name in inputs}

  def gradients(inputs):
    return jax.value_and_grad(lambda inputs: (selective_scan(**inputs, delta_softplus=True) ** 2).sum())(inputs)

  together = jax.jit(jax.vmap(gradients, (axes,)))(stacked)
  one_by_one = jax.jit(gradients)
  for i in range(3):
    alone = one_by_one({name: v[i] if name in mapped else v for name, v in stacked.items()})
    jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4), together, alone)


def test_narrow_inputs_are_scanned_in_float32(form):
  inputs = arguments(12, 1, 300, 4, 2, 1)
  narrow = {name: jnp.asarray(v, "bfloat16") for name, v in inputs.items()}
  scan = jax.jit(functools.partial(selective_scan, delta_softplus=True))
  y = scan(**narrow)
  assert y.dtype == jnp.bfloat16
  wide = scan(**{name: v.astype("float32") for name, v in narrow.items()})
  np.testing.assert_array_equal(y, wide.astype("bfloat16"))


def test_memory_is_linear_in_length_and_holds_no_state_for_each_step(form):
  channels, states = 64, 16

  def bytes_of(length):
    inputs = arguments(13, 1, length, channels, states, 1)
    program = jax.jit(jax.grad(lambda i: selective_scan(**i, delta_softplus=True).sum())).lower(inputs).compile()
    own = 2 * host.scratch_bytes(length, channels, states) if form == "host" else 0  # of two threads
    return program.memory_analysis().temp_size_in_bytes + own

  lengths = 512, 1024, 2048
  short, middle, long = map(bytes_of, lengths)
  every_state = 4 * 1024 * channels * states  # in 1024 steps
  slope = (long - short) / 3
  assert abs((middle - short) - slope) < 0.1 * slope
  assert slope < 0.3 * every_state


def test_empty_batches_and_single_tokens(form):
  assert selective_scan(**arguments(14, 0, 5, 4, 2, 1)).shape == (0, 5, 4)
  one = arguments(14, 1, 1, 4, 2, 1)
  np.testing.assert_allclose(
    selective_scan(**one, delta_softplus=True), loop(**one, starts=np.zeros((1, 1), bool)), atol=1e-6
  )


@pytest.mark.parametrize(
  "change, argument",
  [
    ({"u": np.zeros(3, "float32")}, "u"),
    ({"delta": np.zeros((2, 8, 5), "float32")}, "delta"),
    ({"A": np.zeros((3, 2), "float32")}, "A"),
    ({"B": np.zeros((2, 8, 3, 2), "float32")}, "B"),
    ({"C": np.zeros((2, 8, 2), "float32")}, "C"),
    ({"D": np.zeros(3, "float32")}, "D"),
    ({"z": np.zeros((2, 8), "float32")}, "z"),
    ({"delta_bias": np.zeros((1, 4), "float32")}, "delta_bias"),
    ({"starts": np.zeros((8,), bool)}, "starts"),
    ({"discretization": "bilinear"}, "discretization"),
  ],
)
def test_bad_input_is_named(change, argument):
  with pytest.raises(ValueError, match=f"^{argument}: got "):
    selective_scan(**arguments(0, 2, 8, 4, 2, 1) | change)


@pytest.mark.parametrize("discretization", ["mamba", "zoh"])
@pytest.mark.parametrize("name", ["delta", "A"])
def test_what_is_no_number_stays_none(form, name, discretization):
  inputs = arguments(1, 1, 6, 20, 3, 1)
  if name == "A":
    inputs["A"][4] = np.nan
  else:
    inputs["delta"][:, 0, 4] = np.nan
  y = selective_scan(**inputs, discretization=discretization, delta_softplus=True)
  assert np.isnan(y[..., 4]).all() and np.isfinite(np.delete(y, 4, axis=2)).all()
