"""TAS beside uniform and random narrowing: networks of equal cost, with and without a teacher.

    python experiments/transformable_search.py          # narrow ResNet-14, 8k of CIFAR-10 at 16 x 16, 3 seeds, minutes
    python experiments/transformable_search.py --layers 20 --widths 10 10 20 40 --epochs 20 --search-epochs 40
    python experiments/transformable_search.py --preset paper    # ResNet-32, CIFAR-10, 600 epochs of search, 300 after

For each seed the full network is trained, and a network is searched, weights on one half of the training images, widths
and depths on the other; it is trained from scratch on all of them, on labels alone and under the full network ("KD").
So are the network of the same cost whose widths are all narrowed by one factor, and, under the full network, random
ones of the same cost up to a hundredth. All these see the same batches; the full network is trained for longer. Cost is
the multiplications of convolutions and the dense layer.

CIFAR-10 is read from TFDS_DATA_DIR, as much of it as there is.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any, Literal

import grain
import jax
import numpy as np
import optax
import rich

from jaxlab import checks, memory, train
from jaxlab.data import images
from jaxlab.learning import comparison, local
from jaxlab.learning import transformable_search as tas
from jaxlab.train import command, figures
from jaxlab.train.result import finished_result, once, print_metrics, settings


@dataclasses.dataclass(frozen=True)
class Config(comparison.Recipe):
  """What to run; every field is an option of the command."""

  preset: Literal["small", "paper"] = "small"
  """Where the defaults of all other fields come from."""
  widths: tuple[int, int, int, int] = (10, 10, 20, 40)
  """Channels of the first convolution and of the stages."""
  train_images: int | None = 8000
  """How many; None for all that are on disk."""
  epochs: int = 4
  """Passes over them, of every network but the teacher."""
  teacher_epochs: int = 8
  """Of the full network, which must know more than what learns from it."""
  batch_size: int = 64
  """Images a step."""
  weight_decay: float = 5e-4
  """Of all weights."""
  ratio: float = 0.55
  """Target cost over the full network's."""
  search_epochs: int = 10
  """Passes over each half of the training images."""
  architecture_rate: float = 0.1
  """Of Adam on the logits; the published 0.001 is for a hundred times as many steps."""
  architecture_decay: bool = True
  """Whether that rate falls to 0 by a cosine, so that a short search settles."""
  cost_weight: float = 0.1
  """Of the cost; the published 2 drowns the images' gradient until a search has been long."""
  random_networks: int = 2
  """For each seed."""
  workdir: pathlib.Path = pathlib.Path("runs/transformable_search")
  """Each setting has a folder in here with checkpoints, metrics, figure and result.json; a second run resumes."""

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.count("random_networks", self.random_networks)
    checks.count("search_epochs", self.search_epochs)
    checks.count("teacher_epochs", self.teacher_epochs)

  @property
  def space(self) -> tas.Space:
    """What is searched."""
    return tas.resnet(self.layers, widths=self.widths, image_size=self.size)

  def sgd(self, epochs: int, steps_per_epoch: int, warmup: int) -> optax.GradientTransformation:
    """Of weights, for a run of so many epochs."""
    rate = local.schedule(self.learning_rate, epochs, steps_per_epoch, warmup=min(warmup, epochs))
    return local.sgd(rate, weight_decay=self.weight_decay)


PRESETS = {
  "small": Config(),
  "paper": Config(
    preset="paper",
    layers=32,
    widths=(16, 16, 32, 64),
    size=32,
    train_images=None,
    epochs=305,
    teacher_epochs=305,
    batch_size=256,
    warmup=5,
    ratio=0.51,
    search_epochs=600,
    architecture_rate=1e-3,
    architecture_decay=False,
    cost_weight=2.0,
    random_networks=5,
  ),
}
parse = command.parser(PRESETS, __doc__)
# The many networks that are trained for a short time are compiled with less care, in half the time.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})


class Halves(grain.DatasetIterator):
  """Host. Batches of both halves of the training images."""

  def __init__(self, task: comparison.Task, seed: int):
    super().__init__()
    middle = len(task.pixels["label"]) // 2
    parts = {"weights": slice(0, middle), "architecture": slice(middle, None)}
    self._halves = {}
    for name, part in parts.items():
      half = images.Images(image=task.pixels["image"][part], label=task.pixels["label"][part])
      self._halves[name] = task._replace(pixels=half).batches(seed)

  def __next__(self) -> train.Batch:
    return {name: next(half) for name, half in self._halves.items()}

  def get_state(self) -> dict[str, Any]:
    """Positions in both."""
    return {name: half.get_state() for name, half in self._halves.items()}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to these positions."""
    for name, half in self._halves.items():
      half.set_state(state[name])


def searcher(config: Config, steps_per_epoch: int) -> train.Learner:
  """Of all seeds."""
  steps, rate = config.search_epochs * steps_per_epoch, config.architecture_rate
  learner = tas.search_learner(
    tas.SearchNetwork(config.space),
    config.sgd(config.search_epochs, steps_per_epoch, 0),
    tas.architecture_optimizer(optax.cosine_decay_schedule(rate, steps) if config.architecture_decay else rate),
    tas.temperature(config.search_epochs, steps_per_epoch),
    ratio=config.ratio,
    cost_weight=config.cost_weight,
  )
  return learner._replace(init=_jit(learner.init), step=_jit(learner.step, donate_argnums=0))


def search(
  learner: train.Learner, config: Config, task: comparison.Task, seed: int, folder: pathlib.Path, kept: Any
) -> dict[str, Any]:
  """The genotype that a search finds, and how its cost came about."""
  steps = config.search_epochs * (task.steps_per_epoch // 2)
  state = fitted(learner, Halves(task, seed), steps, seed, folder, kept, log_every=1)
  rows, genotype = train.read_metrics(folder), tas.extract(config.space, jax.device_get(state.found))
  costs = {name: rows[name][1] for name in ("macs", "expected_macs")}
  return {"widths": genotype.widths, "depths": genotype.depths, **costs}


def fitted(learner: Any, batches: Any, steps: int, seed: int, folder: pathlib.Path, kept: Any, **options: Any) -> Any:
  """The state after training."""
  key = jax.random.key(seed)
  return train.fit(
    learner, batches, steps=steps, workdir=folder, key=key, config=kept, tensorboard=False, save_every=steps, **options
  )


class Trained:
  """Networks trained from scratch, one compilation for each genotype, with a teacher or without."""

  def __init__(self, config: Config, task: comparison.Task, kept: Any):
    self._config, self._task, self._kept = config, task, kept
    self._programs: dict[Any, train.Learner] = {}
    self._teacher = tas.DerivedNetwork(config.space, config.space.full)

  def __call__(
    self, genotype: tas.Genotype, seed: int, folder: pathlib.Path, teacher: Any = None, *, epochs: int
  ) -> tuple[float, Any]:
    """Test error in percent, and what the network's variables are; `teacher` are the full network's."""
    config, task = self._config, self._task
    tx = config.sgd(epochs, task.steps_per_epoch, config.warmup)
    student = tas.DerivedNetwork(config.space, genotype)
    if teacher is None:
      learner = train.supervised(student, train.cross_entropy(), tx)
    else:
      learner = tas.distilled_learner(student, tx, self._teacher, teacher)
    programs = self._programs.setdefault(
      (genotype, epochs, teacher is None),
      train.Learner(learner.init, _jit(learner.step, donate_argnums=0), _jit(learner.evaluate)),
    )
    learner = programs._replace(init=_jit(learner.init))
    state = fitted(learner, task.batches(seed), epochs * task.steps_per_epoch, seed, folder, self._kept)
    error = comparison.test_error(learner, state, task)
    rich.print(f"{folder.parent.name} {folder.name}: error {error:.2f} %")
    return error, state.student.variables if teacher is not None else state.variables


def measured(
  config: Config,
  task: comparison.Task,
  folder: pathlib.Path,
  kept: Any,
  learner: train.Learner,
  fit: Trained,
  seed: int,
) -> dict[str, Any]:
  """All networks of a seed: name -> errors, costs and genotypes."""
  place = folder / f"seed{seed}"
  space = config.space
  start = time.perf_counter()
  error, teacher = fit(space.full, seed, place / "full", epochs=config.teacher_epochs)
  out: dict[str, Any] = {"full": [{"error": error, "macs": tas.macs(space, space.full)}]}
  found = once(place / "search.json", lambda: search(learner, config, task, seed, place / "search", kept), kept)
  genotype = tas.Genotype(tuple(found["widths"]), tuple(found["depths"]))
  rich.print(f"seed {seed}: found {genotype}, {time.perf_counter() - start:.0f} s")
  if not tas.on_target(space, genotype, ratio=config.ratio):
    rich.print(f"seed {seed}: the search never met its target; this is the network that it started with")
  budget, rng = tas.macs(space, genotype), np.random.default_rng(seed)
  networks = {"found": [genotype], "uniform": [tas.uniform(space, budget)]}
  networks["random"] = [tas.random(space, budget, rng) for _ in range(config.random_networks)]
  for kind, genotypes in networks.items():
    for i, network in enumerate(genotypes):
      cost = {"macs": tas.macs(space, network), "widths": network.widths, "depths": network.depths}
      taught, _ = fit(network, seed, place / f"{kind}{i}-KD", teacher, epochs=config.epochs)
      out.setdefault(f"{kind} + KD", []).append({"error": taught, **cost})
      if kind != "random":
        alone, _ = fit(network, seed, place / f"{kind}{i}", epochs=config.epochs)
        out.setdefault(kind, []).append({"error": alone, **cost})
  return {"networks": out, "search": found}


def draw(seeds: list[dict[str, Any]], config: Config, folder: pathlib.Path) -> None:
  """Accuracy against cost, widths that were found, and cost over the search."""
  figure, axes = figures.subplots(1, 3, width=5, height=3.8)
  space = config.space
  scatter, bars, curves = axes[0]
  for i, name in enumerate(seeds[0]["networks"]):
    rows = [row for seed in seeds for row in seed["networks"][name]]
    accuracy, cost = np.array([100 - r["error"] for r in rows]), np.array([r["macs"] / 1e6 for r in rows])
    spread, shift = accuracy.std(ddof=1) if len(rows) > 1 else 0.0, 0.03 * (i - 3) * cost.mean() * (name != "full")
    color, label = figures.COLORS[i], f"{name} ({len(rows)})"
    scatter.plot(cost + shift, accuracy, ".", color=color, alpha=0.5)
    scatter.errorbar(cost.mean() + shift, accuracy.mean(), spread, fmt="o", capsize=3, color=color, label=label)
  place = "million multiplications (kinds of one cost side by side)"
  scatter.set(xlabel=place, ylabel="test accuracy (%)", title="mean and deviation (networks)")
  scatter.legend()

  place = np.arange(len(space.convolutions))
  bars.bar(place, space.convolutions, width=0.9, color="0.85", label="full")
  for s, seed in enumerate(seeds):
    depths = seed["search"]["depths"]
    there = [True, *(b.position <= depths[b.stage] for b in space.layout for _ in b.kernels)]
    widths = np.where(there, seed["search"]["widths"], 0)
    bars.bar(place + 0.28 * (s - (len(seeds) - 1) / 2), widths, width=0.25, color=figures.COLORS[s], label=f"seed {s}")
  bars.set(xlabel="convolution (0: a dropped block)", ylabel="channels", title="widths found")
  bars.legend()

  for s, seed in enumerate(seeds):
    steps = np.arange(len(seed["search"]["macs"]))
    curves.plot(steps, seed["search"]["macs"], color=figures.COLORS[s], linewidth=0.6, alpha=0.6)
    curves.plot(steps, seed["search"]["expected_macs"], color=figures.COLORS[s], linewidth=1.5, linestyle="--")
  curves.axhspan(config.ratio - 0.05, config.ratio, color="k", alpha=0.12, label="target")
  curves.plot([], [], "k", linewidth=0.6, label="most likely network, F")
  curves.plot([], [], "k--", label="expected, E_F")
  curves.set(xlabel="step of the search", ylabel="cost over the full network's", title="cost, by seed")
  curves.legend()
  figures.save(figure, folder / "figure.png")


def main(config: Config) -> None:
  """Trains what is not trained yet, then measures, draws and reports."""
  memory.keep()
  start = time.perf_counter()
  folder = config.workdir / f"{config.name}-{config.ratio}-{config.search_epochs}"
  record = settings(config)
  if result := finished_result(folder, record):
    return print_metrics(result)
  space = config.space
  if config.random_networks:  # or says at once that draws do not come near to the target
    tas.random(space, config.ratio * tas.macs(space, space.full), np.random.default_rng(0))
  task = comparison.cifar10(config)
  kept = settings(config, without=("seeds", "workdir", "random_networks"))
  learner, fit = searcher(config, task.steps_per_epoch // 2), Trained(config, task, kept)
  results = {**kept, "random_networks": config.random_networks}
  seeds = []
  for seed in range(config.seeds):
    make = functools.partial(measured, config, task, folder, kept, learner, fit, seed)
    seeds.append(once(folder / f"seed{seed}.json", make, results))
  metrics: dict[str, Any] = {}
  full = tas.macs(space, space.full)
  for name in seeds[0]["networks"]:
    rows = [row for seed in seeds for row in seed["networks"][name]]
    metrics[f"error, {name}"] = [row["error"] for row in rows]
    metrics[f"multiplications, {name}"] = [row["macs"] / full for row in rows]
  for other in ("uniform", "uniform + KD", "random + KD"):
    mine = "found" if other == "uniform" else "found + KD"
    average = lambda seed, name: float(np.mean([row["error"] for row in seed["networks"][name]]))
    metrics[f"error saved over {other}"] = [average(seed, other) - average(seed, mine) for seed in seeds]
  genotypes = [tas.Genotype(tuple(seed["search"]["widths"]), tuple(seed["search"]["depths"])) for seed in seeds]
  met = [100.0 * tas.on_target(space, genotype, ratio=config.ratio) for genotype in genotypes]
  metrics["searches that met the target (%)"] = met
  draw(seeds, config, folder)
  train.report(
    folder,
    system="transformable_search",
    claim="Test error (%) of the network found, with a teacher (KD) or without, beside networks of equal cost.",
    dataset=f"CIFAR-10 ({len(task.pixels['label'])} images, {config.size} px), ResNet-{config.layers}",
    config=record,
    metrics=metrics,
    published={},
    seed=list(range(config.seeds)),
    wall_time=time.perf_counter() - start,
  )


if __name__ == "__main__":
  main(parse())
