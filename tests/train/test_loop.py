"""`fit`: restarts, logs, the guard against non-finite losses, signals."""

import json
import os
import signal
import types

import chex
import digits_run
import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import train
from jaxlab.data import reading

pytestmark = pytest.mark.xdist_group("runs")  # long: the larger a group, the earlier it begins

KEY = jax.random.key(5)


@flax.struct.dataclass
class Walk:
  """State of a learner that compiles in no time: a sum of what it saw, with noise of its own."""

  total: jax.Array
  key: jax.Array


def walk():
  def init(key, batch):
    return Walk(jnp.zeros(batch["x"].shape[1:]), key)

  def step(state, batch):
    key, noise = jax.random.split(state.key)
    total = state.total + batch["x"].mean(0) + jax.random.normal(noise, state.total.shape)
    return Walk(total, key), {"loss": jnp.sum(jnp.sqrt(batch["x"])), "norm": jnp.linalg.norm(total)}

  def evaluate(state, batch):
    return {"mean": jnp.mean(batch["x"]), "norm": jnp.linalg.norm(state.total)}

  return train.Learner(init, step, evaluate)


WALK = walk()  # one, so that all tests share its compiled functions


def batch_at(step):
  return {"x": np.random.default_rng(step).uniform(0, 1, (4, 3)).astype(np.float32)}


def fit(workdir, steps=20, batches=batch_at, **options):
  options = {"save_every": 4, "log_every": 1, "key": KEY, "progress": False, "tensorboard": False, **options}
  return train.fit(WALK, batches, steps=steps, workdir=workdir, **options)


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_time(workdir):
  return [{name: value for name, value in line.items() if name != "time"} for line in lines(workdir)]


def saved(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def same(a, b):
  a, b = digits_run.flat(a), digits_run.flat(b)
  assert {name: x.tobytes() for name, x in a.items()} == {name: x.tobytes() for name, x in b.items()}


class Crash(Exception):
  pass


def crashing(at, batches=batch_at):
  def batch(step):
    if step == at:
      raise Crash
    return batches(step)

  return batch


def dataset(length=37):
  """A grain pipeline with randomness of its own."""
  source = grain.MapDataset.range(length).seed(1).shuffle()
  noisy = source.random_map(lambda i, rng: {"x": rng.uniform(0, 1, 3).astype(np.float32) + np.float32(i)})
  return noisy.repeat().batch(4)


def loader():
  class Noise(grain.transforms.RandomMap):
    def random_map(self, element, rng):
      return {"x": rng.uniform(0, 1, 3).astype(np.float32) + np.float32(element)}

  source = grain.sources.RangeDataSource(0, 37, 1)
  sampler = grain.samplers.IndexSampler(37, shuffle=True, seed=0)
  return grain.DataLoader(data_source=source, sampler=sampler, operations=[Noise(), grain.transforms.Batch(4)])


@pytest.mark.parametrize(
  "batches",
  [
    lambda: batch_at,
    lambda: batch_at(0),
    dataset,
    lambda: reading.opened(dataset()),
    lambda: dataset().to_iter_dataset(reading.READ_AHEAD),
    loader,
    lambda: iter(loader()),
  ],
  ids=["function", "constant", "map dataset", "iterator", "iter dataset", "loader", "loader iterator"],
)
def test_restart_at_every_kind_of_position_is_bit_identical(tmp_path, batches):
  whole = fit(tmp_path / "whole", 11, batches())
  same(fit(tmp_path / "parts", 3, batches()), fit(tmp_path / "parts", 3, batches()))
  fit(tmp_path / "parts", 7, batches())
  same(fit(tmp_path / "parts", 11, batches()), whole)
  assert without_time(tmp_path / "parts") == without_time(tmp_path / "whole")


def test_a_dataset_is_read_few_batches_ahead(tmp_path):
  read = []
  batches = grain.MapDataset.range(10_000).map(lambda i: read.append(i) or {"x": np.full(3, i, np.float32)})
  fit(tmp_path, 2, batches)
  assert 2 <= len(read) < 40


def test_crash_between_checkpoints_repeats_no_log_line(tmp_path):
  whole = fit(tmp_path / "whole")
  for at in (3, 6, 15):
    with pytest.raises(Crash):
      fit(tmp_path / "crashed", batches=crashing(at))
  same(fit(tmp_path / "crashed"), whole)
  assert [line["step"] for line in lines(tmp_path / "crashed")] == list(range(1, 21))
  assert without_time(tmp_path / "crashed") == without_time(tmp_path / "whole")


def test_half_a_log_line_is_dropped(tmp_path):
  with pytest.raises(Crash):
    fit(tmp_path, batches=crashing(10))
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 10, "lo')
  fit(tmp_path)
  assert [line["step"] for line in lines(tmp_path)] == list(range(1, 21))


def test_keeps_the_newest_and_always_the_last(tmp_path):
  fit(tmp_path, 10, save_every=3, keep=2)
  assert saved(tmp_path) == [9, 10]


def test_finished_run_returns_its_state_without_a_step(tmp_path):
  state = fit(tmp_path)
  before = (tmp_path / "metrics.jsonl").read_bytes()
  fetched = []

  def first_only(step):
    fetched.append(step)
    return batch_at(step)

  same(fit(tmp_path, batches=first_only), state)
  assert fetched == [0]  # its shapes
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_callers_arrays_survive(tmp_path):
  batch = jax.tree.map(jnp.asarray, batch_at(0))
  fit(tmp_path, batches=batch)
  assert not batch["x"].is_deleted()
  assert not KEY.is_deleted()


def test_evaluation_is_logged_with_its_step_and_weighted_by_size(tmp_path):
  small, large = batch_at(1), {"x": np.concatenate([batch_at(2)["x"], batch_at(3)["x"]])}
  state = fit(tmp_path, 10, evaluate_on=[small, large], evaluate_every=4, log_every=5)
  evaluated = [line for line in lines(tmp_path) if "eval_mean" in line]
  assert [line["step"] for line in lines(tmp_path)] == [4, 5, 8, 10]
  assert [line["step"] for line in evaluated] == [4, 8, 10]
  everything = np.concatenate([small["x"], large["x"]])
  np.testing.assert_allclose(evaluated[0]["eval_mean"], everything.mean(), rtol=1e-6)
  np.testing.assert_allclose(evaluated[-1]["eval_norm"], np.linalg.norm(state.total), rtol=1e-6)
  fit(tmp_path / "one", 2, evaluate_on=small)
  np.testing.assert_allclose(lines(tmp_path / "one")[-1]["eval_mean"], small["x"].mean(), rtol=1e-6)
  data = grain.MapDataset.range(6).map(lambda i: {"x": np.full(3, i, np.float32)}).batch(4)
  fit(tmp_path / "grain", 2, evaluate_on=data)
  np.testing.assert_allclose(lines(tmp_path / "grain")[-1]["eval_mean"], 2.5, rtol=1e-6)


def test_metrics_read_back(tmp_path):
  fit(tmp_path, 6, evaluate_on=batch_at(0), evaluate_every=3)
  metrics = train.read_metrics(tmp_path)
  np.testing.assert_array_equal(metrics["loss"][0], np.arange(1, 7))
  np.testing.assert_allclose(metrics["loss"][1][2], np.sqrt(batch_at(2)["x"]).sum(), rtol=1e-6)
  np.testing.assert_array_equal(metrics["eval_mean"][0], [3, 6])


def test_seeds_are_logged_as_lists(tmp_path):
  keys = jax.random.split(KEY, 3)
  state = train.fit(
    train.over_seeds(walk()), batch_at, steps=5, workdir=tmp_path, key=keys, log_every=1, progress=False
  )
  assert train.read_metrics(tmp_path)["norm"][1].shape == (5, 3)
  np.testing.assert_allclose(
    train.read_metrics(tmp_path)["norm"][1][-1], np.linalg.norm(state.total, axis=1), rtol=1e-6
  )
  again = fit(tmp_path / "second", 5, key=keys[1])
  np.testing.assert_allclose(state.total[1], again.total, rtol=1e-6)


def test_tensorboard_holds_the_metrics(tmp_path):
  from tensorboardX.event_file_writer import EventFileWriter  # noqa: F401
  from tensorboardX.proto.event_pb2 import Event

  fit(tmp_path, 3, tensorboard=True)
  (path,) = (tmp_path / "tensorboard").iterdir()
  data, values = path.read_bytes(), {}
  while data:  # records of TFRecord: length, its checksum, payload, its checksum
    length = int.from_bytes(data[:8], "little")
    event = Event.FromString(data[12 : 12 + length])
    data = data[16 + length :]
    values |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
  expected = {(line["step"], "loss"): line["loss"] for line in lines(tmp_path)}
  assert {key for key in values if key[1] == "loss"} == set(expected)
  np.testing.assert_allclose([values[key] for key in expected], list(expected.values()), rtol=1e-6)


@pytest.mark.parametrize("at", [0, 6, 19])
def test_non_finite_loss_names_the_step_and_saves_its_batch(tmp_path, at):
  def batches(step):
    return {"x": -batch_at(step)["x"]} if step == at else batch_at(step)  # the square root of a negative number

  with pytest.raises(FloatingPointError, match=rf"^step {at + 1}: loss is nan"):
    fit(tmp_path, batches=batches)
  with np.load(tmp_path / f"nonfinite_step_{at + 1}.npz") as stored:
    np.testing.assert_array_equal(stored["x"], batches(at)["x"])
  assert all(step <= at for step in saved(tmp_path))
  if at:
    same(fit(tmp_path), fit(tmp_path / "whole"))  # goes on from the last good checkpoint


def test_a_batch_with_keys_is_saved_too(tmp_path):
  def batches(step):
    return {"x": -batch_at(step)["x"], "key": jax.random.key(step)}

  with pytest.raises(FloatingPointError, match="^step 1: loss is nan"):
    fit(tmp_path, batches=batches)
  with np.load(tmp_path / "nonfinite_step_1.npz") as stored:
    np.testing.assert_array_equal(stored["key"], jax.random.key_data(jax.random.key(0)))


def test_one_bad_seed_is_enough(tmp_path):
  pair = {"x": np.stack([batch_at(0)["x"], -batch_at(0)["x"]])}
  learner = train.over_seeds(walk(), batch_axis=0)
  with pytest.raises(FloatingPointError, match="^step 1: loss is .*nan"):
    train.fit(learner, pair, steps=3, workdir=tmp_path, key=jax.random.split(KEY, 2), progress=False)


def test_state_with_nan_is_not_saved(tmp_path):
  def batches(step):
    x = batch_at(step)["x"]
    return {"x": np.where(step == 5, np.inf, x).astype(np.float32)}

  learner = walk()._replace(
    step=lambda state, batch: (Walk(state.total + (batch["x"] - batch["x"]).sum(0), state.key), {"loss": jnp.zeros(())})
  )
  with pytest.raises(FloatingPointError, match="^step 8: the state holds NaN"):
    train.fit(learner, batches, steps=20, workdir=tmp_path, key=KEY, save_every=4, progress=False)
  assert saved(tmp_path) == [4]


def test_sigterm_saves_and_the_restart_is_bit_identical(tmp_path):
  def batches(step):
    if step == 9:
      os.kill(os.getpid(), signal.SIGTERM)
    return batch_at(step)

  called = []
  before = signal.signal(signal.SIGTERM, lambda *_: called.append(1))
  try:
    with pytest.raises(SystemExit) as stop:
      fit(tmp_path / "stopped", batches=batches)
    assert stop.value.code == 143
    assert saved(tmp_path / "stopped")[-1] == 10
    assert not called
    os.kill(os.getpid(), signal.SIGTERM)
    assert called  # the caller's handler is back
  finally:
    signal.signal(signal.SIGTERM, before)
  same(fit(tmp_path / "stopped"), fit(tmp_path / "whole"))
  assert without_time(tmp_path / "stopped") == without_time(tmp_path / "whole")


def test_new_batches_do_not_retrace(tmp_path):
  learner = walk()
  learner = learner._replace(step=chex.assert_max_traces(learner.step, n=1))
  with pytest.raises(Crash):
    train.fit(learner, crashing(6), steps=9, workdir=tmp_path, key=KEY, save_every=2, progress=False)


def test_progress_lines_without_a_terminal(tmp_path, capsys):
  fit(tmp_path, 5, progress=True)
  assert "step 5/5" in capsys.readouterr().err


def test_progress_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take the captured stream for a terminal
  monkeypatch.setenv("TTY_COMPATIBLE", "1")
  fit(tmp_path, 5, progress=True)
  assert "5/5" in capsys.readouterr().err


def test_quiet_without_progress(tmp_path, capsys):
  fit(tmp_path, 5)
  assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("steps", {"steps": 0}),
    ("steps", {"steps": -3}),
    ("steps", {"steps": 2.5}),
    ("steps", {"steps": True}),
    ("save_every", {"save_every": 0}),
    ("log_every", {"log_every": -1}),
    ("evaluate_every", {"evaluate_every": 0, "evaluate_on": batch_at(0)}),
    ("keep", {"keep": 0}),
    ("fsdp", {"fsdp": True}),
    ("config", {"config": 3}),
    ("batches", {"batches": (batch_at(i) for i in range(9))}),
    ("batches", {"batches": {}}),
    ("batches", {"batches": dataset(8)[:2]}),
    ("evaluate_on", {"evaluate_on": [], "steps": 1}),
    ("batch", {"mesh": train.mesh()}),  # 4 examples over 8 devices
  ],
)
def test_bad_input_names_the_argument(tmp_path, name, options):
  with pytest.raises(ValueError, match=rf"^{name}\b.*got .*expected "):
    fit(tmp_path, **options)


def test_workdir_that_is_a_file_is_refused(tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(ValueError, match="^workdir: got .*file, a file, expected a folder"):
    fit(tmp_path / "file")


def test_fewer_steps_than_the_checkpoint_are_refused(tmp_path):
  fit(tmp_path, 8)
  with pytest.raises(ValueError, match="^steps: got 5, expected at least 8"):
    fit(tmp_path, 5)


def test_workdir_of_another_config_is_refused(tmp_path):
  fit(tmp_path, 3, config={"rate": 0.1, "name": "a"})
  fit(tmp_path, 3, config={"rate": 0.1, "name": "a"})
  with pytest.raises(ValueError, match=r"^workdir: got .*rate was 0.1 and is 0.2.*expected"):
    fit(tmp_path, 3, config={"rate": 0.2, "name": "a"})


def test_workdir_of_another_state_is_refused(tmp_path):
  fit(tmp_path, 3)
  with pytest.raises(ValueError, match=r"^workdir: got .*total is float32\[3\] there and float32\[5\] here"):
    fit(tmp_path, 5, batches={"x": np.ones((4, 5), np.float32)})


def test_workdir_of_another_kind_of_batches_is_refused(tmp_path):
  fit(tmp_path, 3)
  with pytest.raises(ValueError, match="^batches: got a grain iterator, expected a function"):
    fit(tmp_path, 5, batches=dataset())


def test_module_loads_figures_on_demand():
  assert isinstance(train.figures, types.ModuleType)
