"""However a preset is named on the command line, its defaults are taken, and by no other word."""

import dataclasses
import importlib

import pytest

NAMES = (
  "auglocal", "cvmh_unet", "dagnn", "fastrp", "forward_gnn", "graph_mamba", "graphlet_orbits", "graphvite", "hnsw",
  "local_augmentation", "maniqa", "mend", "minhash_communities", "momentum_auxiliary", "nat",
  "neural_common_neighbor", "noisy_label_clustering", "parot", "scalelong", "segman", "sir_gcn", "smt",
  "spark_embedding", "stu_net", "topological_concentration", "transformable_search",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_preset(name):
  experiment = importlib.import_module(f"experiments.{name}")
  assert experiment.parse(["--preset=paper"]) == experiment.PRESETS["paper"]
  other = experiment.parse(["--workdir", "paper"])
  assert other.preset != "paper"
  default = experiment.PRESETS[other.preset]
  assert other == dataclasses.replace(default, workdir=other.workdir) != default


def test_data_give_defaults_too():
  cvmh_unet, parot = (importlib.import_module(f"experiments.{name}") for name in ("cvmh_unet", "parot"))
  assert cvmh_unet.parse(["--dataset=aerial"]).crop == cvmh_unet.parse(["--dataset", "aerial"]).crop == (128, 128)
  assert parot.parse(["--preset=paper", "--task=parts"]).num_points == 2048
