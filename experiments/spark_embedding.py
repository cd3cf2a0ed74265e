"""DistNE beside one embedding of the whole graph and beside parts without borders; and its cost up to 10^7 edges.

    python experiments/spark_embedding.py                               # digits on their nearest-neighbour graph
    python experiments/spark_embedding.py --dataset amazon_photo        # minutes a seed; goes on where it was
    python experiments/spark_embedding.py --scaling                     # 10^5 to 10^7 edges; goes on where it was
    python experiments/spark_embedding.py --scaling --edges 1000000     # one size
    python experiments/spark_embedding.py --master spark://host:7077    # on a cluster
    python experiments/spark_embedding.py --preset paper                # ten seeds, all on Spark

Needs Java and `pip install 'jaxlab[spark]'`. Each seed hides 5 % of the edges, and draws partition, embedding and
labelled nodes. Hidden edges are told from as many pairs that are none by the dot product, and by a logistic regression
on products of entries that is fitted on train edges; nodes are classified from a tenth of the labels. The DistNE rows
come from the job on Spark with `--engine spark`. By default they come from its reference in one process, which is
faster on small graphs, and the job is run once to count the numbers in which the two differ.

The paper's graphs (billions of edges, two games) are not public, so neither its times nor its gains can be set beside.
"""

import contextlib
import dataclasses
import functools
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np
import pandas as pd
import rich
import scipy.sparse
from jaxtyping import Bool, Float, Int
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from jaxlab import train
from jaxlab.data import digits, networks
from jaxlab.graph import evaluation
from jaxlab.graph.embedding import fastrp
from jaxlab.graph.embedding import spark_embedding as se
from jaxlab.train import command
from jaxlab.train.result import finished_result, once, print_metrics, settings

EDGES = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
WHOLE, PARTS, DISTNE = "whole graph", "parts, no border", "DistNE"
METHODS: dict[str, dict[str, Any]] = {
  WHOLE: {"parts": 1},
  PARTS: {"max_depth": 0},
  DISTNE: {},
  "parts, no border, refined": {"max_depth": 0, "refine_rounds": 10},
  "DistNE, refined": {"refine_rounds": 10},
  "DistNE, cross edges": {"border": "cross"},
  "DistNE, last border whole": {"last": "whole"},
  "DistNE, last border whole, refined": {"last": "whole", "refine_rounds": 10},
  "DistNE, sum": {"fusion": "sum"},
  "DistNE, sum, last border whole": {"fusion": "sum", "last": "whole"},
}
CLOSERS = ("DistNE, last border whole", "DistNE, sum", "DistNE, sum, last border whole")
DIFFER = "numbers in which Spark and reference differ"
TESTS = ("dot AUC", "Hadamard AUC", "accuracy")


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  dataset: Literal["digits", "amazon_photo", "coauthor_cs"] = "digits"
  """digits ships with scikit-learn."""
  dim: int = 128
  """Columns of the embedding."""
  parts: int = 8
  """Parts of the first split."""
  leaf_nodes: int = 0
  """Largest subgraph of a task; 0 is a fifth of the graph."""
  seeds: int = 5
  """Hidden edges, partitions, embeddings and labelled nodes."""
  engine: Literal["reference", "spark"] = "reference"
  """What computes DistNE in the study of quality."""
  preset: Literal["demo", "paper"] = "demo"
  """paper: ten seeds, all on Spark."""
  scaling: bool = False
  """Measure time and memory on random graphs with communities instead: FastRP, 64 columns, leaves of 5,000 nodes."""
  edges: int = 0
  """With --scaling: only this size; 0 for all."""
  master: str = "local[2]"
  """Spark's master: threads of this machine, or a cluster's URL."""
  memory: str = "4g"
  """Heap of the driver and of each executor."""
  workdir: pathlib.Path = pathlib.Path("runs/spark_embedding")
  """Each setting has a folder in here with figure and result.json."""


PRESETS = {"demo": Config(), "paper": Config(preset="paper", seeds=10, engine="spark")}
parse = command.parser(PRESETS, __doc__)


@contextlib.contextmanager
def spark_session(config: Config, partitions: int) -> Iterator[SparkSession]:
  """That ends."""
  session = se.session(config.master, memory=config.memory, shuffle_partitions=partitions)
  session.sparkContext.setLogLevel("ERROR")
  try:
    yield session
  finally:
    session.stop()


# ----------------------------------------------------------------------------------------------------------- quality


def load(config: Config) -> tuple[Int[np.ndarray, "2 e"], Int[np.ndarray, " n"]]:
  """Edges, each once, and classes."""
  if config.dataset == "digits":
    graph = digits.graph()
    once = graph.senders < graph.receivers
    return np.stack([graph.senders, graph.receivers])[:, once], graph.labels
  adjacency, labels = getattr(networks, config.dataset)()
  return np.stack(scipy.sparse.triu(adjacency).nonzero()), labels


def options(config: Config, nodes: int, seed: int, method: str) -> se.Options:
  """Of a method."""
  leaf_nodes = config.leaf_nodes or nodes // 5
  common = {"dim": config.dim, "parts": config.parts, "leaf_nodes": leaf_nodes, "refine_rounds": 0, "seed": seed}
  return se.Options(**common | METHODS[method])


def on_spark(spark: SparkSession, edges: Int[np.ndarray, "2 e"], nodes: int, chosen: se.Options) -> np.ndarray:
  """Vectors of all nodes, in order."""
  frame = spark.createDataFrame(pd.DataFrame({"src": edges[0], "dst": edges[1]}))
  result = se.embed(frame, chosen, nodes=spark.range(nodes).withColumnRenamed("id", "v"))
  found = result.vectors.toPandas().sort_values("v")
  assert np.array_equal(found["v"], np.arange(nodes))
  return np.stack(found["z"].to_list())


def judge(
  z: Float[np.ndarray, "n d"],
  split: evaluation.EdgeSplit,
  negative: Int[np.ndarray, "2 m"],
  labels: Int[np.ndarray, " n"],
  labelled: Bool[np.ndarray, " n"],
) -> list[float]:
  """`TESTS`. The last of the negatives are for the hidden edges, the first to train on, with as many train edges."""
  hidden = split.test.shape[1]
  fit, held = negative[:, :-hidden], negative[:, -hidden:]

  def hadamard(*pairs):
    a, b = np.concatenate(pairs, axis=1)
    return z[a] * z[b], np.arange(len(a)) < pairs[0].shape[1]

  x, y = hadamard(split.test, held)
  x_fit, y_fit = hadamard(split.train[:, : fit.shape[1]], fit)
  logistic = LogisticRegression(max_iter=1000).fit(x_fit, y_fit)
  accuracy = evaluation.linear_probe(z, labels, labelled, ~labelled)
  return [roc_auc_score(y, x.sum(axis=1)), roc_auc_score(y, logistic.decision_function(x)), accuracy]


def one_seed(
  config: Config, edges: Int[np.ndarray, "2 e"], labels: Int[np.ndarray, " n"], seed: int
) -> dict[str, float]:
  """`TESTS` of all methods, and the rest."""
  n = len(labels)
  split = evaluation.edge_split(edges, seed, validation=0.0, test=0.05)
  hidden = split.test.shape[1]
  negative = evaluation.negative_edges(edges, n, hidden + min(split.train.shape[1], 20_000), seed)
  labelled = np.random.default_rng(seed).permutation(n) < n // 10
  found = {}
  with contextlib.ExitStack() as stack:
    spark = stack.enter_context(spark_session(config, 8)) if seed == 0 or config.engine == "spark" else None
    for method in METHODS:
      chosen = options(config, n, seed, method)
      if config.engine == "spark" and method != WHOLE:
        z = on_spark(spark, split.train, n, chosen)
      else:
        result = se.reference(*split.train, chosen, nodes=np.arange(n))
        z = result.vectors
        if method == DISTNE:
          found["border nodes (%)"] = 100 * result.levels[0].border / n
        if method == DISTNE and seed == 0:
          found[DIFFER] = float(np.count_nonzero(on_spark(spark, split.train, n, chosen) != z))
      scores = judge(z, split, negative, labels, labelled)
      found |= {f"{test}, {method}": score for test, score in zip(TESTS, scores, strict=True)}
      rich.print(f"seed {seed}, {method}:", dict(zip(TESTS, np.round(scores, 4).tolist(), strict=True)))
  degree = np.bincount(split.train.reshape(-1), minlength=n).astype(float)
  a, b = np.concatenate([split.test, negative[:, -hidden:]], axis=1)
  found["dot AUC, product of degrees"] = roc_auc_score(np.arange(2 * hidden) < hidden, degree[a] * degree[b])
  for test in TESTS:
    whole, parts = found[f"{test}, {WHOLE}"], found[f"{test}, {PARTS}"]
    for method in (DISTNE, *CLOSERS):
      found[f"gap closed (%), {test}, {method}"] = 100 * (found[f"{test}, {method}"] - parts) / (whole - parts)
  return found


def quality(config: Config, path: pathlib.Path) -> tuple[dict[str, Any], str]:
  """Scores of all methods, and how much of the distance from parts to the whole graph the border closes."""
  edges, labels = load(config)
  seeds = []
  for seed in range(config.seeds):
    make = functools.partial(one_seed, config, edges, labels, seed)
    seeds.append(once(path.parent / f"seed-{seed}.json", make, config))
  metrics: dict[str, Any] = {name: [one[name] for one in seeds if name in one] for name in seeds[0]}
  draw(config, metrics, path)
  dot = {method: np.array(metrics[f"dot AUC, {method}"]) for method in METHODS}
  closed = {method: np.mean(metrics[f"gap closed (%), dot AUC, {method}"]) for method in (DISTNE, *CLOSERS)}
  return metrics, (
    f"By dot product parts alone have {dot[PARTS].mean():.3f}, the whole graph {dot[WHOLE].mean():.3f}; of the gap "
    + ", ".join(f"{method} closes {share:.0f} %" for method, share in closed.items())
    + f". It reaches the whole graph in {np.mean([dot[m] >= dot[WHOLE] for m in closed]):.0%} of these runs."
  )


def draw(config: Config, metrics: dict[str, Any], path: pathlib.Path) -> None:
  """A panel a test, a bar a method."""
  figure, (axes,) = train.figures.subplots(1, len(TESTS), width=3.6)
  names = list(METHODS)[::-1]
  for panel, test in enumerate(TESTS):
    mean = [np.mean(metrics[f"{test}, {name}"]) for name in names]
    std = [np.std(metrics[f"{test}, {name}"]) for name in names]
    colors = [train.figures.COLORS[0 if name == WHOLE else 1 if name.startswith("parts") else 2] for name in names]
    axes[panel].barh(names, mean, xerr=std, color=colors, height=0.7)
    axes[panel].set(xlabel=test, xlim=(max(0.0, min(mean) - 0.1), 1), title=config.dataset if panel == 1 else "")
    if panel:
      axes[panel].set_yticklabels([])
  train.figures.save(figure, path)


# ----------------------------------------------------------------------------------------------------------- scaling

COMMUNITY, MEAN_DEGREE, OUTSIDE = 500, 20, 2  # nodes, neighbours, and percent of the edges that lead out
SCALED = se.Options(dim=64, leaf_nodes=5000, max_depth=1, refine_rounds=3)  # and parts enough to split once
COST = ("total (s)", "JVM (MB)", "Python workers, largest (MB)")


def fastrp_leaf(edges: Int[np.ndarray, "2 e"], num_nodes: int, dim: int, key: Any) -> Float[np.ndarray, "n dim"]:
  """FastRP as the base learner: linear in the edges of a leaf, where NetMF is quadratic in its nodes."""
  operator = se.padded_operator(edges, num_nodes)
  z = np.asarray(embed_padded(operator, fastrp.projection(key, operator.shape[0], dim)))[:num_nodes].astype(float)
  # Standardised again without the padding.
  std = z.std(axis=0)
  return ((z - z.mean(axis=0)) / np.where(std > 1e-6, std, 1)).astype("float32")


embed_padded = jax.jit(fastrp.embed)


def communities(spark: SparkSession, count: int, seed: int = 0) -> tuple[DataFrame, int]:
  """About `count` edges of a random graph with communities, made by the executors, and its number of nodes."""
  nodes = max(1, count * 2 // MEAN_DEGREE // COMMUNITY) * COMMUNITY

  def draw(what: int, below: int):
    return F.pmod(F.xxhash64(F.lit(2 * seed + 1).cast("long"), F.lit(what).cast("long"), "id"), F.lit(below))

  inside = (F.col("src") - F.col("src") % COMMUNITY) + draw(1, COMMUNITY)
  frame = spark.range(count).withColumn("src", draw(0, nodes))
  return frame.select("src", F.when(draw(2, 100) < OUTSIDE, draw(3, nodes)).otherwise(inside).alias("dst")), nodes


def resident() -> dict[int, tuple[str, float]]:
  """Peak resident megabytes of this process' descendants, by id, with their names."""
  parents, found = {}, {}
  for folder in pathlib.Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError, IndexError):
      status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
      parents[int(folder.name)] = int(status["PPid"])
      if "VmHWM" in status:
        found[int(folder.name)] = status["Name"].strip(), int(status["VmHWM"].split()[0]) / 1024
  here = threading.main_thread().native_id

  def below(process: int) -> bool:
    parent = parents.get(process, 0)
    return parent == here or (parent > 1 and below(parent))

  return {process: what for process, what in found.items() if below(process)}


@contextlib.contextmanager
def watched() -> Iterator[dict[str, float]]:
  """Peaks of the JVM and of the largest Python worker, in megabytes, sampled twice a second."""
  peaks, done = {"java": 0.0, "python": 0.0}, threading.Event()

  def watch():
    while not done.wait(0.5):
      for name, size in resident().values():
        kind = "java" if name == "java" else "python"
        peaks[kind] = max(peaks[kind], size)

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield peaks
  finally:
    done.set()
    thread.join()


def cost(config: Config, count: int) -> dict[str, float]:
  """Of one size, in a session of its own; vectors go to a file."""
  with spark_session(config, 16) as spark, watched() as peaks:
    frame, nodes = communities(spark, count)
    start = time.perf_counter()
    chosen = dataclasses.replace(SCALED, parts=max(2, int(1.1 * nodes / SCALED.leaf_nodes) + 1))
    result = se.embed(frame, chosen, embedder=fastrp_leaf)
    ready = time.perf_counter()
    folder = config.workdir / "scaling" / f"vectors-{count}"
    result.vectors.write.mode("overwrite").parquet(str(folder))
    end = time.perf_counter()
    rows = spark.read.parquet(str(folder)).agg(F.count("*").alias("n"), F.max(F.size("z")).alias("d")).first()
  assert rows is not None and rows["d"] == SCALED.dim
  levels = result.levels
  return {
    "total (s)": end - start,
    "fusion and writing (s)": end - ready,
    "JVM (MB)": peaks["java"],
    "Python workers, largest (MB)": peaks["python"],
    "nodes": float(rows["n"]),
    "nodes drawn from": float(nodes),
    "distinct edges": float(levels[0].edges),
    "levels": float(len(levels)),
    "border nodes (%)": 100 * levels[0].border / levels[0].nodes,
    "largest leaf (nodes)": float(result.peak_nodes),
    "rows of all levels": float(sum(level.nodes for level in levels)),
  }


def scale(config: Config, path: pathlib.Path) -> tuple[dict[str, Any], str] | None:
  """Cost against edges; None if only one of the sizes was asked for. Finished sizes are kept in files."""
  table = {}
  for count in (config.edges,) if config.edges else EDGES:
    file = path.parent / f"{count}-{config.master.replace('/', '_')}-{config.memory}.json"
    table[count] = once(file, functools.partial(cost, config, count))
    rich.print(f"{count} edges:", {key: round(value, 1) for key, value in table[count].items()})
  if config.edges:
    return None
  edges = np.array([table[count]["distinct edges"] for count in EDGES])
  series = {name: np.array([table[count][name] for count in EDGES]) for name in COST}
  seconds = series["total (s)"]
  slope = float(np.polyfit(np.log(edges[-3:]), np.log(seconds[-3:]), 1)[0])
  fit = np.polyfit(edges, seconds, 1)
  metrics = {f"{name}, {count} edges": value for count in EDGES for name, value in table[count].items()}
  metrics["slope of log time against log edges, from 10^6"] = slope
  metrics["seconds for each 10^6 edges more"] = float(1e6 * fit[0])
  metrics["growth of time over growth of edges, last step"] = float(seconds[-1] / seconds[-2] / (edges[-1] / edges[-2]))
  figure, (axes,) = train.figures.subplots(1, 2)
  train.figures.curves(axes[0], {"measured": (edges, seconds)}, xlabel="edges", ylabel="time (s)", title=config.master)
  axes[0].plot(edges, seconds[-1] * edges / edges[-1], "--", color="gray", label="in proportion to edges")
  axes[0].legend()
  memory = {"JVM": (edges, series[COST[1]]), "largest Python worker": (edges, series[COST[2]])}
  train.figures.curves(axes[1], memory, xlabel="edges", ylabel="peak memory (MB)", title=f"heap of {config.memory}")
  for panel in axes:
    panel.set(xscale="log", yscale="log")
    for line in panel.lines[: 1 if panel is axes[0] else 2]:
      line.set_marker("o")
  train.figures.save(figure, path)
  return metrics, (
    f"{edges[-1]:.3g} edges in {seconds[-1]:.0f} s on {config.master} with a heap of {config.memory}; time grows as "
    f"edges to the power {slope:.2f} from 10^6, and no task holds more than {SCALED.leaf_nodes} nodes."
  )


# ------------------------------------------------------------------------------------------------------------- main


def main(config: Config) -> None:
  """Runs the experiment, or shows a finished one."""
  for name, least in (("seeds", 1), ("parts", 2), ("dim", 2), ("leaf_nodes", 0), ("edges", 0)):
    if getattr(config, name) < least:
      raise ValueError(f"{name}: got {getattr(config, name)}, expected at least {least}")
  folder = config.workdir / ("scaling" if config.scaling else f"{config.dataset}-{config.dim}-{config.seeds}")
  record = settings(dataclasses.asdict(config) | ({"options": vars(SCALED)} if config.scaling else {}))
  if result := finished_result(folder, record):
    return print_metrics(result)
  start = time.perf_counter()
  run: Callable[..., tuple[dict[str, Any], str] | None] = scale if config.scaling else quality
  found = run(config, folder / "figure.png")
  if found is None:
    return None
  metrics, claim = found
  train.report(
    folder,
    system="spark_embedding",
    claim=claim,
    dataset="random graphs with communities" if config.scaling else config.dataset,
    config=record,
    metrics=metrics,
    published={},
    seed=[0] if config.scaling else list(range(config.seeds)),
    wall_time=time.perf_counter() - start,
  )


if __name__ == "__main__":
  main(parse())
