"""Do graphlet orbits tell labels that random walks miss? And what all 28 matrices cost.

    python experiments/graphlet_orbits.py                            # digits on their nearest-neighbour graph, minutes
    python experiments/graphlet_orbits.py --dataset email_eu_core    # also cora, citeseer
    python experiments/graphlet_orbits.py --scaling                  # time and memory, 1,000 to 20,000 nodes
    python experiments/graphlet_orbits.py --large                    # 20,000 nodes with a heavier tail

A candidate is a matrix of co-occurrence: one of 19 orbit adjacencies (a pair of different orbits is symmetrised), the
adjacency of one of the graphlets G1 to G8, or walks within a window. Each is taken through the same steps: positive
mutual information, its rank-k factor, logistic regression. A family's candidate and the penalty are picked on a quarter
of the training nodes of each fold, and the accuracy is that of the held-out fold; so a family of more candidates gains
no more than what it can tell without the test nodes. `walks and orbit` joins the halves of largest singular values of
both picks. Nodes of classes with fewer than 10 members count in the graph and not in the score.

The paper's six networks and its protocol were not at hand.
"""

import dataclasses
import functools
import pathlib
import re
import time
from typing import Any, Literal

import jax
import numpy as np
import rich
import rich.table
import scipy.sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, train_test_split

from jaxlab import train
from jaxlab.data import digits, networks, planetoid, synthetic
from jaxlab.graph import common_neighbors
from jaxlab.graph.embedding import graphlet_orbits as go
from jaxlab.train import command
from jaxlab.train.result import finished_result, once, print_metrics, settings

PAIRS = tuple(pair for pair in go.ORBIT_PAIRS[1:] if pair[1] <= pair[2])  # the first is the adjacency itself
FAMILIES = ("walks", "orbits", "graphlets", "walks and orbit")
SIZES = (1_000, 2_000, 4_000, 8_000, 16_000, 20_000)  # of the scaling study
LARGE = 20_000


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  dataset: Literal["digits", "email_eu_core", "cora", "citeseer"] = "digits"
  """digits ships with scikit-learn."""
  dim: int = 64
  """Columns of every embedding."""
  windows: tuple[int, ...] = (1, 2, 3, 5, 10)
  """Steps of walks to pick from; 1 is the adjacency."""
  penalties: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
  """Inverse strengths to pick from, for embeddings of standard deviation 1."""
  folds: int = 5
  """Of cross-validation."""
  seeds: int = 5
  """Divisions into folds."""
  preset: Literal["demo", "paper"] = "demo"
  """paper: email-Eu-core over ten divisions."""
  scaling: bool = False
  """Measure cost on Barabasi-Albert graphs of ten edges a node instead."""
  large: bool = False
  """Measure cost on one Chung-Lu graph with exponent 2.5 instead."""
  workdir: pathlib.Path = pathlib.Path("runs/graphlet_orbits")
  """Each setting has a folder in here with figure and result.json."""


PRESETS = {"demo": Config(), "paper": Config(preset="paper", dataset="email_eu_core", seeds=10)}
parse = command.parser(PRESETS, __doc__)


# ------------------------------------------------------------------------------------------------------------- labels


def load(config: Config) -> tuple[scipy.sparse.csr_array, np.ndarray]:
  """Adjacency, and the class of each node."""
  if config.dataset == "email_eu_core":
    return networks.email_eu_core()
  graph: Any = digits.graph() if config.dataset == "digits" else planetoid.load(config.dataset)
  return common_neighbors.adjacency(np.stack([graph.senders, graph.receivers]), len(graph.labels)), graph.labels


def candidates(config: Config, graph: scipy.sparse.csr_array) -> dict[str, dict[str, Any]]:
  """Family -> name -> matrix."""
  matrices = go.orbit_adjacencies(graph)
  return {
    "walks": {f"{steps} steps": go.walk_adjacency(graph, steps) for steps in config.windows},
    "orbits": {name_of(pair): matrices[pair] for pair in PAIRS},
    "graphlets": {f"G{g}": go.graphlet_adjacency(matrices, g) for g in range(1, 9)},
  }


def name_of(pair: go.OrbitPair) -> str:
  """As the figure shows it."""
  return "{}; {}, {}".format(*pair)


embed = jax.jit(go.embed, static_argnames=("dim",))


def vectors(config: Config, matrix: scipy.sparse.csr_array) -> np.ndarray:
  """[N, dim] of standard deviation 1, or zeros."""
  # Dense, so that all matrices share one compiled program.
  x = np.asarray(embed(go.ppmi(matrix).toarray(), jax.random.key(0), dim=config.dim))
  return x / (x.std() or 1)


def fit(x: np.ndarray, y: np.ndarray, penalty: float, learn: np.ndarray, test: np.ndarray) -> float:
  """Accuracy of a multinomial logistic regression."""
  return float(LogisticRegression(C=penalty, max_iter=500).fit(x[learn], y[learn]).score(x[test], y[test]))


def tuned(config: Config, x: np.ndarray, y: np.ndarray, learn: np.ndarray, seed: int) -> tuple[float, float]:
  """Validation accuracy and penalty, without the fold's test nodes."""
  part, validation = train_test_split(learn, test_size=0.25, random_state=seed, stratify=y[learn])
  return max((fit(x, y, penalty, part, validation), penalty) for penalty in config.penalties)


def division(
  config: Config, embedded: dict[str, dict[str, np.ndarray]], y: np.ndarray, seed: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, list[str]]]:
  """Accuracy on each fold of every family's pick and of every candidate, and which were picked."""
  accuracy: dict[str, list[float]] = {family: [] for family in (*FAMILIES, "largest class")}
  each: dict[str, list[float]] = {f"{family}: {name}": [] for family in embedded for name in embedded[family]}
  picks: dict[str, list[str]] = {family: [] for family in embedded}
  for learn, test in StratifiedKFold(config.folds, shuffle=True, random_state=seed).split(y, y):
    for family, xs in embedded.items():
      found = {name: tuned(config, x, y, learn, seed) for name, x in xs.items()}
      for name, (_, penalty) in found.items():
        each[f"{family}: {name}"].append(fit(xs[name], y, penalty, learn, test))
      picks[family].append(max(found, key=lambda name: found[name]))
      accuracy[family].append(each[f"{family}: {picks[family][-1]}"][-1])
    half = config.dim // 2
    both = np.concatenate([embedded[f][picks[f][-1]][:, :half] for f in ("walks", "orbits")], axis=1)
    both = both / (both.std() or 1)
    accuracy["walks and orbit"].append(fit(both, y, tuned(config, both, y, learn, seed)[1], learn, test))
    accuracy["largest class"].append(float(np.mean(y[test] == np.bincount(y[learn]).argmax())))
  return accuracy, each, picks


def compare(config: Config, folder: pathlib.Path) -> tuple[dict[str, Any], str]:
  """Metrics, one value for each division, and claim; draws them. Divisions that were finished before are read."""
  graph, labels = load(config)
  counted = np.flatnonzero((labels >= 0) & (np.bincount(labels + 1)[labels + 1] >= 10))
  y = labels[counted]
  embedded = {
    family: {name: vectors(config, m)[counted] for name, m in each.items()}
    for family, each in candidates(config, graph).items()
  }
  rich.print(f"{graph.shape[0]} nodes, {graph.nnz // 2} edges, {len(y)} nodes of {len(np.unique(y))} classes counted")
  made = []
  for seed in range(config.seeds):
    make = functools.partial(division, config, embedded, y, seed)
    made.append(once(folder / f"division{seed}.json", make, config))
    rich.print(f"seed {seed}: " + ", ".join(f"{f} {np.mean(a):.4f}" for f, a in made[-1][0].items()))
  accuracy, each = ({name: np.mean([m[k][name] for m in made], axis=1) for name in made[0][k]} for k in (0, 1))
  picked = {family: [name for m in made for name in m[2][family]] for family in embedded}
  often = {family: max(set(names), key=names.count) for family, names in picked.items()}
  best = {f: max((a.mean(), name) for name, a in each.items() if name.startswith(f)) for f in ("walks", "orbits")}
  gain = accuracy["orbits"] - accuracy["walks"]
  metrics: dict[str, Any] = {f"accuracy, {name}": list(a) for name, a in (accuracy | each).items()}
  metrics["accuracy, orbits minus walks"] = list(gain)
  draw(config, accuracy, each, folder)
  claim = (
    f"Orbits {accuracy['orbits'].mean():.3f} (picked most often: {often['orbits']}), walks "
    f"{accuracy['walks'].mean():.3f} ({often['walks']}), graphlets {accuracy['graphlets'].mean():.3f}, walks and orbit "
    f"together {accuracy['walks and orbit'].mean():.3f}; orbits minus walks {gain.mean():+.3f}, from {gain.min():+.3f} "
    f"to {gain.max():+.3f} over {config.seeds} divisions. Best in hindsight: {best['orbits'][1]} "
    f"{best['orbits'][0]:.3f}, {best['walks'][1]} {best['walks'][0]:.3f}."
  )
  return metrics, claim


def draw(config: Config, families: dict[str, np.ndarray], each: dict[str, np.ndarray], folder: pathlib.Path) -> None:
  """Every candidate's accuracy, and each family's as a line."""
  figure, ((axes,),) = train.figures.subplots(1, 1, width=11, height=3.8)
  colors = dict(zip(("walks", "orbits", "graphlets"), train.figures.COLORS, strict=False))
  hidden = {name_of(pair) for pair in go.INVISIBLE_TO_PATHS}
  for i, (candidate, a) in enumerate(each.items()):
    family, name = candidate.split(": ")
    seen = family == "orbits" and name not in hidden
    axes.bar(
      i, a.mean(), yerr=a.std(ddof=1) if len(a) > 1 else None, color=colors[family], alpha=1.0 if seen else 0.6,
      capsize=2, hatch="//" if seen else None, edgecolor="white",
    )  # fmt: skip
  for family, color in (*colors.items(), ("walks and orbit", "black")):
    axes.axhline(families[family].mean(), color=color, linewidth=1, label=f"{family}, picked by validation")
  axes.bar(0, 0, color=colors["orbits"], hatch="//", edgecolor="white", label="ends of a path over the whole graphlet")
  axes.axhline(families["largest class"].mean(), color="gray", linestyle=":", label="largest class")
  axes.set(xticks=range(len(each)), ylabel="accuracy", title=f"{config.dataset}, {config.dim} columns")
  axes.set_xticklabels([candidate.split(": ")[1] for candidate in each], rotation=75)
  axes.grid(axis="x", visible=False)
  axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)
  train.figures.save(figure, folder / "figure.png")


# --------------------------------------------------------------------------------------------------------------- cost


def chung_lu(num_nodes: int, mean_degree: float, exponent: float, seed: int) -> np.ndarray:
  """Edges [2, E] whose ends are drawn by weights with a power-law tail, for whoever comes."""
  rng = np.random.default_rng(seed)
  weights = np.arange(1, num_nodes + 1) ** (-1 / (exponent - 1))
  return rng.choice(num_nodes, (2, int(num_nodes * mean_degree / 2)), p=weights / weights.sum())


def resident(field: str) -> float:
  """GiB of this process: VmRSS now, VmHWM at its peak since `forget_peak`."""
  found = re.search(rf"^{field}:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text(), re.MULTILINE)
  assert found is not None, field
  return int(found.group(1)) / 2**20


def cost(edges: np.ndarray, num_nodes: int) -> dict[str, float]:
  """Streams all 28 matrices once; every row of degrees is checked by a second route."""
  graph = common_neighbors.adjacency(edges, num_nodes)
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  entries, largest, start, rows = 0, 0, time.perf_counter(), []
  for block in go.stream(graph):
    entries += sum(np.count_nonzero(hop.values) for hop in block.hops.values())
    largest = max(largest, *(int(hop.values.max(initial=0)) for hop in block.hops.values()))
    rows.append(np.stack([block.matrix(pair).sum(axis=1) for pair in ((3, 4, 4), (2, 12, 12), (2, 8, 8))], axis=1))
  seconds, peak = time.perf_counter() - start, resident("VmHWM")
  start = time.perf_counter()
  degrees = go.node_degrees(graph)
  degree_seconds = time.perf_counter() - start
  np.testing.assert_array_equal(np.concatenate(rows), degrees[:, [4, 12, 8]])
  found = {
    "nodes": num_nodes,
    "edges": graph.nnz // 2,
    "largest degree": int(degrees[:, 0].max()),
    "triangles": int(degrees[:, 3].sum()) // 3,
    "entries": entries,
    "largest entry": largest,
    "seconds": seconds,
    "peak GiB of the process": peak,
    "seconds for degree vectors alone": degree_seconds,
  }
  rich.print(", ".join(f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value:,}"
                       for name, value in found.items()))  # fmt: skip
  return found


def scale(folder: pathlib.Path) -> tuple[dict[str, Any], str]:
  """Barabasi-Albert graphs."""
  cost(np.stack(synthetic.barabasi_albert(200, 10)), 200)  # compiles
  found = [cost(np.stack(synthetic.barabasi_albert(n, 10, seed=42)), n) for n in SIZES]
  figure, (axes,) = train.figures.subplots(1, 2)
  take = lambda name: np.array([f[name] for f in found])
  shown = {
    "all 28 matrices": (SIZES, take("seconds")),
    "degree vectors": (SIZES, take("seconds for degree vectors alone")),
  }
  train.figures.curves(axes[0], shown, xlabel="nodes", ylabel="time (s)", title="10 edges a node")
  whole = take("entries") * 12 / 2**30
  memory = {
    "peak of the process": (SIZES, take("peak GiB of the process")),
    "all entries, if they were kept": (SIZES, whole),
    "28 dense matrices of int64": (SIZES, 28 * 8 * np.array(SIZES) ** 2 / 2**30),
  }
  train.figures.curves(axes[1], memory, xlabel="nodes", ylabel="memory (GiB)")
  for panel in axes:
    panel.set(xscale="log", yscale="log")
    for line in panel.lines:
      line.set_marker("o")
  train.figures.save(figure, folder / "figure.png")
  metrics = {f"{name}, {f['nodes']} nodes": value for f in found for name, value in f.items() if name != "nodes"}
  last = found[-1]
  claim = (
    f"All 28 matrices of {last['nodes']:,} nodes and {last['edges']:,} edges, {last['entries']:,} entries, in "
    f"{last['seconds']:.1f} s with {last['peak GiB of the process']:.2f} GiB; the paper says minutes."
  )
  return metrics, claim


def one_large(folder: pathlib.Path) -> tuple[dict[str, Any], str]:
  """A graph with larger hubs than preferential attachment makes."""
  cost(np.stack(synthetic.barabasi_albert(200, 10)), 200)  # compiles
  edges, n = chung_lu(LARGE, 20, 2.5, seed=0), LARGE
  found = cost(edges, n)
  degree = np.diff(common_neighbors.adjacency(edges, n).indptr)
  figure, ((axes,),) = train.figures.subplots()
  axes.plot(np.sort(degree)[::-1], np.arange(1, n + 1) / n, ".", markersize=3)
  axes.set(
    xscale="log", yscale="log", xlabel="degree", ylabel="nodes of at least this degree (share)",
    title=f"{found['edges']:,} edges: {found['seconds']:.0f} s, {found['peak GiB of the process']:.1f} GiB",
  )  # fmt: skip
  train.figures.save(figure, folder / "figure.png")
  claim = (
    f"All 28 matrices of {n:,} nodes with a power-law tail (exponent 2.5, largest degree {found['largest degree']:,}, "
    f"{found['triangles']:,} triangles): {found['entries']:,} entries up to {found['largest entry']:,} in "
    f"{found['seconds']:.1f} s with {found['peak GiB of the process']:.2f} GiB."
  )
  return found, claim


# ---------------------------------------------------------------------------------------------------------------- main


def report(result: dict[str, Any]) -> None:
  """The table and the claim."""
  print_metrics(result)
  rich.print(result["claim"])


def main(config: Config) -> None:
  """Runs the experiment, or shows a finished one."""
  for name in ("seeds", "dim"):
    if getattr(config, name) < 1:
      raise ValueError(f"{name}: got {getattr(config, name)}, expected at least 1")
  for name in ("windows", "penalties"):
    if not getattr(config, name) or min(getattr(config, name)) <= 0:
      raise ValueError(f"{name}: got {getattr(config, name)}, expected positive numbers")
  if config.folds < 2:
    raise ValueError(f"folds: got {config.folds}, expected at least 2")
  if config.scaling and config.large:
    raise ValueError("scaling: got True with large, expected one of them")
  kind = "scaling" if config.scaling else "large" if config.large else f"{config.dataset}-{config.dim}-{config.seeds}"
  folder = config.workdir / kind
  record = settings(dataclasses.asdict(config))
  if result := finished_result(folder, record):
    return report(result)
  folder.mkdir(parents=True, exist_ok=True)
  start = time.perf_counter()
  if config.scaling:
    (metrics, claim), dataset = scale(folder), "Barabasi-Albert graphs"
  elif config.large:
    (metrics, claim), dataset = one_large(folder), "Chung-Lu graph"
  else:
    (metrics, claim), dataset = compare(config, folder), config.dataset
  train.report(
    folder,
    system="graphlet_orbits",
    claim=claim,
    dataset=dataset,
    config=record,
    metrics=metrics,
    published={},
    seed=[0] if config.scaling or config.large else list(range(config.seeds)),
    wall_time=time.perf_counter() - start,
    show=report,
  )


if __name__ == "__main__":
  main(parse())
