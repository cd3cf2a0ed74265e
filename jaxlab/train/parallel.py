"""One batch over many devices: a mesh with `jit`, or `pmap`, in one process or several."""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxlab import checks
from jaxlab.train.learner import Batch, Learner, Metrics, State

_AXIS = "data"


def mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of one axis, `data`, over the given devices, by default all devices of all processes."""
  devices = jax.devices() if devices is None else devices
  if not len(devices):
    raise ValueError("devices: got none, expected at least one")
  return Mesh(np.asarray(devices), (_AXIS,))


def shard_batch(mesh: Mesh, batch: Batch) -> Batch:
  """Host. Puts a batch on the devices, split along the first axis.

  Args:
    mesh: from `mesh()`.
    batch: this process's part of the global batch: arrays [B / processes, ...] of one B.

  Returns:
    Global arrays [B, ...].

  Raises:
    ValueError: if an array does not divide by the devices of this process.
  """
  sharding = NamedSharding(mesh, PartitionSpec(_AXIS))
  local = len(mesh.local_devices)

  def put(path: Any, x: Any) -> jax.Array:
    name = "batch" + jax.tree_util.keystr(path)
    size = checks.leading(name, x)
    if size % local:
      raise ValueError(f"{name}: got {size} examples, expected a multiple of the {local} devices of this process")
    if isinstance(x, jax.Array) and x.sharding == sharding:
      return x
    return jax.make_array_from_process_local_data(sharding, np.asarray(x))

  return jax.tree_util.tree_map_with_path(put, batch)


def data_parallel(learner: Learner, mesh: Mesh, *, fsdp: bool = False, min_size: int = 2**16) -> Learner:
  """A learner that computes on batches from `shard_batch`, jitted, with the numbers of one device up to rounding.

  Every example of the global batch enters every mean, so BatchNorm and losses need no change.

  Args:
    learner: one that computes on the whole batch (no `axis_name`).
    mesh: from `mesh()`.
    fsdp: each array of the state of at least `min_size` elements is split along its largest axis that the number of
      devices divides (the first of equals). Otherwise, and where no axis does, each device holds a copy.
    min_size: in elements; splitting a small array costs more than it saves.

  Returns:
    The learner; `step` gives its state's memory to the next state.
  """
  if learner.axis_name is not None:
    raise ValueError(f"learner: got one that averages over {learner.axis_name!r}, expected axis_name=None on a mesh")
  whole = NamedSharding(mesh, PartitionSpec())

  def sharding(x: jax.Array) -> NamedSharding:
    fits = [i for i, n in enumerate(x.shape) if n % mesh.size == 0 and n]
    if not fsdp or x.size < min_size or not fits:
      return whole
    split = max(fits, key=lambda i: x.shape[i])
    return NamedSharding(mesh, PartitionSpec(*(None,) * split, _AXIS))

  def constrain(state: State) -> State:
    return jax.lax.with_sharding_constraint(state, jax.tree.map(sharding, state))

  def everywhere(metrics: Metrics) -> Metrics:
    return jax.lax.with_sharding_constraint(metrics, whole)

  def init(key: jax.Array, batch: Batch) -> State:
    return constrain(learner.init(key, batch))

  def step(state: State, batch: Batch) -> tuple[State, Metrics]:
    state, metrics = learner.step(state, batch)
    return constrain(state), everywhere(metrics)

  def evaluate(state: State, batch: Batch) -> Metrics:
    return everywhere(learner.evaluate(state, batch))

  return Learner(jax.jit(init), jax.jit(step, donate_argnums=0), jax.jit(evaluate))


def pmap_step(learner: Learner) -> Callable[[State, Batch], tuple[State, Metrics]]:
  """The step under `jax.pmap`: (states [D, ...], batches [D, B / D, ...]) -> the same with metrics [D].

  Args:
    learner: one that averages over devices: `supervised(..., axis_name="data")` and a model whose BatchNorm has the
      same `axis_name`. `replicate` makes its states and `split_batch` its batches. Dropout differs between devices.
  """
  if learner.axis_name is None:
    raise ValueError("learner: got one without axis_name, whose devices would drift apart, expected axis_name='data'")
  return jax.pmap(learner.step, axis_name=learner.axis_name, donate_argnums=0)


def replicate(tree: PyTree, devices: Sequence[jax.Device] | None = None) -> PyTree:
  """A copy of every array on each local device: [...] -> [D, ...]."""
  devices = jax.local_devices() if devices is None else devices
  sharding = NamedSharding(mesh(devices), PartitionSpec(_AXIS))

  def copies(x: jax.Array) -> jax.Array:
    return jax.device_put(jax.numpy.stack([x] * len(devices)), sharding)

  return jax.tree.map(copies, tree)


def split_batch(batch: Batch, devices: int | None = None) -> Batch:
  """Arrays [B, ...] -> [D, B / D, ...], one block of examples a device, by default over the local ones."""
  count = jax.local_device_count() if devices is None else checks.count("devices", devices)

  def split(path: Any, x: Any) -> Any:
    name = "batch" + jax.tree_util.keystr(path)
    size = checks.leading(name, x)
    if size % count:
      raise ValueError(f"{name}: got {size} examples, expected a multiple of {count} devices")
    return x.reshape(count, size // count, *x.shape[1:])

  return jax.tree_util.tree_map_with_path(split, batch)


def distributed(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> tuple[int, int]:
  """Joins this process to a run of several; call it before anything else of JAX.

  Args:
    coordinator: `host:port` of process 0. None for the environment variable JAX_COORDINATOR_ADDRESS or, in a job of
      several tasks under Slurm or Open MPI, what JAX finds there. With none of these the run is of one process.
    num_processes: None for JAX_NUM_PROCESSES.
    process_id: None for JAX_PROCESS_ID.

  Returns:
    (this process, number of processes).
  """
  coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
  if coordinator is None:
    if num_processes is not None or process_id is not None:
      raise ValueError("coordinator: got None, expected host:port of process 0 along with num_processes and process_id")
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    if int(tasks) > 1:
      jax.distributed.initialize()
    return jax.process_index(), jax.process_count()
  if not re.fullmatch(r".+:\d+", coordinator):
    raise ValueError(f"coordinator: got {coordinator!r}, expected host:port")
  count = checks.count("num_processes", _number("num_processes", num_processes, "JAX_NUM_PROCESSES"))
  index = checks.count("process_id", _number("process_id", process_id, "JAX_PROCESS_ID"), 0)
  if index >= count:
    raise ValueError(f"process_id: got {index}, expected less than num_processes, {count}")
  jax.distributed.initialize(coordinator, count, index)
  return index, count


def _number(name: str, value: int | None, variable: str) -> Any:
  if value is not None:
    return value
  text = os.environ.get(variable)
  if text is None or not text.isdecimal():
    raise ValueError(f"{name}: got None and {variable}={text}, expected a whole number in one of them")
  return int(text)
