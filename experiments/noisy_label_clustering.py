"""LFD against flow diffusion without labels, PageRank and the labels alone, over the labels' accuracy; and its cost.

    python experiments/noisy_label_clustering.py                            # a block model of 10,000 nodes, minutes
    python experiments/noisy_label_clustering.py --dataset coauthor_cs      # also amazon_photo
    python experiments/noisy_label_clustering.py --dataset cora             # labels from a classifier of 50 nodes
    python experiments/noisy_label_clustering.py --scaling                  # work on graphs of 10^4 to 10^7 edges

A target is a block or a class, a trial one of its nodes as seed with labels drawn anew: each node's truth, flipped with
probability 1 - accuracy, the seed's own label kept. On real graphs a node holds its degree, the sources are 1.5, 1.75,
..., 5 times the target's volume, and of their clusters the one of least conductance (that of the graph in which mass
flows) is scored: the protocol of weighted flow diffusion. On the block model a node holds 1, and the best of four
sources is scored for every method. PageRank runs over four regularizations under the same rule, plain and on the
weighted graph.
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal

import numpy as np
import rich
import scipy.sparse
from sklearn.linear_model import LogisticRegression

from jaxlab import train
from jaxlab.data import networks, planetoid, synthetic
from jaxlab.graph.search import noisy_label_clustering as lfd
from jaxlab.train import command
from jaxlab.train.result import finished_result, print_metrics, settings

SOURCES = {"real": np.arange(1.5, 5.01, 0.25), "sbm": np.array([1.5, 2.0, 3.0, 4.0])}  # over what the target holds
RHO = np.array([0.1, 0.2, 0.5, 1.0])  # times 1 / vol(target)
METHODS = ("LFD", "FD", "weighted PageRank", "PageRank", "labels alone")


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  dataset: Literal["sbm", "amazon_photo", "coauthor_cs", "cora"] = "sbm"
  """sbm: 20 blocks of 500 nodes, p = 0.03, q = 0.002."""
  accuracies: tuple[float, ...] = (0.6, 0.7, 0.8, 0.9)
  """Of the labels, inside and outside alike; cora has a classifier's instead."""
  seeds: int = 10
  """Trials for each target."""
  epsilon: float = 0.05
  """Weight of edges between different labels."""
  seed: int = 0
  """Of labels and seed nodes."""
  preset: Literal["demo", "paper"] = "demo"
  """paper: up to 100 trials for each target, as in the official scripts."""
  scaling: bool = False
  """Count the work around one planted cluster as the graph grows."""
  workdir: pathlib.Path = pathlib.Path("runs/noisy_label_clustering")
  """Each setting has a folder in here with figure and result.json."""


PRESETS = {"demo": Config(), "paper": Config(preset="paper", seeds=100)}
parse = command.parser(PRESETS, __doc__)


def load(config: Config) -> tuple[scipy.sparse.csr_array, np.ndarray, Any]:
  """Adjacency, class of each node (negative: no target), and features for a classifier or None."""
  if config.dataset == "sbm":
    p = np.full((20, 20), 0.002) + np.eye(20) * 0.028
    senders, receivers = synthetic.stochastic_blocks([500] * 20, p, seed=config.seed)
    return matrix(senders, receivers, 10_000), np.repeat(np.arange(20), 500), None
  if config.dataset == "cora":
    cora = planetoid.load("cora")
    adjacency, labels, features = matrix(cora.senders, cora.receivers, cora.num_nodes), cora.labels, cora.features
  else:
    (adjacency, labels), features = getattr(networks, config.dataset)(), None
  _, component = scipy.sparse.csgraph.connected_components(adjacency)
  return adjacency, np.where(component == np.bincount(component).argmax(), labels, -1), features


def matrix(senders: np.ndarray, receivers: np.ndarray, n: int) -> scipy.sparse.csr_array:
  """Adjacency of both directions' edges."""
  return scipy.sparse.csr_array((np.ones(len(senders), np.float32), (receivers, senders)), (n, n))


def flipped(inside: np.ndarray, accuracy: float, rng: np.random.Generator) -> np.ndarray:
  """The truth with errors."""
  return inside ^ (rng.random(len(inside)) > accuracy)


def classified(features: Any, inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """What a logistic regression on 25 nodes inside and 25 outside says about all."""
  chosen = np.concatenate([rng.choice(np.flatnonzero(inside == side), 25, replace=False) for side in (True, False)])
  return LogisticRegression(max_iter=1000).fit(features[chosen], inside[chosen]).predict(features)


def scores(
  config: Config, adjacency: Any, inside: np.ndarray, seed: int, labels: np.ndarray | None
) -> tuple[float, float]:
  """F1 of flow diffusion and of PageRank around one seed, on the graph that the labels weigh, if there are any."""
  target, real = np.flatnonzero(inside), config.dataset != "sbm"
  degree = np.diff(adjacency.indptr)
  options: Any = {"labels": labels, "epsilon": config.epsilon}
  total = lfd.volume(adjacency, **options)
  ranked = [lfd.pagerank(adjacency, seed, rho=r / degree[target].sum(), **options).support for r in RHO]
  if not real:
    flows = [lfd.diffuse(adjacency, seed, s, sink="one", **options).support for s in SOURCES["sbm"] * len(target)]
    return max(lfd.f1(found, target) for found in flows), max(lfd.f1(found, target) for found in ranked)
  flow = lfd.cluster(adjacency, seed, SOURCES["real"] * degree[target].sum(), total=total, **options).nodes
  conductance = [lfd.sweep_conductance(adjacency, found, total=total, **options)[-1] for found in ranked]
  return lfd.f1(flow, target), lfd.f1(ranked[int(np.argmin(conductance))], target)


def compare(config: Config, path: pathlib.Path) -> tuple[dict[str, Any], str]:
  """Metrics, each the mean over targets for every trial number; draws them."""
  adjacency, classes, features = load(config)
  trials = config.seeds
  settings_ = ["classifier"] if features is not None else [f"{a:g}" for a in config.accuracies]
  table: dict[str, np.ndarray] = {}
  plain: dict[tuple[int, int], tuple[float, float]] = {}
  for setting in settings_:
    each = np.zeros((trials, classes.max() + 1, len(METHODS)))
    for target in range(classes.max() + 1):
      inside = classes == target
      rng = np.random.default_rng([config.seed, target])
      seeds = rng.choice(np.flatnonzero(inside), trials, replace=inside.sum() < trials)
      for trial, seed in enumerate(seeds):
        if (target, trial) not in plain:  # the same for all accuracies
          plain[target, trial] = scores(config, adjacency, inside, seed, None)
        labels = classified(features, inside, rng) if features is not None else flipped(inside, float(setting), rng)
        labels[seed] = True
        (flow, rank), (plain_flow, plain_rank) = scores(config, adjacency, inside, seed, labels), plain[target, trial]
        alone = lfd.f1(np.flatnonzero(labels), np.flatnonzero(inside))
        each[trial, target] = flow, plain_flow, rank, plain_rank, alone
    for k, name in enumerate(METHODS):
      table[f"{name}, {setting}"] = each[:, :, k].mean(axis=1)
    rich.print({name: round(float(table[f"{name}, {setting}"].mean()), 3) for name in METHODS}, f"accuracy {setting}")
  figure, ((axes,),) = train.figures.subplots()
  if features is None:
    lines = {m: (config.accuracies, [table[f"{m}, {s}"].mean() for s in settings_]) for m in METHODS}
    train.figures.curves(axes, lines, xlabel="accuracy of the labels", ylabel="F1")
    axes.set_title(config.dataset)
  else:
    axes.bar(METHODS, [table[f"{m}, classifier"].mean() for m in METHODS])
    axes.set(ylabel="F1", title="Cora, labels from a classifier of 50 nodes")
    axes.tick_params(axis="x", rotation=20)
  train.figures.save(figure, path)
  best = {s: table[f"LFD, {s}"].mean() - max(table[f"{m}, {s}"].mean() for m in METHODS[1:]) for s in settings_}
  gains = ", ".join(f"{gain:+.3f} at {setting}" for setting, gain in best.items())
  return {f"F1 of {k}": list(v) for k, v in table.items()}, f"F1 of LFD over the best of the others: {gains}."


def scale(path: pathlib.Path) -> tuple[dict[str, Any], str]:
  """Work for one planted cluster of 200 nodes in graphs of mean degree 20."""
  edges, work, seen, seconds = (10**4, 10**5, 10**6, 10**7), [], [], []
  k = 200
  for m in edges:
    n = m // 10
    across = 1000 / (k * (n - k))  # a thousand edges leave the cluster, however large the graph
    p = np.array([[0.3, across], [across, 20 / n]])
    senders, receivers = synthetic.stochastic_blocks((k, n - k), p)
    adjacency, inside = matrix(senders, receivers, n), np.arange(n) < k
    labels = flipped(inside, 0.8, np.random.default_rng(0))
    labels[0] = True
    mass = 1.5 * np.diff(adjacency.indptr)[:k].sum()
    lfd.diffuse(adjacency, 0, mass, labels=labels)
    start = time.perf_counter()
    found = lfd.diffuse(adjacency, 0, mass, labels=labels)
    seconds.append(time.perf_counter() - start)
    work.append(found.work)
    seen.append(len(found.nodes))
    rich.print(f"{len(senders) // 2} edges: {found.work} entries read, {seen[-1]} nodes, {seconds[-1]:.4f} s")
  figure, (axes,) = train.figures.subplots(1, 2)
  train.figures.curves(axes[0], {"entries read": (edges, work)}, xlabel="edges of the graph", ylabel="entries read")
  train.figures.curves(axes[1], {"time": (edges, seconds)}, xlabel="edges of the graph", ylabel="time (s)")
  for panel in axes:
    panel.set(xscale="log", yscale="log")
    panel.lines[-1].set_marker("o")
  axes[0].set_ylim(min(work) / 10, 2 * max(edges))
  train.figures.save(figure, path)
  metrics = {f"entries read, {m} edges": w for m, w in zip(edges, work, strict=True)}
  metrics |= {f"seconds, {m} edges": s for m, s in zip(edges, seconds, strict=True)}
  return metrics, "Work follows the cluster's volume, not the graph's size."


def main(config: Config) -> None:
  """Runs the experiment, or shows a finished one."""
  if config.seeds < 1:
    raise ValueError(f"seeds: got {config.seeds}, expected at least 1")
  if not config.accuracies or not all(0 <= a <= 1 for a in config.accuracies):
    raise ValueError(f"accuracies: got {config.accuracies}, expected numbers in [0, 1]")
  folder = config.workdir / ("scaling" if config.scaling else f"{config.dataset}-{config.preset}-{config.seeds}")
  record = settings(dataclasses.asdict(config))
  if result := finished_result(folder, record):
    return print_metrics(result)
  start = time.perf_counter()
  figure = folder / "figure.png"
  metrics, claim = scale(figure) if config.scaling else compare(config, figure)
  train.report(
    folder,
    system="noisy_label_clustering",
    claim=claim,
    dataset="planted cluster" if config.scaling else config.dataset,
    config=record,
    metrics=metrics,
    published={},
    seed=[0] if config.scaling else list(range(config.seeds)),
    wall_time=time.perf_counter() - start,
  )


if __name__ == "__main__":
  main(parse())
