import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import mend as experiment
from jaxlab.data import facts
from jaxlab.data.files import MissingFile

TINY = dataclasses.replace(
  experiment.DEMO, relations=("continent",), max_words=1, width=8, depth=1, heads=1, edited_blocks=1, model_steps=20,
  model_batch=8, editor_steps=6, rank=4, problems=2, locality=2, tune_steps=2, tune_rates=(1e-2, 1e-1), scales=(1.0,),
  many=(1,), validation_problems=4, test_problems=4, ablations=(), sizes=(8,), seeds=1,
)  # fmt: skip


def test_runs_end_to_end_and_resumes(tmp_path):
  config = dataclasses.replace(TINY, edits=2, ablations=("only d",), workdir=tmp_path)
  try:
    experiment.load(config, 0)
  except MissingFile as error:
    pytest.skip(str(error))
  experiment.main(config)
  folder = tmp_path / "demo"
  result = json.loads((folder / "result.json").read_text())
  rows = {name: metric["mean"] for name, metric in result["metrics"].items()}
  for method in ("MEND", *experiment.METHODS, "only d"):
    assert 0 <= rows[f"{method}: success (%)"] <= 100 and -100 <= rows[f"{method}: drawdown (points)"] <= 100
  assert (folder / "figure.png").stat().st_size > 20_000
  before = (folder / "result.json").read_text()
  experiment.main(config)  # finished: nothing is measured again
  assert (folder / "result.json").read_text() == before


def test_a_limit_on_drawdown_chooses_among_what_keeps_to_it():
  success = np.array([[0.1, 0.5, 0.9], [0.3, 0.6, 0.8]])
  drawdown = np.array([[0.0, 0.2, 0.5], [0.1, 0.05, 0.3]])
  curves = np.stack([success, drawdown], axis=-1)
  assert experiment.choose(curves, 0.2) == (1, 1)
  assert experiment.choose(curves, 0.04) == (0, 0)
  assert experiment.choose(curves, 1.0) == (0, 2)
  assert experiment.choose(curves, -1.0) == (0, 0)  # none keeps to it: the least drawdown


def test_the_editor_meets_neither_the_countries_nor_the_wordings_that_it_is_tested_on():
  assert not set(experiment.KNOWN) & set(experiment.UNSEEN)
  assert sorted(experiment.KNOWN + experiment.UNSEEN) == list(range(facts.NUM_WORDINGS))
  try:
    task = experiment.load(TINY, 0)
  except MissingFile as error:
    pytest.skip(str(error))
  countries = [set(part[:, 0]) for part in task.parts.values()]
  assert not countries[0] & countries[1] and not countries[0] & countries[2] and not countries[1] & countries[2]
  batch = experiment.problems_of(TINY, task, "test", 0, edits=2)
  words = [facts._RELATIONS["continent"][3][w].format("").split()[0] for w in experiment.UNSEEN]
  first = {task.sentences.words[token] for token in batch["paraphrase"]["tokens"][..., 0].reshape(-1)}
  assert first <= set(words)


@pytest.mark.parametrize("name", experiment.ABLATIONS)
def test_editors_without_a_part_train_on_several_edits(name, monkeypatch):
  config = dataclasses.replace(TINY, edits=3)
  try:
    task = experiment.load(config, 0)
  except MissingFile as error:
    pytest.skip(str(error))
  monkeypatch.setattr(experiment.train, "fit", lambda learner, batches, **_: (learner, batches(0)))
  tokens = np.zeros((1, task.sentences.length), "int32")
  base = jax.eval_shape(experiment.network(config, task).init, jax.random.key(0), tokens)
  base = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), base)
  less = experiment.editor_learner(config, task, base, **experiment.ABLATIONS[name])
  learner, batch = experiment.train_editor(config, task, less, 0, None, name)
  assert batch["edit"]["tokens"].shape[:2] == batch["paraphrase"]["tokens"].shape[:2] == (2, 3)
  state = jax.eval_shape(learner.init, jax.random.key(0), batch)
  after, metrics = jax.eval_shape(learner.step, state, batch)
  assert jax.tree.structure(after) == jax.tree.structure(state) and metrics["success"].shape == ()
  assert experiment.editor_of(config, **experiment.ABLATIONS[name]) != experiment.editor_of(config)


def test_paper_preset_is_the_published_recipe():
  config = experiment.parse(["--preset", "paper"])
  assert (config.rank, config.editor_rate, config.step_size_rate, config.step_size) == (1920, 1e-6, 1e-4, 1e-4)
  assert (config.edit_weight, config.problems, config.editor_steps) == (0.1, 10, 50_000)
  assert experiment.targets(config) == tuple(f"block{i}/mlp/fc{k}" for i in (3, 4, 5) for k in (1, 2))
  assert experiment.parse(["--preset", "paper", "--seeds", "1"]) == dataclasses.replace(config, seeds=1)


@pytest.mark.parametrize(
  ("change", "argument"),
  [
    ({"seeds": 0}, "seeds"),
    ({"edited_blocks": 2}, "edited_blocks"),
    ({"tune_rates": ()}, "tune_rates"),
    ({"edits": 0}, "edits"),
    ({"ablations": ("no norm",)}, "ablations"),
  ],
)
def test_bad_settings(change, argument):
  with pytest.raises(ValueError, match=f"^{argument}: got "):
    experiment.main(dataclasses.replace(TINY, **change))
