"""Golden outputs: what an official PyTorch model computed from weights and inputs that this rule makes.

A file `tests/golden/<slug>.npz` holds the model's tensor names and shapes and its outputs, but no weights and no code:
a tensor's values follow from its name and shape, here as they did there. `check` makes the weights again, converts
them, applies the JAX model and compares.
"""

import json
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """The weights under a torch name: a generator seeded by the CRC-32 of the name, a scale by kind and fan-in."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  kind = name.split(".")[-1]
  if kind == "num_batches_tracked":
    return np.zeros(shape, np.int64)
  if kind == "running_var":
    return rng.uniform(0.5, 1.5, shape).astype(np.float32)
  if kind == "running_mean":
    return (rng.standard_normal(shape) * 0.1).astype(np.float32)
  if len(shape) > 1:
    return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:], dtype=int))).astype(np.float32)
  offset = 1.0 if kind in ("weight", "gamma", "scale") else 0.0
  return (offset + rng.standard_normal(shape) * 0.1).astype(np.float32)


def state(manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The state dict. Buffers that are not learned (masks, index tables) are made too; a conversion must ignore them."""
  return {name: tensor(name, tuple(shape)) for name, shape in manifest["state"]}


def inputs(manifest: Mapping[str, Any], file: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Stored arrays as they are; where only a shape is stored, standard normal ones seeded by the input's name."""
  made = {}
  for name, shape in manifest["inputs"].items():
    made[name] = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
  return made | {name.removeprefix("in."): file[name] for name in file if name.startswith("in.")}


def check(
  slug: str,
  convert: Callable[[dict[str, np.ndarray]], Any],
  apply: Callable[[Any, dict[str, np.ndarray]], Any],
  *,
  atol: float,
  rtol: float = 0.0,
) -> float:
  """Asserts that the JAX model's outputs are the recorded ones.

  Args:
    slug: file in `tests/golden` without suffix, or a path to an npz.
    convert: state dict -> variables, the system's `from_torch`.
    apply: (variables, inputs by name) -> array, tuple or dict of arrays, in the layout that the file holds.
    atol: largest absolute difference allowed.
    rtol: added to it, times the recorded value.

  Returns:
    The largest absolute difference found.
  """
  path = pathlib.Path(slug) if str(slug).endswith(".npz") else GOLDEN / f"{slug}.npz"
  with np.load(path, allow_pickle=False) as stored:
    file = dict(stored)
  manifest = json.loads(str(file["manifest"]))
  got = apply(convert(state(manifest)), inputs(manifest, file))
  if isinstance(got, tuple | list):
    got = {f"out{i}": array for i, array in enumerate(got)}
  elif not isinstance(got, dict):
    got = {"out": got}
  expected = {name.removeprefix("out."): array for name, array in file.items() if name.startswith("out.")}
  assert sorted(got) == sorted(expected), f"outputs {sorted(got)}, recorded {sorted(expected)}"
  largest = 0.0
  for name, array in jax.device_get(got).items():
    array = np.asarray(array, np.float32)
    assert array.shape == expected[name].shape, f"{name}: {array.shape}, recorded {expected[name].shape}"
    np.testing.assert_allclose(array, expected[name], atol=atol, rtol=rtol, err_msg=name)
    largest = max(largest, float(np.max(np.abs(array - expected[name]), initial=0.0)))
  return largest
