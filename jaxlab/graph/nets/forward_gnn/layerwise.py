"""Algorithms that train one layer after the other: SF, FF-LA, FF-VN, and the forward learning of links.

A trained layer is frozen, and what it computes becomes the input of the next: nothing of a layer is kept but its
parameters and its last output, so that memory does not grow with depth.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxlab.graph.nets.forward_gnn import engine
from jaxlab.graph.nets.forward_gnn.convolution import (
  Bordered,
  Conv,
  Features,
  apply,
  frozen_aggregate,
  normalize,
  squared_norm,
  stack,
)
from jaxlab.graph.nets.forward_gnn.engine import Method, Net, Recipe, State, classes_of, init_layer
from jaxlab.graph.nets.forward_gnn.tasks import LinkTask, NodeTask, Pairs, View
from jaxlab.train.learner import Metrics


class Streams(NamedTuple):
  """The input of a layer on one graph, or on K graphs with other links or features.

  Attributes:
    graph: its links [N, C], or [K, N, C].
    blocks: of features; dense ones [N + C, F], or [K, N + C, F].
  """

  graph: Bordered
  blocks: list[Features]

  def map(self, function: Callable[[Bordered, list[Features], Any], Any], extra: Any = None) -> Any:
    """`function(graph, blocks, extra)` on each of the K graphs; what they share is computed once."""
    axis = lambda x: 0 if getattr(x, "ndim", 0) == 3 else None
    graph, blocks = self.graph, [axis(x) for x in self.blocks]
    extras = None if extra is None else [axis(x) for x in extra]
    call = lambda links, blocks, extra: function(self.graph._replace(links=links), blocks, extra)
    if 0 not in (axis(graph.links), *blocks):
      return call(graph.links, self.blocks, extra)
    return jax.vmap(call, (axis(graph.links), blocks, extras))(graph.links, self.blocks, extra)


class Algorithm(NamedTuple):
  """A layer-wise algorithm, for one split.

  Attributes:
    draw: (key, task) -> what is drawn once before training.
    train: (task, drawn) -> input of the first layer in training.
    query: (task, drawn, view) -> input of the first layer in prediction.
    loss: (outputs of a layer, task, drawn) -> its loss.
    score: (outputs in prediction, task, view) -> what is summed over layers.
    carry: outputs in training -> what of them the next layer is trained on.
    shared_query: whether validation sees the input of training, and so needs no pass of its own.
  """

  draw: Callable[[Array, Any], Any]
  train: Callable[[Any, Any], Streams]
  query: Callable[[Any, Any, View], Streams]
  loss: Callable[[Array, Any, Any], Array]
  score: Callable[[Array, Any, View], Array]
  carry: Callable[[Array], Array]
  shared_query: bool


class LayerRun(NamedTuple):
  """State of a split.

  Attributes:
    params: of each layer, under `layer_0`, `layer_1`, ...; after a layer's training its best ones.
    moments: of each layer's optimizer.
    best, score, waited, stopped, loss: as `engine.Progress`, of the layer in training.
    drawn: what is fixed before training.
    hidden: outputs in training of the layer below the one in training.
    queried: its outputs in validation, if those are others.
    scores: sum of the frozen layers' scores in validation.
  """

  params: dict[str, Any]
  moments: dict[str, Any]
  best: dict[str, Any]
  score: Float[Array, ""]
  waited: Int[Array, ""]
  stopped: Bool[Array, ""]
  loss: Float[Array, ""]
  drawn: Any
  hidden: Array
  queried: Any
  scores: Array


def forward(conv: Conv, params: Any, streams: Streams, aggregated: Any = None) -> Float[Array, "*k nc h"]:
  """Z = ReLU(conv(x))."""
  return streams.map(lambda *given: jax.nn.relu(apply(conv, params, *given)), aggregated)


def above(streams: Streams, z: Float[Array, "*k nc h"]) -> Streams:
  """The input of the next layer, n(z) on the same graph."""
  return streams._replace(blocks=[normalize(z) if z.ndim == 2 else jax.vmap(normalize)(z)])


def outputs(net: Net, params: dict[str, Any], streams: Streams) -> list[Float[Array, "*k nc h"]]:
  """Z_l = ReLU(conv_l(n(Z_{l-1}))) of every layer; `streams` is the input of the first one, normalised."""
  hidden: list[Array] = []
  for i in range(net.depth):
    streams = above(streams, hidden[-1]) if hidden else streams
    hidden.append(forward(net.conv(), params[f"layer_{i}"], streams))
  return hidden


def method(net: Net, algorithm: Algorithm, recipe: Recipe) -> Method:
  """Trains layers one after the other."""
  recipe.check()
  tx, conv = recipe.optimizer(), net.conv()
  names = [f"layer_{i}" for i in range(net.depth)]

  def init(key: Array, task: Any) -> LayerRun:
    key, draw = jax.random.split(key)
    drawn = algorithm.draw(draw, task)
    streams, query = algorithm.train(task, drawn), algorithm.query(task, drawn, "validation")
    widths = [sum(x.shape[-1] for x in streams.blocks), *[net.hidden] * (net.depth - 1)]
    params = {
      name: init_layer(conv, layer_key, task, width)
      for name, layer_key, width in zip(names, jax.random.split(key, net.depth), widths, strict=True)
    }
    shape = lambda streams: jax.eval_shape(lambda p: forward(conv, p, streams), params[names[0]])
    hidden, queried = shape(streams), shape(query)
    scores = jax.eval_shape(lambda z: algorithm.score(z, task, "validation"), queried)
    zeros = lambda like: jnp.zeros(like.shape, like.dtype)
    start = engine.begin(params, {name: tx.init(p) for name, p in params.items()})
    return LayerRun(
      params, start.moments, params, start.score, start.waited, start.stopped, start.loss, drawn,
      zeros(jax.eval_shape(algorithm.carry, hidden)), () if algorithm.shared_query else zeros(queried), zeros(scores),
    )  # fmt: skip

  def train(index: int, state: State, task: Any) -> State:
    run, name = state.run, names[index]
    streams = algorithm.train(task, run.drawn)
    query = None if algorithm.shared_query else algorithm.query(task, run.drawn, "validation")
    if index:
      streams = above(streams, run.hidden)
      query = None if query is None else above(query, run.queried)
    freeze = lambda s: s.map(lambda graph, blocks, _: frozen_aggregate(net.kind, graph, blocks))
    known, known_query = freeze(streams), None if query is None else freeze(query)

    def update(params, moments, states):
      def objective(params):
        z = forward(conv, params, streams, known)
        return algorithm.loss(z, task, run.drawn), z

      (loss, z), grads = jax.value_and_grad(objective, has_aux=True)(params)
      updates, moments = tx.update(grads, moments, params)
      return optax.apply_updates(params, updates), moments, states, loss, z

    def score(params, z):
      z = z if query is None else forward(conv, params, query, known_query)
      return algorithm.score(z, task, "validation"), z

    def validate(params, z):
      return task.metric(run.scores + score(params, z)[0], "validation")

    progress = engine.Progress(
      run.params[name], run.moments[name], (), run.loss, run.best[name], run.score, run.waited, run.stopped
    )
    progress, epoch, done = engine.run_epochs(progress, state.epoch, update, validate, recipe)
    new = lambda tree, leaf: tree | {name: leaf}
    run = run._replace(
      params=new(run.params, progress.params), moments=new(run.moments, progress.moments),
      best=new(run.best, progress.best), score=progress.score, waited=progress.waited, stopped=progress.stopped,
      loss=progress.loss,
    )  # fmt: skip

    def freeze_layer(run):
      params = run.best[name]
      z = forward(conv, params, streams, known)
      scores, queried = score(params, z)
      start = engine.begin((), ())
      return run._replace(
        params=new(run.params, params), score=start.score, waited=start.waited, stopped=start.stopped,
        hidden=algorithm.carry(z), queried=() if query is None else queried, scores=run.scores + scores,
      )  # fmt: skip

    run = jax.lax.cond(done, freeze_layer, lambda run: run, run)
    return State(run, state.layer + done, jnp.where(done, 0, epoch))

  def step(state: State, task: Any) -> tuple[State, Metrics]:
    branches = [lambda state, task, i=i: train(i, state, task) for i in range(net.depth)]
    new = jax.lax.switch(state.layer, [*branches, lambda state, task: state], state, task)
    validation = task.metric(new.run.scores, "validation")
    return new, {"loss": new.run.loss, "validation": jnp.maximum(new.run.score, validation)}

  def by_depth(state: State, task: Any, view: View) -> Array:
    """Scores of 1, 2, ... layers."""
    streams = algorithm.query(task, state.run.drawn, view)
    scores = [algorithm.score(z, task, view) for z in outputs(net, state.run.params, streams)]
    return jnp.cumsum(jnp.stack(scores), axis=0)

  def predict(state: State, task: Any, view: View) -> Array:
    return by_depth(state, task, view)[jnp.minimum(state.layer, net.depth - 1)]

  def evaluate(state: State, task: Any) -> Metrics:
    """Metrics of the layers trained so far, and of each number of layers, were training to end with it."""
    metrics: dict[str, Array] = {}
    last = jnp.minimum(state.layer, net.depth - 1)
    views: tuple[View, ...] = ("validation", "test")
    for view in views:
      each = jnp.stack([task.metric(scores, view) for scores in by_depth(state, task, view)])
      metrics |= {view: each[last], f"{view}_by_depth": each}
    return metrics

  return engine.method(net, init, step, evaluate, predict, net.depth * recipe.steps)


# ----------------------------------------------------------------------------------------------- node classification


def single_forward(net: Net, recipe: Recipe = Recipe(), *, temperature: float = 1.0) -> Method:
  """SF: a node's class is the virtual node that it resembles most; no negative examples, one pass.

      logits_i,c = z_i . z_{N+c} / temperature,    loss = cross-entropy on training nodes

  Prediction sums the softmax over layers.
  """
  classes = classes_of(net)
  _positive("temperature", temperature)

  def draw(key: Array, task: NodeTask) -> Array:
    return engine.virtual_features(key, classes, task.features.shape[1])

  def train(task: NodeTask, virtual: Array) -> Streams:
    links = engine.class_links(task.labels, task.train, classes)
    graph = Bordered(task.adjacency, links, task.train.astype("float32"))
    return Streams(graph, [stack(normalize(task.features), normalize(virtual))])

  def loss(z: Array, task: NodeTask, _: Any) -> Array:
    return engine.mean_cross_entropy(class_logits(z, classes) / temperature, task.labels, task.train)

  def score(z: Array, *_: Any) -> Array:
    return jax.nn.softmax(class_logits(z, classes).astype("float32") / temperature)

  algorithm = Algorithm(draw, train, lambda task, drawn, view: train(task, drawn), loss, score, lambda z: z, True)
  return method(net, algorithm, recipe)


def class_logits(z: Float[Array, "nc h"], num_classes: int) -> Float[Array, "n c"]:
  """z_i . z_{N+c}: likeness of each node with each virtual node."""
  return jnp.matmul(z[:-num_classes], z[-num_classes:].T, preferred_element_type="float32").astype(z.dtype)


def goodness_loss(goodness: Float[Array, "k n"], mask: Any, theta: float) -> Float[Array, ""]:
  """Mean cross-entropy of goodness - theta, of nodes in the mask: row 0 is positive, the others are negative.

  At goodness = theta both terms are ln 2.
  """
  positive, negative = jax.nn.softplus(theta - goodness[0]), jax.nn.softplus(goodness[1:] - theta)
  over = lambda x: jnp.sum(x * mask) / jnp.sum(mask)
  return over(positive) + over(negative.mean(axis=0))


def label_appending(net: Net, recipe: Recipe = Recipe(), *, theta: float = 2.0) -> Method:
  """FF-LA: the forward-forward algorithm; a label is a part of the features of its node.

  Training nodes carry their own class in the positive input and each wrong one in a negative input; other nodes carry
  the uniform distribution. Goodness is sum_k z_k^2. For prediction all nodes in question carry class c at once, and
  the class of highest goodness, its mean_k z_k^2 - theta summed over layers, wins.
  """
  classes = classes_of(net)

  def appended(task: NodeTask, labels: Int[Array, "k n"], labelled: Any) -> Streams:
    one_hot = jnp.where(labelled[:, None], jax.nn.one_hot(labels, classes), 1 / classes)  # [K, N, C]
    # Computed from the mask alone, so that all K inputs share the norm and with it the normalised features.
    squares = squared_norm(task.features) + jnp.where(labelled, 1, 1 / classes)
    scaled = jax.vmap(normalize, (0, None))(one_hot, squares)
    return Streams(_plain(task), [normalize(task.features, squares), scaled])

  def train(task: NodeTask, negatives: Array) -> Streams:
    return appended(task, _positive_and_negative(task, negatives), task.train)

  def query(task: NodeTask, _: Any, view: View) -> Streams:
    known, asked = _known(task, view)
    return appended(task, _hypotheses(task, asked, classes), known | asked)

  algorithm = Algorithm(
    lambda key, task: wrong_classes(key, task.labels, classes), train, query, _forward_forward(theta),
    _goodness(theta), lambda z: z, False,
  )  # fmt: skip
  return method(net, algorithm, recipe)


def virtual_nodes(net: Net, recipe: Recipe = Recipe(), *, theta: float = 2.0) -> Method:
  """FF-VN: the forward-forward algorithm; a label is a link with the virtual node of its class.

  As `label_appending`, with positive and negative graphs in place of features. After a layer is trained, its positive
  output is the next input of all of them.
  """
  classes = classes_of(net)

  def linked(task: NodeTask, virtual: Array, labels: Int[Array, "k n"], mask: Any) -> Streams:
    links = jax.vmap(engine.class_links, (0, None, None))(labels, mask, classes)
    graph = Bordered(task.adjacency, links, mask.astype("float32"))
    return Streams(graph, [stack(normalize(task.features), normalize(virtual))])

  def draw(key: Array, task: NodeTask) -> tuple[Array, Array]:
    first, second = jax.random.split(key)
    features = engine.virtual_features(first, classes, task.features.shape[1])
    return features, wrong_classes(second, task.labels, classes)

  def train(task: NodeTask, drawn: Any) -> Streams:
    return linked(task, drawn[0], _positive_and_negative(task, drawn[1]), task.train)

  def query(task: NodeTask, drawn: Any, view: View) -> Streams:
    known, asked = _known(task, view)
    return linked(task, drawn[0], _hypotheses(task, asked, classes), known | asked)

  algorithm = Algorithm(draw, train, query, _forward_forward(theta), _goodness(theta), lambda z: z[0], False)
  return method(net, algorithm, recipe)


def wrong_classes(key: Array, labels: Int[Array, " n"], num_classes: int) -> Int[Array, "n c1"]:
  """All C - 1 wrong classes of each node, in random order."""
  order = jax.random.uniform(key, (labels.shape[0], num_classes))
  order = jnp.where(jax.nn.one_hot(labels, num_classes) > 0, 2.0, order)  # the right one comes last
  return jnp.argsort(order, axis=1)[:, :-1].astype("int32")


def _positive_and_negative(task, negatives):
  return jnp.concatenate([task.labels[None], negatives.T])  # [C, N]


def _known(task, view):
  """Nodes whose labels may be seen, and nodes in question."""
  return (task.train, task.validation) if view == "validation" else (task.train | task.validation, task.test)


def _hypotheses(task, asked, classes):
  """[C, N]: for each class the labels where all nodes in question have it."""
  return jnp.where(asked, jnp.arange(classes, dtype="int32")[:, None], task.labels)


def _forward_forward(theta):
  def loss(z, task, _):
    goodness = jnp.sum(z.astype("float32") ** 2, axis=-1)
    return goodness_loss(goodness[:, : task.train.shape[0]], task.train, theta)

  return loss


def _goodness(theta):
  return lambda z, task, _: (jnp.mean(z.astype("float32") ** 2, axis=-1) - theta)[:, : task.train.shape[0]].T


def _plain(task: NodeTask) -> Bordered:
  n = task.adjacency.shape[0]
  return Bordered(task.adjacency, jnp.zeros((n, 0)), jnp.zeros(n))


def _positive(name: str, value: float) -> None:
  if not value > 0:
    raise ValueError(f"{name}: got {value}, expected a positive number")


# --------------------------------------------------------------------------------------------------- link prediction


def link_forward(
  net: Net, recipe: Recipe = Recipe(), *, loss: Literal["ce", "ff"] = "ce", theta: float = 2.0
) -> Method:
  """Forward learning of links: each layer tells edges from other pairs by itself.

      "ce" (FL-CE):  logit_ij = z_i . z_j                        binary cross-entropy over all pairs
      "ff" (FL-FF):  logit_ij = sum_k (z_ik z_jk)^2 - theta      cross-entropy of positive plus that of negative pairs

  The score of a pair is the mean over layers of sigmoid(logit); here their sum, which ranks the same.
  """
  if loss not in ("ce", "ff"):
    raise ValueError(f"loss: got {loss!r}, expected 'ce' or 'ff'")

  def logits(z: Array, pairs: Pairs) -> Array:
    products = pairs.products(z)
    return jnp.sum(products, axis=1) if loss == "ce" else jnp.sum(products**2, axis=1) - theta

  def query(task: LinkTask, _: Any, view: View) -> Streams:
    return Streams(task.graph(view), [normalize(task.features)])

  def objective(z: Array, task: LinkTask, _: Any) -> Array:
    return engine.pair_cross_entropy(logits(z, task.train)) * (1 if loss == "ce" else 2)

  def score(z: Array, task: LinkTask, view: View) -> Array:
    return jax.nn.sigmoid(logits(z, getattr(task, view)))

  algorithm = Algorithm(
    lambda key, task: (), lambda task, drawn: query(task, drawn, "validation"), query, objective, score,
    lambda z: z, True,
  )  # fmt: skip
  return method(net, algorithm, recipe)
