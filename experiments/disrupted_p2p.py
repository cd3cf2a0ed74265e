"""Peers that vanish: what lost connections cost, what lost data cost, and whether it matters who goes.

    python experiments/disrupted_p2p.py                            # 50 peers, 8x8 digits, 5 graphs, minutes
    python experiments/disrupted_p2p.py --dataset mnist_5k         # 5,000 MNIST digits, about half an hour
    python experiments/disrupted_p2p.py --no-common                # uncoordinated starts
    python experiments/disrupted_p2p.py --preset paper             # the large network, 10 graphs, 100 rounds

On Barabasi-Albert graphs a share of the peers, the ones of highest degree or any, is removed at a round. In scenario A
all peers hold data; in B and B' those that vanish hold none: B spreads the same total over the others, B' gives them
what they have in A. Undisturbed runs go beside each. All worlds have the same shapes, so one compiled round runs all.
Accuracy is the mean over survivors (over the same peers in undisturbed runs), at the end; median, minimum and the means
next to the removed and farther away stand beside it, as do components and algebraic connectivity of the graph.

Not provided of what the paper's subject suggests: removal by betweenness, training on the union of all data, weights by
data, rounds until accuracy recovers. `jaxlab.decentral.disrupted_p2p` has the first and the third.
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal

import jax
import numpy as np
import optax
import rich
import rich.table
import scipy.stats

from jaxlab import checks, memory, train
from jaxlab.data import digits, mnist5k
from jaxlab.decentral import disrupted_p2p as dp
from jaxlab.decentral import partition, simulator
from jaxlab.train import command
from jaxlab.train.result import finished_result, print_metrics, settings


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  dataset: Literal["mnist_5k", "digits"] = "digits"
  """Real digits that a dependency ships."""
  peers: int = 50
  """N."""
  edges: int = 2
  """Of each newcomer of the graph."""
  share: float = 0.3
  """Of the peers that vanish."""
  time: int = 5
  """Round at which they do, 0 for never there; the late disruption is at half of the rounds."""
  rounds: int = 60
  """In all."""
  epochs: int = 5
  """Local ones in a round."""
  batch_size: int = 32
  """Of a local step."""
  rate: float = 0.01
  """Learning rate of SGD with momentum 0.5."""
  hidden: tuple[int, ...] = (64,)
  """Widths of the network."""
  graphs: int = 5
  """Graphs, with their data and starts."""
  common: bool = True
  """Whether all peers start from the same weights."""
  preset: Literal["demo", "paper"] = "demo"
  """paper: 784-512-256-128-10, 10 graphs, 100 rounds (settings that are not in the abstract are ours)."""
  workdir: pathlib.Path = pathlib.Path("runs/disrupted_p2p")
  """Main settings name a folder in here with checkpoints, metrics, figure and result.json. A second run resumes there;
  one of other settings is refused."""


PRESETS = {
  "demo": Config(),
  "paper": Config(preset="paper", dataset="mnist_5k", hidden=(512, 256, 128), graphs=10, rounds=100),
}
parse = command.parser(PRESETS, __doc__)
# Name of an arm -> (scenario, who vanishes, when).
ARMS: dict[str, tuple[dp.Scenario, str, str]] = {
  "undisturbed": ("A", "degree", "never"),
  "A, hubs": ("A", "degree", "early"),
  "A, random": ("A", "random", "early"),
  "B, hubs": ("B", "degree", "early"),
  "B', hubs": ("B'", "degree", "early"),
  "B', undisturbed": ("B'", "degree", "never"),
  "A, hubs, late": ("A", "degree", "late"),
  "local only": ("A", "degree", "local"),
}


def world(config: Config, name: str, examples: dict[str, np.ndarray], seed: int) -> tuple[dp.World, dp.Structure]:
  """The world of an arm on one graph, and what its disruption does to the graph."""
  kind, by, when = ARMS[name]
  adjacency = dp.barabasi_albert(config.peers, config.edges, seed=seed)
  removed = dp.choose_removed(adjacency, config.share, by, seed=seed)
  hubs = removed if by == "degree" else dp.choose_removed(adjacency, config.share, "degree", seed=seed)
  parts = dp.scenario(examples["label"], hubs, kind, seed=seed)
  most = -(-len(examples["label"]) // int((~hubs).sum()))  # in B; one shape for all
  time = {"never": config.rounds, "early": config.time, "late": config.rounds // 2, "local": config.rounds}[when]
  graph = np.zeros_like(adjacency) if when == "local" else adjacency
  return (
    dp.World(partition.clients(examples, parts, capacity=most), graph, removed, np.int32(time)),
    dp.structure(adjacency, removed),
  )


def draw(
  config: Config, curves: dict[str, np.ndarray], rounds: np.ndarray, by_size: list[Any], folder: pathlib.Path
) -> None:
  """Accuracy against rounds with the disruption marked; and by the size of the component that a survivor is left in."""
  figure, axes = train.figures.subplots(1, 3, width=4.6, height=3.8)
  shown = (
    ("undisturbed", "A, random", "A, hubs", "A, hubs, late", "local only"),
    ("undisturbed", "A, hubs", "B, hubs", "B', hubs", "B', undisturbed"),
  )
  for place, names in enumerate(shown):
    series = {name: (rounds, 100 * curves[name]) for name in names}
    train.figures.curves(
      axes[0, place], series, xlabel="round", ylabel="mean test accuracy of survivors (%)",
      title=("Who vanishes, and when", "What vanishes: data or connections")[place],
    )  # fmt: skip
    axes[0, place].axvline(config.time, color="black", linestyle=":", linewidth=1)
    axes[0, place].set_ylim(bottom=np.percentile(100 * curves["local only"], 20))
  axes[0, 0].axvline(config.rounds // 2, color="black", linestyle=":", linewidth=1)
  for name, marker in (("A, hubs", "o"), ("A, random", "x")):
    sizes = np.concatenate([s for n, s, _ in by_size if n == name])
    accuracy = np.concatenate([a for n, _, a in by_size if n == name])
    axes[0, 2].plot(sizes, 100 * accuracy, marker, alpha=0.5, label=name)
  axes[0, 2].set_xscale("log")
  axes[0, 2].set(
    xlabel="peers in the survivor's component", ylabel="its final accuracy (%)", title="What a survivor is left with"
  )
  axes[0, 2].legend()
  train.figures.save(figure, folder / "figure.png")


def interval(difference: np.ndarray) -> np.ndarray:
  """Half the width of the 95 % interval of a mean over graphs, by Student's t."""

  n = len(difference)
  if n < 2:
    return np.array(np.nan)
  return np.array(scipy.stats.t.ppf(0.975, n - 1) * difference.std(ddof=1) / np.sqrt(n))


def main(config: Config) -> None:
  """Trains what is not trained yet, then draws and reports."""
  memory.keep()
  if not 0 <= config.time < config.rounds:
    raise ValueError(f"time: got {config.time}, expected a round from 0 to {config.rounds - 1}")
  if round(checks.real("share", config.share) * config.peers) >= config.peers:
    raise ValueError(f"share: got {config.share}, expected one that leaves some of the {config.peers} peers")
  start_kind = "common" if config.common else "apart"
  folder = (
    config.workdir / f"{config.dataset}-{config.peers}-{config.share}-{config.rounds}-{config.graphs}-{start_kind}"
  )
  record, start = settings(config), time.perf_counter()
  if result := finished_result(folder, record):
    return print_metrics(result)

  splits = (mnist5k if config.dataset == "mnist_5k" else digits).images()
  local = simulator.classifier(dp.MLP(10, config.hidden), optax.sgd(config.rate, momentum=0.5))
  work = simulator.Work(config.batch_size, config.epochs)
  learner = dp.learner(local, work, common=config.common)
  jitted = learner._replace(**{k: jax.jit(getattr(learner, k)) for k in ("init", "step", "evaluate")})
  curves: dict[str, np.ndarray] = {}
  structures: dict[str, list[dp.Structure]] = {}
  by_size: list[Any] = []
  groups: dict[str, list[float]] = {}
  rounds, kept = np.zeros(0), settings(config, without=("workdir",))
  for name in ARMS:
    began, runs = time.perf_counter(), []
    structures[name] = []
    for seed in range(config.graphs):
      batch, structure = world(config, name, splits.train, seed)
      place = folder / name.replace(" ", "_").replace(",", "").replace("'", "2") / str(seed)
      train.fit(
        jitted, batch, steps=config.rounds, workdir=place, key=jax.random.key(seed), evaluate_on=[dict(splits.test)],
        evaluate_every=1, log_every=config.rounds, save_every=config.rounds, config=kept, progress=False,
        tensorboard=False,
      )  # fmt: skip
      rounds, accuracy = train.read_metrics(place)["eval_accuracy"]
      survivors = ~batch.removed
      runs.append(accuracy[:, survivors].mean(1))
      structures[name].append(structure)
      by_size.append((name, structure.size[survivors], accuracy[-1, survivors]))
      last = accuracy[-1]
      for part, value in (("median", np.median(last[survivors])), ("minimum", last[survivors].min())):
        groups.setdefault(f"{name}: {part} of survivors (%)", []).append(100 * float(value))
      if name in ("A, hubs", "A, hubs, late", "A, random"):
        places = {
          "isolated survivors": structure.size == 1,
          "survivors next to the removed": survivors & (structure.distance == 1),
          "survivors farther away": survivors & (structure.distance > 1),
        }
        for part, there in places.items():
          if there.any():  # not on every graph
            groups.setdefault(f"{name}: {part} (%)", []).append(100 * float(last[there].mean()))
    curves[name] = np.stack(runs, 1)
    rich.print(f"{name}: {100 * curves[name][-1].mean():.2f} % in {time.perf_counter() - began:.0f} s")
  draw(config, curves, rounds, by_size, folder)

  final = {name: 100 * curve[-1] for name, curve in curves.items()}
  metrics: dict[str, np.ndarray] = {f"{name} (%)": value for name, value in final.items()}
  differences = {
    "random minus hubs removed, A": final["A, random"] - final["A, hubs"],
    "cost of connections: B' undisturbed minus B'": final["B', undisturbed"] - final["B', hubs"],
    "undisturbed minus B'": final["undisturbed"] - final["B', hubs"],
    "cost of never having had the data: A minus B'": final["A, hubs"] - final["B', hubs"],
    "A minus local only": final["A, hubs"] - final["local only"],
  }
  for name, value in differences.items():
    metrics[f"{name} (points)"] = value
    metrics[f"{name}: 95 % interval, half width"] = interval(value)
  metrics |= {name: np.array(values) for name, values in groups.items()}
  for name in ("A, hubs", "A, random"):
    metrics[f"{name}: giant component"] = np.array([s.giant for s in structures[name]])
    metrics[f"{name}: components"] = np.array([s.components for s in structures[name]])
    metrics[f"{name}: algebraic connectivity"] = np.array([s.connectivity for s in structures[name]])
  whole = [dp.barabasi_albert(config.peers, config.edges, seed=seed) for seed in range(config.graphs)]
  nobody = np.zeros(config.peers, bool)
  metrics["undisturbed: algebraic connectivity"] = np.array([dp.structure(g, nobody).connectivity for g in whole])
  train.report(
    folder,
    system="disrupted_p2p",
    claim="Accuracy of survivors when hubs or random peers vanish with or without data, over graphs.",
    dataset=f"{config.dataset}, {config.peers} peers, Barabasi-Albert m = {config.edges}, {start_kind} starts",
    config=record,
    metrics=metrics,
    published={},
    seed=list(range(config.graphs)),
    wall_time=time.perf_counter() - start,
  )


if __name__ == "__main__":
  main(parse())
