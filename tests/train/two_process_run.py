"""One process of a run of two, started by test_parallel: trains on its half of each batch, restarts, trains on."""

import os
import signal
import sys
import time
from pathlib import Path

import digits_run
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from jaxlab import train


def batch_at(step, size=16):
  """The global batch."""
  return {name: x[size * step : size * (step + 1)] for name, x in digits_run.digits().items()}


def learner():
  net = digits_run.Net(width=1100, dropout=0.3)  # wide enough for FSDP to split its kernels
  return train.supervised(net, train.cross_entropy(), optax.sgd(0.1, momentum=0.9), ema_decay=0.9, accumulate=2)


def fit(workdir, steps, batches, **options):
  return train.fit(
    learner(),
    batches,
    steps=steps,
    workdir=workdir,
    key=jax.random.key(0),
    log_every=1,
    save_every=2,
    progress=False,
    **options,
  )


def main(folder):
  process, count = train.distributed()  # from the environment
  assert (process, count) == (jax.process_index(), 2)
  assert jax.device_count() == 4

  def mine(step):
    half = 8 * process
    return {name: x[half : half + 8] for name, x in batch_at(step).items()}

  for mode in ("replicated", "fsdp"):
    workdir = Path(folder) / mode
    options = {"mesh": train.mesh(), "fsdp": mode == "fsdp", "evaluate_on": mine(20), "evaluate_every": 3}
    if mode == "fsdp":
      fit(workdir, 3, mine, **options)
    state = fit(workdir, 6, mine, **options)  # goes on from the checkpoint that both wrote
    assert state.params["Dense_0"]["kernel"].is_fully_replicated == (mode != "fsdp")
    whole = jax.tree.map(
      lambda x: multihost_utils.process_allgather(x, tiled=True), (state.params, state.collections, state.average)
    )
    if process == 0:
      np.savez(workdir / "final.npz", **digits_run.flat(whole))
  try:
    stop_one(Path(folder) / "stopped", process)
  except SystemExit as stop:
    (Path(folder) / f"exit_{process}").write_text(str(stop.code))


def stop_one(workdir, process):
  """A run whose second process gets SIGTERM: both must save the same step and leave."""

  def step(state, batch):
    return {"sum": state["sum"] + batch["x"].mean()}, {"loss": state["sum"]}

  def batch(step):
    if step == 5 and process == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.005)
    return {"x": np.ones((4, 2), np.float32)}

  learner = train.Learner(lambda key, batch: {"sum": jnp.zeros(())}, step, lambda state, batch: {})
  options = {"steps": 3000, "save_every": 3000, "progress": False, "tensorboard": False}
  train.fit(learner, batch, workdir=workdir, key=jax.random.key(0), mesh=train.mesh(), **options)


if __name__ == "__main__":
  main(sys.argv[1])
