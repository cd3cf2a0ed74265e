"""The editor networks: from a layer's input and output gradient at each token to the factors of its edit."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlab import checks, interop
from jaxlab.learning.mend.factors import Factors

Variant = Literal["combined", "separate", "inputs", "deltas", "smaller"]
Start = Literal["identity", "xavier"]
_EPSILON = 1e-7


class LowRankLayer(nn.Module):
  """z + relu(scale_l * (U V z + b) + shift_l), for each token.

  The ReLU passes a gradient of 1 at exactly 0: U is 0 at first, and so is every argument of it.

  Attributes:
    rank: r, at most the width of z.
    modes: how many layers share U, V and b; each has its own scale and shift. None for neither scale nor shift.
    start: "identity" for U = 0 and V normal; "xavier" for Xavier's uniform ones and no residual connection.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  rank: int
  modes: int | None
  start: Start = "identity"
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, z: Float[Array, "*b d"], mode: int) -> Float[Array, "*b d"]:
    """Args: z; mode, which of the layers asks. Returns the same shape, in `dtype`."""
    width = z.shape[-1]
    rank = min(self.rank, width)
    identity = self.start == "identity"
    uniform = lambda gain: nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform")
    down_init, up_init = (
      (nn.initializers.normal(1.0), nn.initializers.zeros) if identity else (uniform(1), uniform(2**0.5))
    )
    down = self.param("down", down_init, (width, rank), self.param_dtype)
    up = self.param("up", up_init, (rank, width), self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, (width,), self.param_dtype)
    z, down, up, bias = (a.astype(self.dtype) for a in (z, down, up, bias))
    a = (z @ down) @ up + bias
    if self.modes is not None:
      scale = self.param("scale", nn.initializers.ones, (self.modes, width), self.param_dtype)
      shift = self.param("shift", nn.initializers.zeros, (self.modes, width), self.param_dtype)
      a = scale[mode].astype(self.dtype) * a + shift[mode].astype(self.dtype)
    a = jnp.where(a >= 0, a, 0)
    return z + a if identity else a


class GradientTransform(nn.Module):
  """Normalises a layer's factors by running statistics and maps them, token by token.

  The collection `statistics` holds, for inputs and deltas, the mean and the sum of squared deviations from it over all
  tokens seen in training, and their `count`. Before two tokens were seen there is no deviation and outputs are NaN.

  Attributes:
    rank: r of `LowRankLayer`.
    num_layers: of them.
    modes: layers that share this transform; None for one without scale and shift.
    variant: "combined" maps [inputs, deltas] as one vector; "separate" each by a network of its own; "inputs", "deltas"
      or "smaller" one of them, or the shorter, while the other stays as it is.
    normalize: whether to normalise.
    start: of `LowRankLayer`.
    axis_name: device axis over which a step's tokens are put together.
    dtype: compute dtype; statistics are in float32.
    param_dtype: parameter dtype.
  """

  rank: int = 1920
  num_layers: int = 2
  modes: int | None = 1
  variant: Variant = "combined"
  normalize: bool = True
  start: Start = "identity"
  axis_name: str | None = None
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, factors: Factors, mode: int = 0, *, train: bool = False) -> Factors:
    """Maps the factors of one layer.

    Args:
      factors: inputs [..., T, m] and deltas [..., T, n]. Tokens whose inputs or deltas are all zero are not there: they
        do not count in the statistics, and their outputs are zero.
      mode: which of the layers that share this transform, from 0.
      train: put the tokens into the statistics first; needs `mutable=["statistics"]`.

    Returns:
      Factors of the same shapes, in `dtype`.
    """
    inputs, deltas = (factor.astype(jnp.float32) for factor in factors)
    there = jnp.any(inputs != 0, axis=-1) & jnp.any(deltas != 0, axis=-1)
    m, n = inputs.shape[-1], deltas.shape[-1]
    count = self.variable("statistics", "count", jnp.zeros, (), jnp.int32)
    before, normal = count.value, []
    for name, values, width in (("inputs", inputs, m), ("deltas", deltas, n)):
      mean = self.variable("statistics", f"{name}_mean", jnp.zeros, (width,), jnp.float32)
      squares = self.variable("statistics", f"{name}_squares", jnp.zeros, (width,), jnp.float32)
      if train and not self.is_initializing():
        count.value, mean.value, squares.value = _seen(values, there, before, mean.value, squares.value, self.axis_name)
      if self.normalize:
        deviation = jnp.where(count.value > 1, jnp.sqrt(squares.value / (count.value - 1)), jnp.nan)
        values = (values - mean.value) / (deviation + _EPSILON)
      normal.append(values)
    x, d = normal
    if self.variant == "combined":
      mapped = self._network("combined", jnp.concatenate([x, d], axis=-1), mode)
      x, d = mapped[..., :m], mapped[..., m:]
    else:
      if self.variant in ("separate", "inputs") or (self.variant == "smaller" and m <= n):
        x = self._network("inputs", x, mode)
      if self.variant in ("separate", "deltas") or (self.variant == "smaller" and m > n):
        d = self._network("deltas", d, mode)
    return Factors(*(jnp.where(there[..., None], factor, 0).astype(self.dtype) for factor in (x, d)))

  def _network(self, name: str, z: Array, mode: int) -> Array:
    for i in range(self.num_layers):
      layer = LowRankLayer(
        self.rank, self.modes, self.start, self.dtype, self.param_dtype, name=f"{name}{i}"
      )  # fmt: skip
      z = layer(z, mode)
    return z


class Editor(nn.Module):
  """An edit of each target layer from its factors: alpha_l * sum_t x~_t d~_t^T, downhill.

  Layers with kernels of one shape share a `GradientTransform`, each with a scale and shift of its own.

  Attributes:
    targets: paths of the layers, as in `factors.collect`; with a transform each, named by them with "_" for "/".
    rank: at most 1920 in the paper.
    num_layers: of a transform's network.
    variant: what the networks see, see `GradientTransform`.
    normalize: whether factors are normalised.
    shared: False for a transform for each layer, without scale and shift.
    start: "identity", or "xavier" for the paper's ablation.
    sign: -1 as in the paper, or 1 as in the official code; of the update.
    step_size: alpha_l at first.
    axis_name: device axis over which statistics are taken.
    dtype: compute dtype; statistics are in float32.
    param_dtype: parameter dtype.
  """

  targets: tuple[str, ...]
  rank: int = 1920
  num_layers: int = 2
  variant: Variant = "combined"
  normalize: bool = True
  shared: bool = True
  start: Start = "identity"
  sign: int = -1
  step_size: float = 1e-4
  axis_name: str | None = None
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  def __post_init__(self) -> None:
    """Checks the settings."""
    if not self.targets or len(set(self.targets)) != len(self.targets):
      raise ValueError(f"targets: got {self.targets}, expected distinct paths of layers")
    checks.count("rank", self.rank)
    checks.count("num_layers", self.num_layers)
    checks.choice("variant", self.variant, Variant)
    checks.choice("start", self.start, Start)
    checks.choice("sign", self.sign, (-1, 1))
    if not np.isfinite(self.step_size):
      raise ValueError(f"step_size: got {self.step_size}, expected a finite number")
    names: dict[str, str] = {}
    for path in () if self.shared else self.targets:
      if (other := names.setdefault(_own_name(path), path)) != path:
        raise ValueError(f"targets: got {other!r} and {path!r}, expected names that stay apart where '/' becomes '_'")
    super().__post_init__()

  @nn.compact
  def __call__(self, factors: Mapping[str, Factors], *, train: bool = False) -> dict[str, Factors]:
    """Edits for `factors.apply` and `factors.merge`.

    Args:
      factors: path -> inputs [..., T, m] and deltas [..., T, n], for each of `targets`.
      train: put the tokens into the statistics first; needs `mutable=["statistics"]`.

    Returns:
      Path -> factors of the change of the kernel, of the same shapes, in `dtype`; step size and sign are in the deltas.

    Raises:
      ValueError: on other layers than `targets`, or factors that are not two arrays with as many tokens.
    """
    if set(factors) != set(self.targets):
      raise ValueError(f"factors: got {sorted(factors)}, expected those of {sorted(self.targets)}")
    for path, (inputs, deltas) in factors.items():
      if inputs.ndim < 2 or inputs.shape[:-1] != deltas.shape[:-1]:
        raise ValueError(
          f"factors: got {inputs.shape} and {deltas.shape} for {path}, expected [..., T, m], [..., T, n]"
        )
    steps = self.param("step_sizes", nn.initializers.constant(self.step_size), (len(self.targets),), self.param_dtype)
    layers = sharing({path: _shape(factors[path]) for path in self.targets}, self.shared)
    transforms = {
      name: GradientTransform(
        self.rank, self.num_layers, len(paths) if self.shared else None, self.variant, self.normalize, self.start,
        self.axis_name, self.dtype, self.param_dtype, name=name,
      )
      for name, paths in layers.items()
    }  # fmt: skip
    edits = {}
    # In the order of the targets, so that the second layer of a shape meets statistics that know the first.
    for name, paths in layers.items():
      for mode, path in enumerate(paths):
        x, d = transforms[name](factors[path], mode, train=train)
        alpha = self.sign * steps[self.targets.index(path)]
        edits[path] = Factors(x, (alpha * d).astype(self.dtype))
    return edits


def sharing(shapes: Mapping[str, tuple[int, int]], shared: bool = True) -> dict[str, list[str]]:
  """Name of each transform -> paths of its layers, in order: by shape (m, n) of their kernels, or one each."""
  layers: dict[str, list[str]] = {}
  for path, (m, n) in shapes.items():
    layers.setdefault(f"transform_{m}x{n}" if shared else _own_name(path), []).append(path)
  return layers


def _own_name(path: str) -> str:
  return path.replace("/", "_")


def from_torch(
  state_dict: Mapping[str, Any], editor: Editor, shapes: Mapping[str, tuple[int, int]], names: Sequence[str] = ()
) -> dict[str, Any]:
  """Host. Variables of an editor from the official checkpoint's editor part.

  Args:
    state_dict: official names -> arrays: `mend.(768, 3072).mlp.layers.0.u` and so on, and `edit_lrs`. Buffers that the
      others determine (`u_std`, `v_std`) are ignored.
    editor: of the same variant; `sign=1` for the official update.
    shapes: path of each of the editor's targets -> (m, n) of its kernel.
    names: official names of the targets' weights, for an editor that does not share; else not needed.

  Returns:
    `params` and `statistics`.

  Raises:
    ValueError: on shapes of other layers than the targets, missing names, or arrays missing, left over or misshaped.
  """
  if set(shapes) != set(editor.targets):
    raise ValueError(f"shapes: got those of {sorted(shapes)}, expected those of {sorted(editor.targets)}")
  if not editor.shared and len(names) != len(editor.targets):
    raise ValueError(f"names: got {len(names)}, expected one for each of the {len(editor.targets)} targets")
  official = {path: name.replace(".", "#") for path, name in zip(editor.targets, names, strict=False)}
  table = {"params/step_sizes": interop.raw("edit_lrs")}
  for name, paths in sharing({path: shapes[path] for path in editor.targets}, editor.shared).items():
    m, n = shapes[paths[0]]
    key = f"mend.{(m, n)}" if editor.shared else f"mend.{official[paths[0]]}"
    networks = {
      "combined": {"combined": "mlp"},
      "separate": {"inputs": "mlp1", "deltas": "mlp2"},
      "inputs": {"inputs": "mlp1"},
      "deltas": {"deltas": "mlp2"},
      "smaller": {"inputs": "mlp1"} if m <= n else {"deltas": "mlp2"},
    }[editor.variant]
    for mine, theirs in networks.items():
      for i in range(editor.num_layers):
        ours, source = f"params/{name}/{mine}{i}", f"{key}.{theirs}.layers.{i}"
        table[f"{ours}/up"] = interop.raw(f"{source}.u", np.transpose, np.transpose)
        table[f"{ours}/down"] = interop.raw(f"{source}.v", np.transpose, np.transpose)
        table[f"{ours}/bias"] = interop.raw(f"{source}.bias")
        if editor.shared:
          table[f"{ours}/scale"] = interop.raw(f"{source}.mode_scale.weight")
          table[f"{ours}/shift"] = interop.raw(f"{source}.mode_shift.weight")
    for mine, theirs in (("inputs", "u"), ("deltas", "v")):
      # All NaN before the first token, zero here.
      table[f"statistics/{name}/{mine}_mean"] = interop.raw(f"{key}.{theirs}_mean", np.nan_to_num)
      table[f"statistics/{name}/{mine}_squares"] = interop.raw(f"{key}.{theirs}_s", np.nan_to_num)
    table[f"statistics/{name}/count"] = interop.raw(
      f"{key}.k", lambda k: np.nan_to_num(k).astype(np.int32).reshape(()), lambda k: np.float32(k).reshape(1)
    )
  return interop.variables(state_dict, table, ignore=["*.u_std", "*.v_std"])


def _shape(factors: Factors) -> tuple[int, int]:
  return factors.inputs.shape[-1], factors.deltas.shape[-1]


def _seen(
  values: Float[Array, "*b t m"],
  there: Bool[Array, "*b t"],
  count: Int[Array, ""],
  mean: Float[Array, " m"],
  squares: Float[Array, " m"],
  axis_name: str | None,
) -> tuple[Int[Array, ""], Float[Array, " m"], Float[Array, " m"]]:
  """Running count, mean and squared deviations with these tokens too: Chan, Golub and LeVeque, 1979."""
  values, weight = values.reshape(-1, values.shape[-1]), there.reshape(-1, 1)
  total = (lambda a: a) if axis_name is None else (lambda a: jax.lax.psum(a, axis_name))
  new = total(jnp.sum(weight, dtype=jnp.int32))
  new_mean = total(jnp.sum(jnp.where(weight, values, 0), axis=0)) / jnp.maximum(new, 1)
  new_squares = total(jnp.sum(jnp.where(weight, jnp.square(values - new_mean), 0), axis=0))
  both = jnp.maximum(count + new, 1)
  shift, share = new_mean - mean, new / both
  return count + new, mean + share * shift, squares + new_squares + jnp.square(shift) * count * share
