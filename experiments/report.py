"""Puts measured results into RESULTS.md, a table with the published number beside each.

    python -m experiments.report runs [more folders]

Every `result.json` in the folders, however deep, is a row. A row replaces the one of the same system, data and command;
all other rows, and the text around the table, stay. What was not published or not measured is blank.
"""

import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import rich
import tyro

COLUMNS = ("system", "claim", "published", "measured", "data", "seeds", "command")
KEY = ("system", "data", "command")
PREAMBLE = """# Results

Written by `python -m experiments.report runs` from what experiments left behind: mean ± standard deviation over seeds,
beside the published number where there is one. A row is remade by its command; a blank is something nobody measured.
"""
HEADER = "| " + " | ".join(COLUMNS) + " |"
RULE = "|---" * len(COLUMNS) + "|"

Row = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Config:
  """What to merge into which table."""

  folders: tyro.conf.Positional[tuple[pathlib.Path, ...]] = (pathlib.Path("runs"),)
  """Searched for result.json files."""
  output: pathlib.Path = pathlib.Path("RESULTS.md")
  """The table."""


def find(folders: tuple[pathlib.Path, ...]) -> list[pathlib.Path]:
  """Every result.json below the folders, or that is given itself.

  Raises:
    ValueError: for a folder that does not exist, or if there are no results at all.
  """
  for folder in folders:
    if not folder.exists():
      raise ValueError(f"folders: got {folder}, expected an existing folder")
  paths = sorted({p for f in folders for p in ([f] if f.is_file() else f.rglob("result.json"))})
  if not paths:
    raise ValueError(f"folders: got no result.json in {', '.join(map(str, folders))}, expected at least one")
  return paths


def row(result: dict[str, Any]) -> Row:
  """The row of a result, as `train.write_result` writes it; several metrics stand below each other."""
  measured = [f"{name}: {number(m['mean'], m['std']) or 'not finite'}" for name, m in result["metrics"].items()]
  published = [f"{name}: {number(p['value'], p.get('std'))}" for name, p in result["published"].items()]
  return {
    "system": cell(result["system"]),
    "claim": cell(result["claim"]),
    "published": "<br>".join(map(cell, published)),
    "measured": "<br>".join(map(cell, measured)),
    "data": cell(result["dataset"]),
    "seeds": seeds(result["seed"]),
    "command": f"`{cell(result['command'])}`",
  }


def number(mean: float | None, std: float | None) -> str:
  """As many decimals as a scatter leaves meaningful: `84.31 ± 0.52`; nothing for nothing."""
  if mean is None:
    return ""
  return f"{mean:.4g}" if std is None else f"{mean:.4g} ± {std:.2g}"


def seeds(seed: int | list[int]) -> str:
  """`7`, `0 to 9` or `1, 5, 8`."""
  given = seed if isinstance(seed, list) else [seed]
  if len(given) > 2 and given == list(range(given[0], given[0] + len(given))):
    return f"{given[0]} to {given[-1]}"
  return ", ".join(map(str, given))


def cell(text: str) -> str:
  """Text that does not end a cell or a line of the table."""
  return " ".join(text.split()).replace("|", r"\|")


def parse(text: str) -> tuple[str, list[Row], str]:
  """What is before the table, its rows, what is after.

  Raises:
    ValueError: if there is no table, or a line of it has other columns.
  """
  lines = text.splitlines()
  if HEADER not in lines:
    raise ValueError(f"output: got a file without the line {HEADER!r}, expected a table of this script")
  start = lines.index(HEADER)
  stop = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
  rows = []
  for line in lines[start + 2 : stop]:
    cells = [c.strip() for c in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
    if len(cells) != len(COLUMNS):
      raise ValueError(f"output: got {len(cells)} cells in {line!r}, expected {len(COLUMNS)}")
    rows.append(dict(zip(COLUMNS, cells, strict=True)))
  return "\n".join(lines[:start]), rows, "\n".join(lines[stop:])


def merge(old: list[Row], new: list[Row]) -> list[Row]:
  """Both, sorted; of rows with one key the last wins."""
  rows = {tuple(r[c] for c in KEY): r for r in old + new}
  return [rows[key] for key in sorted(rows)]


def read(path: pathlib.Path) -> dict[str, Any]:
  """A result.

  Raises:
    ValueError: if the file is damaged or something else.
  """
  try:
    result = json.loads(path.read_text())
    row(result), result["finished"]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{path}: got {error!r}, expected a file of train.write_result") from error
  return result


def main(config: Config) -> None:
  """Merges and writes the table at once: a reader sees the old or the new one."""
  results = sorted(map(read, find(config.folders)), key=lambda result: result["finished"])
  before, old, after = parse(config.output.read_text()) if config.output.exists() else (PREAMBLE, [], "")
  rows = merge(old, [row(result) for result in results])
  table = "\n".join([HEADER, RULE, *("| " + " | ".join(r[c] for c in COLUMNS) + " |" for r in rows)])
  text = "\n".join(part for part in (before, table, after) if part) + "\n"
  config.output.parent.mkdir(parents=True, exist_ok=True)
  temporary = config.output.with_name(f".{config.output.name}.tmp")
  temporary.write_text(text)
  os.replace(temporary, config.output)
  rich.print(f"{len(results)} results; {config.output} has {len(rows)} rows.")


if __name__ == "__main__":
  main(tyro.cli(Config, description=__doc__))
