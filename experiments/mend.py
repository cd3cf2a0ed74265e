"""Editing a small language model's facts: MEND beside fine-tuning, on countries that the editor never saw.

    python experiments/mend.py                     # minutes on two cores, three seeds
    python experiments/mend.py --preset paper      # the paper's editor recipe on a model of distilGPT-2's size
    # an editor trained to change 25 facts at once
    python experiments/mend.py --edits 25 --step-size 2e-4 --step-size-rate 4e-5 --workdir runs/mend25
    python experiments/mend.py --ablations 'only x' 'only d'       # editors without a part, also trained and measured

For each seed a decoder language model learns facts about countries in five wordings each. An editor is trained on some
countries and three wordings. Then facts of other countries change: the model is told "the capital of Kenya is Lima" and
asked in wordings that the editor never met, "in Kenya the capital is called". Success is the fraction of right answers,
drawdown the accuracy lost on facts that should stay. Fine-tuning, with and without a KL term, changes the same weights;
its learning rate and number of steps are those with the highest success on validation countries among all whose
drawdown there is at most the editor's. MEND has one setting, and is not tuned on them.

The figure shows success against drawdown (of MEND with its edits scaled, of fine-tuning after each step), success when
several facts change at once, and the memory and time of an edit against the size of the model.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich

from jaxlab import checks, memory, train
from jaxlab.data import facts as country_facts
from jaxlab.learning import mend
from jaxlab.models import language
from jaxlab.train import command
from jaxlab.train.result import finished_result, once, print_metrics, settings

Ablation = Literal[
  "without normalisation", "no sharing", "no identity start", "only x", "only d", "only the smaller"
]  # fmt: skip
ABLATIONS: dict[str, dict[str, Any]] = {
  "without normalisation": {"normalize": False},
  "no sharing": {"shared": False},
  "no identity start": {"start": "xavier"},
  "only x": {"variant": "inputs"},
  "only d": {"variant": "deltas"},
  "only the smaller": {"variant": "smaller"},
}


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  relations: tuple[str, ...] = ("capital", "currency", "continent", "region")
  """Which facts."""
  max_words: int | None = 2
  """Countries and answers with longer names are left out."""
  width: int = 64
  """Of the language model."""
  depth: int = 2
  """Its blocks."""
  heads: int = 4
  """Its attention heads."""
  edited_blocks: int = 2
  """The MLPs of so many last blocks can be edited."""
  model_steps: int = 400
  """Updates of the language model."""
  model_rate: float = 5e-3
  """Its peak learning rate (AdamW, warm-up and cosine)."""
  model_batch: int = 128
  """Its sentences in a batch."""
  editor_steps: int = 400
  """Updates of the editor."""
  rank: int = 128
  """Of the editor's weights."""
  editor_rate: float = 1e-3
  """Learning rate of the editor's networks."""
  step_size_rate: float = 1e-3
  """Learning rate of the editor's step sizes."""
  step_size: float = 5e-3
  """The step sizes at first. Edits made at once add up: both this and its rate suit one edit, so divide by `edits`."""
  decay: bool = True
  """Both rates fall to zero along a cosine."""
  edit_weight: float = 0.3
  """c_e: of the edit loss beside the KL divergence."""
  problems: int = 10
  """Editing problems in a step of the editor's training."""
  edits: int = 1
  """Facts that change at once in each of them."""
  locality: int = 6
  """Facts that should stay, of each problem."""
  tune_steps: int = 20
  """Most steps of fine-tuning."""
  tune_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
  """Its learning rates (Adam)."""
  tune_weight: float = 0.1
  """c_e of fine-tuning with KL."""
  scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
  """What MEND's edits are multiplied by, for the figure; 1 is the method."""
  many: tuple[int, ...] = (1, 5, 25)
  """Facts that change at once."""
  validation_problems: int = 60
  """On which fine-tuning is tuned."""
  test_problems: int = 60
  """On which all is measured."""
  ablations: tuple[Ablation, ...] = ("without normalisation",)
  """Editors without a part, trained too."""
  sizes: tuple[int, ...] = (64, 128, 256)
  """Widths of the models whose edits are timed."""
  seeds: int = 3
  """How many."""
  preset: Literal["demo", "paper"] = "demo"
  """Defaults of the other options."""
  workdir: pathlib.Path = pathlib.Path("runs/mend")
  """Each preset has a folder in here with checkpoints, metrics, figure and result.json; a second run resumes."""


DEMO = Config()
# Rank, rates, c_e, ten problems a step and 500,000 / 10 steps are the paper's, the model has distilGPT-2's size.
PAPER = dataclasses.replace(
  DEMO, relations=country_facts.RELATIONS, max_words=None, width=768, depth=6, heads=12, edited_blocks=3,
  model_steps=20_000, model_rate=3e-4, editor_steps=50_000, rank=1920, editor_rate=1e-6, step_size_rate=1e-4,
  step_size=1e-4, decay=False, edit_weight=0.1, problems=10, tune_steps=100,
  tune_rates=(1e-6, 1e-5, 1e-4, 1e-3), tune_weight=1e-2, many=(1, 5, 25, 75, 125),
  test_problems=500, validation_problems=500, preset="paper",
)  # fmt: skip
PRESETS = {"demo": DEMO, "paper": PAPER}
parse = command.parser(PRESETS, __doc__)
# An editor meets the first wordings only; edits are asked for in the others.
KNOWN, UNSEEN = (0, 1, 2), (3, 4)
PARTS = {"train": 0.6, "validation": 0.15, "test": 0.25}  # of the countries
METHODS = ("fine-tuning", "fine-tuning + KL")


@dataclasses.dataclass(frozen=True)
class Task:
  """The facts, their sentences, and the triples of each part of the countries."""

  facts: country_facts.Facts
  sentences: country_facts.Sentences
  parts: dict[str, np.ndarray]


def load(config: Config, seed: int) -> Task:
  """The facts, countries split by `seed`."""
  facts = country_facts.load(config.relations, max_words=config.max_words)
  parts = country_facts.split_subjects(facts, list(PARTS.values()), seed=seed)
  return Task(facts, country_facts.Sentences(facts), dict(zip(PARTS, parts, strict=True)))


def network(config: Config, task: Task) -> language.LanguageModel:
  """The language model."""
  return language.LanguageModel(
    len(task.sentences.words), config.width, config.depth, config.heads, task.sentences.length
  )


def targets(config: Config) -> tuple[str, ...]:
  """The weights to edit: the MLPs of the last blocks."""
  blocks = range(config.depth - config.edited_blocks, config.depth)
  return tuple(f"block{i}/mlp/{layer}" for i in blocks for layer in ("fc1", "fc2"))


def train_model(config: Config, task: Task, seed: int, folder: pathlib.Path) -> tuple[dict[str, Any], float]:
  """Variables of a language model that has read all facts in all wordings, and its accuracy on them."""
  facts, sentences = task.facts, task.sentences

  def batches(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, 0, step])
    chosen = facts.triples[rng.integers(0, len(facts.triples), config.model_batch)]
    batch = sentences.encode(chosen, rng.integers(0, country_facts.NUM_WORDINGS, config.model_batch))
    return {**batch, "mask": batch["tokens"] != country_facts.PAD}  # it learns to say the whole sentence

  rate = optax.warmup_cosine_decay_schedule(0.0, config.model_rate, config.model_steps // 20, config.model_steps)
  learner = train.supervised(
    network(config, task), language.next_token, optax.adamw(rate, weight_decay=0.01, mask=train.decay_mask),
    inputs=lambda batch: batch["tokens"],
  )  # fmt: skip
  state = train.fit(
    learner,
    batches,
    steps=config.model_steps,
    workdir=folder,
    key=jax.random.key(seed),
    config=_setting(config, "model"),
  )
  accuracy = jax.jit(lambda batch: learner.evaluate(state, batch)["accuracy"])
  every = [accuracy(sentences.encode(facts.triples, wording)) for wording in range(country_facts.NUM_WORDINGS)]
  return {"params": state.params}, float(np.mean(every))


def editor_of(config: Config, **changes: Any) -> mend.Editor:
  """An editor of the target weights; changes are those of `ABLATIONS`."""
  return mend.Editor(targets(config), rank=config.rank, step_size=config.step_size, **changes)


def editor_learner(config: Config, task: Task, base: dict[str, Any], **changes: Any) -> train.Learner:
  """Trains an editor, and measures any; changes as of `editor_of`."""
  rate = lambda peak: optax.cosine_decay_schedule(peak, config.editor_steps) if config.decay else peak
  tx = mend.optimizer(rate(config.editor_rate), step_size_rate=rate(config.step_size_rate))
  editor = editor_of(config, **changes)
  return mend.learner(network(config, task), base, editor, tx, edit_weight=config.edit_weight)


def train_editor(
  config: Config, task: Task, learner: train.Learner, seed: int, folder: pathlib.Path, name: str
) -> mend.EditorState:
  """An editor, from edits of the training countries in the known wordings."""

  def batches(step: int) -> Any:
    return country_facts.edit_pairs(
      task.facts, task.sentences, task.parts["train"], problems=config.problems, edits=config.edits,
      locality=config.locality, edit_wordings=KNOWN, paraphrase_wordings=KNOWN, seed=[seed, 1, step],
    )  # fmt: skip

  return train.fit(
    learner, batches, steps=config.editor_steps, workdir=folder, key=jax.random.key(seed), config=_setting(config, name)
  )


def problems_of(config: Config, task: Task, part: str, seed: int, *, edits: int = 1) -> dict[str, Any]:
  """Edits of countries that the editor has not met, asked for in wordings that it has not met."""
  count = {"validation": config.validation_problems, "test": config.test_problems}[part]
  return country_facts.edit_pairs(
    task.facts, task.sentences, task.parts[part], problems=max(2, count // edits) if edits > 1 else count, edits=edits,
    locality=config.locality, edit_wordings=KNOWN, paraphrase_wordings=UNSEEN, seed=[seed, 2, len(part), edits],
  )  # fmt: skip


def tune(
  config: Config, task: Task, base: dict[str, Any], batch: dict[str, Any], kept: dict[str, Any], method: str
) -> np.ndarray:
  """Fine-tuning of each problem by itself.

  Args:
    config: settings.
    task: facts.
    base: the model.
    batch: problems, measured on.
    kept: other problems, whose locality sentences the KL term sees.
    method: of `METHODS`.

  Returns:
    Success and drawdown after each step with each rate: [rates, problems, steps, 2].
  """
  model, kl = network(config, task), method != METHODS[0]

  @jax.jit
  def run(base: dict[str, Any], rate: float, batch: dict[str, Any], kept: dict[str, Any]) -> jax.Array:
    def one(edit: Any, asked: Any, stay: Any, regular: Any) -> jax.Array:
      success = lambda now, given: language.sentence_success(
        model.apply(now, given["tokens"]), given["tokens"], given["mask"]
      ).mean()
      before = success(base, stay)
      measure = lambda now: jnp.stack([success(now, asked), before - success(now, stay)])
      _, found = mend.fine_tune(
        model, base, targets(config), edit, optax.adam(rate), steps=config.tune_steps,
        locality=regular if kl else None, edit_weight=config.tune_weight if kl else 1.0, measure=measure,
      )  # fmt: skip
      return found

    return jax.vmap(one)(batch["edit"], batch["paraphrase"], batch["locality"], kept["locality"])

  return np.stack([np.asarray(run(base, rate, batch, kept)) for rate in config.tune_rates])


def choose(curves: np.ndarray, allowed: float) -> tuple[int, int]:
  """Rate and step with the highest success among those of at most this drawdown; else those of the least drawdown."""
  success, drawdown = curves[..., 0], curves[..., 1]
  fits = drawdown <= allowed + 1e-9
  score = np.where(fits, success, -1 - drawdown)
  rate, step = np.unravel_index(np.argmax(score), score.shape)
  return int(rate), int(step)


def scaled(state: mend.EditorState, scale: float) -> mend.EditorState:
  """The editor whose edits are `scale` times as large."""
  sizes = state.params["step_sizes"] * scale
  return dataclasses.replace(state, params={**state.params, "step_sizes": sizes})


def run_seed(config: Config, seed: int, folder: pathlib.Path) -> dict[str, Any]:
  """All that is measured of one seed."""
  task = load(config, seed)
  base, accuracy = train_model(config, task, seed, folder / "model")
  rich.print(f"seed {seed}: the model knows {100 * accuracy:.1f} % of {5 * len(task.facts.triples)} sentences")
  validation, test = (problems_of(config, task, part, seed) for part in ("validation", "test"))
  both = jax.tree.map(lambda *parts: np.concatenate(parts), validation, test)
  regular = country_facts.edit_pairs(
    task.facts, task.sentences, task.parts["train"], problems=config.validation_problems + config.test_problems,
    locality=config.locality, seed=[seed, 3],
  )  # fmt: skip
  learner = editor_learner(config, task, base)
  state = train_editor(config, task, learner, seed, folder / "editor", "editor")
  evaluate = jax.jit(learner.evaluate)
  point = lambda state, batch: np.array([float(evaluate(state, batch)[name]) for name in ("success", "drawdown")])
  allowed = point(state, validation)[1]
  found: dict[str, Any] = {
    "accuracy": accuracy,
    "MEND": point(state, test),
    "same words": float(evaluate(state, test)["edit_success"]),
    "MEND curve": np.stack([point(scaled(state, scale), test) for scale in config.scales]),
    "many": [point(state, problems_of(config, task, "test", seed, edits=edits)) for edits in config.many],
  }
  for name in config.ablations:
    less = editor_learner(config, task, base, **ABLATIONS[name])
    less_state = train_editor(config, task, less, seed, folder / name.replace(" ", "-"), name)
    values = jax.jit(less.evaluate)(less_state, test)
    found[name] = np.array([float(values["success"]), float(values["drawdown"])])
  for method in METHODS:
    every = tune(config, task, base, both, regular, method)
    tuned, curves = (part.mean(axis=1) for part in np.split(every, [config.validation_problems], axis=1))
    rate, step = choose(tuned, allowed)
    best = choose(tuned, np.inf)
    found[method] = curves[rate, step]
    found[f"{method} choice"] = (config.tune_rates[rate], step + 1)
    found[f"{method} without limit"] = curves[best]
    found[f"{method} curve"] = curves
  for name in ("MEND", *METHODS):
    rich.print(f"seed {seed}: {name}: success {found[name][0]:.3f}, drawdown {found[name][1]:.3f}")
  return found


def measured(config: Config, seed: int, folder: pathlib.Path) -> dict[str, Any]:
  """`run_seed`, or what it found before under the same settings."""
  make = functools.partial(run_seed, config, seed, folder)
  return once(folder / "measured.json", make, dataclasses.replace(config, seeds=1))


def costs(config: Config, task: Task) -> dict[str, np.ndarray]:
  """Of models of several widths: parameters; megabytes of editor, of an edit's scratch memory; seconds of an edit.

  Beside them the same of as many steps of fine-tuning as the settings allow. Weights are random.
  """
  rows: dict[str, list[float]] = {
    name: [] for name in ("parameters", "editor", "edit", "fine-tuning", "edit time", "fine-tuning time")
  }
  example = problems_of(config, task, "test", 0)
  sentence = jax.tree.map(lambda a: jnp.asarray(a[0]), example["edit"])
  for width in config.sizes:
    sized = dataclasses.replace(config, width=width)
    model, editor = network(sized, task), editor_of(sized)
    base = jax.jit(model.init)(jax.random.key(0), sentence["tokens"])
    state = jax.jit(editor_learner(sized, task, base).init)(jax.random.key(0), example)
    one_edit = jax.jit(functools.partial(mend.edit, model, editor=editor)).lower(
      base, trained=state.variables, sentences=sentence
    )
    steps = jax.jit(
      lambda base, sentence, model=model: mend.fine_tune(
        model, base, targets(config), sentence, optax.adam(1e-3), steps=config.tune_steps
      )[0]
    ).lower(base, sentence)
    edit, tuned = one_edit.compile(), steps.compile()
    rows["parameters"].append(sum(leaf.size for leaf in jax.tree.leaves(base)))
    rows["editor"].append(sum(leaf.nbytes for leaf in jax.tree.leaves(state.params)) / 1e6)
    for name, program in (("edit", edit), ("fine-tuning", tuned)):
      rows[name].append(program.memory_analysis().temp_size_in_bytes / 1e6)
    rows["edit time"].append(_seconds(functools.partial(edit, base, trained=state.variables, sentences=sentence)))
    rows["fine-tuning time"].append(_seconds(functools.partial(tuned, base, sentence)))
  return {name: np.array(values, float) for name, values in rows.items()}


def draw(config: Config, runs: list[dict[str, Any]], cost: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Success against drawdown, against edits at once, and what an edit costs."""
  figure, axes = train.figures.subplots(2, 2, width=5.0, height=3.7)
  mean = lambda name: np.mean([run[name] for run in runs], axis=0)
  for color, method in zip(train.figures.COLORS[1:], METHODS, strict=False):
    for k, curve in enumerate(mean(f"{method} curve")):
      axes[0, 0].plot(100 * curve[:, 1], 100 * curve[:, 0], ".-", color=color, alpha=0.5, lw=0.8, ms=3,
                      label=f"{method}, steps at {len(config.tune_rates)} rates" if not k else None)  # fmt: skip
    axes[0, 0].plot(*(100 * mean(method)[::-1]), "D", color=color, ms=7, mec="white", label=f"{method}, chosen")
  curve = mean("MEND curve")
  axes[0, 0].plot(100 * curve[:, 1], 100 * curve[:, 0], ".-", color=train.figures.COLORS[0], label="MEND, edits scaled")
  axes[0, 0].plot(*(100 * mean("MEND")[::-1]), "o", color=train.figures.COLORS[0], ms=9, mec="white", label="MEND")
  axes[0, 0].set(
    xlabel="drawdown (points of accuracy)", ylabel="success on unseen wordings (%)",
    title=f"One fact changed, unseen countries, {len(runs)} seeds",
  )  # fmt: skip
  axes[0, 0].legend(fontsize=7)
  many = 100 * np.array([run["many"] for run in runs])  # [seeds, counts, 2]
  series = {"success": (np.array(config.many), many[..., 0].T), "drawdown": (np.array(config.many), many[..., 1].T)}
  train.figures.curves(
    axes[0, 1],
    series,
    xlabel="facts changed at once",
    ylabel="%",
    title=f"Several edits, editor trained on {config.edits} at once",
  )
  axes[0, 1].set_ylim(0, 100)
  steps = config.tune_steps
  memories = {"weights of the model": 4e-6 * cost["parameters"], "weights of the editor": cost["editor"],
              "scratch of a MEND edit": cost["edit"], "scratch of fine-tuning": cost["fine-tuning"]}  # fmt: skip
  times = {"MEND edit": 1e3 * cost["edit time"], f"{steps} steps of fine-tuning": 1e3 * cost["fine-tuning time"]}
  for place, curves, what, unit in ((axes[1, 0], memories, "memory", "MB"), (axes[1, 1], times, "time", "ms")):
    train.figures.curves(
      place, {name: (cost["parameters"] / 1e6, values) for name, values in curves.items()},
      xlabel="million parameters of the model", ylabel=f"{what} ({unit})", title=f"The {what} of an edit",
    )  # fmt: skip
    place.set(xscale="log", yscale="log")
    place.set_xticks([], minor=True)
    place.set_xticks(cost["parameters"] / 1e6, [f"{millions:.2g}" for millions in cost["parameters"] / 1e6])
    for line in place.lines:
      line.set_marker("o")
  train.figures.save(figure, path)


def main(config: Config) -> None:
  """Trains what is not trained yet, then edits, draws and reports."""
  memory.keep()
  for name in (
    "model_steps",
    "editor_steps",
    "tune_steps",
    "problems",
    "edits",
    "seeds",
    "test_problems",
    "validation_problems",
  ):
    checks.count(name, getattr(config, name))
  checks.count("edited_blocks", config.edited_blocks, 1, config.depth)
  for name in config.ablations:
    checks.choice("ablations", name, Ablation)
  for name in ("tune_rates", "scales", "many", "sizes"):
    if not getattr(config, name):
      raise ValueError(f"{name}: got none, expected at least one")
  folder, start = config.workdir / config.preset, time.perf_counter()
  record = {name: value for name, value in settings(config).items() if name != "workdir"}
  if result := finished_result(folder, record):
    return print_metrics(result)
  runs = [measured(config, seed, folder / f"seed{seed}") for seed in range(config.seeds)]
  cost = costs(config, load(config, 0))
  draw(config, runs, cost, folder / "figure.png")
  of = lambda name, k: np.array([100 * run[name][k] for run in runs])
  metrics = {}
  rows = ("MEND", *METHODS, *config.ablations)
  for name in (*rows, *(f"{method} without limit" for method in METHODS)):
    metrics |= {f"{name}: success (%)": of(name, 0), f"{name}: drawdown (points)": of(name, 1)}
  metrics["MEND: success in the edit's own words (%)"] = np.array([100 * run["same words"] for run in runs])
  for k, edits in enumerate(config.many):
    metrics[f"MEND, {edits} edits at once: success (%)"] = np.array([100 * run["many"][k][0] for run in runs])
    metrics[f"MEND, {edits} edits at once: drawdown (points)"] = np.array([100 * run["many"][k][1] for run in runs])
  metrics["facts that the model knows (%)"] = np.array([100 * run["accuracy"] for run in runs])
  metrics[f"time of {config.tune_steps} steps of fine-tuning over that of an edit, largest model"] = (
    cost["fine-tuning time"][-1] / cost["edit time"][-1]
  )
  for run, seed in zip(runs, range(config.seeds), strict=True):
    rich.print(f"seed {seed}: rate and steps: " + ", ".join(f"{m} {run[f'{m} choice']}" for m in METHODS))
  train.report(
    folder,
    system="mend",
    claim="Success of MEND's edits in unseen wordings of unseen countries' facts, beside fine-tuning at its drawdown.",
    dataset=f"facts about countries ({', '.join(config.relations)}), language model of width {config.width}",
    config=record,
    metrics=metrics,
    published={},
    seed=list(range(config.seeds)),
    wall_time=time.perf_counter() - start,
  )


def _setting(config: Config, part: str) -> dict[str, Any]:
  """The settings that a part's training depends on, so that others may change without training it again."""
  names = ["relations", "max_words", "width", "depth", "heads", "model_steps", "model_rate", "model_batch"]
  if part != "model":
    names += [
      "edited_blocks",
      "editor_steps",
      "rank",
      "editor_rate",
      "step_size_rate",
      "step_size",
      "decay",
      "edit_weight",
    ]
    names += ["problems", "edits", "locality"]
  return {"part": part, **{name: getattr(config, name) for name in names}}


def _seconds(run: Any, times: int = 7) -> float:
  """Median time of a run after the first."""
  jax.block_until_ready(run())
  taken = []
  for _ in range(times):
    start = time.perf_counter()
    jax.block_until_ready(run())
    taken.append(time.perf_counter() - start)
  return float(np.median(taken))


if __name__ == "__main__":
  main(parse())
