"""The benchmark harness on two sides whose times are known."""

import functools
import os
import time

import numpy as np
import pytest

from benchmarks import harness


def sleeper(seconds):
  return functools.partial(time.sleep, seconds)


def failing():
  raise KeyError("no such peer")


def dying():
  os._exit(7)


def allocating(megabytes):
  np.ones(200 * 2**17).sum()  # setting up takes more than a run
  return lambda: np.ones(megabytes * 2**17).sum()


def counting_cores(path):
  return lambda: path.write_text(f"{len(os.sched_getaffinity(0))} {os.environ['OMP_NUM_THREADS']}")


def case(name, ours, theirs):
  return harness.Case(name, functools.partial(sleeper, ours), {"peer": functools.partial(sleeper, theirs)})


def test_ratio_and_table(tmp_path, capsys):
  path = tmp_path / "RESULTS.md"
  harness.run("naps", [case("short", 0.01, 0.03)], path=path, turns=3, threads=1)
  assert "naps: short:" in capsys.readouterr().out
  cells = path.read_text().splitlines()[-1].split("|")
  assert 2 < float(cells[6]) < 4
  harness.run("naps", [case("long", 0.02, 0.02)], path=path, turns=2, threads=1)
  harness.run("naps", [case("short", 0.03, 0.01)], path=path, turns=2, threads=1)
  rows = path.read_text().splitlines()[-2:]
  assert [row.split("|")[2].strip() for row in rows] == ["long", "short"]
  assert float(rows[1].split("|")[6]) < 0.6
  assert len(list(tmp_path.iterdir())) == 1


def test_rows_of_other_processors_stay(tmp_path, monkeypatch):
  path = tmp_path / "RESULTS.md"
  for processor in ("one", "another", "one"):
    monkeypatch.setattr(harness, "_processor", lambda name=processor: name)
    harness.run("naps", [case("short", 0.001, 0.001)], path=path, turns=1, threads=1)
  rows = [row.split("|")[8].split(",")[0].strip() for row in path.read_text().splitlines()[-2:]]
  assert rows == ["another", "one"]


def test_failure_of_a_side_is_raised():
  with pytest.raises(RuntimeError, match="KeyError: 'no such peer'"):
    harness.measure({"ours": failing}, turns=1, threads=1)


def test_death_of_a_side_is_told():
  with pytest.raises(RuntimeError, match="ended with code 7"):
    harness.measure({"ours": dying}, turns=1, threads=1)


def test_quartiles_enclose_the_median():
  measured = harness.measure({"ours": functools.partial(sleeper, 0.002)}, turns=2, threads=1, turn_seconds=0.01)["ours"]
  assert 0.002 <= measured.low <= measured.seconds <= measured.high


def test_memory_is_the_peak_of_a_run():
  measured = harness.measure({"ours": functools.partial(allocating, 64)}, turns=1, threads=1)["ours"]
  assert 60 < measured.megabytes < 100


def test_cores_are_those_asked_for(tmp_path):
  before = os.sched_getaffinity(0)
  harness.measure({"ours": functools.partial(counting_cores, tmp_path / "cores")}, turns=1, threads=1)
  assert (tmp_path / "cores").read_text() == "1 1"
  assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
  ("options", "argument"), [({"turns": 0}, "turns"), ({"threads": 0}, "threads"), ({"threads": 10**6}, "threads")]
)
def test_bad_input(options, argument):
  with pytest.raises(ValueError, match=f"^{argument}: got"):
    harness.measure({"ours": functools.partial(sleeper, 0)}, **options)
