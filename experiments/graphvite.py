"""GraphVite on link prediction and node classification: how long to train, and whether partitions cost quality.

    python experiments/graphvite.py                                 # digits on their nearest-neighbour graph, a minute
    python experiments/graphvite.py --dataset amazon_photo          # also email_eu_core, blogcatalog
    python experiments/graphvite.py --preset paper                  # the BlogCatalog demo in full: 2000 epochs, minutes

A hundredth of the edges is held out and ranked against as many pairs that are no edges, by V[h] . C[t]; the product of
both degrees is the baseline. Node classification is DeepWalk's protocol on V: one logistic regression per label, as
many labels predicted as a node has. Seeds change split, start and walks. Models are compared at the most epochs.
"""

import dataclasses
import pathlib
import time
from typing import Literal

import jax
import numpy as np
import rich
import rich.table
import scipy.sparse
import sklearn.metrics
from jaxtyping import Bool, Int

from jaxlab import train
from jaxlab.data import digits, networks
from jaxlab.graph import evaluation
from jaxlab.graph.embedding import graphvite
from jaxlab.train import command
from jaxlab.train.result import finished_result, print_metrics, settings


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  dataset: Literal["digits", "amazon_photo", "email_eu_core", "blogcatalog"] = "digits"
  """digits ships with scikit-learn, blogcatalog is the demo's."""
  dim: int = 64
  """Columns of either matrix."""
  augmentation_step: int = 2
  """s: pairs are at most so many steps apart on a walk."""
  epochs: tuple[int, ...] = (10, 20, 50, 100, 200)
  """Lengths of training, each from the start with its own schedule."""
  parts: tuple[int, ...] = (1, 4)
  """Numbers of partitions to compare."""
  models: bool = True
  """Compare DeepWalk, node2vec and training on edges alone, too."""
  backend: Literal["host", "device"] | None = None
  """host: sample by sample on CPU threads; device: micro-batches in JAX. Default: by what there is."""
  fraction: float = 0.1
  """Of the nodes, to train the classifier on."""
  C: float = 1.0
  """Inverse penalty of the classifier."""
  seeds: int = 3
  """Runs, each with its own split."""
  seed: int = 0
  """The first."""
  preset: Literal["demo", "paper"] = "demo"
  """paper: the official BlogCatalog demo, LINE with s = 2, 128 columns, 2000 epochs, 20 % of the nodes."""
  workdir: pathlib.Path = pathlib.Path("runs/graphvite")
  """Each setting has a folder in here with figure and result.json."""


PRESETS = {
  "demo": Config(),
  "paper": Config(
    preset="paper", dataset="blogcatalog", dim=128, augmentation_step=2, epochs=(2000,), fraction=0.2, models=False
  ),
}
parse = command.parser(PRESETS, __doc__)


DEGREES, FREQUENT = "degree product", "most frequent labels"
PUBLISHED = {"AUC": 0.900, "micro-F1": 0.391, "macro-F1": 0.242}
SOURCE = "official BlogCatalog demo"


def load(config: Config) -> tuple[Int[np.ndarray, "2 e"], Bool[np.ndarray, "n l"]]:
  """Undirected edges, each once, and label indicators."""
  if config.dataset == "digits":
    graph = digits.graph()
    edges, labels = np.stack([graph.senders, graph.receivers]), graph.labels
  else:
    adjacency, labels = getattr(networks, config.dataset)()
    edges = np.stack(scipy.sparse.triu(adjacency, 1).nonzero())
  edges = np.unique(np.sort(edges, axis=0), axis=1)
  return edges, labels if labels.ndim == 2 else labels[:, None] == np.unique(labels)


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
  """Area under the ROC curve."""
  truth = np.repeat([1, 0], [len(positive), len(negative)])
  return float(sklearn.metrics.roc_auc_score(truth, np.concatenate([positive, negative])))


def runs(config: Config) -> dict[str, tuple[graphvite.Sampling, int, int]]:
  """Name -> (sampling, epochs, parts)."""
  s = config.augmentation_step
  line = graphvite.Sampling(augmentation_step=s)
  named = {f"P = {p}, {e} epochs": (line, e, p) for p in config.parts for e in config.epochs}
  if config.models:
    first, longest = config.parts[0], max(config.epochs)
    for name, sampling in {
      "DeepWalk": dataclasses.replace(graphvite.DEEPWALK, augmentation_step=s),
      "node2vec, p = 4, q = 2": dataclasses.replace(graphvite.node2vec(), augmentation_step=s),
      "node2vec, p = 0.25, q = 0.5": dataclasses.replace(graphvite.node2vec(0.25, 0.5), augmentation_step=s),
      "edges alone, s = 1": graphvite.Sampling(augmentation_step=1),
    }.items():
      named[f"{name}, P = {first}, {longest} epochs"] = (sampling, longest, first)
  return named


def measure(config: Config, edges: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, float]:
  """Every metric for one seed."""
  nodes = len(labels)
  split = evaluation.edge_split(edges, seed, validation=1 / 102, test=1 / 102)
  negative = evaluation.negative_edges(edges, nodes, split.test.shape[1], seed)
  degree = np.bincount(split.train.ravel(), minlength=nodes).astype(float)
  product = [degree[a] * degree[b] for a, b in (split.test, negative)]
  found = {f"AUC, {DEGREES}": auc(*product)}
  rich.print(f"seed {seed}: AUC of the {DEGREES} {found[f'AUC, {DEGREES}']:.4f}")

  def classify(name: str, x: np.ndarray) -> None:
    scores = evaluation.multilabel_f1(x, labels, config.fraction, [seed], config.C)
    found.update({f"{average}-F1, {name}": float(s[0]) for average, s in scores._asdict().items()})

  classify(FREQUENT, np.zeros((nodes, 1)))
  for name, (sampling, epochs, parts) in runs(config).items():
    start = time.perf_counter()
    embedding = graphvite.embed(
      split.train,
      nodes,
      config.dim,
      jax.random.key(seed),
      sampling,
      graphvite.Training(epochs=epochs, num_parts=parts),
      backend=config.backend,
    )
    seconds = time.perf_counter() - start
    found[f"AUC, {name}"] = auc(*(graphvite.link_scores(embedding, pairs) for pairs in (split.test, negative)))
    classify(name, embedding.vertex)
    found[f"seconds, {name}"] = seconds
    rate = epochs * split.train.shape[1] / seconds
    rich.print(
      f"seed {seed}, {name}: AUC {found[f'AUC, {name}']:.4f}, micro-F1 {found[f'micro-F1, {name}']:.4f}, "
      f"macro-F1 {found[f'macro-F1, {name}']:.4f}, {seconds:.1f} s, {rate / 1e6:.1f} M samples/s"
    )
  return found


def draw(config: Config, metrics: dict[str, list[float]], path: pathlib.Path) -> None:
  """AUC and micro-F1 against epochs, with their baselines and the other models."""
  figure, (axes,) = train.figures.subplots(1, 2)
  epochs = np.array(config.epochs)
  for panel, metric, baseline in ((axes[0], "AUC", DEGREES), (axes[1], "micro-F1", FREQUENT)):
    lines = {
      f"LINE, P = {p}": (epochs, np.array([metrics[f"{metric}, P = {p}, {e} epochs"] for e in epochs]))
      for p in config.parts
    }
    train.figures.curves(panel, lines, xlabel="epochs", ylabel=metric, title=config.dataset)
    for line, style in zip(list(panel.lines), ("o-", "s--", "^:"), strict=False):
      line.set(marker=style[0], linestyle=style[1:], markerfacecolor="none")
    panel.axhline(
      np.mean(metrics[f"{metric}, {baseline}"]), color="gray", linestyle=":", label=f"{DEGREES}; {FREQUENT}"
    )
    for i, name in enumerate(runs(config)):
      if not name.startswith("P = "):
        value = np.mean(metrics[f"{metric}, {name}"])
        panel.plot(max(epochs), value, "x+1234"[i % 6], color="gray", label=name.split(", P")[0])
    if config.preset == "paper":
      panel.plot(2000, PUBLISHED[metric], "*", color="black", label="published")
    panel.set_xscale("log")
    panel.set_xticks(epochs, [str(e) for e in epochs])
    panel.minorticks_off()
  axes[1].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
  if axes[0].get_legend():
    axes[0].get_legend().remove()
  train.figures.save(figure, path)


def main(config: Config) -> None:
  """Runs the experiment, or shows a finished one."""
  for name in ("seeds", "dim", "augmentation_step"):
    if getattr(config, name) < 1:
      raise ValueError(f"{name}: got {getattr(config, name)}, expected at least 1")
  for name in ("epochs", "parts"):
    if not getattr(config, name) or min(getattr(config, name)) < 1:
      raise ValueError(f"{name}: got {getattr(config, name)}, expected some, each at least 1")
  parts = "-".join(map(str, config.parts))
  folder = config.workdir / "-".join(
    [config.dataset, config.preset, str(config.dim), f"P{parts}", *([config.backend] if config.backend else [])]
  )
  record = settings(dataclasses.asdict(config))
  if result := finished_result(folder, record):
    return print_metrics(result)
  start = time.perf_counter()
  edges, labels = load(config)
  seeds = list(range(config.seed, config.seed + config.seeds))
  every = [measure(config, edges, labels, seed) for seed in seeds]
  metrics = {name: [one[name] for one in every] for name in every[0]}
  draw(config, metrics, folder / "figure.png")
  longest, shortest = max(config.epochs), min(config.epochs)
  last = [np.mean(metrics[f"AUC, P = {p}, {longest} epochs"]) for p in config.parts]
  claim = f"AUC after {longest} epochs: " + ", ".join(
    f"{a:.4f} with P = {p}" for a, p in zip(last, config.parts, strict=True)
  )
  claim += f"; {DEGREES} {np.mean(metrics[f'AUC, {DEGREES}']):.4f}"
  if shortest != longest:
    claim += f"; {np.mean(metrics[f'AUC, P = {config.parts[0]}, {shortest} epochs']):.4f} after {shortest} epochs"
  published = {
    f"{metric}, P = {p}, 2000 epochs": {"value": value, "source": SOURCE}
    for metric, value in PUBLISHED.items()
    for p in config.parts
    if config.preset == "paper"
  }
  train.report(
    folder,
    system="graphvite",
    claim=claim + ".",
    dataset=config.dataset,
    config=record,
    metrics=metrics,
    published=published,
    seed=seeds,
    wall_time=time.perf_counter() - start,
  )


if __name__ == "__main__":
  main(parse())
