"""Training: learners, the loop that runs them, meshes, checkpoints, metrics, results and figures."""

import importlib
from typing import Any

from jaxlab.train.checkpoint import Checkpoints, load_variables, save_variables
from jaxlab.train.learner import (
  Batch,
  Learner,
  Loss,
  Metrics,
  State,
  TrainState,
  cross_entropy,
  decay_mask,
  over_seeds,
  supervised,
)
from jaxlab.train.loop import fit
from jaxlab.train.metrics import read_metrics
from jaxlab.train.parallel import data_parallel, distributed, mesh, pmap_step, replicate, shard_batch, split_batch
from jaxlab.train.result import report, write_result

__all__ = [
  "Batch",
  "Checkpoints",
  "Learner",
  "Loss",
  "Metrics",
  "State",
  "TrainState",
  "cross_entropy",
  "data_parallel",
  "decay_mask",
  "distributed",
  "figures",
  "fit",
  "load_variables",
  "mesh",
  "over_seeds",
  "pmap_step",
  "read_metrics",
  "replicate",
  "report",
  "save_variables",
  "shard_batch",
  "split_batch",
  "supervised",
  "write_result",
]


def __getattr__(name: str) -> Any:
  if name == "figures":  # matplotlib loads only when a figure is drawn
    return importlib.import_module("jaxlab.train.figures")
  raise AttributeError(f"module 'jaxlab.train' has no attribute {name!r}")
