"""The ways in which bfloat16 numbers are multiplied on the host, which differ with the processor."""

import pytest

from jaxlab.nn import _tiles


@pytest.fixture(params=["float32", "widened", "pairs"])
def dtype(request, monkeypatch):
  """Float32, and bfloat16 in different ways; "matrices" is another of them."""
  if request.param == "pairs" and not _tiles._has("avx512bf16"):
    pytest.skip("the processor has no instruction for pairs of bfloat16 numbers")
  monkeypatch.setattr(_tiles, "has_pairs", lambda: request.param == "pairs")
  monkeypatch.setattr(_tiles, "has_matrices", lambda: request.param == "matrices")
  return "float32" if request.param == "float32" else "bfloat16"
