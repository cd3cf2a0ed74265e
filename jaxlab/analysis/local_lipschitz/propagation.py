"""Bounds through the network, and back through its gradient.

Forward, z_k = W_k a_{k-1} + b_k and a_k = relu(z_k). A row A of coefficients on z_k becomes A W_k on a_{k-1}, then by
the lines of ReLU one on z_{k-1}, and at x the box tells how large it gets. Backward, for a row c of outputs,

    g_{n-1} = W_n^T c,   h_k = g_k D_k,   g_{k-1} = W_k^T h_k,   g_0 = the gradient of c f

with D_k in {0, 1}, or [0, 1] where the sign of z_k is unknown. A row L on g_k becomes W_{k+1} L on h_{k+1}, then by the
lines of `relaxation.gate` one on g_{k+1}, and so on up to g_{n-1}, which is constant. So every bound of a gradient goes
all the way; the bounds of g_{k+1} found before only choose the lines.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxlab import checks
from jaxlab.analysis.local_lipschitz import layers as chain
from jaxlab.analysis.local_lipschitz import relaxation
from jaxlab.analysis.local_lipschitz.layers import Bounds, Network

Rows = Float[Array, "c o"]


def forward(network: Network, box: Bounds, *, method: str = "crown", chunk: int | None = None) -> tuple[Bounds, ...]:
  """Bounds of the input and of every layer's z, n + 1 of them, in the dtype of the box; float32 at least inside.

  Args:
    network: n layers.
    box: of x, each [*shape].
    method: "crown", or "interval" for interval arithmetic, which is faster and looser.
    chunk: neurons to bound at once; None for all of a layer, which takes the memory of this layer's size times that of
      any before it.

  Raises:
    ValueError: no chain, a box of another shape, or an argument out of range.
  """
  _check(network, box, chunk)
  if method not in ("crown", "interval"):
    raise ValueError(f"method: got {method!r}, expected crown or interval")
  network, wide = chain.wide(network, box)
  found = _interval(network, wide) if method == "interval" else _crown(network, wide, None, None, chunk)[0]
  return _narrow(found, box.lower.dtype)


def optimize(
  network: Network,
  box: Bounds,
  *,
  label: int | Int[Array, ""] | None = None,
  steps: int = 20,
  learning_rate: float = 0.5,
  decay: float = 0.98,
  chunk: int | None = None,
) -> tuple[Bounds, ...]:
  """As `forward`, tighter: the slopes of the lines below ReLU are free in [0, 1], and gradient ascent chooses them.

  Each neuron, and each side of its bounds, has slopes of its own. What rises is the sum of the lower bounds of the
  outputs; of the intermediate bounds seen on the way every one is kept at its best, so none is looser than `forward`'s.

  Args:
    network: as in `forward`.
    box: likewise.
    chunk: likewise.
    label: class whose margins over the others are bounded instead of the outputs.
    steps: of Adam, each of which costs about three times `forward`.
    learning_rate: of the first step.
    decay: of the rate, by step.

  Raises:
    ValueError: as `forward`, a label that is no output (seen on the host only).
  """
  _check(network, box, chunk)
  checks.count("steps", steps, 0)
  if not 0 < decay <= 1:
    raise ValueError(f"decay: got {decay}, expected a number in (0, 1]")
  network, wide = chain.wide(network, box)
  outputs = network[-1].kernel.shape[-1]
  specification = jnp.eye(outputs, dtype=wide.lower.dtype)
  if label is not None:
    if not isinstance(label, jax.core.Tracer):
      checks.count("label", label, 0, outputs - 1)
    specification = jax.nn.one_hot(label, outputs, dtype=wide.lower.dtype) - specification
  first, _ = _crown(network, wide, None, None, chunk)
  # slopes[k][i]: of the line below a_i, in bounds of z_k; one set for the lower and one for the upper side.
  neurons = [int(np.prod(b.lower.shape)) for b in first[:-1]] + [outputs]
  slopes = [
    [jnp.broadcast_to(relaxation.relu(b).lower_slope, (2, neurons[k], *b.lower.shape)) for b in first[1:k]]
    for k in range(len(network) + 1)
  ]

  def loss(slopes):
    bounds, goal = _crown(network, wide, slopes, specification, chunk)
    return -jnp.sum(goal), bounds

  tx = optax.adam(lambda step: learning_rate * decay**step)

  def step(carry, _):
    slopes, state, best = carry
    (_, bounds), grads = jax.value_and_grad(loss, has_aux=True)(slopes)
    updates, state = tx.update(grads, state)
    slopes = jax.tree.map(lambda s: jnp.clip(s, 0, 1), optax.apply_updates(slopes, updates))
    return (slopes, state, jax.tree.map(Bounds.intersect, best, bounds, is_leaf=_is_bounds)), None

  (_, _, best), _ = jax.lax.scan(step, (slopes, tx.init(slopes), first), length=steps + 1)
  return _narrow(best, box.lower.dtype)


class Gradients(NamedTuple):
  """What is known of the gradients of c f.

  Attributes:
    bounds: of g_0 to g_{n-1}, each [C, *shape].
    norm: [C] upper bounds of sum |g_0|.
    coefficients: what the norm's bound gave to h_1 to h_{n-1}, each [C, *shape].
  """

  bounds: tuple[Bounds, ...]
  norm: Float[Array, " c"]
  coefficients: tuple[Float[Array, "c *shape"], ...]


def lipschitz(
  network: Network,
  forward: Sequence[Bounds],
  *,
  rows: Rows | None = None,
  method: relaxation.Method = "lip_crown",
  chunk: int | None = None,
) -> Float[Array, " c"]:
  """Upper bounds of max ||d (c f) / d x||_1 over the box, one for each row c: |c f(x) - c f(y)| <= bound max |x - y|.

  Their maximum over the outputs bounds the Lipschitz constant of f from l_inf to l_inf.

  Args:
    network: n layers.
    forward: from `forward` or `optimize`.
    rows: [C, out] combinations c of outputs, such as margins; None for every output by itself.
    method: "lip_crown"; "recurjac", with its constants for gradients of unknown sign; "interval" arithmetic.
    chunk: components of a gradient to bound at once, for each row; None for all.

  Raises:
    ValueError: bounds that are not the network's, or an argument out of range.
  """
  network, rows, phases, dtype = start(network, forward, rows, method, chunk)
  each = functools.partial(gradients, network, phases, shape=forward[0].lower.shape, method=method, chunk=chunk)
  return jax.vmap(lambda row: each(row).norm)(rows).astype(dtype)


def jacobian(
  network: Network,
  forward: Sequence[Bounds],
  *,
  rows: Rows | None = None,
  method: relaxation.Method = "lip_crown",
  chunk: int | None = None,
) -> Bounds:
  """Bounds [C, *shape] of every component of the gradient over the box, one gradient for each row c of outputs.

  Arguments and errors as for `lipschitz`.
  """
  network, rows, phases, dtype = start(network, forward, rows, method, chunk)
  each = functools.partial(gradients, network, phases, shape=forward[0].lower.shape, method=method, chunk=chunk)
  return _narrow(jax.vmap(lambda row: each(row).bounds[0])(rows), dtype)


def jvp(
  network: Network,
  forward: Sequence[Bounds],
  tangent: Float[Array, "*shape"],
  *,
  rows: Rows | None = None,
  method: relaxation.Method = "lip_crown",
  chunk: int | None = None,
) -> Bounds:
  """Bounds [C] of the derivative along `tangent` over the box. Other arguments and errors as for `lipschitz`."""
  network, rows, phases, dtype = start(network, forward, rows, method, chunk)
  shape = forward[0].lower.shape
  if jnp.shape(tangent) != shape:
    raise ValueError(f"tangent: got shape {jnp.shape(tangent)}, expected {shape}, as of an input")
  v = jnp.asarray(tangent, rows.dtype)

  def each(row):
    bounds = gradients(network, phases, row, shape=shape, method=method, chunk=chunk).bounds
    if method == "interval":
      middle, radius = (bounds[0].upper + bounds[0].lower) / 2, (bounds[0].upper - bounds[0].lower) / 2
      return Bounds(jnp.sum(v * middle - jnp.abs(v) * radius), jnp.sum(v * middle + jnp.abs(v) * radius))
    lines = [relaxation.gate(p, b, method) for p, b in zip(phases, bounds[1:], strict=True)]
    if not lines:
      return Bounds(*[jnp.sum(v * bounds[0].lower)] * 2)
    start = chain.push(network[0], v)
    return _both(lambda sign: _to_the_top(network, lines, bounds[-1].upper, 0, sign * start)[0], start.dtype)

  return _narrow(jax.vmap(each)(rows), dtype)


def gradients(
  network: Network,
  phases: Sequence[Int[Array, "*shape"]],
  row: Float[Array, " o"],
  *,
  shape: tuple[int, ...],
  method: relaxation.Method = "lip_crown",
  chunk: int | None = None,
  within: Sequence[Bounds] | None = None,
) -> Gradients:
  """Everything about one row's gradient, from the phases of the ReLUs alone. Traceable; without checks.

  Args:
    network: n layers, float32 or wider.
    phases: of z_1 to z_{n-1}, as of `relaxation.phase`.
    row: c.
    shape: of x.
    method: as in `lipschitz`.
    chunk: likewise.
    within: bounds of g_0 to g_{n-1} known before, which those found are intersected with.

  Returns:
    As described there, without the axis C.
  """
  shapes = [shape, *(p.shape for p in phases)]
  top = chain.pull(network[-1], row, shapes[-1])
  found = [Bounds(top, top)]
  lines: list[relaxation.Lines] = []
  for k in reversed(range(len(network) - 1)):
    lines.insert(0, relaxation.gate(phases[k], found[0], method))
    if method == "interval":
      bounds = _past(network[k], phases[k], found[0], shapes[k])
    else:
      bounds = _each(functools.partial(_component, network, lines, top, k, shapes[k]), shapes[k], chunk)
    found.insert(0, bounds if within is None else bounds.intersect(within[k]))
  if method == "interval" or not lines:
    norm = jnp.sum(jnp.maximum(jnp.abs(found[0].lower), jnp.abs(found[0].upper)))
    return Gradients(tuple(found), norm, ())
  slope, offset = relaxation.absolute(found[0])
  norm, coefficients = _to_the_top(network, lines, top, 0, chain.push(network[0], slope))
  return Gradients(tuple(found), norm + jnp.sum(offset), tuple(coefficients))


# ------------------------------------------------------------------------------------------------------------ backward


def _component(network, lines, top, k, shape, index):
  """Bounds of one component of g_k, where `lines` are those of h_{k+1} to h_{n-1}."""
  start = chain.push_unit(network[k], index, shape)
  return _both(lambda sign: _to_the_top(network, lines, top, k, sign * start)[0], start.dtype)


def _to_the_top(network, lines, top, k, coefficients):
  """Upper bound of L h_{k+1}, and the coefficients of all h on the way."""
  total, seen = jnp.zeros((), coefficients.dtype), []
  for i, line in enumerate(lines, start=k + 1):
    seen.append(coefficients)
    coefficients, offset = relaxation.substitute(coefficients, line)  # h_i <= slope g_i + offset
    total += offset
    if i < len(network) - 1:
      coefficients = chain.push(network[i], coefficients)  # g_i = W_{i+1}^T h_{i+1}
  return total + jnp.sum(coefficients * top), seen


def _past(layer, phase, gradient, shape):
  """Interval arithmetic: g_{k-1} = W^T (g_k D)."""
  low, high = (phase > 0).astype(gradient.lower.dtype), (phase >= 0).astype(gradient.lower.dtype)
  lower = jnp.minimum(gradient.lower * low, gradient.lower * high)
  upper = jnp.maximum(gradient.upper * low, gradient.upper * high)
  middle = chain.pull(layer, (upper + lower) / 2, shape)
  radius = chain.pull(layer.replace(kernel=jnp.abs(layer.kernel)), (upper - lower) / 2, shape)
  return Bounds(middle - radius, middle + radius)


# ------------------------------------------------------------------------------------------------------------- forward


def _crown(network, box, slopes, specification, chunk):
  """Bounds of x, z_1, ..., z_n, and with slopes the lower bounds of specification z_n."""
  found, goal = [box], None
  for k in range(1, len(network) + 1):
    own = None if slopes is None else slopes[k]
    z = chain.out_shape(network[k - 1], found[-1].lower.shape)
    if k == len(network) and specification is not None:
      pulled = jax.vmap(functools.partial(chain.pull, network[-1], shape=found[-1].lower.shape))(-specification)
      bias = -specification @ network[-1].bias
      goal = -jax.vmap(functools.partial(_to_the_box, network, found))(pulled, bias, [s[0] for s in own])
    found.append(_each(functools.partial(_neuron, network, tuple(found), z), z, chunk, own))
  return tuple(found), goal


def _neuron(network, found, shape, index, slopes=None):
  """Bounds of one neuron of z_k from those of x, ..., z_{k-1}."""
  layer = network[len(found) - 1]
  start = chain.pull_unit(layer, index, shape, found[-1].lower.shape)
  bias = layer.bias[index % layer.bias.shape[0]]  # channels are the last axis
  return _both(
    lambda sign, *own: _to_the_box(network, found, sign * start, sign * bias, own or None), start.dtype, *(slopes or ())
  )


def _to_the_box(network, found, coefficients, total, slopes):
  """Upper bound of A a_{k-1} + total, from bounds of x, ..., z_{k-1}."""
  for i in reversed(range(1, len(found))):
    lines = relaxation.relu(found[i], None if slopes is None else slopes[i - 1])
    coefficients, offset = relaxation.substitute(coefficients, lines)
    total += offset + jnp.sum(coefficients * network[i - 1].bias)
    coefficients = chain.pull(network[i - 1], coefficients, found[i - 1].lower.shape)
  positive, negative = jnp.maximum(coefficients, 0), jnp.minimum(coefficients, 0)
  return total + jnp.sum(positive * found[0].upper + negative * found[0].lower)


def _interval(network, box):
  found = [box]
  for i, layer in enumerate(network):
    lower, upper = found[-1] if i == 0 else (jax.nn.relu(found[-1].lower), jax.nn.relu(found[-1].upper))
    middle = chain.push(layer, (upper + lower) / 2) + layer.bias
    radius = chain.push(layer.replace(kernel=jnp.abs(layer.kernel)), (upper - lower) / 2)
    found.append(Bounds(middle - radius, middle + radius))
  return tuple(found)


# ------------------------------------------------------------------------------------------------------------- helpers


def _both(upper: Callable, dtype: jax.typing.DTypeLike, *arguments: Array) -> Bounds:
  """From upper bounds of a sum times -1 and 1, which also get the halves of further arguments [2, ...]."""
  sides = jax.vmap(upper)(jnp.array([-1, 1], dtype), *arguments)
  return Bounds(-sides[0], sides[1])


def _each(function, shape, chunk, slopes=None):
  """`function` of every index of an array of a shape, all at once or some at a time."""
  count = int(np.prod(shape))
  if slopes:  # [2, count, ...] each
    by_index = [jnp.moveaxis(s, 0, 1) for s in slopes]
    arguments, call = (jnp.arange(count), by_index), lambda a: function(*a)
  else:
    arguments, call = jnp.arange(count), function
  if chunk is None or chunk >= count:
    bounds = jax.vmap(call)(arguments)
  else:
    bounds = jax.lax.map(call, arguments, batch_size=chunk)
  return jax.tree.map(lambda a: a.reshape(shape), bounds)


def start(network, forward, rows, method, chunk):
  """Checked arguments: the network and rows to compute with, phases, and the dtype of results."""
  if len(forward) != len(network) + 1:
    raise ValueError(f"forward: got {len(forward)} bounds, expected {len(network) + 1}, of the input and every layer")
  _check(network, forward[0], chunk)
  for layer, before, after in zip(network, forward, forward[1:], strict=False):
    expected = chain.out_shape(layer, before.lower.shape)
    if after.lower.shape != expected:
      raise ValueError(f"forward: got bounds of shape {after.lower.shape}, expected {expected}")
  if method not in ("lip_crown", "recurjac", "interval"):
    raise ValueError(f"method: got {method!r}, expected lip_crown, recurjac or interval")
  outputs = network[-1].kernel.shape[-1]
  rows = jnp.eye(outputs, dtype=forward[0].lower.dtype) if rows is None else jnp.asarray(rows)
  if rows.ndim != 2 or rows.shape[1] != outputs:
    raise ValueError(f"rows: got shape {rows.shape}, expected [C, {outputs}], combinations of outputs")
  network, rows, _ = chain.wide(network, rows, forward)
  return network, rows, [relaxation.phase(b) for b in forward[1:-1]], forward[0].lower.dtype


def _check(network, box, chunk):
  chain.check(network)
  if not (isinstance(box, Bounds) and box.lower.shape == box.upper.shape):
    raise ValueError(
      f"box: got {type(box).__name__}, expected Bounds of two arrays of one shape; see local_lipschitz.box"
    )
  if not jnp.issubdtype(box.lower.dtype, jnp.floating):
    raise ValueError(f"box: got dtype {box.lower.dtype}, expected a floating one")
  if not isinstance(box.lower, jax.core.Tracer) and (np.asarray(box.lower) > np.asarray(box.upper)).any():
    raise ValueError("box: got a lower end above the upper one, expected none")
  if chunk is not None:
    checks.count("chunk", chunk)
  shape = box.lower.shape
  for layer in network:
    shape = chain.out_shape(layer, shape)


def _narrow(tree, dtype):
  return jax.tree.map(lambda a: a.astype(dtype), tree)


def _is_bounds(value):
  return isinstance(value, Bounds)
