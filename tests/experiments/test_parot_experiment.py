import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import parot as experiment
from jaxlab.data import point_clouds
from jaxlab.models import parot


def test_paper_preset_is_the_published_recipe():
  config = experiment.parse(["--preset", "paper"])
  assert (config.num_points, config.batch_size, config.learning_rate, config.steps) == (1024, 32, 1e-3, 76_750)
  parts = experiment.parse(["--preset", "paper", "--task", "parts"])
  assert (parts.num_points, parts.steps) == (2048, 109_250)
  data = experiment.load(experiment.Config(clouds=10, num_points=8), 0)
  assert experiment.network(config, "PaRot", data).width == 128
  assert not experiment.network(config, "without pose", data).restore_pose


@pytest.mark.parametrize("task", ["classes", "parts"])
def test_networks_of_a_comparison_have_one_size(task):
  config = experiment.Config(task=task, clouds=10, num_points=64)
  data = experiment.load(config, 0)
  sizes = []
  for name in ("PaRot", "PointNet", "without siamese losses"):
    made = jax.eval_shape(
      experiment.network(config, name, data).init,
      jax.random.key(0),
      experiment.inputs(config, {"points": data.train.points, "label": data.train.label}),
    )
    sizes.append(sum(x.size for x in jax.tree.leaves(made["params"])))
  assert max(sizes) < 1.05 * min(sizes)


def test_part_scores():
  clouds = point_clouds.Clouds(np.zeros((2, 4, 3)), np.array([0, 1]), np.array([[0, 0, 1, 1], [2, 2, 2, 2]]))
  ranges = [range(2), range(2, 5)]
  logits = np.zeros((2, 4, 5))
  logits[..., 4] = 9  # not a part of the first class
  logits[0, :3, 0] = logits[0, 3, 1] = 1
  found = experiment.best_parts(logits, clouds, ranges)
  np.testing.assert_array_equal(found, [[0, 0, 0, 1], [4, 4, 4, 4]])
  # First cloud: 2/3 and 1/2; second: part 2 missed, part 3 neither there nor found, part 4 found where it is not.
  expected = np.array([(2 / 3 + 1 / 2) / 2, (0 + 1 + 0) / 3])
  np.testing.assert_allclose(experiment.ious(found, clouds, ranges), expected)
  rows = np.array([0, 0, 0, 1])
  clouds, logits = point_clouds.Clouds(*(a[rows] for a in clouds)), logits[rows]
  scores = experiment.score(experiment.Config(task="parts"), logits, clouds, ranges)
  np.testing.assert_allclose(list(scores.values()), [100 * expected[rows].mean(), 100 * expected.mean()])


class Linear(nn.Module):
  """Stands in for PaRot, which takes long to compile and is run in the tests of its own."""

  @nn.compact
  def __call__(self, inputs, *, train=False):
    logits = nn.Dense(17)(inputs[0])
    return (logits, parot.Siamese(*jnp.ones((3, 2)))) if train else logits


def test_runs_end_to_end_and_resumes(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  monkeypatch.setattr(experiment, "network", lambda config, name, data: Linear())
  config = experiment.Config(task="parts", clouds=50, num_points=16, steps=10, batch_size=8, workdir=tmp_path)
  experiment.main(config)
  folder = tmp_path / experiment.folder(config)
  result = json.loads((folder / "result.json").read_text())
  expected = {f"{name} {protocol}" for name in ("PaRot", "PointNet") for protocol in experiment.PROTOCOLS}
  expected |= {f"{name}, mean of classes" for name in expected}
  assert expected | {"PaRot spread", "PaRot direction loss, local, last"} <= result["metrics"].keys()
  assert result["metrics"]["PaRot spread"]["mean"] > 0
  assert (folder / "protocols.png").stat().st_size > 10_000
  monkeypatch.setattr(experiment.train, "fit", None)
  experiment.main(config)  # finished: trains no further, reports the same
  assert json.loads((folder / "result.json").read_text())["metrics"] == result["metrics"]


def test_reads_clouds_from_a_file(tmp_path):
  made = point_clouds.solids(14, 20, kinds=point_clouds.PARTED)
  arrays = {f"{split}_{name}": array for split in ("train", "test") for name, array in made._asdict().items()}
  np.savez(tmp_path / "clouds.npz", **arrays)
  config = experiment.Config(task="parts", data=tmp_path / "clouds.npz", num_points=16)
  data = experiment.load(config, 0)
  assert data.classes == 8 and data.ranges == point_clouds.part_ranges(point_clouds.PARTED)
  np.testing.assert_array_equal(data.train.points, made.points[:, :16])
  # The first class may have the parts of the highest numbers.
  arrays = {name: 7 - array if name.endswith("label") else array for name, array in arrays.items()}
  arrays = {name: 16 - array if name.endswith("part") else array for name, array in arrays.items()}
  np.savez(tmp_path / "back.npz", **arrays)
  back = experiment.load(experiment.Config(task="parts", data=tmp_path / "back.npz", num_points=16), 0)
  assert (
    experiment.network(config, "PaRot", back).num_parts == 17 == experiment.network(config, "PaRot", data).num_parts
  )
  np.savez(tmp_path / "other.npz", train_points=made.points)
  with pytest.raises(ValueError, match="data: got .*train_label"):
    experiment.load(experiment.Config(data=tmp_path / "other.npz"), 0)
  with pytest.raises(ValueError, match="num_points: got 99"):
    experiment.load(experiment.Config(task="parts", data=tmp_path / "clouds.npz", num_points=99), 0)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"seeds": 0}, "seeds"),
    ({"steps": 5}, "steps"),
    ({"batch_size": 3000}, "batch_size"),
    ({"clouds": 40}, "clouds"),
    ({"published": "modelnet40"}, "published"),
  ],
)
def test_bad_settings(change, message, tmp_path):
  with pytest.raises(ValueError, match=f"{message}.*: got "):
    experiment.main(experiment.Config(workdir=tmp_path, **change))
