"""When to spend a communication budget: sparse gossip and one global average, beside its controls.

    python experiments/single_merging.py                         # 16 clients on 5,000 MNIST digits, 3 seeds, minutes
    python experiments/single_merging.py --dataset digits        # 8x8 digits, faster
    python experiments/single_merging.py --hidden 512            # a wide network, which loses less when merged: an hour
    python experiments/single_merging.py --preset paper          # 32 clients, ResNet-18, 30,000 steps, CIFAR-100

Classes of every client's stream are drawn from Dirichlet(0.1). All arms do the same local steps with the same optimizer
from the same start. `sparse + merge` hears 0.2 peers a round and averages all models in the last round; its controls
are no communication before that merge, the same budget spread evenly over the rounds, an average of all in every round
(`server`, the budget of federated training), and dense windows early, in the middle and late, of equally many rounds.
With different starts, models that never communicate cannot be merged at all. Clients "before the merge" are measured
one round before the last, so `evaluate_every` divides the rounds before it. `merged` has statistics of BatchNorm that
are estimated anew from up to 32 minibatches of training images, where the network has any.

Differs from the paper: CIFAR-100 at 32 pixels in place of TinyImageNet; its images are normalised by channel and not
augmented. No transformers, no validation sets of clients.
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
import rich
import rich.table

from jaxlab import checks, memory, train
from jaxlab.data import digits, images, mnist5k
from jaxlab.decentral import simulator
from jaxlab.decentral import single_merging as sm
from jaxlab.train import command
from jaxlab.train.result import finished_result, print_metrics, settings


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  dataset: Literal["mnist_5k", "digits", "cifar100"] = "mnist_5k"
  """Real digits that a dependency ships, or CIFAR-100 with a ResNet-18."""
  clients: int = 16
  """N."""
  alpha: float = 0.1
  """Concentration of each client's classes."""
  rounds: int = 151
  """Averages; the last is the merge."""
  steps: int = 20
  """Local steps a round."""
  batch_size: int = 32
  """Of a local step."""
  size: int = 640
  """Examples that a client draws for each round."""
  rate: float = 0.01
  """Learning rate of SGD with momentum 0.9."""
  peers: float = 0.2
  """Others a client hears in a sparse round, on average."""
  window: float = 0.05
  """Length of a dense window, as a share of the run: at most 0.1, in whole rounds, at least one."""
  hidden: int = 64
  """Width of the network's hidden layer."""
  seeds: int = 3
  """Runs: draws of streams, starts and gossip."""
  evaluate_every: int = 5
  """Rounds between measurements, a divisor of the rounds before the last."""
  preset: Literal["demo", "paper"] = "demo"
  """paper: 32 clients, 4,096 examples, 300 rounds of 100 steps of 128 examples, ResNet-18, label smoothing 0.1."""
  workdir: pathlib.Path = pathlib.Path("runs/single_merging")
  """Main settings name a folder in here with checkpoints, metrics, figure and result.json. A second run resumes there;
  one of other settings is refused."""


PRESETS = {
  "demo": Config(),
  "paper": Config(
    preset="paper",
    dataset="cifar100",
    clients=32,
    rounds=300,
    steps=100,
    batch_size=128,
    size=4096,
    evaluate_every=13,
  ),
}
parse = command.parser(PRESETS, __doc__)


def arms(config: Config) -> dict[str, tuple[sm.Schedule, bool]]:
  """Schedule of each arm, and whether clients start alike."""
  n, steps = config.clients, config.rounds * config.steps
  single = sm.single_merge(n, steps, config.steps, peers=config.peers)
  everyone = np.ones((n, n), bool)
  even = sm.budget(single, n, config.steps, everyone) / (n * config.rounds)
  made = {
    "sparse + merge": (single, True),
    "local + merge": (dataclasses.replace(single, start=0.0), True),
    "same budget, even": (sm.Schedule("fixed", even, max_steps=steps), True),
    "server": (sm.Schedule("fixed", n - 1, max_steps=steps), True),
    "sparse + merge, different starts": (single, False),
    "local + merge, different starts": (dataclasses.replace(single, start=0.0), False),
  }
  length = max(1, round(checks.real("window", config.window, 0.0, 0.1) * config.rounds))
  for name, point in (("early", 0.1), ("middle", 0.5), ("late", 0.9)):
    # Twice the length and half the progress: the run ends without the dense round of step max_steps. The window starts
    # half a round early, so that no rounding decides how many ends of rounds lie in it.
    first = (int(point * config.rounds) + 0.5) / (2 * config.rounds)
    window = length / (2 * config.rounds)
    made[f"{name} window"] = sm.Schedule("truncate_v2", config.peers, n - 1, 2 * steps, first, window), True
  return made


def load(config: Config) -> tuple[Any, Any, nn.Module]:
  """Training and test images, and the network."""
  if config.dataset == "cifar100":
    parts = [images.as_arrays("cifar100", split) for split in ("train", "test")]
    scaled = lambda image: images.normalize(image, images.CIFAR100_MEAN, images.CIFAR100_STD)
    training, test = ({**part, "image": scaled(part["image"])} for part in parts)
    return training, test, sm.ResNet18(100)
  splits = (mnist5k if config.dataset == "mnist_5k" else digits).images()
  return splits.train, splits.test, sm.MLP(10, hidden=(config.hidden,), dropout=0.0, batch_norm=False)


def batches(config: Config, training: Any, seed: int) -> np.ndarray:
  """Training images [K, B, ...], up to 32 minibatches: statistics of the merged model are estimated from these."""
  size = min(config.batch_size, len(training["label"]))
  count = min(32, len(training["label"]) // size)
  rows = np.random.default_rng(seed).permutation(len(training["label"]))[: count * size]
  return training["image"][rows.reshape(count, size)]


def run(config: Config, name: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Curves of one arm: evaluations [T, seeds], and the models sent [seeds]."""
  schedule, common = arms(config)[name]
  training, test, network = load(config)
  local = simulator.classifier(network, sm.optimizer(config.rate), label_smoothing=0.1)
  large = config.dataset == "cifar100"  # activations of all test images, or of several clients, would fill a GPU
  learner = sm.learner(
    local, schedule, steps_per_round=config.steps, batch_size=config.batch_size, common=common, model=network,
    at_once=1 if large else 16, test_batch_size=500 if large else None,
  )  # fmt: skip
  jitted = learner._replace(**{k: jax.jit(getattr(learner, k)) for k in ("init", "step", "evaluate")})
  curves, kept = [], settings(config, without=("workdir",))
  for seed in range(config.seeds):
    data = sm.streams(training, config.clients, config.alpha, config.size, seed=seed)
    place = folder / name.replace(" ", "_").replace(",", "") / str(seed)
    train.fit(
      jitted, data, steps=config.rounds, workdir=place, key=jax.random.key(seed),
      evaluate_on={**test, "batches": batches(config, training, seed)}, evaluate_every=config.evaluate_every,
      log_every=1, save_every=config.rounds, config=kept, progress=False, tensorboard=False,
    )  # fmt: skip
    curves.append(train.read_metrics(place))
  found = {k: np.stack([c[f"eval_{k}"][1] for c in curves], 1) for k in ("accuracy", "merged")}
  sent = np.array([c["sent"][1][-1] for c in curves])
  return found | {"round": curves[0]["eval_accuracy"][0], "sent": sent}


def draw(config: Config, curves: dict[str, dict[str, np.ndarray]], folder: pathlib.Path) -> None:
  """Accuracy against rounds with the merge marked; what the budget bought; windows."""
  figure, axes = train.figures.subplots(1, 3, width=4.6, height=3.8)
  series = {}
  for name in ("sparse + merge", "local + merge"):
    short = name.split(" +")[0]
    series[f"{short}, clients' mean"] = (curves[name]["round"], 100 * curves[name]["accuracy"])
    series[f"{short}, if merged now"] = (curves[name]["round"], 100 * curves[name]["merged"])
  series["server"] = (curves["server"]["round"], 100 * curves["server"]["accuracy"])
  train.figures.curves(
    axes[0, 0], series, xlabel=f"round of {config.steps} local steps", ylabel="test accuracy (%)",
    title=f"{config.clients} clients, Dirichlet {config.alpha}",
  )  # fmt: skip
  axes[0, 0].axvline(config.rounds, color="black", linestyle=":", linewidth=1)
  axes[0, 0].annotate("merge", (config.rounds, 15), xytext=(-4, 0), textcoords="offset points", ha="right")
  shown = [name for name in curves if "window" not in name]
  for i, name in enumerate(shown):
    last = 100 * curves[name]["accuracy"][-1]
    color = train.figures.COLORS[i]
    sent = curves[name]["sent"].mean() / config.clients
    axes[0, 1].errorbar(
      sent, last.mean(), last.std(ddof=1) if len(last) > 1 else 0, fmt="o", capsize=3, color=color, label=name
    )
  axes[0, 1].set_xscale("log")
  axes[0, 1].set(
    xlabel="models received by a client in the run", ylabel="final test accuracy (%)", title="What the budget bought"
  )
  axes[0, 1].legend(fontsize=7)
  windows = {name: (c["round"], 100 * c["accuracy"]) for name, c in curves.items() if "window" in name}
  train.figures.curves(
    axes[0, 2], windows, xlabel="round", ylabel="clients' mean test accuracy (%)", title="Dense windows of equal length"
  )
  train.figures.save(figure, folder / "figure.png")


def main(config: Config) -> None:
  """Trains what is not trained yet, then draws and reports."""
  memory.keep()
  if config.seeds < 1 or config.rounds < 2 * config.evaluate_every:
    raise ValueError(f"rounds: got {config.rounds}, expected at least two evaluations and a seed")
  if (config.rounds - 1) % config.evaluate_every:
    before = config.rounds - 1
    raise ValueError(
      f"evaluate_every: got {config.evaluate_every}, expected a divisor of {before}, all but the last round"
    )
  folder = (
    config.workdir / f"{config.dataset}-{config.clients}-{config.alpha}-{config.rounds}x{config.steps}-{config.seeds}"
  )
  record, start = settings(config), time.perf_counter()
  if result := finished_result(folder, record):
    return print_metrics(result)
  curves = {}
  for name in arms(config):
    began = time.perf_counter()
    curves[name] = run(config, name, folder)
    last = 100 * curves[name]["accuracy"][-1].mean()
    rich.print(f"{name}: {last:.2f} % in {time.perf_counter() - began:.0f} s")
  draw(config, curves, folder)
  metrics: dict[str, np.ndarray] = {}
  before = "sparse + merge: clients before the merge (%)"
  metrics[before] = 100 * curves["sparse + merge"]["accuracy"][-2]
  metrics["local + merge: clients before the merge (%)"] = 100 * curves["local + merge"]["accuracy"][-2]
  for name, found in curves.items():
    metrics[f"{name}: final (%)"] = 100 * found["accuracy"][-1]
  metrics["sparse + merge minus server (points)"] = metrics["sparse + merge: final (%)"] - metrics["server: final (%)"]
  if {"early window", "late window"} <= set(curves):
    metrics["late minus early window (points)"] = metrics["late window: final (%)"] - metrics["early window: final (%)"]
  for name, found in curves.items():
    metrics[f"{name}: models received a client"] = found["sent"] / config.clients
  train.report(
    folder,
    system="single_merging",
    claim="Sparse gossip with one global average at its end against its controls, at stated budgets.",
    dataset=f"{config.dataset}, {config.clients} clients, Dirichlet {config.alpha}",
    config=record,
    metrics=metrics,
    published={},
    seed=list(range(config.seeds)),
    wall_time=time.perf_counter() - start,
  )


if __name__ == "__main__":
  main(parse())
