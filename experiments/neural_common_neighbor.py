"""NCN and NCNC beside a graph auto-encoder of the same MPNN, recipe and budget, and beside counts of neighbours.

    python experiments/neural_common_neighbor.py                      # a geometric graph without features, minutes
    python experiments/neural_common_neighbor.py --dataset cora
    python experiments/neural_common_neighbor.py --dataset cora --ablation    # the other heads
    python experiments/neural_common_neighbor.py --dataset cora --preset paper  # 10 seeds, every head

Every seed has a split of its own. All methods share it, the published hyper-parameters of the dataset and the number of
epochs, and report the test Hits@100 at the epoch of best validation Hits@100. "NCN, targets kept" leaves the edges that
a batch is asked about in the graph.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import rich
import rich.table
import scipy.spatial

from jaxlab import memory, train
from jaxlab.data import planetoid
from jaxlab.graph import common_neighbors, evaluation, link_prediction
from jaxlab.graph.links import neural_common_neighbor as ncn
from jaxlab.train import command
from jaxlab.train.result import finished_result, settings


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  dataset: Literal["geometric", "cora", "citeseer", "pubmed"] = "geometric"
  """geometric: random points in a square, linked where close, with one feature that is the same at each."""
  seeds: int = 5
  """Splits, and initialisations of each method."""
  epochs: int | None = None
  """Passes over the training edges; None for the published 100, and 40 on the geometric graph."""
  inner: Literal["official", "paper"] = "official"
  """How NCNC scores candidates, see the module's docstring."""
  ablation: bool = False
  """Also the other heads: counts (GAE+CN, and completed), NCN-diff, NCN2 and two levels of completion."""
  preset: Literal["demo", "paper"] = "demo"
  """paper: the published recipe in full, that is 10 seeds and every head."""
  workdir: pathlib.Path = pathlib.Path("runs/neural_common_neighbor")
  """Each setting has a folder in here with checkpoints, metrics, figure and result.json; a second run resumes."""


PRESETS = {"demo": Config(), "paper": Config(preset="paper", seeds=10, ablation=True)}
parse = command.parser(PRESETS, __doc__)


class Method(NamedTuple):
  """A head, and whether a batch's positives leave the graph."""

  variant: ncn.Variant
  head: dict[str, Any] = {}
  remove_targets: bool = True


METHODS = {
  "GAE": Method("cn0"),
  "NCN": Method("cn1"),
  "NCNC": Method("incn1cn1"),
  "NCN, targets kept": Method("cn1", remove_targets=False),
}
ABLATION = {
  "GAE+CN": Method("scn1"),
  "GAE+CN, completed": Method("sincn1cn1"),
  "NCN-diff": Method("cn1res"),
  "NCN2": Method("cn1.5"),
  "NCNC2": Method("incn1cn1", {"depth": 2}),
}
HEURISTICS = {
  "common neighbours": np.ones_like,
  "Adamic-Adar": lambda degree: 1 / np.log(degree),
  "resource allocation": np.reciprocal,
}
# Test Hits@100, mean and deviation of 10 runs, from the paper's table; a later paper's table confirms them.
PUBLISHED = {
  "cora": {"GAE": (89.01, 1.32), "NCN": (89.05, 0.96), "NCNC": (89.65, 1.36)},
  "citeseer": {"GAE": (91.78, 0.94), "NCN": (91.56, 1.43), "NCNC": (93.47, 0.95)},
  "pubmed": {"GAE": (78.81, 1.64), "NCN": (79.05, 1.16), "NCNC": (81.29, 0.85)},
}
K = 100


def geometric(num_nodes: int = 1000, mean_degree: float = 12.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Features [N, 1] of ones and edges [2, E] between points of the unit square that are close."""
  points = np.random.default_rng(seed).random((num_nodes, 2))
  radius = (mean_degree / (np.pi * num_nodes)) ** 0.5
  edges = scipy.spatial.cKDTree(points).query_pairs(radius, output_type="ndarray").T
  return np.ones((num_nodes, 1), "float32"), edges


def load(config: Config) -> list[link_prediction.Task]:
  """A task for each seed."""
  if config.dataset == "geometric":
    features, edges = geometric()
  else:
    dataset = planetoid.load(config.dataset)
    features, edges = dataset.features, np.stack([dataset.senders, dataset.receivers])
  splits = [evaluation.planetoid_link_split(edges, features.shape[0], seed) for seed in range(config.seeds)]
  return [link_prediction.task(features, features.shape[0], split) for split in splits]


def build(config: Config, method: Method) -> tuple[ncn.LinkPredictor, ncn.Recipe]:
  """The model and its recipe; on the geometric graph Cora's, narrower and without dropout on the one feature."""
  head = method.head | ({"inner": config.inner} if method.variant in ("incn1cn1", "sincn1cn1") else {})
  if config.dataset == "geometric":
    model = ncn.cora(method.variant, features=64, encoder={"input_dropout": 0.0, "tail_dropout": 0.0}, head=head)
    recipe = ncn.RECIPES["cora"]._replace(batch_size=512, epochs=40, edge_dropout=0.0)
  else:
    model, recipe = getattr(ncn, config.dataset)(method.variant, head=head), ncn.RECIPES[config.dataset]
  return model, recipe if config.epochs is None else recipe._replace(epochs=config.epochs)


def heuristics(task: link_prediction.Task) -> dict[str, float]:
  """Test Hits@100 of sums over common neighbours in the graph of training edges."""
  return {
    name: 100 * float(evaluation.hits_at_k(
      common_neighbors.heuristic(task.adjacency, task.split.test, weight),
      common_neighbors.heuristic(task.adjacency, task.split.test_negative, weight), K,
    ))
    for name, weight in HEURISTICS.items()
  }  # fmt: skip


class Curve(NamedTuple):
  """One run: validation and test Hits@100 (%) after each epoch, and the loss."""

  validation: np.ndarray
  test: np.ndarray
  loss: np.ndarray

  @property
  def best(self) -> float:
    """Test at the first epoch of best validation."""
    return float(self.test[np.argmax(self.validation)])


def run(config: Config, method: Method, tasks: list[link_prediction.Task], folder: pathlib.Path) -> list[Curve]:
  """Trains a method on every split with one compiled program."""
  model, recipe = build(config, method)
  learner = link_prediction.learner(model, encoder_rate=recipe.encoder_rate, head_rate=recipe.head_rate, k=K)
  learner = learner._replace(
    init=jax.jit(learner.init), step=jax.jit(learner.step, donate_argnums=0), evaluate=jax.jit(learner.evaluate)
  )
  options: dict[str, Any] = {
    "batch_size": recipe.batch_size, "needs": model.head.needs, "edge_dropout": recipe.edge_dropout,
    "remove_targets": method.remove_targets,
  }  # fmt: skip
  tried = [link_prediction.Batches(task, seed=seed, **options).sizes for seed, task in enumerate(tasks)]
  sizes = common_neighbors.largest(tried)
  rankings = [link_prediction.ranking(task, model.head.needs) for task in tasks]
  ranked = common_neighbors.largest([common_neighbors.sizes(one["both"].pairs) for one in rankings])
  curves = []
  for seed, task in enumerate(tasks):
    batches = link_prediction.Batches(task, seed=seed, sizes=sizes, **options)
    steps = recipe.epochs * batches.steps
    place = folder / f"seed{seed}"
    record = {"method": " ".join(str(method).split()), "recipe": str(recipe), "model": " ".join(str(model).split())}
    if not finished(place, record, steps):  # else nothing need be compiled for it
      train.fit(
        learner,
        batches,
        steps=steps,
        workdir=place,
        key=jax.random.key(seed),
        evaluate_on=link_prediction.ranking(task, model.head.needs, sizes=ranked),
        evaluate_every=batches.steps,
        log_every=batches.steps,
        save_every=max(1, steps // 4),
        keep=1,
        tensorboard=False,
        config=record,
      )
    metrics = train.read_metrics(place)
    curve = Curve(*(metrics[name][1] for name in ("eval_validation", "eval_test", "loss")))
    curves.append(curve._replace(validation=100 * curve.validation, test=100 * curve.test))
    rich.print(f"  seed {seed}: test Hits@{K} {curves[-1].best:.2f} %")
  return curves


def finished(place: pathlib.Path, record: dict[str, str], steps: int) -> bool:
  """Whether the folder holds a whole run of these settings."""
  if not (place / "metrics.jsonl").exists() or json.loads((place / "config.json").read_text()) != record:
    return False
  evaluated = train.read_metrics(place).get("eval_test")
  return evaluated is not None and evaluated[0][-1] == steps


def draw(curves: dict[str, list[Curve]], counts: dict[str, np.ndarray], config: Config, folder: pathlib.Path) -> None:
  """Test score against the epoch, and at the best epoch with what is published."""
  figure, ((left, right),) = train.figures.subplots(1, 2, width=5.2)
  shown = {name: curves[name] for name in METHODS}
  epochs = np.arange(1, len(curves["NCN"][0].test) + 1)
  lines = {name: (epochs, np.stack([c.test for c in runs], axis=1)) for name, runs in shown.items()}
  train.figures.curves(left, lines, xlabel="epoch", ylabel=f"test Hits@{K} (%)", title=f"{config.dataset}: training")
  bars = {name: np.array([c.best for c in runs]) for name, runs in curves.items()} | counts
  published = PUBLISHED.get(config.dataset, {})
  for i, (name, values) in enumerate(bars.items()):
    color = train.figures.COLORS[list(shown).index(name) if name in shown else -1]
    right.barh(i, values.mean(), xerr=values.std(ddof=1) if len(values) > 1 else 0, color=color, alpha=0.8)
    if name in published:
      right.plot(published[name][0], i, "k|", markersize=14, label="published" if name == "GAE" else None)
  right.set(yticks=range(len(bars)), yticklabels=list(bars), xlabel=f"test Hits@{K} (%)")
  right.set_title("At the epoch of best validation", fontsize=left.title.get_fontsize())
  right.invert_yaxis()
  if published:
    right.legend(loc="lower right", fontsize=9)
  train.figures.save(figure, folder / "figure.png")


def report(result: dict[str, Any]) -> None:
  """The table, and differences split by split."""
  title = f"{result['dataset']}: test Hits@{K} (%), {result['config']['seeds']} splits"
  table = rich.table.Table("method", "mean", "std. deviation", "published", title=title)
  rows = {name: metric for name, metric in result["metrics"].items() if not name.startswith("loss")}
  for name, metric in rows.items():
    published = result["published"].get(name, {}).get("value", "")
    table.add_row(name, f"{metric['mean']:.2f}", f"{metric['std'] or 0.0:.2f}", str(published))
  rich.print(table)
  for one, other in (("NCN", "GAE"), ("NCNC", "NCN"), ("NCNC", "GAE"), ("NCN", "NCN, targets kept")):
    if one not in rows or other not in rows:
      continue
    difference = np.array(rows[one]["values"]) - np.array(rows[other]["values"])
    error = difference.std(ddof=1) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
    rich.print(f"{one} minus {other}: {difference.mean():+.2f}, standard error {error:.2f}")
  losses = [
    f"{name.removeprefix('loss, ')} {m['mean']:.3f}" for name, m in result["metrics"].items() if name not in rows
  ]
  rich.print("training loss of the last ten epochs: " + "; ".join(losses))


def main(config: Config) -> None:
  """Trains what is not trained yet, then draws and reports."""
  memory.keep()
  if config.seeds < 1:
    raise ValueError(f"seeds: got {config.seeds}, expected at least 1")
  if config.epochs is not None and config.epochs < 1:
    raise ValueError(f"epochs: got {config.epochs}, expected at least 1, or None")
  methods = METHODS | (ABLATION if config.ablation else {})
  suffix = f"{'-' + config.inner if config.inner != 'official' else ''}{'-ablation' * config.ablation}"
  folder = config.workdir / f"{config.dataset}-{config.seeds}{f'-{config.epochs}' if config.epochs else ''}{suffix}"
  built = {name: " ".join(str(build(config, method)).split()) for name, method in methods.items()}
  record = settings(dataclasses.asdict(config) | {"methods": built})
  if result := finished_result(folder, record):
    return report(result)

  start, tasks = time.perf_counter(), load(config)
  curves = {}
  for name, method in methods.items():
    rich.print(f"[bold]{name}[/bold]")
    # Runs are shared with other settings of the experiment: they depend on the method and the seed alone.
    place = name.replace(", ", "-").replace(" ", "") + (f"-{config.epochs}" if config.epochs else "")
    place += f"-{config.inner}" if config.inner != "official" else ""
    curves[name] = run(config, method, tasks, config.workdir / config.dataset / place)
  counts = {name: np.array([heuristics(task)[name] for task in tasks]) for name in HEURISTICS}
  folder.mkdir(parents=True, exist_ok=True)
  draw(curves, counts, config, folder)
  published = PUBLISHED.get(config.dataset, {})
  train.report(
    folder,
    system="neural_common_neighbor",
    claim="Test Hits@100 of NCN and NCNC beside a graph auto-encoder of the same budget and beside neighbour counts.",
    dataset=f"{config.dataset}, 70/10/20 splits",
    config=record,
    metrics={name: [c.best for c in runs] for name, runs in curves.items()}
    | counts
    | {
      f"loss, {name}": [c.loss[-10:].mean() for c in curves[name]]
      for name in ("NCN", "NCN, targets kept")
      if name in curves
    },
    published={
      name: {"value": mean, "std": std, "source": "Wang et al. 2023"} for name, (mean, std) in published.items()
    },
    seed=list(range(config.seeds)),
    wall_time=time.perf_counter() - start,
    show=report,
  )


if __name__ == "__main__":
  main(parse())
