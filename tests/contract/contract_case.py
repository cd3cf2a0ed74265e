"""What a system hands to the contract: a tiny instance of itself. One file per system in `cases/`, each with `CASE`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
  """A pure function and the inputs to try it on.

  Attributes:
    function: (params, inputs) -> outputs, any pytree of arrays; for networks `model.apply` in evaluation.
    params: pytree of arrays; every one must receive a gradient. () if the system has none.
    inputs: seed -> pytree of arrays, of the same shapes for each seed.
    narrow: as `function`, computing in bfloat16; None where the result is not a floating-point function of the input.
    narrow_tolerance: largest difference to `function`, relative to the largest output.
    pad: inputs -> inputs with padding nodes and edges, for graph systems.
    unpad: outputs of padded inputs -> outputs of the real part.
    relabel: (inputs, order) -> inputs whose node i is node order[i] of the given ones, for graph systems.
    num_nodes: of the inputs, for graph systems.
    reorder: (outputs, order) -> what relabelled inputs must give; default indexes the leading axis.
    bad: name -> (call, argument): the call must raise ValueError "<argument>: got ...".
    tolerance: absolute, between two ways to compute the same thing.
  """

  function: Callable[[Any, Any], Any]
  params: Any
  inputs: Callable[[int], Any]
  bad: dict[str, tuple[Callable[[], Any], str]]
  narrow: Callable[[Any, Any], Any] | None = None
  narrow_tolerance: float = 0.05
  pad: Callable[[Any], Any] | None = None
  unpad: Callable[[Any], Any] | None = None
  relabel: Callable[[Any, Any], Any] | None = None
  num_nodes: int = 0
  reorder: Callable[[Any, Any], Any] = lambda outputs, order: outputs[order]
  tolerance: float = 2e-5


def drawn(init: Callable, *inputs: Any, seed: int = 0) -> Any:
  """Variables of the shapes that `init` makes; to compile it would take longer than most of the contract.

  Matrices and filters are normal with a deviation of fan-in^(-1/2), scales and variances uniform in [0.5, 1.5], and all
  else normal with a deviation of 0.3, so that nothing is 0.
  """
  rng = np.random.default_rng(seed)

  def draw(path: Any, leaf: Any) -> np.ndarray:
    if path[-1].key in ("scale", "var"):
      return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
    deviation = np.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 0.3
    return (deviation * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, jax.random.key(0), *inputs))
