"""`fit`: run any learner for a number of steps, so that a kill at any moment costs time but changes nothing."""

import contextlib
import functools
import json
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Key, PyTree

from jaxlab import checks, memory
from jaxlab.data import reading
from jaxlab.train import parallel
from jaxlab.train.checkpoint import Checkpoints
from jaxlab.train.learner import Batch, Learner, Metrics, State
from jaxlab.train.metrics import Logs
from jaxlab.train.result import settings

_WATCHED = ("loss", "grad_norm")
# Steps in flight before the oldest must be checked. The device always has work queued, and no more batches than this
# are held in case one has to be saved.
_LAG = 8
_DATASETS = (grain.MapDataset, grain.IterDataset, grain.DataLoader)
_ITERATORS = (grain.DatasetIterator, grain.DataLoaderIterator)


def fit(
  learner: Learner,
  batches: Any,
  *,
  steps: int,
  workdir: str | os.PathLike,
  key: Key[Array, "..."],
  evaluate_on: Any = None,
  evaluate_every: int | None = None,
  log_every: int | None = None,
  save_every: int | None = None,
  keep: int = 3,
  config: Any = None,
  mesh: jax.sharding.Mesh | None = None,
  fsdp: bool = False,
  progress: bool = True,
  tensorboard: bool = True,
) -> State:
  """Trains from scratch, or from the newest whole checkpoint in `workdir`.

  A run that was killed at any step and started again ends with bit-identical parameters to one that never stopped, on
  the same machine. A finished run returns at once. SIGTERM saves a checkpoint, then exits with code 143 (128 + 15,
  what a shell reports for a terminated program); the caller's handler is back in place afterwards. The process keeps
  the memory of its peak, see `jaxlab.memory`.

  Args:
    learner: its functions are jitted here unless they already are; `step` gives its state's memory to the next state.
    batches: where the batch of each step comes from:
      a grain dataset, DataLoader or iterator of them, whose position is saved;
      a function from the step (0, 1, ...) to its batch;
      else one batch that every step uses, such as a graph (put on the device once).
    steps: updates in the whole run, including those before a restart.
    workdir: folder of this run: `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `config.json`.
    key: of `learner.init`.
    evaluate_on: what `learner.evaluate` sees: one batch, or a list or grain dataset of them, over which metrics are
      averaged weighted by the first axis of the first array. Reported as `eval_<metric>`. None for no evaluation.
    evaluate_every: steps between evaluations; None for only after the last.
    log_every: steps between lines of `metrics.jsonl` (values of that step, not averages); None for a hundred lines.
    save_every: steps between checkpoints; None for ten. The last step is always saved.
    keep: newest checkpoints kept.
    config: dataclass or mapping of the settings of the run. A workdir with another config is refused.
    mesh: devices to share each batch over (`train.mesh()`); each process then gives its own part of the batch.
    fsdp: share the large arrays of the state over the mesh too.
    progress: a bar with rate and time left, or a line every few seconds if the output is not a terminal.
    tensorboard: also write metrics for TensorBoard.

  Returns:
    The state after `steps` updates.

  Raises:
    ValueError: on a bad argument, or a workdir that belongs to a different run.
    FloatingPointError: when `loss` or `grad_norm` of a step is not finite, or the state holds NaN or its `params`
      infinities. The batch of that step is in `workdir` as `.npz` and the last good checkpoint stays; such a state is
      never saved.
  """
  checks.count("steps", steps)
  evaluate_every = checks.count("evaluate_every", steps if evaluate_every is None else evaluate_every)
  log_every = checks.count("log_every", max(1, steps // 100) if log_every is None else log_every)
  save_every = checks.count("save_every", max(1, steps // 10) if save_every is None else save_every)
  if fsdp and mesh is None:
    raise ValueError("fsdp: got True without a mesh, expected one, such as mesh=train.mesh()")
  folder = Path(workdir)
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"workdir: got {workdir}, a file, expected a folder")
  folder.mkdir(parents=True, exist_ok=True)
  memory.keep()
  _same_config(folder / "config.json", config)

  place: Callable[[Batch], Batch] = jax.device_put
  if mesh is not None:
    place = functools.partial(parallel.shard_batch, mesh)
    learner = parallel.data_parallel(learner, mesh, fsdp=fsdp)
  source = _Source(batches, place)
  if evaluate_on is not None and not _several(evaluate_on):
    evaluate_on = place(evaluate_on)  # once
  train_step, evaluate = _jitted(learner.step, donate_argnums=0), _jitted(learner.evaluate)
  state = _jitted(learner.init)(key, source.first())

  with Checkpoints(folder / "checkpoints", keep=keep) as checkpoints:
    start, state = checkpoints.restore(state, source.iterator) or (0, state)
    if start > steps:
      raise ValueError(f"steps: got {steps}, expected at least {start}, the step of the checkpoint in {workdir}")
    if start == steps:
      return state

    flying: deque[tuple[int, Batch, Metrics]] = deque()
    with Logs(folder, start, steps, progress=progress, tensorboard=tensorboard) as logs, _Sigterm() as sigterm:

      def land(*, everything: bool) -> None:
        # Checks the steps whose results are there (or all), oldest first, and logs them.
        while flying and (everything or len(flying) > _LAG or _ready(flying[0][2])):
          step, batch, metrics = flying.popleft()
          bad = [name for name in _WATCHED if name in metrics and not np.isfinite(np.asarray(metrics[name])).all()]
          if bad:
            _stop(folder, step, batch, ", ".join(f"{name} is {np.asarray(metrics[name])}" for name in bad))
          if step % log_every == 0 or step == steps:
            logs.record(step, metrics)

      for step in range(start + 1, steps + 1):
        batch = source.batch(step - 1)
        state, metrics = train_step(state, batch)
        flying.append((step, batch, metrics))
        stop = sigterm.received(step)
        evaluates = evaluate_on is not None and (step % evaluate_every == 0 or step == steps)
        saves = step % save_every == 0 or step == steps or stop
        land(everything=evaluates or saves)
        if evaluates:
          evaluation: Mapping[str, Any]
          if _several(evaluate_on):
            evaluation = _mean(evaluate, state, map(place, reading.opened(evaluate_on)))
          else:
            evaluation = evaluate(state, evaluate_on)
          logs.record(step, {f"eval_{name}": value for name, value in evaluation.items()})
        logs.advance(step)
        if saves:
          if _broken(state):
            _stop(folder, step, batch, "the state holds NaN or infinite parameters although the loss is finite")
          logs.flush()
          checkpoints.save(step, state, source.iterator)
        if stop:
          checkpoints.close()
          raise SystemExit(128 + signal.SIGTERM)
  return state


class _Source:
  """The batch of each step, and the iterator whose position must be saved, if any."""

  def __init__(self, batches: Any, place: Callable[[Batch], Batch]):
    self._place = place
    self._function: Callable[[int], Batch] | None = None
    self._constant: Batch = None
    self._first: Batch = None
    self.iterator: Any = None
    if isinstance(batches, _DATASETS):
      self.iterator = reading.opened(batches)
    elif isinstance(batches, _ITERATORS):
      self.iterator = batches
    elif callable(batches):
      self._function = batches
    elif isinstance(batches, Iterator):
      raise ValueError(
        f"batches: got a {type(batches).__name__}, whose position cannot be saved, expected a grain dataset or "
        "iterator, a function from the step to its batch, or one batch"
      )
    elif not jax.tree.leaves(batches):
      raise ValueError(f"batches: got {batches!r}, expected at least one array")
    else:
      self._constant = place(batches)

  def first(self) -> Batch:
    """A batch to initialise from; that of step 0 where the iterator has not moved."""
    self._first = self._next(0)
    return self._first

  def batch(self, step: int) -> Batch:
    first, self._first = self._first, None
    # A restored iterator has its own position, and the batch in hand is not of it.
    return first if step == 0 else self._next(step)

  def _next(self, step: int) -> Batch:
    if self._function is not None:
      return self._place(self._function(step))
    if self.iterator is None:
      return self._constant
    try:
      return self._place(next(self.iterator))
    except StopIteration:
      raise ValueError(f"batches: got a dataset that ends before step {step + 1}, expected .repeat()") from None


class _Sigterm:
  """Whether SIGTERM has come. Over several processes all hear of it at the same step, through `jax.distributed`."""

  def __init__(self) -> None:
    self._received = False
    self._before: Any = None
    # Only the main thread may set a handler; with jax.distributed, its preemption service holds the signal.
    self._handles = threading.current_thread() is threading.main_thread() and jax.process_count() == 1

  def __enter__(self) -> "_Sigterm":
    if self._handles:
      self._before = signal.signal(signal.SIGTERM, self._receive)
    return self

  def __exit__(self, *error: object) -> None:
    if self._handles:
      signal.signal(signal.SIGTERM, self._before)

  def _receive(self, number: int, frame: FrameType | None) -> None:
    self._received = True

  def received(self, step: int) -> bool:
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._received


def _jitted(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
  return function if hasattr(function, "lower") else jax.jit(function, **options)


def _ready(metrics: Metrics) -> bool:
  return all(leaf.is_ready() for leaf in jax.tree.leaves(dict(metrics)))


@jax.jit
def _broken(state: PyTree) -> Array:
  """NaN anywhere, or infinite parameters; elsewhere infinity may be meant, as of the best loss so far."""
  floating = lambda tree: [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
  found = [jnp.isnan(x).any() for x in floating(state)]
  found += [jnp.isinf(x).any() for x in floating(getattr(state, "params", ()))]
  return functools.reduce(jnp.logical_or, found, jnp.array(False))


def _stop(folder: Path, step: int, batch: Batch, why: str) -> NoReturn:
  """Saves the batch and raises."""
  suffix = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
  path = folder / f"nonfinite_step_{step}{suffix}.npz"
  leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
  arrays: dict[str, Any] = {jax.tree_util.keystr(p, simple=True, separator="."): _local(leaf) for p, leaf in leaves}
  np.savez(path, **arrays)
  raise FloatingPointError(f"step {step}: {why}; its batch is in {path}, the last good checkpoint is kept")


def _local(leaf: Any) -> np.ndarray:
  """The part of an array that this process holds; of keys, their words."""
  if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    return np.concatenate([np.asarray(shard.data) for shard in leaf.addressable_shards])
  return np.asarray(leaf)


def _several(batches: Any) -> bool:
  return isinstance(batches, (list, *_DATASETS))


def _mean(evaluate: Callable[[State, Batch], Metrics], state: State, batches: Iterable[Batch]) -> dict[str, np.ndarray]:
  """Metrics averaged over batches that may differ in size."""
  total: dict[str, np.ndarray] = {}
  count = 0
  for batch in batches:
    size = checks.leading("evaluate_on", jax.tree.leaves(batch)[0])
    part = {name: size * np.asarray(value, np.float64) for name, value in evaluate(state, batch).items()}
    total = {name: total[name] + value for name, value in part.items()} if count else part
    count += size
  if not count:
    raise ValueError("evaluate_on: got no examples, expected at least one batch")
  return {name: value / count for name, value in total.items()}


def _same_config(path: Path, config: Any) -> None:
  """Writes the config of a new run; refuses that of another."""
  if config is None:
    return
  wanted = settings(config)
  if path.exists():
    with contextlib.suppress(json.JSONDecodeError):  # a kill while it was written: write it again
      saved = json.loads(path.read_text())
      differences = [
        f"{name} was {saved.get(name)!r} and is {wanted.get(name)!r}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
      ]
      if differences:
        raise ValueError(
          f"workdir: got {path.parent}, the folder of a run with other settings ({'; '.join(differences)}), expected "
          "an empty one or the same settings"
        )
      return
  if jax.process_index() == 0:
    path.write_text(json.dumps(wanted, indent=2) + "\n")
