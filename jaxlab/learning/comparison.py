"""Ways to train compared on one image set: the same batches for all, several seeds each, error and memory of a step."""

import pathlib
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Float

from jaxlab import checks, train
from jaxlab.data import images

_NORMALISATION: dict[str, Any] = {"mean": images.CIFAR10_MEAN, "std": images.CIFAR10_STD}


class Task(NamedTuple):
  """CIFAR-10, or a part of it.

  Attributes:
    pixels: the training images, unscaled.
    test: batches of the test images.
    size: side of the images that networks see.
    batch_size: of training.
  """

  pixels: images.Images
  test: list[train.Batch]
  size: int
  batch_size: int

  @property
  def steps_per_epoch(self) -> int:
    """Whole batches in the training images."""
    return len(self.pixels["label"]) // self.batch_size

  def batches(self, seed: int) -> grain.DatasetIterator:
    """Host. Training batches for ever, cropped and flipped at random."""
    augment = images.crop_and_flip
    return images.batches(self.pixels, self.batch_size, seed=seed, augment=augment, size=self.size, **_NORMALISATION)


def cifar10(size: int, batch_size: int, train_images: int | None = None) -> Task:
  """Host. As much of CIFAR-10 as `TFDS_DATA_DIR` has, or its first `train_images`."""
  known, held_out = images.as_arrays("cifar10", "train"), images.as_arrays("cifar10", "test")
  count = len(known["label"])
  if train_images is not None:
    count = checks.count("train_images", train_images, 1, count)
  checks.count("batch_size", batch_size, 1, count)
  test = images.batches(held_out, 500, seed=None, epochs=1, drop_remainder=False, size=size, **_NORMALISATION)
  return Task(images.Images(image=known["image"][:count], label=known["label"][:count]), list(test), size, batch_size)


def jitted(learner: train.Learner) -> train.Learner:
  """The learner with functions that all seeds share, compiled once."""
  return train.Learner(learner.init, jax.jit(learner.step, donate_argnums=0), jax.jit(learner.evaluate))


def errors(
  learner: train.Learner, task: Task, *, epochs: int, seeds: int, folder: pathlib.Path, config: dict[str, Any]
) -> Float[np.ndarray, " seeds"]:
  """Test errors in percent, one for each seed of initialisation, order and augmentation.

  Args:
    learner: from `jitted`.
    task: the images.
    epochs: of each run.
    seeds: runs, `seed0`, ... in the folder; those that are there already resume.
    folder: of this learner.
    config: settings that a run depends on.
  """
  checks.count("seeds", seeds)
  found = []
  for seed in range(seeds):
    state = train.fit(
      learner,
      task.batches(seed),
      steps=epochs * task.steps_per_epoch,
      workdir=folder / f"seed{seed}",
      key=jax.random.key(seed),
      config=config,
      tensorboard=False,
    )
    hits = sum(float(learner.evaluate(state, batch)["accuracy"]) * len(batch["label"]) for batch in task.test)
    found.append(100 - 100 * hits / sum(len(batch["label"]) for batch in task.test))
  return np.array(found)


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
