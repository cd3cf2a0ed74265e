"""The same numbers on one device, on eight (mesh, FSDP, pmap), and in two processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import chex
import digits_run
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import two_process_run
from jax.sharding import PartitionSpec

from jaxlab import train

pytestmark = pytest.mark.xdist_group("runs")  # long: the larger a group, the earlier it begins

# Sums over a batch run in another order, which moves float32 gradients by about 1e-7 of their size; six momentum steps
# of 0.1 at loss scale 2 let that grow to a few 1e-6.
ATOL = 2e-5


def learner(**options):
  net = digits_run.Net(dropout=0.3)
  return train.supervised(net, train.cross_entropy(), optax.sgd(0.1, momentum=0.9), ema_decay=0.9, **options)


def run(learner, batches, place=lambda batch: batch):
  state = jax.jit(learner.init)(jax.random.key(0), place(batches[0]))
  step = jax.jit(learner.step)
  for batch in batches:
    state, metrics = step(state, place(batch))
  return state, metrics


BATCHES = [two_process_run.batch_at(i) for i in range(6)]


@pytest.fixture(scope="module", params=[1, 2], ids=["whole", "accumulated"])
def single(request):
  return request.param, *run(learner(accumulate=request.param), BATCHES)


@pytest.mark.parametrize("fsdp", [False, True], ids=["replicated", "fsdp"])
def test_eight_devices_give_the_numbers_of_one(single, fsdp):
  accumulate, expected, expected_metrics = single
  mesh = train.mesh()
  assert mesh.size == 8
  parallel = train.data_parallel(learner(accumulate=accumulate), mesh, fsdp=fsdp, min_size=100)
  state, metrics = run(parallel, BATCHES, lambda batch: train.shard_batch(mesh, batch))
  for name in ("params", "collections", "average"):
    chex.assert_trees_all_close(getattr(state, name), getattr(expected, name), atol=ATOL)
  chex.assert_trees_all_close(metrics, expected_metrics, atol=ATOL)
  # Dropout is drawn for the global batch, so even the masks are those of one device.
  kernel, bias = state.params["Dense_0"]["kernel"], state.params["Dense_1"]["bias"]
  assert kernel.sharding.spec == (PartitionSpec("data") if fsdp else PartitionSpec())
  assert state.opt_state[0].trace["Dense_0"]["kernel"].sharding == kernel.sharding
  assert bias.is_fully_replicated
  evaluated = parallel.evaluate(state, train.shard_batch(mesh, two_process_run.batch_at(7)))
  chex.assert_trees_all_close(evaluated, learner().evaluate(expected, two_process_run.batch_at(7)), atol=ATOL)


def test_fsdp_splits_the_largest_axis_that_divides():
  def init(key, batch):
    shapes = {"a": (8, 24), "b": (24, 8), "c": (40, 7), "d": (7, 9), "e": (2, 3), "f": (8, 8, 8), "g": ()}
    return {name: jnp.zeros(shape) for name, shape in shapes.items()}

  parallel = train.data_parallel(train.Learner(init, None, None), train.mesh(), fsdp=True, min_size=50)
  state = parallel.init(jax.random.key(0), {})
  specs = {name: tuple(x.sharding.spec) for name, x in state.items()}
  data = "data"
  assert specs == {"a": (None, data), "b": (data,), "c": (data,), "d": (), "e": (), "f": (data,), "g": ()}
  assert state["a"].addressable_shards[0].data.shape == (8, 3)


def test_mesh_step_traces_once():
  base = learner()
  mesh = train.mesh()
  parallel = train.data_parallel(
    base._replace(step=chex.assert_max_traces(base.step, n=1)), mesh, fsdp=True, min_size=1
  )
  batches = [train.shard_batch(mesh, batch) for batch in BATCHES[:3]]
  state = parallel.init(jax.random.key(0), batches[0])
  shardings = jax.tree.map(lambda x: x.sharding, state)
  for batch in batches:
    state, _ = parallel.step(state, batch)
    assert jax.tree.map(lambda x: x.sharding, state) == shardings  # another would compile the step again


def test_fit_on_a_mesh_restores_its_shardings(tmp_path):
  # A sum of batches and noise, large enough to be split.
  def init(key, batch):
    return {"sum": jnp.zeros((300, 256)), "key": key, "few": jnp.zeros(3)}

  def step(state, batch):
    key, noise = jax.random.split(state["key"])
    total = state["sum"] + batch["image"].mean() + jax.random.normal(noise, (300, 256))
    return {"sum": total, "key": key, "few": state["few"] + batch["label"][:3]}, {"loss": total.mean()}

  def fit(folder, steps):
    learner = train.Learner(init, step, lambda state, batch: {"loss": state["sum"].mean()})
    options = {"save_every": 2, "evaluate_on": BATCHES[0], "mesh": train.mesh(), "fsdp": True, "progress": False}
    key = jax.random.key(0)
    return train.fit(learner, lambda i: BATCHES[i], steps=steps, workdir=tmp_path / folder, key=key, **options)

  whole = fit("whole", 4)
  fit("parts", 3)
  state = fit("parts", 4)
  assert state["sum"].sharding.spec == whole["sum"].sharding.spec == PartitionSpec(None, "data")
  expected = digits_run.flat(whole)
  for name, x in digits_run.flat(state).items():
    assert x.tobytes() == expected[name].tobytes(), name


def test_pmap_gives_the_numbers_of_one_device():
  # Without dropout, whose masks pmap draws per device.
  def make(axis_name):
    net = digits_run.Net(dropout=0.0, axis_name=axis_name)
    tx = optax.sgd(0.1, momentum=0.9)
    return train.supervised(net, train.cross_entropy(), tx, ema_decay=0.9, axis_name=axis_name)

  expected, expected_metrics = run(make(None), BATCHES)
  parts = make("data")
  step = train.pmap_step(parts)
  state = train.replicate(jax.jit(make(None).init)(jax.random.key(0), BATCHES[0]))
  for batch in BATCHES:
    state, metrics = step(state, train.split_batch(batch))
  for device in (0, 7):
    one = jax.tree.map(lambda x, d=device: x[d], (state.params, state.collections, state.average, metrics))
    chex.assert_trees_all_close(
      one, (expected.params, expected.collections, expected.average, expected_metrics), atol=ATOL
    )


def test_pmap_keeps_counters_whole():
  class Counting(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
      seen = self.variable("state", "seen", jnp.zeros, (), jnp.int32)
      if train and not self.is_initializing():
        seen.value += 1
      return nn.Dense(1)(x)

  parts = train.supervised(Counting(), lambda y, batch: (jnp.mean(y**2), {}), optax.sgd(0.1), axis_name="data")
  batch = {"image": np.ones((8, 2), np.float32)}
  state = train.replicate(jax.jit(parts.init)(jax.random.key(0), batch))
  state, _ = train.pmap_step(parts)(state, train.split_batch(batch))
  seen = state.collections["state"]["seen"]
  assert seen.dtype == jnp.int32 and seen.tolist() == [1] * 8


def test_pmap_devices_draw_their_own_dropout():
  net = digits_run.Net(norm=False, dropout=0.5)
  parts = train.supervised(net, lambda y, batch: (jnp.sum(y**2), {}), optax.sgd(0.0), axis_name="data")
  key = jax.random.key(0)
  image = np.ones((8, 2, 64), np.float32)
  state = jax.jit(parts.init)(key, {"image": image[0]})
  step = train.pmap_step(parts)
  _, on_one = step(train.replicate(state, jax.local_devices()[:1]), {"image": image[:1]})
  _, on_eight = step(train.replicate(state), {"image": image})
  # Same examples everywhere, so only masks can move the mean over devices away from device 0's.
  assert abs(float(on_one["loss"][0]) - float(on_eight["loss"][0])) > 1e-3


def free_port():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def test_two_processes_give_the_numbers_of_one(tmp_path):
  here = Path(__file__).parent
  environment = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]),
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2"),
    "JAX_PLATFORMS": "cpu",
    "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
    "JAX_NUM_PROCESSES": "2",
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),  # each fit is of a new learner, with the same programs
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  command = [sys.executable, str(here / "two_process_run.py"), str(tmp_path)]
  processes = [
    subprocess.Popen(command, env={**environment, "JAX_PROCESS_ID": str(i)}, stderr=subprocess.PIPE, text=True)
    for i in range(2)
  ]
  for process in processes:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]

  # SIGTERM to one stopped both, after they saved together.
  assert [(tmp_path / f"exit_{i}").read_text() for i in range(2)] == ["143", "143"]
  (step,) = [int(path.name) for path in (tmp_path / "stopped" / "checkpoints").iterdir() if path.name.isdecimal()]
  assert 5 < step < 3000

  expected = two_process_run.fit(
    tmp_path / "single", 6, two_process_run.batch_at, evaluate_on=two_process_run.batch_at(20), evaluate_every=3
  )
  reference = digits_run.flat((expected.params, expected.collections, expected.average))
  theirs = train.read_metrics(tmp_path / "single")
  for mode in ("replicated", "fsdp"):
    with np.load(tmp_path / mode / "final.npz") as final:
      assert set(final) == set(reference)
      for name, x in reference.items():
        np.testing.assert_allclose(final[name], x, atol=ATOL, err_msg=name)
    ours = train.read_metrics(tmp_path / mode)
    assert ours.keys() == theirs.keys()
    for name in ours:
      np.testing.assert_array_equal(ours[name][0], theirs[name][0])
      np.testing.assert_allclose(ours[name][1], theirs[name][1], atol=ATOL, err_msg=name)


def test_distributed_alone_is_one_process(monkeypatch):
  for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
    monkeypatch.delenv(name, raising=False)
  assert train.distributed() == (0, 1)


PLAIN = train.Learner(lambda key, batch: {}, lambda state, batch: (state, {}), lambda state, batch: {})


@pytest.mark.parametrize(
  ("name", "call"),
  [
    ("devices", lambda: train.mesh([])),
    ("batch", lambda: train.shard_batch(train.mesh(), {"x": np.zeros((12, 2))})),
    ("batch", lambda: train.shard_batch(train.mesh(), {"x": np.float32(1)})),
    ("learner", lambda: train.pmap_step(PLAIN)),
    ("learner", lambda: train.data_parallel(PLAIN._replace(axis_name="data"), train.mesh())),
    ("batch", lambda: train.split_batch({"x": np.zeros((12, 2))})),
    ("batch", lambda: train.split_batch({"x": np.float32(1)})),
    ("devices", lambda: train.split_batch({"x": np.zeros((12, 2))}, 0)),
    ("coordinator", lambda: train.distributed(num_processes=2, process_id=0)),
    ("coordinator", lambda: train.distributed("localhost", 2, 0)),
    ("num_processes", lambda: train.distributed("localhost:1234", None, 0)),
    ("num_processes", lambda: train.distributed("localhost:1234", 0, 0)),
    ("process_id", lambda: train.distributed("localhost:1234", 2, 2)),
    ("process_id", lambda: train.distributed("localhost:1234", 2, -1)),
  ],
)
def test_bad_input_names_the_argument(monkeypatch, name, call):
  for variable in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
    monkeypatch.delenv(variable, raising=False)
  with pytest.raises(ValueError, match=rf"^{name}\b.*got .*expected "):
    call()
