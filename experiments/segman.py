"""SegMAN on shapes over photographs: what attention in neighbourhoods and the scan each see.

    python experiments/segman.py                  # a network of 0.4M parameters, minutes
    python experiments/segman.py --seeds 3 --ablation   # and the same without scan, and without local attention
    python experiments/segman.py --preset paper   # SegMAN-T, on a host with GPUs and 100 GB of memory

The paper's preset is the recipe for ADE20K as far as it goes without its data: optimizer, rates, batch, steps and how
many images. What differs: images are 384 pixels wide rather than 512, as the photographs have no more, and mirrored
only; the encoder starts from random weights; rates fall from the end of the warm-up, not from its beginning; biases are
not decayed.

Classes of `jaxlab.data.scenes` depend on a distant marker, on fine stripes and on sizes. All networks see the same
images in the same order, for as many steps, with the same rates; only what is named is left out. Reported is the mean
intersection over union (mIoU) of all classes over the test images, and that of the classes of each kind.
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal

import jax
import matplotlib
import numpy as np
import optax
import rich
import rich.table
import sklearn.metrics

from jaxlab import checks, train
from jaxlab.data import scenes
from jaxlab.models import segman
from jaxlab.train import command, figures

KINDS = {"by marker": (1, 2), "by stripes": (3, 4), "by size": (5, 6)}
VARIANTS: dict[str, dict[str, Any]] = {
  "SegMAN": {},
  "without scan": {"scan": False},
  "without local attention": {"local": False},
}


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  preset: Literal["demo", "paper"] = "demo"
  """demo: 0.4M parameters; paper: SegMAN-T with the published optimizer, 160,000 steps at 384 pixels."""
  side: int = 96
  """Of the images, a multiple of 32 up to 384."""
  images: int = 1000
  """To train on; a quarter as many to test on."""
  steps: int = 800
  """Updates; marker and size are learned last, and 1200 are not enough for them."""
  batch_size: int = 16
  """Images a step."""
  learning_rate: float = 2e-3
  """Highest rate of AdamW, after the warm-up; falls linearly."""
  head_rate: float = 1.0
  """Rate of the decoder, in units of the encoder's; 10 in the paper, which starts from a trained encoder."""
  warmup: int | None = None
  """Updates in which rates rise linearly from 0; None for a tenth of the steps."""
  clip: float | None = 1.0
  """Largest norm of the gradients; None for no limit."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Of the computation."""
  seeds: int = 1
  """Independent runs: weights, images, order."""
  ablation: bool = False
  """Also train without scan and without local attention."""
  workdir: pathlib.Path = pathlib.Path("runs/segman")
  """Each run has its folder in here and resumes from it."""


PRESETS = {
  "demo": Config(),
  "paper": Config("paper", 384, 20_000, 160_000, 16, 6e-5, 10.0, 1500, None, "bfloat16"),  # 384 fit the photographs
}
parse = command.parser(PRESETS, __doc__)


def network(config: Config, name: str) -> segman.SegMAN:
  """A model."""
  options = {"dtype": config.dtype, **VARIANTS[name]}
  if config.preset == "paper":
    return segman.segmenter("T", len(scenes.CLASSES), **options)
  shape: dict[str, Any] = {"widths": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "heads": (1, 2, 3, 4)}
  encoder = segman.encoder("T", 0, **shape, windows=(7, 5, 3, 3), global_tokens=9, **options)
  return segman.SegMAN(encoder, segman.Decoder(len(scenes.CLASSES), 32, 32, dtype=config.dtype))


def learner(config: Config, model: segman.SegMAN) -> train.Learner:
  """AdamW with a warm-up and linear decay; the decoder has a rate of its own.

  Raises:
    ValueError: a warm-up that leaves no step.
  """
  warm = max(config.steps // 10, 1) if config.warmup is None else config.warmup
  checks.count("warmup", warm, 0, config.steps - 1)

  def adamw(scale: float) -> optax.GradientTransformation:
    rate = scale * config.learning_rate
    schedule = optax.join_schedules(
      [optax.linear_schedule(0, rate, warm), optax.linear_schedule(rate, 0, config.steps - warm)], [warm]
    )
    return optax.adamw(schedule, weight_decay=0.01, mask=train.decay_mask)

  parts = {"encoder": adamw(1.0), "decoder": adamw(config.head_rate)}
  label = lambda params: {name: jax.tree.map(lambda _, name=name: name, tree) for name, tree in params.items()}
  limit = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
  return train.supervised(model, train.cross_entropy(), optax.chain(limit, optax.multi_transform(parts, label)))


def predict(model: segman.SegMAN, variables: Any, images: np.ndarray) -> np.ndarray:
  """Classes of pixels, a few images at a time."""
  call = jax.jit(lambda v, x: model.apply(v, x).argmax(-1))
  return np.concatenate([np.asarray(call(variables, images[i : i + 25])) for i in range(0, len(images), 25)])


def run(config: Config, name: str, seed: int) -> tuple[dict[str, float], np.ndarray]:
  """mIoU in percent, and the classes of the first test images."""
  data = scenes.marked_shapes(config.images, config.side, seed=2 * seed)
  test = scenes.marked_shapes(max(config.images // 100, 1) * 25, config.side, seed=2 * seed + 1)
  model = network(config, name)

  def batch(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((seed, step))
    rows = rng.choice(config.images, config.batch_size, replace=False)
    flip = slice(None, None, rng.choice((-1, 1)))
    return {"image": (data.image[rows][:, :, flip] - 0.5) / 0.25, "label": data.label[rows][:, :, flip]}

  kept = train.result.settings(config, without=("workdir", "seeds", "ablation"), variant=name, seed=seed)
  state = train.fit(
    learner(config, model),
    batch,
    steps=config.steps,
    workdir=config.workdir / folder(config) / name.replace(" ", "_") / f"seed{seed}",
    key=jax.random.key(seed),
    config=kept,
    mesh=train.mesh() if jax.device_count() > 1 else None,
    tensorboard=False,
  )
  predicted = predict(model, jax.device_get(state.variables), (test.image - 0.5) / 0.25)
  classes = np.arange(len(scenes.CLASSES))
  scores = 100 * sklearn.metrics.jaccard_score(
    test.label.ravel(), predicted.ravel(), labels=classes, average=None, zero_division=0
  )
  kinds = {kind: float(scores[list(classes)].mean()) for kind, classes in KINDS.items()}
  return {"all": float(scores.mean()), **kinds}, predicted[:4]


def folder(config: Config) -> str:
  """Of the runs of these settings."""
  return f"{config.preset}-{config.side}-{config.images}-{config.steps}"


def draw(config: Config, scores: dict[str, list[dict[str, float]]], shown: dict[str, np.ndarray]) -> pathlib.Path:
  """mIoU of each kind of class, and what the first seed's networks see in four test images."""
  figure, axes = figures.subplots(1, 2, width=6)
  kinds, width = list(next(iter(scores.values()))[0]), 0.8 / len(scores)
  for i, (name, runs) in enumerate(scores.items()):
    values = np.array([[one[kind] for kind in kinds] for one in runs])
    spread = values.std(0, ddof=1) if len(runs) > 1 else None
    axes[0, 0].bar(np.arange(len(kinds)) + i * width, values.mean(0), width, yerr=spread, label=name)
  axes[0, 0].set(xticks=np.arange(len(kinds)) + 0.4 - width / 2, xticklabels=kinds, ylabel="mIoU (%)", ylim=(0, 119))
  axes[0, 0].legend(fontsize=8, loc="upper center", ncols=3)
  test = scenes.marked_shapes(max(config.images // 100, 1) * 25, config.side, seed=1)
  palette = matplotlib.colormaps["tab10"](np.arange(len(scenes.CLASSES)))[:, :3]
  rows = [test.image[:4], palette[test.label[:4]], *(palette[p] for p in shown.values())]
  axes[0, 1].imshow(np.concatenate([np.concatenate(list(row), 1) for row in rows]))
  axes[0, 1].set_title("image, truth, " + ", ".join(shown), fontsize=8)
  axes[0, 1].set_axis_off()
  return figures.save(figure, config.workdir / folder(config) / "comparison.png")


def main(config: Config) -> None:
  """Trains, tests and reports."""
  began = time.monotonic()
  if config.seeds < 1 or config.steps < 10:
    raise ValueError(f"seeds, steps: got {config.seeds}, {config.steps}, expected at least 1 and 10")
  names = list(VARIANTS) if config.ablation else ["SegMAN"]
  scores: dict[str, list[dict[str, float]]] = {name: [] for name in names}
  shown: dict[str, np.ndarray] = {}
  for seed in range(config.seeds):
    for name in names:
      one, pictures = run(config, name, seed)
      scores[name].append(one)
      shown.setdefault(name, pictures)
      rich.print(f"{name}, seed {seed}: " + ", ".join(f"{k} {v:.1f}" for k, v in one.items()))
  metrics = {
    f"{name}, mIoU {kind}": [one[kind] for one in runs] for name, runs in scores.items() for kind in runs[0]
  }  # fmt: skip
  mean = {name: float(np.mean([one["all"] for one in runs])) for name, runs in scores.items()}
  table = rich.table.Table("network", *next(iter(scores.values()))[0], title="mIoU (%), test images")
  for name, runs in scores.items():
    table.add_row(name, *(f"{np.mean([one[kind] for one in runs]):.1f}" for kind in runs[0]))
  rich.print(table)
  others = [f"{mean['SegMAN'] - value:+.1f} points against {name}" for name, value in mean.items() if name != "SegMAN"]
  path = train.write_result(
    config.workdir / folder(config),
    system="segman",
    claim="mIoU of SegMAN: " + ", ".join([f"{mean['SegMAN']:.1f} %", *others]) + ".",
    dataset=f"shapes over two photographs, {config.images} images of {config.side} pixels",
    config=config,
    metrics=metrics,
    published={},
    seed=list(range(config.seeds)),
    wall_time=time.monotonic() - began,
  )
  rich.print(f"{path}\n{draw(config, scores, shown)}")


if __name__ == "__main__":
  main(parse())
