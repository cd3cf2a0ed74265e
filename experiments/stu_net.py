"""STU-Net on a brain: grey and white matter in a part that training has not seen, beside a plain U-Net.

    python experiments/stu_net.py                         # 3.6M parameters, minutes on two cores
    python experiments/stu_net.py --study scaling         # widths 4, 8 and 16
    python experiments/stu_net.py --study transfer        # a trained network in a new task, beside one from scratch
    python experiments/stu_net.py --memory                # bytes a device for STU-Net-H on 8 devices: docs/sharding.md
    python experiments/stu_net.py --preset paper          # STU-Net-S at nnU-Net's settings, on a host with GPUs

Scans of the MNI152 brain (`jaxlab.data.brain`) have noise, a field of varying brightness and contrasts of their own, so
that no threshold on intensity does. All networks see the same patches in the same order, for as many steps and at
the same rates, but that a pretrained network may have a rate of its own in the new task. Patches to train on lie in the
back of the brain. Test scans are of all of it, seen by overlapping mirrored patches, without what is not connected to
the largest piece; the Dice coefficient of each tissue is over their front. (Scans of the front alone would be as thin
as a patch, with surroundings that training has not seen: instance normalisation makes tissue of the noise there.)

The preset "paper" has the published network, patches of 128^3, batches of 2, 1000 times 250 steps of SGD, rates and
loss. Not as published: the data are these scans, which are padded with zeros to the size of a patch, and not
TotalSegmentator, whose released weights took 4000 times 250 steps; the rate falls with each step, not with each 250;
patches are mirrored, but not rotated, scaled, blurred or changed in intensity; bfloat16 stands for float16; a new task
gets a fifth of the steps, not as many again.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import rich
import rich.table
import scipy.ndimage

from jaxlab import kernels, train
from jaxlab.data import brain
from jaxlab.models import stu_net
from jaxlab.nn.sliding_window import mirrored, sliding_window
from jaxlab.nn.volume import Conv3D, InstanceNorm
from jaxlab.train import command, figures

TEST_SCANS = 2
# Weights split over devices, activations recomputed, and the dtype of the computation, for --memory.
WAYS = ((False, False, "float32"), (True, False, "float32"), (True, True, "float32"), (True, True, "bfloat16"))


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  preset: Literal["demo", "paper"] = "demo"
  """demo: a narrow network on patches of 96 mm; paper: STU-Net-S, 250,000 steps of SGD on patches of 128 mm."""
  study: Literal["networks", "scaling", "transfer"] = "networks"
  """Networks: STU-Net and plain U-Net; scaling: STU-Net of three widths; transfer: pretrained or not."""
  width: int = 8
  """Channels of the first stage; twice and half as many under scaling."""
  side: int = 48
  """Of the patches, in voxels; even. Networks halve it as often as it goes, up to five times, but not to one voxel.
  Scans that are smaller get zeros around them."""
  spacing: int = 2
  """Millimetres between voxels, 1 or 2."""
  scans: int = 8
  """Of the training part."""
  noise: float = 0.1
  """Of a scan; the white matter's intensity is about 0.8."""
  steps: int = 300
  """Updates; a fifth of them in the new task of transfer."""
  batch_size: int = 2
  """Patches a step."""
  learning_rate: float = 2e-3
  """At first; falls to 0 by (1 - step / steps)^0.9."""
  transfer_rate: float = 2e-3
  """The same of a pretrained network in the new task of transfer."""
  optimizer: Literal["adam", "sgd"] = "adam"
  """Adam, which is quicker in few steps, or nnU-Net's SGD with Nesterov momentum 0.99 and weight decay 3e-5."""
  mirror: bool = True
  """Average predictions over the eight mirrored patches."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Of the computation."""
  seeds: int = 1
  """Independent runs: weights, scans, order."""
  memory: bool = False
  """Only compile STU-Net-H for eight devices and tell what each would hold; nothing is allocated."""
  variant: Literal["S", "B", "L", "H"] = "H"
  """Under memory, the network."""
  workdir: pathlib.Path = pathlib.Path("runs/stu_net")
  """Each run has its folder in here and resumes from it."""


PRESETS = {
  "demo": Config(),
  "paper": Config(
    "paper",
    width=16,
    side=128,
    spacing=1,
    steps=250_000,
    learning_rate=0.01,
    transfer_rate=1e-3,
    optimizer="sgd",
    dtype="bfloat16",
  ),
}
parse = command.parser(PRESETS, __doc__)


class PlainUNet(nn.Module):
  """What STU-Net starts from: two normalised convolutions a stage without a skip, and transposed convolutions upwards.

  Attributes as in `STUNet`.
  """

  num_classes: int
  widths: Sequence[int]
  dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> tuple[jax.Array, ...]:
    """Logits at all scales, the full one first."""

    def stage(x: jax.Array, width: int, name: str, stride: int = 1) -> jax.Array:
      for i, step in enumerate((stride, 1)):
        x = Conv3D(width, strides=(step,) * 3, dtype=self.dtype, name=f"{name}_conv{i}")(x)
        x = InstanceNorm(negative_slope=stu_net.SLOPE, dtype=self.dtype, name=f"{name}_norm{i}")(x)
      return x

    maps, outputs = [], []
    for k, width in enumerate(self.widths):
      x = stage(x, width, f"encoder{k}", 2 if k else 1)
      maps.append(x)
    for k in reversed(range(len(self.widths) - 1)):
      width, (b, d, h, w, _) = self.widths[k], x.shape
      eight = Conv3D(8 * width, 1, dtype=self.dtype, name=f"up{k}")(x).reshape(b, d, h, w, 2, 2, 2, width)
      up = eight.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, 2 * d, 2 * h, 2 * w, width)
      x = stage(jnp.concatenate([up, maps[k]], -1), width, f"decoder{k}")
      outputs.append(Conv3D(self.num_classes, 1, dtype=self.dtype, name=f"head{k}")(x))
    return tuple(outputs[::-1])


def halvings(side: int) -> int:
  """How often a network halves patches of this side, at most five times.

  Raises:
    ValueError: a side that is odd, or would leave a single voxel.
  """
  times = [k for k in range(1, 6) if side % 2**k == 0 and side // 2**k >= 2]
  if not times:
    raise ValueError(f"side: got {side}, expected an even number of at least 4")
  return times[-1]


def networks(config: Config) -> dict[str, Any]:
  """Name -> model, all with outputs at several scales. Raises a ValueError on a side that cannot be halved."""
  times = halvings(config.side)

  def stu(width: int, **changes: Any) -> stu_net.STUNet:
    shape = {"widths": stu_net.scaled_widths(width), "strides": stu_net.fit_strides([(2, 2, 2)] * times)}
    return stu_net.STUNet(**{"num_classes": 3, **shape, "deep_supervision": True, "dtype": config.dtype, **changes})

  if config.study == "scaling":
    return {f"width {w}": stu(w) for w in (config.width // 2, config.width, 2 * config.width)}
  if config.study == "transfer":
    return {"pretrained": stu(config.width), "new task": stu(config.width, num_classes=2, in_channels=2)}
  # As many parameters, within a few percent, come with two deepest stages of this width, by the number of halvings.
  deep = round(config.width * (18.5, 18.25, 18.0, 17.5, 15.75)[times - 1] / 4) * 4
  own = stu_net.scaled_widths(config.width)[: times - 1]
  return {"STU-Net": stu(config.width), "plain U-Net": PlainUNet(3, (*own, deep, deep), config.dtype)}


def parameters(model: Any, side: int, channels: int = 1) -> int:
  """How many."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, side, channels)))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def optimizer(config: Config, first: float, steps: int) -> optax.GradientTransformation:
  """As configured, with rates from `first` to 0, after clipping at nnU-Net's norm of 12."""
  rate = optax.polynomial_schedule(first, 0.0, 0.9, steps)
  clip = optax.clip_by_global_norm(12.0)
  if config.optimizer == "adam":
    return optax.chain(clip, optax.adamw(rate, weight_decay=3e-5))
  return optax.chain(clip, optax.add_decayed_weights(3e-5), optax.sgd(rate, 0.99, nesterov=True))


@functools.cache
def data(config: Config, seed: int) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray]:
  """Scans of the back to train on and of all to test on (then the same for the new task of transfer), and the classes
  of the back and of the front.
  """
  whole = brain.mni152(config.spacing)
  back, front = brain.split(whole)
  images = [
    brain.scans(back, config.scans, noise=config.noise, seed=2 * seed),
    brain.scans(whole, TEST_SCANS, noise=config.noise, seed=2 * seed + 1),
  ]
  if config.study == "transfer":  # another modality: bright and dark exchanged, and two scans of it as channels
    images.extend(-np.concatenate([i, np.roll(i, 1, axis=0)], -1) for i in images[:])
  return tuple(images), back.label, front.label


def dice(predicted: np.ndarray, label: np.ndarray, classes: int) -> list[float]:
  """In percent, of each class but the background, over all scans [N, X, Y, Z] of one brain."""
  return [
    100
    * 2
    * float(((predicted == c) & (label == c)).sum())
    / float((predicted == c).sum() + len(predicted) * (label == c).sum())
    for c in range(1, classes)
  ]


def largest_component(predicted: np.ndarray) -> np.ndarray:
  """Classes [N, X, Y, Z] of scans without what is not connected to the largest piece, as nnU-Net ends a prediction."""
  kept = np.zeros_like(predicted)
  for scan, whole in zip(kept, predicted, strict=True):
    pieces, _ = scipy.ndimage.label(whole > 0)
    largest = np.bincount(pieces[pieces > 0], minlength=2).argmax()
    scan[pieces == largest] = whole[pieces == largest]
  return kept


def front_of(scans: np.ndarray, label: np.ndarray) -> np.ndarray:
  """Of scans [N, X, Y, Z] of the brain as much as `label` has classes of."""
  return scans[:, :, -label.shape[1] :]


def thresholds(train_scans: np.ndarray, label: np.ndarray, test_scans: np.ndarray) -> np.ndarray:
  """Classes by the two intensities that separate the training scans best."""
  grid = np.quantile(train_scans, np.linspace(0.5, 0.995, 40))
  pairs = [(a, b) for a, b in itertools.product(grid, grid) if a < b]
  some = train_scans[:, ::2, ::2, ::2, 0]
  best = max(pairs, key=lambda p: sum(dice(np.digitize(some, p), label[::2, ::2, ::2], 3)))
  return np.digitize(test_scans[..., 0], best)


def padded(side: int, images: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Scans [N, X, Y, Z, C] and classes with zeros on both sides, up to the side of a patch, as `sliding_window` does."""
  missing = [max(side - n, 0) for n in label.shape]
  around = [(m // 2, m - m // 2) for m in missing]
  return np.pad(images, ((0, 0), *around, (0, 0))), np.pad(label, around)


def predict(config: Config, model: Any, variables: Any, images: np.ndarray) -> np.ndarray:
  """Classes of voxels, scan by scan."""
  probabilities = lambda x: jax.nn.softmax(model.apply(variables, x)[0].astype(jnp.float32))
  see = mirrored(probabilities) if config.mirror else probabilities
  call = jax.jit(lambda x: sliding_window(see, x, (config.side,) * 3).argmax(-1))
  return np.concatenate([np.asarray(call(image[None])) for image in images])


def fit(
  config: Config, name: str, model: Any, seed: int, images: np.ndarray, label: np.ndarray, *, start: Any = None
) -> Any:
  """Trained variables.

  Args:
    config: of the run.
    name: of the network, for its folder.
    model: the network.
    seed: of weights and patches.
    images: scans [N, X, Y, Z, C].
    label: their classes.
    start: variables to begin with, but for the heads; None for fresh ones.
  """
  new = name in ("fine-tuned", "from scratch")
  steps = max(config.steps // 5, 10) if new else config.steps
  rate = config.learning_rate if start is None else config.transfer_rate
  learner = train.supervised(model, stu_net.segmentation_loss(), optimizer(config, rate, steps))
  images, label = padded(config.side, images, label)
  if start is not None:
    fresh, step, evaluate, axis = learner

    def init(key: jax.Array, batch: Any) -> Any:
      state = fresh(key, batch)
      return state.replace(params=stu_net.transfer(start, state.variables)["params"])

    learner = train.Learner(init, step, evaluate, axis)

  def batch(step: int) -> dict[str, np.ndarray]:
    image, classes = brain.patches(images, label, config.side, config.batch_size, seed=(seed, step))
    return {"image": image, "label": classes}

  kept = train.result.settings(
    config, without=("workdir", "seeds", "memory", "variant", "mirror"), network=name, seed=seed
  )
  if start is None:
    kept.pop("transfer_rate")
  state = train.fit(
    learner,
    batch,
    steps=steps,
    workdir=config.workdir / folder(config) / name.replace(" ", "_") / f"seed{seed}",
    key=jax.random.key(seed),
    config=kept,
    mesh=train.mesh() if jax.device_count() > 1 else None,
    tensorboard=False,
  )
  return jax.device_get(state.variables)


def run(config: Config, seed: int) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
  """Dice of each class by network, and the classes that each sees in the first test scan."""
  images, train_label, test_label = data(config, seed)
  scores, seen, models = {}, {}, networks(config)
  tested = lambda predicted: front_of(largest_component(predicted), test_label)
  if config.study == "transfer":
    start = fit(config, "pretrained", models["pretrained"], seed, images[0], train_label)
    targets = (train_label == 2).astype(np.int32), (test_label == 2).astype(np.int32)
    for name, origin in (("fine-tuned", start), ("from scratch", None)):
      variables = fit(config, name, models["new task"], seed, images[2], targets[0], start=origin)
      seen[name] = tested(predict(config, models["new task"], variables, images[3]))
      scores[name] = dice(seen[name], targets[1], 2)
    return scores, seen
  for name, model in models.items():
    variables = fit(config, name, model, seed, images[0], train_label)
    seen[name] = tested(predict(config, model, variables, images[1]))
    scores[name] = dice(seen[name], test_label, 3)
  if config.study == "networks":
    seen["thresholds"] = tested(thresholds(images[0], train_label, images[1]))
    scores["thresholds"] = dice(seen["thresholds"], test_label, 3)
  return scores, seen


def folder(config: Config) -> str:
  """Of the runs of these settings."""
  sizes = f"{config.width}-{config.side}-{config.steps}-{config.learning_rate:g}"
  return f"{config.study}-{config.preset}-{sizes}"


def draw(config: Config, scores: dict[str, list[list[float]]], seen: dict[str, np.ndarray]) -> pathlib.Path:
  """Dice by network, and coronal slices of a test scan with what each network sees in them."""
  images, _, label = data(config, 0)
  tissues = ["white matter"] if config.study == "transfer" else list(brain.CLASSES[1:])
  if config.study == "transfer":
    label = (label == 2).astype(np.int32)
  figure, axes = figures.subplots(1, 2, width=7, height=3.6)
  bars, width = axes[0, 0], 0.8 / len(scores)
  for i, (name, runs) in enumerate(scores.items()):
    values = np.array(runs)
    spread = values.std(0, ddof=1) if len(values) > 1 else None
    drawn = bars.bar(np.arange(len(tissues)) + i * width, values.mean(0), width, yerr=spread, label=name)
    bars.bar_label(drawn, fmt="%.1f", fontsize=8)
  bars.set(xticks=np.arange(len(tissues)) + 0.4 - width / 2, xticklabels=tissues, ylabel="Dice (%)")
  bars.set_ylim(0, 119)
  bars.legend(fontsize=8, loc="upper center", ncols=len(scores))
  scan = front_of(images[3 if config.study == "transfer" else 1], label)[0, ..., 0]
  grey = matplotlib.colormaps["gray"]((scan - scan.min()) / np.ptp(scan))[..., :3]
  palette = np.array([matplotlib.colors.to_rgb(c) for c in ("black", figures.COLORS[4], figures.COLORS[5])])
  volumes = [grey, palette[label], *(palette[s[0]] for s in seen.values())]
  places = [label.shape[1] // 8, label.shape[1] // 2]
  rows = [np.concatenate([v[:, y].transpose(1, 0, 2)[::-1] for v in volumes], 1) for y in places]
  axes[0, 1].imshow(np.concatenate(rows), interpolation="nearest")
  side = label.shape[0]
  names = ["test scan", "truth", *seen]
  axes[0, 1].set(xticks=[side * (i + 0.5) for i in range(len(names))], yticks=[])
  axes[0, 1].set_xticklabels(names, fontsize=8)
  axes[0, 1].grid(visible=False)
  return figures.save(figure, config.workdir / folder(config) / "comparison.png")


def placing(learner: train.Learner, mesh: Any, fsdp: bool, state: Any, key: Any, batch: Any) -> Any:
  """Which devices hold what of a state, from compiling a learner that starts with zeros."""
  zeros = lambda key, _: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state.replace(key=None)).replace(key=key)
  return (
    train.data_parallel(learner._replace(init=zeros), mesh, fsdp=fsdp).init.lower(key, batch).compile().output_shardings
  )


def memory(config: Config) -> list[tuple[int, int]]:
  """Compiles a training step for eight devices, in several ways, and prints what each device would hold.

  Returns:
    Bytes of the state and the batch, and of the rest of a step, for each of `WAYS`.
  """
  if jax.device_count() != 8:
    raise ValueError(f"memory: got {jax.device_count()} devices, expected 8: set jax_num_cpu_devices before JAX starts")
  mesh, side, held = train.mesh(), 128, []
  table = rich.table.Table(
    "weights", "activations", "compute", "weights and momentum", "rest of a step", "together",
    title=f"STU-Net-{config.variant}, GiB a device, 8 devices, a volume of {side}^3 each",
  )  # fmt: skip
  batch = {
    "image": jax.ShapeDtypeStruct((8, side, side, side, 1), jnp.float32),
    "label": jax.ShapeDtypeStruct((8, side, side, side), jnp.int32),
  }
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  batch = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split) for name, a in batch.items()}
  for fsdp, remat, dtype in WAYS:
    model = stu_net.stu_net(config.variant, remat=remat, deep_supervision=True, dtype=dtype)
    tx = optax.chain(
      optax.clip_by_global_norm(12.0), optax.add_decayed_weights(3e-5), optax.sgd(0.01, 0.99, nesterov=True)
    )
    learner = train.supervised(model, stu_net.segmentation_loss(), tx)
    with kernels.disabled():  # XLA splits its own convolution over devices
      key = jax.eval_shape(lambda: jax.random.key(0))
      state = jax.eval_shape(learner.init, key, batch)
      placed = placing(learner, mesh, fsdp, state, key, batch)
      state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, placed)
      # XLA's CPU backend would merge what is computed twice: its pass that removes the barriers between is left out.
      # Level 0 compiles faster; buffers are laid out before.
      step = train.data_parallel(learner, mesh, fsdp=fsdp).step
      compiled = step.lower(state, batch).compile(
        {"xla_disable_hlo_passes": "cse_barrier_expander", "xla_backend_optimization_level": 0}
      )
    sizes = compiled.memory_analysis()
    parts = (
      sizes.argument_size_in_bytes,
      sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
    )
    table.add_row(
      "split" if fsdp else "whole", "recomputed by stage" if remat else "kept", dtype,
      *(f"{n / 2**30:.2f}" for n in (*parts, sum(parts))),
    )  # fmt: skip
    rich.print(table)
    held.append(parts)
  return held


def main(config: Config) -> None:
  """Trains, tests and reports."""
  began = time.monotonic()
  if config.seeds < 1 or config.steps < 10:
    raise ValueError(f"seeds, steps: got {config.seeds}, {config.steps}, expected at least 1 and 10")
  halvings(config.side)  # or says what is wrong with it
  scores: dict[str, list[list[float]]] = {}
  first: dict[str, np.ndarray] = {}
  for seed in range(config.seeds):
    one, seen = run(config, seed)
    first = first or seen
    for name, values in one.items():
      scores.setdefault(name, []).append(values)
      rich.print(f"{name}, seed {seed}: Dice " + ", ".join(f"{v:.1f}" for v in values))
  tissues = ["white matter"] if config.study == "transfer" else list(brain.CLASSES[1:])
  metrics = {
    f"{name}, Dice of {tissue}": [one[i] for one in runs]
    for name, runs in scores.items()
    for i, tissue in enumerate(tissues)
  }
  for name, model in networks(config).items():
    metrics[f"{name}, parameters"] = parameters(model, config.side, 2 if name == "new task" else 1)
  means = "; ".join(f"{name} {np.mean(runs):.1f} %" for name, runs in scores.items())
  table = rich.table.Table("network", *tissues, title="Dice (%), test scans")
  for name, runs in scores.items():
    table.add_row(name, *(f"{v:.1f}" for v in np.mean(runs, 0)))
  rich.print(table)
  path = train.write_result(
    config.workdir / folder(config),
    system="stu_net",
    claim=f"Mean Dice of {' and '.join(tissues)}, study of {config.study}: {means}.",
    dataset=f"MNI152 brain at {config.spacing} mm, {config.scans} made-up scans of its back; the front of {TEST_SCANS}",
    config=config,
    metrics=metrics,
    published={},
    seed=list(range(config.seeds)),
    wall_time=time.monotonic() - began,
  )
  rich.print(f"{path}\n{draw(config, scores, first)}")


if __name__ == "__main__":
  settings = parse()
  if settings.memory:
    jax.config.update("jax_num_cpu_devices", 8)
    memory(settings)
  else:
    main(settings)
