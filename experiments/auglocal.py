"""AugLocal beside backpropagation and greedy heads: every unit a module, the same network, data and recipe.

    python experiments/auglocal.py                       # narrow ResNet, 10k of CIFAR-10 at 16 x 16, 3 seeds, minutes
    python experiments/auglocal.py --layers 32 --widths 16 16 32 64 --size 32 --epochs 60
    python experiments/auglocal.py --preset paper        # ResNet-110, CIFAR-10, 400 epochs of batches of 1024

CIFAR-10 is read from TFDS_DATA_DIR, by default as much of it as there is; all methods see the same batches. The rate is
the one that suits backpropagation. The figure sets the error on test images against the depth of the heads (0 is a
dense layer on the mean of pixels), and against what heads cost: multiplications in all forward passes of a step. It
also shows what linear classifiers of training images read from the mean of pixels of each unit: modules with short
sight should make early units the better ones to read, and late units the worse.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
import sklearn.linear_model
import sklearn.pipeline
import sklearn.preprocessing

from jaxlab import memory, train
from jaxlab.data import images
from jaxlab.learning import auglocal, comparison
from jaxlab.models.backbones import cifar
from jaxlab.train import command, figures
from jaxlab.train.result import finished_result, print_metrics, settings


@dataclasses.dataclass(frozen=True)
class Config(comparison.Recipe):
  """What to run; every field is an option of the command."""

  preset: Literal["small", "paper"] = "small"
  """Where the defaults of all other fields come from."""
  padding: images.Padding = "reflect"
  """Of images before they are cropped at random: with zeros, or reflected."""
  depths: tuple[int, ...] = (0, 1, 3)
  """Of the first head; 0 for greedy heads. Backpropagation is always there."""
  workdir: pathlib.Path = pathlib.Path("runs/auglocal")
  """Each setting has a folder in here with checkpoints, metrics, figure and result.json; a second run resumes."""


PRESETS = {
  "small": Config(),
  "paper": Config(
    preset="paper",
    layers=110,
    widths=(16, 16, 32, 64),
    size=32,
    depths=(1, 3, 5, 6),
    epochs=400,
    batch_size=1024,
    learning_rate=0.8,
    warmup=10,
  ),
}
parse = command.parser(PRESETS, __doc__)
# Test error (%) on all of CIFAR-10, by layers.
PUBLISHED = {110: {"backpropagation": 5.39, "d = 6": 6.04}}
SOURCE = "Ma et al. 2024"


def networks(config: Config) -> dict[str, auglocal.AugLocal]:
  """By method: what learns by backpropagation, and with heads of each depth.

  Raises:
    ValueError: depths that leave fewer than two modules, which would be backpropagation under another name.
  """
  backbone = cifar.resnet(config.layers, config.widths)
  deepest = len(backbone) - 2
  if not config.depths or not 0 <= min(config.depths) <= max(config.depths) <= deepest:
    raise ValueError(f"depths: got {config.depths}, expected at least one, of 0 to {deepest} blocks")
  made = {"backpropagation": auglocal.AugLocal(backbone, modules=1)}
  for depth in config.depths:
    made[label(depth)] = (
      auglocal.AugLocal(backbone, depth=depth) if depth else auglocal.AugLocal(backbone, head_kind="greedy")
    )
  return made


def label(depth: int) -> str:
  """Name of a method in results."""
  return f"d = {depth}" if depth else "greedy heads"


def macs(model: auglocal.AugLocal, size: int) -> tuple[int, int]:
  """Multiplications for one image in a training step's forward pass: (backbone with classifier, heads)."""

  def layers(width: int, side: int, out: int, stride: int) -> int:
    side = -(-side // stride)
    shortcut = width * out if stride != 1 or width != out else 0
    return side * side * (9 * width * out + 9 * out * out + shortcut)

  widths, strides = model.backbone.widths, model.backbone.strides
  total, heads, side, width = size * size * 27 * widths[0], 0, size, widths[0]
  depths = auglocal.head_depths(model.depth, model.num_modules, model.pyramid)
  for i in range(len(widths)):
    if i:
      total += layers(width, side, widths[i], strides[i])
      side, width = -(-side // strides[i]), widths[i]
    if i < model.num_modules - 1:
      at, channels = side, width
      for out, stride in auglocal.head_blocks(widths, i, depths[i]) if model.head_kind == "auglocal" else ():
        heads += layers(channels, at, out, stride)
        at, channels = -(-at // stride), out
      heads += channels * model.num_classes
  return total + width * model.num_classes, heads


def unit_means(model: auglocal.AugLocal, images: Any) -> list[Any]:
  """Of all pixels, after each unit [B, C]."""
  means, h = [], images
  for unit in model.units:
    h = unit(h, train=False)
    means.append(cifar.average_pool(h))
  return means


def probe(model: auglocal.AugLocal, task: comparison.Task) -> Callable[[Any], list[float]]:
  """A function of a trained state: test accuracy (%) of a linear classifier of each unit's means.

  Classifiers see as many training images as there are test images, without augmentation.
  """
  means = jax.jit(lambda variables, images: model.apply(variables, images, method=unit_means))
  plain = task.plain()

  def all_means(state: Any, batches: list[train.Batch]) -> tuple[list[np.ndarray], np.ndarray]:
    variables = {"params": state.params, "batch_stats": state.collections["batch_stats"]}
    found = [means(variables, batch["image"]) for batch in batches]
    return [np.concatenate(unit) for unit in zip(*found, strict=True)], np.concatenate([b["label"] for b in batches])

  def measure(state: Any) -> list[float]:
    (known, labels), (unknown, truth) = all_means(state, plain), all_means(state, task.test)
    scores = []
    for x, y in zip(known, unknown, strict=True):
      classifier = sklearn.pipeline.make_pipeline(
        sklearn.preprocessing.StandardScaler(), sklearn.linear_model.LogisticRegression(max_iter=1000)
      )
      scores.append(100 * classifier.fit(x, labels).score(y, truth))
    return scores

  return measure


def draw(metrics: dict[str, Any], probes: dict[str, list[list[float]]], config: Config, folder: pathlib.Path) -> None:
  """Error against depth of heads and against cost, and what can be read from units."""
  figure, axes = figures.subplots(1, 4, width=4)
  baseline = np.asarray(metrics["error, backpropagation"])
  errors = [np.asarray(metrics[f"error, {label(d)}"]) for d in config.depths]
  places = {
    "depth of heads d": list(config.depths),
    "multiplications over backpropagation's": [metrics[f"multiplications, {label(d)}"] for d in config.depths],
    "scratch memory over backpropagation's": [metrics[f"step memory, {label(d)}"] for d in config.depths],
  }
  for panel, (name, x) in zip(axes[0, :3], places.items(), strict=True):
    spread = [e.std(ddof=1) if e.size > 1 else 0.0 for e in errors]
    panel.errorbar(x, [e.mean() for e in errors], spread, fmt="o-", capsize=3, label="local learning")
    panel.axhline(baseline.mean(), color="k", linestyle="--", label="backpropagation")
    if baseline.size > 1:
      low, high = baseline.mean() - baseline.std(ddof=1), baseline.mean() + baseline.std(ddof=1)
      panel.axhspan(low, high, color="k", alpha=0.1)
    for d, place, e in zip(config.depths, x, errors, strict=True):
      panel.annotate(label(d), (place, e.mean()), textcoords="offset points", xytext=(6, 6))
    panel.set(xlabel=name, ylabel="test error (%)")
    panel.margins(x=0.25)
  axes[0, 0].set_xticks(config.depths)
  axes[0, 0].legend()
  units = np.arange(len(next(iter(probes.values()))[0]))
  curves = {name: (units, np.array(runs).T) for name, runs in probes.items()}
  figures.curves(axes[0, 3], curves, xlabel="unit", ylabel="accuracy of a linear classifier (%)")
  figures.save(figure, folder / "figure.png")


def main(config: Config) -> None:
  """Trains what is not trained yet, then measures, draws and reports."""
  memory.keep()
  start = time.perf_counter()
  depths = "-".join(map(str, config.depths))
  folder = config.workdir / f"{config.name}-{depths}"
  record = settings(config)
  if result := finished_result(folder, record):
    return print_metrics(result)
  models, task = networks(config), comparison.cifar10(config)
  tx = config.optimizer(task.steps_per_epoch)
  learners = {name: auglocal.learner(model, tx) for name, model in models.items()}
  kept = settings(config, without=("depths", "seeds", "workdir"))
  probes: dict[str, list[list[float]]] = {name: [] for name in models}
  readers = {name: probe(model, task) for name, model in models.items()}  # one for all seeds: compiled once

  def also(name: str, state: Any) -> dict[str, float]:
    scores = readers[name](state)
    probes[name].append(scores)
    return {"probe of the second unit": scores[1], "probe of the last unit": scores[-1]}

  metrics = comparison.measure(learners, task, config, folder, kept, also)
  base, _ = macs(models["backpropagation"], config.size)
  metrics |= {f"multiplications, {name}": sum(macs(model, config.size)) / base for name, model in models.items()}
  draw(metrics, probes, config, folder)
  published = PUBLISHED.get(config.layers, {}) if config.preset == "paper" else {}
  train.report(
    folder,
    system="auglocal",
    claim="Test error (%) by depth of the local heads, every unit a module, beside backpropagation.",
    dataset=f"CIFAR-10 ({len(task.pixels['label'])} images, {config.size} px), ResNet-{config.layers}",
    config=record,
    metrics=metrics,
    published={f"error, {k}": {"value": v, "source": SOURCE} for k, v in published.items() if f"error, {k}" in metrics},
    seed=list(range(config.seeds)),
    wall_time=time.perf_counter() - start,
  )


if __name__ == "__main__":
  main(parse())
