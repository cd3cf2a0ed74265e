"""Graphs whose neighbours often differ in class, with ten fixed splits each.

Platonov et al., "A critical look at the evaluation of GNNs under heterophily", ICLR 2023, arXiv:2302.11640, who also
removed the duplicated nodes of chameleon and squirrel (the `_filtered` graphs).
"""

import os
import pathlib
from typing import NamedTuple

import numpy as np

from jaxlab import checks
from jaxlab.data import files, node
from jaxlab.data.node import NodeDataset

URL = "https://github.com/yandex-research/heterophilous-graphs/raw/main/data/"


class Published(NamedTuple):
  """Sizes that a published graph must come out with, and its file's checksum where known."""

  nodes: int
  edges: int
  features: int
  classes: int
  sha256: str | None = None


PUBLISHED = {
  "actor": Published(7600, 26659, 932, 5, "c350eef06b2c2a9bf8218be2b57cac6d4003d0922eb597a039e9123f75817816"),
  "chameleon_filtered": Published(
    890, 8854, 2325, 5, "bf46f07e1fb5249280447e5fe3100f3e82fc4b93ad1e13ffcfdec924b6ac0bb5"
  ),
  "minesweeper": Published(10000, 39402, 7, 2, "e664c8dacf1e8ac466c2c09ed4b237bd2c5541f47a6eae9c6092cb87f16412b3"),
  "squirrel_filtered": Published(
    2223, 46998, 2089, 5, "f06370ffb3116c5de8b7a600005400b2293c025e0ce2f6916d8201a825505ac7"
  ),
  "texas": Published(183, 279, 1703, 5, "b164b99e6c3d43e4ab07488ec59bd8c815f90cbc1bd4cf425ce587d2b534d844"),
  "wisconsin": Published(251, 450, 1703, 5, "2543c89838cfc75f737f7c4664cc1d097f8268602c20b2d1bd4f21407df9c074"),
  # Too large to be at hand when this was written: checked by the sizes in the paper's table 1.
  "roman_empire": Published(22662, 32927, 300, 18),
  "amazon_ratings": Published(24492, 93050, 300, 5),
  "tolokers": Published(11758, 519000, 10, 2),
  "questions": Published(48921, 153540, 301, 2),
}
NUM_SPLITS = 10
_KEYS = ("node_features", "node_labels", "edges", "train_masks", "val_masks", "test_masks")


def load(
  name: str, split: int = 0, directory: str | os.PathLike[str] | None = None, *, published: bool = True
) -> NodeDataset:
  """Host. A graph with one of its ten official splits.

  Args:
    name: a key of `PUBLISHED`.
    split: 0 to 9.
    directory: folder with `<name>.npz`. Default: `JAXLAB_DATA/heterophilous`, else a checked download.
    published: check that the file is the published one. False reads any file of the format from `directory`.

  Returns:
    Dense features as published. The literature reports ROC AUC for the two-class graphs, accuracy for the others.

  Raises:
    ValueError: unknown name or split, missing file (`files.MissingFile`), damaged or ill-formed content.
  """
  if published:
    checks.choice("name", name, tuple(PUBLISHED))
  elif directory is None:
    raise ValueError("directory: got None, expected the folder to read when published=False")
  checks.count("split", split, 0, NUM_SPLITS - 1)
  sha256 = PUBLISHED[name].sha256 if published else None
  path = files.fetch("heterophilous", f"{name}.npz", url=f"{URL}{name}.npz", sha256=sha256, directory=directory)
  features, labels, edges, *masks = files.parse(path, _read, f"an npz with {', '.join(_KEYS)}")
  n = len(labels)
  if features.ndim != 2 or len(features) != n or edges.ndim != 2 or edges.shape[1] != 2:
    raise ValueError(f"{path}: got features {features.shape}, labels {labels.shape}, edges {edges.shape}, misfits")
  if any(mask.dtype != bool or mask.shape != (NUM_SPLITS, n) for mask in masks):
    raise ValueError(f"{path}: got masks {[mask.shape for mask in masks]}, expected bool of {(NUM_SPLITS, n)}")
  if np.sum(masks, axis=0).max(initial=0) > 1:
    raise ValueError(f"{path}: got masks that overlap, expected disjoint sets")
  if not np.isfinite(features).all():
    raise ValueError(f"{path}: got features that are not finite")
  senders, receivers = node.undirected(edges[:, 0], edges[:, 1], n)
  dataset = NodeDataset(
    features.astype(np.float32), senders, receivers, labels.astype(np.int32), *(mask[split] for mask in masks)
  )
  got = (n, len(senders) // 2, dataset.num_features, dataset.num_classes)
  if published and got != PUBLISHED[name][:4]:
    raise ValueError(f"{path}: got nodes, edges, features, classes {got}, expected {PUBLISHED[name][:4]}")
  return dataset


def _read(path: pathlib.Path) -> list[np.ndarray]:
  with np.load(path, allow_pickle=False) as file:
    return [file[key] for key in _KEYS]
