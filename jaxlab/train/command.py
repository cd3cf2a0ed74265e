"""The command line of an experiment whose options have other defaults by preset."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tyro

C = TypeVar("C")


def parser(
  presets: Mapping[str, C], description: str | None, adapted: Callable[[C, C], C] = lambda asked, defaults: defaults
) -> Callable[[Sequence[str] | None], C]:
  """What reads a command: the option `preset` decides where the defaults of all others come from.

  Args:
    presets: name -> a dataclass of options with their defaults, among them `preset` with the name.
    description: of the command, for `--help`.
    adapted: (what was asked for, the preset's defaults) -> the defaults, where these depend on other options too.

  Returns:
    Of the arguments, by default those of the process: the options.
  """
  config: Any = type(next(iter(presets.values())))

  def parse(args: Sequence[str] | None = None) -> C:
    asked = tyro.cli(config, args=args, description=description)
    return tyro.cli(config, args=args, default=adapted(asked, presets[asked.preset]), description=description)

  return parse
