"""Decentralised SGD under a communication budget, and what one global average at its end is worth.

    theta_i <- local SGD steps on client i's own data;    theta_i <- sum_j W_ij theta_j,  W random, r(t) peers a row

"A Single Merging Suffices: Recovering Server-based Learning Performance in Decentralized Learning", arXiv:2507.06542
(ICLR 2026: "On the Surprising Effectiveness of a Single Global Merging in Decentralized Learning"). Symbols: r is
`peers` (others a client hears in a round; 0.2 means one with probability 0.2), r(t) a `Schedule` of the progress
p = step / max_steps, alpha the concentration of the Dirichlet draw of each client's classes, N the clients.

`learner` is the algorithm; `merged` the counterfactual: the mean of all models, measured and not fed back, with the
statistics of BatchNorm estimated anew. `single_merge` is the schedule of the title: sparse gossip, then one round in
which all hear all. `budget` says what a schedule sends.

Differs from the official code: random rows are drawn by `jax.random`, from the same distribution; minibatches of one
round form one stream of reshuffled passes, so that none is smaller than the batch size. Not provided: topologies that
change during a run, validation sets of each client, image augmentation, its transformers, rounds of gossip without
training after the merge.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlab import checks, interop
from jaxlab.decentral import gossip, partition, simulator
from jaxlab.decentral.simulator import Peers
from jaxlab.train import Batch, Learner, Metrics

Kind = Literal["fixed", "linear", "cosine", "slow_decrease", "slow_grow", "truncate", "truncate_v2"]
Topology = Literal["local", "left", "ring", "exponential", "complete"]


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How many peers a client hears in the round that ends at a step.

  Attributes:
    kind: its shape.
    start: peers at the start.
    end: peers at the end.
    max_steps: local steps of the whole run; from there on `end` holds (except for `fixed`).
    point: progress at which `truncate` changes to `end` and `truncate_v2` begins its window of `end`.
    window: length of that window, in progress. Progress is compared in float32, in which windows of one length hold as
      many rounds; in the official code's doubles 0.1 + 0.05 is above 0.15, one round more.
  """

  kind: Kind = "fixed"
  start: float = 0.2
  end: float = 0.2
  max_steps: int = 1
  point: float = 1.0
  window: float = 0.0

  def __post_init__(self) -> None:
    checks.choice("kind", self.kind, Kind)
    for name in ("start", "end", "point", "window"):
      if not 0 <= getattr(self, name) < np.inf:
        raise ValueError(f"{name}: got {getattr(self, name)}, expected a finite number of at least 0")
    checks.count("max_steps", self.max_steps)

  def __call__(self, step: Int[Any, "*t"]) -> Float[Array, "*t"]:
    """r at a number of local steps."""
    p = jnp.asarray(step, jnp.float32) / self.max_steps
    low, gap = self.end, self.start - self.end
    inside = p < self.point + self.window
    r = {
      "fixed": lambda: jnp.full_like(p, self.start),
      "linear": lambda: self.start - gap * p,
      "cosine": lambda: low + 0.5 * gap * (1 + jnp.cos(jnp.pi * p)),
      "slow_decrease": lambda: low + gap * jnp.exp(-10 * p),
      "slow_grow": lambda: self.start + (16 - self.start) * jnp.log10(1 + 9 * p**80),
      "truncate": lambda: jnp.where(p < self.point, self.start, low),
      "truncate_v2": lambda: jnp.where((p >= self.point) & inside, low, self.start),
    }[self.kind]()
    over = (p >= 1) & (self.kind != "fixed")
    return jnp.maximum(jnp.where(over, low, r), 0.0)


def single_merge(clients: int, max_steps: int, steps_per_round: int, *, peers: float = 0.2) -> Schedule:
  """Sparse gossip, and all hear all in the last round only. In the paper 32 clients, 30,000 steps, 100 a round."""
  if steps_per_round < 1 or max_steps % steps_per_round:
    # Otherwise the run would end between two averages, before the dense one.
    raise ValueError(f"steps_per_round: got {steps_per_round}, expected a divisor of {max_steps}, the steps of the run")
  return Schedule("truncate", peers, clients - 1, max_steps, point=1 - 0.5 * steps_per_round / max_steps)


def budget(schedule: Schedule, clients: int, steps_per_round: int, hears: Bool[np.ndarray, "n n"]) -> float:
  """Host. Models that a whole run sends on average: the sum over rounds and clients of min(r, those it may hear)."""
  steps = np.arange(steps_per_round, schedule.max_steps + 1, steps_per_round)
  others = np.asarray(hears, bool) & ~np.eye(clients, dtype=bool)
  return float(np.minimum(np.asarray(schedule(steps))[:, None], others.sum(1)).sum())


class Streams(NamedTuple):
  """The data of N clients as streams, from which each round draws a fresh set; a batch of `learner`.

  Attributes:
    clients: the examples, and in `index` [N, M] a set for the first round; M is the size of each set.
    weights: [N, C] classes in each stream, or None to keep the sets of the first round.
    table: examples of each class, or None.
  """

  clients: partition.Clients
  weights: Float[Any, "n c"] | None
  table: partition.Classes | None


def streams(
  examples: dict[str, np.ndarray], num_clients: int, alpha: float, size: int, *, seed: int, resample: bool = True
) -> Streams:
  """Host. Clients whose classes have Dirichlet(alpha) weights.

  Args:
    examples: `image` and `label` [E], some of each class.
    num_clients: N.
    alpha: concentration; 0.1 in the paper.
    size: examples of a client's set.
    seed: of the weights and sets.
    resample: draw new sets each round, as the paper does, or keep one, drawn without replacement with probability
      proportional to the weight of each example's class.
  """
  labels = np.asarray(examples["label"])
  table = partition.classes(labels)
  weights = partition.class_weights(num_clients, len(table.count), alpha, seed=seed)
  if resample:
    index = np.asarray(partition.draw(jax.random.key(seed), weights, table, size))
    return Streams(partition.clients(examples, list(index)), weights, table)
  if size > len(labels):
    raise ValueError(f"size: got {size}, expected at most the {len(labels)} examples")
  rng, parts = np.random.default_rng(seed), []
  for row in weights.astype(np.float64):
    p = np.maximum(row[labels], 1e-12)  # a client of few classes takes what it must from the others
    parts.append(rng.choice(len(labels), size, replace=False, p=p / p.sum()))
  return Streams(partition.clients(examples, parts), None, None)


def optimizer(
  rate: float = 0.01, *, momentum: float = 0.9, decay: float = 5e-4, clip: float = 1.0
) -> optax.GradientTransformation:
  """The paper's: SGD with momentum; each entry of the gradient is clipped to [-clip, clip], then decay is added."""
  return optax.chain(optax.clip(clip), optax.add_decayed_weights(decay), optax.sgd(rate, momentum=momentum))


def learner(
  local: Learner,
  schedule: Schedule,
  *,
  steps_per_round: int = 100,
  batch_size: int = 128,
  topology: Topology = "complete",
  common: bool = True,
  model: nn.Module | None = None,
  at_once: int = 64,
  test_batch_size: int | None = None,
) -> Learner:
  """The algorithm: local steps on a fresh draw of each stream, then random gossip.

  Args:
    local: the learner of one client, such as `simulator.classifier(model, optimizer(), label_smoothing=0.1)`. Its
      optimizer's state is neither sent nor reset.
    schedule: peers over the run.
    steps_per_round: local steps between averages.
    batch_size: of a step.
    topology: whom a client may hear; `peers` of them are drawn in each round, or all if it has no more.
    common: whether all start from the same weights.
    model: the network of `local`, to estimate the merged model's statistics anew, see `merged`; None to average those
      of the clients.
    at_once: clients evaluated at once.
    test_batch_size: test examples evaluated at once; None for all.

  Returns:
    A learner on `Streams`. Metrics of a round: `loss`, `sent` (models so far), `consensus`; of `evaluate` on a test
    set {"image", "label"}: `accuracy` (mean over clients), `worst`, `merged` and `gap`. With `model` the test set also
    has `batches` [K, B, ...], the training images that `merged` takes.
  """
  if topology not in gossip.TOPOLOGIES:
    raise ValueError(f"topology: got {topology!r}, expected one of {sorted(gossip.TOPOLOGIES)}")
  work = simulator.Work(checks.count("batch_size", batch_size), steps=steps_per_round)

  def init(key: Key[Array, ""], data: Streams) -> Peers:
    return simulator.peers(local, key, data.clients, common=common)

  def step(state: Peers, data: Streams) -> tuple[Peers, Metrics]:
    sets, order, rows = jax.random.split(jax.random.fold_in(state.key, state.round), 3)
    mine, n = data.clients, data.clients.num_clients
    if data.weights is not None and data.table is not None:
      index = partition.draw(sets, jnp.asarray(data.weights), data.table, mine.capacity)
      mine = mine._replace(index=index)
    keys = simulator.client_keys(order, state.round, jnp.arange(n))
    clients, metrics = simulator.train_clients(local, state.clients, mine, keys, work)
    peers = schedule((state.round + 1) * steps_per_round)
    matrix = gossip.random(rows, peers, gossip.TOPOLOGIES[topology](n) > 0)
    clients = simulator.mix(matrix, clients)
    sent = state.sent + gossip.transfers(matrix)
    metrics = {"loss": jnp.mean(metrics["loss"]), "sent": sent, "consensus": gossip.consensus(clients.params)}
    return Peers(state.round + 1, clients, state.key, sent), metrics

  def evaluate(state: Peers, test: Batch) -> Metrics:
    test = dict(test)
    if ("batches" in test) != (model is not None):
      raise ValueError(f"batches: got {sorted(test)} to evaluate on, expected batches with a model, and only then")
    mean = gossip.mean(state.clients.variables) if model is None else merged(model, state, test.pop("batches"))
    own = simulator.evaluate_clients(local, state.clients, test, at_once=at_once, batch_size=test_batch_size)[
      "accuracy"
    ]
    one = simulator.evaluate_model(local, mean, test, batch_size=test_batch_size)["accuracy"]
    return {"accuracy": jnp.mean(own), "worst": jnp.min(own), "merged": one, "gap": one - jnp.mean(own)}

  return Learner(init, step, evaluate)


def merge_all(state: Peers) -> Peers:
  """One global average, for once: every client takes the mean model. Its optimizer goes on as before."""
  n = state.clients.step.shape[0]
  clients = simulator.mix(gossip.complete(n), state.clients)
  return dataclasses.replace(state, clients=clients, sent=state.sent + n * (n - 1))


def merged(
  model: nn.Module, state: Peers, batches: Float[Array, "k b *shape"] | None = None
) -> dict[str, dict[str, Array]]:
  """The mean of all clients' weights as one model.

  Args:
    model: the network. BatchNorm reports what it sees if `momentum` is 0, so a network with statistics must
      have the fields `bn_momentum` and `dropout`.
    state: of `learner`.
    batches: images of training data without augmentation, K minibatches (the paper takes up to 32), from which the
      statistics are estimated anew: the plain mean over minibatches. None keeps the mean of the clients' statistics.
  """
  mean = gossip.mean(state.clients.variables)
  if batches is None or "batch_stats" not in mean:
    return mean
  if not (hasattr(model, "bn_momentum") and hasattr(model, "dropout")):
    raise ValueError(f"model: got a {type(model).__name__}, expected one with the fields bn_momentum and dropout")
  # Statistics of the minibatch alone; dropout would change what the later layers see.
  fresh = model.clone(bn_momentum=0.0, dropout=0.0)

  def statistics(images: Array) -> dict[str, Array]:
    seen = fresh.apply(mean, images, train=True, mutable=["batch_stats"])[1]
    return dict(seen)["batch_stats"]

  seen = jax.lax.map(statistics, jnp.asarray(batches))
  return {**mean, "batch_stats": jax.tree.map(lambda s: jnp.mean(s, axis=0), seen)}


# --------------------------------------------------------------------------------------------------------- its networks

_KAIMING = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class MLP(nn.Module):
  """The paper's MLP: hidden layers with BatchNorm, ReLU and dropout. Images are flattened.

  Attributes:
    num_classes: C.
    hidden: widths.
    dropout: rate behind each hidden layer.
    batch_norm: whether hidden layers are normalised.
    bn_momentum: of the running statistics.
    dtype: of the computation.
    param_dtype: of the weights.
    axis_name: device axis over which BatchNorm averages.
  """

  num_classes: int
  hidden: tuple[int, ...] = (4096, 2048, 1024)
  dropout: float = 0.5
  batch_norm: bool = True
  bn_momentum: float = 0.9
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b ..."], *, train: bool = False) -> Float[Array, "b c"]:
    """Logits [B, C] of images [B, ...]."""
    kind: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = x.reshape(x.shape[0], -1)
    for i, width in enumerate(self.hidden):
      x = nn.Dense(width, kernel_init=_KAIMING, name=f"dense{i}", **kind)(x)
      if self.batch_norm:
        norm = nn.BatchNorm(
          not train, momentum=self.bn_momentum, axis_name=self.axis_name, name=f"norm{i}", **kind
        )  # fmt: skip
        x = norm(x)
      x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
    return nn.Dense(self.num_classes, kernel_init=_KAIMING, name="classifier", **kind)(x)


class ResNet18(nn.Module):
  """ResNet-18 with the stem of small images: a 3x3 convolution of stride 1, no pooling; dropout before the classifier.

  Attributes:
    num_classes: C.
    width: channels of the first stage.
    dropout: rate before the classifier.
    bn_momentum: of the running statistics.
    dtype: of the computation.
    param_dtype: of the weights.
    axis_name: device axis over which BatchNorm averages.
  """

  num_classes: int
  width: int = 64
  dropout: float = 0.1
  bn_momentum: float = 0.9
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b k"]:
    """Logits [B, C] of images [B, H, W, 3]."""
    kind: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def conv(x: Array, name: str, width: int, size: int, stride: int = 1) -> Array:
      pad = (size // 2, size // 2)
      layer = nn.Conv(
        width, (size, size), stride, (pad, pad), use_bias=False, kernel_init=_KAIMING, name=f"{name}_conv", **kind
      )
      norm = nn.BatchNorm(
        not train, momentum=self.bn_momentum, axis_name=self.axis_name, name=f"{name}_norm", **kind
      )  # fmt: skip
      return norm(layer(x))

    x = nn.relu(conv(x, "stem", self.width, 3))
    for stage in range(4):
      for block in range(2):
        width, stride, name = self.width * 2**stage, 2 if stage and not block else 1, f"stage{stage}_block{block}"
        y = nn.relu(conv(x, f"{name}_first", width, 3, stride))
        y = conv(y, f"{name}_second", width, 3)
        x = nn.relu(y + (x if x.shape == y.shape else conv(x, f"{name}_shortcut", width, 1, stride)))
    x = nn.Dropout(self.dropout, deterministic=not train)(jnp.mean(x, axis=(1, 2)))
    return nn.Dense(self.num_classes, name="classifier", **kind)(x)


def from_torch(state_dict: dict[str, Any]) -> dict[str, Any]:
  """Official weights of the MLP with BatchNorm or of the ResNet-18 as flax variables of the class here."""
  rules: dict[str, Any] = {}
  if "conv1.weight" in state_dict:
    convs = {"stem": ("conv1", "bn1")}
    for stage in range(4):
      for block in range(2):
        name, prefix = f"stage{stage}_block{block}", f"layer{stage + 1}.{block}"
        convs[f"{name}_first"] = (f"{prefix}.conv1", f"{prefix}.bn1")
        convs[f"{name}_second"] = (f"{prefix}.conv2", f"{prefix}.bn2")
        if stage and not block:
          convs[f"{name}_shortcut"] = (f"{prefix}.downsample.0", f"{prefix}.downsample.1")
    for name, (conv, norm) in convs.items():
      rules[f"params/{name}_conv"] = interop.conv(conv, bias=False)
      rules[f"params/{name}_norm"] = interop.batch_norm(norm)
    rules["params/classifier"] = interop.dense("fc")
  else:
    # Linear, BatchNorm, ReLU and Dropout of each hidden layer are numbered through.
    layers = sum(name.endswith("running_mean") for name in state_dict)
    for i in range(layers):
      rules[f"params/dense{i}"] = interop.dense(f"model.{4 * i}")
      rules[f"params/norm{i}"] = interop.batch_norm(f"model.{4 * i + 1}")
    rules["params/classifier"] = interop.dense(f"model.{4 * layers}")
  return interop.variables(state_dict, rules)
