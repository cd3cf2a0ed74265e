"""Results and figures: complete, atomic, and refused when they would mislead."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlab import train
from jaxlab.train import figures
from jaxlab.train import result as result_module


@dataclasses.dataclass
class Config:
  rate: float = 0.1
  folder: Path = Path("results")


def write(workdir, **changes):
  arguments = {
    "system": "dagnn",
    "claim": "deeper is better",
    "dataset": "digits, 1797 nodes",
    "config": Config(),
    "metrics": {"accuracy": np.array([0.5, 0.7]), "loss": np.float32(1.5), "gap": float("nan")},
    "published": {"accuracy": {"value": 0.84, "std": 0.005, "source": "Table 2"}, "loss": 2},
    "seed": [0, 1],
    "wall_time": 12.34567,
    "command": "python experiments/dagnn.py",
    **changes,
  }
  return train.write_result(workdir, **arguments)


def test_result_holds_everything(tmp_path):
  path = write(tmp_path / "new" / "run")
  result = json.loads(path.read_text())
  assert path == tmp_path / "new" / "run" / "result.json"
  assert [p.name for p in path.parent.iterdir()] == ["result.json"]
  accuracy = result["metrics"]["accuracy"]
  assert accuracy["values"] == [0.5, 0.7]
  np.testing.assert_allclose((accuracy["mean"], accuracy["std"], accuracy["n"]), (0.6, 0.2 / np.sqrt(2), 2))
  assert result["metrics"]["loss"] == {"mean": 1.5, "std": None, "n": 1, "values": [1.5]}
  assert result["metrics"]["gap"]["mean"] is None
  assert result["published"] == {"accuracy": {"value": 0.84, "std": 0.005, "source": "Table 2"}, "loss": {"value": 2.0}}
  assert result["config"] == {"rate": 0.1, "folder": "results"}
  assert result["versions"]["jax"] == jax.__version__
  assert result["versions"]["python"] == sys.version.split()[0]
  assert result["device"]["platform"] == jax.default_backend()
  assert result["device"]["count"] == jax.device_count()
  assert result["command"] == "python experiments/dagnn.py"
  assert result["wall_time"] == 12.346


def test_infinite_settings_become_text(tmp_path):
  result = json.loads(write(tmp_path, config={"clip": float("inf"), "rate": [float("nan"), 0.5]}).read_text())
  assert result["config"] == {"clip": "Infinity", "rate": ["NaN", 0.5]}


def test_report_writes_and_shows(tmp_path, capsys):
  fields = {"system": "dagnn", "claim": "as it is", "dataset": "digits", "config": {}, "seed": [0, 1], "wall_time": 1.0}
  train.report(tmp_path, metrics={"hits": [0.5, 0.75], "loss": float("nan")}, published={"hits": 0.875}, **fields)
  shown = capsys.readouterr().out
  assert all(word in shown for word in ("digits", "0.625", "0.1768", "2", "published", "0.875", str(tmp_path)[:20]))
  seen = []
  train.report(tmp_path, metrics={"hits": 1}, published={}, show=seen.append, **fields)
  assert seen == [json.loads((tmp_path / "result.json").read_text())]
  result_module.print_metrics(seen[0])
  assert "published" not in capsys.readouterr().out


def test_a_finished_result_is_found_by_its_settings(tmp_path, capsys):
  assert result_module.finished_result(tmp_path, Config()) is None
  path = write(tmp_path)
  assert result_module.finished_result(tmp_path, Config()) == json.loads(path.read_text())
  assert "Finished on" in capsys.readouterr().out
  assert result_module.finished_result(tmp_path, result_module.settings(Config())) is not None
  assert result_module.finished_result(tmp_path, Config(rate=0.2)) is None


def test_settings_of_a_run():
  assert result_module.settings(Config(), without=("rate",), seed=3) == {
    name: value for name, value in result_module.settings(Config()).items() if name != "rate"
  } | {"seed": 3}
  with pytest.raises(ValueError, match=r"without: got \['rates'\]"):
    result_module.settings(Config(), without=("rates",))


def test_metrics_as_a_table(tmp_path, capsys):
  result_module.print_metrics(json.loads(write(tmp_path).read_text()))
  printed = capsys.readouterr().out
  assert "digits, 1797 nodes" in printed and "0.6" in printed and "0.1414" in printed


def test_a_failed_write_leaves_the_old_result(tmp_path):
  before = write(tmp_path).read_text()
  with pytest.raises(TypeError):
    write(tmp_path, seed=object())
  assert (tmp_path / "result.json").read_text() == before


def test_command_is_relative(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "argv", [str(tmp_path / "experiments" / "x.py"), "--name", "two words"])
  monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
  result = json.loads(write(tmp_path, command=None).read_text())
  assert result["command"] == "python experiments/x.py --name 'two words'"


@pytest.mark.parametrize(
  ("name", "changes"),
  [
    ("system", {"system": ""}),
    ("claim", {"claim": " "}),
    ("dataset", {"dataset": None}),
    ("config", {"config": [1]}),
    ("config", {"config": Config}),
    ("metrics", {"metrics": {}}),
    ("metrics", {"metrics": {"a": np.zeros((2, 2))}}),
    ("metrics", {"metrics": {"a": "high"}}),
    ("metrics", {"metrics": {"a": []}}),
    ("published", {"published": {"a": "84%"}}),
    ("published", {"published": {"a": {"source": "Table 1"}}}),
    ("wall_time", {"wall_time": -1}),
    ("wall_time", {"wall_time": "fast"}),
  ],
)
def test_bad_input_names_the_argument(tmp_path, name, changes):
  with pytest.raises(ValueError, match=rf"^{name}\b.*got .*expected "):
    write(tmp_path, **changes)
  assert not (tmp_path / "result.json").exists()


def test_curves_draw_mean_and_band(tmp_path):
  figure, axes = figures.subplots(1, 2)
  x, runs = np.arange(5), np.random.default_rng(0).normal(size=(5, 4))
  figures.curves(axes[0, 0], {"runs": (x, runs), "one": (x, x)}, xlabel="step", ylabel="loss", title="t")
  lines = axes[0, 0].get_lines()
  np.testing.assert_allclose(lines[0].get_ydata(), runs.mean(1))
  np.testing.assert_allclose(lines[1].get_ydata(), x)
  (band,) = axes[0, 0].collections
  heights = band.get_paths()[0].vertices[:, 1]
  np.testing.assert_allclose(heights.max(), (runs.mean(1) + runs.std(1, ddof=1)).max())
  assert [text.get_text() for text in axes[0, 0].get_legend().get_texts()] == ["runs", "one"]
  for suffix, head in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
    path = figures.save(figure, tmp_path / "new" / f"figure{suffix}")
    assert path.read_bytes().startswith(head)
  assert len(list((tmp_path / "new").iterdir())) == 2


def test_bad_figures_are_refused(tmp_path):
  figure, axes = figures.subplots()
  with pytest.raises(ValueError, match=r"^series: got x \(3,\) and y \(4,\) for 'a', expected"):
    figures.curves(axes[0, 0], {"a": (np.arange(3), np.arange(4))})
  with pytest.raises(ValueError, match=r"^path: got figure.xyz, expected a suffix"):
    figures.save(figure, tmp_path / "figure.xyz")


def test_no_metrics_to_read(tmp_path):
  with pytest.raises(ValueError, match=r"^workdir: got .*expected a folder with metrics.jsonl"):
    train.read_metrics(tmp_path)


def test_what_was_made_is_read_unless_settings_differ(tmp_path):
  path, calls = tmp_path / "new" / "found.json", []

  def make():
    calls.append(None)
    return {"second": np.arange(2), "first": np.float32(0.5), "text": "a"}

  expected = {"second": [0, 1], "first": 0.5, "text": "a"}
  for rate, count in ((0.1, 1), (0.1, 1), (0.2, 2), (0.2, 2)):
    found = result_module.once(path, make, Config(rate))
    assert found == expected and list(found) == list(expected)
    assert len(calls) == count
  assert [file.name for file in path.parent.iterdir()] == ["found.json"]
  bare = tmp_path / "bare.json"
  assert result_module.once(bare, make) == result_module.once(bare, make) == expected
  assert len(calls) == 3
