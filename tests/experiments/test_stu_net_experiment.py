import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import stu_net as experiment
from jaxlab.data import brain
from jaxlab.models import stu_net


def test_paper_preset_is_the_published_recipe():
  config = experiment.parse(["--preset", "paper"])
  assert (config.width, config.steps, config.batch_size) == (stu_net.VARIANTS["S"][0], 1000 * 250, 2)
  assert (config.learning_rate, config.transfer_rate, config.optimizer, config.mirror) == (0.01, 1e-3, "sgd", True)
  assert (config.side, experiment.halvings(config.side)) == (128, 5)
  assert experiment.parse(["--preset", "paper", "--steps", "20"]) == dataclasses.replace(config, steps=20)


@pytest.mark.parametrize(("side", "times"), [(32, 4), (4, 1), (24, 3), (80, 4), (96, 5)])
def test_networks_are_of_one_size_and_fit_the_patches(side, times):
  config = experiment.Config(side=side)
  models = experiment.networks(config)
  sizes = [experiment.parameters(model, side) for model in models.values()]  # traces both networks on a patch
  assert len(sizes) == 2 and max(sizes) < 1.04 * min(sizes)
  assert models["STU-Net"].strides == stu_net.fit_strides([(2, 2, 2)] * times)
  assert len(models["plain U-Net"].widths) == times + 1


def test_patches_are_halved_as_often_as_they_can_be():
  assert [experiment.halvings(side) for side in (6, 8, 16, 48, 64, 112, 128, 256)] == [1, 2, 3, 4, 5, 4, 5, 5]


@pytest.mark.parametrize("side", [33, 2, 0])
def test_sides_that_cannot_be_halved(side):
  with pytest.raises(ValueError, match=f"^side: got {side}, expected an even number"):
    experiment.networks(experiment.Config(side=side))


def test_widths_of_scaling():
  config = experiment.Config()
  widths = experiment.networks(dataclasses.replace(config, study="scaling"))
  assert [model.widths[0] for model in widths.values()] == [4, 8, 16]
  assert all(model.widths[5] == 16 * model.widths[0] for model in widths.values())


def test_small_scans_are_padded():
  image, label = np.ones((2, 5, 3, 4, 1)), np.ones((5, 3, 4), int)
  images, labels = experiment.padded(4, image, label)
  assert images.shape == (2, 5, 4, 4, 1) and labels.shape == (5, 4, 4)
  np.testing.assert_array_equal(images[:, :, :3], image)
  np.testing.assert_array_equal(images[..., 0] > 0, np.broadcast_to(labels > 0, (2, 5, 4, 4)))
  assert experiment.padded(3, image, label)[0].shape == image.shape


def test_fine_tuning_has_a_rate_of_its_own(monkeypatch, tmp_path):
  asked = []
  monkeypatch.setattr(experiment, "optimizer", lambda _, first, steps: asked.append((first, steps)))
  monkeypatch.setattr(experiment.train, "supervised", lambda *_: (None,) * 4)
  monkeypatch.setattr(experiment.train, "fit", lambda *_, **__: types.SimpleNamespace(variables={}))
  config = experiment.Config(study="transfer", learning_rate=0.3, transfer_rate=0.1, steps=100, workdir=tmp_path)
  scan = np.zeros((1, 4, 4, 4, 1)), np.zeros((4, 4, 4), int)
  for name, start in (("pretrained", None), ("fine-tuned", {}), ("from scratch", None)):
    experiment.fit(config, name, None, 0, *scan, start=start)
  assert asked == [(0.3, 100), (0.1, 20), (0.3, 20)]


def test_dice():
  label = np.array([[[0, 1], [1, 2]]])
  predicted = np.array([[[[0, 1], [0, 2]]], [[[1, 1], [1, 0]]]])  # two scans
  np.testing.assert_allclose(experiment.dice(predicted, label, 3), [100 * 6 / 8, 100 * 2 / 3])


def test_largest_component():
  scans = np.zeros((3, 4, 5, 1), int)
  scans[0, :2, :2, 0] = [[1, 2], [0, 1]]  # of two classes, one piece
  scans[0, 3, 3:, 0] = 2
  scans[1, 3, 4, 0] = 2
  expected = scans.copy()
  expected[0, 3] = 0
  np.testing.assert_array_equal(experiment.largest_component(scans), expected)


@pytest.fixture
def tiny(monkeypatch):
  """Two stages, and a corner of the brain."""
  corner = brain.Brain(*(a[:24, 20:60, 20:40] for a in brain.mni152(2)))
  monkeypatch.setattr(brain, "mni152", lambda spacing: corner)
  monkeypatch.setattr(experiment, "TEST_SCANS", 1)
  monkeypatch.setattr(experiment, "data", experiment.data.__wrapped__)
  shape = {"widths": (4, 4), "depths": (1, 1), "strides": ((2, 2, 2),), "deep_supervision": True}
  model = stu_net.STUNet(3, **shape)
  monkeypatch.setattr(experiment, "networks", lambda config: {"STU-Net": model})


def test_runs_end_to_end(tiny, tmp_path):
  config = experiment.Config(side=8, scans=1, steps=10, batch_size=8, mirror=False, workdir=tmp_path)
  experiment.main(config)
  folder = tmp_path / experiment.folder(config)
  metrics = json.loads((folder / "result.json").read_text())["metrics"]
  dice = {key: value["mean"] for key, value in metrics.items() if "Dice" in key}
  assert {key.split(",")[0] for key in dice} == {"STU-Net", "thresholds"}
  assert all(0 < value <= 100 for value in dice.values())
  assert (folder / "comparison.png").stat().st_size > 10_000


def test_plain_network_and_the_other_modality(tiny):
  outputs = jax.eval_shape(
    lambda x: experiment.PlainUNet(3, (4, 8, 8)).init_with_output(jax.random.key(0), x)[0], jnp.zeros((1, 8, 8, 8, 1))
  )
  assert [o.shape for o in outputs] == [(1, 8, 8, 8, 3), (1, 4, 4, 4, 3)]
  images, train_label, _ = experiment.data(experiment.Config(study="transfer", scans=2), 0)
  assert len(images) == 4 and images[2].shape == (2, *train_label.shape, 2)
  np.testing.assert_array_equal(images[2][0], -np.concatenate([images[0][0], images[0][1]], -1))


def test_memory_of_eight_devices(monkeypatch):
  toy = stu_net.STUNet(3, widths=(8, 64), depths=(2, 1), strides=((8, 8, 8),))
  monkeypatch.setattr(stu_net, "stu_net", lambda variant, **changes: toy.clone(**changes))
  monkeypatch.setattr(experiment, "WAYS", ((False, False, "float32"), (True, True, "float32")))
  whole, split = experiment.memory(experiment.Config(memory=True))
  assert whole[0] > split[0] and whole[1] > 1.2 * split[1]


@pytest.mark.parametrize(
  ("change", "message"),
  [({"seeds": 0}, "seeds, steps: got 0"), ({"steps": 5}, "got 1, 5"), ({"side": 33}, "side: got 33")],
)
def test_bad_settings(change, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    experiment.main(dataclasses.replace(experiment.Config(workdir=tmp_path), **change))
