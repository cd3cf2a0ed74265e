"""Prints the catalog."""

from rich.console import Console
from rich.table import Table

from jaxlab import catalog


def main() -> None:
  """Prints one row per system."""
  table = Table(title=f"jaxlab: {len(catalog.SYSTEMS)} systems, {len(catalog.done())} done", title_justify="left")
  for column in ("system", "paper", "arXiv", "module", "status"):
    table.add_column(column, overflow="fold")
  for system in catalog.SYSTEMS:
    table.add_row(system.name, system.paper, system.arxiv, system.module, system.status)
  Console().print(table)


if __name__ == "__main__":
  main()
