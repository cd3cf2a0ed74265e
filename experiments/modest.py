"""MoDeST beside federated averaging and decentralised SGD: accuracy against rounds and against models sent.

    python experiments/modest.py                          # 50 nodes on 8x8 digits, 3 seeds, minutes
    python experiments/modest.py --dataset mnist_5k       # 5,000 MNIST digits
    python experiments/modest.py --preset paper           # 100 nodes, MNIST in place of CIFAR-10, 500 rounds

All arms train the same network on the same Dirichlet split. MoDeST's rounds are those of its protocol, simulated with
latencies; once without failures, once with 80 % of the nodes crashing at a round (nodes at work in that round are
spared: the published protocol has no remedy for a round whose aggregators are gone). FedAvg draws as many clients at
random; one-peer D-SGD lets all nodes train and send to one other in each round, and is judged by its nodes' mean.

Differs from the paper: digits in place of CIFAR-10, CelebA, FEMNIST and MovieLens, and a small MLP in place of their
networks (`jaxlab.decentral.modest` has them); random latencies in place of those measured, no limits of bandwidth.
"""

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
import optax
import rich
import rich.table

from jaxlab import memory, train
from jaxlab.data import digits, mnist5k
from jaxlab.decentral import gossip, modest, partition, simulator, single_merging
from jaxlab.train import command
from jaxlab.train.result import finished_result, print_metrics, settings


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  dataset: Literal["digits", "mnist_5k"] = "digits"
  """Real digits that a dependency ships."""
  nodes: int = 50
  """n."""
  sample: int = 10
  """s."""
  aggregators: int = 1
  """a, without failures; 2 with them."""
  alpha: float = 0.5
  """Concentration of the Dirichlet split."""
  rounds: int = 120
  """Of every arm."""
  crash_at: int = 20
  """Round at which most nodes crash."""
  inactivity: int = 40
  """Delta_k, in rounds."""
  batch_size: int = 20
  """Of a local step; a round is one epoch."""
  rate: float = 0.05
  """Learning rate of SGD with momentum 0.9."""
  hidden: int = 64
  """Width of the hidden layer."""
  target: float = 0.85
  """Accuracy to be reached."""
  seeds: int = 3
  """Runs: splits and starts."""
  preset: Literal["demo", "paper"] = "demo"
  """paper: 100 nodes, 500 rounds, learning rate 0.002; CIFAR-10 and the GN-LeNet are left to a larger machine."""
  workdir: pathlib.Path = pathlib.Path("runs/modest")
  """Main settings name a folder in here with checkpoints, metrics, figure and result.json. A second run resumes there;
  one of other settings is refused."""


PRESETS = {"demo": Config(), "paper": Config(preset="paper", dataset="mnist_5k", nodes=100, rounds=500, rate=0.002)}
parse = command.parser(PRESETS, __doc__)


def crash(config: Config, seed: int) -> list[modest.Event]:
  """80 % of the nodes, none of them at work."""
  ids = [modest.node_id(i) for i in range(config.nodes)]
  at = config.crash_at
  busy = {int(i[5:]) for k in (at, at + 1) for i in modest.order(ids, k)[: config.sample // 2]}
  idle = [i for i in range(config.nodes) if i not in busy]
  wanted = round(0.8 * config.nodes)
  if len(idle) < wanted:
    raise ValueError(
      f"nodes: got {config.nodes}, expected enough for {wanted} of them, 80 %, to crash, {len(idle)} idle"
    )
  gone = np.random.default_rng(seed).permutation(idle)[:wanted]
  return [modest.Event(at, "crash", int(i)) for i in gone]


def arms(config: Config, seed: int) -> dict[str, modest.Trace]:
  """Traces of the protocol. With crashes the samples are halved, so that enough nodes are left outside of them."""
  latency = np.random.default_rng(7).uniform(0.01, 0.3, (config.nodes, config.nodes))
  calm = modest.Protocol(config.sample, config.aggregators, inactivity=1000)
  rough = modest.Protocol(config.sample // 2, 2, success_fraction=0.8, inactivity=config.inactivity)
  run = lambda protocol, events: modest.simulate(
    protocol, config.nodes, config.rounds, latency=latency, events=events, seed=seed
  )
  return {"MoDeST": run(calm, []), "MoDeST, 80 % crash": run(rough, crash(config, seed))}


def joining(config: Config, shares: Sequence[float], seed: int) -> list[float]:
  """Rounds from a node's first advertisement until shares of the nodes have it in their views; NaN if they never do.

  Views travel with models only, so a node learns of it when it is next sampled: it takes some n / s rounds.
  """
  protocol = modest.Protocol(config.sample, config.aggregators, inactivity=1000)
  events = [modest.Event(5, "join", config.nodes)]
  rounds = max(100, 5 * config.nodes // config.sample)
  trace = modest.simulate(protocol, config.nodes + 1, rounds, events=events, seed=seed)
  reached = [np.flatnonzero(np.array(trace.known[config.nodes]) >= share) for share in shares]
  return [float(times[0]) if len(times) else np.nan for times in reached]


def fit(config: Config, learner: Any, batch: Any, test: Any, steps: int, place: pathlib.Path, seed: int) -> Any:
  """Curves of a run: accuracy [T], models sent [T] where counted."""
  kept = settings(config, without=("target", "workdir"))
  train.fit(
    learner, batch, steps=steps, workdir=place, key=jax.random.key(seed), evaluate_on=[dict(test)], evaluate_every=1,
    log_every=1, save_every=steps, config=kept, progress=False, tensorboard=False,
  )  # fmt: skip
  curves = train.read_metrics(place)
  return curves["eval_accuracy"][1], curves["sent"][1] if "sent" in curves else None


def reached(accuracy: np.ndarray, cost: np.ndarray, target: float) -> float:
  """What it cost to reach an accuracy (mean of three rounds); NaN if it was not reached."""
  smooth = np.convolve(accuracy, np.ones(3) / 3, mode="valid")
  above = np.flatnonzero(smooth >= target)
  return float(cost[above[0] + 2]) if len(above) else np.nan


def draw(config: Config, curves: dict[str, list[Any]], traces: list[modest.Trace], folder: pathlib.Path) -> None:
  """Accuracy against rounds and models sent; pings that failed."""
  figure, axes = train.figures.subplots(1, 3, width=4.6, height=3.6)
  rounds = np.arange(1, config.rounds + 1)
  series = {name: (rounds, 100 * np.stack([a for a, _ in runs], 1)) for name, runs in curves.items()}
  title = f"{config.nodes} nodes, {config.sample} in a sample"
  train.figures.curves(axes[0, 0], series, xlabel="round", ylabel="test accuracy (%)", title=title)
  for name, runs in curves.items():
    sent, accuracy = (np.mean([run[k] for run in runs], axis=0) for k in (1, 0))
    axes[0, 1].plot(sent, 100 * accuracy, label=name)
  axes[0, 1].axhline(100 * config.target, color="black", linestyle=":", linewidth=1)
  axes[0, 1].set_xscale("log")
  axes[0, 1].set(xlabel="models sent so far", ylabel="test accuracy (%)", title="What communication buys")
  failed = {"pings without answer": (rounds, np.stack([t.failed for t in traces], 1))}
  train.figures.curves(
    axes[0, 2], failed, xlabel="round", ylabel="pings without answer", title="80 % of the nodes crash"
  )
  axes[0, 2].axvline(config.crash_at, color="black", linestyle=":", linewidth=1)
  axes[0, 2].axvline(config.crash_at + config.inactivity, color="black", linestyle=":", linewidth=1)
  axes[0, 0].axvline(config.crash_at, color="black", linestyle=":", linewidth=1)
  train.figures.save(figure, folder / "figure.png")


def main(config: Config) -> None:
  """Trains what is not trained yet, then draws and reports."""
  memory.keep()
  if config.rounds < 3:
    raise ValueError(f"rounds: got {config.rounds}, expected at least 3, over which accuracy is averaged")
  if not 0 < config.crash_at < config.rounds:
    raise ValueError(f"crash_at: got {config.crash_at}, expected a round before the last, {config.rounds}")
  kind = f"{config.dataset}-{config.nodes}-{config.sample}-{config.alpha}-{config.rounds}-{config.seeds}"
  folder = config.workdir / kind
  record, start = settings(config), time.perf_counter()
  if result := finished_result(folder, record):
    return print_metrics(result)

  splits = (mnist5k if config.dataset == "mnist_5k" else digits).images()
  network = single_merging.MLP(10, hidden=(config.hidden,), dropout=0.0, batch_norm=False)
  local = simulator.classifier(network, optax.sgd(config.rate, momentum=0.9))
  work = simulator.Work(config.batch_size)
  jitted = lambda learner: learner._replace(**{k: jax.jit(getattr(learner, k)) for k in ("init", "step", "evaluate")})
  mine = jitted(modest.learner(local, work))
  server = jitted(simulator.federated(local, work, by_size=False, choose=simulator.some_clients(config.sample)))
  peers = jitted(simulator.gossiping(local, work, gossip.one_peer_exponential(config.nodes)))
  labels = splits.train["label"]
  parts = [partition.dirichlet(labels, config.nodes, config.alpha, min_size=2, seed=s) for s in range(config.seeds)]
  most = max(len(part) for split in parts for part in split)
  curves: dict[str, list[Any]] = {"MoDeST": [], "MoDeST, 80 % crash": [], "FedAvg": [], "one-peer D-SGD": []}
  crashed = []
  for seed in range(config.seeds):
    data = partition.clients(splits.train, parts[seed], capacity=most)
    for name, trace in arms(config, seed).items():
      if len(trace.averaged) < config.rounds:
        raise RuntimeError(f"{name}: the protocol stopped after {len(trace.averaged)} rounds")
      place = folder / name.replace(" ", "_").replace(",", "").replace("%", "") / str(seed)
      curves[name].append(fit(config, mine, modest.plan(trace, data), splits.test, config.rounds, place, seed))
      if name != "MoDeST":
        crashed.append(trace)
    accuracy, _ = fit(config, server, data, splits.test, config.rounds, folder / "FedAvg" / str(seed), seed)
    curves["FedAvg"].append((accuracy, 2 * config.sample * np.arange(1, config.rounds + 1)))  # down and up
    place = folder / "peers" / str(seed)
    curves["one-peer D-SGD"].append(fit(config, peers, data, splits.test, config.rounds, place, seed))
    rich.print(f"seed {seed}: {time.perf_counter() - start:.0f} s")
  draw(config, curves, crashed, folder)

  metrics: dict[str, Any] = {}
  rounds = np.arange(1, config.rounds + 1)
  for name, runs in curves.items():
    metrics[f"{name}: final accuracy (%)"] = 100 * np.array([accuracy[-1] for accuracy, _ in runs])
    metrics[f"{name}: rounds to {config.target:.0%}"] = [reached(a, rounds, config.target) for a, _ in runs]
    metrics[f"{name}: models sent to {config.target:.0%}"] = [reached(a, sent, config.target) for a, sent in runs]
  ratio = lambda what, top, bottom: np.divide(metrics[f"{top}: {what}"], metrics[f"{bottom}: {what}"])
  metrics["rounds, MoDeST over FedAvg"] = ratio(f"rounds to {config.target:.0%}", "MoDeST", "FedAvg")
  metrics["models sent, one-peer D-SGD over MoDeST"] = ratio(
    f"models sent to {config.target:.0%}", "one-peer D-SGD", "MoDeST"
  )
  shares = (0.5, 0.9)
  for share, found in zip(shares, zip(*[joining(config, shares, seed) for seed in range(5)], strict=True), strict=True):
    metrics[f"rounds until {share:.0%} of the nodes know one that joins"] = found
  after = config.crash_at + config.inactivity
  metrics["pings without answer, in the five rounds after the crash"] = [
    sum(t.failed[config.crash_at - 1 : config.crash_at + 4]) for t in crashed
  ]
  metrics["pings without answer, Delta_k rounds after the crash and later"] = [sum(t.failed[after:]) for t in crashed]
  train.report(
    folder,
    system="modest",
    claim="Rounds and models to an accuracy beside FedAvg and one-peer D-SGD, and rounds that go on after a crash.",
    dataset=f"{config.dataset}, {config.nodes} nodes, Dirichlet {config.alpha}",
    config=record,
    metrics=metrics,
    published={},
    seed=list(range(config.seeds)),
    wall_time=time.perf_counter() - start,
  )


if __name__ == "__main__":
  main(parse())
