"""Checks of host arguments: each raises a `ValueError` that names argument, value and expectation."""

import math
import operator
import os
from typing import Any, get_args

import numpy as np


def count(name: str, value: Any, low: int = 1, high: int | None = None) -> int:
  """`value` as an int in [low, high]; True and 2.0 are not whole numbers."""
  try:
    number = None if isinstance(value, bool | np.bool_) else operator.index(value)
  except TypeError:
    number = None
  if number is None or number < low or (high is not None and number > high):
    limit = "" if high is None else f" and at most {high}"
    raise ValueError(f"{name}: got {value!r}, expected a whole number of at least {low}{limit}")
  return number


def threads(value: Any) -> int:
  """How many threads to run on: as asked for, or for None one for each core that the process may use."""
  return len(os.sched_getaffinity(0)) if value is None else count("threads", value)


def real(name: str, value: Any, low: float = 0.0, high: float = 1.0) -> float:
  """`value` as a float in [low, high]; NaN is refused."""
  try:
    number = float(value)
  except (TypeError, ValueError):
    number = math.nan
  if not low <= number <= high:
    raise ValueError(f"{name}: got {value!r}, expected a number in [{low}, {high}]")
  return number


def rate(name: str, value: Any) -> None:
  """A number in [0, 1): of a dropout, a decay."""
  if isinstance(value, bool) or not 0 <= value < 1:
    raise ValueError(f"{name}: got {value!r}, expected a number in [0, 1)")


def choice(name: str, value: Any, options: Any) -> Any:
  """`value` if it is one of `options`, a sequence or a `Literal`."""
  allowed = list(get_args(options) or options)
  if value not in allowed:
    raise ValueError(f"{name}: got {value!r}, expected one of {allowed}")
  return value


def shaped_like(name: str, other: Any, **arrays: Any) -> None:
  """Arrays of the shape of another, which is called `name`."""
  for given, array in arrays.items():
    if array.shape != other.shape:
      raise ValueError(f"{given}: got shape {array.shape}, expected the {name}'s, {other.shape}")


def leading(name: str, array: Any) -> int:
  """Length of the first axis."""
  shape = np.shape(array)
  if not shape:
    raise ValueError(f"{name}: got a scalar, expected an array whose first axis is the example")
  return shape[0]


def text(name: str, value: Any) -> None:
  """Words, not blank."""
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f"{name}: got {value!r}, expected text")
