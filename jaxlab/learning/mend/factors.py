"""Rank-one factors of a dense layer's gradient, and the network that a sum of such factors has edited.

A layer y = x K, with K its flax kernel [m, n], has the gradient dL/dK = sum_t x_t d_t^T over all tokens of the batch,
with d_t = dL/dy_t. Layers are named by their path in the flax model, such as "block2/mlp/fc1".
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


class Factors(NamedTuple):
  """A sum of outer products sum_t inputs_t deltas_t^T that has the shape of a kernel [m, n].

  Attributes:
    inputs: [..., T, m].
    deltas: [..., T, n].
  """

  inputs: Float[Array, "*b t m"]
  deltas: Float[Array, "*b t n"]


def dense_layers(params: PyTree) -> list[str]:
  """Paths of all layers with a kernel [m, n], in the order of the parameters."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  paths = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
  return [path.removesuffix("/kernel") for path, leaf in paths if path.endswith("/kernel") and jnp.ndim(leaf) == 2]


def check_targets(params: PyTree, targets: Sequence[str]) -> None:
  """Raises a ValueError unless these are distinct paths of layers with a kernel [m, n], at least one."""
  known = dense_layers(params)
  if not targets or len(set(targets)) != len(targets) or set(targets) - set(known):
    raise ValueError(f"targets: got {list(targets)}, expected distinct dense layers among {known}")


def collect(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  targets: Sequence[str],
  inputs: Any,
  loss: Callable[[Any], Float[Array, ""]],
) -> dict[str, Factors]:
  """What the layers saw and what the loss asks of them, from one forward and one backward pass.

  The backward pass differentiates with respect to the layers' outputs, so no gradient of a kernel is formed, and it
  stops at the first of the layers.

  Args:
    model: flax model, called as `model.apply(variables, inputs)`.
    variables: its variables.
    targets: paths of `nn.Dense` layers that a forward pass calls once.
    inputs: of the model.
    loss: of its outputs.

  Returns:
    Path -> inputs [*b, t, m] and deltas [*b, t, n] as the layer had them, constants to any later gradient. A layer on
    [m] alone has t missing.

  Raises:
    ValueError: on paths that are no dense layers, or layers called never or more than once.
  """
  check_targets(variables["params"], targets)

  def run(taps: dict[str, Array] | None) -> tuple[Any, dict[str, Array], dict[str, Array]]:
    seen: dict[str, Array] = {}
    given: dict[str, Array] = {}

    def tap(path: str, x: Array, y: Array) -> Array:
      if path in seen:
        raise ValueError(f"targets: got {path!r}, called more than once in a pass, expected layers called once")
      seen[path], given[path] = x, y
      return y if taps is None else y + taps[path]

    outputs = _intercepted(model, targets, tap)(variables, inputs)
    if missing := set(targets) - set(seen):
      raise ValueError(f"targets: got {sorted(missing)}, never called in a pass, expected layers called once")
    return outputs, seen, given

  # A zero added to each output: its gradient is that of the output.
  shapes = jax.eval_shape(lambda: run(None)[2])
  zeros = {path: jnp.zeros(shape.shape, shape.dtype) for path, shape in shapes.items()}

  def tapped_loss(taps: dict[str, Array]) -> tuple[Float[Array, ""], dict[str, Array]]:
    outputs, seen, _ = run(taps)
    return loss(outputs), seen

  deltas, seen = jax.grad(tapped_loss, has_aux=True)(zeros)
  return jax.lax.stop_gradient({path: Factors(seen[path], deltas[path]) for path in targets})


def apply(
  model: nn.Module, variables: Mapping[str, PyTree], edits: Mapping[str, Factors], inputs: Any, **options: Any
) -> Any:
  """The edited network's outputs, without its kernels.

      y = x (K + sum_t inputs_t deltas_t^T) + b = (x K + b) + sum_t (x . inputs_t) deltas_t

  That costs T (m + n) a token beside the layer's m n: less than forming the sum, as long as the edit is short.

  Args:
    model: flax model.
    variables: those of the network before the edit.
    edits: path -> inputs [*b, T, m] and deltas [*b, T, n], what `Editor` returns; sums are over b and T.
    inputs: of the model.
    **options: of `model.apply`.

  Raises:
    ValueError: on paths that are no dense layers.
  """
  check_targets(variables["params"], list(edits))

  def correct(path: str, x: Array, y: Array) -> Array:
    wanted, change = (factor.astype(y.dtype).reshape(-1, factor.shape[-1]) for factor in edits[path])
    return y + (x.astype(y.dtype) @ wanted.T) @ change

  return _intercepted(model, list(edits), correct)(variables, inputs, **options)


def merge(params: PyTree, edits: Mapping[str, Factors]) -> PyTree:
  """Parameters with K + sum_t inputs_t deltas_t^T in place of the kernels K; all else is shared.

  Args:
    params: parameters of the model.
    edits: path -> inputs [*b, T, m] and deltas [*b, T, n]; sums are over b and T.

  Raises:
    ValueError: on paths that are no dense layers.
  """
  check_targets(params, list(edits))
  params = jax.tree.map(lambda leaf: leaf, params)  # new dicts, the same arrays
  for path, (inputs, deltas) in edits.items():
    layer = _layer(params, path)
    m, n = layer["kernel"].shape
    change = jnp.matmul(inputs.reshape(-1, m).T, deltas.reshape(-1, n), preferred_element_type=jnp.float32)
    layer["kernel"] = (layer["kernel"] + change).astype(layer["kernel"].dtype)
  return params


def kernels(params: PyTree, targets: Sequence[str]) -> dict[str, Array]:
  """Path -> kernel [m, n] of each layer."""
  check_targets(params, targets)
  return {path: _layer(params, path)["kernel"] for path in targets}


def with_kernels(params: PyTree, changed: Mapping[str, Array]) -> PyTree:
  """Parameters with these kernels in place of theirs; all else is shared."""
  params = jax.tree.map(lambda leaf: leaf, params)
  for path, kernel in changed.items():
    _layer(params, path)["kernel"] = kernel
  return params


def _layer(params: PyTree, path: str) -> dict[str, Array]:
  for name in path.split("/"):
    params = params[name]
  return params


def _intercepted(
  model: nn.Module, targets: Sequence[str], change: Callable[[str, Array, Array], Array]
) -> Callable[..., Any]:
  """`model.apply` in which `change(path, input, output)` replaces the output of each layer among `targets`."""

  def intercept(next_function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    outputs = next_function(*args, **kwargs)
    path = "/".join(context.module.path)
    if context.method_name == "__call__" and path in targets:
      return change(path, args[0] if args else kwargs["inputs"], outputs)
    return outputs

  def run(variables: Mapping[str, PyTree], inputs: Any, **options: Any) -> Any:
    with nn.intercept_methods(intercept):
      return model.apply(variables, inputs, **options)

  return run
