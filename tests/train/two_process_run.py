"""One process of a run of two, started by test_parallel: trains on its half of each batch, restarts, trains on."""

import sys
from pathlib import Path

import digits_run
import jax
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


if __name__ == "__main__":
  main(sys.argv[1])
