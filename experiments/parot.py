"""PaRot and a PointNet on solids that are turned: what is left of what they learned upright.

    python experiments/parot.py                     # classes of solids; a quarter of the published width, minutes
    python experiments/parot.py --task parts        # parts of solids
    python experiments/parot.py --seeds 3 --ablation
    python experiments/parot.py --seeds 3 --num-points 128   # half the time
    python experiments/parot.py --preset paper --data modelnet40.npz --published modelnet40   # on a host with GPUs

Protocols are named by the rotations of training and test: z/z, z/SO(3), SO(3)/SO(3), z being turns about the upright
axis. The PointNet has as many parameters, sees the same clouds, stretched and turned the same way in the same order,
for as many steps with the same optimizer. Reported are the accuracy over clouds, or the intersection over union (IoU)
averaged over the parts of a cloud and then over clouds, or over each class's clouds first, on clouds that are drawn
apart, at the end of training. How far PaRot has learned to be invariant is reported too: the spread of its logits over
rotations of a cloud, in units of their spread over clouds, and how far the loss of the directions fell.

`--data` names an npz file with `points` [B, N, 3], `label` [B] and, for parts, `part` [B, N] under the names
`train_points`, `test_points` and so on, for users who have the paper's sets.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import rich
from jaxtyping import Float

from jaxlab import train
from jaxlab.data import point_clouds
from jaxlab.models import parot
from jaxlab.train import command, figures

PROTOCOLS: dict[str, tuple[point_clouds.Turn, point_clouds.Turn]] = {
  "z/z": ("z", "z"),
  "z/SO(3)": ("z", "so3"),
  "SO(3)/SO(3)": ("so3", "so3"),
}
_SIZES = {"patch_size": 24, "global_size": 16, "neighbors": 8, "width": 32, "dropout": 0.2}
SMALL: dict[str, dict[str, Any]] = {"classes": _SIZES, "parts": _SIZES | {"interpolate": 3}}
_BY_CLASS = ", mean of classes"
PUBLISHED: dict[str, dict[str, float]] = {
  "none": {},
  "modelnet40": {"PaRot z/z": 90.9, "PaRot z/SO(3)": 91.0, "PaRot SO(3)/SO(3)": 90.8, "PointNet z/SO(3)": 19.6},
  "scanobjectnn": {"PaRot z/z": 82.4, "PaRot z/SO(3)": 82.1, "PaRot SO(3)/SO(3)": 82.6},
  "shapenetpart": {
    "PaRot z/z": 82.8, "PaRot z/SO(3)": 82.9, "PaRot SO(3)/SO(3)": 82.8, f"PaRot z/z{_BY_CLASS}": 79.1,
    f"PaRot z/SO(3){_BY_CLASS}": 79.2, f"PaRot SO(3)/SO(3){_BY_CLASS}": 79.5,
  },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  preset: Literal["demo", "paper"] = "demo"
  """demo: a quarter of the published width on small clouds; paper: the published network and recipe."""
  task: Literal["classes", "parts"] = "classes"
  """Name whole clouds, or the parts of clouds whose class is known."""
  data: pathlib.Path | None = None
  """npz file with clouds; without it, solids are drawn."""
  published: Literal["none", "modelnet40", "scanobjectnn", "shapenetpart"] = "none"
  """Whose published figures stand beside the results: what the file holds."""
  clouds: int = 1000
  """Solids to train on; a fifth as many to test on."""
  num_points: int = 256
  """Of a cloud; the small network has a patch for every eight."""
  steps: int = 3000
  """Updates; directions of local patches are learned slowly, and classes after them."""
  batch_size: int = 16
  """Clouds a step."""
  learning_rate: float = 2e-3
  """First rate of Adam; falls along a cosine to 1e-5."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Of the computation."""
  seeds: int = 1
  """Independent runs: clouds, weights, order."""
  ablation: bool = False
  """Also train PaRot on z turns without relative poses, and without the siamese losses."""
  workdir: pathlib.Path = pathlib.Path("runs/parot")
  """Each run has its folder in here and resumes from it."""


PRESETS = {
  "demo": Config(),
  "paper": Config("paper", clouds=9843, num_points=1024, steps=250 * 307, batch_size=32, learning_rate=1e-3),
}


class PointNet(nn.Module):
  """Qi et al., "PointNet", CVPR 2017, without its alignment networks: max over points of an MLP, then a head.

  Attributes:
    outputs: classes or parts.
    num_categories: for parts, of clouds; 0 to classify clouds.
    width: in proportion to which layers are.
    dropout: rate before the last layer.
    dtype: compute dtype.
  """

  outputs: int
  num_categories: int = 0
  width: int = 64
  dropout: float = 0.5
  dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, inputs: Any, *, train: bool = False) -> Any:
    """Args: points, and for parts the categories. Returns logits of clouds or of points."""
    points, category = inputs if self.num_categories else (inputs, None)
    w, mlp = self.width, functools.partial(parot.MLP, dtype=self.dtype)
    near = mlp((w // 2, w), name="points")(points.astype(self.dtype), train=train)
    x = mlp((2 * w, 4 * w), pool=True, name="cloud")(near, train=train)
    if category is not None:
      kind = jax.nn.one_hot(category, self.num_categories, dtype=self.dtype)
      spread = jnp.broadcast_to(jnp.concatenate([x, kind], -1)[:, None], (*near.shape[:2], 4 * w + self.num_categories))
      x = jnp.concatenate([near, spread], -1)
    x = mlp((4 * w if category is None else 2 * w, w), name="head")(x, train=train)
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    return nn.Dense(self.outputs, dtype=self.dtype, name="logits")(x)


@dataclasses.dataclass(frozen=True)
class Data:
  """Clouds to train and test on, and the numbers of the parts of each class."""

  train: point_clouds.Clouds
  test: point_clouds.Clouds
  classes: int
  ranges: list[range]


def load(config: Config, seed: int) -> Data:
  """From a file, or drawn."""
  if config.data is None:
    kinds = point_clouds.PARTED if config.task == "parts" else point_clouds.KINDS
    draw = functools.partial(point_clouds.solids, num_points=config.num_points, kinds=kinds)
    ranges = point_clouds.part_ranges(kinds)
    return Data(
      draw(config.clouds, seed=2 * seed), draw(max(config.clouds // 5, 1), seed=2 * seed + 1), len(kinds), ranges
    )
  names = ("points", "label", "part") if config.task == "parts" else ("points", "label")
  with np.load(config.data) as file:
    missing = [f"{s}_{name}" for s in ("train", "test") for name in names if f"{s}_{name}" not in file]
    if missing:
      raise ValueError(f"data: got {config.data} without {missing}, expected them in it")
    sets = []
    for split in ("train", "test"):
      found = [file[f"{split}_{name}"] for name in names]
      part = found[2] if len(found) > 2 else np.zeros(found[0].shape[:2], np.int32)
      if found[0].shape[1] < config.num_points:
        raise ValueError(
          f"num_points: got {config.num_points}, expected at most {found[0].shape[1]}, those in {config.data}"
        )
      points = found[0][:, : config.num_points].astype(np.float32)
      sets.append(point_clouds.Clouds(points, found[1].astype(np.int32), part[:, : config.num_points].astype(np.int32)))
  labels, parts = (np.concatenate([getattr(s, name).ravel() for s in sets]) for name in ("label", "part"))
  of_points = np.repeat(labels, config.num_points)
  classes = int(labels.max()) + 1
  ranges = [
    range(int(p.min()), int(p.max()) + 1) if (p := parts[of_points == k]).size else range(0) for k in range(classes)
  ]
  return Data(sets[0], sets[1], classes, ranges)


def network(config: Config, name: str, data: Data) -> nn.Module:
  """A model."""
  parts = max(numbers.stop for numbers in data.ranges)
  options: dict[str, Any] = {"dtype": config.dtype}
  if name == "PointNet":
    options |= {"width": 256} if config.preset == "paper" else {"width": {"classes": 58, "parts": 64}[config.task]}
    options["dropout"] = 0.5 if config.preset == "paper" else SMALL[config.task]["dropout"]
    return PointNet(*((parts, data.classes) if config.task == "parts" else (data.classes,)), **options)
  if config.preset == "demo":
    options |= {"num_patches": max(config.num_points // 8, 8)} | SMALL[config.task]
  options["restore_pose"] = name != "without pose"
  if config.task == "parts":
    return parot.segmenter(parts, data.classes, **options)
  return parot.classifier(data.classes, **options)


def learner(config: Config, name: str, model: nn.Module) -> train.Learner:
  """Adam with coupled weight decay and a cosine; smoothed labels."""
  label = "part" if config.task == "parts" else "label"
  siamese = {"direction": (0.0, 0.0), "orthogonality": (0.0, 0.0)} if name == "without siamese losses" else {}
  rate = optax.cosine_decay_schedule(config.learning_rate, config.steps, 1e-5 / config.learning_rate)
  tx = optax.chain(optax.add_decayed_weights(1e-6), optax.adam(rate))
  return train.supervised(model, parot.objective(label=label, **siamese), tx, inputs=functools.partial(inputs, config))


def inputs(config: Config, batch: Any) -> Any:
  """What a network sees of a batch."""
  return (batch["points"], batch["label"]) if config.task == "parts" else batch["points"]


Predict = Callable[[Any, point_clouds.Clouds], np.ndarray]


def predict(config: Config, call: Callable[..., Any], variables: Any, clouds: point_clouds.Clouds) -> np.ndarray:
  """Logits, forty clouds at a time, by a compiled `model.apply`."""
  size, logits = min(40, len(clouds.points)), []
  for i in range(0, len(clouds.points), size):
    rows = np.arange(i, i + size) % len(clouds.points)  # the last batch goes round
    batch = {"points": clouds.points[rows], "label": clouds.label[rows]}
    logits.append(np.asarray(call(variables, inputs(config, batch)), np.float32))
  return np.concatenate(logits)[: len(clouds.points)]


def best_parts(logits: np.ndarray, clouds: point_clouds.Clouds, ranges: list[range]) -> np.ndarray:
  """For each point the likeliest of the parts that its cloud's class has."""
  found = np.empty(clouds.part.shape, np.int32)
  for i, label in enumerate(clouds.label):
    r = ranges[label]
    found[i] = r.start + logits[i][:, r.start : r.stop].argmax(-1)
  return found


def ious(found: np.ndarray, clouds: point_clouds.Clouds, ranges: list[range]) -> Float[np.ndarray, " b"]:
  """For each cloud the mean IoU of its class's parts; a part neither there nor found counts as 1."""
  scores = []
  for mine, true, label in zip(found, clouds.part, clouds.label, strict=True):
    pairs = [((mine == p) & (true == p), (mine == p) | (true == p)) for p in ranges[label]]
    scores.append(np.mean([both.sum() / either.sum() if either.any() else 1.0 for both, either in pairs]))
  return np.array(scores)


def score(config: Config, logits: np.ndarray, clouds: point_clouds.Clouds, ranges: list[range]) -> dict[str, float]:
  """Accuracy, or IoU over clouds and over classes, in percent."""
  if config.task == "classes":
    return {"": 100 * float((logits.argmax(-1) == clouds.label).mean())}
  each = ious(best_parts(logits, clouds, ranges), clouds, ranges)
  by_class = [each[clouds.label == label].mean() for label in np.unique(clouds.label)]
  return {"": 100 * float(each.mean()), _BY_CLASS: 100 * float(np.mean(by_class))}


def spread(predict: Predict, variables: Any, clouds: point_clouds.Clouds, rng: np.random.Generator) -> float:
  """Standard deviation of logits over rotations of a cloud, by that over clouds (and points)."""
  few = clouds._replace(points=clouds.points[:40], label=clouds.label[:40], part=clouds.part[:40])
  turns = [few._replace(points=point_clouds.turned(few.points, "so3", rng)) for _ in range(4)]
  logits = np.stack([predict(variables, one) for one in turns])
  axes = tuple(range(1, logits.ndim - 1))
  return float(np.sqrt(logits.var(0).mean()) / np.sqrt(logits.var(axes).mean()))


def run(config: Config, name: str, turn: point_clouds.Turn, seed: int) -> tuple[dict[str, float], Any]:
  """Scores by test rotation and what was learned of invariance; and some test clouds with the parts found."""
  data = load(config, seed)
  model = network(config, name, data)
  learn = learner(config, name, model)

  def batch(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((seed, step))
    rows = rng.choice(len(data.train.points), config.batch_size, replace=False)
    points = point_clouds.stretched(data.train.points[rows], 4 / 3 if config.task == "parts" else 1.5, rng)
    return {
      "points": point_clouds.turned(points, turn, rng),
      "label": data.train.label[rows],
      "part": data.train.part[rows],
    }

  kept = train.result.settings(
    config, without=("workdir", "seeds", "ablation", "published"), network=name, turn=turn, seed=seed
  )
  work = config.workdir / folder(config) / name.replace(" ", "_") / turn / f"seed{seed}"
  done = work / "scores.json"
  if done.exists() and (known := json.loads(done.read_text()))["settings"] == kept:
    with np.load(work / "test.npz") as file:
      return known["scores"], (data.test._replace(points=file["points"]), file["found"], data)
  state = train.fit(
    learn,
    batch,
    steps=config.steps,
    workdir=work,
    key=jax.random.key(seed),
    config=kept,
    mesh=train.mesh() if jax.device_count() > 1 else None,
    tensorboard=False,
  )
  variables, logits_of = jax.device_get(state.variables), functools.partial(predict, config, jax.jit(model.apply))
  rng = np.random.default_rng((seed, 2**20))  # the same test rotations for every network
  scores: dict[str, float] = {}
  for test in ("z", "so3"):
    clouds = data.test._replace(points=point_clouds.turned(data.test.points, test, rng))
    logits = logits_of(variables, clouds)
    scores |= {test + which: value for which, value in score(config, logits, clouds, data.ranges).items()}
    found = best_parts(logits, clouds, data.ranges) if config.task == "parts" else logits.argmax(-1)
    shown = clouds, found, data
  if name != "PointNet":
    fresh = jax.jit(learn.init)(jax.random.key(seed), batch(0)).variables
    scores["spread, untrained"] = spread(logits_of, fresh, data.test, rng)
    scores["spread"] = spread(logits_of, variables, data.test, rng)
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    for scale in ("local", "global"):
      scores[f"direction loss, {scale}, first"] = lines[0][f"direction_{scale}"]
      scores[f"direction loss, {scale}, last"] = float(np.mean([line[f"direction_{scale}"] for line in lines[-5:]]))
  np.savez(work / "test.npz", points=shown[0].points, found=shown[1])
  done.write_text(json.dumps({"settings": kept, "scores": scores}))
  return scores, shown


def folder(config: Config) -> str:
  """Of the runs of these settings."""
  data = "solids" if config.data is None else config.data.stem
  return f"{config.task}-{config.preset}-{data}-{config.clouds}-{config.num_points}-{config.steps}"


def draw(config: Config, bars: dict[str, dict[str, list[float]]], shown: dict[str, Any]) -> pathlib.Path:
  """Scores by protocol, and test clouds under SO(3) as networks trained on z see them."""
  figure, axes = figures.subplots(1, 2, width=6, height=4)
  width = 0.8 / len(bars)
  for i, (name, protocols) in enumerate(bars.items()):
    places = [list(PROTOCOLS).index(p) + i * width for p in protocols]
    spread = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in protocols.values()]
    axes[0, 0].bar(places, [np.mean(v) for v in protocols.values()], width, yerr=spread, label=name)
  axes[0, 0].set(xticks=np.arange(len(PROTOCOLS)) + 0.4 - width / 2, xticklabels=list(PROTOCOLS), ylim=(0, 125))
  axes[0, 0].set(ylabel="accuracy (%)" if config.task == "classes" else "part IoU (%)", yticks=range(0, 101, 20))
  axes[0, 0].set_xlabel("rotations in training / test")
  axes[0, 0].legend(fontsize=8, loc="upper center", ncols=2)
  right, palette = axes[0, 1], matplotlib.colormaps["tab10"]
  right.set_axis_off()
  right.set_aspect("equal")
  clouds, _, data = shown["PaRot"]
  count = min(data.classes, 10, len(clouds.points))
  rows = {"truth": clouds.part if config.task == "parts" else clouds.label}
  rows |= {name: one[1] for name, one in shown.items()}
  if config.task == "classes":
    rows = {name: np.repeat(found[:, None], clouds.points.shape[1], 1) for name, found in rows.items()}
  for row, (name, found) in enumerate(rows.items()):
    right.text(-1.3, -2.3 * row, name, ha="right", va="center", fontsize=8)
    for i in range(count):
      x, y = clouds.points[i, :, 0] + 2.3 * i, clouds.points[i, :, 2] - 2.3 * row
      colour = found[i] - (data.ranges[clouds.label[i]].start if config.task == "parts" else 0)
      right.scatter(x, y, s=1.5, c=palette(colour % 10))
  what = "parts" if config.task == "parts" else "classes"
  right.set_title(f"trained on z, seen under SO(3): {what} as colours", fontsize=8)
  return figures.save(figure, config.workdir / folder(config) / "protocols.png")


def main(config: Config) -> None:
  """Trains, tests and reports."""
  began = time.monotonic()
  if config.seeds < 1 or config.steps < 10:
    raise ValueError(f"seeds, steps: got {config.seeds}, {config.steps}, expected at least 1 and 10")
  if config.data is None and config.published != "none":
    raise ValueError(f"published: got {config.published}, expected none beside solids")
  if config.batch_size > config.clouds:
    raise ValueError(f"batch_size: got {config.batch_size}, expected at most the {config.clouds} clouds")
  if config.data is None and config.clouds < 50:
    raise ValueError(f"clouds: got {config.clouds}, expected at least 50, so that every class is tested")
  turns = dict.fromkeys(trained for trained, _ in PROTOCOLS.values())
  pairs: list[tuple[str, point_clouds.Turn]] = [(name, turn) for name in ("PaRot", "PointNet") for turn in turns]
  if config.ablation:
    pairs += [("without pose", "z"), ("without siamese losses", "z")]
  metrics: dict[str, list[float]] = {}
  bars: dict[str, dict[str, list[float]]] = {}
  shown: dict[str, Any] = {}
  for seed in range(config.seeds):
    for name, turn in pairs:
      scores, pictures = run(config, name, turn, seed)
      of_tests = {tested + which for _, tested in PROTOCOLS.values() for which in ("", _BY_CLASS)}
      for protocol, (trained, tested) in PROTOCOLS.items():
        if trained == turn:
          bars.setdefault(name, {}).setdefault(protocol, []).append(scores[tested])
          for which in ("", _BY_CLASS):
            if tested + which in scores:
              metrics.setdefault(f"{name} {protocol}{which}", []).append(scores[tested + which])
      if turn == "z":
        if name in ("PaRot", "PointNet"):
          shown.setdefault(name, pictures)
        for key in scores.keys() - of_tests:
          metrics.setdefault(f"{name} {key}", []).append(scores[key])
      rich.print(f"{name}, trained on {turn}, seed {seed}: " + ", ".join(f"{k} {v:.3g}" for k, v in scores.items()))
  mean = {key: float(np.mean(values)) for key, values in metrics.items()}
  drop = {name: mean[f"{name} z/z"] - mean[f"{name} z/SO(3)"] for name in bars}
  what = "accuracy" if config.task == "classes" else "part IoU"
  path = train.write_result(
    config.workdir / folder(config),
    system="parot",
    claim=f"Trained upright and tested under any rotation, PaRot's {what} changes by {-drop['PaRot']:+.1f} points to "
    f"{mean['PaRot z/SO(3)']:.1f} %, that of a PointNet of its size by {-drop['PointNet']:+.1f} to "
    f"{mean['PointNet z/SO(3)']:.1f} %; trained under any rotation they reach {mean['PaRot SO(3)/SO(3)']:.1f} % and "
    f"{mean['PointNet SO(3)/SO(3)']:.1f} %.",
    dataset=f"parametric solids, {config.clouds} clouds of {config.num_points} points"
    if config.data is None
    else config.data.stem,
    config=config,
    metrics=dict(sorted(metrics.items())),
    published=PUBLISHED[config.published],
    seed=list(range(config.seeds)),
    wall_time=time.monotonic() - began,
  )
  train.result.print_metrics(json.loads(path.read_text()))
  rich.print(f"{path}\n{draw(config, bars, shown)}")


def defaults(asked: Config, preset: Config) -> Config:
  """The preset's, for the task asked for."""
  if asked.preset == "paper" and asked.task == "parts":
    # As many epochs of ShapeNetPart's clouds for training and validation.
    return dataclasses.replace(preset, num_points=2048, clouds=14_007, steps=250 * (14_007 // 32))
  return preset


parse = command.parser(PRESETS, __doc__, defaults)


if __name__ == "__main__":
  main(parse())
