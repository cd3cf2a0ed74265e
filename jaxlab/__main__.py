"""`python -m jaxlab` prints the catalog; `python -m jaxlab README.md` renews the table between the file's markers."""

import pathlib
import re
import sys

from rich.console import Console
from rich.table import Table

from jaxlab import catalog

_MARKED = re.compile(r"(?<=<!-- catalog -->\n).*(?=<!-- /catalog -->)", re.DOTALL)


def main() -> None:
  """Prints one row per system, or writes the table into a file."""
  if sys.argv[1:]:
    path = pathlib.Path(sys.argv[1])
    path.write_text(updated(path.read_text()))
    return
  table = Table(title=f"jaxlab: {len(catalog.SYSTEMS)} systems, {len(catalog.done())} done", title_justify="left")
  for column in ("system", "module", "arXiv", "status"):
    table.add_column(column, no_wrap=True)
  table.add_column("paper", overflow="ellipsis", no_wrap=True)
  for system in catalog.SYSTEMS:
    table.add_row(system.name, system.module, system.arxiv, system.status, system.paper)
  # Piped into a file or grep, the table is as wide as its text.
  Console(width=None if sys.stdout.isatty() else 400).print(table)


def updated(text: str) -> str:
  """The text with the current catalog between its markers.

  Raises:
    ValueError: there are no markers.
  """
  if not _MARKED.search(text):
    raise ValueError("text: got no markers, expected <!-- catalog --> and <!-- /catalog --> on lines of their own")
  return _MARKED.sub(lambda _: "\n" + catalog.markdown() + "\n", text)


if __name__ == "__main__":
  main()
