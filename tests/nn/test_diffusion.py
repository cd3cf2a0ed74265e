import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.nn import diffusion
from jaxlab.nn.diffusion import Straight, VariancePreserving

VP, LINE = VariancePreserving(), Straight()
MEAN, STD = 0.5, 0.3  # of the Gaussian data that samplers are tried on


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype("float32")


# --------------------------------------------------------------------------------------------------------- the paths


def test_variance_preserving_path_is_its_closed_form():
  t = np.array([1e-6, 1e-3, 0.1, 0.5, 1.0])
  alpha_squared = np.exp(-0.1 * t - 9.95 * t**2)
  np.testing.assert_allclose(VP.alpha(t) ** 2, alpha_squared, rtol=1e-5)
  np.testing.assert_allclose(VP.variance(t), -np.expm1(-0.1 * t - 9.95 * t**2), rtol=1e-5)  # near 0 too
  np.testing.assert_allclose(VP.sigma(t) ** 2 + VP.alpha(t) ** 2, 1, rtol=1e-6)
  np.testing.assert_allclose(VP.drift(t), -(0.1 + 19.9 * t) / 2, rtol=1e-5)
  np.testing.assert_allclose(VP.squared_diffusion(t), 0.1 + 19.9 * t, rtol=1e-4)


def test_straight_path_is_its_closed_form():
  t = np.array([0.1, 0.5, 0.9])
  np.testing.assert_allclose(LINE.alpha(t), 1 - t, rtol=1e-6)
  np.testing.assert_allclose(LINE.sigma(t), t, rtol=1e-6)
  np.testing.assert_allclose(LINE.drift(t), -1 / (1 - t), rtol=1e-5)
  np.testing.assert_allclose(LINE.squared_diffusion(t), 2 * t / (1 - t), rtol=1e-5)
  x0, eps = normal(3, 2), normal(3, 2, seed=1)
  for time in (0.0, 0.4, 1.0):
    np.testing.assert_allclose(LINE.velocity(x0, eps, jnp.full(3, time)), eps - x0, atol=1e-6)


@pytest.mark.parametrize("process", [VP, LINE, VariancePreserving(0.0, 5.0)])
def test_time_inverts_the_signal_to_noise_ratio(process):
  t = np.array([0.01, 0.3, 0.8, 0.99])
  np.testing.assert_allclose(process.time(process.half_log_snr(t)), t, rtol=1e-4)


def test_velocity_is_the_derivative_of_the_noised_data():
  x0, eps, t, h = normal(3, 4), normal(3, 4, seed=1), np.array([0.2, 0.5, 0.9]), 1e-3
  difference = (VP.noised(x0, eps, jnp.array(t + h)) - VP.noised(x0, eps, jnp.array(t - h))) / (2 * h)
  np.testing.assert_allclose(VP.velocity(x0, eps, jnp.array(t)), difference, atol=5e-3)


def test_second_moment_of_noised_data():
  x0, t = 2 * normal(1, 50_000), 0.3
  noised = VP.noised(x0, normal(1, 50_000, seed=1), jnp.array([t]))
  alpha_squared = math.exp(-0.1 * t - 9.95 * t**2)
  np.testing.assert_allclose((noised**2).mean(), alpha_squared * (x0**2).mean() + 1 - alpha_squared, rtol=0.02)


@pytest.mark.parametrize("process", [VP, LINE])
@pytest.mark.parametrize("prediction", ["noise", "data", "velocity"])
def test_denoiser_finds_data_and_noise_from_any_prediction(process, prediction):
  x0, eps, t = normal(2, 3), normal(2, 3, seed=1), 0.4
  at = jnp.full(2, t)
  heard = []

  def predict(x, times):
    heard.append(np.asarray(times))
    return process.target(prediction, x0, eps, at)

  found = diffusion.denoiser(predict, process, prediction=prediction, time_scale=999)(
    process.noised(x0, eps, at), jnp.float32(t)
  )
  np.testing.assert_allclose(found, (x0, eps), atol=2e-5)
  np.testing.assert_allclose(heard, [[999 * t] * 2], rtol=1e-6)


# ------------------------------------------------------------------------------------------------------- the samplers


def gaussian_denoiser(process):
  """Exact for data N(MEAN, STD^2): E[x_0 | x_t]."""

  def denoise(x, t):
    a, s = process.alpha(t), process.sigma(t)
    x0 = MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)
    return x0, (x - a * x0) / s

  return denoise


def flow(process, x, start, end):
  """The exact probability flow of such data, a map of Gaussians."""

  def moments(t):
    a, s = float(process.alpha(jnp.float32(t))), float(process.sigma(jnp.float32(t)))
    return a * MEAN, math.sqrt(a**2 * STD**2 + s**2)

  (m1, s1), (m0, s0) = moments(start), moments(end)
  return m0 + s0 / s1 * (x - m1)


@functools.partial(jax.jit, static_argnames=("sampler", "process", "stochastic", "eta"))
def sample(sampler, process, noise, grid, stochastic=False, eta=0.0):
  key = jax.random.key(3) if stochastic else None
  denoise = gaussian_denoiser(process)
  if sampler == "euler_maruyama":
    return diffusion.euler_maruyama(denoise, process, noise, grid, key)
  if sampler == "ddim":
    return diffusion.ddim(denoise, process, noise, grid, eta=eta, key=key)
  return diffusion.dpm_solver(denoise, process, noise, grid)


@pytest.mark.parametrize(
  ("sampler", "process", "spacing", "order"),
  [
    ("euler_maruyama", VP, "time", 1),
    ("ddim", VP, "log_snr", 1),
    ("ddim", LINE, "time", 1),
    ("dpm_solver", VP, "log_snr", 2),
  ],
)
def test_deterministic_samplers_converge_to_the_flow(sampler, process, spacing, order):
  noise = np.linspace(-2, 2, 9, dtype="float32")[:, None]
  errors = []
  for steps in (40, 80):
    grid = diffusion.times(process, steps, end=0.01, spacing=spacing)
    # The last step, to t = 0, is a guess of the data: its error falls with `end`, not with the number of steps.
    errors.append(
      np.abs(sample(sampler, process, noise, grid) - guessed(process, flow(process, noise, 1.0, 0.01))).max()
    )
  assert errors[1] < 0.05
  assert 2 ** (order - 0.4) < errors[0] / errors[1] < 2 ** (order + 0.6)


def guessed(process, x):
  return gaussian_denoiser(process)(x, jnp.float32(0.01))[0]


@pytest.mark.parametrize(("sampler", "eta"), [("euler_maruyama", 0.0), ("ddim", 1.0), ("ddim", 0.5)])
def test_stochastic_samplers_draw_from_the_data(sampler, eta):
  x = sample(sampler, VP, normal(20_000, 1), diffusion.times(VP, 300), stochastic=True, eta=eta)
  np.testing.assert_allclose([x.mean(), x.std()], [MEAN, STD], atol=0.015)
  assert not np.allclose(x, sample(sampler, VP, normal(20_000, 1), diffusion.times(VP, 300)), atol=0.05)


def test_ddim_of_velocities_on_a_straight_path_is_eulers_method():
  predict = lambda x, t: jnp.sin(3 * x) + t[:, None]
  grid = np.array([1.0, 0.7, 0.2, 0.1, 0.0], "float32")
  got = diffusion.ddim(diffusion.denoiser(predict, LINE, prediction="velocity"), LINE, normal(4, 3), grid)
  x = normal(4, 3)
  for t, s in zip(grid, grid[1:], strict=False):
    x = x + (s - t) * (np.sin(3 * x) + t)
  np.testing.assert_allclose(got, x, atol=1e-5)


def test_dpm_solver_starts_from_no_data_at_all():
  noise = normal(9, 1)
  got = sample("dpm_solver", LINE, noise, diffusion.times(LINE, 60, end=0.01))
  np.testing.assert_allclose(got, guessed(LINE, flow(LINE, noise, 1.0, 0.01)), atol=5e-3)


def test_grids():
  np.testing.assert_allclose(diffusion.times(VP, 5), [*np.linspace(1, 1e-3, 5), 0], rtol=1e-6)
  grid = diffusion.times(VP, 6, end=0.01, spacing="log_snr")
  even = np.diff(np.asarray(VP.half_log_snr(grid[:-1])))
  np.testing.assert_allclose(even, even.mean(), rtol=1e-3)
  np.testing.assert_allclose(grid[[0, -2, -1]], [1, 0.01, 0], rtol=1e-6)


def test_embeddings_of_times():
  t = np.array([0.0, 3.5, 999.0])
  half, full = [], []
  for time in t:
    waves = [time * 10_000 ** (-j / 4) for j in range(4)]
    half.append([math.cos(w) for w in waves] + [math.sin(w) for w in waves])
    waves = [time * 100 ** (-j / 3) for j in range(4)]
    full.append([math.sin(w) for w in waves] + [math.cos(w) for w in waves])
  times = jnp.asarray(t, "float32")
  np.testing.assert_allclose(diffusion.timestep_embedding(times, 8), half, atol=1e-4)
  ddpm = diffusion.timestep_embedding(times, 8, max_period=100, sine_first=True, last_period=True)
  np.testing.assert_allclose(ddpm, full, atol=1e-4)


@pytest.mark.parametrize(
  ("call", "argument"),
  [
    (lambda: VariancePreserving(1.0, 0.5), "beta_max"),
    (lambda: diffusion.denoiser(lambda x, t: x, VP, prediction="score"), "prediction"),
    (lambda: VP.target("score", normal(1, 2), normal(1, 2), jnp.ones(1)), "prediction"),
    (lambda: diffusion.times(VP, 1), "steps"),
    (lambda: diffusion.times(VP, 5, end=0.0), "end"),
    (lambda: diffusion.times(LINE, 5, spacing="log_snr"), "start"),
    (lambda: diffusion.times(VP, 5, spacing="cosine"), "spacing"),
    (lambda: diffusion.ddim(None, VP, normal(2, 1), np.ones(3), eta=0.5), "key"),
    (lambda: diffusion.ddim(None, VP, normal(2, 1), np.ones(3), eta=2.0), "eta"),
    (lambda: diffusion.dpm_solver(None, VP, normal(2), np.ones(3)), "noise"),
    (lambda: diffusion.euler_maruyama(None, VP, normal(2, 1), np.ones(2), None), "grid"),
    (lambda: diffusion.timestep_embedding(jnp.ones(2), 7), "channels"),
    (lambda: diffusion.timestep_embedding(jnp.ones((2, 1)), 8), "timesteps"),
  ],
)
def test_bad_input_is_named(call, argument):
  with pytest.raises(ValueError, match=f"^{argument}: got "):
    call()
