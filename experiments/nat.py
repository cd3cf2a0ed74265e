"""NAT beside EdgeBank on streams of real contacts and mails: which of two people does the next event reach?

    python experiments/nat.py                                            # mails between 142 people, minutes
    python experiments/nat.py --dataset primary_school --mode inductive  # face-to-face contacts, unseen people
    python experiments/nat.py --ablation                                 # attention for the sum; one hop; none
    python experiments/nat.py --preset paper --dataset wikipedia         # the published recipe

The protocol is that of the official code: a split by quantiles of time, one negative for each event, drawn evenly among
the receivers known at the time, an early stop on validation average precision. Tests go on from the memory after
validation; inductive ones stream all that came before, then ask for edges of people that training never saw. Average
precision (AP) is given pooled over the test and, as published, as the mean over batches of 32 events.

EdgeBank (Poursafaei et al., NeurIPS 2022) says yes where the pair has met before. Beside the plain form, which
remembers everything, stands the best of four on validation: all or a window of time as long as the test, with or
without regard to direction. NAT's learning rate was picked on validation as well (`--tune`, result in
`LEARNING_RATE`).
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import rich.table
from sklearn.metrics import average_precision_score, roc_auc_score

from jaxlab import memory, train
from jaxlab.data import temporal
from jaxlab.data.temporal import Batches, EventStream, Split
from jaxlab.graph.links import nat
from jaxlab.train import command
from jaxlab.train.result import finished_result, print_metrics, settings


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  dataset: Literal[
    "email-Enron", "email-Eu", "contact-high-school", "contact-primary-school", "primary_school", "hospital",
    "communities", "wikipedia", "reddit",
  ] = "email-Enron"  # fmt: skip
  """Mails and contacts from SNAP and SocioPatterns, a synthetic stream, or the paper's."""
  mode: Literal["transductive", "inductive"] = "transductive"
  """Whether the test is about all people or those that were hidden from training."""
  seeds: int = 5
  """Independent runs: weights, hash, negatives, hidden people."""
  epochs: int = 8
  """Most passes over the training events."""
  batch_size: int = 100
  """Events that are scored before the memory changes."""
  learning_rate: float = 0.0
  """Of Adam; 0 for the one in `LEARNING_RATE`."""
  preset: Literal["demo", "paper"] = "demo"
  """paper: up to 50 epochs at learning rate 1e-4."""
  ablation: bool = False
  """Also train with attention, with one hop and with none."""
  tune: bool = False
  """Only try learning rates: validation AP of two seeds that no result uses."""
  workdir: pathlib.Path = pathlib.Path("runs/nat")
  """Each setting has a folder in here with checkpoints, metrics, figure and result.json; a second run resumes."""


_RECIPE = nat.RECIPES["wikipedia"]
PRESETS = {
  "demo": Config(),
  "paper": Config(
    preset="paper", epochs=_RECIPE.epochs, learning_rate=_RECIPE.learning_rate, batch_size=_RECIPE.batch_size
  ),
}
parse = command.parser(PRESETS, __doc__)


# Validation AP was highest with it (`--tune`); the school takes that of the hospital, which is the smaller stream.
LEARNING_RATE = {"email-Enron": 1e-2, "hospital": 1e-3, "primary_school": 1e-3}
GRID = (3e-4, 1e-3, 3e-3, 1e-2)
TEST_BATCH = 32
Metrics = dict[str, float]


def load(name: str) -> EventStream:
  """A stream by name."""
  if name == "communities":
    return temporal.communities()
  if name in ("primary_school", "hospital"):
    return temporal.contacts(name)
  return temporal.jodie(name) if name in ("wikipedia", "reddit") else temporal.simplicial(name)


def models(config: Config) -> dict[str, nat.NAT]:
  """NAT as published for Wikipedia, and what an ablation changes."""
  ablations = {
    "NAT, attention": nat.wikipedia(aggregation="attention"),
    "NAT, one hop": nat.wikipedia(slots=(32,)),
    "NAT, no hops": nat.wikipedia(slots=()),
  }
  return {"NAT": nat.wikipedia()} | (ablations if config.ablation else {})


def split(stream: EventStream, config: Config, seed: int) -> Split:
  """As the mode says."""
  if config.mode == "transductive":
    return temporal.transductive_split(stream)
  return temporal.inductive_split(stream, seed=seed)


class Method(NamedTuple):
  """A network, and the functions that all its seeds share, so that they are compiled once."""

  model: nat.NAT
  learner: train.Learner
  stream: Callable


def method(model: nat.NAT, config: Config) -> Method:
  """With Adam."""
  learner = nat.learner(model, optax.adam(config.learning_rate))
  learner = learner._replace(init=jax.jit(learner.init), step=jax.jit(learner.step, donate_argnums=0))
  return Method(model, learner, jax.jit(functools.partial(nat.stream, model)))


def run(stream: EventStream, name: str, tried: Method, config: Config, seed: int, folder: pathlib.Path, setting: Any):
  """Trains one seed and tests its best epoch.

  Returns:
    Test metrics, validation AP of each epoch, the test batches and their logits [C, 2, B].
  """
  parts, known = split(stream, config, seed), 10 * seed
  tables = nat.Tables(*map(jnp.asarray, (stream.node_features, stream.edge_features)))
  history = parts.train | parts.validation
  arrange = lambda events, size, offset, seen, **more: jax.tree.map(
    jnp.asarray,
    temporal.batches(stream, events, batch_size=size, seed=known + offset, destinations=seen, **more),
  )
  task = nat.Task(
    tables,
    arrange(parts.train, config.batch_size, 0, parts.train),
    arrange(parts.validation, TEST_BATCH, 1, history),
  )
  state = train.fit(
    tried.learner, task, steps=config.epochs, workdir=folder, key=jax.random.key(seed), config=setting, log_every=1
  )
  memory, key = state.best.memory, jax.random.key(1000 + seed)
  if config.mode == "inductive":
    memory = nat.reset(tried.model, stream.num_nodes, state.hash_seed)
    before = arrange(parts.history, TEST_BATCH, 2, parts.history)
    memory, _ = tried.stream(state.best.params, memory, tables, before, key)
  test = arrange(parts.test, TEST_BATCH, 3, history | parts.test)
  _, logits = tried.stream(state.best.params, memory, tables, test, key)
  train.save_variables(folder / "best", {"params": state.best.params})
  curve = train.read_metrics(folder)["validation_ap"][1]
  test, logits = jax.device_get((test, logits))
  return measure(name, logits, test), np.asarray(curve), test, logits


def edge_bank(
  stream: EventStream, history: np.ndarray, asked: Batches, *, window: float = np.inf, directed: bool = True
) -> np.ndarray:
  """Whether a pair has met before, within `window` seconds: 1.0 or 0.0 for each event and negative, [C, 2, B].

  What it remembers grows batch by batch, as the network's memory does.
  """
  order = (lambda u, v: (u, v)) if directed else (lambda u, v: (min(u, v), max(u, v)))
  last = {}
  for u, v, t in zip(stream.senders[history], stream.receivers[history], stream.times[history], strict=True):
    last[order(u, v)] = t
  scores = np.zeros((len(asked.senders), 2, asked.senders.shape[1]))
  for c, (senders, receivers, negatives, _, times) in enumerate(zip(*asked, strict=True)):
    for side, others in enumerate((receivers, negatives)):
      for b, (u, v, t) in enumerate(zip(senders, others, times, strict=True)):
        scores[c, side, b] = (met := last.get(order(u, v))) is not None and t - met <= window
    for u, v, t in zip(senders, receivers, times, strict=True):
      if u:
        last[order(u, v)] = max(t, last.get(order(u, v), 0))
  return scores


def banks(stream: EventStream, config: Config, seed: int, test: Batches) -> dict[str, np.ndarray]:
  """Scores of EdgeBank as published, and of the form that does best on validation."""
  parts = split(stream, config, seed)
  history = parts.train | parts.validation
  validation = temporal.batches(
    stream, parts.validation, batch_size=TEST_BATCH, seed=10 * seed + 1, destinations=history
  )
  duration = stream.times[-1] - stream.times[parts.test][0]
  forms = [{"window": w, "directed": d} for w in (np.inf, duration) for d in (True, False)]
  scores = [measure("", edge_bank(stream, parts.train, validation, **form), validation)[""] for form in forms]
  best = forms[int(np.argmax(scores))]
  return {
    "EdgeBank": edge_bank(stream, parts.history, test),
    "EdgeBank, best on validation": edge_bank(stream, parts.history, test, **best),
  }


def measure(name: str, scores: np.ndarray, asked: Batches) -> Metrics:
  """Percentages: pooled AP under the method's own name, and the mean AP of batches and pooled AUC."""
  real = asked.senders != 0
  label = lambda n: np.repeat([1, 0], n)
  flat = np.concatenate([scores[:, 0][real], scores[:, 1][real]])
  each = [
    average_precision_score(label(r.sum()), np.concatenate([s[0, r], s[1, r]]))
    for s, r in zip(scores, real, strict=True)
  ]
  return {
    name: 100 * average_precision_score(label(real.sum()), flat),
    f"{name}, mean AP of batches": 100 * float(np.mean(each)),
    f"{name}, AUC": 100 * roc_auc_score(label(real.sum()), flat),
  }


def tune(config: Config) -> None:
  """Validation AP at each learning rate."""
  stream = load(config.dataset)
  for rate in GRID:
    config = dataclasses.replace(config, learning_rate=rate)
    tried, folder = method(nat.wikipedia(), config), config.workdir / f"tune-{config.dataset}-{config.mode}-{rate}"
    curves = [run(stream, "", tried, config, seed, folder / f"seed{seed}", None)[1].max() for seed in (100, 101)]
    rich.print(f"learning rate {rate}: validation AP {100 * np.mean(curves):.2f}")


def draw(curves: dict[str, np.ndarray], ways: dict[str, list[float]], folder: pathlib.Path) -> None:
  """Validation against epochs; and the test events by whether the pair had met before."""
  figure, ((left, right),) = train.figures.subplots(1, 2)
  epochs = np.arange(1, next(iter(curves.values())).shape[1] + 1)
  series = {name: (epochs, 100 * values.T) for name, values in curves.items()}
  labels = {"xlabel": "epoch", "ylabel": "validation AP (%), mean of batches", "title": "Training"}
  train.figures.curves(left, series, **labels)
  groups = ("pairs that had met", "pairs that had not")
  width = 0.8 / len(ways)
  for i, (name, values) in enumerate(ways.items()):
    right.bar(np.arange(2) + (i - (len(ways) - 1) / 2) * width, values, width, label=name)
  right.set_xticks(range(2), groups)
  right.set(ylabel="test AUC against all negatives (%)", title="Where the test is decided", ylim=(0, 145))
  right.set_yticks(range(0, 101, 20))
  right.legend(loc="upper right", frameon=False)
  train.figures.save(figure, folder / "figure.png")


def by_novelty(scores: np.ndarray, met: np.ndarray, asked: Batches) -> list[float]:
  """AUC (%) of the events whose pair had met, and of the others, each against all negatives.

  Not AP, which would be low for the smaller group whatever its scores.
  """
  real = asked.senders != 0
  negative, out = scores[:, 1][real], []
  for group in (met, ~met):
    positive = scores[:, 0][real & group]
    label = np.repeat([1, 0], [len(positive), len(negative)])
    chosen = np.concatenate([positive, negative])
    out.append(100 * roc_auc_score(label, chosen) if len(positive) else np.nan)
  return out


def report(result: dict[str, Any]) -> None:
  """The table, and what its numbers are."""
  print_metrics(result)
  rich.print("In percent; without further words a number is the average precision pooled over the test.")


def main(config: Config) -> None:
  """Trains what is not trained yet, then draws and reports."""
  memory.keep()
  for name in ("seeds", "epochs", "batch_size"):
    if getattr(config, name) < 1:
      raise ValueError(f"{name}: got {getattr(config, name)}, expected at least 1")
  if config.tune:
    return tune(config)
  if not config.learning_rate:
    config = dataclasses.replace(config, learning_rate=LEARNING_RATE.get(config.dataset, 1e-3))
  suffix = "-paper" * (config.preset == "paper") + "-ablation" * config.ablation
  folder = config.workdir / f"{config.dataset}-{config.mode}-{config.seeds}{suffix}"
  start, stream, tried = time.perf_counter(), load(config.dataset), models(config)
  record = settings(dataclasses.asdict(config) | {"models": {k: " ".join(str(m).split()) for k, m in tried.items()}})
  if result := finished_result(folder, record):
    return report(result)

  methods = {name: method(model, config) for name, model in tried.items()}
  measured: dict[str, list[float]] = {}
  curves: dict[str, list[np.ndarray]] = {}
  ways: dict[str, list[list[float]]] = {}
  for seed in range(config.seeds):
    for name, one in methods.items():
      rich.print(f"[bold]{name}[/bold], seed {seed}")
      place = folder / f"seed{seed}" / name.replace(", ", "-").replace(" ", "")
      metrics, curve, test, logits = run(stream, name, one, config, seed, place, {"model": record["models"][name]})
      curves.setdefault(name, []).append(curve)
      scores = {name: logits}
      if name == "NAT":
        scores |= (bank := banks(stream, config, seed, test))
        for other, values in bank.items():
          metrics |= measure(other, values, test)
        met = edge_bank(stream, split(stream, config, seed).history, test, directed=False)[:, 0] > 0
      for way, values in scores.items():
        ways.setdefault(way, []).append(by_novelty(values, met, test))
      for key, value in metrics.items():
        measured.setdefault(key, []).append(value)
  gain = np.subtract(measured["NAT"], measured["EdgeBank"])
  folder.mkdir(parents=True, exist_ok=True)
  mean_ways = {name: list(np.nanmean(values, axis=0)) for name, values in ways.items()}
  draw({name: np.stack(values) for name, values in curves.items()}, mean_ways, folder)
  train.report(
    folder,
    system="nat",
    claim="Average precision of the next event against a random receiver, beside EdgeBank.",
    dataset=f"{config.dataset}, {config.mode}",
    config=record,
    metrics={**measured, "NAT minus EdgeBank": gain.tolist()},
    published={},
    seed=list(range(config.seeds)),
    wall_time=time.perf_counter() - start,
    show=report,
  )


if __name__ == "__main__":
  main(parse())
