"""Diffusion: Gaussian paths from data to noise, what a network may predict on them, and samplers that go back.

A `Process` is a path of densities from data (t = 0) to noise (t = 1):

    x_t = alpha(t) x_0 + sigma(t) eps,   eps ~ N(0, I)

It is also the marginal of dx = f(t) x dt + g(t) dw with f = d log(alpha) / dt and g^2 = d sigma^2 / dt - 2 f sigma^2.
`VariancePreserving` is that of score-based models and DDPM, `Straight` that of rectified flows and flow matching.
A network predicts the noise, the data or the velocity dx_t / dt; `denoiser` turns either into a pair (x_0, eps), and
the samplers see only that. Train one with `jaxlab.train.diffusion`.

Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021; Song, Meng and
Ermon, "Denoising Diffusion Implicit Models", ICLR 2021; Lu et al., "DPM-Solver++", 2022; Lipman et al., "Flow Matching
for Generative Modeling", ICLR 2023.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxlab import checks

Prediction = Literal["noise", "data", "velocity"]
Spacing = Literal["time", "log_snr"]
Denoiser: TypeAlias = Callable[[Float[Array, "b *d"], Float[Array, ""]], tuple[Array, Array]]


class Process(abc.ABC):
  """A Gaussian path; subclasses define `log_alpha`, `variance` and `time`. Times are in [0, 1], of any shape."""

  @abc.abstractmethod
  def log_alpha(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Logarithm of what is left of the data."""

  @abc.abstractmethod
  def variance(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """sigma(t)^2, exact near t = 0."""

  @abc.abstractmethod
  def time(self, half_log_snr: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The inverse of `half_log_snr`."""

  def alpha(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Scale of the data."""
    return jnp.exp(self.log_alpha(t))

  def sigma(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Scale of the noise."""
    return jnp.sqrt(self.variance(t))

  def half_log_snr(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """lambda(t) = log(alpha / sigma), which falls from infinity."""
    return self.log_alpha(t) - 0.5 * jnp.log(self.variance(t))

  def drift(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """f(t) of the forward equation, times which x moves."""
    return _derivative(self.log_alpha, t)

  def squared_diffusion(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """g(t)^2 of the forward equation."""
    return _derivative(self.variance, t) - 2 * self.drift(t) * self.variance(t)

  def rates(self, t: Float[Array, "*s"]) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """d alpha / dt and d sigma / dt."""
    return self.alpha(t) * self.drift(t), _derivative(self.variance, t) / (2 * self.sigma(t))

  def noised(self, x0: Float[Array, "b *d"], eps: Float[Array, "b *d"], t: Float[Array, " b"]) -> Float[Array, "b *d"]:
    """x_t, each example at its own time."""
    return _wide(self.alpha(t), x0) * x0 + _wide(self.sigma(t), x0) * eps

  def velocity(
    self, x0: Float[Array, "b *d"], eps: Float[Array, "b *d"], t: Float[Array, " b"]
  ) -> Float[Array, "b *d"]:
    """dx_t / dt with data and noise held fixed; eps - x_0 on a straight path."""
    alpha_rate, sigma_rate = self.rates(t)
    return _wide(alpha_rate, x0) * x0 + _wide(sigma_rate, x0) * eps

  def target(
    self, prediction: Prediction, x0: Float[Array, "b *d"], eps: Float[Array, "b *d"], t: Float[Array, " b"]
  ) -> Float[Array, "b *d"]:
    """What a network with this prediction should say."""
    checks.choice("prediction", prediction, Prediction)
    if prediction == "velocity":
      return self.velocity(x0, eps, t)
    return eps if prediction == "noise" else x0


@dataclasses.dataclass(frozen=True)
class VariancePreserving(Process):
  """alpha^2 = exp(-B(t)), sigma^2 = 1 - alpha^2, with B(t) the integral of beta(t), which grows linearly.

  Attributes:
    beta_min: beta(0).
    beta_max: beta(1), larger.
  """

  beta_min: float = 0.1
  beta_max: float = 20.0

  def __post_init__(self) -> None:
    if not 0 <= self.beta_min < self.beta_max:
      raise ValueError(f"beta_max: got {self.beta_max}, expected more than beta_min, {self.beta_min}, from 0 on")

  def log_alpha(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """-B(t) / 2."""
    return -0.5 * t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

  def variance(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """1 - exp(-B(t))."""
    return -jnp.expm1(2 * self.log_alpha(t))

  def time(self, half_log_snr: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The root of B(t) = log(1 + exp(-2 lambda))."""
    b = jnp.logaddexp(0.0, -2 * half_log_snr)
    return 2 * b / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * b))


@dataclasses.dataclass(frozen=True)
class Straight(Process):
  """alpha = 1 - t, sigma = t. Its stochastic equation is singular at t = 1: sample it with `ddim`, which for velocities
  is Euler's method, or with `dpm_solver`."""

  def log_alpha(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """log(1 - t)."""
    return jnp.log1p(-t)

  def variance(self, t: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """t^2."""
    return t * t

  def time(self, half_log_snr: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """1 / (1 + exp(lambda))."""
    return jax.nn.sigmoid(-half_log_snr)

  def rates(self, t: Float[Array, "*s"]) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """-1 and 1, at the ends too."""
    one = jnp.ones_like(t)
    return -one, one


def denoiser(
  predict: Callable[[Float[Array, "b *d"], Float[Array, " b"]], Float[Array, "b *d"]],
  process: Process,
  *,
  prediction: Prediction = "noise",
  time_scale: float = 1.0,
) -> Denoiser:
  """A network's guess of data and noise, whichever it predicts.

  Args:
    predict: (x_t, times [B], scaled) -> prediction, such as `lambda x, t: model.apply(variables, x, t)`.
    process: the path it was trained on.
    prediction: what it predicts. Noise says nothing about the data where alpha = 0, nor data about noise at t = 0.
    time_scale: the network receives this times t.

  Returns:
    (x_t, t, a scalar) -> (x_0, eps), in float32.

  Raises:
    ValueError: an unknown prediction.
  """
  checks.choice("prediction", prediction, Prediction)

  def denoise(x: Float[Array, "b *d"], t: Float[Array, ""]) -> tuple[Float[Array, "b *d"], Float[Array, "b *d"]]:
    said = predict(x, jnp.full(x.shape[0], time_scale * t, jnp.float32)).astype(jnp.float32)
    alpha, sigma = process.alpha(t), process.sigma(t)
    if prediction == "noise":
      return (x - sigma * said) / alpha, said
    if prediction == "data":
      return said, (x - alpha * said) / sigma
    alpha_rate, sigma_rate = process.rates(t)
    determinant = alpha * sigma_rate - alpha_rate * sigma
    return (sigma_rate * x - sigma * said) / determinant, (alpha * said - alpha_rate * x) / determinant

  return denoise


def times(
  process: Process, steps: int, *, start: float = 1.0, end: float = 1e-3, spacing: Spacing = "time"
) -> Float[np.ndarray, " k"]:
  """Host. The grid of a sampler: `steps` times from `start` down to `end`, and then 0.

  Args:
    process: the path.
    steps: evaluations of the network; at least 2.
    start: where sampling begins.
    end: last time at which the network is asked; above 0.
    spacing: even in t or in log(alpha / sigma), for which `start` must be less than 1 on a straight path.

  Raises:
    ValueError: an argument out of range.
  """
  checks.count("steps", steps, 2)
  checks.choice("spacing", spacing, Spacing)
  if not 0 < end < start <= 1:
    raise ValueError(f"end: got {end}, expected a time above 0 and below start, {start}, which is at most 1")
  if spacing == "time":
    grid = np.linspace(start, end, steps)
  else:
    edges = np.asarray(process.half_log_snr(jnp.array([start, end])), np.float64)
    if not np.isfinite(edges).all():
      raise ValueError(f"start: got {start}, expected a time at which some data is left")
    grid = np.asarray(process.time(jnp.linspace(edges[0], edges[1], steps)), np.float64)
    grid[[0, -1]] = start, end
  return np.append(grid, 0.0).astype(np.float32)


def euler_maruyama(
  denoise: Denoiser,
  process: Process,
  noise: Float[Array, "b *d"],
  grid: Float[Array, " k"],
  key: Key[Array, ""] | None,
) -> Float[Array, "b *d"]:
  """Steps of the reverse equation dx = [f x + g^2 eps / sigma] dt + g dw; no noise is added in the last one.

  Args:
    denoise: from `denoiser`.
    process: the path.
    noise: x at the first time, standard normal.
    grid: falling times, from `times`.
    key: of the noise; None for the deterministic probability flow dx = [f x + g^2 eps / (2 sigma)] dt.

  Returns:
    Samples in float32.

  Source: Song et al. 2021, equations 6 and 13; for samples, grid and end as in ScaleLong's code.
  """
  grid = jnp.asarray(grid, jnp.float32)
  _check(noise, grid)
  stochastic = key is not None
  keys = jax.random.split(jax.random.key(0) if key is None else key, len(grid) - 1)

  def step(x: Array, now: tuple[Array, Array, Array]) -> tuple[Array, None]:
    t, s, step_key = now
    _, eps = denoise(x, t)
    squared = process.squared_diffusion(t)
    slope = process.drift(t) * x + squared * eps / process.sigma(t) * (1.0 if stochastic else 0.5)
    x = x + slope * (s - t)
    if stochastic:
      scale = jnp.where(s > 0, jnp.sqrt(squared * (t - s)), 0.0)
      x = x + scale * jax.random.normal(step_key, x.shape)
    return x, None

  return jax.lax.scan(step, noise.astype(jnp.float32), (grid[:-1], grid[1:], keys))[0]


def ddim(
  denoise: Denoiser,
  process: Process,
  noise: Float[Array, "b *d"],
  grid: Float[Array, " k"],
  *,
  eta: float = 0.0,
  key: Key[Array, ""] | None = None,
) -> Float[Array, "b *d"]:
  """x_s = alpha_s x_0 + sqrt(sigma_s^2 - c^2) eps + c z: the path through the guessed data and noise.

      c = eta sigma_s / sigma_t sqrt(1 - alpha_t^2 / alpha_s^2)

  Args:
    denoise: from `denoiser`.
    process: the path.
    noise: x at the first time, standard normal.
    grid: falling times, from `times`.
    eta: 0 for the deterministic sampler, 1 for the ancestral one of DDPM; more than 0 where the path preserves
      variance only.
    key: of z; needed if eta is not 0.

  Returns:
    Samples in float32.

  Raises:
    ValueError: eta outside [0, 1], or without a key.

  Source: Song, Meng and Ermon 2021, equations 12 and 16.
  """
  checks.real("eta", eta)
  grid = jnp.asarray(grid, jnp.float32)
  _check(noise, grid)
  if eta and key is None:
    raise ValueError(f"key: got None with eta {eta}, expected a key for its noise")
  keys = jax.random.split(jax.random.key(0) if key is None else key, len(grid) - 1)

  def step(x: Array, now: tuple[Array, Array, Array]) -> tuple[Array, None]:
    t, s, step_key = now
    x0, eps = denoise(x, t)
    if not eta:
      return process.alpha(s) * x0 + process.sigma(s) * eps, None
    kept = -jnp.expm1(2 * (process.log_alpha(t) - process.log_alpha(s)))
    c_squared = eta**2 * process.variance(s) / process.variance(t) * kept
    direction = jnp.sqrt(jnp.maximum(process.variance(s) - c_squared, 0))
    z = jax.random.normal(step_key, x.shape)
    return process.alpha(s) * x0 + direction * eps + jnp.sqrt(c_squared) * z, None

  return jax.lax.scan(step, noise.astype(jnp.float32), (grid[:-1], grid[1:], keys))[0]


def dpm_solver(
  denoise: Denoiser, process: Process, noise: Float[Array, "b *d"], grid: Float[Array, " k"]
) -> Float[Array, "b *d"]:
  """DPM-Solver++(2M), which integrates the probability flow exactly for data guesses linear in log(alpha / sigma).

      x_s = sigma_s / sigma_t x_t + alpha_s (1 - exp(-h)) D,   D = x_0 + h / (2 h') (x_0 - x_0')

  h is the step in log(alpha / sigma); a prime marks the step before. The first and last steps take D = x_0.

  Args:
    denoise: from `denoiser`.
    process: the path.
    noise: x at the first time, standard normal.
    grid: falling times, from `times`, best with spacing "log_snr".

  Returns:
    Samples in float32.

  Source: Lu et al. 2022, algorithm 2.
  """
  grid = jnp.asarray(grid, jnp.float32)
  _check(noise, grid)
  log_snr = process.half_log_snr(grid)
  h = jnp.diff(log_snr)
  # The last step leads to infinity; the first follows none. A step from no data at all (-infinity) weighs nothing.
  correction = jnp.concatenate([jnp.zeros(1), h[1:-1] / (2 * h[:-2]), jnp.zeros(1)])

  def step(carry: tuple[Array, Array], now: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
    x, before = carry
    t, s, weight = now
    x0, _ = denoise(x, t)
    guess = x0 + weight * (x0 - before)
    shrunk = process.sigma(s) / process.sigma(t)
    gained = process.alpha(s) - process.alpha(t) * shrunk  # alpha_s (1 - exp(-h))
    return (shrunk * x + gained * guess, x0), None

  start = noise.astype(jnp.float32)
  return jax.lax.scan(step, (start, jnp.zeros_like(start)), (grid[:-1], grid[1:], correction))[0][0]


def timestep_embedding(
  timesteps: Float[Array, " b"],
  channels: int,
  *,
  max_period: float = 10_000.0,
  sine_first: bool = False,
  last_period: bool = False,
) -> Float[Array, "b c"]:
  """Cosines and sines of times at geometric frequencies, in float32.

      angle_j = t * max_period^(-j / h),   j = 0 ... c / 2 - 1

  Args:
    timesteps: times, in the network's units.
    channels: c, even.
    max_period: of the slowest wave, over 2 pi.
    sine_first: order of the halves; cosines first is that of guided diffusion, DiT and U-ViT, sines that of DDPM.
    last_period: h = c / 2 - 1, so that the slowest wave has the period (DDPM), instead of c / 2.

  Raises:
    ValueError: times that are not [B]; an odd or too small number of channels.
  """
  if timesteps.ndim != 1:
    raise ValueError(f"timesteps: got shape {timesteps.shape}, expected [batch]")
  half = channels // 2
  if channels % 2 or half < 1 + last_period:
    raise ValueError(f"channels: got {channels}, expected an even number of at least {2 + 2 * last_period}")
  frequencies = np.exp(-math.log(max_period) * np.arange(half) / (half - last_period)).astype(np.float32)
  angles = timesteps.astype(jnp.float32)[:, None] * frequencies
  halves = (jnp.sin(angles), jnp.cos(angles)) if sine_first else (jnp.cos(angles), jnp.sin(angles))
  return jnp.concatenate(halves, -1)


def _derivative(function: Callable[[Array], Array], t: Array) -> Array:
  t = jnp.asarray(t, jnp.float32)
  return jax.jvp(function, (t,), (jnp.ones_like(t),))[1]


def _wide(scale: Array, like: Array) -> Array:
  """[B] -> [B, 1, ..., 1]."""
  return scale.reshape(scale.shape[0], *[1] * (like.ndim - 1))


def _check(noise: Array, grid: Array) -> None:
  if noise.ndim < 2:
    raise ValueError(f"noise: got shape {noise.shape}, expected [batch, ...]")
  if grid.ndim != 1 or len(grid) < 3:
    raise ValueError(f"grid: got shape {grid.shape}, expected at least 3 times, such as from `times`")
