"""MANIQA on graded distortions of photographs: does it rank pictures of things that it has never seen?

    python experiments/maniqa.py                  # a network of 0.15M parameters on crops of 48 pixels, minutes
    python experiments/maniqa.py --seeds 3        # and two more ways to hold contents out
    python experiments/maniqa.py --seeds 3 --frames 40   # 40 frames of CamVid to train on besides (JAXLAB_DATA)
    python experiments/maniqa.py --distortions all   # of 19 kinds instead of 4
    python experiments/maniqa.py --preset paper --backbone vit_base_patch8_224.safetensors     # a host with GPUs

Pictures are those of `jaxlab.data.photographs`: blur, noise, JPEG and shuffled blocks, or all 19 distortions, at five
levels, whose quality is the level. Contents to train on, to choose a learning rate by and to test on are disjoint. All
networks start from noise, but for the vision transformers' patch embedding, a whitening of the training patches that
stands in for the paper's pre-training on ImageNet. They see the same crops in the same order for as many steps, and
choose from the same rates.
Beside MANIQA: a linear score of the mean over the same backbone's patches; a plain convolutional network; natural scene
statistics as in BRISQUE with a support vector machine; and PSNR and SSIM, which know the undistorted picture.
Reported are Spearman's (SRCC) and Pearson's (PLCC) correlation over all test pictures, a picture's score being the mean
of 20 random crops.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import scipy.ndimage
import scipy.special
import scipy.stats
import skimage.metrics
import sklearn.pipeline
import sklearn.preprocessing
import sklearn.svm
from jaxtyping import Array, Float

from jaxlab import checks, interop, train
from jaxlab.data import camvid, photographs
from jaxlab.models import maniqa
from jaxlab.nn.conv import Conv
from jaxlab.train import command, figures

FOUR = ("gaussian blur", "white noise", "JPEG", "block shuffle")
_FRAME_SIDE = 180  # of CamVid as it is stored, the shorter one
NETWORKS = ("MANIQA", "pooled backbone", "convolutions")


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  preset: Literal["demo", "paper"] = "demo"
  """demo: 0.15M parameters; paper: the published network and recipe."""
  distortions: Literal["four", "all"] = "four"
  """Kinds in the data."""
  side: int = 192
  """Shorter side of the pictures, at most 288."""
  train_sides: tuple[int, ...] = (144, 192, 240, 288)
  """Those of the pictures to train on: contents are few, and the same at another scale is nearly another one."""
  frames: int = 0
  """Of CamVid, read from JAXLAB_DATA, to train on besides: nine contents are few. None is validated or tested on."""
  size: int = 48
  """Of the crops."""
  steps: int = 8000
  """Updates."""
  batch_size: int = 24
  """Crops a step, of as many pictures."""
  learning_rates: tuple[float, ...] = (1e-3,)
  """Each network is trained with all of them under the first seed and keeps the best on the validation contents."""
  weight_decay: float = 1e-5
  """The demo's is decoupled, the paper's is added to the gradient."""
  flip: float = 0.5
  """Probability of a mirrored crop."""
  crops: int = 20
  """A picture's score is their mean."""
  backbone: pathlib.Path | None = None
  """timm's weights of ViT-B/8, for the paper's network."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Of the computation."""
  seeds: int = 1
  """Independent runs: contents held out, weights, order."""
  workdir: pathlib.Path = pathlib.Path("runs/maniqa")
  """Each run has its folder in here and resumes from it."""


PRESETS = {
  "demo": Config(),
  # 300 epochs of KADID-10k; the flip of its code turns pictures upside down.
  "paper": Config(
    preset="paper",
    distortions="all",
    side=288,
    train_sides=(288,),
    size=224,
    steps=303_600,
    batch_size=8,
    learning_rates=(1e-5,),
    flip=0.7,
  ),
}
parse = command.parser(PRESETS, __doc__)


class Convolutions(nn.Module):
  """Four strided 3x3 convolutions, the mean, and a linear score."""

  dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, images: Float[Array, "b s s 3"], *, train: bool = False) -> Float[Array, " b"]:
    """Args: images. Returns scores."""
    x, he = images.astype(self.dtype), nn.initializers.he_normal()
    for width in (24, 48, 96, 128):
      x = nn.relu(Conv(width, 3, 2, 1, kernel_init=he, dtype=self.dtype)(x))
    return nn.Dense(1, bias_init=nn.initializers.constant(0.5), dtype=self.dtype)(x.mean((1, 2)))[:, 0]


class PooledBackbone(nn.Module):
  """MANIQA's vision transformer, the mean over patches, and a linear score. Attributes as in `maniqa.MANIQA`."""

  width: int
  num_heads: int
  patch_size: int
  mlp_ratio: float
  taps: Sequence[int]
  dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, images: Float[Array, "b s s 3"], *, train: bool = False) -> Float[Array, " b"]:
    """Args: images. Returns scores."""
    sizes = self.width, self.num_heads, self.patch_size, self.mlp_ratio, self.taps
    x = maniqa.Backbone(*sizes, dtype=self.dtype, name="backbone")(images.astype(self.dtype))
    return nn.Dense(1, bias_init=nn.initializers.constant(0.5), dtype=self.dtype)(x.mean(1))[:, 0]


def network(config: Config, name: str) -> nn.Module:
  """A model of crops."""
  if name == "convolutions":
    return Convolutions(config.dtype)
  options: dict[str, Any] = {"dtype": config.dtype}
  if config.preset == "demo":
    options |= {"image_size": config.size, "width": 48, "num_heads": 4, "taps": (0, 1), "mlp_width": 48, "window": 3}
    options |= {"num_tab": 1, "depths": (2,), "stage_heads": (4,), "dropout": 0.0, "drop_path": 0.0}
  whole = maniqa.base(**options)
  if name == "pooled backbone":
    sizes = whole.width, whole.num_heads, whole.patch_size, whole.mlp_ratio, whole.taps
    return PooledBackbone(*sizes, dtype=config.dtype)
  return whole


def schedule(config: Config, peak: float) -> optax.Schedule:
  """The paper's cosine falls and rises again, 50 steps each; the demo's falls once, after a warm-up."""
  if config.preset == "paper":
    return lambda step: 0.5 * peak * (1 + jnp.cos(jnp.pi * step / 50))
  return optax.warmup_cosine_decay_schedule(0.0, peak, min(100, config.steps // 10), config.steps)


def whitening(patches: Float[np.ndarray, "n d"], width: int, seed: int) -> dict[str, np.ndarray]:
  """A dense layer whose outputs are random directions of the patches with all frequencies of equal power.

  Photographs have hardly any power where noise and blur are told apart, so that training from a random layer lingers.
  """
  mean = patches.mean(0)
  value, vector = np.linalg.eigh(np.cov(patches.T))
  directions = np.random.default_rng(seed).standard_normal((patches.shape[1], width)) / np.sqrt(patches.shape[1])
  kernel = vector / np.sqrt(value + 1e-3) @ directions
  return {"kernel": kernel.astype(np.float32), "bias": (-mean @ kernel).astype(np.float32)}


def learner(config: Config, model: nn.Module, rate: float, embedding: Any = None) -> train.Learner:
  """Mean squared error, Adam; `embedding` replaces the start of the patch embedding."""

  def loss(scores: Float[Array, " b"], batch: train.Batch) -> tuple[Float[Array, ""], train.Metrics]:
    return jnp.mean((scores.astype(jnp.float32) - batch["quality"]) ** 2), {}

  if config.preset == "paper":
    tx = optax.chain(optax.add_decayed_weights(config.weight_decay), optax.adam(schedule(config, rate)))
  else:
    adamw = optax.adamw(schedule(config, rate), weight_decay=config.weight_decay, mask=train.decay_mask)
    tx = optax.chain(optax.clip_by_global_norm(1.0), adamw)
  made = train.supervised(model, loss, tx)
  if isinstance(model, Convolutions):
    return made
  start = {} if embedding is None else {"patch_embed": embedding}
  if config.backbone is not None:
    start = maniqa.backbone_from_timm(interop.load(config.backbone))

  def init(key: Array, batch: train.Batch) -> train.TrainState:
    state = made.init(key, batch)
    backbone = {**state.params["backbone"], **jax.tree.map(jnp.asarray, start)}
    return state.replace(params={**state.params, "backbone": backbone})

  return made._replace(init=init)


def chosen_kinds(config: Config) -> tuple[str, ...] | None:
  """Distortions in the data; None for all."""
  return FOUR if config.distortions == "four" else None


def street_scenes(config: Config) -> list[photographs.Graded]:
  """Distorted frames of CamVid, evenly spaced, at each of the training sides that they reach."""
  made: list[photographs.Graded] = []
  if config.frames == 0:
    return made
  for side in sorted({min(side, _FRAME_SIDE) for side in config.train_sides}):
    image = camvid.load("train", (side, side * 4 // 3)).image
    checks.count("frames", config.frames, 1, len(image))
    chosen = np.linspace(0, len(image) - 1, config.frames).round().astype(int)
    pictures = {len(photographs.CONTENTS) + int(i): image[i] for i in chosen}
    made.append(photographs.graded_pictures(pictures, distortions=chosen_kinds(config)))
  return made


def normalised(image: np.ndarray) -> Float[np.ndarray, "... 3"]:
  """Bytes to [-1, 1]."""
  return (image.astype(np.float32) / 255 - 0.5) / 0.5


def correlations(predicted: np.ndarray, quality: np.ndarray) -> tuple[float, float]:
  """SRCC and PLCC; 0 where all predictions are equal."""
  if np.ptp(predicted) == 0:
    return 0.0, 0.0
  return tuple(
    float(f(predicted, quality).statistic) for f in (scipy.stats.spearmanr, scipy.stats.pearsonr)
  )  # fmt: skip


def fitted(config: Config, name: str, rate: float, seed: int, data: list[photographs.Graded]) -> Any:
  """Trains on all pictures of the data; the jitted function from crops to scores."""
  pictures, quality = [image for part in data for image in part.image], np.concatenate([part.quality for part in data])
  model = network(config, name)

  def batch(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((seed, step))
    chosen = rng.choice(len(pictures), config.batch_size)
    crops = []
    for image in (pictures[i] for i in chosen):
      top, left = (rng.integers(0, n - config.size + 1) for n in image.shape[:2])
      crop = image[top : top + config.size, left : left + config.size]
      if config.preset == "paper":
        crops.append(crop[::-1] if rng.random() < config.flip else crop)
      else:  # nine contents only: turned, mirrored, and with their colours exchanged
        crop = np.rot90(crop, rng.integers(4))[..., rng.permutation(3)]
        crops.append(crop[:, ::-1] if rng.random() < config.flip else crop)
    return {"image": normalised(np.stack(crops)), "quality": quality[chosen].astype(np.float32)}

  embedding = None
  if not isinstance(model, Convolutions) and config.preset == "demo":
    side = model.patch_size
    many = np.concatenate([batch(config.steps + i)["image"] for i in range(20)])
    patches = many.reshape(len(many), config.size // side, side, config.size // side, side, 3).swapaxes(2, 3)
    embedding = whitening(patches.reshape(-1, side * side * 3), model.width, seed)

  kept = train.result.settings(
    config, without=("workdir", "seeds", "learning_rates", "crops"), network=name, rate=rate, seed=seed
  )
  state = train.fit(
    learner(config, model, rate, embedding),
    batch,
    steps=config.steps,
    workdir=config.workdir / folder(config) / name.replace(" ", "_") / f"rate{rate:g}" / f"seed{seed}",
    key=jax.random.key(seed),
    config=kept,
    mesh=train.mesh() if jax.device_count() > 1 else None,
    save_every=max(config.steps // 10, 50),
    tensorboard=False,
  )
  return jax.jit(functools.partial(model.apply, jax.device_get(state.variables)))


def predict(config: Config, score: Any, images: list[np.ndarray]) -> Float[np.ndarray, " n"]:
  """Scores of pictures."""
  keys = jax.random.split(jax.random.key(0), len(images))
  one = functools.partial(maniqa.ensemble_score, score, size=config.size, count=config.crops)
  return np.array([float(one(jnp.asarray(normalised(image)), key)) for image, key in zip(images, keys, strict=True)])


@functools.cache
def _shapes() -> tuple[Float[np.ndarray, " s"], Float[np.ndarray, " s"]]:
  shape = np.arange(0.2, 10, 0.01)
  gamma = scipy.special.gamma
  return shape, gamma(2 / shape) ** 2 / (gamma(1 / shape) * gamma(3 / shape))


def generalised_gaussian(x: np.ndarray) -> list[float]:
  """Shape, mean and the two scales of an asymmetric generalised Gaussian, by moments."""
  left, right = (np.sqrt(np.mean(side**2)) if side.size else 1e-3 for side in (x[x < 0], x[x > 0]))
  left, right = max(left, 1e-3), max(right, 1e-3)
  ratio = left / right
  moment = np.mean(np.abs(x)) ** 2 / max(np.mean(x**2), 1e-12)
  moment *= (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
  shapes, moments = _shapes()
  shape = shapes[np.argmin(np.abs(moments - moment))]
  log_gamma = scipy.special.gammaln
  mean = (right - left) * np.exp(log_gamma(2 / shape) - (log_gamma(1 / shape) + log_gamma(3 / shape)) / 2)
  return [float(shape), float(mean), float(left), float(right)]


def statistics(image: np.ndarray) -> Float[np.ndarray, " 36"]:
  """Mittal et al.'s features: luminance, locally normalised, and products of neighbours, at two scales."""
  y = image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
  features: list[float] = []
  for _ in range(2):
    blur = functools.partial(scipy.ndimage.gaussian_filter, sigma=7 / 6, truncate=2.6)
    mean = blur(y)
    z = (y - mean) / (np.sqrt(np.maximum(blur(y * y) - mean**2, 0)) + 1)
    shape, _, left, right = generalised_gaussian(z)
    features += [shape, (left**2 + right**2) / 2]
    for down, along in ((0, 1), (1, 0), (1, 1), (1, -1)):
      features += generalised_gaussian(z * np.roll(z, (down, along), (0, 1)))
    y = scipy.ndimage.zoom(y, 0.5, order=1)
  return np.array(features)


def hand_made(features: np.ndarray, quality: np.ndarray, rows: dict[str, np.ndarray]) -> np.ndarray:
  """A support vector machine on `statistics`, its C chosen on the validation contents; scores of the test rows."""
  best = (-2.0, np.zeros(0))
  for c in (0.1, 1.0, 10.0, 100.0):
    machine = sklearn.pipeline.make_pipeline(sklearn.preprocessing.StandardScaler(), sklearn.svm.SVR(C=c))
    machine.fit(features[rows["train"]], quality[rows["train"]])
    value = correlations(machine.predict(features[rows["val"]]), quality[rows["val"]])[0]
    best = max(best, (value, machine.predict(features[rows["test"]])), key=lambda pair: pair[0])
  return best[1]


def full_reference(data: photographs.Graded, rows: np.ndarray) -> dict[str, np.ndarray]:
  """PSNR in dB, and SSIM."""
  pairs = [(data.reference[i], data.image[i]) for i in rows]
  error = np.array([np.mean((a.astype(np.float64) - b) ** 2) for a, b in pairs])
  ssim = [skimage.metrics.structural_similarity(a, b, channel_axis=-1) for a, b in pairs]
  return {"PSNR": 10 * np.log10(255**2 / np.maximum(error, 1e-6)), "SSIM": np.array(ssim)}


def folder(config: Config) -> str:
  """Of the runs of these settings."""
  return f"{config.preset}-{config.distortions}-{config.size}-{config.steps}-{config.frames}"


def draw(config: Config, data: photographs.Graded, rows: np.ndarray, scores: dict[str, np.ndarray]) -> pathlib.Path:
  """Of the first seed: predicted against true, SRCC of each distortion, and pictures with their scores."""
  figure, axes = figures.subplots(1, 3, width=5, height=4.2)
  kind, quality = data.distortion[rows], data.quality[rows]
  kinds = np.unique(kind)
  names = [list(photographs.DISTORTIONS)[k] for k in kinds]
  jitter = np.random.default_rng(0).uniform(-0.04, 0.04, len(rows))
  groups = {
    "blur": (0, 1, 2), "noise": (3, 4, 5, 6), "coding": (7, 8), "colour": (9, 10, 11), "light": (12, 13, 14),
    "place": (15, 16, 18), "sharpening": (17,),
  }  # fmt: skip
  for group, members in groups.items():
    if (at := np.isin(kind, members)).any():
      axes[0, 0].scatter(quality[at] + jitter[at], scores["MANIQA"][at], s=6, label=group)
  axes[0, 0].plot((0, 1), (0, 1), color="grey", linewidth=1)
  axes[0, 0].set(xlabel="true quality (level)", ylabel="MANIQA's score", title="test pictures")
  axes[0, 0].legend(fontsize=7)
  shown = [name for name in (*NETWORKS, "PSNR") if name in scores]
  for j, name in enumerate(shown):
    each = [correlations(scores[name][kind == k], quality[kind == k])[0] for k in kinds]
    axes[0, 1].barh(np.arange(len(names)) + 0.2 * j, each, 0.2, label=name)
  axes[0, 1].set(yticks=np.arange(len(names)) + 0.3, yticklabels=names, xlabel="SRCC within the distortion")
  axes[0, 1].invert_yaxis()
  axes[0, 1].legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=4, frameon=False)
  content = data.content[rows[0]]
  tiles, texts = [], []
  for k in np.linspace(0, len(names) - 1, 4).round().astype(int):
    for level in (1, 3, 5):
      i = int(np.flatnonzero((kind == kinds[k]) & (data.level[rows] == level) & (data.content[rows] == content))[0])
      image = data.image[rows[i]]
      tiles.append(image[: config.side, : config.side])
      texts.append(f"{names[k]} {level}: {scores['MANIQA'][i]:.2f} ({quality[i]:.1f})")
  grid = [np.concatenate(tiles[3 * r : 3 * r + 3], 1) for r in range(4)]
  axes[0, 2].imshow(np.concatenate(grid))
  for n, text in enumerate(texts):
    place = (n % 3 * config.side + 4, n // 3 * config.side + 6)
    axes[0, 2].text(*place, text, fontsize=4, va="top", bbox={"facecolor": "white", "pad": 1, "linewidth": 0})
  axes[0, 2].set_axis_off()
  axes[0, 2].set_title("score (truth)", fontsize=9)
  return figures.save(figure, config.workdir / folder(config) / "scores.png")


def main(config: Config) -> None:
  """Trains, tests and reports."""
  began = time.monotonic()
  checks.count("seeds", config.seeds)
  checks.count("steps", config.steps, 10)
  checks.count("frames", config.frames, 0)
  sides = (config.side, *config.train_sides, *([_FRAME_SIDE] if config.frames else []))
  checks.count("size", config.size, 16, min(sides))
  window = 8 * (3 if config.preset == "demo" else 4)
  if config.size % 8 or config.size % min(window, config.size):
    raise ValueError(f"size: got {config.size}, expected a multiple of {window}, the pixels of a window")
  if config.backbone is not None and config.preset == "demo":
    raise ValueError(f"backbone: got {config.backbone}, expected none for the demo's small network")
  if not config.learning_rates:
    raise ValueError("learning_rates: got none, expected at least one")
  if finished := train.result.finished_result(config.workdir / folder(config), config):
    return train.result.print_metrics(finished)
  distorted = functools.partial(photographs.graded, distortions=chosen_kinds(config))
  data = distorted(photographs.CONTENTS, config.side)
  streets = street_scenes(config)
  described = [data, *streets[-1:]]  # what the statistics learn from, too
  features = np.stack([statistics(image) for part in described for image in part.image])
  quality = np.concatenate([part.quality for part in described])
  frames = np.arange(len(data.image), len(features))
  names = NETWORKS if config.preset == "demo" else NETWORKS[:1]
  chosen: dict[str, float] = {}
  found: dict[str, list[tuple[float, float]]] = {}
  picture = None
  for seed in range(config.seeds):
    parts = photographs.split(seed=seed)._asdict()
    rows = {
      part: np.flatnonzero(np.isin(data.content, [photographs.CONTENTS.index(name) for name in contents]))
      for part, contents in parts.items()
    }
    training = [distorted(parts["train"], side) for side in config.train_sides] + streets
    scores: dict[str, np.ndarray] = {}

    def report(name: str, values: np.ndarray, rows: Any = rows, seed: int = seed, scores: Any = scores) -> None:
      scores[name] = values
      found.setdefault(name, []).append(correlations(values, data.quality[rows["test"]]))
      rich.print(f"seed {seed}, {name}: SRCC {found[name][-1][0]:.3f}, PLCC {found[name][-1][1]:.3f}")

    for name in names:
      models = {
        rate: fitted(config, name, rate, seed, training)
        for rate in (config.learning_rates if name not in chosen else (chosen[name],))
      }
      if len(models) == 1:
        chosen[name] = next(iter(models))
      else:
        pictures = [data.image[i] for i in rows["val"]]
        value = {
          rate: correlations(predict(config, score, pictures), data.quality[rows["val"]])[0]
          for rate, score in models.items()
        }
        chosen[name] = max(value, key=value.__getitem__)
        rich.print(f"{name}: SRCC on validation contents by rate {value}")
      report(name, predict(config, models[chosen[name]], [data.image[i] for i in rows["test"]]))
    report("statistics", hand_made(features, quality, rows | {"train": np.append(rows["train"], frames)}))
    for name, values in full_reference(data, rows["test"]).items():
      report(name, values)
    picture = picture or draw(config, data, rows["test"], scores)
  metrics = {
    f"{name}, {kind}": [pair[i] for pair in pairs]
    for name, pairs in found.items()
    for i, kind in enumerate(("SRCC", "PLCC"))
  }
  mean = {name: float(np.mean([pair[0] for pair in pairs])) for name, pairs in found.items()}
  others = ", ".join(f"{name} {value:.3f}" for name, value in mean.items() if name != "MANIQA")
  path = train.write_result(
    config.workdir / folder(config),
    system="maniqa",
    claim=f"SRCC of MANIQA on contents it has not seen: {mean['MANIQA']:.3f}; {others}.",
    dataset=f"{len(data.image)} graded distortions of {len(photographs.CONTENTS)} photographs, split by content"
    + f"; {config.frames} frames of CamVid to train on besides" * (config.frames > 0),
    config=config,
    metrics=metrics,
    published={},
    seed=list(range(config.seeds)),
    wall_time=time.monotonic() - began,
  )
  train.result.print_metrics(train.result.finished_result(config.workdir / folder(config), config))
  rich.print(f"{path}\n{picture}")


if __name__ == "__main__":
  main(parse())
