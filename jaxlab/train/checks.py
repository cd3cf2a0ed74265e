"""Checks of arguments that the modules of `jaxlab.train` share."""

import math
import operator
from typing import Any

import numpy as np


def count(name: str, value: Any, low: int = 1) -> int:
  """A whole number of at least `low`; True and 2.0 are not whole numbers."""
  try:
    number = None if isinstance(value, bool | np.bool_) else operator.index(value)
  except TypeError:
    number = None
  if number is None or number < low:
    raise ValueError(f"{name}: got {value!r}, expected a whole number of at least {low}")
  return number


def fraction(name: str, value: float) -> None:
  """A number in [0, 1)."""
  if isinstance(value, bool) or not math.isfinite(value) or not 0 <= value < 1:
    raise ValueError(f"{name}: got {value!r}, expected a number in [0, 1)")


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
