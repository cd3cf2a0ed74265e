"""Graph Mamba beside graph convolutions with residuals of the same width, under one setting of rate and dropout.

    python experiments/graph_mamba.py                              # carry a colour round a ring, minutes
    python experiments/graph_mamba.py --dataset minesweeper        # needs JAXLAB_DATA or a download
    python experiments/graph_mamba.py --dataset MUTAG              # likewise, ten folds; or PROTEINS
    python experiments/graph_mamba.py --dataset minesweeper --tune

Ring: one of n nodes has one of four colours; the node opposite must say which. Degrees are all equal, so nodes are read
in a random order, and one direction alone finds the colour earlier in the sequence in half of the rings only; graph
convolutions see as far as they have layers. Minesweeper: ROC AUC on the first official splits. MUTAG and PROTEINS:
accuracy over the ten published folds, a ninth of each training part held out. In all cases the test score is that of
the epoch with the best validation score. The figure of the ring also times a step against the number of tokens.
"""

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import rich.table

from jaxlab import memory, train
from jaxlab.data import heterophilous, tu
from jaxlab.graph import encodings, layers, sparse, structure, tokens
from jaxlab.graph.nets import graph_mamba
from jaxlab.train import command
from jaxlab.train.result import finished_result, print_metrics, settings

COLORS, WALKS = 4, 4


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  dataset: Literal["ring", "minesweeper", "MUTAG", "PROTEINS"] = "ring"
  """ring is generated; the others are the files of `jaxlab.data.heterophilous` and `jaxlab.data.tu`."""
  runs: int = 0
  """Seeds (ring), splits (minesweeper) or folds; 0 for 2, 3 and 10."""
  epochs: int = 0
  """Updates (ring, minesweeper) or passes over the graphs; 0 for 400, 300 and 40."""
  features: int = 0
  """Width of all methods; 0 for 32. Minesweeper's published numbers are of larger networks."""
  ring: tuple[int, ...] = (50, 100, 200)
  """Sizes of the rings."""
  length: int = 2
  """m, longest walks of the tokens."""
  repetitions: int = 1
  """s, tokens of each length."""
  preset: Literal["demo", "paper"] = "demo"
  """paper: ten splits or folds, 300 epochs, width 64, m = 4 and s = 4 (the paper reports its search space only)."""
  methods: tuple[str, ...] = ()
  """Names of methods; all if empty."""
  tune: bool = False
  """Only search the grid: validation scores on the last split or fold."""
  workdir: pathlib.Path = pathlib.Path("runs/graph_mamba")
  """Each setting has a folder in here; finished parts are not trained again."""


PRESETS = {"demo": Config(), "paper": Config(preset="paper", runs=10, epochs=300, features=64, length=4, repetitions=4)}
parse = command.parser(PRESETS, __doc__)


class Problem(NamedTuple):
  """One run: batches of one shape.

  Attributes:
    train: step -> batch.
    evaluation: batches with masks "validation" and "test".
    steps: updates in all.
    epoch: updates between evaluations.
    task: "node" or "graph".
    outputs: classes.
    auc: score by ROC AUC in place of accuracy.
  """

  train: Callable[[int], dict[str, Any]]
  evaluation: list[dict[str, Any]]
  steps: int
  epoch: int
  task: str
  outputs: int
  auc: bool = False


# -------------------------------------------------------------------------------------------------------------- methods


class OnBatch(nn.Module):
  """Graph Mamba on a batch's graph, with its tokens or without."""

  net: graph_mamba.GraphMamba
  use_tokens: bool = True

  def __call__(self, batch, *, train: bool = False):
    """Outputs."""
    found = batch["tokens"] if self.use_tokens else None
    return self.net(batch["graph"], found, batch["operator"], train=train)


class ResidualGCN(nn.Module):
  """The baseline: depth times x + dropout(ReLU(GCN(LN x))), as in Platonov et al., with Graph Mamba's heads."""

  outputs: int
  task: str
  features: int
  depth: int = 4
  dropout: float = 0.0

  @nn.compact
  def __call__(self, batch, *, train: bool = False):
    """Outputs."""
    graph = batch["graph"]
    x = nn.Dense(self.features)(graph.nodes)
    for _ in range(self.depth):
      h = nn.relu(layers.GCNConv(self.features)(batch["normalized"], nn.LayerNorm()(x)))
      x = x + layers.Dropout(self.dropout)(h, train=train)
    x = nn.LayerNorm()(x)
    if self.task == "graph":
      x = graph_mamba.mean_nodes(graph._replace(nodes=x), structure.graph_ids(graph))
      x = layers.Dropout(self.dropout)(nn.relu(nn.Dense(self.features)(x)), train=train)
    return nn.Dense(self.outputs)(x)


# The grid of `--tune`, the same 4 points for each method. What it picks (learning rate, dropout) belongs in TUNED; data
# sets and methods that are not there have DEFAULT.
GRID = {"learning_rate": (3e-3, 1e-2), "dropout": (0.0, 0.2)}
TUNED: dict[str, dict[str, tuple[float, float]]] = {}
DEFAULT = (3e-3, 0.0)


def method(name: str, config: Config, problem: Problem, dropout: float) -> nn.Module:
  """A network by name."""
  width = config.features
  if name == "GCN":
    return ResidualGCN(problem.outputs, problem.task, width, dropout=dropout)
  changes = {
    "task": problem.task, "features": width, "dropout": dropout, "num_layers": 2, "state_size": 8,
    "eigenvectors": 0 if config.dataset in ("ring", "minesweeper") else 4,
  }  # fmt: skip
  if "one direction" in name:
    changes["bidirectional"] = False
  if "no MPNN" in name:
    changes["mpnn"] = None
  return OnBatch(graph_mamba.gmn(problem.outputs, **changes), "m = 0" not in name)


METHODS = {
  "ring": ("GMN", "GMN, one direction", "GMN, m = 0", "GCN"),
  "minesweeper": ("GMN", "GMN, one direction", "GMN, m = 0", "GMN, no MPNN", "GCN"),
  "MUTAG": ("GMN", "GMN, m = 0", "GCN"),
  "PROTEINS": ("GMN", "GMN, m = 0", "GCN"),
}


def learner(net: nn.Module, problem: Problem, learning_rate: float) -> train.Learner:
  """AdamW with a tenth of warm-up and a cosine; evaluation counts hits, or ranks, by part."""
  warmup = min(max(problem.steps // 10, 1), problem.steps - 1)
  schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, problem.steps)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-4, mask=train.decay_mask))
  loss = train.cross_entropy(labels=lambda b: b["labels"], mask=lambda b: b["train"])
  base = train.supervised(net, loss, tx, inputs=lambda batch: batch)

  def evaluate(state, batch):
    logits = net.apply(state.variables, batch)
    metrics = {}
    for part in ("validation", "test"):
      mask = batch[part].astype("float32")
      if problem.auc:
        metrics[part] = roc_auc(logits[:, 1] - logits[:, 0], batch["labels"] == 1, batch[part])
      else:
        metrics[part] = jnp.sum(mask * (jnp.argmax(logits, -1) == batch["labels"]))
      metrics[f"{part}_count"] = jnp.ones(()) if problem.auc else jnp.sum(mask)
    return metrics

  return base._replace(init=jax.jit(base.init), step=jax.jit(base.step, donate_argnums=0), evaluate=jax.jit(evaluate))


def roc_auc(scores, positive, mask):
  """Chance that a positive scores above a negative, among the masked; ties count half."""
  values = jnp.sort(jnp.where(mask & ~positive, scores, jnp.inf))
  below = jnp.searchsorted(values, scores, side="left") + jnp.searchsorted(values, scores, side="right")
  return jnp.sum(jnp.where(mask & positive, below / 2, 0)) / (jnp.sum(mask & positive) * jnp.sum(mask & ~positive))


# ----------------------------------------------------------------------------------------------------------------- data


def batch_of(graphs, drawn, sizes, **arrays):
  """Graphs and their tokens as one batch of static sizes."""
  graph = structure.batch(graphs, nodes=sizes["nodes"], edges=sizes["edges"], num_graphs=sizes["graphs"])
  normalized = structure.batch(
    [structure.normalize(g) for g in graphs],
    nodes=sizes["nodes"],
    edges=sizes["edges"] + sizes["nodes"],
    num_graphs=sizes["graphs"],
  )
  joined = tokens.batch(
    drawn,
    graph_edges=[len(g.senders) for g in graphs],
    nodes=sizes["nodes"],
    members=sizes["members"],
    edges=sizes["token_edges"],
  )
  return {
    "graph": graph,
    "operator": sparse.operator(graph),
    "normalized": sparse.operator(normalized),
    "tokens": tokens.subgraphs(joined),
    **arrays,
  }


def least_sizes(packs, graphs, drawn):
  """Sizes that the largest of the packs (lists of graph numbers) needs."""
  most = lambda count: max(sum(count(i) for i in pack) for pack in packs)
  return {
    "nodes": most(lambda i: len(graphs[i].nodes)) + 1,
    "edges": most(lambda i: len(graphs[i].senders)),
    "graphs": max(map(len, packs)) + 1,
    "members": most(lambda i: len(drawn[i].members)) + 1,
    "token_edges": most(lambda i: len(drawn[i].edges)),
  }


def ring_problem(config: Config, n: int, seed: int, rings: int = 16) -> Problem:
  """Rings in one numbering each, source and target opposite; new ones at each step."""
  around = np.arange(n)

  def draw(stream, step):
    rng = np.random.default_rng([seed, stream, step])
    graphs, labels, mask = [], np.zeros(rings * n + 1, "int32"), np.zeros(rings * n + 1, bool)
    for i in range(rings):
      place, color = rng.permutation(n), rng.integers(COLORS)
      x = np.zeros((n, COLORS + 1), "float32")
      x[place[0], color], x[place[n // 2], COLORS] = 1, 1
      graphs.append(structure.from_edges(place, place[(around + 1) % n], num_nodes=n, nodes=x, undirected=True))
      labels[i * n + place[n // 2]], mask[i * n + place[n // 2]] = color, True
    drawn = [tokens.sample(g, length=1, walks=2, seed=step) for g in graphs]
    sizes = {
      "nodes": rings * n + 1, "edges": 2 * rings * n, "graphs": rings + 1, "members": 4 * rings * n + 1,
      "token_edges": 4 * rings * n,
    }  # fmt: skip
    return batch_of(
      graphs, drawn, sizes, labels=labels, train=mask, validation=mask & (stream == 1), test=mask & (stream == 2)
    )

  evaluation = [draw(stream, step) for stream in (1, 2) for step in range(8)]
  return Problem(lambda step: draw(0, step), evaluation, config.epochs, max(config.epochs // 10, 1), "node", COLORS)


def minesweeper_problem(config: Config, split: int) -> Problem:
  """The whole graph in every step; encodings are return probabilities of random walks."""
  dataset = heterophilous.load("minesweeper", split)
  graph = structure.from_edges(dataset.senders, dataset.receivers, num_nodes=dataset.num_nodes)
  graph = graph._replace(nodes=np.concatenate([dataset.features, encodings.random_walk(graph, 8)], 1))
  drawn = [tokens.sample(graph, length=config.length, walks=WALKS, repetitions=config.repetitions)]
  masks = {"train": dataset.train_mask, "validation": dataset.val_mask, "test": dataset.test_mask}
  pad = lambda a: np.append(a, np.zeros(1, a.dtype))
  batch = batch_of(
    [graph], drawn, least_sizes([[0]], [graph], drawn), labels=pad(dataset.labels),
    **{name: pad(mask) for name, mask in masks.items()},
  )  # fmt: skip
  batch = jax.tree.map(jnp.asarray, batch)
  return Problem(lambda step: batch, [batch], config.epochs, 5, "node", 2, auc=True)


def fold_problems(config: Config, size: int = 32) -> list[Problem]:
  """Folds of a set of graphs, in packs of about equal numbers of nodes that stay together through training."""
  dataset = tu.load(config.dataset)
  graphs = []
  for g in dataset.graphs:
    graph = structure.from_edges(g.senders, g.receivers, num_nodes=len(g.features))
    encoded = encodings.random_walk(graph, 8), encodings.laplacian_eigenvectors(graph, 4)
    graphs.append(graph._replace(nodes=np.concatenate([g.features, *encoded], 1)))
  options = {"length": config.length, "walks": WALKS, "repetitions": config.repetitions}
  drawn = [tokens.sample(g, **options, seed=i) for i, g in enumerate(graphs)]

  def packs(which, rng):
    order = rng.permutation(which)
    order = order[np.argsort([-len(graphs[i].nodes) for i in order], kind="stable")]
    count = -(-len(order) // size)
    rows = [order[i : i + count] for i in range(0, len(order), count)]
    rows = [row[::-1] if i % 2 else row for i, row in enumerate(rows[:-1])] + rows[-1:]
    return [[row[i] for row in rows if i < len(row)] for i in range(count)]

  parts = []
  for fold, (inside, test) in enumerate(dataset.folds):
    rng = np.random.default_rng(fold)
    inside = rng.permutation(inside)
    validation, training = inside[: len(inside) // 9], inside[len(inside) // 9 :]
    parts.append((packs(training, rng), packs(validation, rng), packs(test, rng)))
  sizes = least_sizes([pack for part in parts for some in part for pack in some], graphs, drawn)  # of all folds

  def pack_of(pack, name):
    labels, mask = np.zeros(sizes["graphs"], "int32"), np.zeros(sizes["graphs"], bool)
    labels[: len(pack)], mask[: len(pack)] = dataset.labels[pack], True
    masks = {part: mask & (part == name) for part in ("train", "validation", "test")}
    batch = batch_of([graphs[i] for i in pack], [drawn[i] for i in pack], sizes, labels=labels, **masks)
    return jax.tree.map(np.asarray, batch)

  problems = []
  for fold, (training, validation, test) in enumerate(parts[: config.runs]):
    made = [pack_of(pack, "train") for pack in training]
    evaluation = [pack_of(p, "validation") for p in validation] + [pack_of(p, "test") for p in test]

    def at(step, made=made, fold=fold):
      epoch, i = divmod(step, len(made))
      return made[np.random.default_rng([fold, epoch]).permutation(len(made))[i]]

    steps = config.epochs * len(made)
    problems.append(Problem(at, evaluation, steps, len(made), "graph", dataset.num_classes))
  return problems


# ----------------------------------------------------------------------------------------------------------------- runs


def score(
  name: str, config: Config, problems: list[Problem], folder: pathlib.Path | None, setting: tuple[float, float]
):
  """Test and validation score (%) of each problem, at its epoch of best validation score."""
  net = method(name, config, problems[0], setting[1])
  trainer = learner(net, problems[0], setting[0])
  scores = []
  for run, problem in enumerate(problems):
    place = None if folder is None else folder / name.replace(", ", "-").replace(" ", "") / str(run)
    tables = fit(trainer, problem, place, {"method": str(net), "setting": list(setting)}, jax.random.key(run))
    validation, test = (tables[part] / tables[f"{part}_count"] for part in ("validation", "test"))
    best = int(np.argmax(validation))
    scores.append((100 * test[best], 100 * validation[best]))
  return np.array(scores).T


def fit(trainer, problem, place, setting, key):
  """Metrics at every evaluation, name -> [T]; without a folder nothing is written."""
  if place is not None:
    train.fit(
      trainer, problem.train, steps=problem.steps, workdir=place, key=key, config=setting,
      evaluate_on=problem.evaluation, evaluate_every=problem.epoch, save_every=problem.steps, tensorboard=False,
    )  # fmt: skip
    return {k.removeprefix("eval_"): v for k, (_, v) in train.read_metrics(place).items() if k.startswith("eval_")}
  state, rows = trainer.init(key, problem.train(0)), []
  for step in range(problem.steps):
    state, _ = trainer.step(state, problem.train(step))
    if (step + 1) % problem.epoch == 0:
      found = [trainer.evaluate(state, batch) for batch in problem.evaluation]
      rows.append({k: np.mean([float(f[k]) for f in found]) for k in found[0]})
  return {k: np.array([row[k] for row in rows]) for k in rows[0]}


def tune(config: Config) -> None:
  """Validation score of each point of the grid, for the same methods and updates."""
  if config.dataset == "minesweeper":
    problems = [minesweeper_problem(config, heterophilous.NUM_SPLITS - 1)]
  elif config.dataset == "ring":
    problems = [ring_problem(config, config.ring[0], 1000)]
  else:
    problems = fold_problems(dataclasses.replace(config, runs=tu.NUM_FOLDS))[-1:]
  for name in config.methods or ("GMN", "GCN"):
    for setting in itertools.product(*GRID.values()):
      _, validation = score(name, config, problems, None, setting)
      rich.print(f"{config.dataset} {name} {dict(zip(GRID, setting, strict=True))}: {validation.mean():.2f} %")


def timing(sizes=(1000, 2000, 4000, 8000, 16000)) -> dict[str, np.ndarray]:
  """Milliseconds of a gradient step over n tokens (m = 0, width 32): Graph Mamba's block, attention for three sizes."""
  from jaxlab.nn.mamba import BidirectionalMamba

  class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
      return x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))

  found: dict[str, list[float]] = {"block": [], "attention": []}
  for name, net in (("block", BidirectionalMamba()), ("attention", Attention())):
    for n in sizes if name == "block" else sizes[:3]:
      x = jnp.ones((1, n, 32))
      variables = jax.jit(net.init)(jax.random.key(0), x)
      step = jax.jit(jax.grad(lambda v, x, net=net: (net.apply(v, x) ** 2).sum()))
      jax.block_until_ready(step(variables, x))
      times = []
      for _ in range(9):
        start = time.perf_counter()
        jax.block_until_ready(step(variables, x))
        times.append(1000 * (time.perf_counter() - start))
      found[name].append(float(np.median(times)))
  return {name: np.array(values) for name, values in found.items()} | {"tokens": np.array(sizes)}


# Minesweeper ROC AUC (%): Behrouz and Hashemi, tables 3 and 4. TU sets are not in the paper.
PUBLISHED = {
  "minesweeper": {"GMN": 91.01, "GMN, one direction": 85.97, "GMN, no MPNN": 89.83, "GCN": 89.75},
}
BUDGET = {"ring": (2, 400), "minesweeper": (3, 300), "MUTAG": (10, 40), "PROTEINS": (10, 40)}


def resolve(config: Config) -> Config:
  """Fills in what depends on the data set and the preset."""
  runs, epochs = BUDGET[config.dataset]
  changes: dict[str, Any] = {"runs": config.runs or runs, "epochs": config.epochs or epochs}
  changes["features"] = config.features or 32
  names = METHODS[config.dataset]
  if set(config.methods) - set(names):
    raise ValueError(f"methods: got {config.methods}, expected some of {names}")
  return dataclasses.replace(config, methods=config.methods or names, **changes)


def draw(config: Config, table: dict[str, dict[str, np.ndarray]], times, folder: pathlib.Path) -> None:
  """Scores by method, over the sizes of the rings where there are several, and times of a step."""
  figure, (axes,) = train.figures.subplots(1, 1 if times is None else 2)
  if times is None:
    for i, (name, values) in enumerate(table[config.dataset].items()):
      axes[0].errorbar(i, values.mean(), values.std(ddof=1) if len(values) > 1 else 0, fmt="o", capsize=4)
      axes[0].plot(np.full(len(values), i + 0.15), values, ".", color="gray", markersize=4)
      published = PUBLISHED.get(config.dataset, {}).get(name)
      if published is not None:
        axes[0].plot(i, published, "k_", markersize=14)
    axes[0].set_xticks(range(len(table[config.dataset])), list(table[config.dataset]), rotation=20, ha="right")
    unit = "ROC AUC (%)" if config.dataset == "minesweeper" else "accuracy (%)"
    bars = " (bars: published)" if config.dataset in PUBLISHED else ""
    axes[0].set(ylabel=f"test {unit}", title=f"{config.dataset}{bars}")
  else:
    sizes = np.array(config.ring)
    series = {name: (sizes, np.stack([table[f"ring {n}"][name] for n in config.ring])) for name in config.methods}
    train.figures.curves(
      axes[0], series, xlabel="nodes of the ring", ylabel="test accuracy (%)", title="Colour of the opposite node"
    )
    curves = {name: (times["tokens"][: len(times[name])], times[name]) for name in ("block", "attention")}
    train.figures.curves(axes[1], curves, xlabel="tokens", ylabel="gradient step (ms)", title="Cost of one layer")
    axes[1].set(xscale="log", yscale="log")
  train.figures.save(figure, folder / "figure.png")


def main(config: Config) -> None:
  """Trains what is not trained yet, then draws and reports."""
  memory.keep()
  config = resolve(config)
  if config.tune:
    return tune(config)
  name = f"{config.dataset}-{config.runs}x{config.epochs}-{config.features}-m{config.length}s{config.repetitions}"
  folder, start = config.workdir / name, time.perf_counter()
  record = settings(dataclasses.asdict(config) | {"tuned": TUNED.get(config.dataset, {})})
  if result := finished_result(folder, record):
    return print_metrics(result)

  if config.dataset == "ring":
    groups = {f"ring {n}": [ring_problem(config, n, seed) for seed in range(config.runs)] for n in config.ring}
  elif config.dataset == "minesweeper":
    groups = {"minesweeper": [minesweeper_problem(config, split) for split in range(config.runs)]}
  else:
    groups = {config.dataset: fold_problems(config)}
  table: dict[str, dict[str, np.ndarray]] = {}
  for group, problems in groups.items():
    table[group] = {}
    for method_name in config.methods:
      setting = TUNED.get(config.dataset, {}).get("GCN" if method_name == "GCN" else "GMN", DEFAULT)
      place = folder / group.replace(" ", "-")
      table[group][method_name], _ = score(method_name, config, problems, place, setting)
      rich.print(f"{group} {method_name}: {table[group][method_name].mean():.2f} %")
  times = timing() if config.dataset == "ring" else None
  draw(config, table, times, folder)
  metrics = {
    method_name if len(table) == 1 else f"{method_name}, {group}": values
    for group, scores in table.items()
    for method_name, values in scores.items()
  }
  if times is not None:
    for name in ("block", "attention"):
      smallest, largest = times["tokens"][[0, len(times[name]) - 1]]
      metrics[f"time of {largest} tokens over {smallest}, {name}"] = float(times[name][-1] / times[name][0])
  published = {
    n: {"value": v, "source": "Behrouz and Hashemi 2024, tables 3 and 4, larger networks"}
    for n, v in PUBLISHED.get(config.dataset, {}).items()
    if n in metrics
  }
  train.report(
    folder,
    system="graph_mamba",
    claim={
      "ring": "How far a colour is carried along a ring, by both directions or by one, and the cost against tokens.",
      "minesweeper": "ROC AUC of GMN and its ablations beside a GCN with residuals of the same width.",
    }.get(config.dataset, "Accuracy of GMN, with tokens and without, beside a GCN with residuals of the same width."),
    dataset=f"{config.dataset}, width {config.features}",
    config=record,
    metrics=metrics,
    published=published,
    seed=list(range(config.runs)),
    wall_time=time.perf_counter() - start,
  )


if __name__ == "__main__":
  main(parse())
