"""`result.json`: one measured claim, with all that is needed to run it again."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich
import rich.table

from jaxlab import checks

_PACKAGES = ("jaxlab", "jax", "jaxlib", "flax", "optax", "numpy", "scipy")


def write_result(
  workdir: str | os.PathLike,
  *,
  system: str,
  claim: str,
  dataset: str,
  config: Any,
  metrics: Mapping[str, Any],
  published: Mapping[str, Any],
  seed: int | list[int],
  wall_time: float,
  command: str | None = None,
) -> Path:
  """Writes `workdir/result.json`, replacing an older one at once (a reader sees all of it or none).

  Args:
    workdir: folder of the run.
    system: slug in the catalog.
    claim: what the numbers bear out, in a sentence.
    dataset: which data, in words.
    config: dataclass or mapping of the settings.
    metrics: measured, name -> a number or one per seed. Written as {"mean", "std", "n", "values"}, where std is that of
      a sample (n - 1) and null for one value, and what is not finite is null.
    published: the paper's, under the same names: a number or {"value": ..., "std": ..., "source": "Table 2"}. May be
      empty.
    seed: of the run, or all of them.
    wall_time: seconds.
    command: that makes this file; None for the one this process was started with.

  Returns:
    The path of the file.
  """
  checks.text("system", system)
  checks.text("claim", claim)
  checks.text("dataset", dataset)
  if not metrics:
    raise ValueError("metrics: got none, expected at least one")
  if not (isinstance(wall_time, int | float) and wall_time >= 0):
    raise ValueError(f"wall_time: got {wall_time!r}, expected seconds")
  devices = jax.devices()
  result = {
    "system": system,
    "claim": claim,
    "dataset": dataset,
    "metrics": {name: _summary(name, value) for name, value in metrics.items()},
    "published": {name: _published(name, value) for name, value in published.items()},
    "seed": seed,
    "config": settings(config),
    "command": _command() if command is None else command,
    "wall_time": round(float(wall_time), 3),
    "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in _PACKAGES}},
    "device": {
      "platform": devices[0].platform,
      "kind": devices[0].device_kind,
      "count": len(devices),
      "processes": jax.process_count(),
      "cores": os.cpu_count(),
    },
  }
  path = Path(workdir) / "result.json"
  _replace(path, json.dumps(result, indent=2, allow_nan=False) + "\n")
  return path


def finished_result(workdir: str | os.PathLike, config: Any) -> dict[str, Any] | None:
  """What `write_result` left in `workdir`, if it was under the same settings; says so.

  Args:
    workdir: folder of the run.
    config: dataclass or mapping of the settings.

  Returns:
    The result, or None where there is none or settings differ.
  """
  path = Path(workdir) / "result.json"
  if not path.exists():
    return None
  result = json.loads(path.read_text())
  if result["config"] != settings(config):
    return None
  rich.print(f"Finished on {result['finished']}; delete {workdir} to run it again.")
  return result


def once(path: str | os.PathLike, make: Callable[[], Any], config: Any = None) -> Any:
  """What `make` returns, from its file if it was made before, so that a stopped run goes on where it was.

  Args:
    path: of the file, JSON; replaced at once.
    make: returns what JSON can hold, or arrays, which become lists.
    config: dataclass or mapping of settings that it depends on; it is made anew where they differ.
  """
  path, record = Path(path), None if config is None else settings(config)
  kept = json.loads(path.read_text()) if path.exists() else None
  if kept is None or kept["config"] != record:
    listed = lambda array: np.asarray(array).tolist()
    _replace(path, json.dumps({"config": record, "found": make()}, default=listed))
    kept = json.loads(path.read_text())
  return kept["found"]


def print_metrics(result: Mapping[str, Any]) -> None:
  """A table of a result's metrics: mean and standard deviation, four digits each, and what was published, if any."""
  published = result["published"]
  table = rich.table.Table("metric", "mean", "std. deviation", "runs", title=result["dataset"])
  if published:
    table.add_column("published")
  for name, metric in result["metrics"].items():
    numbers = metric["mean"], metric["std"], metric["n"], published.get(name, {}).get("value")
    table.add_row(name, *("" if number is None else f"{number:.4g}" for number in numbers[: len(table.columns) - 1]))
  rich.print(table)


def report(
  workdir: str | os.PathLike, *, show: Callable[[dict[str, Any]], None] = print_metrics, **fields: Any
) -> None:
  """The end of an experiment: writes the result, shows it and says where all is.

  Args:
    workdir: folder of the run.
    show: prints a result.
    **fields: the other arguments of `write_result`.
  """
  show(json.loads(write_result(workdir, **fields).read_text()))
  rich.print(f"Everything is in {workdir}.")


def settings(config: Any, *, without: Sequence[str] = (), **added: Any) -> dict[str, Any]:
  """Settings as JSON can hold them; what JSON does not know, infinity and NaN included, becomes text.

  Args:
    config: a dataclass or mapping.
    without: names to leave out, such as of what a run does not depend on.
    **added: more settings.

  Raises:
    ValueError: something else than a dataclass or mapping, a name to leave out that is not there.
  """
  if dataclasses.is_dataclass(config) and not isinstance(config, type):
    config = dataclasses.asdict(config)
  if not isinstance(config, Mapping):
    raise ValueError(f"config: got a {type(config).__name__}, expected a dataclass or a mapping")
  if unknown := set(without) - set(config):
    raise ValueError(f"without: got {sorted(unknown)}, expected some of {sorted(config)}")
  kept = {name: value for name, value in config.items() if name not in without}
  return json.loads(json.dumps(kept | added, default=str), parse_constant=str)


def _replace(path: Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix(".tmp")
  temporary.write_text(text)
  temporary.replace(path)


def _summary(name: str, value: Any) -> dict[str, Any]:
  values = np.asarray(value)
  if values.ndim > 1 or not values.size or values.dtype.kind not in "fiub":
    raise ValueError(
      f"metrics: got {name} of shape {values.shape} and dtype {values.dtype}, expected numbers, one per seed"
    )
  values = np.atleast_1d(values).astype(np.float64)
  std = float(np.std(values, ddof=1)) if values.size > 1 else None
  numbers = {"mean": float(np.mean(values)), "std": std, "n": values.size, "values": values.tolist()}
  return _without_nan(numbers)


def _published(name: str, value: Any) -> dict[str, Any]:
  fields = dict(value) if isinstance(value, Mapping) else {"value": value}
  number = fields.get("value")
  if isinstance(number, bool) or not isinstance(number, int | float | np.number):
    raise ValueError(f"published: got {name}={value!r}, expected a number or a mapping with one under 'value'")
  return {key: float(field) if isinstance(field, int | float | np.number) else field for key, field in fields.items()}


def _without_nan(x: Any) -> Any:
  if isinstance(x, dict):
    return {key: _without_nan(value) for key, value in x.items()}
  if isinstance(x, list):
    return [_without_nan(value) for value in x]
  return None if isinstance(x, float) and not np.isfinite(x) else x


def _command() -> str:
  # The script relative to where it was started, so that the line works in any checkout.
  script, *arguments = sys.argv
  module = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m module`
  if module is not None:
    return shlex.join(["python", "-m", module.name.removesuffix(".__main__"), *arguments])
  return shlex.join(["python", os.path.relpath(script), *arguments])
