"""A run killed with SIGKILL 20 times ends like one that was left alone, to the last bit."""

import json
import multiprocessing
import os
import signal
import time

import digits_run
import numpy as np
import pytest

pytestmark = pytest.mark.xdist_group("runs")  # long: the larger a group, the earlier it begins

STEPS, SAVE_EVERY, KILLS = 400, 8, 20


def logged(workdir):
  """(identity of the log, its lines); a restarted run replaces the file."""
  try:
    with (workdir / "metrics.jsonl").open() as file:
      return os.fstat(file.fileno()).st_ino, file.read().count("\n")
  except FileNotFoundError:
    return None, 0


def records(workdir):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def test_killed_twenty_times_ends_bit_identical(tmp_path, monkeypatch):
  # Children fork from a server that has imported everything but started no JAX backend: a start costs no import. Before
  # Python 3.13 the server does not take this process's path, and says nothing of modules it does not find.
  monkeypatch.setenv("PYTHONPATH", os.path.dirname(digits_run.__file__))
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["digits_run", "tensorboardX"])

  def start(name):
    process = context.Process(target=digits_run.main, args=(tmp_path / name, STEPS, SAVE_EVERY, tmp_path / "cache"))
    process.start()
    return process

  whole = start("whole")
  whole.join()
  assert whole.exitcode == 0

  rng = np.random.default_rng(0)
  workdir = tmp_path / "killed"
  restarts = []
  for _ in range(KILLS):
    # After a few steps and a moment: in a step, in a save, between a save and its commit, in a log line.
    process = start("killed")
    before, _ = logged(workdir)
    steps = rng.integers(1, 32)
    restarted_at = None
    while process.is_alive():
      identity, lines = logged(workdir)
      if identity != before and restarted_at is None:
        restarted_at = lines
      if restarted_at is not None and lines >= restarted_at + steps:
        break
      time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.02))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    restarts.append(restarted_at)
  assert len(set(restarts)) > KILLS // 3, restarts  # most kills came after new checkpoints
  assert logged(workdir)[1] < STEPS  # and all inside the run

  last = start("killed")
  last.join()
  assert last.exitcode == 0
  with np.load(tmp_path / "whole" / "final.npz") as a, np.load(workdir / "final.npz") as b:
    assert set(a) == set(b)
    different = [name for name in a if a[name].tobytes() != b[name].tobytes()]
  assert not different
  assert records(workdir) == records(tmp_path / "whole")
  assert [line["step"] for line in records(workdir)] == list(range(1, STEPS + 1))
