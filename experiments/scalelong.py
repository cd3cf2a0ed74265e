"""ScaleLong on small images: how steadily a deep U-ViT trains with and without multipliers on its long skips.

    python experiments/scalelong.py                      # digits of 8x8 pixels, a network of 0.4M parameters
    python experiments/scalelong.py --preset samples     # one longer run, whose samples look like digits
    python experiments/scalelong.py --preset mnist       # the same with 28x28 pixels
    python experiments/scalelong.py --preset paper       # U-ViT-S/2 on CIFAR-10, on a host with GPUs

Every scaling sees the same batches and initial weights of blocks, and gets the same learning rates to choose from; the
best is chosen by the loss on validation images and reported on test images. The loss is the squared error of predicted
noise, at fixed noise and times, of the averaged weights. Steadiness is measured on the last weights: the output of the
middle block has a root mean square that is recorded every few steps, and reported is the standard deviation of its
logarithm's change from one record to the next, over the second half of training, in percent.

The preset "paper" has the published network, optimizer, steps and samples. Not as published: 1,000 of the 50,000
training images are held out for validation; bfloat16 stands for float16; the Fréchet distance is of principal
components of pixels and from the test images, not of Inception's features and from the training images.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import scipy.linalg
import sklearn.decomposition

from jaxlab import train
from jaxlab.data import digits, images, mnist5k
from jaxlab.models import scalelong
from jaxlab.nn import diffusion
from jaxlab.nn.diffusion import VariancePreserving
from jaxlab.train import command, figures
from jaxlab.train import diffusion as training

PROCESS = VariancePreserving()
RECORD = 5  # steps between two records of the middle feature
FEATURES = 64  # principal components in which samples are compared with images


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  preset: Literal["demo", "samples", "mnist", "paper"] = "demo"
  """demo: the comparison on digits; samples: one longer run, to draw from; mnist: the same on 28x28 pixels; paper:
  U-ViT-S/2 as published."""
  dataset: Literal["digits", "mnist5k", "cifar10"] = "digits"
  """cifar10 is read from TFDS_DATA_DIR: 10,000 images, or all with the preset "paper"."""
  scalings: tuple[scalelong.Scaling, ...] = ("none", "inv_sqrt2", "constant", "learned")
  """Kinds to compare."""
  kappa: float = 0.7
  """Of "constant"."""
  width: int = 48
  """Channels of a token."""
  depth: int = 12
  """Blocks besides the middle one."""
  heads: int = 2
  """Of attention."""
  rates: tuple[float, ...] = (2e-3, 8e-3)
  """Learning rates to choose from, after the warm-up."""
  steps: int = 300
  """Updates of a run."""
  warmup: int = 30
  """Steps in which the rate grows linearly."""
  batch_size: int = 32
  """Images a step; no more than there are for validation."""
  ema_decay: float = 0.99
  """Of the averaged weights."""
  seeds: int = 3
  """Independent runs at each rate: weights, noise, order."""
  sampled: tuple[scalelong.Scaling, ...] = ()
  """Kinds to draw samples from, with the weights of the first seed at the best rate."""
  samples: int = 200
  """To draw of each."""
  sample_steps: int = 200
  """Of the Euler-Maruyama sampler; DPM-Solver takes a tenth."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Of the computation."""
  workdir: pathlib.Path = pathlib.Path("runs/scalelong")
  """Each run has its folder in here and resumes from it."""


PRESETS = {
  "demo": Config(),
  "samples": Config(
    "samples", scalings=("constant",), depth=4, rates=(2e-3,), steps=6000, warmup=100, ema_decay=0.998, seeds=1,
    sampled=("constant",),
  ),
  "mnist": Config(
    "mnist", "mnist5k", ("constant",), width=96, depth=6, heads=4, rates=(1e-3,), steps=1500, warmup=100,
    ema_decay=0.995, seeds=1, sampled=("constant",),
  ),
  "paper": Config(
    "paper", "cifar10", ("none", "learned"), width=512, heads=8, rates=(2e-4,), steps=500_000, warmup=2500,
    batch_size=128, ema_decay=0.9999, seeds=1, sampled=("none", "learned"), samples=50_000, sample_steps=1000,
    dtype="bfloat16",
  ),
}  # fmt: skip
parse = command.parser(PRESETS, __doc__)


@dataclasses.dataclass(frozen=True)
class Task:
  """Images in [-1, 1] and what a network for them looks like."""

  train: np.ndarray
  val: np.ndarray
  test: np.ndarray
  patch: int
  flip: bool


def load(config: Config) -> Task:
  """The data."""
  if config.dataset == "cifar10":
    whole = config.preset == "paper"
    names = ("train[:49000]" if whole else "train[:10000]", "train[49000:]", "test" if whole else "test[:1000]")
    parts = [images.as_arrays("cifar10", name)["image"] / np.float32(127.5) - 1 for name in names]
    return Task(*parts, patch=2 if whole else 4, flip=True)
  splits = digits.images() if config.dataset == "digits" else mnist5k.images()
  parts = [2 * part["image"] - 1 for part in splits]
  return Task(*parts, patch=2 if config.dataset == "digits" else 4, flip=False)


def network(config: Config, task: Task, scaling: scalelong.Scaling) -> scalelong.UViT:
  """A U-ViT."""
  _, side, _, channels = task.train.shape
  return scalelong.UViT(
    side, task.patch, channels, config.width, config.depth, config.heads,
    scaling=scaling, kappa=config.kappa, dtype=config.dtype,
  )  # fmt: skip


def learner(config: Config, model: scalelong.UViT) -> train.Learner:
  """AdamW as published. The rate is part of the state, set from the batch that initialises it, so that runs with
  different rates share a program. Evaluation also measures the middle block's output under the last weights."""
  tx = optax.chain(
    optax.adamw(optax.linear_schedule(0, 1, config.warmup), 0.99, 0.999, weight_decay=0.03),
    optax.inject_hyperparams(optax.scale)(step_size=1.0),
  )
  base = training.learner(model, PROCESS, tx, time_scale=scalelong.TIME_SCALE, ema_decay=config.ema_decay)

  def init(key: Any, batch: Any) -> train.TrainState:
    state = base.init(key, batch)
    return state.replace(opt_state=optax.tree_utils.tree_set(state.opt_state, step_size=batch["rate"][0]))

  def evaluate(state: train.TrainState, batch: Any) -> train.Metrics:
    x0 = batch["image"]
    t = (jnp.arange(len(x0)) + 0.5) / len(x0)
    noisy = PROCESS.noised(x0, jax.random.normal(jax.random.key(0), x0.shape), t)
    _, kept = model.apply(
      training.variables(state, averaged=False),
      noisy,
      scalelong.TIME_SCALE * t,
      capture_intermediates=lambda module, _: module.name == "mid_block",
    )
    middle = kept["intermediates"]["mid_block"]["__call__"][0].astype(jnp.float32)
    return {**base.evaluate(state, batch), "middle": jnp.sqrt(jnp.mean(middle**2))}

  return train.Learner(jax.jit(init), jax.jit(base.step, donate_argnums=0), jax.jit(evaluate))


def batches(config: Config, task: Task, rate: float, seed: int) -> Callable[[int], dict[str, np.ndarray]]:
  """The images of each step, which depend on the seed alone, and the rate."""

  def batch(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((seed, step))
    image = task.train[rng.choice(len(task.train), config.batch_size, replace=False)]
    if task.flip:
      flipped = rng.random(len(image)) < 0.5
      image = np.where(flipped[:, None, None, None], image[:, :, ::-1], image)
    return {"image": image, "rate": np.full(config.batch_size, rate, np.float32)}

  return batch


@dataclasses.dataclass
class Runs:
  """What the runs of one scaling left, an entry [rates, seeds] each: losses of the averaged weights, in the units of
  the noise's variance; the middle feature [records, rates, seeds] after some steps; the first seed's last states."""

  val: np.ndarray
  test: np.ndarray
  steps: np.ndarray
  middle: np.ndarray
  states: list[Any]

  @property
  def unsteadiness(self) -> np.ndarray:
    """Standard deviation of the change of log(middle) between records, second half, in percent."""
    half = self.steps > self.steps[-1] / 2
    return 100 * np.std(np.diff(np.log(self.middle[half]), axis=0), axis=0)

  @property
  def best(self) -> int:
    """Which rate has the lowest loss on validation images, in the mean over seeds."""
    return int(self.val.mean(1).argmin())


def run(config: Config, task: Task, made: train.Learner, name: str) -> Runs:
  """Trains one scaling at every rate with every seed."""
  size = config.batch_size
  kept = train.result.settings(
    config, without=("workdir", "scalings", "rates", "seeds", "sampled", "samples", "sample_steps"), run=name
  )

  def loss(state: Any, part: np.ndarray) -> float:
    starts = range(0, min(len(part) - size, 7 * size) + 1, size)  # chunks as the probe, so that one program serves both
    return float(np.mean([made.evaluate(state, {"image": part[i : i + size]})["loss"] for i in starts]))

  val, test = np.zeros((2, len(config.rates), config.seeds))
  middle, states = [], []
  for i, rate in enumerate(config.rates):
    for seed in range(config.seeds):
      folder = config.workdir / config.preset / config.dataset / name / f"rate{rate:g}" / f"seed{seed}"
      state = train.fit(
        made,
        batches(config, task, rate, seed),
        steps=config.steps,
        workdir=folder,
        key=jax.random.key(seed),
        evaluate_on={"image": task.val[:size]},
        evaluate_every=max(RECORD, config.steps // 100),
        save_every=max(config.steps // 3, 1),
        keep=1,
        config=kept | {"rate": rate, "seed": seed},
        mesh=train.mesh() if jax.device_count() > 1 else None,
        tensorboard=False,
      )
      steps, values = train.read_metrics(folder)["eval_middle"]
      middle.append(values)
      val[i, seed], test[i, seed] = loss(state, task.val), loss(state, task.test)
      if seed == 0:
        states.append(state)
  return Runs(val, test, steps, np.stack(middle, 1).reshape(len(steps), *val.shape), states)


def draw_samples(
  config: Config, apply: Callable[..., Any], variables: Any, shape: Sequence[int]
) -> dict[str, np.ndarray]:
  """Images by each sampler, from the same noise.

  Args:
    config: how many, in how many steps.
    apply: of the network.
    variables: its weights.
    shape: of an image.
  """
  tenth = max(config.sample_steps // 10, 2)
  samplers: dict[str, tuple[np.ndarray, Callable[..., Any]]] = {
    f"Euler-Maruyama, {config.sample_steps} steps": (
      diffusion.times(PROCESS, config.sample_steps),
      diffusion.euler_maruyama,
    ),
    f"DDIM, {tenth} steps": (diffusion.times(PROCESS, tenth), lambda *a: diffusion.ddim(*a[:-1])),
    f"DPM-Solver++, {tenth} steps": (
      diffusion.times(PROCESS, tenth, spacing="log_snr"),
      lambda *a: diffusion.dpm_solver(*a[:-1]),
    ),
  }
  size = min(100, config.samples)

  @functools.partial(jax.jit, static_argnames="name")
  def draw(variables: Any, key: Any, name: str) -> Any:
    noise_key, key = jax.random.split(key)
    grid, sampler = samplers[name]
    denoise = diffusion.denoiser(lambda x, t: apply(variables, x, t), PROCESS, time_scale=scalelong.TIME_SCALE)
    return sampler(denoise, PROCESS, jax.random.normal(noise_key, (size, *shape)), grid, key)

  made = {}
  for name in samplers:
    keys = jax.random.split(jax.random.key(7), -(-config.samples // size))
    drawn = np.concatenate([np.asarray(draw(variables, key, name)) for key in keys])
    made[name] = np.clip(drawn[: config.samples], -1, 1)
  return made


def frechet(a: np.ndarray, b: np.ndarray, reference: np.ndarray) -> float:
  """Fréchet distance of two sets of images, in the first principal components of the reference."""
  flat = lambda x: x.reshape(len(x), -1)
  pca = sklearn.decomposition.PCA(min(FEATURES, flat(reference).shape[1]), random_state=0).fit(flat(reference))
  a, b = pca.transform(flat(a)), pca.transform(flat(b))
  covariances = [np.cov(x.T) for x in (a, b)]
  root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
  return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root))


def norm_law(config: Config, draws: int = 100) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Kind -> (measured, predicted) |f_i|^2 / |x|^2 of every level of random toy networks as deep as the U-ViT."""
  depth, width = config.depth // 2, 128

  @jax.jit
  def measure(scales: Any) -> Any:
    def one(key: Any) -> Any:
      weights, data = jax.random.split(key)
      x = jax.random.normal(data, (width,))
      levels = scalelong.toy_unet(scalelong.init_toy_unet(weights, depth, width), x, scales)
      return jnp.sum(levels**2, -1) / jnp.sum(x**2)

    return jax.lax.map(one, jax.random.split(jax.random.key(0), draws)).mean(0)

  law = {}
  for kind in config.scalings:
    if not kind.startswith("learned"):
      scales = np.array(scalelong.multipliers(kind, depth, config.kappa), np.float32)
      law[kind] = np.asarray(measure(scales)), np.asarray(scalelong.skip_norm_prediction(scales))
  return law


def draw_comparison(
  config: Config, runs: Mapping[str, Runs], law: Mapping[str, tuple[np.ndarray, np.ndarray]], path: pathlib.Path
) -> pathlib.Path:
  """Loss over rates; the middle feature at the highest rate; the law."""
  figure, axes = figures.subplots(1, 3, width=4)
  for i, (kind, some) in enumerate(runs.items()):
    color = figures.COLORS[i]
    shift = 1 + 0.04 * (i - len(runs) / 2)
    rates = np.array(config.rates) * shift
    axes[0, 0].errorbar(rates, some.val.mean(1), some.val.std(1), marker="o", label=kind, color=color)
    axes[0, 1].plot(some.steps, some.middle[:, -1], color=color, linewidth=0.8)
    axes[0, 1].plot([], color=color, label=kind)
    if kind in law:
      measured, predicted = law[kind]
      axes[0, 2].plot(predicted, color=color, label=f"{kind}: law")
      axes[0, 2].plot(measured, "o", color=color)
  axes[0, 0].set(xscale="log", xlabel="learning rate", ylabel="loss, validation images", title="Loss")
  axes[0, 1].set(
    xlabel="step", yscale="log", ylabel="root mean square", title=f"Middle feature, rate {config.rates[-1]:g}"
  )
  axes[0, 2].set(xlabel="level (0 is the output)", ylabel="|f|² / |x|²", title="Random networks: law and mean")
  for ax in axes[0]:
    ax.legend(fontsize=7)
  return figures.save(figure, path)


def draw_grid(rows: Mapping[str, np.ndarray], path: pathlib.Path, per_row: int = 16) -> pathlib.Path:
  """Two lines of images a row."""
  figure, axes = figures.subplots(len(rows), 1, width=8, height=1.25)
  for ax, (name, pictures) in zip(axes[:, 0], rows.items(), strict=True):
    pictures = np.pad((pictures[: 2 * per_row] + 1) / 2, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=1)
    lines = [
      np.concatenate(list(pictures[i * per_row : (i + 1) * per_row]), 1) for i in (0, 1) if len(pictures) > i * per_row
    ]
    whole = np.concatenate([line for line in lines if line.shape == lines[0].shape])
    ax.imshow(whole if whole.shape[-1] == 3 else whole[..., 0], cmap="gray", vmin=0, vmax=1)
    ax.set_title(name, fontsize=8)
    ax.set_axis_off()
  return figures.save(figure, path)


def check(config: Config, task: Task) -> None:
  """Raises a ValueError on settings that contradict each other or the data."""
  if config.seeds < 1:
    raise ValueError(f"seeds: got {config.seeds}, expected at least 1")
  if not config.scalings or not set(config.sampled) <= set(config.scalings):
    raise ValueError(f"sampled: got {config.sampled}, expected some of scalings, {config.scalings}")
  if not config.rates or list(config.rates) != sorted(config.rates) or config.rates[0] <= 0:
    raise ValueError(f"rates: got {config.rates}, expected rising numbers above 0")
  if config.warmup < 1:
    raise ValueError(f"warmup: got {config.warmup}, expected at least 1")
  if config.steps <= config.warmup or config.steps < 4 * RECORD:
    raise ValueError(f"steps: got {config.steps}, expected more than warmup, {config.warmup}, and {4 * RECORD - 1}")
  most = min(map(len, (task.train, task.val, task.test)))  # losses are means over whole batches
  if not 1 <= config.batch_size <= most:
    raise ValueError(f"batch_size: got {config.batch_size}, expected at least 1 and at most {most}, the smallest split")


def main(config: Config) -> None:
  """Trains, samples and reports."""
  began = time.monotonic()
  folder = config.workdir / config.preset / config.dataset
  if finished := train.result.finished_result(folder, config):
    train.result.print_metrics(finished)
    return
  task = load(config)
  check(config, task)
  runs: dict[str, Runs] = {}
  metrics: dict[str, Any] = {}
  for kind in config.scalings:
    some = runs[kind] = run(config, task, learner(config, network(config, task, kind)), kind)
    metrics[f"{kind}: test loss at its best rate"] = some.test[some.best]
    metrics[f"{kind}: best rate"] = config.rates[some.best]
    for rate, test, unsteady in zip(config.rates, some.test, some.unsteadiness, strict=True):
      metrics[f"{kind}: test loss at rate {rate:g}"] = test
      metrics[f"{kind}: unsteadiness at rate {rate:g} (%)"] = unsteady
    rich.print(
      f"{kind}: validation loss {some.val.mean(1).round(4)}, unsteadiness {some.unsteadiness.mean(1).round(2)}"
    )

  law = norm_law(config)
  for kind, (measured, predicted) in law.items():
    metrics[f"{kind}: measured over predicted |f|^2 of the toy network"] = float(measured[0] / predicted[0])

  unseen = task.test[: config.samples]
  rows = {"images": task.test}
  distances = {"images that it was trained on": frechet(task.train[: config.samples], unseen, task.train)}
  for kind in config.sampled:
    some = runs[kind]
    variables = training.variables(some.states[some.best])
    drawn = draw_samples(config, network(config, task, kind).apply, variables, task.train.shape[1:])
    for sampler, pictures in drawn.items():
      rows[f"{kind}: {sampler}"] = pictures
      distances[f"{kind}, {sampler}"] = frechet(pictures, unseen, task.train)
  metrics |= {f"Fréchet distance in {FEATURES} components, {name}": value for name, value in distances.items()}

  highest = config.rates[-1]
  words = [
    f"{kind} {some.test[some.best].mean():.4f} and {some.unsteadiness[-1].mean():.2f} %" for kind, some in runs.items()
  ]
  train.write_result(
    folder,
    system="scalelong",
    claim="Test loss at each scaling's best rate, and how much the middle feature changes between records at rate "
    f"{highest:g}: " + ", ".join(words) + ".",
    dataset={"digits": "digits of 8x8 pixels", "mnist5k": "MNIST (5k subset)"}.get(
      config.dataset, f"CIFAR-10, {len(task.train)} images"
    ),
    config=config,
    metrics=metrics,
    published={},
    seed=list(range(config.seeds)),
    wall_time=time.monotonic() - began,
  )
  train.result.print_metrics(train.result.finished_result(folder, config) or {})
  rich.print(draw_comparison(config, runs, law, folder / "comparison.png"))
  rich.print(draw_grid(rows, folder / "samples.png"))


if __name__ == "__main__":
  main(parse())
