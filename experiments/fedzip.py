"""What FedZip's updates cost in bytes that can be read back, and in accuracy, beside other ways to send less.

    python experiments/fedzip.py                          # 10 clients on 5,000 MNIST digits, 3 seeds, minutes
    python experiments/fedzip.py --dataset digits         # 8x8 digits, faster
    python experiments/fedzip.py --preset paper           # the official network and recipe, 101 rounds of 101 epochs

Ten clients of a Dirichlet split train for some epochs a round from the server's model; the server averages what it
decodes. Arms: no compression (FedAvg); FedZip keeping 50, 20 and 5 %, once with error feedback and once with zeros
apart; and baselines: the largest entries as floats with positions, random entries, even levels of two bits. Beside each
ratio of bytes is what compression lost of an update, |lost| / |update|, mean over rounds. Bytes are those of streams
that `fedzip.encode` writes: at the end the final model of one arm is encoded as one message, read back and compared;
the published accounting, which cannot be decoded, stands beside it.

Differs from the paper: 5,000 MNIST digits or 8x8 digits in place of EMNIST by writer and CIFAR-100; no VGG16 and no
FedSGD.
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
import optax
import rich
import rich.table

from jaxlab import memory, train
from jaxlab.data import digits, mnist5k
from jaxlab.decentral import fedzip, partition, simulator, single_merging
from jaxlab.train import command
from jaxlab.train.result import finished_result, print_metrics, settings


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  dataset: Literal["mnist_5k", "digits"] = "mnist_5k"
  """Real digits that a dependency ships."""
  clients: int = 10
  """All take part in each round."""
  alpha: float = 0.5
  """Concentration of the Dirichlet split."""
  rounds: int = 30
  """Of communication."""
  epochs: int = 1
  """Local ones in a round."""
  batch_size: int = 20
  """Of a local step."""
  rate: float = 0.001
  """Learning rate of RMSprop, fresh in each round."""
  server_rate: float = 1.0
  """Of the server; the official code has 0.1, which is ten times slower."""
  hidden: int = 128
  """Width of the hidden layer."""
  seeds: int = 3
  """Runs: splits and starts."""
  preset: Literal["demo", "paper"] = "demo"
  """paper: the official network, 101 rounds of 101 epochs, server rate 0.1."""
  workdir: pathlib.Path = pathlib.Path("runs/fedzip")
  """Main settings name a folder in here with checkpoints, metrics, figure and result.json. A second run resumes there;
  one of other settings is refused."""


PRESETS = {
  "demo": Config(),
  "paper": Config(preset="paper", rounds=101, epochs=101, batch_size=10, server_rate=0.1),
}
parse = command.parser(PRESETS, __doc__)
# Name -> codec; None is FedAvg.
ARMS: dict[str, simulator.Codec | None] = {
  "FedAvg": None,
  "FedZip, z = 50 %": fedzip.codec(0.5),
  "FedZip, z = 80 %": fedzip.codec(0.8),
  "FedZip, z = 95 %": fedzip.codec(0.95),
  "FedZip, z = 80 %, feedback": fedzip.codec(0.8, feedback=True),
  "FedZip, z = 80 %, zeros apart": fedzip.codec(0.8, zero_aware=True),
  "largest 2 % as floats": fedzip.top_codec(0.02),
  "random 4 % as floats": fedzip.random_codec(0.04),
  "even levels, 2 bits": fedzip.uniform_codec(2),
}


def network(config: Config) -> nn.Module:
  """The official CNN or a small MLP."""
  if config.preset == "paper":
    return fedzip.CNN()
  return single_merging.MLP(10, hidden=(config.hidden,), dropout=0.0, batch_norm=False)


def run(config: Config, name: str, folder: pathlib.Path) -> tuple[dict[str, np.ndarray], Any]:
  """Curves of one arm [T, seeds], and the last state."""
  splits = (mnist5k if config.dataset == "mnist_5k" else digits).images()
  local = simulator.classifier(network(config), optax.rmsprop(config.rate))
  work = simulator.Work(config.batch_size, config.epochs)
  learner = simulator.federated(local, work, server_rate=config.server_rate, codec=ARMS[name])
  jitted = learner._replace(**{k: jax.jit(getattr(learner, k)) for k in ("init", "step", "evaluate")})
  kept = settings(config, without=("workdir",))
  curves, state, labels = [], None, splits.train["label"]
  # One capacity for all seeds, so that they share a compiled round.
  parts = [partition.dirichlet(labels, config.clients, config.alpha, min_size=10, seed=s) for s in range(config.seeds)]
  most = max(len(part) for split in parts for part in split)
  for seed in range(config.seeds):
    data = partition.clients(splits.train, parts[seed], capacity=most)
    place = folder / "".join(c if c.isalnum() else "_" for c in name) / str(seed)
    state = train.fit(
      jitted, data, steps=config.rounds, workdir=place, key=jax.random.key(seed), evaluate_on=[dict(splits.test)],
      evaluate_every=1, log_every=1, save_every=config.rounds, config=kept, progress=False, tensorboard=False,
    )  # fmt: skip
    curves.append(train.read_metrics(place))
  found = {k: np.stack([c[k][1] for c in curves], 1) for k in ("eval_accuracy", "megabits", "error")}
  return found, state


def check_streams(model: Any) -> dict[str, float]:
  """Encodes a model as if it were an update and reads it back; its bytes must be those counted.

  Returns:
    Ratios of the model's bytes to those written, and to the shortest of the published accounting; |lost| / |model|.
  """
  compressed = jax.jit(lambda m: (messages := fedzip.compress(m), fedzip.total_bits(messages)))(model)
  messages, counted = jax.device_get(compressed)
  streams = [fedzip.encode(message) for message in messages]
  for message, stream in zip(messages, streams, strict=True):
    back = fedzip.decode(stream, len(message.symbols), len(message.centroids))
    np.testing.assert_array_equal(back.symbols, message.symbols)
    np.testing.assert_array_equal(back.centroids, message.centroids)
  size = sum(map(len, streams))
  if int(counted) != 8 * size:
    raise RuntimeError(f"streams of {size} bytes, counted {int(counted) / 8}")
  lost = jax.tree.map(lambda a, b: a - b, fedzip.restore(messages, model), model)
  official = [fedzip.official_bits(message.symbols) for message in messages]
  shortest = sum(min(bits["huffman"], bits["address"], bits["gap"]) for bits in official)
  return {
    "ratio of bytes written and read back": simulator.model_bytes(model) / size,
    "ratio by the published accounting": 8 * simulator.model_bytes(model) / shortest,
    "error": float(optax.global_norm(lost) / optax.global_norm(model)),
  }


def draw(config: Config, curves: dict[str, dict[str, np.ndarray]], folder: pathlib.Path) -> None:
  """Accuracy against bytes, and against rounds."""
  figure, axes = train.figures.subplots(1, 2, width=5.6, height=4.2)
  rounds = np.arange(1, config.rounds + 1)
  styles = {"FedZip": "-", "FedAvg": "-"}
  for i, (name, found) in enumerate(curves.items()):
    color, style = train.figures.COLORS[i % 7], styles.get(name.split(",")[0], "--")
    megabytes = found["megabits"].mean(1) / 8 / config.clients
    accuracy = 100 * found["eval_accuracy"].mean(1)
    marker = "o" if i >= 7 else None
    axes[0, 0].plot(megabytes, accuracy, style, color=color, marker=marker, markersize=3, label=name)
    axes[0, 1].plot(rounds, accuracy, style, color=color, marker=marker, markersize=3)
  axes[0, 0].set_xscale("log")
  floor = np.percentile([100 * c["eval_accuracy"].mean(1) for c in curves.values()], 8)
  for place, label in ((0, "megabytes sent by a client so far"), (1, "round")):
    axes[0, place].set(xlabel=label, ylabel="test accuracy (%)", ylim=(floor, None))
  axes[0, 0].set_title("Accuracy against bytes on the wire")
  axes[0, 1].set_title(f"{config.clients} clients, Dirichlet {config.alpha}, mean of {config.seeds} seeds")
  axes[0, 0].legend(fontsize=7)
  train.figures.save(figure, folder / "figure.png")


def main(config: Config) -> None:
  """Trains what is not trained yet, then draws and reports."""
  memory.keep()
  if config.seeds < 1:
    raise ValueError(f"seeds: got {config.seeds}, expected at least 1")
  kind = (
    f"{config.dataset}-{config.clients}-{config.alpha}-{config.rounds}x{config.epochs}-{config.seeds}-{config.preset}"
  )
  folder = config.workdir / kind
  record, start = settings(config), time.perf_counter()
  if result := finished_result(folder, record):
    return print_metrics(result)
  curves: dict[str, dict[str, np.ndarray]] = {}
  message: dict[str, float] = {}
  for name in ARMS:
    began = time.perf_counter()
    curves[name], state = run(config, name, folder)
    if name == "FedZip, z = 80 %":
      message = check_streams(state.model)
    last = 100 * curves[name]["eval_accuracy"][-1].mean()
    rich.print(f"{name}: {last:.2f} % in {time.perf_counter() - began:.0f} s")
  draw(config, curves, folder)
  metrics: dict[str, Any] = {}
  plain = curves["FedAvg"]
  for name, found in curves.items():
    metrics[f"{name}: final accuracy (%)"] = 100 * found["eval_accuracy"][-1]
    if name != "FedAvg":
      metrics[f"{name}: loss of accuracy (points)"] = 100 * (plain["eval_accuracy"][-1] - found["eval_accuracy"][-1])
      metrics[f"{name}: ratio of true bytes"] = plain["megabits"][-1] / found["megabits"][-1]
      metrics[f"{name}: error of an update"] = found["error"].mean(0)
  for name, value in message.items():
    metrics[f"final model as one message, z = 80 %: {name}"] = value
  train.report(
    folder,
    system="fedzip",
    claim="Accuracy and true bytes of compressed updates beside FedAvg and baselines.",
    dataset=f"{config.dataset}, {config.clients} clients, Dirichlet {config.alpha}",
    config=record,
    metrics=metrics,
    published={},
    seed=list(range(config.seeds)),
    wall_time=time.perf_counter() - start,
  )


if __name__ == "__main__":
  main(parse())
