"""Datasets and generators. Loaders are host code and return documented NumPy arrays; nothing here knows a system.

Files come from a folder of yours or are downloaded once and checked. `JAXLAB_DATA` names the folder (each loader says
which subfolder it reads), `TFDS_DATA_DIR` the one of TensorFlow Datasets image sets.
"""

import importlib
from typing import Any

from jaxlab.data.node import NodeDataset, random_split, row_normalize_features, undirected

_LOADERS = (
  "aerial",
  "augment",
  "brain",
  "camvid",
  "digits",
  "facts",
  "heterophilous",
  "images",
  "mnist5k",
  "networks",
  "photographs",
  "planetoid",
  "point_clouds",
  "scenes",
  "synthetic",
  "temporal",
  "tu",
)
__all__ = ["NodeDataset", "random_split", "row_normalize_features", "undirected", *_LOADERS]


def __getattr__(name: str) -> Any:
  # On first use: some of them import large libraries.
  if name in _LOADERS:
    return importlib.import_module(f"jaxlab.data.{name}")
  raise AttributeError(f"module 'jaxlab.data' has no attribute {name!r}")
