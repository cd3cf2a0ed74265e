"""Forward learning beside backpropagation: every algorithm on the same splits, all splits in one vmapped run.

    python experiments/forward_gnn.py                                     # digits on their nearest-neighbour graph
    python experiments/forward_gnn.py --dataset cora_ml                   # the paper's splits, 2 and 4 layers
    python experiments/forward_gnn.py --dataset cora_ml --task links
    python experiments/forward_gnn.py --dataset cora_ml --preset paper    # 1 to 4 layers, GCN, SAGE or GAT by --kind

Protocol and hyper-parameters are the official ones, the same for all: five splits of 64 / 16 / 20 %, hidden width 128,
Adam at 0.001, at most 1000 epochs (of each layer where layers are trained one by one), early stopping after 100
validations. Layer-wise algorithms are trained once at the largest depth: with fewer layers they are the same run.
The figure also shows the memory of a compiled training step against depth.
"""

import dataclasses
import pathlib
import time
from typing import Literal

import jax
import numpy as np
import rich
import rich.table

from jaxlab import data, memory, train
from jaxlab.data import citation_full, digits, planetoid
from jaxlab.graph.nets import forward_gnn as fg
from jaxlab.train import command
from jaxlab.train.result import finished_result, print_metrics, settings


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  dataset: Literal["digits", "cora_ml", "citeseer"] = "digits"
  """digits ships with scikit-learn; cora_ml is the paper's; citeseer is Planetoid's, not the paper's larger one."""
  task: Literal["nodes", "links"] = "nodes"
  """Node classification or link prediction."""
  depths: tuple[int, ...] = (2,)
  """Numbers of layers."""
  kind: Literal["gcn", "sage", "gat"] = "gcn"
  """The convolution."""
  splits: int = 5
  """How many of the five splits."""
  epochs: int = 300
  """Most epochs of a layer."""
  hidden: int = 128
  """Width of every layer."""
  algorithms: tuple[str, ...] = ()
  """Names of algorithms, as in `LAYERWISE` and `JOINT`; default all of the task. What was trained before is kept."""
  preset: Literal["demo", "paper"] = "demo"
  """paper: the published recipe in full, 1 to 4 layers of at most 1000 epochs."""
  workdir: pathlib.Path = pathlib.Path("runs/forward_gnn")
  """Each setting has a folder in here with checkpoints, metrics, figure and result.json; a second run resumes."""


PRESETS = {"demo": Config(), "paper": Config(preset="paper", depths=(1, 2, 3, 4), epochs=1000)}
parse = command.parser(PRESETS, __doc__)


# What trains layer after layer, and what trains all layers in every epoch.
LAYERWISE = {
  "nodes": {"SF": fg.single_forward, "FF-LA": fg.label_appending, "FF-VN": fg.virtual_nodes},
  "links": {"FL-CE": fg.link_forward, "FL-FF": lambda net, recipe: fg.link_forward(net, recipe, loss="ff")},
}
JOINT = {
  "nodes": {"BP": fg.backprop, "SF-Top-To-Loss": fg.top_to_loss, "SF-Top-To-Input": fg.top_to_input},
  "links": {"BP": fg.backprop, "top-down FL-CE": lambda net, recipe: fg.link_top_down(net, recipe._replace(l2=0.0))},
}
# Mean and deviation over five splits, GCN: the paper's appendix. Accuracy (%) on nodes; it has no such table of links
# for Cora-ML.
SOURCE = "Park et al. 2024, appendix"
PUBLISHED = {
  "cora_ml": {
    "BP, 2 layers": (86.84, 1.0),
    "SF, 2 layers": (87.95, 1.4),
    "BP, 4 layers": (86.61, 2.3),
    "SF, 4 layers": (88.48, 1.2),
  }
}


def load(config: Config) -> fg.NodeTask | fg.LinkTask:
  """The dataset with its splits."""
  if config.dataset == "digits":
    dataset = digits.graph()
  else:
    dataset = citation_full.cora_ml() if config.dataset == "cora_ml" else planetoid.load("citeseer")
    dataset = data.row_normalize_features(dataset)
  if config.task == "links":
    seeds = [101 * i for i in range(config.splits)]
    return fg.link_task(dataset.features, dataset.senders, dataset.receivers, seeds)
  splits = [tuple(mask & (dataset.labels >= 0) for mask in split) for split in fg.node_splits(dataset.num_nodes)]
  return fg.node_task(dataset.features, dataset.senders, dataset.receivers, dataset.labels, splits[: config.splits])


def chosen(config: Config) -> list[str]:
  """Names of the algorithms."""
  every = [*JOINT[config.task], *LAYERWISE[config.task]]
  if unknown := set(config.algorithms) - set(every):
    raise ValueError(f"algorithms: got {sorted(unknown)}, expected names among {every}")
  return [name for name in every if name in config.algorithms or not config.algorithms]


def methods(config: Config, num_classes: int | None) -> dict[str, fg.Method]:
  """The algorithms: layer-wise ones at the largest depth, the others at each."""
  recipe = fg.Recipe(epochs=config.epochs)
  net = lambda depth: fg.Net(num_classes, config.hidden, depth, config.kind)
  deepest, made = max(config.depths), {}
  for name in chosen(config):
    if name in LAYERWISE[config.task]:
      made[name] = LAYERWISE[config.task][name](net(deepest), recipe)
    else:
      made |= {f"{name}, {d} layers": JOINT[config.task][name](net(d), recipe) for d in config.depths}
  return made


def results(config: Config, name: str, metrics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Test metric (%) of each split, by algorithm and depth."""
  if name in LAYERWISE[config.task]:
    return {f"{name}, {d} layers": 100 * metrics["test_by_depth"][:, d - 1] for d in config.depths}
  return {name: 100 * metrics["test"]}


def step_memory(task: fg.NodeTask, config: Config, depths: tuple[int, ...]) -> dict[str, list[float]]:
  """Megabytes that a compiled training step of one split needs besides its state, for each depth."""
  one = task._replace(train=task.train[:1], validation=task.validation[:1], test=task.test[:1])
  found: dict[str, list[float]] = {"SF": [], "BP": []}
  for name, make in (("SF", fg.single_forward), ("BP", fg.backprop)):
    for depth in depths:
      learner = make(fg.Net(int(task.labels.max()) + 1, config.hidden, depth, config.kind), fg.Recipe()).learner
      state = jax.eval_shape(learner.init, jax.random.key(0), one)
      compiled = jax.jit(learner.step, donate_argnums=0).lower(state, one).compile()
      found[name].append(compiled.memory_analysis().temp_size_in_bytes / 1e6)
  return found


def draw(
  config: Config, values: dict[str, np.ndarray], megabytes: dict[str, list[float]], folder: pathlib.Path
) -> None:
  """The metric of every algorithm at each depth, and memory against depth."""
  figure, axes = train.figures.subplots(1, 2 if megabytes else 1, width=5.5)
  names = chosen(config)
  for k, depth in enumerate(config.depths):
    series = np.array([values[f"{name}, {depth} layers"] for name in names])
    place = np.arange(len(names)) + (k - (len(config.depths) - 1) / 2) * 0.2
    axes[0, 0].errorbar(
      place, series.mean(axis=1), series.std(axis=1, ddof=1) if series.shape[1] > 1 else 0, fmt="o", capsize=3,
      label=f"{depth} layers",
    )  # fmt: skip
  axes[0, 0].set_xticks(range(len(names)), names, rotation=20, ha="right")
  what = "accuracy" if config.task == "nodes" else "ROC AUC"
  axes[0, 0].set(ylabel=f"test {what} (%)", title=f"{config.dataset}: mean and deviation over {config.splits} splits")
  axes[0, 0].legend()
  if megabytes:
    depths = np.arange(1, len(megabytes["SF"]) + 1)
    curves = {name: (depths, np.array(m)) for name, m in megabytes.items()}
    train.figures.curves(
      axes[0, 1], curves, xlabel="layers", ylabel="memory (MB)", title="Scratch memory of a training step, one split"
    )
    axes[0, 1].set_xticks(depths)
    axes[0, 1].set_ylim(bottom=0)
  train.figures.save(figure, folder / "figure.png")


def main(config: Config) -> None:
  """Trains what is not trained yet, then draws and reports."""
  memory.keep()
  if not config.depths or min(config.depths) < 1:
    raise ValueError(f"depths: got {config.depths}, expected numbers of layers")
  if not 1 <= config.splits <= 5:
    raise ValueError(f"splits: got {config.splits}, expected 1 to 5")
  task, start = load(config), time.perf_counter()
  num_classes = int(task.labels.max()) + 1 if isinstance(task, fg.NodeTask) else None
  depths = "-".join(map(str, config.depths))
  folder = config.workdir / f"{config.dataset}-{config.task}-{config.kind}-{depths}-{config.splits}-{config.epochs}"
  record = settings(dataclasses.asdict(config) | {"algorithms": chosen(config)})
  if result := finished_result(folder, record):
    return print_metrics(result)

  values: dict[str, np.ndarray] = {}
  for name, method in methods(config, num_classes).items():
    rich.print(f"[bold]{name}[/bold]")
    place = folder / name.replace(", ", "-").replace(" ", "_")
    setting = {"method": name, **{k: record[k] for k in ("dataset", "task", "kind", "splits", "epochs", "hidden")}}
    began = time.perf_counter()
    state = train.fit(
      method.learner, task, steps=method.steps, workdir=place, key=jax.random.key(100 * 101), config=setting
    )
    measured = jax.device_get(jax.jit(method.learner.evaluate)(state, task))
    values |= results(config, name, {k: np.asarray(v, np.float64) for k, v in measured.items()})
    rich.print(f"{np.mean(values[list(values)[-1]]):.2f} % in {time.perf_counter() - began:.0f} s")
  megabytes = step_memory(task, config, tuple(range(1, 5))) if isinstance(task, fg.NodeTask) else {}
  draw(config, values, megabytes, folder)
  order = [f"{name}, {d} layers" for d in config.depths for name in chosen(config)]
  published = PUBLISHED.get(config.dataset, {}) if config.kind == "gcn" and config.task == "nodes" else {}
  metrics = {name: values[name] for name in order}
  for name, sizes in megabytes.items():
    metrics[f"{name}: step memory at 4 layers over 1"] = np.array(sizes[3] / sizes[0])
  train.report(
    folder,
    system="forward_gnn",
    claim="Layer-wise forward learning against backpropagation with the same layers and recipe.",
    dataset=f"{config.dataset}, {'accuracy' if num_classes else 'ROC AUC'}, {config.kind}",
    config=record,
    metrics=metrics,
    published={k: {"value": v, "std": s, "source": SOURCE} for k, (v, s) in published.items() if k in values},
    seed=list(range(config.splits)),
    wall_time=time.perf_counter() - start,
  )


if __name__ == "__main__":
  main(parse())
