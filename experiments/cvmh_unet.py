"""CVMH-UNet on pictures: what cross scans and frequency fusion are worth beside VM-UNet and a plain U-Net.

    python experiments/cvmh_unet.py                  # three networks of 0.7M parameters on CamVid, minutes
    python experiments/cvmh_unet.py --ablation       # and CVMH-UNet without each of its parts
    python experiments/cvmh_unet.py --dataset aerial # the same on drawn aerial tiles; aerial-diagonal: roads run so
    python experiments/cvmh_unet.py --preset paper   # the full network, on a host with GPUs

The paper has no official code, and its data (ISPRS Vaihingen and Potsdam, GID-15) need registration. So its preset is
the network at the size that `jaxlab.models.cvmh_unet` reconstructs, trained on CamVid: rate, weight decay and drop path
are VM-UNet's; batch, warm-up, limit of the gradients' norm, crops and number of steps are ours.

CamVid is read from JAXLAB_DATA/camvid. All networks see the same crops in the same order, for as many steps, with the
same rates and loss (cross entropy and Dice), and have about as many parameters. Reported is, on the whole test images
and over the pixels that have a class, the mean intersection over union (mIoU) of the classes, the mean of their F1
scores, and the share of pixels that are right.
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import rich.table
import sklearn.metrics

from jaxlab import train
from jaxlab.data import aerial, camvid
from jaxlab.models import cvmh_unet
from jaxlab.nn.module import precision
from jaxlab.nn.scan_2d import SS2D
from jaxlab.train import command, figures

COMPARED = ("CVMH-UNet", "VM-UNet", "U-Net")
ABLATIONS: dict[str, dict[str, Any]] = {
  "SS2D for CS2D": {"directions": SS2D},
  "no local branch": {"local": False},
  "no residual": {"residual": False},
  "sums for fusion": {"skip": "add"},
  "one scale": {"pointwise": False},
  "one frequency": {"frequencies": 1},
  "dense for convolution": {"attention": "dense"},
}


class UNet(nn.Module):
  """The baseline: two 3 x 3 convolutions with BatchNorm a stage, maxima down, 2 x 2 pixels from channels up.

  Attributes:
    num_classes: K.
    widths: channels of each stage, the first at the images' size.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  num_classes: int
  widths: tuple[int, ...]
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Images [B, H, W, C] to logits [B, H, W, K]; sides that halvings do not divide are padded as CVMH-UNet's."""
    unit, (height, width) = 2 ** (len(self.widths) - 1), images.shape[1:3]
    x = jnp.pad(images, ((0, 0), (0, -height % unit), (0, -width % unit), (0, 0)), mode="edge").astype(self.dtype)

    def convolve(x: jax.Array, width: int) -> jax.Array:
      for _ in range(2):
        x = nn.Conv(width, (3, 3), use_bias=False, **precision(self))(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, **precision(self))(x))
      return x

    # Written out as reshapes, since the gradients of pooling and of transposed convolutions are slow on CPU.
    def halve(x: jax.Array) -> jax.Array:
      b, h, w, c = x.shape
      return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))

    def double(x: jax.Array, width: int) -> jax.Array:
      b, h, w, _ = x.shape
      x = nn.Dense(4 * width, **precision(self))(x).reshape(b, h, w, 2, 2, width)
      return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, width)

    maps = []
    for channels in self.widths:
      x = convolve(halve(x) if maps else x, channels)
      maps.append(x)
    for channels, skip in zip(self.widths[-2::-1], maps[-2::-1], strict=True):
      x = convolve(jnp.concatenate([skip, double(x, channels)], -1), channels)
    return nn.Dense(self.num_classes, **precision(self))(x)[:, :height, :width]


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  dataset: Literal["camvid", "aerial", "aerial-diagonal"] = "camvid"
  """camvid: street scenes; aerial: drawn tiles, square ones of the crop's height by default, 1000 to train on."""
  preset: Literal["demo", "paper"] = "demo"
  """demo: 0.7M parameters on crops; paper: the full network on CamVid at its own size, 4600 steps, which are 100
  epochs, of 8 crops of 352 x 480."""
  height: int = 180
  """Of the images; CamVid's own is 360."""
  width: int = 240
  """Of the images; CamVid's own is 480."""
  crop: tuple[int, int] = (128, 160)
  """Height and width of what is trained on, multiples of 32."""
  steps: int = 400
  """Updates."""
  batch_size: int = 8
  """Crops a step."""
  learning_rate: float = 2e-3
  """Highest rate of AdamW, after a tenth of the steps; falls as a cosine to a hundredth."""
  weight_decay: float = 0.01
  """Of kernels."""
  drop_path: float = 0.05
  """Rate of the deepest blocks."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Of the computation."""
  seeds: int = 1
  """Independent runs: weights, crops, order."""
  ablation: bool = False
  """Also train CVMH-UNet without each of its parts."""
  workdir: pathlib.Path = pathlib.Path("runs/cvmh_unet")
  """Each run has its folder in here and resumes from it."""


PRESETS = {
  "demo": Config(),
  "paper": Config("camvid", "paper", 360, 480, (352, 480), 4600, 8, 1e-3, 0.01, 0.2, "bfloat16"),
}


class Task(NamedTuple):
  """Pictures to train and test on, of shape [N, H, W, 3] and [N, H, W]; void is the label of pixels without class."""

  classes: tuple[str, ...]
  palette: np.ndarray
  void: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  train: Any
  test: Any
  text: str


def load(config: Config) -> Task:
  """The data."""
  size = config.height, config.width
  if config.dataset == "camvid":
    parts = [camvid.load(split, size) for split in ("train", "test")]
    look = camvid.CLASSES, camvid.PALETTE, camvid.VOID, camvid.MEAN, camvid.STD
    text = "CamVid"
  else:
    roads: Any = "diagonal" if config.dataset == "aerial-diagonal" else "any"
    parts = [aerial.tiles(count, *size, roads=roads, seed=seed) for count, seed in ((1000, 0), (250, 1))]
    look = aerial.CLASSES, aerial.PALETTE, len(aerial.CLASSES), aerial.MEAN, aerial.STD
    text = "drawn aerial tiles" + (", diagonal roads" if roads == "diagonal" else "")
  counts = ", ".join(f"{len(part.image)} to {verb} on" for part, verb in zip(parts, ("train", "test"), strict=True))
  return Task(*look, *parts, f"{text} at {config.height} x {config.width}, {counts}, {len(look[0])} classes")


def network(config: Config, name: str, classes: int = len(camvid.CLASSES)) -> nn.Module:
  """A model by its name in `COMPARED` or `ABLATIONS`; those compared have equally many parameters, within 3 %."""
  small = config.preset == "demo"
  shape: dict[str, Any] = {"dtype": config.dtype, "drop_path": config.drop_path}
  if small:
    shape |= {"encoder_depths": (1, 1, 2, 1), "decoder_depths": (1, 1, 1, 1)}
  if name == "U-Net":
    return UNet(classes, (12, 24, 48, 96, 96) if small else (64, 128, 256, 512, 1024), dtype=config.dtype)
  if name == "VM-UNet":
    return cvmh_unet.vm_unet(classes, **shape, **({"widths": (16, 32, 68, 136)} if small else {}))
  shape |= {"widths": (16, 32, 64, 128)} if small else {}
  return cvmh_unet.CVMHUNet(classes, **shape, **ABLATIONS.get(name, {}))


def learner(config: Config, model: nn.Module, void: int = camvid.VOID) -> train.Learner:
  """AdamW with a warm-up and cosine decay, cross entropy and Dice over the pixels that have a class."""
  rate, warm = config.learning_rate, max(config.steps // 10, 1)
  schedule = optax.warmup_cosine_decay_schedule(0, rate, warm, config.steps, rate / 100)
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, weight_decay=config.weight_decay, mask=train.decay_mask),
  )

  def loss(logits: jax.Array, batch: train.Batch) -> tuple[jax.Array, train.Metrics]:
    valid = batch["label"] != void
    hit = (logits.argmax(-1) == batch["label"]) & valid
    value = cvmh_unet.cross_entropy_and_dice(logits, batch["label"], valid)
    return value, {"accuracy": hit.sum() / jnp.maximum(valid.sum(), 1)}

  return train.supervised(model, loss, tx)


def normalise(image: np.ndarray, task: Task) -> np.ndarray:
  """Bytes as floats of mean 0 and deviation 1."""
  return ((image / np.float32(255) - np.float32(task.mean)) / np.float32(task.std)).astype(np.float32)


def confusion(predicted: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
  """Pixels of each class [K, K], rows the truth, columns the prediction; labels that are no class are left out."""
  return sklearn.metrics.confusion_matrix(label.ravel(), predicted.ravel(), labels=np.arange(classes))


def scores(pairs: np.ndarray, classes: tuple[str, ...]) -> dict[str, float]:
  """Percentages from a confusion matrix."""
  both, either = np.diag(pairs), pairs.sum(0) + pairs.sum(1)
  iou, f1 = 100 * both / np.maximum(either - both, 1), 200 * both / np.maximum(either, 1)
  total = {"mIoU": iou.mean(), "mean F1": f1.mean(), "accuracy": 100 * both.sum() / max(pairs.sum(), 1)}
  return {k: float(v) for k, v in (total | dict(zip(classes, iou, strict=True))).items()}


def run(config: Config, name: str, seed: int, task: Task) -> tuple[dict[str, float], np.ndarray]:
  """Scores and prediction of the test images."""
  model, (height, width) = network(config, name, len(task.classes)), config.crop
  data, test = task.train, task.test

  def batch(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((seed, step))
    images, labels = [], []
    for i in rng.choice(len(data.image), config.batch_size, replace=False):
      top, left = (
        rng.integers(0, total - side + 1) for total, side in zip(data.label.shape[1:], config.crop, strict=True)
      )
      where = i, slice(top, top + height), slice(left, left + width)
      flip = slice(None, None, rng.choice((-1, 1)))
      images.append(data.image[where][:, flip])
      labels.append(data.label[where][:, flip])
    return {"image": normalise(np.stack(images), task), "label": np.stack(labels).astype(np.int32)}

  kept = train.result.settings(config, without=("workdir", "seeds", "ablation"), network=name, seed=seed)
  state = train.fit(
    learner(config, model, task.void),
    batch,
    steps=config.steps,
    workdir=folder(config) / name.replace(" ", "_") / f"seed{seed}",
    key=jax.random.key(seed),
    config=kept,
    mesh=train.mesh() if jax.device_count() > 1 else None,
    tensorboard=False,
  )
  call = jax.jit(lambda v, x: model.apply(v, x).argmax(-1).astype("uint8"))
  variables, size = jax.device_get(state.variables), 8
  predicted = []
  for i in range(0, len(test.image), size):
    images = test.image[i : i + size]
    filled = np.pad(images, ((0, size - len(images)), (0, 0), (0, 0), (0, 0)))  # one shape, one program
    predicted.append(np.asarray(call(variables, normalise(filled, task)))[: len(images)])
  predicted = np.concatenate(predicted)
  count = sum(p.size for p in jax.tree.leaves(variables["params"]))
  return {**scores(confusion(predicted, test.label, len(task.classes)), task.classes), "parameters": count}, predicted


def folder(config: Config) -> pathlib.Path:
  """Of the runs of these settings."""
  return config.workdir / f"{config.dataset}-{config.preset}-{config.height}x{config.width}-{config.steps}"


def draw(
  config: Config, measured: dict[str, list[dict[str, float]]], shown: dict[str, np.ndarray], task: Task
) -> pathlib.Path:
  """IoU of each class, and what the first seed's networks see in four test images."""
  figure, axes = figures.subplots(2, 1, width=9, height=4)
  names = [name for name in measured if name in COMPARED]
  test, groups, width = task.test, ["mIoU", *task.classes], 0.8 / len(names)
  for i, name in enumerate(names):
    values = np.array([[one[group] for group in groups] for one in measured[name]])
    spread = values.std(0, ddof=1) if len(values) > 1 else None
    axes[0, 0].bar(np.arange(len(groups)) + i * width, values.mean(0), width, yerr=spread, label=name)
  axes[0, 0].set(xticks=np.arange(len(groups)) + 0.4 - width / 2, ylabel="IoU (%)", ylim=(0, 100))
  axes[0, 0].set_xticklabels(groups, rotation=30)
  axes[0, 0].legend(fontsize=8)
  rows = np.linspace(0, len(test.image) - 1, 4).astype(int)
  columns = [test.image[rows], task.palette[test.label[rows]], *(task.palette[shown[name][rows]] for name in names)]
  axes[1, 0].imshow(np.concatenate([np.concatenate(list(column), 1) for column in columns]))
  axes[1, 0].set_title("from above: image, truth, " + ", ".join(names), fontsize=8)
  axes[1, 0].set_axis_off()
  tall = 8 / 4 * len(columns) * test.label.shape[1] / test.label.shape[2]  # inches of the pictures, four to 8 inches
  axes[0, 0].get_gridspec().set_height_ratios([3, tall])
  figure.set_size_inches(8, 3.5 + tall)
  return figures.save(figure, folder(config) / "comparison.png")


def main(config: Config) -> None:
  """Trains, tests and reports."""
  began = time.monotonic()
  if config.seeds < 1 or config.steps < 10:
    raise ValueError(f"seeds, steps: got {config.seeds}, {config.steps}, expected at least 1 and 10")
  if config.crop[0] > config.height or config.crop[1] > config.width or min(config.crop) < 1:
    raise ValueError(f"crop: got {config.crop}, expected at most the images' size, {config.height} x {config.width}")
  task = load(config)
  names = [*COMPARED, *(ABLATIONS if config.ablation else ())]
  measured: dict[str, list[dict[str, float]]] = {name: [] for name in names}
  shown: dict[str, np.ndarray] = {}
  for seed in range(config.seeds):
    for name in names:
      one, predicted = run(config, name, seed, task)
      measured[name].append(one)
      shown.setdefault(name, predicted)
      rich.print(f"{name}, seed {seed}: " + ", ".join(f"{k} {one[k]:.1f}" for k in ("mIoU", "mean F1", "accuracy")))
  table = rich.table.Table("network", "parameters", "mIoU", "mean F1", "accuracy", title="test images (%)")
  for name, runs in measured.items():
    means = (f"{np.mean([one[k] for one in runs]):.1f}" for k in ("mIoU", "mean F1", "accuracy"))
    table.add_row(name, f"{runs[0]['parameters']:,}", *means)
  rich.print(table)
  metrics = {f"{name}, {k}": [one[k] for one in runs] for name, runs in measured.items() for k in runs[0]}
  mean = {name: float(np.mean([one["mIoU"] for one in runs])) for name, runs in measured.items()}
  others = [f"{mean['CVMH-UNet'] - value:+.1f} points against {name}" for name, value in mean.items()][1:]
  path = train.write_result(
    folder(config),
    system="cvmh_unet",
    claim="mIoU of CVMH-UNet: " + ", ".join([f"{mean['CVMH-UNet']:.1f} %", *others]) + ".",
    dataset=task.text,
    config=config,
    metrics=metrics,
    published={},
    seed=list(range(config.seeds)),
    wall_time=time.monotonic() - began,
  )
  rich.print(f"{path}\n{draw(config, measured, shown, task)}")


def defaults(asked: Config, preset: Config) -> Config:
  """The preset's, for the data asked for."""
  square = asked.dataset.startswith("aerial")
  return dataclasses.replace(preset, height=128, width=128, crop=(128, 128)) if square else preset


parse = command.parser(PRESETS, __doc__, defaults)


if __name__ == "__main__":
  main(parse())
