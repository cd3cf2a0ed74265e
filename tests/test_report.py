"""The table of results: what it shows, what it keeps, what it refuses."""

import json

import pytest

from experiments import report
from jaxlab import train

RESULT = {"system": "s", "claim": "c", "published": {}, "dataset": "d", "seed": 3, "command": "x", "finished": ""}


def write(folder, value=0.5, **changes):
  fields = {
    "system": "fastrp",
    "claim": "It is fast | and good.",
    "dataset": "digits",
    "config": {},
    "metrics": {"micro": value, "macro": [0.25, 0.35]},
    "published": {"micro": {"value": 0.3723, "std": 0.01, "source": "the paper"}},
    "seed": [0, 1, 2],
    "wall_time": 1.0,
    "command": "python experiments/fastrp.py",
  }
  return train.write_result(folder, **fields | changes)


def run(tmp_path, *folders):
  table = tmp_path / "RESULTS.md"
  report.main(report.Config(tuple(folders), table))
  return [line for line in table.read_text().splitlines() if line.startswith("|")][2:]


def test_row(tmp_path):
  write(tmp_path / "runs/a")
  assert run(tmp_path, tmp_path / "runs") == [
    "| fastrp | It is fast \\| and good. | micro: 0.3723 ± 0.0100 (the paper) "
    "| micro: 0.5000<br>macro: 0.3000 ± 0.0707 | digits | 0 to 2 | `python experiments/fastrp.py` |"
  ]


def test_rows_outlive_their_results_and_new_results_replace_them(tmp_path):
  write(tmp_path / "a"), write(tmp_path / "b", dataset="cora"), write(tmp_path / "c", system="dagnn", value=0.25)
  first = run(tmp_path, tmp_path / "a", tmp_path / "b", tmp_path / "c")
  assert [line.split("|")[1].strip() for line in first] == ["dagnn", "fastrp", "fastrp"]
  assert run(tmp_path, write(tmp_path / "d", value=0.75)) == [first[0], first[1], first[2].replace("0.5000", "0.7500")]
  (tmp_path / "none").mkdir()
  again = run(tmp_path, tmp_path / "none")
  assert len(again) == 3 and again[0] == first[0]


def test_the_last_of_one_claim_stays(tmp_path):
  for name, finished, value in (("a", "2026-02-02", 0.75), ("b", "2026-01-01", 0.25)):
    path = write(tmp_path / name, value)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": finished}))
  (line,) = run(tmp_path, tmp_path)
  assert "micro: 0.7500" in line


def test_what_was_not_measured_stays_blank(tmp_path):
  by_hand = "| mend | Edits generalise. | success: 0.9 (Table 2) |  | zsRE |  |  |"
  table = report.render([]).replace("---|\n", "---|\n" + by_hand + "\n")
  (tmp_path / "RESULTS.md").write_text(table)
  write(tmp_path / "runs", value=float("nan"))
  other, mine = sorted(run(tmp_path, tmp_path / "runs"), key=lambda line: "mend" not in line)
  assert other == by_hand
  assert mine.split("|")[5].strip() == "macro: 0.3000 ± 0.0707"


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (84.4321, "84.43"),
    (0.37234, "0.3723"),
    (0.0, "0.000"),
    (-1234.5, "-1234"),
    (5.53e6, "5.530e+06"),
    (2e-7, "2.000e-07"),
  ],
)
def test_numbers(value, text):
  assert (
    report.to_row(json.loads(json.dumps(RESULT | {"metrics": {"m": {"mean": value, "std": None}}})))["measured"]
    == f"m: {text}"
  )


@pytest.mark.parametrize(("seed", "text"), [(3, "3"), ([0, 1, 2, 3], "0 to 3"), ([4, 2], "4, 2"), ([5, 6], "5, 6")])
def test_seeds(seed, text):
  assert report.to_row(RESULT | {"metrics": {}, "seed": seed})["seeds"] == text


def test_bad_input(tmp_path):
  with pytest.raises(ValueError, match=r"^folders: got .*nowhere"):
    run(tmp_path, tmp_path / "nowhere")
  (tmp_path / "result.json").write_text('{"system": ')
  with pytest.raises(ValueError, match=r"^folders: got .*result.json, which is not JSON"):
    run(tmp_path, tmp_path)
  (tmp_path / "result.json").write_text('{"system": "a"}')
  with pytest.raises(ValueError, match=r"^folders: got .*result.json without claim, command"):
    run(tmp_path, tmp_path)
  (tmp_path / "result.json").unlink()
  (tmp_path / "RESULTS.md").write_text("| a | b |\n")
  with pytest.raises(ValueError, match="^table: got 2 cells in line 1"):
    run(tmp_path, tmp_path)
