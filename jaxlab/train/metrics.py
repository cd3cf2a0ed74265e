"""Where metrics go: `metrics.jsonl`, TensorBoard and a progress bar."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import rich.console
import rich.progress

_SECONDS_BETWEEN_LINES = 5.0


class Logs:
  """Sinks of one run's metrics; only process 0 writes.

  A line of `metrics.jsonl` is `{"step": 20, "time": <Unix seconds>, "loss": 0.3, ...}`; a metric of several seeds is a
  list. There is one line a step, also after restarts.
  """

  def __init__(self, folder: Path, start: int, steps: int, *, progress: bool = True, tensorboard: bool = True):
    """Opens the sinks.

    Args:
      folder: the run's.
      start: step of the checkpoint that the run goes on from; later lines are dropped, as they will be written again.
      steps: of the whole run.
      progress: report on the terminal.
      tensorboard: write event files.
    """
    self._active = jax.process_index() == 0
    self._pending: tuple[int, dict[str, Any]] | None = None
    self._bar: rich.progress.Progress | None = None
    self._task = rich.progress.TaskID(0)
    self._lines = progress and self._active
    self._start, self._steps = start, steps
    self._began = self._printed = time.monotonic()
    self._text = ""
    if not self._active:
      return
    path = folder / "metrics.jsonl"
    _truncate(path, start)
    self._file = path.open("a")
    self._writer = None
    if tensorboard:
      import tensorboardX  # not at the top: half of its cost is for nothing when it is off

      self._writer = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
    console = rich.console.Console(stderr=True)
    if progress and console.is_terminal:
      self._lines = False
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("step"),
        rich.progress.MofNCompleteColumn(),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.fields[rate]}"),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[text]}"),
        console=console,
      )
      self._task = self._bar.add_task("", total=steps, completed=start, rate="", text="")

  def record(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Metrics of a step; those of one step may come in parts, one after the other."""
    if not self._active:
      return
    values = {name: np.asarray(value).tolist() for name, value in metrics.items()}
    if self._pending is not None and self._pending[0] == step:
      self._pending[1].update(values)
      return
    self._write()
    self._pending = step, values

  def advance(self, step: int) -> None:
    """Reports progress: `step` updates are done."""
    if not self._active:
      return
    now = time.monotonic()
    if step == self._start + 1:  # the first step compiles, so the rate counts from its end
      self._began = now
    rate = (step - self._start - 1) / max(now - self._began, 1e-9)
    if self._bar is not None:
      self._bar.update(self._task, completed=step, rate=f"{rate:.1f}/s", text=self._text)
    elif self._lines and (now - self._printed > _SECONDS_BETWEEN_LINES or step == self._steps):
      self._printed = now
      self._write()
      left = f", {(self._steps - step) / rate:.0f} s left" if rate else ""
      print(f"step {step}/{self._steps} ({rate:.1f}/s{left}) {self._text}", file=sys.stderr, flush=True)

  def flush(self) -> None:
    """All that was recorded is on disk afterwards, so that a checkpoint never outruns its metrics."""
    if self._active:
      self._write()
      os.fsync(self._file.fileno())
      if self._writer is not None:
        self._writer.flush()

  def __enter__(self) -> Self:
    """Starts the bar."""
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *error: object) -> None:
    """Writes what is left and closes."""
    if not self._active:
      return
    self._write()
    self._file.close()
    if self._writer is not None:
      self._writer.close()
    if self._bar is not None:
      self._bar.stop()

  def _write(self) -> None:
    if self._pending is None:
      return
    step, values = self._pending
    self._pending = None
    now = time.time()
    self._file.write(json.dumps({"step": step, "time": round(now, 3), **values}) + "\n")
    self._file.flush()
    means = {name: float(np.mean(value)) for name, value in values.items()}
    self._text = " ".join(f"{name} {value:.4g}" for name, value in means.items())
    if self._writer is not None:
      for name, value in means.items():
        self._writer.add_scalar(name, value, step, walltime=now)


def read_metrics(workdir: str | os.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Host. The metrics of a run, for curves.

  Returns:
    name -> (steps [T], values [T] or [T, seeds]), each metric at the steps where it was recorded.
  """
  path = Path(workdir) / "metrics.jsonl"
  if not path.is_file():
    raise ValueError(f"workdir: got {workdir}, expected a folder with metrics.jsonl")
  columns: dict[str, tuple[list[int], list[Any]]] = {}
  for line in _lines(path):
    for name, value in line.items():
      if name not in ("step", "time"):
        steps, values = columns.setdefault(name, ([], []))
        steps.append(line["step"])
        values.append(value)
  return {name: (np.array(steps), np.array(values)) for name, (steps, values) in columns.items()}


def _lines(path: Path) -> list[dict[str, Any]]:
  lines = []
  for text in path.read_text().splitlines():
    try:
      lines.append(json.loads(text))
    except json.JSONDecodeError:  # a kill in the middle of a write
      break
  return lines


def _truncate(path: Path, step: int) -> None:
  if path.exists():
    kept = [line for line in _lines(path) if line["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    temporary.replace(path)
