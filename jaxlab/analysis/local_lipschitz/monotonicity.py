"""Whether an output only rises, or only falls, as one feature moves."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.analysis.local_lipschitz import layers as chain
from jaxlab.analysis.local_lipschitz import propagation, relaxation
from jaxlab.analysis.local_lipschitz.layers import Bounds, Network


class Monotonicity(NamedTuple):
  """Of each feature.

  Attributes:
    direction: [F] 1: the output never falls as the feature rises; -1: it never rises; 0: unknown.
    slope: bounds [F] of the output's derivative by the feature.
  """

  direction: Int[Array, " f"]
  slope: Bounds


def monotonicity(
  network: Network,
  x: Float[Array, " n"],
  features: Sequence[int] | Int[Array, " f"],
  *,
  span: tuple[float, float] = (0.0, 1.0),
  output: int = 1,
  method: relaxation.Method = "lip_crown",
  chunk: int | None = None,
) -> Monotonicity:
  """Moves one feature at a time over its span, the others stay, and bounds the derivative of an output by it.

  Args:
    network: n layers, for inputs [N].
    x: an input.
    features: indices into it.
    span: smallest and largest value of a feature.
    output: index of the output, such as the class that is the question.
    method: as for `lipschitz`; "interval" for the forward bounds too.
    chunk: likewise.

  Raises:
    ValueError: an index out of range (of features on the host only), or as for `lipschitz`.
  """
  chain.check(network)
  x, features = jnp.asarray(x), jnp.asarray(features)
  if x.ndim != 1:
    raise ValueError(f"x: got shape {x.shape}, expected one axis, features")
  if features.ndim != 1 or not jnp.issubdtype(features.dtype, jnp.integer):
    raise ValueError(f"features: got shape {features.shape}, {features.dtype}, expected [F] integers")
  if not isinstance(features, jax.core.Tracer) and not ((features >= 0) & (features < len(x))).all():
    raise ValueError(f"features: got indices outside 0 to {len(x) - 1}, expected features of x")
  if not span[0] <= span[1]:
    raise ValueError(f"span: got {span}, expected a smaller and a larger number")
  outputs = network[-1].kernel.shape[-1]
  if not 0 <= output < outputs:
    raise ValueError(f"output: got {output}, expected 0 to {outputs - 1}")
  row = jnp.eye(outputs, dtype=x.dtype)[output : output + 1]

  def each(feature):
    box = Bounds(x.at[feature].set(span[0]), x.at[feature].set(span[1]))
    forward = propagation.forward(network, box, method="interval" if method == "interval" else "crown", chunk=chunk)
    slopes = propagation.jacobian(network, forward, rows=row, method=method, chunk=chunk)
    return Bounds(slopes.lower[0, feature], slopes.upper[0, feature])

  slope = jax.vmap(each)(features)
  return Monotonicity(jnp.where(slope.lower >= 0, 1, jnp.where(slope.upper <= 0, -1, 0)), slope)
