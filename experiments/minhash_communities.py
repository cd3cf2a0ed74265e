"""Communities grown from seeds by MinHash, beside random order, and what signatures and queries cost at scale.

    python experiments/minhash_communities.py                       # email-Eu-core: the official protocol, seconds
    python experiments/minhash_communities.py --dataset fans        # 1M accounts, 20M edges as a stream, minutes
    python experiments/minhash_communities.py --dataset fans --preset paper   # 10^5 accounts, H = 1000, 30 seeds
    python experiments/minhash_communities.py --scaling             # cost from 10^5 to 2 x 10^7 edges

On the mails, each department with more than 10 members is a community. Five of them, drawn by the official seeds, are
given; as many vertices as it has other members are added, and recall is noted after every fifth. The area under that
curve (from 0 on, over additions as a share of all) is averaged over departments. As in the official protocol, PageRank
ranks the seeds too, which costs it places; it is also shown without them. Fans are a synthetic network of accounts in
communities, each followed by its fans; the protocol is the same on a sample of communities.
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import rich
import scipy.sparse

from jaxlab import train
from jaxlab.data import networks, synthetic
from jaxlab.graph.search import minhash_communities as mc
from jaxlab.train import command
from jaxlab.train.result import finished_result, print_metrics, settings

OFFICIAL_SEEDS = (451235, 35631241, 2315, 346213456, 134)
METHODS = ("initial averages", "minrank", "PageRank, seeds ranked too", "PageRank", "random candidates", "random order")
BLOCK = 200_000  # fans in memory at a time


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  dataset: Literal["email", "fans"] = "email"
  """Mails between 1,005 people in 42 departments, or a synthetic network of accounts and fans."""
  accounts: int = 1_000_000
  """Of fans; communities are of 50."""
  edges: int = 20_000_000
  """Of fans, about."""
  hashes: int = 100
  """H, length of a signature."""
  bands: int = 50
  """Of the table."""
  seeds: int = 5
  """Given members of a community."""
  interval: int = 5
  """Additions between readings of recall."""
  queries: int = 1000
  """Timed, on fans."""
  preset: Literal["demo", "paper"] = "demo"
  """paper: the Twitter setting, H = 1000 in 500 bands, 30 seeds, recall every 10; fans: 10^5 accounts, 2 x 10^6 edges,
  communities of 200."""
  scaling: bool = False
  """Time ingest, table and queries as the stream of fans grows to `edges`."""
  workdir: pathlib.Path = pathlib.Path("runs/minhash_communities")
  """Each setting has a folder in here with figure and result.json."""


PRESETS = {"demo": Config(), "paper": Config(preset="paper", hashes=1000, bands=500, seeds=30, interval=10)}


def defaults(asked: Config, preset: Config) -> Config:
  """The preset's, for the data asked for."""
  if asked.preset == "paper" and asked.dataset == "fans":
    return dataclasses.replace(preset, accounts=10**5, edges=2 * 10**6)
  return preset


parse = command.parser(PRESETS, __doc__, defaults)


def rankings(index: mc.Index, seeds: np.ndarray, size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """What each method adds to the seeds, in order."""
  active = mc.candidates(index, seeds)
  given: Any = (index.signatures, seeds, active, size)
  found = {"initial averages": mc.initial_averages(*given).vertices, "minrank": mc.minrank(*given).vertices}
  if len(active) <= 4096:
    found["PageRank, seeds ranked too"] = mc.pagerank(*given, keep_seeds=True).vertices
    found["PageRank"] = mc.pagerank(*given).vertices
  found["random candidates"] = rng.permutation(np.setdiff1d(active, seeds))[:size]
  drawn = rng.choice(len(index.signatures), size + len(seeds), replace=False)
  found["random order"] = drawn[~np.isin(drawn, seeds)][:size]
  return found


def recall(found: np.ndarray, seeds: np.ndarray, members: np.ndarray, interval: int) -> tuple[np.ndarray, np.ndarray]:
  """(x, y) of the curve: additions as a share of all, members found as a share of all that were to find."""
  size = len(members) - len(seeds)
  hits = np.zeros(size)
  hits[: len(found)] = np.isin(found, members) & ~np.isin(found, seeds)
  steps = np.arange(0, size + 1, interval)
  return steps / steps[-1], np.concatenate([[0], np.cumsum(hits)])[steps] / size


def protocol(
  config: Config, index: mc.Index, labels: np.ndarray, communities: Any, path: pathlib.Path
) -> dict[str, list[float]]:
  """Area under recall, a number for each of the official seeds; draws the curves."""
  areas: dict[str, list[float]] = {}
  grid = np.linspace(0, 1, 51)
  curves: dict[str, list[np.ndarray]] = {}
  for number, official in enumerate(OFFICIAL_SEEDS):
    each: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for community in communities:
      members = np.flatnonzero(labels == community)
      seeds = np.random.RandomState(official).choice(members, config.seeds, replace=False)
      rng = np.random.default_rng([number, community])
      for name, found in rankings(index, seeds, len(members) - len(seeds), rng).items():
        each.setdefault(name, []).append(recall(found, seeds, members, config.interval))
    for name in METHODS:
      if len(each.get(name, [])) == len(communities):  # PageRank has a limit
        areas.setdefault(f"area under recall, {name}", []).append(
          float(np.mean([np.trapezoid(y, x) for x, y in each[name]]))
        )
        curves.setdefault(name, []).append(np.mean([np.interp(grid, x, y) for x, y in each[name]], axis=0))
  figure, ((axes,),) = train.figures.subplots()
  lines = {name: (grid, np.stack(curve, axis=1)) for name, curve in curves.items()}
  train.figures.curves(axes, lines, xlabel="additions / all additions", ylabel="recall", title=config.dataset)
  train.figures.save(figure, path)
  return areas


def email(config: Config, path: pathlib.Path) -> tuple[dict[str, Any], str]:
  """The official protocol."""
  senders, receivers, labels = networks.email_eu_core_directed()
  index = mc.build(mc.signatures([(senders, receivers)], len(labels), mc.hash_family(config.hashes)), config.bands)
  sizes = np.bincount(labels)
  communities = np.flatnonzero(sizes > config.seeds + config.interval)
  metrics = protocol(config, index, labels, communities, path)
  mean = {name: np.mean(metrics[f"area under recall, {name}"]) for name in METHODS}
  quality = [mc.assess(index.signatures, np.flatnonzero(labels == c)) for c in communities]
  for measure in ("clustering", "cohesiveness", "conductance", "density", "separability"):
    metrics[f"{measure} of departments"] = [float(np.mean([getattr(q, measure) for q in quality]))]
  return metrics, (
    f"Initial averages {mean['initial averages']:.3f} and minrank {mean['minrank']:.3f} above PageRank "
    f"{mean['PageRank']:.3f} and random order {mean['random order']:.3f}."
  )


class Stream:
  """Parts of a network of fans, one in memory at a time; counts edges and the time that making them took."""

  def __init__(self, accounts: int, edges: int, communities: int, watched: np.ndarray):
    self.accounts, self.fans, self.communities = accounts, edges // 15, communities  # of 20 draws, some are the same
    self.watched, self.edges, self.seconds = watched, 0, 0.0
    self.seen: list[tuple[np.ndarray, np.ndarray]] = []
    self.labels = np.zeros(0, np.int32)

  def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    parts = -(-self.fans // BLOCK)
    for part in range(parts):
      start = time.perf_counter()
      senders, receivers, self.labels = synthetic.fans(self.accounts, self.fans // parts, self.communities, part=part)
      self.edges += len(senders)
      mine = self.watched[receivers]
      self.seen.append((senders[mine], receivers[mine]))
      self.seconds += time.perf_counter() - start
      yield senders, receivers

  def exact(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Watched accounts, and (row, column, J) of those pairs that share fans, as one array [3, P]."""
    accounts = np.flatnonzero(self.watched)
    senders, receivers = map(np.concatenate, zip(*self.seen, strict=True))
    rows = np.searchsorted(accounts, receivers)
    a = scipy.sparse.csr_array((np.ones(len(senders)), (rows, senders)))
    size = np.bincount(rows, minlength=len(accounts))
    both = scipy.sparse.triu(a @ a.T, 1).tocoo()
    truth = both.data / (size[both.row] + size[both.col] - both.data)
    return accounts, np.stack([both.row, both.col]), truth


def measured(
  config: Config, accounts: int, edges: int, size: int
) -> tuple[dict[str, list[float]], mc.Index, np.ndarray]:
  """Cost and error on one network of fans; also its index and labels."""
  watched = np.zeros(accounts, bool)
  watched[np.random.default_rng(0).choice(accounts, min(3000, accounts), replace=False)] = True
  hashes = mc.hash_family(config.hashes)
  tiny = mc.build(mc.signatures([(np.arange(9), np.arange(9))], 9, hashes), config.bands)
  mc.minrank(tiny.signatures, np.arange(2), mc.candidates(tiny, np.arange(2)), 1)  # compiled
  # All members of some communities are watched, for pairs that are similar.
  labels = synthetic.fans(accounts, 1, accounts // size).labels
  watched[np.isin(labels, np.arange(20))] = True
  stream = Stream(accounts, edges, accounts // size, watched)
  start = time.perf_counter()
  signed = mc.signatures(stream, accounts, hashes)
  ingest = time.perf_counter() - start - stream.seconds
  start = time.perf_counter()
  index = mc.build(signed, config.bands)
  table = time.perf_counter() - start

  accounts_, (rows, columns), truth = stream.exact()
  same = signed[accounts_[rows]] == signed[accounts_[columns]]
  error = same.mean(axis=1) - truth
  theory = np.sqrt((truth * (1 - truth)).mean() / config.hashes)

  rng, seconds, sizes = np.random.default_rng(1), [], []
  by_label = np.argsort(labels, kind="stable")
  bounds = np.searchsorted(labels[by_label], np.arange(accounts // size + 1))
  for community in rng.integers(0, accounts // size, config.queries):
    members = by_label[bounds[community] : bounds[community + 1]]
    seeds = rng.choice(members, config.seeds, replace=False)
    start = time.perf_counter()
    active = mc.candidates(index, seeds)
    mc.minrank(signed, seeds, active, len(members) - len(seeds))
    seconds.append(time.perf_counter() - start)
    sizes.append(len(active))
  metrics = {
    "edges": [float(stream.edges)],
    "ingest (s)": [ingest],
    "ingest (edges/s)": [stream.edges / ingest],
    "table (s)": [table],
    "signatures (MB)": [signed.nbytes / 1e6],
    "table (MB)": [(index.order.nbytes + index.start.nbytes) / 1e6],
    "query, median (ms)": [1000 * float(np.median(seconds))],
    "query, 99th percentile (ms)": [1000 * float(np.quantile(seconds, 0.99))],
    "candidates, median": [float(np.median(sizes))],
    "candidates, largest": [float(np.max(sizes))],
    "pairs with shared fans": [float(len(truth))],
    "mean error of J": [float(error.mean())],
    "rmse of J": [float(np.sqrt((error**2).mean()))],
    "rmse of J over theory": [float(np.sqrt((error**2).mean()) / theory)],
  }
  return metrics, index, labels


def fans(config: Config, path: pathlib.Path) -> tuple[dict[str, Any], str]:
  """Cost, error and recall on one network."""
  size = 200 if config.preset == "paper" else 50
  metrics, index, labels = measured(config, config.accounts, config.edges, size)
  metrics |= protocol(config, index, labels, np.random.default_rng(2).choice(labels.max() + 1, 30, False), path)
  return metrics, (
    f"{metrics['edges'][0]:.3g} edges into {config.accounts} signatures in {metrics['ingest (s)'][0]:.1f} s; "
    f"a query takes {metrics['query, median (ms)'][0]:.2f} ms, "
    f"99 of 100 at most {metrics['query, 99th percentile (ms)'][0]:.2f} ms."
  )


def scale(config: Config, path: pathlib.Path) -> tuple[dict[str, Any], str]:
  """Cost as accounts and edges grow together."""
  edges = [e for e in (10**5, 10**6, 10**7) if e < config.edges] + [config.edges]
  names = ("ingest (s)", "table (s)", "query, median (ms)", "query, 99th percentile (ms)")
  metrics, table = {}, {name: [] for name in names}  # type: ignore[var-annotated]
  for count in edges:
    found, *_ = measured(config, max(count // 20, 1000), count, 50)
    for name in names:
      table[name].append(found[name][0])
      metrics[f"{name}, {count} edges"] = found[name]
    rich.print(f"{count} edges:", {name: round(found[name][0], 3) for name in names})
  figure, (axes,) = train.figures.subplots(1, 2)
  for panel, some, unit in ((axes[0], names[:2], "time (s)"), (axes[1], names[2:], "time (ms)")):
    train.figures.curves(panel, {n: (edges, table[n]) for n in some}, xlabel="edges", ylabel=unit)
    panel.set(xscale="log", yscale="log")
  train.figures.save(figure, path)
  slope = np.polyfit(np.log(edges[-2:]), np.log(np.array(table["ingest (s)"])[-2:]), 1)[0]
  return metrics, f"Ingest grows as edges to the power {slope:.2f} between the two largest."


def main(config: Config) -> None:
  """Runs the experiment, or shows a finished one."""
  for name, least in (("accounts", 1000), ("edges", 10**4), ("seeds", 1), ("interval", 1), ("queries", 1)):
    if getattr(config, name) < least:
      raise ValueError(f"{name}: got {getattr(config, name)}, expected at least {least}")
  folder = config.workdir / ("scaling" if config.scaling else f"{config.dataset}-{config.preset}")
  record = settings(dataclasses.asdict(config))
  if result := finished_result(folder, record):
    return print_metrics(result)
  start = time.perf_counter()
  run = scale if config.scaling else {"email": email, "fans": fans}[config.dataset]
  metrics, claim = run(config, folder / "figure.png")
  train.report(
    folder,
    system="minhash_communities",
    claim=claim,
    dataset="email-Eu-core" if run is email else "synthetic fans",
    config=record,
    metrics=metrics,
    published={},
    seed=list(OFFICIAL_SEEDS) if run is email else [0],
    wall_time=time.perf_counter() - start,
  )


if __name__ == "__main__":
  main(parse())
