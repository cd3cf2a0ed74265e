"""Puts what was measured beside what was published: `result.json` files into `RESULTS.md`.

    python -m experiments.report             # everything under runs/
    python -m experiments.report runs/dagnn other/results

A row is a claim about a system on some data. New results replace its row; rows of which no result is at hand stay as
they are, so that the table outlives the runs, and a row may be entered by hand with nothing measured yet.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterable
from typing import Annotated, Any

import rich
import tyro

RESULTS = pathlib.Path(__file__).parent.parent / "RESULTS.md"
COLUMNS = ("system", "claim", "published", "measured", "data", "seeds", "command")
_KEY = ("system", "claim", "data")
_PREAMBLE = """# Results

Mean and standard deviation over seeds, beside the published figure. Measured means run here, by the command in the row;
an empty cell was not run. Written by `python -m experiments.report`; every run's `result.json` also holds its settings,
versions, device and the value of each seed.
"""

Row = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Config:
  """Where results are and where the table is."""

  folders: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional] = (pathlib.Path("runs"),)
  """Folders with result.json files, at any depth, or such files."""
  table: pathlib.Path = RESULTS
  """The table to renew."""


def main(config: Config) -> None:
  """Renews the table."""
  rows = merge(read_table(config.table), map(to_row, collect(config.folders)))
  text = render(rows.values())
  temporary = config.table.with_name(f".{config.table.name}.tmp")
  temporary.write_text(text)
  temporary.replace(config.table)
  rich.print(f"{config.table}: {len(rows)} rows")


def collect(folders: Iterable[pathlib.Path]) -> list[dict[str, Any]]:
  """The results under the folders, oldest first.

  Raises:
    ValueError: a folder that does not exist, or a file that `train.write_result` did not write.
  """
  results = []
  for folder in folders:
    if not folder.exists():
      raise ValueError(f"folders: got {folder}, expected a folder with results; run an experiment first")
    for path in [folder] if folder.is_file() else sorted(folder.rglob("result.json")):
      try:
        result = json.loads(path.read_text())
      except ValueError as error:
        raise ValueError(f"folders: got {path}, which is not JSON ({error}), expected a result") from None
      needed = {"system", "claim", "dataset", "metrics", "published", "seed", "command", "finished"}
      if not isinstance(result, dict) or needed - result.keys():
        missing = sorted(needed - set(result)) if isinstance(result, dict) else sorted(needed)
        raise ValueError(f"folders: got {path} without {', '.join(missing)}, expected what train.write_result writes")
      results.append(result)
  return sorted(results, key=lambda result: result["finished"])


def to_row(result: dict[str, Any]) -> Row:
  """A row of the table; several metrics are lines of one cell."""
  metrics = {name: _number(m["mean"], m["std"]) for name, m in result["metrics"].items()}
  published = {}
  for name, p in result["published"].items():
    published[name] = _number(p.get("value"), p.get("std")) + (f" ({p['source']})" if p.get("source") else "")
  row = {
    "system": result["system"],
    "claim": result["claim"],
    "published": _lines(published),
    "measured": _lines(metrics),
    "data": result["dataset"],
    "seeds": _seeds(result["seed"]),
    "command": f"`{result['command']}`",
  }
  return {column: " ".join(text.split()).replace("|", "\\|") for column, text in row.items()}


def merge(known: dict[tuple[str, ...], Row], new: Iterable[Row]) -> dict[tuple[str, ...], Row]:
  """Known rows and new ones by key, in order of the key; the last of one key stays."""
  rows = known | {key(row): row for row in new}
  return {k: rows[k] for k in sorted(rows)}


def key(row: Row) -> tuple[str, ...]:
  """What makes a row the same claim."""
  return tuple(row[column] for column in _KEY)


def read_table(path: pathlib.Path) -> dict[tuple[str, ...], Row]:
  """The rows of a table that `render` wrote or a person edited.

  Raises:
    ValueError: a line of the table that has other columns.
  """
  rows: dict[tuple[str, ...], Row] = {}
  lines = path.read_text().splitlines() if path.exists() else []
  for number, line in enumerate(lines, start=1):
    if not line.startswith("|") or re.fullmatch(r"[|\s:-]+", line):
      continue
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    if len(cells) != len(COLUMNS):
      raise ValueError(f"table: got {len(cells)} cells in line {number} of {path}, expected {', '.join(COLUMNS)}")
    if tuple(cells) != COLUMNS:
      row = dict(zip(COLUMNS, cells, strict=True))
      rows[key(row)] = row
  return rows


def render(rows: Iterable[Row]) -> str:
  """The file's text."""
  lines = ["", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
  lines += ["| " + " | ".join(row[column] for column in COLUMNS) + " |" for row in rows]
  return _PREAMBLE + "\n".join(lines) + "\n"


def _number(value: float | None, deviation: float | None) -> str:
  """Four significant digits, and the deviation as finely; nothing for what is not a number."""
  if value is None:
    return ""
  exponent = math.floor(math.log10(abs(value))) if value else 0
  form = f".{max(0, 3 - exponent)}f" if -4 < exponent < 6 else ".3e"
  return f"{value:{form}}" + ("" if deviation is None else f" ± {deviation:{form}}")


def _lines(named: dict[str, str]) -> str:
  return "<br>".join(f"{name}: {text}" for name, text in named.items() if text)


def _seeds(seed: int | list[int]) -> str:
  if isinstance(seed, int):
    return str(seed)
  if len(seed) > 2 and list(seed) == list(range(seed[0], seed[-1] + 1)):
    return f"{seed[0]} to {seed[-1]}"
  return ", ".join(map(str, seed))


if __name__ == "__main__":
  main(tyro.cli(Config, description=__doc__))
