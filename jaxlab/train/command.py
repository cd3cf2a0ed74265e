"""The command line of an experiment whose options have other defaults by preset."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tyro

C = TypeVar("C")


def parser(presets: Mapping[str, C], description: str | None) -> Callable[[Sequence[str] | None], C]:
  """What reads a command: the option `preset` decides where the defaults of all others come from.

  Args:
    presets: name -> a dataclass of options with their defaults, among them `preset` with the name.
    description: of the command, for `--help`.

  Returns:
    Of the arguments, by default those of the process: the options.
  """
  config: Any = type(next(iter(presets.values())))

  def parse(args: Sequence[str] | None = None) -> C:
    name = tyro.cli(config, args=args, description=description).preset
    return tyro.cli(config, args=args, default=presets[name], description=description)

  return parse
