"""Training the generator, and choosing the step at which to keep it.

Citation graphs: after every CVAE step the scout, a 2-layer GCN with dropout left on, looks M times at freshly generated
features; the generator whose features it disagrees on least is kept (`uncertainty` at its largest), and the scout is
then fine-tuned on those features. The score needs the M passes at every one of some 1650 steps, which is the cost of
the method. It depends on the scout's output at the labelled nodes alone, so everything the scout touches, generated
features included, is confined to the nodes within two hops of those: the same numbers from 61 % of Cora's rows.

OGB graphs: a fixed number of steps and no scout; `selection(..., passes=0)`.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlab import checks
from jaxlab.graph import layers, sparse, structure
from jaxlab.graph.nets.local_augmentation.cvae import CVAE, negative_elbo, row_normalize
from jaxlab.graph.nets.local_augmentation.networks import official_init
from jaxlab.train.learner import Learner


class Pairs(NamedTuple):
  """All that training the generator reads.

  T labelled nodes have n1 nodes within one hop and n2 within two.

  Attributes:
    features: [N, F] as in the data; neighbours and centres of a batch are rows of it.
    senders: [E] the neighbours; receivers: [E] the centres.
    nodes: [n2] ids of the nodes that the scout sees.
    condition: [n2, F] their features; normalized: the same row-normalised. Both sparse or both dense.
    first: [n1, n2] part of the normalised adjacency; second: [T, n1] likewise.
    labels: [T] classes of the labelled nodes.
  """

  features: Float[Array, "n f"]
  senders: Int[Array, " e"]
  receivers: Int[Array, " e"]
  nodes: Int[Array, " n2"]
  condition: layers.Features
  normalized: layers.Features
  first: sparse.Operator
  second: sparse.Operator
  labels: Int[Array, " t"]


def pairs(
  features: Float[np.ndarray, "n f"] | scipy.sparse.sparray,
  senders: Int[np.ndarray, " e"],
  receivers: Int[np.ndarray, " e"],
  labels: Int[np.ndarray, " n"],
  train: Bool[np.ndarray, " n"],
) -> Pairs:
  """Host. From the arrays of a `data.NodeDataset`.

  Args:
    features: dense, or any scipy matrix; as in the data, not row-normalised.
    senders: both directions of every edge, once.
    receivers: likewise.
    labels: class of each node.
    train: labelled nodes.

  Raises:
    ValueError: on what `structure.from_edges` refuses, no edges, or no labelled node or one without a class.
  """
  if not len(senders):
    raise ValueError("senders: got no edges, expected at least one pair to learn from")
  if not np.any(train) or (labels[train] < 0).any():
    raise ValueError(f"train: got {int(np.sum(train))} nodes, expected at least one and each with a class")
  issparse = scipy.sparse.issparse(features)
  x: Any = scipy.sparse.csr_array(features).astype("float32") if issparse else np.asarray(features, "float32")
  graph = structure.from_edges(senders, receivers, num_nodes=len(labels), nodes=labels)
  adjacency = scipy.sparse.csr_array(structure.to_scipy(structure.normalize(graph)))
  targets = np.flatnonzero(train)
  hidden = np.unique(adjacency[targets].indices)
  nodes = np.unique(adjacency[hidden].indices)
  rows = x[nodes]
  total = np.asarray(rows.sum(axis=1)).reshape(-1)
  scale = np.divide(1, total, out=np.zeros_like(total), where=total != 0)
  if issparse:
    condition = sparse.from_scipy(rows)
    normalized = sparse.from_scipy(scipy.sparse.diags_array(scale) @ rows)
  else:
    condition, normalized = rows, rows * scale[:, None]
  made: Any = (
    x.toarray() if issparse else x,
    graph.senders,
    graph.receivers,
    nodes.astype("int32"),
    condition,
    normalized,
    sparse.from_scipy(adjacency[hidden][:, nodes]),
    sparse.from_scipy(adjacency[targets][:, hidden]),
    np.asarray(labels, "int32")[targets],
  )
  return Pairs(*jax.tree.map(jnp.asarray, made))


class Scout(nn.Module):
  """2-layer GCN on the neighbourhood of the labelled nodes, dropout always on: logits [T, C] of features [n2, F].

  Attributes:
    num_classes: C.
    hidden: width.
    dropout: rate on the input and on the hidden layer.
  """

  num_classes: int
  hidden: int = 32
  dropout: float = 0.5

  @nn.compact
  def __call__(
    self, first: sparse.Operator, second: sparse.Operator, x: layers.Features
  ) -> Float[Array, "t num_classes"]:
    """`first` [n1, n2] and `second` [T, n1] are parts of the normalised adjacency; stream "dropout"."""
    h = layers.GCNConv(self.hidden, name="first")(first, layers.Dropout(self.dropout)(x, train=True))
    dropped = layers.Dropout(self.dropout, relu=True)(h, train=True)
    return layers.GCNConv(self.num_classes, name="second")(second, dropped)


def uncertainty(logits: Float[Array, "m t c"], labels: Int[Array, " t"]) -> Float[Array, ""]:
  """U = NLL(log mean_m p_m) - mean_m NLL(log p_m), at the labels: never above 0, and 0 where all passes agree.

  By Jensen's inequality: the log of a mean is at least the mean of logs. The paper calls U a mutual information, large
  where the model is uncertain; the official code, followed here, keeps the generator whose U is largest, that is whose
  passes disagree least on the probability of the true class.

  Args:
    logits: M passes over T labelled nodes.
    labels: [T] classes.
  """
  log_p = jax.nn.log_softmax(logits.astype("float32"))[:, jnp.arange(labels.shape[0]), labels]  # [M, T]
  return jnp.mean(jnp.mean(log_p, 0) - (jax.nn.logsumexp(log_p, 0) - jnp.log(log_p.shape[0])))


class State(NamedTuple):
  """Of the selection learner. `best` are the stored variables of the generator, `best_key` draws its z [N, Z].

  While `best_step` is 0 none has been stored and `best` are the initial ones.
  """

  step: Int[Array, ""]
  key: Key[Array, ""]
  variables: Any
  moments: Any
  scout: Any
  scout_moments: Any
  score: Float[Array, ""]  # largest U so far
  best: Any
  best_key: Key[Array, ""]
  best_step: Int[Array, ""]


def selection(
  cvae: CVAE,
  num_classes: int,
  *,
  learning_rate: float = 0.01,
  batch_size: int = 64,
  passes: int = 100,
  warmup: int = 200,
  scout_epochs: int = 100,
  finetune_epochs: int = 20,
  scout_learning_rate: float = 0.01,
  scout_l2: float = 5e-4,
  steps_per_call: int = 5,
  passes_together: int = 4,
) -> Learner:
  """Trains a generator on all edges of `Pairs`; `State.best` is the one to use.

  Pairs come in a new order each pass over the edges, the last batch of a pass being what is left. Before the first step
  the scout is trained on the real features. `State.score` rises during the warm-up too, without a generator being
  stored, as in the official code: with little training and no later step above it, none is.

  Args:
    cvae: the network.
    num_classes: C.
    learning_rate: of Adam, for the generator.
    batch_size: B edges.
    passes: M of the scout at each step. 0: no scout, `best` is the last step's (OGB).
    warmup: steps before the first generator may be stored.
    scout_epochs: on the real features.
    finetune_epochs: on the generated ones, each time a generator is stored.
    scout_learning_rate: of Adam.
    scout_l2: L2 term of the scout.
    steps_per_call: steps of the generator in one step of the learner, in one compiled loop.
    passes_together: how many of the M passes are computed at once: time against memory.
  """
  for name, value, low in (("batch_size", batch_size, 1), ("passes", passes, 0), ("warmup", warmup, 0),
                           ("finetune_epochs", finetune_epochs, 0), ("steps_per_call", steps_per_call, 1)):  # fmt: skip
    checks.count(name, value, low)
  if cvae.continuous and passes:
    raise ValueError(f"passes: got {passes} for a continuous generator, expected 0: the scout is for bags of words")
  scout = Scout(num_classes)
  tx = optax.adam(learning_rate)
  scout_tx = optax.chain(optax.add_decayed_weights(scout_l2), optax.adam(scout_learning_rate))

  def init(key: Key[Array, ""], batch: Pairs) -> State:
    key, cvae_key, scout_key, best_key = jax.random.split(key, 4)
    row = jnp.zeros((1, cvae.features))
    variables = dict(cvae.init(cvae_key, row, row, jnp.zeros((1, cvae.latent))))
    params = scout.init(
      {"params": scout_key, "dropout": scout_key}, batch.first, batch.second, jnp.zeros(batch.normalized.shape)
    )["params"]
    params = official_init(scout_key, params)
    zero = jnp.zeros((), "int32")
    moments = tx.init(variables["params"])
    return State(
      zero, key, variables, moments, params, scout_tx.init(params), jnp.float32(-jnp.inf), variables, best_key, zero
    )

  def stream(state, number, step):
    """Key of one use of randomness at one step."""
    return jax.random.fold_in(jax.random.fold_in(state.key, number), step)

  def look(params, batch, x, key):
    return scout.apply({"params": params}, batch.first, batch.second, x, rngs={"dropout": key})

  def train_scout(params, moments, batch, x, key, epochs):
    def epoch(carry, key):
      params, moments = carry

      def loss(params):
        each = optax.losses.softmax_cross_entropy_with_integer_labels(look(params, batch, x, key), batch.labels)
        return jnp.mean(each)

      updates, moments = scout_tx.update(jax.grad(loss)(params), moments, params)
      return (optax.apply_updates(params, updates), moments), None

    return jax.lax.scan(epoch, (params, moments), jax.random.split(key, epochs))[0]

  def score(params, batch, x, key):
    keys = jax.random.split(key, passes)
    logits = jax.lax.map(lambda k: look(params, batch, x, k), keys, batch_size=min(passes_together, passes))
    return uncertainty(logits, batch.labels)

  def update(state, batch):
    """One Adam step on the next B edges."""
    edges = batch.senders.shape[0]
    per_pass = -(-edges // batch_size)
    order_key = stream(state, 0, state.step // per_pass)
    order = jax.random.permutation(order_key, edges)
    place = state.step % per_pass * batch_size + jnp.arange(batch_size)
    chosen = order[jnp.minimum(place, edges - 1)]
    mask = place < edges
    x, condition = batch.features[batch.senders[chosen]], batch.features[batch.receivers[chosen]]
    noise = jax.random.normal(stream(state, 1, state.step), (batch_size, cvae.latent))
    statistics = {name: value for name, value in state.variables.items() if name != "params"}

    def objective(params):
      posterior, updated = cvae.apply(
        {"params": params, **statistics}, x, condition, noise, train=True, mask=mask, mutable=list(statistics)
      )
      return negative_elbo(posterior, x, continuous=cvae.continuous, mask=mask), dict(updated)

    (loss, statistics), gradient = jax.value_and_grad(objective, has_aux=True)(state.variables["params"])
    updates, moments = tx.update(gradient, state.moments)
    params = optax.apply_updates(state.variables["params"], updates)
    state = state._replace(step=state.step + 1, variables={"params": params, **statistics}, moments=moments)
    return state, loss

  def select(state, batch):
    """Scores the generator as it is, and keeps it if it is the best."""
    z_key, passes_key, tune_key = jax.random.split(stream(state, 2, state.step), 3)
    # z is drawn for every node, so that `best_key` gives the whole matrix that the score was of.
    z = jax.random.normal(z_key, (batch.features.shape[0], cvae.latent))[batch.nodes]
    x = row_normalize(cvae.apply(state.variables, z, batch.condition, method=CVAE.decode))
    value = score(state.scout, batch, x, passes_key)
    better = value > state.score
    state = state._replace(score=jnp.where(better, value, state.score))

    def keep(state):
      params, moments = train_scout(state.scout, state.scout_moments, batch, x, tune_key, finetune_epochs)
      return state._replace(
        scout=params, scout_moments=moments, best=state.variables, best_key=z_key, best_step=state.step
      )

    warm = state.step <= warmup
    return jax.lax.cond(better & ~warm, keep, lambda state: state, state), value

  def advance(state, batch):
    state, loss = update(state, batch)
    if not passes:
      return state._replace(best=state.variables, best_step=state.step), (loss, jnp.zeros(()))
    state, value = select(state, batch)
    return state, (loss, value)

  def step(state: State, batch: Pairs) -> tuple[State, dict[str, Array]]:
    if passes:

      def prepare(state):
        key = stream(state, 3, 0)
        params, moments = train_scout(state.scout, state.scout_moments, batch, batch.normalized, key, scout_epochs)
        return state._replace(scout=params, scout_moments=moments)

      state = jax.lax.cond(state.step == 0, prepare, lambda state: state, state)
    state, (losses, values) = jax.lax.scan(lambda s, _: advance(s, batch), state, length=steps_per_call)
    return state, {"loss": jnp.mean(losses), "score": jnp.max(values), **evaluate(state, batch)}

  def evaluate(state: State, batch: Pairs) -> dict[str, Array]:
    del batch
    return {"best_score": state.score, "best_step": state.best_step}

  return Learner(init, step, evaluate)
