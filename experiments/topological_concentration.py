"""Does TC tell better than degree for which nodes a GNN predicts links well, and does re-weighting by it help?

    python experiments/topological_concentration.py                       # Cora, minutes
    python experiments/topological_concentration.py --dataset citeseer --conv sage
    python experiments/topological_concentration.py --shift               # splits by time and at random
    python experiments/topological_concentration.py --scaling  # ATC and exact TC, up to 10^7 edges
    python experiments/topological_concentration.py --preset paper        # 10 seeds of 1000 epochs

Every seed has a split of its own, which all models share with the initialisation, the order of pairs and the number of
epochs. Re-weighting adds alpha times the base mass to messages, which makes embeddings larger and training faster; so
every model has its learning rate picked from the same few, by validation on the first two splits, and one more model
has every message scaled by 1 + alpha without a score. Each run is taken at the epoch of best validation Hits@100. Then
all nodes are ranked for every node with a test edge, and the Recall@10 of these nodes is compared with what the train
graph says about them: Spearman's correlation with TC, ATC and degree.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import rich
import rich.table
import scipy.stats

from jaxlab import data, memory, train
from jaxlab.data import planetoid, synthetic
from jaxlab.graph import common_neighbors, evaluation, sparse
from jaxlab.graph.links import topological_concentration as tc
from jaxlab.train import command
from jaxlab.train.result import finished_result, settings

EDGES = (100_000, 200_000, 400_000, 800_000, 1_600_000, 3_200_000, 6_400_000, 10_000_000)  # of the scaling study
NODES, EXACT = 50_000, 800_000  # and the largest graph for exact TC of two levels, whose trees grow with density
TOP = 10
OVER = "correlation of TC over that of degree (%)"


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  dataset: Literal["cora", "citeseer", "pubmed"] = "cora"
  """Split 70/10/20 into train, validation and test edges."""
  conv: Literal["gcn", "sage"] = "gcn"
  """The encoder; its published settings."""
  seeds: int = 5
  """Splits and initialisations."""
  epochs: int = 200
  """Passes over the train edges."""
  rates: tuple[float, ...] = (0.001, 0.003, 0.01)
  """Learning rates to pick from; the published one is 0.001."""
  preset: Literal["demo", "paper"] = "demo"
  """paper: 10 seeds of 1000 epochs at a rate of 0.001, both ways to re-weight."""
  centre: bool = False
  """Also re-weight what a centre receives, as the paper reads, where the code scales what it sends."""
  shift: bool = False
  """Measure what a split shifts instead, on graphs that grow."""
  scaling: bool = False
  """Measure cost against the number of edges instead."""
  workdir: pathlib.Path = pathlib.Path("runs/topological_concentration")
  """Each setting has a folder in here with figure and result.json; a second run resumes."""


PRESETS = {"demo": Config(), "paper": Config(preset="paper", seeds=10, epochs=1000, rates=(0.001,), centre=True)}
parse = command.parser(PRESETS, __doc__)


class Method(NamedTuple):
  """What becomes of messages: re-weighted, or all scaled by the same number."""

  reweighting: tc.Reweighting | None = None
  scale: float = 1.0


class Run(NamedTuple):
  """One trained model.

  Attributes:
    rate: the learning rate that was picked.
    hits: test Hits@100 (%) at the epoch of best validation.
    recall: [B] Recall@10 of the nodes with a test edge.
    reciprocal_rank: [B] of them.
    concentration: mean TC of one hop, weighted by the messages of that epoch, over the same nodes.
  """

  rate: np.ndarray
  hits: np.ndarray
  recall: np.ndarray
  reciprocal_rank: np.ndarray
  concentration: np.ndarray


def interval(values: np.ndarray) -> float:
  """Half the width of the 95 % interval of a mean (Student's t); 0 for one value."""
  n = len(values)
  return float(scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else 0.0


# ------------------------------------------------------------------------------- TC, degree and what models achieve


def train_each(config: Config, method: Method, tasks: list[tc.Task], folder: pathlib.Path) -> list[Run]:
  """Picks the rate, trains on every split and ranks nodes; one compiled program for each rate."""
  recipe = tc.RECIPES[config.dataset, config.conv]
  # One width for all, the re-weighted model's: a comparison of widths is not what this is about.
  model = tc.LinkPredictor(recipe.features, config.conv, normalize=recipe.normalize)
  tasks = [t._replace(operator=t.operator.replace_values(t.operator.values * method.scale)) for t in tasks]
  steps = tc.Batches(tasks[0], batch_size=recipe.batch_size, seed=0).steps

  def made(rate):
    learner = tc.learner(
      model, steps_per_epoch=steps, reweighting=method.reweighting, encoder_rate=rate, head_rate=rate, k=recipe.k
    )
    return learner._replace(
      init=jax.jit(learner.init), step=jax.jit(learner.step, donate_argnums=0), evaluate=jax.jit(learner.evaluate)
    )

  def trained(learner, rate, seed):
    return train.fit(
      learner,
      tc.Batches(tasks[seed], batch_size=recipe.batch_size, seed=seed),
      steps=config.epochs * steps,
      workdir=folder / f"rate{rate:g}" / f"seed{seed}",
      key=jax.random.key(seed),
      log_every=steps,
      save_every=config.epochs * steps,
      keep=1,
      tensorboard=False,
      config={"model": " ".join(str(model).split()), "recipe": str(recipe), "method": str(method)},
    )

  learners = {rate: made(rate) for rate in config.rates}
  tuning = range(min(2, len(tasks)))
  validation = {
    rate: np.mean([float(trained(learner, rate, seed).best.hits) for seed in tuning])
    for rate, learner in learners.items()
    if len(learners) > 1
  }
  rich.print(f"  validation Hits@{recipe.k} by rate: { {rate: round(float(v), 3) for rate, v in validation.items()} }")
  rate = max(validation, key=lambda r: validation[r]) if validation else config.rates[0]
  runs = []
  for seed, task in enumerate(tasks):
    kept = folder / f"rate{rate:g}" / f"seed{seed}" / "nodes.npz"
    if not kept.exists():
      state, split = trained(learners[rate], rate, seed), task.split
      on = {"graph": task.graph, "operator": task.operator, "pairs": {"test": (split.test, split.test_negative)}}
      hits = 100 * float(learners[rate].evaluate(state, on)["test"])
      nodes, ranked = tc.rank_nodes(model, state.best.variables, task, state.best.weights, ks=(TOP,))
      receiver = "centre" if method.reweighting is None else method.reweighting.receiver
      overlap = tc.edge_overlap(task.operator, task.adjacency)
      weighted = np.asarray(tc.weighted_concentration(task.operator, state.best.weights, overlap, receiver=receiver))
      np.savez(kept, rate=rate, hits=hits, recall=ranked.recall[:, 0], reciprocal_rank=ranked.reciprocal_rank,
               concentration=weighted[nodes].mean())  # fmt: skip
    with np.load(kept) as file:
      runs.append(Run(**file))
    rich.print(f"  seed {seed}: test Hits@100 {runs[-1].hits:.2f} %, Recall@{TOP} {100 * runs[-1].recall.mean():.2f} %")
  return runs


def node_scores(task: tc.Task, nodes: np.ndarray) -> dict[str, np.ndarray]:
  """What the train graph says about nodes."""
  operator = sparse.from_scipy(task.adjacency)
  return {
    "TC": tc.concentration(task.adjacency)[nodes],
    "TC, two levels": tc.concentration(task.adjacency, depth=2)[nodes],
    "ATC": np.asarray(tc.approximate(operator, jax.random.key(0), width=256))[nodes],
    "degree": np.diff(task.adjacency.indptr)[nodes],
  }


def compare(config: Config, folder: pathlib.Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
  """Metrics, claim and published numbers; draws them."""
  dataset = data.row_normalize_features(planetoid.load(config.dataset))
  edges, n = np.stack([dataset.senders, dataset.receivers]), dataset.num_nodes
  splits = [evaluation.planetoid_link_split(edges, n, seed) for seed in range(config.seeds)]
  tasks = [tc.task(dataset.features, n, split, config.conv) for split in splits]
  again = tc.RECIPES[config.dataset, config.conv].reweighting
  methods = {"plain": Method(), "plain, scaled": Method(scale=1 + again.alpha), "re-weighted": Method(again)}
  if config.centre:
    methods["re-weighted, centre"] = Method(again._replace(receiver="centre"))
  runs = {}
  for name, method in methods.items():
    rich.print(f"[bold]{name}[/bold]")
    place = config.workdir / f"{config.dataset}-{config.conv}-{config.epochs}" / name.replace(", ", "-")
    runs[name] = train_each(config, method, tasks, place)

  nodes = [np.unique(split.test) for split in splits]
  scores = [node_scores(task, some) for task, some in zip(tasks, nodes, strict=True)]
  rho = {
    name: np.array([scipy.stats.spearmanr(s[name], r.recall)[0] for s, r in zip(scores, runs["plain"], strict=True)])
    for name in scores[0]
  }
  metrics: dict[str, Any] = {f"Spearman of Recall@{TOP} with {name}": list(v) for name, v in rho.items()}
  gain = rho["TC"] - rho["degree"]
  metrics["Spearman, TC minus degree"] = list(gain)
  metrics[OVER] = 100 * (rho["TC"].mean() / rho["degree"].mean() - 1)
  for name, each in runs.items():
    metrics |= {
      f"test Hits@100 (%), {name}": [float(r.hits) for r in each],
      f"mean Recall@{TOP} (%), {name}": [100 * float(r.recall.mean()) for r in each],
      f"mean reciprocal rank (%), {name}": [100 * float(r.reciprocal_rank.mean()) for r in each],
      f"weighted TC, {name}": [float(r.concentration) for r in each],
    }
  shifts = [tc.shift(t.adjacency, common_neighbors.adjacency(t.split.test, n)) for t in tasks]
  metrics["TC by test edges minus TC by train edges"] = [s.difference for s in shifts]
  changes = {
    name: np.array([float(a.hits - b.hits) for a, b in zip(runs[name], runs["plain"], strict=True)])
    for name in list(runs)[1:]
  }
  rates = ", ".join(f"{name} {float(each[0].rate):g}" for name, each in runs.items())
  changes["re-weighted over scaled"] = changes["re-weighted"] - changes["plain, scaled"]
  said = "; ".join(f"{name} {d.mean():+.2f} ± {interval(d):.2f}" for name, d in changes.items())
  claim = (
    f"Spearman with per-node Recall@{TOP}: TC {rho['TC'].mean():.3f} ± {interval(rho['TC']):.3f}, degree "
    f"{rho['degree'].mean():.3f} ± {interval(rho['degree']):.3f}, difference {gain.mean():+.3f} ± {interval(gain):.3f} "
    f"(95 % intervals over {config.seeds} splits). Test Hits@100 beside the plain model, in points: {said}. "
    f"Rates: {rates}."
  )
  draw(config, rho, runs, scores, folder)
  source = "as the paper's summary words it: correlation 82.10 % higher than degree's, over its datasets"
  return metrics, claim, {OVER: {"value": 82.10, "source": source}}


def draw(
  config: Config,
  rho: dict[str, np.ndarray],
  runs: dict[str, list[Run]],
  scores: list[dict[str, np.ndarray]],
  folder: pathlib.Path,
) -> None:
  """Correlations; Recall@10 over groups of nodes; Hits@100 of each model."""
  figure, ((left, middle, right),) = train.figures.subplots(1, 3, width=4.4)
  for i, values in enumerate(rho.values()):
    left.bar(i, values.mean(), yerr=interval(values), color=train.figures.COLORS[i], alpha=0.8, capsize=3)
    left.plot(np.full(len(values), i), values, "k.", markersize=4)
  left.set(xticks=range(len(rho)), ylabel=f"Spearman with Recall@{TOP}", title=f"{config.dataset}, {config.conv}")
  left.set_xticklabels(list(rho), rotation=15)
  recall = np.concatenate([r.recall for r in runs["plain"]])
  for name in ("TC", "degree"):
    score = np.concatenate([s[name] for s in scores])
    rank = scipy.stats.rankdata(score) / len(score)
    groups = [rank <= rank.min(), *((rank > max(lo, rank.min())) & (rank <= lo + 0.2) for lo in np.arange(0, 1, 0.2))]
    shown = [(rank[g].mean(), recall[g].mean(), recall[g].std() / g.sum() ** 0.5) for g in groups if g.sum() > 20]
    x, y, error = np.array(shown).T
    middle.errorbar(x, y, 2 * error, marker="o", label=name, color=train.figures.COLORS[0 if name == "TC" else 3])
  middle.set(xlabel="rank of the node, as a share", ylabel=f"mean Recall@{TOP}", title="Which nodes do well")
  middle.legend()
  for i, each in enumerate(runs.values()):
    values = np.array([float(r.hits) for r in each])
    right.bar(i, values.mean(), yerr=interval(values), color=train.figures.COLORS[i], alpha=0.8, capsize=3)
    right.plot(np.full(len(values), i), values, "k.", markersize=4)
  right.set(xticks=range(len(runs)), ylabel="test Hits@100 (%)", title="Re-weighting")
  right.set_xticklabels([name.replace(", ", ",\n") for name in runs])
  low = min(float(r.hits) for each in runs.values() for r in each)
  right.set_ylim(bottom=max(0.0, low - 5))
  train.figures.save(figure, folder / "figure.png")


# -------------------------------------------------------------------------------------------------------- the shift


def growth(seed: int, *, num_nodes: int = 2000, links: int = 5, closing: float = 0.9) -> np.ndarray:
  """Distinct edges [2, E] in order of time, of a network whose links first close triangles and later go anywhere.

  Half of all nodes are there from the start. At time t in [0, 1) a link starts at a random node, or at the next new
  one; with probability closing * (1 - t) it ends at a neighbour's neighbour, else at a random node.
  """
  rng = np.random.default_rng(seed)
  total, present = links * num_nodes, num_nodes // 2
  near: list[list[int]] = [[] for _ in range(num_nodes)]
  seen, out = set(), []
  while len(out) < total:
    t = len(out) / total
    if rng.random() < 0.5 * num_nodes / total and present < num_nodes:
      one, present = present, present + 1
    else:
      one = int(rng.integers(present))
    other = int(rng.integers(present))
    if near[one] and rng.random() < closing * (1 - t):
      other = int(rng.choice(near[int(rng.choice(near[one]))]))
    edge = min(one, other), max(one, other)
    if one != other and edge not in seen:
      seen.add(edge)
      out.append(edge)
      near[one].append(other)
      near[other].append(one)
  return np.array(out).T


def shifts(config: Config, folder: pathlib.Path) -> tuple[dict[str, Any], str]:
  """The same graphs, split by time and at random."""
  kinds: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "by time": lambda edges, seed: edges,
    "at random": lambda edges, seed: np.random.default_rng([seed, 1]).permutation(edges, axis=1),
  }
  found: dict[str, list[tc.Shift]] = {kind: [] for kind in kinds}
  for seed in range(config.seeds):
    edges = growth(seed)
    n = int(edges.max()) + 1
    for kind, order in kinds.items():
      ordered = order(edges, seed)
      parts = np.split(ordered, [int(0.7 * ordered.shape[1]), int(0.8 * ordered.shape[1])], axis=1)
      train_graph, _, test = (common_neighbors.adjacency(part, n) for part in parts)
      found[kind].append(tc.shift(train_graph, test))
  metrics = {}
  for kind, each in found.items():
    metrics |= {
      f"TC by train edges, split {kind}": [s.train for s in each],
      f"TC by test edges, split {kind}": [s.target for s in each],
      f"difference, split {kind}": [s.difference for s in each],
    }
  figure, ((axes,),) = train.figures.subplots()
  for i, each in enumerate(found.values()):
    for j, name in enumerate(("train", "target")):
      values = np.array([getattr(s, name) for s in each])
      label = ("train edges", "test edges")[j] if i == 0 else None
      axes.bar(3 * i + j, values.mean(), yerr=interval(values), color=train.figures.COLORS[j], label=label, capsize=3)
  axes.set(xticks=[0.5, 3.5], xticklabels=[f"split {kind}" for kind in kinds], ylabel="mean TC of nodes with both")
  axes.set_title("Shift on a growing network")
  axes.legend()
  train.figures.save(figure, folder / "figure.png")
  said = {kind: np.array([s.difference for s in each]) for kind, each in found.items()}
  claim = "TC by test edges minus TC by train edges: " + ", ".join(
    f"split {kind} {d.mean():+.3f} ± {interval(d):.3f}" for kind, d in said.items()
  )
  return metrics, claim + f" (95 % intervals over {config.seeds} graphs)."


# --------------------------------------------------------------------------------------------------------- the cost


def scale(folder: pathlib.Path) -> tuple[dict[str, Any], str]:
  """ATC and exact TC of two levels on G(n, m), n fixed."""
  atc = jax.jit(tc.approximate, static_argnames=("width", "depth"))

  def seconds(call, often):
    took = []
    for _ in range(often):
      start = time.perf_counter()
      jax.block_until_ready(call())
      took.append(time.perf_counter() - start)
    return min(took)

  approximate, exact, one = [], [], []
  for m in EDGES:
    senders, receivers = synthetic.erdos_renyi(NODES, m)
    graph = common_neighbors.adjacency(np.stack([senders, receivers]), NODES)
    operator = jax.tree.map(jax.numpy.asarray, sparse.from_scipy(graph))
    run = lambda operator=operator: atc(operator, jax.random.key(0), width=16, depth=2)
    run()
    approximate.append(seconds(run, 4))
    one.append(seconds(lambda graph=graph: tc.concentration(graph), 1 if m > 10**6 else 2))
    if m <= EXACT:
      exact.append(seconds(lambda graph=graph: tc.concentration(graph, depth=2), 1 if m == EXACT else 2))
    of_two = f", of two {exact[-1]:.3f} s" if m <= EXACT else ""
    rich.print(f"{m} edges: ATC {approximate[-1]:.3f} s, TC of one level {one[-1]:.3f} s{of_two}")
  shown = {
    "ATC, K = 2, width 16": (EDGES, approximate), "exact TC, K = 1": (EDGES, one),
    "exact TC, K = 2": (EDGES[: len(exact)], exact),
  }  # fmt: skip
  figure, ((axes,),) = train.figures.subplots()
  train.figures.curves(axes, shown, xlabel="edges", ylabel="time (s)", title=f"G(n, m) of {NODES:,} nodes")
  line = np.array([EDGES[-1] / 10, EDGES[-1]])
  axes.plot(line, approximate[-1] * line / line[-1] * 2.5, "k:", linewidth=1, label="slope 1")
  axes.set(xscale="log", yscale="log")
  for drawn in axes.lines[:-1]:
    drawn.set_marker("o")
  axes.set_ylim(top=300)
  axes.legend(loc="upper left")
  train.figures.save(figure, folder / "figure.png")
  double = lambda t: float(max(b / a for a, b, m in zip(t, t[1:], EDGES[1:], strict=False) if m != EDGES[-1]))
  metrics = {f"ATC, seconds at {m} edges": t for m, t in zip(EDGES, approximate, strict=True)}
  metrics |= {f"exact TC of one level, seconds at {m} edges": t for m, t in zip(EDGES, one, strict=True)}
  metrics |= {f"exact TC of two levels, seconds at {m} edges": t for m, t in zip(EDGES, exact, strict=False)}
  metrics |= {
    "ATC, largest time(2E) / time(E)": double(approximate),
    "exact TC of two levels, largest time(2E) / time(E)": double(exact),
  }
  claim = (
    f"On G({NODES}, m) twice the edges take ATC at most {double(approximate):.2f} times as long, "
    f"exact TC of two levels up to {double(exact):.1f} times."
  )
  return metrics, claim


# ------------------------------------------------------------------------------------------------------------- main


def report(result: dict[str, Any]) -> None:
  """The table and the claim."""
  table = rich.table.Table("metric", "mean", "95 % interval", title=result["dataset"])
  for key, metric in result["metrics"].items():
    half = interval(np.array(metric["values"])) if metric["n"] > 1 else 0.0
    table.add_row(key, f"{metric['mean']:.4g}", f"± {half:.2g}" if half else "")
  rich.print(table)
  rich.print(result["claim"])


def main(config: Config) -> None:
  """Runs the experiment, or shows a finished one."""
  memory.keep()
  if not config.rates or not min(config.rates) > 0:
    raise ValueError(f"rates: got {config.rates}, expected positive numbers")
  for name in ("seeds", "epochs"):
    if getattr(config, name) < 1:
      raise ValueError(f"{name}: got {getattr(config, name)}, expected at least 1")
  if config.shift and config.scaling:
    raise ValueError("shift: got True with scaling, expected one of them")
  name = f"{config.dataset}-{config.conv}-{config.epochs}x{config.seeds}{'-centre' * config.centre}"
  folder = config.workdir / ("scaling" if config.scaling else f"shift-{config.seeds}" if config.shift else name)
  record = settings(dataclasses.asdict(config))
  if result := finished_result(folder, record):
    return report(result)
  folder.mkdir(parents=True, exist_ok=True)
  start, published = time.perf_counter(), {}
  if config.scaling:
    (metrics, claim), what = scale(folder), "random graphs"
  elif config.shift:
    (metrics, claim), what = shifts(config, folder), "growing networks of 2000 nodes"
  else:
    metrics, claim, published = compare(config, folder)
    what = f"{config.dataset}, 70/10/20 splits, {config.conv}"
  train.report(
    folder,
    system="topological_concentration",
    claim=claim,
    dataset=what,
    config=record,
    metrics=metrics,
    published=published,
    seed=[0] if config.scaling else list(range(config.seeds)),
    wall_time=time.perf_counter() - start,
    show=report,
  )


if __name__ == "__main__":
  main(parse())
