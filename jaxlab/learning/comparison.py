"""Ways to train compared on one image set: the same batches for all, several seeds each, error and memory of a step."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import optax
import rich

from jaxlab import checks, train
from jaxlab.data import images
from jaxlab.learning import local

_NORMALISATION: dict[str, Any] = {"mean": images.CIFAR10_MEAN, "std": images.CIFAR10_STD}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Settings that all that is compared shares. An experiment adds its own; each field is an option of its command.

  Raises:
    ValueError: fewer than one seed, an unknown padding.
  """

  layers: int = 14
  """Of the ResNet: 6 m + 2."""
  widths: tuple[int, int, int, int] = (8, 8, 16, 32)
  """Channels of the first convolution and of the stages."""
  size: int = 16
  """Side of the images in pixels."""
  train_images: int | None = None
  """How many; None for all that are on disk."""
  epochs: int = 4
  """Passes over them."""
  batch_size: int = 128
  """Images a step."""
  learning_rate: float = 0.1
  """Highest rate of SGD."""
  padding: images.Padding = "constant"
  """Of images before they are cropped at random: with zeros, or reflected."""
  warmup: int = 1
  """Epochs of linear warm-up."""
  seeds: int = 3
  """Independent runs: initialisation, order and augmentation."""

  def __post_init__(self) -> None:
    checks.count("seeds", self.seeds)
    checks.choice("padding", self.padding, images.Padding)

  @property
  def name(self) -> str:
    """For a folder."""
    return f"resnet{self.layers}-{self.widths[-1]}-{self.size}-{self.epochs}"

  def optimizer(self, steps_per_epoch: int) -> optax.GradientTransformation:
    """SGD at the rate of the recipe."""
    return local.sgd(local.schedule(self.learning_rate, self.epochs, steps_per_epoch, warmup=self.warmup))


class Task(NamedTuple):
  """CIFAR-10, or a part of it.

  Attributes:
    pixels: the training images, unscaled.
    test: batches of the test images.
    size: side of the images that networks see.
    batch_size: of training.
    padding: before random crops.
  """

  pixels: images.Images
  test: list[train.Batch]
  size: int
  batch_size: int
  padding: images.Padding = "constant"

  @property
  def steps_per_epoch(self) -> int:
    """Whole batches in the training images."""
    return len(self.pixels["label"]) // self.batch_size

  def batches(self, seed: int) -> grain.DatasetIterator:
    """Host. Training batches for ever, cropped and flipped at random."""
    augment = functools.partial(images.crop_and_flip, mode=self.padding)
    return images.batches(self.pixels, self.batch_size, seed=seed, augment=augment, size=self.size, **_NORMALISATION)

  def plain(self) -> list[train.Batch]:
    """Host. Training images as they are, as many as there are test images."""
    count = sum(len(batch["label"]) for batch in self.test)
    part = images.Images(image=self.pixels["image"][:count], label=self.pixels["label"][:count])
    return _in_order(part, self.size)


def cifar10(recipe: Recipe) -> Task:
  """Host. As much of CIFAR-10 as `TFDS_DATA_DIR` has, or as the recipe asks for."""
  known, held_out = images.as_arrays("cifar10", "train"), images.as_arrays("cifar10", "test")
  count = len(known["label"])
  if recipe.train_images is not None:
    count = checks.count("train_images", recipe.train_images, 1, count)
  checks.count("batch_size", recipe.batch_size, 1, count)
  pixels = images.Images(image=known["image"][:count], label=known["label"][:count])
  return Task(pixels, _in_order(held_out, recipe.size), recipe.size, recipe.batch_size, recipe.padding)


def _in_order(pixels: images.Images, size: int) -> list[train.Batch]:
  """All images once."""
  return list(images.batches(pixels, 500, seed=None, epochs=1, drop_remainder=False, size=size, **_NORMALISATION))


def measure(
  learners: Mapping[str, train.Learner],
  task: Task,
  recipe: Recipe,
  folder: pathlib.Path,
  config: Mapping[str, Any],
  also: Callable[[str, Any], Mapping[str, float]] = lambda name, state: {},
) -> dict[str, Any]:
  """Trains what is not trained yet.

  Args:
    learners: by name, what the others' memory is compared with first.
    task: the images.
    recipe: epochs and seeds.
    folder: each learner has one in here.
    config: settings that runs depend on.
    also: (name, trained state) -> further measurements of a run.

  Returns:
    For each learner "error, <name>", test errors in percent by seed, and "step memory, <name>": what a compiled
    training step needs besides state and batch, over that of the first learner. "<what>, <name>" of what is measured
    besides, by seed.
  """
  metrics: dict[str, Any] = {}
  base = None
  for name, learner in learners.items():
    learner = jitted(learner)
    place, start = folder / name.replace(", ", "-").replace(" ", "_"), time.perf_counter()
    kept = {**config, "method": name}
    error = []
    for state in trained(learner, task, epochs=recipe.epochs, seeds=recipe.seeds, folder=place, config=kept):
      error.append(test_error(learner, state, task))
      for what, value in also(name, state).items():
        metrics.setdefault(f"{what}, {name}", []).append(value)
    rich.print(f"{name}: error {np.mean(error):.2f} %, {time.perf_counter() - start:.0f} s")
    needed = step_megabytes(learner, next(task.batches(0)))
    base = needed if base is None else base
    metrics |= {f"error, {name}": error, f"step memory, {name}": needed / base}
  return metrics


def jitted(learner: train.Learner) -> train.Learner:
  """The learner with functions that all seeds share, compiled once; over several devices `train.fit` compiles anew."""
  return train.Learner(learner.init, jax.jit(learner.step, donate_argnums=0), jax.jit(learner.evaluate))


def trained(
  learner: train.Learner, task: Task, *, epochs: int, seeds: int, folder: pathlib.Path, config: dict[str, Any]
) -> Iterator[Any]:
  """Trained states, one for each seed of initialisation, order and augmentation; batches are shared over all devices.

  Args:
    learner: from `jitted`.
    task: the images.
    epochs: of each run.
    seeds: runs, `seed0`, ... in the folder; those that are there already resume.
    folder: of this learner.
    config: settings that a run depends on.
  """
  for seed in range(seeds):
    yield train.fit(
      learner,
      task.batches(seed),
      steps=epochs * task.steps_per_epoch,
      workdir=folder / f"seed{seed}",
      key=jax.random.key(seed),
      config=config,
      mesh=train.mesh() if jax.device_count() > 1 else None,
      tensorboard=False,
    )


def test_error(learner: train.Learner, state: Any, task: Task) -> float:
  """In percent, of all test images."""
  hits = sum(float(learner.evaluate(state, batch)["accuracy"]) * len(batch["label"]) for batch in task.test)
  return 100 - 100 * hits / sum(len(batch["label"]) for batch in task.test)


def step_megabytes(learner: train.Learner, batch: train.Batch) -> float:
  """What a compiled training step needs besides its state and the batch.

  Args:
    learner: from `jitted`.
    batch: arrays or their shapes.
  """
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch)
  state = jax.eval_shape(learner.init, jax.random.key(0), shapes)
  step: Any = learner.step
  return step.lower(state, shapes).compile().memory_analysis().temp_size_in_bytes / 1e6
