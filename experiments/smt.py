"""SMT on images: a small hybrid beside a linear classifier, what its mixers contribute, and the published recipe.

    python experiments/smt.py                                # 5,000 MNIST digits, minutes on two cores
    python experiments/smt.py --dataset cifar10 --epochs 60  # reads TFDS_DATA_DIR
    python experiments/smt.py --ablation --seeds 3           # hybrid, pure modulation, pure attention: same size, steps
    python experiments/smt.py --preset paper                 # SMT-T on ImageNet-1k for 300 epochs, on a host with GPUs

The small networks have depths 1, 1, 4, 1 and 0.3M parameters. Validation images are set aside from the training set;
test images are seen once, at the end. The paper preset is the published recipe, and tests on ImageNet's validation set
as the literature does. Every process of a run over several hosts starts this script with its own JAX_PROCESS_ID.

Not here: the recipes behind the published accuracies of SMT-L, which are pre-training on ImageNet-22k for 90 epochs and
30 epochs of fine-tuning on ImageNet-1k at 224 or 384 pixels; and those of detection and segmentation.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import grain
import jax
import numpy as np
import optax
import rich
import rich.table
import sklearn.linear_model

from jaxlab import memory, train
from jaxlab.data import augment, digits, imagenet, images, mnist5k, reading
from jaxlab.models import smt
from jaxlab.train import command, figures


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run; every field is an option of the command."""

  preset: Literal["small", "paper"] = "small"
  """Where the defaults of all other fields come from."""
  dataset: Literal["mnist5k", "digits", "cifar10", "imagenet2012"] = "mnist5k"
  """mnist5k and digits ship with dependencies; the others are read from TFDS_DATA_DIR."""
  model: Literal["hybrid", "modulation", "attention", "tiny", "small", "base", "large"] = "hybrid"
  """The first three have 0.3M parameters and differ in their mixers; the others are the paper's."""
  size: int = 32
  """Side of the images that the network sees, in pixels."""
  epochs: int = 30
  """Passes over the training set."""
  batch_size: int = 128
  """Images a step, over all devices."""
  learning_rate: float = 8e-3
  """Highest rate of AdamW for 512 images a step; scaled linearly with the batch, like both ends of its schedule."""
  warmup_epochs: float = 2
  """Epochs of linear warm-up; a cosine follows."""
  weight_decay: float = 0.05
  """Of matrices and kernels."""
  clip: float = 5.0
  """Largest norm of the gradient."""
  drop_path: float | None = None
  """Rate of the last block; None for the model's own (0.05 for those of 0.3M, 0.1 to 0.4 for the paper's)."""
  label_smoothing: float = 0.1
  """Share of the label spread over all classes."""
  mix: bool = False
  """Mixup (alpha 0.2) or CutMix (alpha 1), half of the batches each."""
  erase: float = 0.0
  """Probability that a random box of an image is overwritten by noise."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Of the computation; parameters are float32."""
  seeds: int = 1
  """Independent runs: initialisation, order and augmentation."""
  ablation: bool = False
  """Train hybrid, modulation and attention instead of `model`, and compare."""
  workdir: pathlib.Path = pathlib.Path("runs/smt")
  """Each run has its folder in here and resumes from it; figure and result.json lie beside them."""


PRESETS = {
  "small": Config(),
  "paper": Config(
    preset="paper",
    dataset="imagenet2012",
    model="tiny",
    size=224,
    epochs=300,
    batch_size=1024,
    learning_rate=1e-3,
    warmup_epochs=5,
    mix=True,
    erase=0.25,
    dtype="bfloat16",
  ),
}
parse = command.parser(PRESETS, __doc__)
PUBLISHED = {"tiny": 82.2, "small": 83.7, "base": 84.3}  # top-1, ImageNet-1k alone


# ----------------------------------------------------------------------------------------------------------- networks

# Stage 4 of the two pure networks is as wide as brings their size within 2 % of the hybrid's.
_SMALL: dict[str, Any] = {"depths": (1, 1, 4, 1), "head_dim": 8, "drop_path": 0.05}
ABLATION = {
  "hybrid": {"mixers": smt.HYBRID, "widths": (16, 32, 48, 96), **_SMALL},
  "modulation": {"mixers": ("modulation",) * 4, "widths": (16, 32, 48, 88), **_SMALL},
  "attention": {"mixers": ("attention",) * 4, "widths": (16, 32, 48, 104), **_SMALL},
}


def network(config: Config, name: str, task: "Task") -> smt.SMT:
  """The model called `name`."""
  options: dict[str, Any] = {"in_channels": task.channels, "dtype": config.dtype}
  if config.drop_path is not None:
    options["drop_path"] = config.drop_path
  if name in ABLATION:
    return smt.SMT(task.num_classes, **{**ABLATION[name], **options})
  return getattr(smt, name)(task.num_classes, **options)


def schedule(config: Config, steps_per_epoch: int) -> optax.Schedule:
  """Linear warm-up, then a cosine; all rates are for 512 images a step and scale with the batch."""
  scale = config.batch_size / 512
  return optax.warmup_cosine_decay_schedule(
    init_value=1e-7 * scale,
    peak_value=config.learning_rate * scale,
    end_value=1e-6 * scale,
    warmup_steps=round(config.warmup_epochs * steps_per_epoch),
    decay_steps=config.epochs * steps_per_epoch,
  )


def learner(config: Config, model: smt.SMT, steps_per_epoch: int) -> train.Learner:
  """Training by the recipe of the paper, with the strengths in the config."""
  rate = schedule(config, steps_per_epoch)
  tx = optax.chain(
    optax.clip_by_global_norm(config.clip),
    optax.adamw(rate, weight_decay=config.weight_decay, mask=train.decay_mask),
  )
  plain = train.supervised(model, train.cross_entropy(label_smoothing=config.label_smoothing), tx)

  def step(state: train.TrainState, batch: train.Batch) -> tuple[train.TrainState, train.Metrics]:
    # Off the keys of dropout, which are those of the steps.
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(state.key, 2**32 - 1), state.step))
    pixels, labels = batch["image"], jax.nn.one_hot(batch["label"], model.num_classes)
    if config.erase:
      pixels = augment.random_erase(keys[0], pixels, probability=config.erase)
    if config.mix:
      pixels, labels = augment.mixup_or_cutmix(keys[1], pixels, labels, mixup_alpha=0.2)
    return plain.step(state, {"image": pixels, "label": labels})

  # Jitted here, so that all seeds share one compilation.
  return train.Learner(plain.init, jax.jit(step, donate_argnums=0), jax.jit(plain.evaluate))


# --------------------------------------------------------------------------------------------------------------- data


class Task(NamedTuple):
  """A data set; images are normalised, float32."""

  name: str
  num_classes: int
  channels: int
  steps_per_epoch: int
  batches: Callable[[int], grain.DatasetIterator]  # seed -> training batches, for ever
  validation: Any  # list or grain dataset of batches
  test: Any
  pixels: dict[str, images.Images] | None  # the same splits, unscaled, for the linear classifier


def load(config: Config) -> Task:
  """The data set that the config names, the part of this process."""
  process: dict[str, Any] = {"shard_index": jax.process_index(), "shard_count": jax.process_count()}
  if config.dataset == "imagenet2012":
    return load_imagenet(config, process)
  options: dict[str, Any] = {"size": config.size}
  splits: Sequence[images.Images]
  if config.dataset == "cifar10":
    splits = [images.as_arrays("cifar10", part) for part in ("train[:90%]", "train[90%:]", "test")]
    known = sum(len(split["label"]) for split in splits[:2])
    name = "CIFAR-10" if known == 50_000 else f"CIFAR-10 ({known // 1000}k subset)"
    options |= {"mean": images.CIFAR10_MEAN, "std": images.CIFAR10_STD}
  else:
    source = {"digits": digits.images, "mnist5k": mnist5k.images}[config.dataset]()
    splits = [images.Images(image=np.rint(255 * s["image"]).astype(np.uint8), label=s["label"]) for s in source]
    name = {"digits": "scikit-learn digits", "mnist5k": "MNIST (5k subset)"}[config.dataset]
    options |= {"mean": (mnist5k.MEAN,), "std": (mnist5k.STD,)}

  if config.batch_size > len(splits[0]["label"]):
    raise ValueError(f"batch_size: got {config.batch_size}, expected at most the {len(splits[0]['label'])} images")

  def batches(seed: int) -> grain.DatasetIterator:
    change = images.crop_and_flip if config.dataset == "cifar10" else shift
    local = config.batch_size // jax.process_count()
    return images.batches(splits[0], local, seed=seed, augment=change, **options, **process)

  held_out = [list(images.batches(s, 1000, seed=None, epochs=1, drop_remainder=False, **options)) for s in splits[1:]]
  return Task(
    name=name,
    num_classes=10,
    channels=splits[0]["image"].shape[-1],
    steps_per_epoch=len(splits[0]["label"]) // config.batch_size,
    batches=batches,
    validation=held_out[0],
    test=held_out[1],
    pixels=dict(zip(("train", "validation", "test"), splits, strict=True)),
  )


def load_imagenet(config: Config, process: dict[str, Any]) -> Task:
  """ImageNet-1k with the published augmentation; validation and test are its 50,000 validation images."""
  training, held_out = (images.source("imagenet2012", split) for split in ("train", "validation"))
  mean, std = images.IMAGENET_MEAN, images.IMAGENET_STD
  per_process = len(held_out) // process["shard_count"]

  def prepare(example: dict[str, Any]) -> dict[str, Any]:
    pixels = imagenet.evaluation_crop(example["image"], config.size)
    return {"image": images.normalize(pixels, mean, std), "label": np.int32(example["label"])}

  test = grain.MapDataset.source(held_out)[process["shard_index"] :: process["shard_count"]][:per_process]
  # 50 batches, which 2, 4, 5 or 8 devices share evenly.
  test = test.map(prepare).batch(1000).to_iter_dataset(reading.READ_AHEAD)

  def batches(seed: int) -> grain.DatasetIterator:
    change = functools.partial(imagenet.train_crop, size=config.size)
    local = config.batch_size // jax.process_count()
    return images.batches(training, local, seed=seed, augment=change, mean=mean, std=std, **process)

  return Task("ImageNet-1k", 1000, 3, len(training) // config.batch_size, batches, test, test, None)


def shift(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Moves a digit by up to a fourteenth of its size."""
  height, width = image.shape[:2]
  reach = max(1, height // 14)
  padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)))
  top, left = rng.integers(0, 2 * reach + 1, 2)
  return padded[top : top + height, left : left + width]


# -------------------------------------------------------------------------------------------------------------- runs


class Run(NamedTuple):
  """A trained network."""

  state: train.TrainState
  accuracy: float  # on the test images, percent
  curve: tuple[np.ndarray, np.ndarray]  # (step, percent) on the validation images


def run(config: Config, task: Task, name: str, learner: train.Learner, seed: int) -> Run:
  """Trains, or takes up where the folder's last run ended, and tests."""
  folder = config.workdir / config.dataset / name / f"seed{seed}"
  kept = train.result.settings(config, without=("workdir", "seeds", "ablation", "model"))
  # The validation and test sets that ship with packages are too small to share out.
  mesh = train.mesh() if jax.device_count() > 1 and config.dataset in ("cifar10", "imagenet2012") else None
  state = train.fit(
    learner,
    task.batches(seed),
    steps=config.epochs * task.steps_per_epoch,
    workdir=folder,
    key=jax.random.key(seed),
    evaluate_on=task.validation,
    evaluate_every=max(1, config.epochs // 30) * task.steps_per_epoch,
    config=kept,
    mesh=mesh,
  )
  steps, accuracy = train.read_metrics(folder)["eval_accuracy"]
  put = jax.device_put if mesh is None else functools.partial(train.shard_batch, mesh)
  hits = [(len(b["label"]), float(learner.evaluate(state, put(b))["accuracy"])) for b in task.test]
  return Run(state, 100 * sum(n * a for n, a in hits) / sum(n for n, _ in hits), (steps, 100 * accuracy))


def linear(task: Task) -> float:
  """Test accuracy, in percent, of logistic regression on pixels; its penalty is picked on the validation images."""
  assert task.pixels is not None
  x, y = {}, {}
  for split, data in task.pixels.items():
    x[split], y[split] = data["image"].reshape(len(data["label"]), -1).astype(np.float32) / 255, data["label"]
  centre = x["train"].mean(0)
  x = {split: pixels - centre for split, pixels in x.items()}
  best, validation = None, 0.0
  for c in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
    fit = sklearn.linear_model.LogisticRegression(C=c, max_iter=300).fit(x["train"], y["train"])
    score = fit.score(x["validation"], y["validation"])
    if score < validation:
      break  # weaker penalties overfit more, and take longest
    best, validation = fit, score
  assert best is not None
  return 100 * best.score(x["test"], y["test"])


def modulation_maps(model: smt.SMT, state: train.TrainState, pictures: np.ndarray) -> list[np.ndarray]:
  """Mean magnitude over channels of what the first block of stages 1 and 2 multiplies its values by: [B, h, w] each."""
  _, sown = model.apply(jax.device_get(state.best_variables), pictures, mutable=["intermediates"])
  blocks = [sown["intermediates"][f"stage{i}_block0"]["mixer"]["modulation"][0] for i in (1, 2)]
  return [np.abs(np.asarray(m, np.float32)).mean(-1) for m in blocks]


def draw(config: Config, task: Task, runs: dict[str, list[Run]], measured: dict[str, list[float]]) -> pathlib.Path:
  """Learning curves, test accuracies, and where the hybrid's modulation is strong."""
  figure, axes = figures.subplots(1, 3)
  curves = {name: (r[0].curve[0], np.stack([run.curve[1] for run in r], axis=-1)) for name, r in runs.items()}
  figures.curves(axes[0, 0], curves, xlabel="step", ylabel="validation accuracy (%)", title=task.name)
  for i, accuracies in enumerate(measured.values()):
    axes[0, 1].plot([i] * len(accuracies), accuracies, "o", color=figures.COLORS[i], alpha=0.6)
    axes[0, 1].plot(i, np.mean(accuracies), "k_", markersize=20)
  axes[0, 1].set(xticks=range(len(measured)), xticklabels=list(measured), title="test accuracy (%)")
  axes[0, 1].margins(x=0.3)

  name, panel = next(iter(runs)), axes[0, 2]
  panel.set_axis_off()
  if name != "attention":  # which modulates nothing
    pictures = next(iter(task.test))["image"][:5]
    maps = modulation_maps(network(config, name, task), runs[name][0].state, pictures)
    rows = [pictures, *(np.repeat(m[..., None], task.channels, -1) for m in maps)]
    tiles = [np.concatenate([unit(resized(tile, config.size)) for tile in row], axis=1) for row in rows]
    panel.imshow(np.concatenate(tiles).squeeze(), cmap="gray")
    panel.set_title("image; modulation of stages 1 and 2")
  return figures.save(figure, config.workdir / config.dataset / f"{label(config)}.png")


def resized(tile: np.ndarray, size: int) -> np.ndarray:
  """Nearest-neighbour enlargement."""
  rows, columns = (np.arange(size) * n // size for n in tile.shape[:2])
  return tile[rows][:, columns]


def unit(tile: np.ndarray) -> np.ndarray:
  """Scaled to [0, 1]."""
  return (tile - tile.min()) / max(np.ptp(tile), 1e-6)


def claim(accuracy: dict[str, float]) -> str:
  """What the numbers say, whichever way they fall."""
  first, *others = accuracy
  differences = [f"{accuracy[first] - accuracy[other]:+.1f} points against {other}" for other in others]
  return f"Test accuracy of {first}: {', '.join([f'{accuracy[first]:.1f} %', *differences])}"


def label(config: Config) -> str:
  """Name of what the command compares."""
  return "ablation" if config.ablation else config.model


def main(config: Config) -> None:
  """Trains, tests and reports."""
  memory.keep()
  began = time.monotonic()
  if not 0 <= config.warmup_epochs < config.epochs:
    raise ValueError(f"warmup_epochs: got {config.warmup_epochs}, expected fewer than the {config.epochs} epochs")
  if config.seeds < 1:
    raise ValueError(f"seeds: got {config.seeds}, expected at least 1")
  train.distributed()
  task = load(config)
  names: Sequence[str] = tuple(ABLATION) if config.ablation else (config.model,)
  runs: dict[str, list[Run]] = {}
  for name in names:
    shared = learner(config, network(config, name, task), task.steps_per_epoch)
    runs[name] = [run(config, task, name, shared, seed) for seed in range(config.seeds)]
  baseline = None if task.pixels is None else linear(task)
  if jax.process_index():
    return

  table = rich.table.Table("network", "parameters", "test accuracy (%)", title=f"{task.name}, {config.epochs} epochs")
  for name, group in runs.items():
    size = sum(x.size for x in jax.tree.leaves(group[0].state.params))
    accuracies = [r.accuracy for r in group]
    spread = f" ± {np.std(accuracies, ddof=1):.2f}" if len(group) > 1 else ""
    table.add_row(name, f"{size:,}", f"{np.mean(accuracies):.2f}{spread}")
  if baseline is not None:
    table.add_row("logistic regression on pixels", "", f"{baseline:.2f}")
  rich.print(table)

  measured = {name: [r.accuracy for r in group] for name, group in runs.items()}
  if baseline is not None:
    measured["linear"] = [baseline]
  published: dict[str, Any] = {}
  if config.dataset == "imagenet2012" and config.model in PUBLISHED:
    published = {config.model: {"value": PUBLISHED[config.model], "source": "official repository, top-1"}}
  path = train.write_result(
    config.workdir / config.dataset / label(config),
    system="smt",
    claim=claim({name: float(np.mean(values)) for name, values in measured.items()}),
    dataset=task.name,
    config=config,
    metrics=measured,
    published=published,
    seed=list(range(config.seeds)),
    wall_time=time.monotonic() - began,
  )
  rich.print(f"{path}\n{draw(config, task, runs, measured)}")


if __name__ == "__main__":
  main(parse())
