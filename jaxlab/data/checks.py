"""Argument checks that loaders and host code share: each raises a `ValueError` with argument, value and expectation."""

import operator
import os
from collections.abc import Sequence
from typing import Any


def count(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
  """`value` as an int in [minimum, maximum]."""
  expected = f"an integer of at least {minimum}" + ("" if maximum is None else f" and at most {maximum}")
  try:
    number = operator.index(value)
  except TypeError:
    raise ValueError(f"{name}: got {value!r}, expected {expected}") from None
  if isinstance(value, bool) or number < minimum or (maximum is not None and number > maximum):
    raise ValueError(f"{name}: got {value!r}, expected {expected}")
  return number


def threads(value: Any) -> int:
  """How many threads to run on: as asked for, or for None one for each core that the process may use."""
  return len(os.sched_getaffinity(0)) if value is None else count("threads", value, 1)


def fraction(name: str, value: Any, low: float = 0.0, high: float = 1.0) -> float:
  """`value` as a float in [low, high]; NaN is refused."""
  try:
    number = float(value)
  except (TypeError, ValueError):
    number = float("nan")
  if not low <= number <= high:
    raise ValueError(f"{name}: got {value!r}, expected a number in [{low}, {high}]")
  return number


def choice(name: str, value: Any, options: Sequence[Any]) -> Any:
  """`value` if it is one of `options`."""
  if value not in options:
    raise ValueError(f"{name}: got {value!r}, expected one of {list(options)}")
  return value
