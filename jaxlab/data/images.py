"""Image classification sets: TensorFlow Datasets on disk (read without TensorFlow), batched and augmented by grain.

    batches = images.cifar10("train", 128, seed=0, augment=True)      # decodes as it goes
    arrays = images.as_arrays("cifar10", "train")                     # or decode once, when it fits in memory
    batches = images.batches(arrays, 128, seed=0, augment=images.crop_and_flip, mean=images.CIFAR10_MEAN, ...)

Both are grain iterators: `get_state()` and `set_state()` save and restore the position exactly, and batch i depends
only on the seed and i. Augmentation that mixes examples is in `jaxlab.data.augment`, on the device.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, cast

import grain
import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from jaxtyping import Float, Shaped, UInt8

from jaxlab import checks
from jaxlab.data import reading
from jaxlab.data.arrays import Images

# Of the training pixels after scaling to [0, 1].
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Padding = Literal["constant", "reflect"]  # of `np.pad`
Augmentation = Callable[[UInt8[np.ndarray, "h w c"], np.random.Generator], UInt8[np.ndarray, "h w c"]]


class Source(Protocol):
  """Random access to examples: dicts with `image`, uint8 [H, W, C], and `label`, an integer."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


def cifar10(
  split: str,
  batch_size: int,
  *,
  seed: int | None,
  augment: bool,
  directory: str | os.PathLike[str] | None = None,
  size: int | None = None,
  shard_index: int = 0,
  shard_count: int = 1,
  epochs: int | None = None,
  drop_remainder: bool = True,
) -> grain.DatasetIterator:
  """Host. CIFAR-10 batches, normalised by the training set's mean and deviation.

  Args:
    split: "train", "test", or a part of one such as "train[:90%]".
    batch_size: per shard.
    seed: of order and augmentation; None for the stored order, which excludes augmentation.
    augment: random crop after padding by 4, and horizontal flip.
    directory: TFDS folder; default `TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
    size: side to resize to, after augmentation.
    shard_index: which part of the examples this process reads, e.g. `jax.process_index()`; parts are disjoint.
    shard_count: number of parts, e.g. `jax.process_count()`.
    epochs: passes over the data, each in a new order; None for ever.
    drop_remainder: drop the last batch of an epoch if it is short, and the last few examples if shards are unequal, so
      that all processes make the same number of batches. False keeps every example.

  Returns:
    Iterator over {"image": [B, H, W, 3] float32, "label": [B] int32}.

  Raises:
    ValueError: no such data on disk, or an argument out of range.
  """
  return batches(
    source("cifar10", split, directory),
    batch_size,
    seed=seed,
    augment=crop_and_flip if augment else None,
    mean=CIFAR10_MEAN,
    std=CIFAR10_STD,
    size=size,
    shard_index=shard_index,
    shard_count=shard_count,
    epochs=epochs,
    drop_remainder=drop_remainder,
  )


def source(name: str, split: str, directory: str | os.PathLike[str] | None = None) -> Source:
  """Host. An image set that TFDS has prepared, as random access to decoded examples. Downloads nothing.

  Args:
    name: TFDS name, e.g. "cifar10", "cifar100", "imagenet2012", or "name/config".
    split: TFDS split or a part of one.
    directory: TFDS folder; default `TFDS_DATA_DIR`, else `~/tensorflow_datasets`.

  Raises:
    ValueError: unknown name or split, data not prepared (the message says how), damaged files.
  """
  # TFDS itself looks at the variable only when it is imported.
  directory = directory or os.environ.get("TFDS_DATA_DIR")
  try:
    builder = tfds.builder(name, data_dir=directory)
  except Exception as error:  # an unknown name lists a thousand others: keep the first line
    reason = str(error).strip().partition("\n")[0]
    raise ValueError(f"name: got {name!r}, expected a TFDS image set ({reason})") from error
  if not builder.info.splits:
    raise ValueError(
      f"directory: got no prepared {name!r} at {builder.data_path}, expected its array_record files; either set "
      f"TFDS_DATA_DIR (or directory) to a folder that has them, or prepare them once, with TensorFlow installed: "
      f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
    )
  try:
    examples = builder.as_data_source(split=split)
  except (ValueError, KeyError) as error:
    raise ValueError(
      f"split: got {split!r}, expected one of {sorted(builder.info.splits)} or a part ({error})"
    ) from error
  except Exception as error:
    raise ValueError(f"{builder.data_path}: got files that do not open, expected array_record ({error})") from error
  if not len(examples):
    raise ValueError(f"split: got {split!r}, which is empty, expected at least one example")
  try:
    # The index is at the end of the file: a truncated one fails here, not in the middle of a run.
    features = examples[0], examples[len(examples) - 1]
  except Exception as error:
    raise ValueError(f"{builder.data_path}: got damaged files, expected {len(examples)} examples ({error})") from error
  if any("image" not in example or "label" not in example for example in features):
    raise ValueError(f"name: got {name!r} with features {sorted(features[0])}, expected image and label among them")
  return examples


def as_arrays(name: str, split: str, directory: str | os.PathLike[str] | None = None) -> Images:
  """Host. A whole split decoded into memory, for sets whose images are all of one size.

  Args:
    name: as `source`, also for the rest.
    split: see there.
    directory: see there.

  Returns:
    Images in uint8, as stored; `normalize` or `batches` makes floats of them.

  Raises:
    ValueError: as `source`; images of several sizes.
  """
  examples = source(name, split, directory)
  first = examples[0]["image"]
  image, label = np.empty((len(examples), *first.shape), np.uint8), np.empty(len(examples), np.int32)
  for i in range(len(examples)):
    example = examples[i]
    if example["image"].shape != first.shape:
      raise ValueError(
        f"name: got {name!r} with images of {first.shape} and {example['image'].shape}, expected one size"
      )
    image[i], label[i] = example["image"], example["label"]
  return Images(image=image, label=label)


def batches(
  examples: Images | Source,
  batch_size: int,
  *,
  seed: int | None,
  mean: Sequence[float],
  std: Sequence[float],
  augment: Augmentation | None = None,
  size: int | None = None,
  shard_index: int = 0,
  shard_count: int = 1,
  epochs: int | None = None,
  drop_remainder: bool = True,
) -> grain.DatasetIterator:
  """Host. Shuffled, augmented, normalised batches. See `cifar10` for the arguments that are not below.

  Args:
    examples: uint8 images in memory, or a `source`.
    batch_size: per shard.
    seed: of order and augmentation; None for the stored order.
    mean: per channel, of pixels in [0, 1].
    std: per channel.
    augment: function of one uint8 image and a NumPy generator, e.g. `crop_and_flip`.
    size: see `cifar10`, also for the rest.
    shard_index: see there.
    shard_count: see there.
    epochs: see there.
    drop_remainder: see there.

  Returns:
    Iterator over {"image": [B, H, W, C] float32, "label": [B] int32}.
  """
  rows = _Rows(cast(Images, examples)) if isinstance(examples, dict) else cast(Source, examples)
  checks.count("shard_count", shard_count, 1, len(rows))
  checks.count("shard_index", shard_index, 0, shard_count - 1)
  checks.count("batch_size", batch_size, 1, len(rows) // shard_count if drop_remainder else None)
  if size is not None:
    checks.count("size", size, 1)
  if epochs is not None:
    checks.count("epochs", epochs, 1)
  if seed is None and augment is not None:
    raise ValueError("seed: got None with augmentation, expected an integer")
  channels = rows[0]["image"].shape[-1]
  if not len(mean) == len(std) == channels or min(std) <= 0:
    raise ValueError(f"mean, std: got {mean}, {std}, expected {channels} channels, and deviations above 0")

  stop = len(rows) - len(rows) % shard_count if drop_remainder else len(rows)
  dataset = grain.MapDataset.source(rows)[shard_index:stop:shard_count]
  if seed is not None:
    checks.count("seed", seed, 0)
    if shard_count > 1:  # of its own, or the shards would augment their images alike
      seed = int(np.random.SeedSequence((seed, shard_index)).generate_state(1)[0])
    dataset = dataset.seed(seed).shuffle()
  # Batches end with the epoch, so the batch comes before the repetition; repeating reshuffles and augments anew.
  if augment is not None:
    dataset = dataset.random_map(functools.partial(_augmented, augment))
  dataset = dataset.map(functools.partial(_finished, size)).batch(batch_size, drop_remainder=drop_remainder)
  dataset = dataset.map(lambda batch: {**batch, "image": normalize(batch["image"], mean, std)}).repeat(epochs)
  return reading.opened(dataset)


def normalize(
  image: UInt8[np.ndarray, "*b c"], mean: Sequence[float], std: Sequence[float]
) -> Float[np.ndarray, "*b c"]:
  """(image / 255 - mean) / std in float32, per channel (the last axis)."""
  scale = np.float32(1) / (np.float32(255) * np.asarray(std, np.float32))
  return image * scale - (np.asarray(mean, np.float32) / np.asarray(std, np.float32))


def crop_and_flip(
  image: Shaped[np.ndarray, "h w c"], rng: np.random.Generator, *, padding: int = 4, mode: Padding = "constant"
) -> Shaped[np.ndarray, "h w c"]:
  """Pads, cuts the original size out at a random place, mirrors half of the images: the usual recipe.

  Args:
    image: of any dtype.
    rng: of place and mirroring.
    padding: pixels on each side.
    mode: "constant" pads with zeros, "reflect" mirrors the image at its outermost pixels.
  """
  checks.choice("mode", mode, Padding)
  height, width = image.shape[:2]
  padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode)
  top, left = rng.integers(0, 2 * padding + 1, 2)
  crop = padded[top : top + height, left : left + width]
  return crop[:, ::-1] if rng.random() < 0.5 else crop


def resize(image: UInt8[np.ndarray, "h w c"], size: int) -> UInt8[np.ndarray, "s s c"]:
  """Bilinear, with smoothing when it shrinks."""
  picture = PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  return np.asarray(picture.resize((size, size), PIL.Image.Resampling.BILINEAR)).reshape(size, size, -1)


class _Rows:
  """Arrays as a source."""

  def __init__(self, images: Images) -> None:
    image, label = np.asarray(images["image"]), np.asarray(images["label"])
    if image.ndim != 4 or image.dtype != np.uint8 or label.shape != image.shape[:1] or not len(label):
      raise ValueError(
        f"examples: got image {image.dtype} {image.shape} and label {label.shape}, expected uint8 [N, H, W, C] and [N]"
      )
    self.image, self.label = image, label

  def __len__(self) -> int:
    return len(self.label)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"image": self.image[index], "label": self.label[index]}


def _augmented(augment: Augmentation, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
  return {**example, "image": augment(example["image"], rng)}


def _finished(size: int | None, example: dict[str, Any]) -> dict[str, Any]:
  image = example["image"] if size is None else resize(np.ascontiguousarray(example["image"]), size)
  return {"image": image, "label": np.int32(example["label"])}
