"""However a preset is named on the command line, its defaults are taken, and by no other word."""

import importlib

import pytest

NAMES = (
  "auglocal", "cvmh_unet", "dagnn", "fastrp", "maniqa", "mend", "momentum_auxiliary", "parot", "scalelong", "segman",
  "smt", "stu_net", "transformable_search",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_preset(name):
  experiment = importlib.import_module(f"experiments.{name}")
  paper = experiment.PRESETS["paper"]
  assert experiment.parse(["--preset", "paper"]) == experiment.parse(["--preset=paper"]) == paper
  other = experiment.parse(["--workdir", "paper"])
  assert other.preset != "paper"
  assert experiment.parse([]) == experiment.PRESETS[other.preset]


def test_data_give_defaults_too():
  cvmh_unet, parot = (importlib.import_module(f"experiments.{name}") for name in ("cvmh_unet", "parot"))
  assert cvmh_unet.parse(["--dataset=aerial"]).crop == cvmh_unet.parse(["--dataset", "aerial"]).crop == (128, 128)
  assert parot.parse(["--preset=paper", "--task=parts"]).num_points == 2048
