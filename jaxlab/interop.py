"""PyTorch state dicts <-> flax variables, driven by a table that says which layer is which.

    WEIGHTS = {
      "params/stem": interop.conv("stem.0"),
      "params/stem_norm": interop.batch_norm("stem.1"),
      "params/classifier": interop.dense("head"),
      "params/position": interop.raw("pos_embed"),
    }
    variables = interop.variables(interop.load("official.pth"), WEIGHTS)
    weights = interop.state_dict(variables, WEIGHTS)          # and back, exactly

A key is the path of a flax module (or of one array, for `raw`), starting with its collection. A value is a rule: the
torch layer's name and how its arrays are laid out. Tables are plain dicts: build repeated blocks with a comprehension.
Everything here is host code on NumPy arrays. A conversion either succeeds in full or raises one `ValueError` that lists
all that is wrong.
"""

import fnmatch
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

Transform = Callable[[np.ndarray], np.ndarray]


class Leaf(NamedTuple):
  """One torch tensor and its place in flax.

  Attributes:
    source: the tensor's name in the state dict.
    name: its name below the module's path; empty if the path itself is the array.
    collection: flax collection, in place of the one that the path starts with.
    to_flax: layout change, torch to flax.
    to_torch: its inverse.
    axes: how many axes the torch tensor may have; empty for any.
  """

  source: str
  name: str
  collection: str | None = None
  to_flax: Transform = np.asarray
  to_torch: Transform = np.asarray
  axes: tuple[int, ...] = ()


Rule = tuple[Leaf, ...]
_TORCH = (".pth", ".pt", ".bin", ".model", ".tar", ".ckpt")  # .model is nnU-Net's, .tar the end of .pth.tar


def dense(prefix: str, bias: bool = True, spatial: int = 0) -> Rule:
  """`torch.nn.Linear` [O, I] -> `nn.Dense` kernel [I, O].

  Args:
    prefix: torch layer name.
    bias: whether the layer has one.
    spatial: number of spatial axes of size 1 after [O, I], for a 1x1 convolution that flax computes as `nn.Dense`.
  """
  kernel = Leaf(
    f"{prefix}.weight",
    "kernel",
    to_flax=lambda w: w.reshape(w.shape[:2]).T,
    to_torch=lambda k: k.T.reshape(*k.T.shape, *[1] * spatial),
    axes=(2 + spatial,),
  )
  return (kernel, *_bias(prefix, bias))


def conv(prefix: str, bias: bool = True) -> Rule:
  """`torch.nn.Conv1d/2d/3d` [O, I / groups, *window] -> `nn.Conv` kernel [*window, I / groups, O].

  Covers depthwise ([C, 1, k, k] -> [k, k, 1, C]) and grouped convolutions, in the layout of `jaxlab.nn.conv` too.
  """
  kernel = Leaf(
    f"{prefix}.weight",
    "kernel",
    to_flax=lambda w: np.moveaxis(w, (0, 1), (-1, -2)),
    to_torch=lambda k: np.moveaxis(k, (-1, -2), (0, 1)),
    axes=(3, 4, 5),
  )
  return (kernel, *_bias(prefix, bias))


def conv_transpose(prefix: str, bias: bool = True) -> Rule:
  """`torch.nn.ConvTranspose1d/2d/3d` [I, O, *window] -> `nn.ConvTranspose` kernel [*window, I, O], window reversed.

  For one group and flax's default `transpose_kernel=False`. Torch's `padding=p, output_padding=q` on a window of k is
  flax's `padding=[(k - 1 - p, k - 1 - p + q)]` per axis; `padding="VALID"` is torch's 0 when k >= stride.
  """

  def reverse(k: np.ndarray) -> np.ndarray:
    return np.flip(k, tuple(range(k.ndim - 2)))

  kernel = Leaf(
    f"{prefix}.weight",
    "kernel",
    to_flax=lambda w: reverse(np.moveaxis(w, (0, 1), (-2, -1))),
    to_torch=lambda k: np.moveaxis(reverse(k), (-2, -1), (0, 1)),
    axes=(3, 4, 5),
  )
  return (kernel, *_bias(prefix, bias))


def norm(prefix: str, bias: bool = True) -> Rule:
  """`LayerNorm`, `GroupNorm`, `RMSNorm` (no bias): weight -> scale."""
  return (Leaf(f"{prefix}.weight", "scale", axes=(1,)), *_bias(prefix, bias))


def batch_norm(prefix: str, affine: bool = True) -> Rule:
  """`BatchNorm1d/2d/3d` -> scale and bias in the key's collection, running mean and variance in `batch_stats`.

  `num_batches_tracked` is ignored; torch fills it in when it loads a state dict without it. Mind that flax's momentum
  is one minus torch's.
  """
  statistics = (
    Leaf(f"{prefix}.running_mean", "mean", "batch_stats", axes=(1,)),
    Leaf(f"{prefix}.running_var", "var", "batch_stats", axes=(1,)),
  )
  return (*(norm(prefix) if affine else ()), *statistics)


def embed(prefix: str) -> Rule:
  """`torch.nn.Embedding` [V, D] -> `nn.Embed` embedding [V, D]."""
  return (Leaf(f"{prefix}.weight", "embedding", axes=(2,)),)


def raw(name: str, to_flax: Transform = np.asarray, to_torch: Transform = np.asarray) -> Rule:
  """One array under its full name; the table's key is the path of the array, not of a module.

  Args:
    name: tensor in the state dict.
    to_flax: layout change, default none.
    to_torch: its inverse.
  """
  return (Leaf(name, "", to_flax=to_flax, to_torch=to_torch),)


def _bias(prefix: str, bias: bool) -> Rule:
  return (Leaf(f"{prefix}.bias", "bias", axes=(1,)),) if bias else ()


def variables(
  state_dict: Mapping[str, Any], rules: Mapping[str, Rule], *, ignore: Sequence[str] = (), like: Any = None
) -> dict[str, Any]:
  """Flax variables from a torch state dict.

  Args:
    state_dict: name -> NumPy array or torch tensor, e.g. from `load` or `module.state_dict()`.
    rules: flax path -> rule, see the module's docstring. Two paths may read the same tensor (tied weights).
    ignore: shell-style patterns of names without a counterpart, e.g. `"*.relative_position_index"`.
    like: variables, or the shapes that `jax.eval_shape(model.init, ...)` gives; when present every array is checked.

  Returns:
    Nested dicts of NumPy arrays, dtypes as given.

  Raises:
    ValueError: one message listing every missing, unused and misshaped tensor.
  """
  wrong, made, used = [], {}, set()
  for path, leaf in _targets(rules):
    if leaf.source not in state_dict:
      wrong.append(f"missing: {leaf.source!r}, for {path}")
      continue
    used.add(leaf.source)
    array = _numpy(state_dict[leaf.source])
    if leaf.axes and array.ndim not in leaf.axes:
      expected = " or ".join(map(str, leaf.axes))
      wrong.append(f"misshaped: {leaf.source!r} is {list(array.shape)}, expected {expected} axes, for {path}")
      continue
    try:
      made[path] = np.array(leaf.to_flax(array), order="C")
    except ValueError as error:
      wrong.append(f"misshaped: {leaf.source!r} is {list(array.shape)}: {error}, for {path}")
  for name in state_dict:
    skipped = name.endswith("num_batches_tracked") or any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)
    if name not in used and not skipped:
      wrong.append(f"unused: {name!r} {list(np.shape(state_dict[name]))}")
  if like is not None:
    broken = {path for path, leaf in _targets(rules)} - made.keys()  # reported above
    wrong += _differences(made, _flat(like), broken)
  if wrong:
    raise ValueError(_report("state_dict", wrong))
  return _nest(made)


def joined(state_dict: Mapping[str, Any], groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
  """A state dict in which tensors that are one array in flax are one, along their first axis.

  Args:
    state_dict: names -> tensors or arrays.
    groups: name of the whole -> names of its parts. A group of which a part is missing is left out, so that `variables`
      reports it.
  """
  out = dict(state_dict)
  for whole, names in groups.items():
    parts = [out.pop(name, None) for name in names]
    if all(part is not None for part in parts):
      out[whole] = np.concatenate([_numpy(part) for part in parts])
  return out


def state_dict(variables: Mapping[str, Any], rules: Mapping[str, Rule]) -> dict[str, np.ndarray]:
  """The inverse of `variables`.

  Args:
    variables: nested dicts of arrays.
    rules: the table that `variables` takes.

  Returns:
    Torch name -> NumPy array, without `num_batches_tracked`.

  Raises:
    ValueError: one message listing every missing, unused and misshaped array, and tied weights that differ.
  """
  wrong: list[str] = []
  made: dict[str, np.ndarray] = {}
  flat = _flat(variables)
  for path, leaf in _targets(rules):
    if path not in flat:
      wrong.append(f"missing: {path}, for {leaf.source!r}")
      continue
    array = np.asarray(flat.pop(path))
    try:
      tensor = np.array(leaf.to_torch(array), order="C")
    except ValueError as error:
      wrong.append(f"misshaped: {path} is {list(array.shape)}: {error}, for {leaf.source!r}")
      continue
    if leaf.axes and tensor.ndim not in leaf.axes:
      wrong.append(f"misshaped: {path} is {list(array.shape)}, expected another number of axes, for {leaf.source!r}")
    elif leaf.source in made and not np.array_equal(made[leaf.source], tensor):
      wrong.append(f"differs: {path} and another path share {leaf.source!r} but not their values")
    made[leaf.source] = tensor
  wrong += [f"unused: {path} {list(np.shape(array))}" for path, array in flat.items()]
  if wrong:
    raise ValueError(_report("variables", wrong))
  return made


def load(path: str | os.PathLike[str], key: str | None = None) -> dict[str, np.ndarray]:
  """A state dict from a file.

  Args:
    path: `.safetensors`, `.npz` (without pickles), or what `torch.save` wrote as `.pth`, `.pt`, `.bin`, `.model`,
      `.ckpt` or `.pth.tar` (needs PyTorch; loaded with `weights_only=True`, so that a file cannot run code).
    key: entry of a training checkpoint that holds the state dict, e.g. "model" or "state_dict". Torch files only.

  Returns:
    Name -> NumPy array; bfloat16 becomes `ml_dtypes.bfloat16`.

  Raises:
    ValueError: unknown suffix, missing or damaged file, a file that is not a flat table of tensors.
    ImportError: a torch file without PyTorch.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"path: got {str(path)!r}, expected an existing file")
  if key is not None and path.suffix in (".safetensors", ".npz"):
    raise ValueError(f"key: got {key!r}, expected None for {path.suffix} files, which hold one flat table")
  if path.suffix == ".safetensors":
    import safetensors.numpy

    try:
      return safetensors.numpy.load_file(path)
    except Exception as error:
      raise ValueError(f"path: got {str(path)!r}, which does not read as safetensors ({error})") from error
  if path.suffix == ".npz":
    try:
      with np.load(path, allow_pickle=False) as file:
        # NumPy writes bfloat16 as two bytes of no type.
        return {name: a.view(ml_dtypes.bfloat16) if a.dtype == "V2" else a for name, a in file.items()}
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
      raise ValueError(f"path: got {str(path)!r}, which does not read as an npz of plain arrays ({error})") from error
  if path.suffix not in _TORCH:
    raise ValueError(f"path: got {str(path)!r}, expected the suffix .safetensors, .npz or one of {', '.join(_TORCH)}")
  try:
    import torch  # type: ignore[import-not-found, unused-ignore]
  except ImportError as error:
    raise ImportError(
      f"path: got {str(path)!r}, which needs PyTorch to read (`pip install torch`), or convert it to .safetensors"
    ) from error
  try:
    content = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError ... depending on the damage
    raise ValueError(f"path: got {str(path)!r}, which does not load with weights_only=True ({error})") from error
  if key is not None:
    if not isinstance(content, Mapping) or key not in content:
      raise ValueError(f"key: got {key!r}, expected one of {_names(content)}")
    content = content[key]
  if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
    raise ValueError(f"key: got {key!r}, expected the entry that holds the state dict, one of {_names(content)}")
  return {name: _numpy(value) for name, value in content.items()}


def _names(content: Any) -> list[str]:
  return sorted(map(str, content))[:20] if isinstance(content, Mapping) else [type(content).__name__]


def _numpy(value: Any) -> np.ndarray:
  """A torch tensor, JAX or NumPy array as NumPy; torch is not imported for it."""
  if not hasattr(value, "detach"):
    return np.asarray(value)
  tensor = value.detach().cpu().contiguous()
  if str(tensor.dtype) == "torch.bfloat16":  # NumPy has no such type of its own: reinterpret the bits
    import torch

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


def _targets(rules: Mapping[str, Rule]) -> list[tuple[str, Leaf]]:
  """Every leaf with its full flax path."""
  out = []
  for key, rule in rules.items():
    collection, _, module = key.partition("/")
    if not module:
      raise ValueError(f"rules: got key {key!r}, expected '<collection>/<path>' such as 'params/{key}'")
    for leaf in rule:
      parts = [leaf.collection or collection, module, *([leaf.name] if leaf.name else [])]
      out.append(("/".join(parts), leaf))
  paths = [path for path, _ in out]
  twice = sorted({path for path in paths if paths.count(path) > 1})
  if twice:
    raise ValueError(f"rules: got two rules for {twice}, expected one rule an array")
  inside = sorted(path for path in paths if any(path.startswith(f"{other}/") for other in paths))
  if inside:
    raise ValueError(f"rules: got rules for {inside} and for an array above, expected modules and arrays to be apart")
  return out


def _flat(tree: Any) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _nest(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, array in flat.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = array
  return tree


def _differences(made: Mapping[str, np.ndarray], like: Mapping[str, Any], broken: set[str]) -> list[str]:
  wrong = [f"missing: no rule makes {path} {list(x.shape)}" for path, x in like.items() if path not in {*made, *broken}]
  for path, array in made.items():
    if path not in like:
      wrong.append(f"unused: {path} {list(array.shape)} is no variable of the model")
    elif tuple(array.shape) != tuple(like[path].shape):
      wrong.append(f"misshaped: {path} would be {list(array.shape)}, expected {list(like[path].shape)}")
  return wrong


def _report(argument: str, wrong: list[str]) -> str:
  return f"{argument}: got {len(wrong)} mismatches, expected every array to have its counterpart:\n  " + "\n  ".join(
    wrong
  )
