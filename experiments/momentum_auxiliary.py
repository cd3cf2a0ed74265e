"""MAN beside InfoPro, which lacks its blocks, each block alone, and backpropagation: same network, data and recipe.

    python experiments/momentum_auxiliary.py             # narrow ResNet, 10k of CIFAR-10 at 16 x 16, 3 seeds, minutes
    python experiments/momentum_auxiliary.py --layers 32 --widths 16 16 32 64 --size 32 --epochs 60
    python experiments/momentum_auxiliary.py --preset paper      # ResNet-32, CIFAR-10, 400 epochs of batches of 1024
    python experiments/momentum_auxiliary.py --preset paper-110  # the same of ResNet-110

CIFAR-10 is read from TFDS_DATA_DIR, as much of it as there is; all methods see the same batches. `bias` is the control:
it has the trainable block and so a head as large as MAN's, but knows nothing of the next module. The rate is the one
that suits backpropagation.
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal

import numpy as np

from jaxlab import checks, memory, train
from jaxlab.data import images
from jaxlab.learning import comparison
from jaxlab.learning import momentum_auxiliary as man
from jaxlab.models.backbones import cifar
from jaxlab.train import command, figures
from jaxlab.train.result import finished_result, print_metrics, settings


@dataclasses.dataclass(frozen=True)
class Config(comparison.Recipe):
  """What to run; every field is an option of the command."""

  preset: Literal["small", "paper", "paper-110"] = "small"
  """Where the defaults of all other fields come from."""
  padding: images.Padding = "reflect"
  """Of images before they are cropped at random: with zeros, or reflected."""
  modules: tuple[int, ...] = (6,)
  """Numbers of modules, with the published cuts, or where there are none as many blocks each as divides evenly. What
  the paper calls 16 modules of ResNet-32 and 55 of ResNet-110 are 15 and 54."""
  methods: tuple[str, ...] = ("InfoPro", "bias", "average", "MAN")
  """Which of InfoPro, bias, average and MAN. Backpropagation is always there."""
  first: tuple[float, float] = (5.0, 0.5)
  """Weights of reconstruction and classification in the first module."""
  last: tuple[float, float] = (4.0, 0.4)
  """Where the rule ends: by `linear` those of the last module that has a head."""
  rule: Literal["linear", "stage"] = "linear"
  """How weights go from `first` to `last`: by modules, as InfoPro's do, or by stages, as the official code's."""
  momentum: float = 0.995
  """Of the averaged blocks."""
  workdir: pathlib.Path = pathlib.Path("runs/momentum_auxiliary")
  """Each setting has a folder in here with checkpoints, metrics, figure and result.json; a second run resumes."""


_PAPER = Config(
  preset="paper",
  layers=32,
  widths=(16, 16, 32, 64),
  size=32,
  modules=(8, 15),
  last=(0.0, 0.0),
  rule="stage",
  epochs=400,
  batch_size=1024,
  learning_rate=0.8,
  warmup=10,
)
PRESETS = {
  "small": Config(),
  "paper": _PAPER,
  "paper-110": dataclasses.replace(_PAPER, preset="paper-110", layers=110, modules=(32, 54)),
}
parse = command.parser(PRESETS, __doc__)
# Which blocks a method has: (bias, average).
BRANCHES = {"InfoPro": (False, False), "bias": (True, False), "average": (False, True), "MAN": (True, True)}
# Test error (%) on all of CIFAR-10, by layers.
PUBLISHED = {
  32: {
    "backpropagation": 6.37,
    "InfoPro, 8 modules": 11.51,
    "MAN, 8 modules": 9.32,
    "InfoPro, 15 modules": 12.93,
    "MAN, 15 modules": 9.65,
  },
  110: {
    "backpropagation": 5.42,
    "InfoPro, 32 modules": 12.26,
    "MAN, 32 modules": 9.06,
    "InfoPro, 54 modules": 13.22,
    "MAN, 54 modules": 9.77,
  },
}
SOURCE = "Su et al. 2024"


def even_cuts(units: int, modules: int) -> tuple[int, ...]:
  """Last units of modules of equal numbers of blocks; the first convolution belongs to the first."""
  checks.count("modules", modules, 1, units - 1)
  return tuple(round((i + 1) * (units - 1) / modules) for i in range(modules))


def cuts(layers: int, modules: int) -> tuple[tuple[int, ...], int]:
  """(Last unit of each module, the number by which the paper calls so many)."""
  for named in man.CUTS.get(layers, ()):
    published = man.published_cuts(layers, named)
    if len(published) == modules:
      return published, named
  return even_cuts(len(cifar.resnet(layers)), modules), modules


def networks(config: Config) -> dict[str, man.MomentumAuxiliary]:
  """By method and number of modules."""
  backbone = cifar.resnet(config.layers, config.widths)
  if unknown := set(config.methods) - set(BRANCHES):
    raise ValueError(f"methods: got {sorted(unknown)}, expected names among {list(BRANCHES)}")
  make = lambda modules, bias, average: man.MomentumAuxiliary(
    backbone, cuts=cuts(config.layers, modules)[0], bias=bias, average=average, image_size=config.size
  )
  made = {"backpropagation": make(1, False, False)}
  return made | {f"{m}, {k} modules": make(k, *BRANCHES[m]) for k in config.modules for m in config.methods}


def weights(config: Config, model: man.MomentumAuxiliary) -> man.Weights:
  """Of the losses of all modules but the last."""
  if config.rule == "linear":
    return man.linear_weights(model.num_modules, config.first, config.last)
  return man.stage_weights(model, cuts(config.layers, model.num_modules)[1], config.first, config.last)


def draw(metrics: dict[str, Any], config: Config, folder: pathlib.Path) -> None:
  """Error and memory against the number of modules."""
  figure, axes = figures.subplots(1, 2, width=5)
  baseline = np.asarray(metrics["error, backpropagation"])
  for panel, kind, unit in zip(axes[0], ("error", "step memory"), ("test error (%)", "scratch memory"), strict=True):
    for shift, method in enumerate(config.methods):
      values = [np.asarray(metrics[f"{kind}, {method}, {k} modules"]) for k in config.modules]
      spread = [v.std(ddof=1) if v.size > 1 else 0.0 for v in values]
      place = np.array(config.modules) + 0.06 * (shift - 1.5)
      panel.errorbar(place, [v.mean() for v in values], spread, fmt="o-", capsize=3, label=method)
    level = baseline.mean() if kind == "error" else 1.0
    panel.axhline(level, color="k", linestyle="--", label="backpropagation")
    panel.set(xlabel="modules", ylabel=unit if kind == "error" else f"{unit} over backpropagation's")
    panel.set_xticks(config.modules)
    panel.margins(x=0.2)
  axes[0, 1].set_ylim(bottom=0)
  axes[0, 0].legend()
  figures.save(figure, folder / "figure.png")


def main(config: Config) -> None:
  """Trains what is not trained yet, then measures, draws and reports."""
  memory.keep()
  start = time.perf_counter()
  name = "-".join(map(str, (*config.modules, *config.methods)))
  folder = config.workdir / f"{config.name}-{name}"
  record = settings(config)
  if result := finished_result(folder, record):
    return print_metrics(result)
  models, task = networks(config), comparison.cifar10(config)
  tx = config.optimizer(task.steps_per_epoch)

  def learner(model: man.MomentumAuxiliary) -> train.Learner:
    given = weights(config, model)
    return man.learner(model, tx, given, momentum=config.momentum, mean=images.CIFAR10_MEAN, std=images.CIFAR10_STD)

  learners = {name: learner(model) for name, model in models.items()}
  kept = settings(config, without=("modules", "methods", "seeds", "workdir"))
  metrics = comparison.measure(learners, task, config, folder, kept)
  draw(metrics, config, folder)
  published = {} if config.preset == "small" else PUBLISHED.get(config.layers, {})
  train.report(
    folder,
    system="momentum_auxiliary",
    claim="Test error (%) of MAN beside its blocks alone, InfoPro's heads, which have neither, and backpropagation.",
    dataset=f"CIFAR-10 ({len(task.pixels['label'])} images, {config.size} px), ResNet-{config.layers}",
    config=record,
    metrics=metrics,
    published={f"error, {k}": {"value": v, "source": SOURCE} for k, v in published.items() if f"error, {k}" in metrics},
    seed=list(range(config.seeds)),
    wall_time=time.perf_counter() - start,
  )


if __name__ == "__main__":
  main(parse())
