"""The benchmark harness on two sides whose times are known."""

import functools
import time

import pytest

from benchmarks import harness


def sleeper(seconds):
  return functools.partial(time.sleep, seconds)


def failing():
  raise KeyError("no such peer")


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


def test_failure_of_a_side_is_raised():
  with pytest.raises(RuntimeError, match="KeyError: 'no such peer'"):
    harness.measure({"ours": failing}, turns=1, threads=1)


@pytest.mark.parametrize(
  ("options", "argument"), [({"turns": 0}, "turns"), ({"threads": 0}, "threads"), ({"threads": 10**6}, "threads")]
)
def test_bad_input(options, argument):
  with pytest.raises(ValueError, match=f"^{argument}: got"):
    harness.measure({"ours": functools.partial(sleeper, 0)}, **options)
