"""The generator: a conditional variational autoencoder of a neighbour's features given the centre's.

Kingma and Welling, ICLR 2014, arXiv:1312.6114, with condition: Sohn et al., NeurIPS 2015. x is the neighbour, c the
centre, both as they are in the data (not row-normalised):

    (m, v) = heads(relu([x, c] W + b)),   z = m + exp(v / 2) noise,   x' = decoder([z, c])
    loss = (sum BCE(x', x) - 1/2 sum (1 + v - m^2 - e^v)) / B
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key

from jaxlab.graph import layers, sparse
from jaxlab.graph.layers import Features
from jaxlab.nn.initializers import torch_bias, torch_kernel


class Posterior(NamedTuple):
  """What a pass through the autoencoder gives: `logits` [B, F] before the decoder's last function, and q(z | x, c)."""

  logits: Float[Array, "b f"]
  mean: Float[Array, "b z"]
  log_variance: Float[Array, "b z"]


class CVAE(nn.Module):
  """Two layers each way.

  Attributes:
    features: F.
    latent: size of z.
    hidden: width of the one hidden layer of encoder and decoder.
    continuous: the OGB form, for continuous features: batch normalisation after every layer but the heads, a tanh at
      the end in place of a sigmoid, and squared error in place of BCE.
    axis_name: device axis over which batch statistics are averaged.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  features: int
  latent: int = 10
  hidden: int = 256
  continuous: bool = False
  axis_name: str | None = None
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  def setup(self) -> None:
    """Layers."""
    if min(self.features, self.latent, self.hidden) < 1:
      raise ValueError(
        f"features, latent, hidden: got {self.features}, {self.latent}, {self.hidden}, expected at least 1 each"
      )
    types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    self.encoder = PairLinear(self.hidden, **types)
    self.mean = layers.Linear(self.latent, **types)
    self.log_variance = layers.Linear(self.latent, **types)
    self.decoder = PairLinear(self.hidden, **types)
    self.output = layers.Linear(self.features, **types)
    if self.continuous:
      norm = lambda: nn.BatchNorm(momentum=0.9, axis_name=self.axis_name, **types)
      self.encoder_norm, self.decoder_norm, self.output_norm = norm(), norm(), norm()

  def __call__(
    self,
    x: Float[Array, "b f"],
    condition: Features,
    noise: Float[Array, "b z"],
    *,
    train: bool = False,
    mask: Bool[Array, " b"] | None = None,
  ) -> Posterior:
    """Encodes, draws z and decodes.

    Args:
      x: [B, F] features of neighbours.
      condition: [B, F] features of the centres, dense or sparse.
      noise: [B, Z] standard normal.
      train: in the OGB form, normalise over the batch and update the running statistics.
      mask: [B] which rows those statistics count; default all.

    Raises:
      ValueError: while tracing, on shapes that do not belong together.
    """
    mean, log_variance = self.encode(x, condition, train=train, mask=mask)
    if noise.shape != mean.shape:
      raise ValueError(f"noise: got shape {noise.shape}, expected {mean.shape}")
    z = mean + jnp.exp(log_variance / 2) * noise
    return Posterior(self.decode_logits(z, condition, train=train, mask=mask), mean, log_variance)

  def encode(
    self, x: Features, condition: Features, *, train: bool = False, mask: Bool[Array, " b"] | None = None
  ) -> tuple[Float[Array, "b z"], Float[Array, "b z"]]:
    """Mean and log-variance of q(z | x, c)."""
    self._check("x", x)
    self._check("condition", condition)
    h = self.encoder(x, condition)
    if self.continuous:
      h = self.encoder_norm(h, use_running_average=not train, mask=_column(mask))
    h = nn.relu(h)
    return self.mean(h), self.log_variance(h)

  def decode(
    self,
    z: Float[Array, "b z"],
    condition: Features,
    *,
    train: bool = False,
    mask: Bool[Array, " b"] | None = None,
  ) -> Float[Array, "b f"]:
    """x' of z: in (0, 1), or (-1, 1) in the OGB form. Arguments as `__call__`."""
    return self.link(self.decode_logits(z, condition, train=train, mask=mask))

  def decode_logits(
    self, z: Float[Array, "b z"], condition: Features, *, train: bool = False, mask: Bool[Array, " b"] | None = None
  ) -> Float[Array, "b f"]:
    """x' before its last function."""
    self._check("condition", condition)
    if z.shape != (condition.shape[0], self.latent):
      raise ValueError(f"z: got shape {z.shape}, expected {(condition.shape[0], self.latent)}")
    h = self.decoder(z, condition)
    if self.continuous:
      h = self.decoder_norm(h, use_running_average=not train, mask=_column(mask))
    y = self.output(nn.relu(h))
    return self.output_norm(y, use_running_average=not train, mask=_column(mask)) if self.continuous else y

  def link(self, logits: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """The decoder's last function."""
    return jnp.tanh(logits) if self.continuous else nn.sigmoid(logits)

  def _check(self, name, x):
    if x.ndim != 2 or x.shape[-1] != self.features:
      raise ValueError(f"{name}: got shape {x.shape}, expected [B, {self.features}]")


class PairLinear(nn.Module):
  """[a, b] W + bias without writing [a, b]: either side may be sparse. Parameters are those of `layers.Linear`."""

  features: int
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, a: Features, b: Features) -> Float[Array, "n features"]:
    """[N, F_a], [N, F_b] -> [N, features]."""
    split, fan_in = a.shape[1], a.shape[1] + b.shape[1]
    kernel = self.param("kernel", torch_kernel, (fan_in, self.features), self.param_dtype)
    bias = self.param("bias", torch_bias(fan_in), (self.features,), self.param_dtype)
    kernel, bias = jnp.asarray(kernel, self.dtype), jnp.asarray(bias, self.dtype)

    def times(x, w):
      return sparse.propagate(x, w) if isinstance(x, sparse.Operator) else jnp.asarray(x, self.dtype) @ w

    return times(a, kernel[:split]) + times(b, kernel[split:]) + bias


def negative_elbo(
  posterior: Posterior, x: Float[Array, "b f"], *, continuous: bool = False, mask: Bool[Array, " b"] | None = None
) -> Float[Array, ""]:
  """(reconstruction error + KL(q(z | x, c) || N(0, I))) / B, both summed over all entries, in float32.

  Args:
    posterior: of `CVAE.__call__`.
    x: [B, F] features to reconstruct, in [0, 1] unless `continuous`.
    continuous: squared error of the tanh (OGB form) in place of BCE.
    mask: [B] rows that count, B being their number; default all.
  """
  logits, mean, log_variance = (a.astype("float32") for a in posterior)
  x = x.astype("float32")
  error = (jnp.tanh(logits) - x) ** 2 if continuous else optax.losses.sigmoid_binary_cross_entropy(logits, x)
  kl = -0.5 * jnp.sum(1 + log_variance - mean**2 - jnp.exp(log_variance), axis=1)
  each = jnp.sum(error, axis=1) + kl
  return jnp.mean(each) if mask is None else jnp.sum(each * mask) / jnp.maximum(jnp.sum(mask), 1)


class Generator(NamedTuple):
  """All that `generate` reads: the variables of a `CVAE` and the centres' features [N, F] as in the data."""

  variables: Any
  condition: Features


def generate(
  cvae: CVAE, generator: Generator, key: Key[Array, ""], *, batch_statistics: bool = False
) -> Float[Array, "n f"]:
  """Features of an invented neighbour of every node: rownorm(decoder(z, X)), z ~ N(0, I); no gradient flows into it.

  The OGB form is not row-normalised.

  Args:
    cvae: the network.
    generator: its variables and what it is conditioned on.
    key: of z.
    batch_statistics: OGB form: normalise over these N rows, as the official pickles do, not by running statistics.
  """
  z = jax.random.normal(key, (generator.condition.shape[0], cvae.latent), cvae.dtype)
  if batch_statistics:
    x, _ = cvae.apply(
      generator.variables, z, generator.condition, train=True, method=CVAE.decode, mutable=["batch_stats"]
    )
  else:
    x = cvae.apply(generator.variables, z, generator.condition, method=CVAE.decode)
  return jax.lax.stop_gradient(x if cvae.continuous else row_normalize(x))


def row_normalize(x: Float[Array, "n f"]) -> Float[Array, "n f"]:
  """Each row over its sum; a row that sums to 0 becomes 0."""
  total = jnp.sum(x, axis=-1, keepdims=True, dtype=jnp.promote_types(x.dtype, "float32"))
  return (x * jnp.where(total == 0, 0, 1 / jnp.where(total == 0, 1, total))).astype(x.dtype)


def _column(mask):
  return None if mask is None else mask[:, None]
