"""How far from the truth are bounds of a local Lipschitz constant, as the radius grows?

    python experiments/local_lipschitz.py                                  # perceptrons on digits, minutes
    python experiments/local_lipschitz.py --model cnn
    python experiments/local_lipschitz.py --dataset leaders                # the paper's synthetic set
    python experiments/local_lipschitz.py --preset paper                   # MNIST (5k subset), 50 images

Networks are trained as in the paper's code (Adam, 0.001, batches of 256, cross-entropy). Around test images each method
bounds the largest l1 norm of an output's gradient, which is the constant from l_inf to l_inf; below it stands the
largest norm that was found at random points and corners of the box. Branch and bound runs at one radius. Then a million
points in boxes of random networks, dense and convolutional, are held against their bounds. On tabular data, features
are certified as monotone. All bounds are computed in float64.
"""

import dataclasses
import functools
import json
import pathlib
import time
import zlib
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import sklearn.datasets
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxlab import checks, memory, train
from jaxlab.analysis import local_lipschitz as ll
from jaxlab.data import digits, mnist5k
from jaxlab.train import command
from jaxlab.train.result import finished_result, once, print_metrics, settings

CHUNK = 2000  # points whose gradients are computed at once
KINDS, NETS, BOXES = ("mlp", "cnn"), 20, 5  # random networks of each kind, and boxes in each, for the million points
MARGIN = 1e-9  # relative, for roundoff of float64


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  dataset: Literal["digits", "leaders", "mnist5k"] = "digits"
  """digits ships with scikit-learn; leaders is synthetic: points labelled by the nearest of some."""
  model: Literal["mlp", "cnn"] = "mlp"
  """mlp: two hidden layers; cnn: two convolutions, for images."""
  width: int = 20
  """Neurons of a hidden layer; channels are two fifths of it."""
  seeds: int = 3
  """Networks."""
  epochs: int = 60
  """Passes over the training set."""
  images: int = 4
  """Test images for each network."""
  radii: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
  """Of the boxes, which are clipped to [0, 1], in pixels of that range."""
  search_radius: float = 0.2
  """Of the boxes for branch and bound."""
  timeout: float = 3.0
  """Seconds of branch and bound for each image."""
  points: int = 10_000
  """Random points of each box."""
  soundness_points: int = 1_000_000
  """Random points in boxes of random networks."""
  preset: Literal["demo", "paper"] = "demo"
  """Where the defaults of all other options come from. paper: MNIST (5k subset), 784-20-20-10, 10 epochs, 50 images, a
  minute of branch and bound for each."""
  workdir: pathlib.Path = pathlib.Path("runs/local_lipschitz")
  """Each setting has a folder in here with figure and result.json; a second run reports."""


PRESETS = {
  "demo": Config(),
  "paper": Config(dataset="mnist5k", width=20, seeds=1, epochs=10, images=50, timeout=60.0, preset="paper"),
}
parse = command.parser(PRESETS, __doc__)


class MLP(nn.Module):
  """Two hidden layers."""

  width: int
  classes: int = 10

  @nn.compact
  def __call__(self, x, *, train=False):
    """Inputs [B, ...] -> logits [B, C]."""
    x = x.reshape(len(x), -1)
    for _ in range(2):
      x = nn.relu(nn.Dense(self.width)(x))
    return nn.Dense(self.classes)(x)


class CNN(nn.Module):
  """Two convolutions without padding, the second with stride 2."""

  width: int

  @nn.compact
  def __call__(self, x, *, train=False):
    """Images [B, H, W, C] -> logits [B, 10]."""
    channels = 2 * self.width // 5
    x = nn.relu(nn.Conv(channels, (3, 3), padding="VALID")(x))
    x = nn.relu(nn.Conv(channels, (3, 3), strides=2, padding="VALID")(x))
    return nn.Dense(10)(x.reshape(len(x), -1))


def chain(params: dict[str, Any]) -> tuple[ll.Dense | ll.Conv, ...]:
  """The trained network for `local_lipschitz`, in float64; for an image [H, W, C], which an MLP flattens too."""
  wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), "float64"), params)
  convolutions = [
    ll.Conv(**wide[name], strides=(1 + i, 1 + i), padding="VALID")
    for i, name in enumerate(sorted(n for n in wide if n.startswith("Conv")))
  ]
  return (*convolutions, *(ll.Dense(**wide[name]) for name in sorted(n for n in wide if n.startswith("Dense"))))


def leaders(count: int = 10_000, dim: int = 16, classes: int = 10) -> dict[str, dict[str, np.ndarray]]:
  """Uniform points of the unit cube, labelled as the nearest of 5 dim leaders are, at random; 70 % to train."""
  rng = np.random.default_rng(0)
  x = rng.uniform(size=(count, dim)).astype("float32")
  chosen, labels = rng.choice(count, 5 * dim, replace=False), rng.integers(0, classes, 5 * dim)
  nearest = ((x[:, None] - x[chosen]) ** 2).sum(2).argmin(1)
  y, cut = labels[nearest].astype("int32"), int(0.7 * count)
  return {"train": {"image": x[:cut], "label": y[:cut]}, "test": {"image": x[cut:], "label": y[cut:]}}


def load(config: Config) -> dict[str, Any]:
  """Sets to train and test on."""
  if config.dataset == "leaders":
    return leaders()
  splits = (digits if config.dataset == "digits" else mnist5k).images()
  return {"train": splits.train, "test": splits.test}


def fitted(model: nn.Module, sets: dict[str, Any], config: Config, seed: int, folder: pathlib.Path, learner) -> Any:
  """A trained state, and its test accuracy (%)."""
  count, size = len(sets["train"]["label"]), 256
  steps = max(1, count // size)

  def batch(step):
    order = np.random.default_rng([seed, step // steps]).permutation(count)
    return {k: a[order[step % steps * size :][:size]] for k, a in sets["train"].items()}

  state = train.fit(
    learner, batch, steps=config.epochs * steps, workdir=folder / f"seed{seed}", key=jax.random.key(seed),
    save_every=config.epochs * steps, keep=1, tensorboard=False, config={"model": str(model), "epochs": config.epochs},
  )  # fmt: skip
  return state, 100 * float(learner.evaluate(state, sets["test"])["accuracy"])


# ------------------------------------------------------------------------------------------------ bounds and the truth


@jax.jit
def bounds(network, boxes: ll.Bounds) -> dict[str, Float[Array, "b c"]]:
  """Of every output, for a batch of boxes, from loose to tight; and what the search starts from."""

  def one(box):
    interval = ll.forward(network, box, method="interval")
    crown = ll.forward(network, box)
    return {
      "interval arithmetic": ll.lipschitz(network, interval, method="interval"),
      "RecurJac": ll.lipschitz(network, crown, method="recurjac"),
      "Lip-CROWN": ll.lipschitz(network, crown),
      "Lip-CROWN, alpha": ll.lipschitz(network, ll.optimize(network, box)),
    }

  return jax.vmap(one)(boxes)


METHODS = ("interval arithmetic", "RecurJac", "Lip-CROWN", "Lip-CROWN, alpha")
GLOBAL, SAMPLED = "product of norms", "largest at random points"


@functools.partial(jax.jit, static_argnames="points")
def sampled(network, box: ll.Bounds, key: PRNGKeyArray, points: int) -> Float[Array, " c"]:
  """The largest l1 norm of each output's gradient at random points of a box, half of them corners."""

  def chunk(key):
    share_key, corner_key = jax.random.split(key)
    share = jax.random.uniform(share_key, (CHUNK, *box.lower.shape), box.lower.dtype)
    corner = jax.random.bernoulli(corner_key, 0.5, (CHUNK,) + (1,) * box.lower.ndim)
    x = box.lower + jnp.where(corner, jnp.round(share), share) * (box.upper - box.lower)
    slopes = jax.vmap(jax.jacrev(functools.partial(ll.apply, network)))(x)
    return jnp.abs(slopes).sum(tuple(range(2, slopes.ndim))).max(0)

  return jax.lax.map(chunk, jax.random.split(key, -(-points // CHUNK))).max(0)


def around(config: Config, network, images: np.ndarray, seed: int) -> dict[str, np.ndarray]:
  """The local constants [radii, images], by every method; the largest over outputs."""
  found: dict[str, list] = {name: [] for name in (*METHODS, SAMPLED)}
  for i, radius in enumerate(config.radii):
    boxes = ll.box(jnp.asarray(images, "float64"), radius, clip=(0, 1))
    for name, values in bounds(network, boxes).items():
      found[name].append(np.asarray(values.max(1)))
    keys = jax.random.split(jax.random.key(1000 * seed + i), len(images))
    points = jax.lax.map(lambda a: sampled(network, a[0], a[1], config.points).max(), (boxes, keys))
    found[SAMPLED].append(np.asarray(points))
  return {name: np.array(values) for name, values in found.items()}


def search(config: Config, network, images: np.ndarray) -> list[dict[str, Any]]:
  """Branch and bound around each image, from the bounds of alpha."""
  searches = []
  optimize = jax.jit(ll.optimize)
  for image in images:
    found = optimize(network, ll.box(jnp.asarray(image, "float64"), config.search_radius, clip=(0, 1)))
    ll.branch_and_bound(network, found, only_largest=True, max_cases=11)  # compiles: one batch after the ten roots
    searches.append(ll.branch_and_bound(network, found, only_largest=True, timeout=config.timeout)._asdict())
  return searches


@jax.enable_x64(True)
def soundness(points: int) -> dict[str, float]:
  """Random points against the bounds of random networks."""

  def make(seed: int, kind: str):
    rng = np.random.default_rng([seed, kind == "cnn"])
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / np.prod(shape[:-1]) ** 0.5)
    if kind == "cnn":
      convolutions = ll.Conv(draw(3, 3, 2, 4), draw(4), (2, 2)), ll.Conv(draw(3, 3, 4, 5), draw(5), padding="VALID")
      return (*convolutions, ll.Dense(draw(20, 8), draw(8)), ll.Dense(draw(8, 3), draw(3))), (8, 8, 2)
    return tuple(ll.Dense(draw(i, o), draw(o)) for i, o in ((12, 20), (20, 16), (16, 10), (10, 4))), (12,)

  each = -(-points // (len(KINDS) * NETS * BOXES * CHUNK)) * CHUNK
  counted = below = looser = 0
  closest, gains = np.inf, []
  for kind in KINDS:
    for seed in range(NETS):
      network, shape = make(seed, kind)
      rng = np.random.default_rng(seed)
      centres, radii = rng.uniform(size=(BOXES, *shape)), np.geomspace(0.005, 0.3, BOXES)
      boxes = ll.box(centres, radii.reshape(-1, *[1] * len(shape)))
      found = {name: np.asarray(values) for name, values in bounds(network, boxes).items()}
      keys = jax.random.split(jax.random.key(seed), BOXES)
      for b in range(BOXES):
        norm = np.asarray(sampled(network, jax.tree.map(lambda a, b=b: a[b], boxes), keys[b], each))
        counted += each
        tightest = np.min([values[b] for values in found.values()], 0)
        below += int((tightest < norm * (1 - MARGIN)).sum())
        closest = min(closest, float((tightest / norm)[norm > 0].min()))
      looser += int((found["Lip-CROWN"] > found["RecurJac"] * (1 + MARGIN)).sum())
      gains.append(100 * (1 - found["Lip-CROWN"] / found["RecurJac"]).mean())
  return {
    "points in boxes of random networks": counted,
    "outputs whose gradient norm was above a bound": below,
    "smallest ratio of a bound to the norms in its box": closest,
    "bounds looser than RecurJac's": looser,
    "Lip-CROWN below RecurJac on random networks (%)": float(np.mean(gains)),
  }


def monotone(config: Config, folder: pathlib.Path) -> dict[str, Any]:
  """Share (%) of features and patients of scikit-learn's breast cancer data that are certified as monotone."""
  table = sklearn.datasets.load_breast_cancer()
  low, high = table.data.min(0), table.data.max(0)
  x, y = ((table.data - low) / (high - low)).astype("float32"), table.target.astype("int32")
  metrics: dict[str, list[float]] = {}
  model = MLP(config.width, 2)
  learner = train.supervised(model, train.cross_entropy(), optax.adam(0.001))
  learner = learner._replace(step=jax.jit(learner.step, donate_argnums=0), evaluate=jax.jit(learner.evaluate))
  for seed in range(config.seeds):
    order = np.random.default_rng(seed).permutation(len(y))
    sets = {n: {"image": x[o], "label": y[o]} for n, o in (("train", order[:400]), ("test", order[400:]))}
    state, accuracy = fitted(model, sets, dataclasses.replace(config, epochs=200), seed, folder / "tabular", learner)
    with jax.enable_x64(True):
      network, patients = chain(state.params), jnp.asarray(sets["test"]["image"][:50], "float64")
      values = {"none contradicted on a grid": uncontradicted(network, patients)}
      values |= {method: certify(network, patients, method) != 0 for method in TABULAR}
    for name, value in values.items():
      metrics.setdefault(f"monotone in a feature (%), {name}", []).append(100 * float(np.mean(value)))
    metrics.setdefault("test accuracy (%), tabular", []).append(accuracy)
  return metrics


@functools.partial(jax.jit, static_argnames="method")
def certify(network, x: Float[Array, "p f"], method: str) -> Int[Array, "p f"]:
  """Directions of the second output, for every feature of every row."""
  return jax.vmap(lambda row: ll.monotonicity(network, row, range(x.shape[1]), method=method).direction)(x)


@jax.jit
def uncontradicted(network, x: Float[Array, "p f"]) -> Bool[Array, "p f"]:
  """Whether the derivative has one sign at 101 values of the feature: no bound can certify more."""

  def slopes(row, feature):
    at = lambda value: jax.grad(lambda z: ll.apply(network, z)[1])(row.at[feature].set(value))[feature]
    return jax.vmap(at)(jnp.linspace(0, 1, 101))

  found = jax.vmap(jax.vmap(slopes, (None, 0)), (0, None))(x, jnp.arange(x.shape[1]))
  return (found >= 0).all(2) | (found <= 0).all(2)


TABULAR = ("lip_crown", "recurjac", "interval")


# ---------------------------------------------------------------------------------------------------------------- main


def draw(config: Config, constants: dict[str, np.ndarray], searches: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Constants [seeds, radii, images] against the radius, and bounds of the searches against time."""
  figure, (axes,) = train.figures.subplots(1, 2)
  radii = np.array(config.radii)
  for name in (GLOBAL, *METHODS, SAMPLED):
    values = constants[name].mean(2)
    line = axes[0].plot(radii, values.mean(0), label=name, marker=".", ls="--" if name in (GLOBAL, SAMPLED) else "-")
    axes[0].fill_between(radii, values.min(0), values.max(0), color=line[0].get_color(), alpha=0.15)
  axes[0].set(
    xscale="log", yscale="log", xlabel="radius (pixel values are 0 to 1)", title=f"{config.dataset}, {config.model}"
  )
  axes[0].set_ylabel("local Lipschitz constant, $l_\\infty$ to $l_\\infty$")
  axes[0].legend(fontsize=7)
  for found in searches:
    seconds, _, bound = np.array(found["history"]).T
    axes[1].step(seconds, bound / bound[0], where="post", color=train.figures.COLORS[0], alpha=0.5, lw=1)
  axes[1].set(xlabel="branch and bound (s)", ylabel="bound over Lip-CROWN with alpha")
  axes[1].set_title(f"radius {config.search_radius:g}, one line an image")
  train.figures.save(figure, path)


def measure(config: Config, folder: pathlib.Path) -> dict[str, Any]:
  """Metrics, one value for each seed where they vary; draws the figure."""
  sets = load(config)
  # Every network has test images of its own.
  checks.count("images", config.images, 1, len(sets["test"]["label"]) // config.seeds)
  parts = folder / f"parts-{zlib.crc32(json.dumps(settings(config)).encode()):08x}"  # of these settings alone
  model = MLP(config.width) if config.model == "mlp" else CNN(config.width)
  learner = train.supervised(model, train.cross_entropy(), optax.adam(0.001))
  learner = learner._replace(step=jax.jit(learner.step, donate_argnums=0), evaluate=jax.jit(learner.evaluate))
  constants: dict[str, list] = {name: [] for name in (GLOBAL, *METHODS, SAMPLED)}
  accuracy, searches = [], []

  def study(seed):
    """One network."""
    state, percent = fitted(model, sets, config, seed, folder, learner)
    images = sets["test"]["image"][seed * config.images :][: config.images]
    with jax.enable_x64(True):
      network = chain(state.params)
      found = around(config, network, images, seed)
      found[GLOBAL] = np.full_like(found[SAMPLED], ll.global_bound(network))
      return {"accuracy": percent, "constants": found, "searches": search(config, network, images)}

  for seed in range(config.seeds):
    found = once(parts / f"seed{seed}.json", functools.partial(study, seed))
    accuracy.append(found["accuracy"])
    searches.append(found["searches"])
    for name, values in found["constants"].items():
      constants[name].append(values)
    rich.print(f"seed {seed}: accuracy {accuracy[-1]:.1f} %, images of {config.dataset} done")
  arrays = {name: np.array(values) for name, values in constants.items()}  # [seeds, radii, images]
  draw(config, arrays, sum(searches, []), folder / "figure.png")
  metrics: dict[str, Any] = {"test accuracy (%)": accuracy}
  for i, radius in enumerate(config.radii):
    metrics |= {f"{name}, radius {radius:g}": list(arrays[name][:, i].mean(1)) for name in (*METHODS, SAMPLED)}
  metrics[GLOBAL] = list(arrays[GLOBAL][:, 0, 0])
  tight, recurjac = arrays["Lip-CROWN"], arrays["RecurJac"]
  metrics["Lip-CROWN below RecurJac (%), mean over radii"] = list(100 * (1 - tight / recurjac).mean((1, 2)))
  metrics["Lip-CROWN below RecurJac (%), at the best radius"] = list(100 * (1 - tight / recurjac).mean(2).max(1))
  metrics["below the largest gradient at random points"] = int(
    sum((arrays[name] < arrays[SAMPLED] * (1 - MARGIN)).sum() for name in METHODS)
  )
  drop = [[100 * (1 - s["history"][-1][2] / s["history"][0][2]) for s in some] for some in searches]
  metrics["branch and bound below its start (%)"] = list(np.mean(drop, 1))
  metrics["branch and bound, searches that ended (%)"] = [
    100 * np.mean([s["complete"] for s in some]) for some in searches
  ]
  metrics["branch and bound, cases per second"] = [
    np.mean([s["cases"] / s["history"][-1][0] for s in some]) for some in searches
  ]
  metrics["branch and bound, steps upwards"] = int(
    sum((np.diff(np.array(s["history"])[:, 2]) > 0).sum() for s in sum(searches, []))
  )
  metrics |= once(parts / "random.json", lambda: soundness(config.soundness_points))
  rich.print("random networks done")
  return metrics | once(parts / "tabular.json", lambda: monotone(config, folder))


def main(config: Config) -> None:
  """Runs the experiment, or shows a finished one."""
  for name in ("width", "seeds", "epochs", "images", "points", "soundness_points"):
    checks.count(name, getattr(config, name))
  if not config.radii:
    raise ValueError("radii: got none, expected at least one")
  if config.model == "cnn" and config.dataset == "leaders":
    raise ValueError("model: got cnn, expected mlp for leaders, which are no images")
  memory.keep()
  folder = config.workdir / f"{config.dataset}-{config.model}-{config.width}-{config.preset}"
  record = settings(config)
  if result := finished_result(folder, record):
    return print_metrics(result)
  start = time.perf_counter()
  metrics = measure(config, folder)
  train.report(
    folder,
    system="local_lipschitz",
    claim="Sound, and between RecurJac and what random points reach; branch and bound closes part of the gap.",
    dataset={"digits": "digits", "leaders": "nearest leaders, synthetic", "mnist5k": "MNIST (5k subset)"}[
      config.dataset
    ],
    config=record,
    metrics=metrics,
    published={},
    seed=list(range(config.seeds)),
    wall_time=time.perf_counter() - start,
  )


if __name__ == "__main__":
  main(parse())
