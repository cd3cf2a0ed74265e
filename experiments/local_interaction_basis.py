"""Are a network's interactions sparser in the local interaction basis than between its principal components?

    python experiments/local_interaction_basis.py                                  # addition mod 31, trained here
    python experiments/local_interaction_basis.py --network mlp                    # or cnn, on digits
    python experiments/local_interaction_basis.py --network blocks                 # modules that are known beforehand
    python experiments/local_interaction_basis.py --network modular_addition --weights official
    python experiments/local_interaction_basis.py --preset paper                   # addition mod 113, 60,000 steps

For every node layer: how many edges behind it does the network need to keep its test accuracy but for 0.1 %, and how
many of its features? Bases are found on training data in float64, as are edges; ablations are measured on test data.
The graph that is drawn has these edges; features of modular addition are coloured by the frequency of the numbers that
they follow. Two blocks of random weights are modules that never meet: there the share of edges between them is
measured.

The official weights are checkpoints of `ApolloResearch/rib` (rib_scripts/train_modular_arithmetic/sample_checkpoints,
five runs): put them into JAXLAB_DATA/rib as seed0.pt to seed4.pt, or as .npz with the same names of tensors.
"""

import dataclasses
import functools
import json
import os
import pathlib
import time
import zlib
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import matplotlib.collections
import numpy as np
import optax
import rich
from jaxtyping import Float

from jaxlab import checks, interop, memory, train
from jaxlab.analysis import local_interaction_basis as lib
from jaxlab.data import digits, mnist5k
from jaxlab.train import command
from jaxlab.train.result import finished_result, once, print_metrics, settings


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  network: Literal["modular_addition", "mlp", "cnn", "blocks"] = "modular_addition"
  """A transformer that adds, a perceptron with two hidden layers, two convolutions, or five layers of two blocks."""
  weights: Literal["trained", "official"] = "trained"
  """official: of modular addition, from JAXLAB_DATA/rib; gives the defaults that its runs had."""
  dataset: Literal["digits", "mnist5k"] = "digits"
  """Of mlp and cnn; both ship with a package."""
  seeds: int = 3
  """Networks."""
  modulus: int = 31
  """Of the addition."""
  features: int = 64
  """Of the transformer's residual stream; a perceptron's hidden layer has half as many neurons, an image 8 channels."""
  share: float = 0.7
  """Of all pairs of numbers, to train on."""
  learning_rate: float = 0.002
  """Of AdamW with weight decay 1, for the transformer; others have Adam with 0.001."""
  steps: int = 3000
  """On all training pairs, for the transformer."""
  epochs: int = 30
  """In batches of 64, for mlp and cnn."""
  examples: int = 10_000
  """At most so many training examples bases are found on, and test examples ablations are measured on."""
  threshold: float = 1e-10
  """Of variance and importance, below which directions and features are dropped."""
  drawn: int = 24
  """Features of a node layer in the figure."""
  preset: Literal["demo", "paper"] = "demo"
  """Where the defaults of other options come from. paper: addition mod 113, 60,000 steps with a rate of 0.001, five
  seeds; mlp on MNIST (5k subset), 100 neurons; threshold 1e-15 for addition and blocks."""
  workdir: pathlib.Path = pathlib.Path("runs/local_interaction_basis")
  """Each setting has a folder in here with figure and result.json; a second run reports."""


PAPER = {
  "modular_addition": {
    "modulus": 113, "features": 128, "share": 0.3, "learning_rate": 0.001, "steps": 60_000, "seeds": 5,
    "threshold": 1e-15,
  },
  "mlp": {"dataset": "mnist5k", "features": 200, "epochs": 12},
  "cnn": {"dataset": "mnist5k", "epochs": 12},
  "blocks": {"seeds": 5, "threshold": 1e-15},
}  # fmt: skip
OFFICIAL = {name: PAPER["modular_addition"][name] for name in ("modulus", "features", "share", "threshold")}
PRESETS = {"demo": Config(), "paper": Config(preset="paper", **PAPER["modular_addition"])}
LAYERS = {
  "modular_addition": ("embedding", "after attention", "before logits"),
  "mlp": ("pixels", "hidden 1", "hidden 2"),
  "cnn": ("pixels", "channels 1", "channels 2"),
  "blocks": tuple(f"layer {i}" for i in range(1, 6)),
}
METHODS = {"LIB": "lib", "PCA": "pca"}
# Of the official repository's stored outputs, seeds 0 to 4.
STORED = {
  "LIB": ([133, 80, 71, 58, 91], [82, 75, 71, 60, 82], [633, 699, 610, 535, 694]),
  "PCA": ([167, 76, 99, 115, 130], [114, 53, 71, 71, 117], [682, 734, 598, 547, 752]),
}
STORED_ACCURACY = [0.99955, 0.99888, 1.0, 0.99978, 1.0]
WITHIN = 0.001  # of the accuracy


def defaults(asked: Config, preset: Config) -> Config:
  """The preset's, for the network and weights asked for."""
  if asked.preset == "paper":
    preset = Config(preset="paper", **PAPER[asked.network])
  return dataclasses.replace(preset, **OFFICIAL) if asked.weights == "official" else preset


parse = command.parser(PRESETS, __doc__, defaults)


@dataclasses.dataclass(frozen=True)
class Problem:
  """A network and activations of its first node layer."""

  network: lib.sections.Network
  x: Float[np.ndarray, "n p d"]
  held: Float[np.ndarray, "m p d"]
  labels: np.ndarray
  tags: Any = None


# ------------------------------------------------------------------------------------------------------------ networks


class MLP(nn.Module):
  """Two hidden layers."""

  width: int

  @nn.compact
  def __call__(self, x, *, train=False):
    """Images [B, H, W, 1] -> logits [B, 10]."""
    x = x.reshape(len(x), -1)
    for _ in range(2):
      x = nn.relu(nn.Dense(self.width)(x))
    return nn.Dense(10)(x)


class CNN(nn.Module):
  """Two convolutions with stride 2."""

  channels: int = 8

  @nn.compact
  def __call__(self, x, *, train=False):
    """Images [B, H, W, 1] -> logits [B, 10]."""
    for _ in range(2):
      x = nn.relu(nn.Conv(self.channels, (3, 3), strides=2)(x))
    return nn.Dense(10)(x.reshape(len(x), -1))


def of_network(config: Config) -> dict[str, Any]:
  """Settings that one network depends on, and what is found in it: more networks leave the others as they are."""
  return {name: value for name, value in settings(config).items() if name not in ("seeds", "drawn")}


def adds(config: Config, seed: int, folder: pathlib.Path) -> Problem:
  """The transformer, trained or official."""
  pairs, held = lib.pairs(config.modulus, train=config.share, seed=0 if config.weights == "official" else seed)
  if config.weights == "official":
    home = pathlib.Path(os.environ.get("JAXLAB_DATA", "")) / "rib"
    files = [path for suffix in (".npz", ".pt") if (path := home / f"seed{seed}{suffix}").is_file()]
    if not files:
      raise ValueError(f"weights: got official, expected {home}/seed{seed}.npz or .pt, which is not there")
    params = lib.from_torch(interop.load(files[0]))["params"]
  else:
    model = lib.ModularAddition(config.modulus, config.features)
    rate = optax.warmup_constant_schedule(0, config.learning_rate, 10)
    tx = optax.adamw(rate, 0.9, 0.98, weight_decay=1.0)
    learner = train.supervised(model, train.cross_entropy(), tx, inputs=lambda batch: batch["tokens"])
    params = train.fit(
      learner, pairs, steps=config.steps, workdir=folder / f"seed{seed}", key=jax.random.key(seed), keep=1,
      evaluate_on=held, evaluate_every=max(1, config.steps // 10), tensorboard=False, config=of_network(config),
    ).params  # fmt: skip
  x, held_x = (jax.jit(lib.embed)(params, part["tokens"][: config.examples]) for part in (pairs, held))
  with jax.enable_x64(True):  # the sum of embeddings too
    wide = jax.tree.map(lambda a: np.asarray(a, "float64"), params)
    network, x = jax.jit(lib.modular_addition)(wide), jax.jit(lib.embed)(wide, pairs["tokens"][: config.examples])
  everything = np.argwhere(np.ones((config.modulus,) * 2))
  tokens = np.append(everything, np.full((len(everything), 1), config.modulus), 1).astype("int32")
  tags = np.asarray(jax.jit(lib.embed)(params, tokens), "float64")
  return Problem(network, np.asarray(x), np.asarray(held_x), held["label"][: config.examples], tags)


def sees(config: Config, seed: int, folder: pathlib.Path) -> Problem:
  """A network on images, trained."""
  splits = (digits if config.dataset == "digits" else mnist5k).images(seed=seed)
  size = splits.train["image"].shape[1]
  model = MLP(config.features // 2) if config.network == "mlp" else CNN()
  learner = train.supervised(model, train.cross_entropy(), optax.adam(0.001))
  count = len(splits.train["label"])
  steps = count // 64

  def batch(step):
    order = np.random.default_rng([seed, step // steps]).permutation(count)
    return {k: a[order[step % steps * 64 :][:64]] for k, a in splits.train.items()}

  params = train.fit(
    learner, batch, steps=config.epochs * steps, workdir=folder / f"seed{seed}", key=jax.random.key(seed), keep=1,
    tensorboard=False, config=of_network(config),
  ).params  # fmt: skip

  @jax.jit
  def folded(params):
    if config.network == "mlp":
      return lib.mlp([params[f"Dense_{i}"] for i in range(3)])
    half, quarter = -(-size // 2), -(-size // 4)
    return (
      lib.conv(**params["Conv_0"], shape=(size, size), strides=(2, 2)),
      lib.conv(**params["Conv_1"], shape=(half, half), strides=(2, 2)),
      lib.readout(**params["Dense_0"], positions=quarter**2),
    )

  def activations(images):
    images = images[: config.examples]
    flat = images.reshape(len(images), *((1, -1) if config.network == "mlp" else (-1, images.shape[-1])))
    return np.append(flat, np.ones_like(flat[..., :1]), -1)

  with jax.enable_x64(True):
    network = folded(jax.tree.map(lambda a: np.asarray(a, "float64"), params))
  x = activations(splits.train["image"]).astype("float64")
  return Problem(network, x, activations(splits.test["image"]), splits.test["label"][: config.examples])


def blocks(config: Config, seed: int, folder: pathlib.Path) -> Problem:
  """Five ReLU layers of two 4x4 blocks, scaled by 2, without biases, on normal data."""
  rng = np.random.default_rng(seed)
  layers = []
  for _ in range(5):
    kernel = np.zeros((8, 8))
    kernel[:4, :4], kernel[4:, 4:] = 2 * rng.standard_normal((2, 4, 4))
    layers.append({"kernel": kernel, "bias": np.zeros(8)})
  x = np.append(rng.standard_normal((config.examples, 1, 8)), np.ones((config.examples, 1, 1)), -1)
  with jax.enable_x64(True):
    network = jax.jit(lib.mlp)(layers)
  return Problem(network, x, x.astype("float32"), np.zeros(len(x)))


MAKERS = {"modular_addition": adds, "mlp": sees, "cnn": sees, "blocks": blocks}

# -------------------------------------------------------------------------------------------------------- measurements


def crossing(graph: lib.Graph, layer: int) -> float:
  """Share (%) of edge mass between features of different blocks, without the constant."""
  block = [abs(b.into[4:8, 1:]).sum(0) > abs(b.into[:4, 1:]).sum(0) for b in graph.bases[:-1]]
  block.append(np.arange(8) >= 4)  # outputs have no constant
  edges = graph.edges[layer][:, 1:] if layer == 4 else graph.edges[layer][1:, 1:]
  return float(100 * edges[block[layer + 1][:, None] != block[layer]].sum() / edges.sum())


def frequencies(problem: Problem, graph: lib.Graph, modulus: int) -> list[np.ndarray]:
  """Of every feature, the frequency k of (i, j) with most power in its activation, at either number."""
  found = []
  network = jax.tree.map(lambda a: np.asarray(a, "float32"), problem.network)
  for basis, acts in zip(graph.bases, lib.activations(network, problem.tags.astype("float32")), strict=True):
    features = np.asarray(acts, "float64").sum(1) @ basis.into  # numbers stand at different positions
    power = abs(np.fft.fft2(features.reshape(modulus, modulus, -1), axes=(0, 1))) ** 2
    half = np.arange(1, modulus // 2 + 1)
    rows, columns = power.sum(1)[1:], power.sum(0)[1:]
    by = rows[half - 1] + rows[::-1][half - 1] + columns[half - 1] + columns[::-1][half - 1]
    found.append(half[by.argmax(0)])
  return found


def explain(config: Config, problem: Problem, method: str) -> lib.Graph:
  """The graph of one network."""
  return lib.interaction_graph(problem.network, problem.x, method=METHODS[method], threshold=config.threshold)


def study(config: Config, problem: Problem, parts: pathlib.Path) -> dict[str, Any]:
  """Metrics of one network; what an earlier run found is read from files named after `parts`."""
  metrics: dict[str, Any] = {}
  for title in METHODS:
    graph = functools.cache(functools.partial(explain, config, problem, title))
    for layer, name in enumerate(LAYERS[config.network]):
      make = functools.partial(study_layer, config, problem, graph, layer, f"{name}, {title}")
      metrics |= once(parts.with_name(f"{parts.name}-{title}-{layer}.json"), make)
  return metrics


def study_layer(
  config: Config, problem: Problem, graph: Callable[[], lib.Graph], layer: int, what: str
) -> dict[str, Any]:
  """Metrics of one node layer and the edges behind it, in one basis."""
  if config.network == "blocks":
    return {f"edges between blocks (%), {what}": crossing(graph(), layer)}
  score = functools.partial(lib.accuracy, labels=problem.labels)
  basis = graph().bases[layer]
  required = lib.edges_required(problem.network, graph(), layer, problem.held, score, tolerance=WITHIN)
  width = basis.into.shape[0]
  counts = lib.schedule(width, every=min(10, width - 1), base=1.05)
  curve = lib.feature_curve(problem.network, graph(), layer, problem.held, score, counts)
  return {
    "test accuracy (%)": 100 * required.base,
    f"features of {what}": len(basis.importance),
    f"edges required from {what}": required.edges,
    f"features required of {what}": min(k for k in counts if curve[k] >= required.base - WITHIN),
    f"curve of {what}": [list(curve), list(curve.values())],
  }


# -------------------------------------------------------------------------------------------------------------- figure


def draw_graph(axes, config: Config, graph: lib.Graph, masks, colors, title: str) -> None:
  """Features as dots, the most important on top, and the required edges, wide where they are heavy; no constant."""
  outputs = config.network != "modular_addition"  # those have more outputs than one can see
  depth = len(graph.edges) + outputs
  sizes = [min(config.drawn, len(b.importance) - 1) for b in graph.bases[: len(graph.edges)]]
  sizes += [min(config.drawn, len(graph.bases[-1].importance))] * outputs
  first = [1] * len(graph.edges) + [0] * outputs
  height = lambda layer, i: (-(np.asarray(i) + 0.5) / sizes[layer]) * max(sizes)
  for layer in range(depth - 1):
    weights = (graph.edges[layer] * masks[layer])[first[layer + 1] :, 1:][: sizes[layer + 1], : sizes[layer]]
    to, of = np.nonzero(weights)
    size = np.sqrt(weights[to, of] / weights.max(initial=1e-300))
    lines = [[(layer, height(layer, j)), (layer + 1, height(layer + 1, i))] for i, j in zip(to, of, strict=True)]
    shades = [(*matplotlib.colors.to_rgb(colors[layer][j + 1]), 0.25 + 0.6 * s) for j, s in zip(of, size, strict=True)]
    axes.add_collection(matplotlib.collections.LineCollection(lines, linewidths=0.4 + 3 * size, colors=shades))
  for layer in range(depth):
    of = np.arange(sizes[layer])
    axes.scatter(np.full(len(of), layer), height(layer, of), s=26, zorder=3, edgecolors="white", linewidths=0.5,
                 c=[colors[layer][i + first[layer]] for i in of])  # fmt: skip
  labels = [*LAYERS[config.network], "outputs"][:depth]
  axes.set(title=title, yticks=[], xlim=(-0.2, depth - 0.8), xticks=range(depth))
  axes.set_xticklabels(labels)
  axes.grid(visible=False)
  axes.spines[["left", "bottom"]].set_visible(False)


def draw(config: Config, problem: Problem, metrics: list[dict[str, Any]], path: pathlib.Path) -> None:
  """The graphs of the first network, and accuracy against features kept for all."""
  names, palette = LAYERS[config.network], train.figures.COLORS
  curves = config.network != "blocks"
  order: list[int] = []
  figure, axes = train.figures.subplots(1, 2 + curves, width=4.6, height=5.5)
  for panel, title in zip(axes[0], METHODS, strict=False):
    graph = explain(config, problem, title)
    if config.network == "blocks":
      masks = [edges > 1e-3 * edges.max() for edges in graph.edges]
    else:
      counts = [metrics[0][f"edges required from {name}, {title}"] for name in names]
      masks = [lib.strongest(edges, count) for edges, count in zip(graph.edges, counts, strict=True)]
    colors = [[palette[0]] * len(b.importance) for b in graph.bases]
    if config.network == "modular_addition":
      tags = frequencies(problem, graph, config.modulus)
      shown = np.concatenate([t[1 : config.drawn + 1] for t in tags[:-1]])
      # The same colours in both graphs.
      order = order or [int(k) for k in np.argsort(-np.bincount(shown))[: len(palette) - 1]]
      colors = [[palette[order.index(k)] if k in order else "#aaaaaa" for k in t] for t in tags]
      for k in sorted(k for k in order if k in shown):
        panel.scatter([], [], color=palette[order.index(k)], label=f"{k}", s=18)
      panel.legend(title="frequency", fontsize=7, title_fontsize=7, loc="lower center", ncols=6, handletextpad=0.1,
                   columnspacing=0.8, bbox_to_anchor=(0.5, -0.15))  # fmt: skip
    elif config.network == "blocks":
      sides = [abs(b.into[4:8]).sum(0) > abs(b.into[:4]).sum(0) for b in graph.bases]
      colors = [[palette[int(s)] for s in side] for side in sides]
    what = "edges above 0.1 %" if config.network == "blocks" else "edges required"
    draw_graph(panel, config, graph, masks, colors, f"{title}, {what}")
  if curves:
    panel = axes[0, 2]
    for layer, name in enumerate(names):
      for title, style in zip(METHODS, ("-", "--"), strict=True):
        runs = [m[f"curve of {name}, {title}"] for m in metrics]
        width = runs[0][0]
        values = 100 * np.mean([r[1] for r in runs], 0)
        panel.plot(width[1:], values[1:], style, color=palette[layer], label=f"{name}, {title}", lw=1.2)
    panel.set(xscale="log", xlabel="features kept", ylabel="test accuracy (%)", title=f"mean over {len(metrics)} seeds")
    panel.legend(fontsize=7)
  train.figures.save(figure, path)


# ---------------------------------------------------------------------------------------------------------------- main


def published(config: Config) -> dict[str, Any]:
  """Of the official weights, from the stored outputs, for these seeds."""
  if config.weights != "official":
    return {}
  source = "stored outputs of the official code"
  mean = lambda values: {"value": float(np.mean(values[: config.seeds])), "source": source}
  out: dict[str, Any] = {"test accuracy (%)": mean([100 * a for a in STORED_ACCURACY])}
  for title, by_layer in STORED.items():
    for name, values in zip(LAYERS["modular_addition"], by_layer, strict=True):
      out[f"edges required from {name}, {title}"] = mean(values)
  return out


def main(config: Config) -> None:
  """Runs the experiment, or shows a finished one."""
  checks.count("seeds", config.seeds, 1, 5 if config.weights == "official" else None)
  for name in ("modulus", "features", "steps", "epochs", "examples", "drawn"):
    checks.count(name, getattr(config, name))
  if not 0 < int(config.share * config.modulus**2) < config.modulus**2:
    raise ValueError(f"share: got {config.share}, expected pairs to train on and to test on")
  if config.weights == "official":
    if config.network != "modular_addition":
      raise ValueError(f"weights: got official for {config.network}, expected trained")
    for name in ("modulus", "features", "share"):
      if getattr(config, name) != OFFICIAL[name]:
        raise ValueError(f"{name}: got {getattr(config, name)}, expected {OFFICIAL[name]}, as of the official weights")
  memory.keep()
  what = {"modular_addition": f"mod{config.modulus}-{config.weights}", "blocks": "toy"}.get(
    config.network, config.dataset
  )
  folder = config.workdir / f"{config.network}-{what}-{config.preset}"
  record = settings(config)
  if result := finished_result(folder, record):
    return print_metrics(result)
  start = time.perf_counter()
  make = functools.partial(MAKERS[config.network], config, folder=folder)
  parts = folder / f"parts-{zlib.crc32(json.dumps(of_network(config)).encode()):08x}"
  runs = []
  for seed in range(config.seeds):
    runs.append(study(config, make(seed=seed), parts / f"seed{seed}"))
    rich.print(f"seed {seed}: {', '.join(f'{k} {v:.4g}' for k, v in runs[-1].items() if 'required from' in k)}")
  draw(config, make(seed=0), runs, folder / "figure.png")
  metrics = {name: [run[name] for run in runs] for name in runs[0] if not name.startswith("curve")}
  if config.network != "blocks":
    fewer = [
      np.mean(
        [run[f"edges required from {n}, LIB"] < run[f"edges required from {n}, PCA"] for n in LAYERS[config.network]]
      )
      for run in runs
    ]
    metrics["layers where LIB needs fewer edges than PCA (%)"] = [100 * f for f in fewer]
  data = {"modular_addition": f"addition mod {config.modulus}, {config.weights} weights", "blocks": "two random blocks"}
  names = {"digits": "digits", "mnist5k": "MNIST (5k subset)"}
  train.report(
    folder,
    system="local_interaction_basis",
    claim="How many features and edges keep the accuracy, by LIB and by PCA; edges between modules that never meet.",
    dataset=data.get(config.network, f"{names[config.dataset]}, {config.network}"),
    config=record,
    metrics=metrics,
    published=published(config),
    seed=list(range(config.seeds)),
    wall_time=time.perf_counter() - start,
  )


if __name__ == "__main__":
  main(parse())
