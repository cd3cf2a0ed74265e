import json

import numpy as np
import pytest

from experiments import report
from jaxlab import train


def write(folder, **changes):
  fields = {
    "system": "dagnn", "claim": "Depth does not hurt.", "dataset": "cora, public split", "config": {},
    "metrics": {"DAGNN": [84.0, 84.5, 85.0], "GCN": 81.25}, "published": {"DAGNN": {"value": 84.4, "std": 0.5}},
    "seed": [0, 1, 2], "wall_time": 1.0, "command": "python experiments/dagnn.py",
  }  # fmt: skip
  return train.write_result(folder, **fields | changes)


def run(tmp_path, *folders):
  output = tmp_path / "RESULTS.md"
  report.main(report.Config(tuple(folders) or (tmp_path / "runs",), output))
  return output.read_text()


def cells(text):
  return report.parse(text)[1]


def test_a_row_shows_published_beside_measured(tmp_path):
  write(tmp_path / "runs/dagnn/cora")
  text = run(tmp_path)
  assert text.startswith("# Results\n\n") and text.endswith("|\n")
  assert cells(text) == [
    {
      "system": "dagnn",
      "claim": "Depth does not hurt.",
      "published": "DAGNN: 84.4 ± 0.5",
      "measured": "DAGNN: 84.5 ± 0.5<br>GCN: 81.25",
      "data": "cora, public split",
      "seeds": "0 to 2",
      "command": "`python experiments/dagnn.py`",
    }
  ]


def test_markdown_renders_as_one_table(tmp_path):
  write(tmp_path / "runs/a")
  write(tmp_path / "runs/b", system="smt", claim="A | B\nand C", published={}, seed=7)
  text = run(tmp_path)
  lines = text[text.index(report.HEADER) - 1 :].splitlines()
  assert lines[0] == "" and all(line.startswith("|") for line in lines[1:])
  assert cells(text)[1]["claim"] == r"A \| B and C"
  assert cells(text)[1]["published"] == "" and cells(text)[1]["seeds"] == "7"


def test_rows_are_kept_and_replaced(tmp_path):
  write(tmp_path / "runs/a")
  write(tmp_path / "runs/b", dataset="citeseer")
  first = run(tmp_path)
  again = run(tmp_path)
  assert again == first
  # The same key from another folder replaces its row, whatever its claim; others stay without their result.json.
  write(tmp_path / "other/deep/er", claim="New words.", metrics={"DAGNN": 83.0})
  rows = cells(run(tmp_path, tmp_path / "other"))
  assert [(r["data"], r["claim"], r["measured"]) for r in rows] == [
    ("citeseer", "Depth does not hurt.", "DAGNN: 84.5 ± 0.5<br>GCN: 81.25"),
    ("cora, public split", "New words.", "DAGNN: 83"),
  ]
  # Another command is another row.
  write(tmp_path / "other", command="python experiments/dagnn.py --seeds 20")
  assert len(cells(run(tmp_path, tmp_path / "other"))) == 3


def test_the_newest_of_two_results_wins(tmp_path):
  for folder, finished, value in (("z", "2020-01-01T00:00:00Z", 1.0), ("a", "2021-01-01T00:00:00Z", 2.0)):
    path = write(tmp_path / "runs" / folder, metrics={"DAGNN": value})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": finished}))
  assert [r["measured"] for r in cells(run(tmp_path))] == ["DAGNN: 2"]


def test_text_around_the_table_is_kept(tmp_path):
  write(tmp_path / "runs/a")
  text = run(tmp_path)
  edited = text.replace("# Results", "# What we found") + "\nA remark.\n"
  (tmp_path / "RESULTS.md").write_text(edited)
  assert run(tmp_path) == edited


def test_what_is_not_finite_is_said(tmp_path):
  write(tmp_path / "runs/a", metrics={"DAGNN": np.nan})
  assert cells(run(tmp_path))[0]["measured"] == "DAGNN: not finite"


def test_numbers_and_seeds():
  assert report.number(0.37231, 0.00449) == "0.3723 ± 0.0045"
  assert report.number(None, None) == ""
  assert [report.seeds(s) for s in (3, [3], [0, 1], [4, 5, 6], [1, 5, 8])] == ["3", "3", "0, 1", "4 to 6", "1, 5, 8"]


def test_bad_input_raises(tmp_path):
  with pytest.raises(ValueError, match="folders: got .*nowhere"):
    run(tmp_path, tmp_path / "nowhere")
  (tmp_path / "runs").mkdir()
  with pytest.raises(ValueError, match=r"folders: got no result\.json"):
    run(tmp_path)
  for damaged in ("{", "[]", "{}", '{"system": "a"}'):
    (tmp_path / "runs/result.json").write_text(damaged)
    with pytest.raises(ValueError, match=r"result\.json: got"):
      run(tmp_path)
  write(tmp_path / "runs")
  for table in ("# Other\n", f"{report.HEADER}\n{report.RULE}\n| one | two |\n"):
    (tmp_path / "RESULTS.md").write_text(table)
    with pytest.raises(ValueError, match="output: got"):
      run(tmp_path)
    assert (tmp_path / "RESULTS.md").read_text() == table  # left as it was
  assert not list(tmp_path.glob(".RESULTS*"))
