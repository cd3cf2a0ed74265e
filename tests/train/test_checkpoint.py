"""Checkpoints: what is saved comes back bit by bit, and damage is noticed."""

import json
import shutil
import warnings
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from digits_run import flat

from jaxlab import train


class Pair(NamedTuple):
  first: object
  second: object


def state_at(step):
  rng = np.random.default_rng(step)
  params = {
    "w": jnp.asarray(rng.normal(size=(64, 33)), jnp.float32),
    "b": jnp.asarray(rng.normal(size=7), jnp.bfloat16),
  }
  return {
    "params": params,
    "opt": optax.adamw(1e-3).init(params),
    "pair": Pair(jnp.asarray(step), (jnp.asarray(True), None)),
    "key": jax.random.key(step),
    "raw key": jax.random.PRNGKey(step),
    "empty": {},
    "numpy": (np.float32(step), np.arange(3) + step),
    "list": [jnp.zeros((0, 3)), jnp.asarray([np.inf, -np.inf], jnp.float32)],
  }


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  a, b = flat(a), flat(b)
  assert {name: (x.dtype, x.tobytes()) for name, x in a.items()} == {n: (x.dtype, x.tobytes()) for n, x in b.items()}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
  """A run with checkpoints of the steps 1, 2 and 3."""
  folder = tmp_path_factory.mktemp("run") / "checkpoints"
  with train.Checkpoints(folder, keep=3) as checkpoints:
    for step in (0, 1, 2, 3):
      checkpoints.save(step, state_at(step))
  return folder


@pytest.fixture
def run(three, tmp_path):
  shutil.copytree(three, tmp_path / "checkpoints")
  return tmp_path / "checkpoints"


def test_any_pytree_comes_back(run):
  with train.Checkpoints(run) as checkpoints:
    step, state = checkpoints.restore(state_at(9))
  assert step == 3
  same(state, state_at(3))
  assert sorted(path.name for path in run.iterdir() if path.name.isdecimal()) == ["1", "2", "3"]


def test_no_checkpoint_is_none(tmp_path):
  with train.Checkpoints(tmp_path / "new") as checkpoints:
    assert checkpoints.restore(state_at(0)) is None


def test_iterator_position_comes_back(tmp_path):
  data = grain.MapDataset.range(50).seed(0).shuffle().batch(3)
  ahead = iter(data)
  for _ in range(4):
    next(ahead)
  with train.Checkpoints(tmp_path / "c") as checkpoints:
    checkpoints.save(4, {"x": jnp.zeros(2)}, ahead)
    expected = next(ahead)
    behind = iter(data)
    checkpoints.restore({"x": jnp.ones(2)}, behind)
  np.testing.assert_array_equal(next(behind), expected)


def flip_a_byte(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0x10
  path.write_bytes(data)


def payload(folder):
  return max((folder / "state").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)


def forge_the_manifest(folder):
  path = folder / "manifest.json"
  path.write_text(path.read_text().replace("float32[64, 33]", "float32[64, 34]"))


@pytest.mark.parametrize(
  ("what", "damage"),
  [
    ("flipped byte", lambda folder: flip_a_byte(payload(folder))),
    ("truncated", lambda folder: payload(folder).write_bytes(payload(folder).read_bytes()[:100])),
    ("emptied", lambda folder: payload(folder).write_bytes(b"")),
    ("file gone", lambda folder: payload(folder).unlink()),
    ("state gone", lambda folder: shutil.rmtree(folder / "state")),
    ("no manifest", lambda folder: (folder / "manifest.json").unlink()),
    ("half a manifest", lambda folder: (folder / "manifest.json").write_text('{"sha256": "0')),
    ("edited manifest", forge_the_manifest),
    ("empty folder", lambda folder: [shutil.rmtree(folder), folder.mkdir()]),
  ],
)
def test_damaged_newest_gives_way_to_the_one_before(run, what, damage):
  damage(run / "3")
  with train.Checkpoints(run) as checkpoints:
    with pytest.warns(UserWarning, match=r"checkpoint .*3 is damaged \(.*\); moved to .*using the one before"):
      step, state = checkpoints.restore(state_at(9))
    assert step == 2, what
    same(state, state_at(2))
    checkpoints.save(3, state_at(3))  # its number is free again
  assert (run.parent / "damaged" / "3").is_dir()
  with train.Checkpoints(run) as checkpoints, warnings.catch_warnings():
    warnings.simplefilter("error")
    assert checkpoints.restore(state_at(9))[0] == 3


def test_two_damaged_then_the_third(run):
  flip_a_byte(payload(run / "3"))
  flip_a_byte(payload(run / "2"))
  with train.Checkpoints(run) as checkpoints, pytest.warns(UserWarning, match="damaged"):
    step, state = checkpoints.restore(state_at(9))
  assert step == 1
  same(state, state_at(1))


def test_all_damaged_is_none(run):
  for step in (1, 2, 3):
    flip_a_byte(payload(run / str(step)))
  with train.Checkpoints(run) as checkpoints, pytest.warns(UserWarning, match="damaged"):
    assert checkpoints.restore(state_at(9)) is None


def test_unfinished_save_is_ignored(run):
  shutil.copytree(run / "3", run / "4.orbax-checkpoint-tmp")
  with train.Checkpoints(run) as checkpoints:
    assert checkpoints.restore(state_at(9))[0] == 3


def test_every_file_is_covered_by_the_manifest(three):
  folder = three / "3"
  files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
  head, body = (folder / "manifest.json").read_text().split("\n", 1)
  assert json.loads(head).keys() == {"sha256"}
  uncovered = files - json.loads(body)["files"].keys()
  # The commit's time stamp and marker, written after the digests, and the manifest itself.
  assert uncovered <= {"manifest.json", "_CHECKPOINT_METADATA", "commit_success.txt"}


def changed(**entries):
  return {**state_at(9), **entries}


@pytest.mark.parametrize(
  ("template", "message"),
  [
    (changed(params={**state_at(9)["params"], "w": jnp.zeros((64, 34))}), r"params/w is float32\[64, 33\] there"),
    (changed(params={**state_at(9)["params"], "b": jnp.zeros(7)}), r"params/b is bfloat16\[7\] there and float32\[7\]"),
    (changed(more=jnp.zeros(2)), r"more is absent there and float32\[2\] here"),
    ({"params": state_at(9)["params"]}, r"is absent|absent here"),
    (changed(opt=optax.sgd(0.1).init(state_at(9)["params"])), r"opt/0/count is int32\[\] there and absent here"),
  ],
)
def test_another_structure_is_refused_not_damaged(run, template, message):
  with train.Checkpoints(run) as checkpoints, pytest.raises(ValueError, match=rf"^workdir: got .*{message}.*expected"):
    checkpoints.restore(template)
  assert not (run.parent / "damaged").exists()


def test_leaves_that_cannot_be_told_apart_are_refused(tmp_path):
  with train.Checkpoints(tmp_path / "c") as checkpoints, pytest.raises(ValueError, match="^state: got two leaves"):
    checkpoints.save(1, {"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}})


@pytest.mark.parametrize("keep", [0, -1, 1.5, True])
def test_keep_is_a_count(tmp_path, keep):
  with pytest.raises(ValueError, match="^keep: got .*expected"):
    train.Checkpoints(tmp_path / "c", keep=keep)


def test_variables_round_trip_with_numpy_scalars(tmp_path):
  variables = {
    "params": {"Dense_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": jnp.zeros(3, jnp.bfloat16)}},
    "batch_stats": {"count": np.float32(3), "steps": np.int64(2**40), "flag": True},
  }
  for _ in range(2):  # a second save replaces the first
    train.save_variables(tmp_path / "v", variables)
  loaded = train.load_variables(tmp_path / "v")
  expected = jax.tree.map(np.asarray, variables)
  assert jax.tree.structure(loaded) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
    assert isinstance(a, np.ndarray)
    assert (a.dtype, a.tobytes()) == (b.dtype, b.tobytes())


def test_variables_survive_a_save_that_fails_and_a_kill_between_renames(tmp_path):
  path, kept = tmp_path / "v", {"params": {"a": np.ones(2, np.float32)}}
  train.save_variables(path, kept)
  with pytest.raises(ValueError):
    train.save_variables(path, {"params": {"a": np.zeros(2), "e": np.zeros((0, 3))}})
  np.testing.assert_array_equal(train.load_variables(path)["params"]["a"], 1)
  path.rename(tmp_path / "v.old")  # where it is for a moment
  np.testing.assert_array_equal(train.load_variables(path)["params"]["a"], 1)
  train.save_variables(path, {"params": {"a": np.full(2, 3.0)}})
  np.testing.assert_array_equal(train.load_variables(path)["params"]["a"], 3)


def test_loading_what_is_not_there_is_refused(tmp_path):
  with pytest.raises(ValueError, match="^path: got .*expected a folder written by save_variables"):
    train.load_variables(tmp_path / "nothing")
