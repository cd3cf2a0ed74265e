"""Checkpoints that survive a kill at any moment and a damaged disk.

Orbax writes a checkpoint in the background into a temporary folder and renames it when complete, so a kill leaves
either all of it or nothing. It does not notice a flipped byte in an array, so each checkpoint also holds the digest of
every file and the shape of every array, written before that rename; restoring verifies them first.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grain
import grain.checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from jaxlab import checks

_MANIFEST = "manifest.json"
# Orbax stamps the time of the commit into this file after the manifest is written.
_UNSIGNED = frozenset({_MANIFEST, "_CHECKPOINT_METADATA"})


class Checkpoints:
  """The checkpoints of one run: a state and the position of its data, per step.

  In a run of several processes every process makes the same calls and all see the same folder.
  """

  def __init__(self, folder: str | os.PathLike, *, keep: int = 3):
    """Opens or creates a folder of checkpoints.

    Args:
      folder: one run's own.
      keep: newest checkpoints kept. With 1 there is nothing to fall back on when it is damaged.
    """
    checks.count("keep", keep)
    self._folder = Path(folder).absolute()
    self._saving: tuple[int, dict[str, str]] | None = None
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      step_prefix=None,
      cleanup_tmp_directories=True,
      async_options=ocp.AsyncOptions(post_finalization_callback=self._sign),
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  def save(self, step: int, state: PyTree, iterator: Any = None) -> None:
    """Saves in the background; returns once the state may change.

    Args:
      step: number of updates done; not saved before.
      state: any pytree of arrays and numbers (typed keys too).
      iterator: the grain iterator that yields the batches, whose position is saved, or None.
    """
    self._manager.wait_until_finished()
    named = _named(state)
    self._saving = step, _structure(named)
    # Orbax refuses arrays of no elements; there is nothing in them to save.
    args = {"state": ocp.args.StandardSave({name: _plain(leaf) for name, leaf in named.items() if leaf.size})}
    if iterator is not None:
      args["batches"] = grain.checkpoint.CheckpointSave(iterator)
    self._manager.save(step, args=ocp.args.Composite(**args))

  def restore(self, template: PyTree, iterator: Any = None) -> tuple[int, PyTree] | None:
    """The newest checkpoint that is whole.

    A damaged one is moved to `damaged/` beside the folder, with a warning, and the one before is tried.

    Args:
      template: a state of the structure, shapes, dtypes and shardings to restore.
      iterator: a grain iterator to set to the saved position, or None.

    Returns:
      (step, state), or None if there is no usable checkpoint.

    Raises:
      ValueError: if a checkpoint is whole but holds a state of another structure, or (no) position of an iterator.
    """
    self._manager.wait_until_finished()
    named = _named(template)
    for step in sorted(self._manager.all_steps(), reverse=True):
      folder = self._folder / str(step)
      problem = _damage(folder)
      if problem is None:
        _same_structure(folder, _structure(named), iterator is not None)
        args = {"state": ocp.args.StandardRestore({name: _abstract(leaf) for name, leaf in named.items() if leaf.size})}
        if iterator is not None:
          args["batches"] = grain.checkpoint.CheckpointRestore(iterator)
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))["state"]
        leaves = [_typed(restored[name], leaf) if leaf.size else leaf for name, leaf in named.items()]
        return step, jax.tree.unflatten(jax.tree.structure(template), leaves)
      self._set_aside(folder, problem)
    return None

  def close(self) -> None:
    """Waits for the save in progress."""
    self._manager.close()

  def __enter__(self) -> Self:
    """Itself."""
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    """Closes."""
    self.close()

  def _sign(self) -> None:
    # Orbax calls this when all files are written, before it renames the temporary folder.
    assert self._saving is not None
    step, structure = self._saving
    if jax.process_index() == 0:
      (folder,) = self._folder.glob(f"{step}.orbax-checkpoint-tmp*")
      body = json.dumps({"structure": structure, "files": _digests(folder)}, indent=1)
      text = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest()}) + "\n" + body
      (folder / _MANIFEST).write_text(text)

  def _set_aside(self, folder: Path, problem: str) -> None:
    aside = self._folder.parent / "damaged" / folder.name
    warnings.warn(f"checkpoint {folder} is damaged ({problem}); moved to {aside}, using the one before", stacklevel=4)
    _barrier("jaxlab_damaged_seen")  # nobody moves what another process still reads
    if jax.process_index() == 0:
      shutil.rmtree(aside, ignore_errors=True)
      aside.parent.mkdir(exist_ok=True)
      folder.rename(aside)
    _barrier("jaxlab_damaged_moved")
    self._manager.reload()


def save_variables(path: str | os.PathLike, variables: Mapping[str, Any]) -> None:
  """Writes flax variables (nested dicts of arrays or scalars) to a folder, replacing what is there.

  What is there is moved aside only when all is written, so that a failure or a kill loses nothing.

  Args:
    path: the folder.
    variables: such as `state.variables` of a `supervised` learner.

  Raises:
    ValueError: an array without elements.
  """
  folder = Path(path).absolute()
  fresh, aside = folder.with_name(folder.name + ".new"), _aside(folder)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(fresh, jax.tree.map(_array, dict(variables)), force=True)
  if jax.process_index() == 0:
    if folder.exists():
      shutil.rmtree(aside, ignore_errors=True)
      folder.rename(aside)
    fresh.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)
  _barrier("jaxlab_variables_saved")


def _aside(folder: Path) -> Path:
  """Where the variables of before are for a moment."""
  return folder.with_name(folder.name + ".old")


def load_variables(path: str | os.PathLike) -> dict[str, Any]:
  """Reads what `save_variables` wrote, as nested dicts of NumPy arrays.

  Raises:
    ValueError: if the folder holds no variables.
  """
  folder = Path(path).absolute()
  if not folder.exists():  # or killed in that moment
    folder = _aside(folder)
  if not (folder / "_CHECKPOINT_METADATA").is_file():
    raise ValueError(f"path: got {path}, expected a folder written by save_variables")
  with ocp.PyTreeCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(folder).item_metadata.tree
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
    return checkpointer.restore(folder, restore_args=args)


def _named(tree: PyTree) -> dict[str, Any]:
  """Leaves by their path, such as `params/Dense_0/kernel`. Flat, so that any pytree is saved in the same way."""
  paths = jax.tree_util.tree_flatten_with_path(tree)[0]
  named = {jax.tree_util.keystr(path, simple=True, separator="/"): _array(leaf) for path, leaf in paths}
  if len(named) != len(paths):
    raise ValueError("state: got two leaves of one path, expected keys that differ as text")
  return named


def _array(leaf: Any) -> Any:
  return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)  # orbax refuses NumPy scalars


def _is_key(x: Any) -> bool:
  return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _typed(saved: Any, template: Any) -> Any:
  if _is_key(template):
    return jax.random.wrap_key_data(saved, impl=jax.random.key_impl(template))
  return saved


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  plain = _plain(leaf)
  return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=getattr(plain, "sharding", None))


def _structure(named: Mapping[str, Any]) -> dict[str, str]:
  return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named.items()}


def _digests(folder: Path) -> dict[str, str]:
  files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _UNSIGNED)
  return {path.relative_to(folder).as_posix(): _digest(path) for path in files}


def _digest(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(folder: Path) -> dict[str, Any]:
  head, body = (folder / _MANIFEST).read_text().split("\n", 1)
  if json.loads(head)["sha256"] != hashlib.sha256(body.encode()).hexdigest():
    raise ValueError(f"{_MANIFEST} changed since it was written")
  return json.loads(body)


def _damage(folder: Path) -> str | None:
  """What is wrong with the files of a checkpoint, or None."""
  try:
    expected = _manifest(folder)["files"]
  except (OSError, ValueError, KeyError, TypeError) as error:  # missing, truncated or changed
    return f"{_MANIFEST}: {error}"
  for name, digest in expected.items():
    path = folder / name
    if not path.is_file():
      return f"{name} is missing"
    if _digest(path) != digest:
      return f"{name} changed since it was written"
  return None


def _same_structure(folder: Path, wanted: dict[str, str], has_iterator: bool) -> None:
  saved = _manifest(folder)["structure"]
  absent = "absent"
  differences = [
    f"{name} is {saved.get(name, absent)} there and {wanted.get(name, absent)} here"
    for name in sorted(saved.keys() | wanted.keys())
    if saved.get(name) != wanted.get(name)
  ]
  if differences:
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    raise ValueError(
      f"workdir: got {folder}, a checkpoint of another model or optimizer ({'; '.join(differences[:3])}{more}), "
      "expected one of this run; use an empty folder or the settings it was made with"
    )
  if (folder / "batches").is_dir() != has_iterator:
    kinds = ("a function or a single batch", "a grain iterator")
    raise ValueError(f"batches: got {kinds[has_iterator]}, expected {kinds[not has_iterator]}, as in {folder}")


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
