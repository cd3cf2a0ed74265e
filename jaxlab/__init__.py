"""jaxlab: published systems reimplemented in JAX under one set of conventions. `python -m jaxlab` lists them."""

import importlib
from typing import Any

__version__ = "0.1.0"

_SUBPACKAGES = (
  "analysis",
  "catalog",
  "data",
  "decentral",
  "graph",
  "interop",
  "kernels",
  "learning",
  "memory",
  "models",
  "nn",
  "train",
)
__all__ = [*_SUBPACKAGES]


def __getattr__(name: str) -> Any:
  # Subpackages load on first use, so that `import jaxlab` costs nothing beyond the interpreter's own start.
  if name in _SUBPACKAGES:
    return importlib.import_module(f"jaxlab.{name}")
  raise AttributeError(f"module 'jaxlab' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *_SUBPACKAGES])
