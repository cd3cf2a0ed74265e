"""Algorithms that update all layers in every epoch: SF with top-down signals, its form for links, BP."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxlab import checks
from jaxlab.graph.nets.forward_gnn import engine
from jaxlab.graph.nets.forward_gnn.convolution import Bordered, Conv, Features, apply, normalize, stack
from jaxlab.graph.nets.forward_gnn.engine import Method, Net, Recipe, State, classes_of, init_layer
from jaxlab.graph.nets.forward_gnn.layerwise import class_logits
from jaxlab.graph.nets.forward_gnn.tasks import LinkTask, NodeTask, View
from jaxlab.train.learner import Metrics


class JointRun(NamedTuple):
  """State of a split: what is fixed before training, and `engine.Progress` of all layers, `layer_0`, `layer_1`, ...

  Attributes:
    drawn: what is fixed before training.
    params, moments, best: of each layer; after training `params` are the best ones.
    states: what each layer last gave, for algorithms that read it.
    score, waited, stopped, loss: as `engine.Progress`.
  """

  drawn: Any
  params: dict[str, Any]
  moments: dict[str, Any]
  best: dict[str, Any]
  states: Any
  score: Float[Array, ""]
  waited: Int[Array, ""]
  stopped: Bool[Array, ""]
  loss: Float[Array, ""]


class Algorithm(NamedTuple):
  """An algorithm that trains all layers together, for one split.

  Attributes:
    init: (key, task) -> what is drawn once, parameters, moments, and first states.
    update: (params, moments, states, task, drawn) -> the three anew, loss, and the outputs before the update where
      `predict` is not asked (else anything).
    predict: (params, task, drawn, view) -> scores.
    outputs: whether the outputs of `update` are the scores for validation, which then needs no pass of its own.
  """

  init: Callable[[Array, Any], tuple[Any, Any, Any, Any]]
  update: Callable[[Any, Any, Any, Any, Any], tuple[Any, Any, Any, Array, Any]]
  predict: Callable[[Any, Any, Any, View], Array]
  outputs: bool = False


def method(net: Net, algorithm: Algorithm, recipe: Recipe) -> Method:
  """Trains all layers in every epoch."""
  recipe.check()

  def init(key: Array, task: Any) -> JointRun:
    drawn, params, moments, states = algorithm.init(key, task)
    return JointRun(drawn, **engine.begin(params, moments, states)._asdict())

  def train(state: State, task: Any) -> State:
    fields = state.run._asdict()
    drawn = fields.pop("drawn")

    def update(params, moments, states):
      return algorithm.update(params, moments, states, task, drawn)

    def validate(params, outputs):
      scores = outputs if algorithm.outputs else algorithm.predict(params, task, drawn, "validation")
      return task.metric(scores, "validation")

    progress, epoch, done = engine.run_epochs(engine.Progress(**fields), state.epoch, update, validate, recipe)
    progress = progress._replace(params=engine.choose(done, progress.best, progress.params))
    return State(JointRun(drawn, **progress._asdict()), state.layer + done, epoch)

  def step(state: State, task: Any) -> tuple[State, Metrics]:
    new = jax.lax.cond(state.layer == 0, train, lambda state, task: state, state, task)
    return new, {"loss": new.run.loss, "validation": new.run.score}

  def evaluate(state: State, task: Any) -> Metrics:
    run = state.run
    views: tuple[View, ...] = ("validation", "test")
    return {view: task.metric(algorithm.predict(run.params, task, run.drawn, view), view) for view in views}

  def predict(state: State, task: Any, view: View) -> Array:
    return algorithm.predict(state.run.params, task, state.run.drawn, view)

  return engine.method(net, init, step, evaluate, predict, recipe.steps)


def _names(net):
  return [f"layer_{i}" for i in range(net.depth)]


def _relu(conv: Conv, params: Any, graph: Bordered, blocks: list[Features]) -> Array:
  return jax.nn.relu(apply(conv, params, graph, blocks))


def _descend(tx, params, moments, objective):
  """A step on one layer: new parameters and moments, loss, outputs before the step."""
  (loss, outputs), grads = jax.value_and_grad(objective, has_aux=True)(params)
  updates, moments = tx.update(grads, moments, params)
  return optax.apply_updates(params, updates), moments, loss, outputs


# ------------------------------------------------------------------------------------------------ top-down signals


class Augmented(NamedTuple):
  """The graph of single-forward training: its virtual nodes' links, features, and label matrix."""

  graph: Bordered
  features: Features
  labels: Float[Array, "nc c"]


def augmented(task: NodeTask, virtual: Float[Array, "c f"]) -> Augmented:
  """Training nodes linked with their classes; labels one-hot for those and for virtual nodes, uniform for others."""
  classes = virtual.shape[0]
  links = engine.class_links(task.labels, task.train, classes)
  labels = jnp.concatenate([jnp.where(task.train[:, None], links, 1 / classes), jnp.eye(classes)])
  graph = Bordered(task.adjacency, links, task.train.astype("float32"))
  return Augmented(graph, stack(task.features, virtual), labels)


def bottom_up(net: Net, params: dict[str, Any], given: Augmented) -> list[Float[Array, "nc h"]]:
  """s_1, ..., s_L of a pass through all layers, none of which sees a normalised input: only the result is."""
  h, states = given.features, []
  for name in _names(net):
    h = _relu(net.conv(), params[name], given.graph, [h])
    states.append(normalize(h))
  return states


def top_to_loss(net: Net, recipe: Recipe = Recipe(), *, clip: float = 1.0) -> Method:
  """SF-Top-To-Loss: a layer's loss also sees what the layers above it made of its last output.

      z_l = ReLU(conv_l(s_{l-1})),    m_l = mean(z_l, s_{l+1}, ..., s_L),    s_l = n(z_l) for the next epoch

  m_l takes the place of z in SF's loss and prediction; s are constants. All layers read the states of the epoch before.
  The first states come from a pass through all layers that does not normalise between them.

  Args:
    net: node classifier.
    recipe: how to train.
    clip: largest norm of a layer's gradient.
  """
  if not clip > 0:
    raise ValueError(f"clip: got {clip}, expected a positive norm")
  classes, conv, names, tx = classes_of(net), net.conv(), _names(net), recipe.optimizer(clip)

  def output(params: Any, j: int, below: Features, states: list[Array], graph: Bordered) -> tuple[Array, Array]:
    """z of layer j, and the mean m, from the states s_1, ..., s_L."""
    z = _relu(conv, params, graph, [below])
    return z, jnp.mean(jnp.stack([z, *states[j + 1 :]]), axis=0)

  def init(key: Array, task: NodeTask) -> Any:
    key, draw = jax.random.split(key)
    virtual = engine.virtual_features(draw, classes, task.features.shape[1])
    widths = [task.features.shape[1], *[net.hidden] * (net.depth - 1)]
    params = {
      name: init_layer(conv, k, task, width)
      for name, k, width in zip(names, jax.random.split(key, net.depth), widths, strict=True)
    }
    moments = {name: tx.init(p) for name, p in params.items()}
    return virtual, params, moments, bottom_up(net, params, augmented(task, virtual))

  def update(params: Any, moments: Any, states: list[Array], task: NodeTask, virtual: Array) -> Any:
    given = augmented(task, virtual)
    params, moments, new, total = dict(params), dict(moments), [], 0.0
    below = [normalize(given.features), *states]
    for j, name in enumerate(names):

      def objective(p, j=j):
        z, mean = output(p, j, below[j], states, given.graph)
        return engine.mean_cross_entropy(class_logits(mean, classes), task.labels, task.train), z

      params[name], moments[name], loss, z = _descend(tx, params[name], moments[name], objective)
      new.append(normalize(z))
      total = total + loss
    return params, moments, new, total, ()

  def predict(params: Any, task: NodeTask, virtual: Array, view: View) -> Array:
    given = augmented(task, virtual)
    states = bottom_up(net, params, given)
    below = [normalize(given.features), *states]
    means = [output(params[name], j, below[j], states, given.graph)[1] for j, name in enumerate(names)]
    return jnp.sum(jax.nn.softmax(jnp.stack([class_logits(m, classes) for m in means]).astype("float32")), axis=0)

  return method(net, Algorithm(init, update, predict), recipe)


class Sweeps(NamedTuple):
  """What Top-To-Input does on nodes, and top-down learning on links, in alternating sweeps over a stack of layers.

  Attributes:
    conv: of every layer.
    names: of the layers.
    graph: they run on.
    bottom: n(x), the input below the first layer.
    top: blocks above the last layer, none or one.
  """

  conv: Conv
  names: list[str]
  graph: Bordered
  bottom: Features
  top: list[Array]

  def blocks(self, j: int, states: list[Array]) -> list[Features]:
    """The input of layer j: [n(below), n(above)], where states are the outputs of all layers."""
    below = self.bottom if j == 0 else normalize(states[j - 1])
    return [below, *(self.top if j + 1 == len(self.names) else [normalize(states[j + 1])])]

  def first(self, params: Any) -> list[Array]:
    """Outputs bottom-up, with zeros in place of what is above."""
    states: list[Array] = []
    for j, name in enumerate(self.names):
      n = self.bottom.shape[0]
      below = self.bottom if j == 0 else normalize(states[j - 1])
      above = self.top if j + 1 == len(self.names) else [jnp.zeros((n, self.conv.features), self.conv.dtype)]
      states.append(_relu(self.conv, params[name], self.graph, [below, *[jnp.zeros_like(a) for a in above]]))
    return states

  def visit(self, states: list[Array], layer: Callable[[int, list[Features]], Array]) -> list[Array]:
    """A sweep: layers 0, 2, ..., which read none of each other, then 1, 3, ..., on what those made."""
    states = list(states)
    for j in [*range(0, len(states), 2), *range(1, len(states), 2)]:
      states[j] = layer(j, self.blocks(j, states))
    return states

  def sums(self, params: Any, score: Callable[[Array], Array], sweeps: int, skip: int) -> Array:
    """Scores of all layers, summed over sweeps from the one numbered `skip`."""
    states = self.first(params)
    layer = self._with_constant_bottom(params)

    def sweep(carry, number):
      states, total = carry
      states = self.visit(states, layer)
      return (states, total + (number >= skip) * functools.reduce(jnp.add, map(score, states))), None

    zero = jnp.zeros_like(score(states[0]))
    return jax.lax.scan(sweep, (states, zero), jnp.arange(sweeps))[0][1]

  def _with_constant_bottom(self, params):
    """Layers for fixed parameters: the first one's product with n(x), sparse and wide, is made once for all sweeps.

    conv([n(x), a]) = conv([n(x), 0]) + conv([0, a]) - bias where the convolution is linear; attention is not.
    """

    def layer(j, blocks):
      return _relu(self.conv, params[self.names[j]], self.graph, blocks)

    if self.conv.kind == "gat" or len(self.names) == 1 and not self.top:
      return layer
    width, first = self.bottom.shape[1], params[self.names[0]]
    below = {name: w if name == "bias" else w[:width] for name, w in first.items()}
    above = {name: jnp.zeros_like(w) if name == "bias" else w[width:] for name, w in first.items()}
    constant = apply(self.conv, below, self.graph, [self.bottom])
    rest = lambda blocks: apply(self.conv, above, self.graph, blocks[1:])
    return lambda j, blocks: jax.nn.relu(constant + rest(blocks)) if j == 0 else layer(j, blocks)


def _alternating(
  net: Net, recipe: Recipe, sweeps: int, skip: int, draw: Callable, setting: Callable, loss: Callable, score: Callable
) -> Method:
  checks.count("sweeps", sweeps)
  if not 0 <= skip < sweeps:
    raise ValueError(f"skip: got {skip}, expected 0 to {sweeps - 1}, less than the sweeps")
  conv, names, tx = net.conv(), _names(net), recipe.optimizer()

  def init(key: Array, task: Any) -> Any:
    key, draw_key = jax.random.split(key)
    drawn = draw(draw_key, task)
    stack = setting(task, drawn, "validation")
    params = {}
    for j, (name, k) in enumerate(zip(names, jax.random.split(key, net.depth), strict=True)):
      below = task.features.shape[1] if j == 0 else net.hidden
      above = [a.shape[1] for a in stack.top] if j + 1 == net.depth else [net.hidden]
      params[name] = init_layer(conv, k, task, below, *above)
    return drawn, params, {name: tx.init(p) for name, p in params.items()}, stack.first(params)

  def update(params: Any, moments: Any, states: list[Array], task: Any, drawn: Any) -> Any:
    params, moments, losses = dict(params), dict(moments), []
    stack = setting(task, drawn, "validation")

    def layer(j, blocks):
      def objective(p):
        z = _relu(conv, p, stack.graph, blocks)
        return loss(z, task), z

      name = names[j]
      params[name], moments[name], value, z = _descend(tx, params[name], moments[name], objective)
      losses.append(value)
      return z

    states = stack.visit(states, layer)
    return params, moments, states, sum(losses), ()

  def predict(params: Any, task: Any, drawn: Any, view: View) -> Array:
    return setting(task, drawn, view).sums(params, lambda z: score(z, task, view), sweeps, skip)

  return method(net, Algorithm(init, update, predict), recipe)


def top_to_input(net: Net, recipe: Recipe = Recipe(), *, sweeps: int = 10, skip: int = 2) -> Method:
  """SF-Top-To-Input: a layer also reads what the layer above it last gave; the top one reads the label matrix.

      z_l = ReLU(conv_l([n(z_{l-1}), n(z_{l+1})])),    z_0 = x,    z_{L+1} = Y

  Each has SF's loss and takes its own step; even layers first, then odd ones. Prediction sums the softmax of all layers
  over the later ones of several sweeps without training.

  Args:
    net: node classifier.
    recipe: how to train.
    sweeps: in prediction.
    skip: sweeps that do not count.
  """
  classes = classes_of(net)

  def draw(key: Array, task: NodeTask) -> Array:
    return engine.virtual_features(key, classes, task.features.shape[1])

  def setting(task: NodeTask, virtual: Array, _: View) -> Sweeps:
    given = augmented(task, virtual)
    return Sweeps(net.conv(), _names(net), given.graph, normalize(given.features), [normalize(given.labels)])

  def loss(z: Array, task: NodeTask) -> Array:
    return engine.mean_cross_entropy(class_logits(z, classes), task.labels, task.train)

  def score(z: Array, *_: Any) -> Array:
    return jax.nn.softmax(class_logits(z, classes).astype("float32"))

  return _alternating(net, recipe, sweeps, skip, draw, setting, loss, score)


def link_top_down(net: Net, recipe: Recipe = Recipe(l2=0.0), *, sweeps: int = 10, skip: int = 2) -> Method:
  """Top-down FL-CE: as `top_to_input` with the loss of `link_forward`; nothing is above the top layer."""

  def setting(task: LinkTask, _: Any, view: View) -> Sweeps:
    return Sweeps(net.conv(), _names(net), task.graph(view), normalize(task.features), [])

  def loss(z: Array, task: LinkTask) -> Array:
    return engine.pair_cross_entropy(task.train.products(z).sum(axis=1))

  def score(z: Array, task: LinkTask, view: View) -> Array:
    return jax.nn.sigmoid(getattr(task, view).products(z).sum(axis=1))

  return _alternating(net, recipe, sweeps, skip, lambda key, task: (), setting, loss, score)


# -------------------------------------------------------------------------------------------------- backpropagation


def backprop(net: Net, recipe: Recipe = Recipe()) -> Method:
  """BP: the same layers trained end to end, on nodes or on links: the baseline.

  No normalisation between layers and no virtual nodes; the last layer has no ReLU and gives the logits, or the
  embeddings whose products are the logits of pairs.
  """
  names, tx = _names(net), recipe.optimizer()
  last = net.conv() if net.num_classes is None else net.conv(net.num_classes, concat=False)
  convs = [net.conv()] * (net.depth - 1) + [last]

  def forward(params: Any, task: Any, view: View) -> Array:
    n = task.adjacency.shape[0]
    graph = (
      task.graph(view) if isinstance(task, LinkTask) else Bordered(task.adjacency, jnp.zeros((n, 0)), jnp.zeros(n))
    )
    h = task.features
    for name, conv in zip(names[:-1], convs[:-1], strict=True):
      h = _relu(conv, params[name], graph, [h])
    return apply(convs[-1], params[names[-1]], graph, [h])

  def scores(z: Array, task: Any, view: str) -> Array:
    return getattr(task, view).products(z).sum(axis=1) if isinstance(task, LinkTask) else z.astype("float32")

  def init(key: Array, task: Any) -> Any:
    widths = [task.features.shape[1], *[net.hidden] * (net.depth - 1)]
    keys = jax.random.split(key, net.depth)
    params = {
      name: init_layer(conv, k, task, width) for name, conv, k, width in zip(names, convs, keys, widths, strict=True)
    }
    return (), params, tx.init(params), ()

  def update(params: Any, moments: Any, states: Any, task: Any, _: Any) -> Any:
    def objective(params):
      z = forward(params, task, "validation")
      if isinstance(task, LinkTask):
        return engine.pair_cross_entropy(scores(z, task, "train")), z
      return engine.mean_cross_entropy(z, task.labels, task.train), z

    params, moments, loss, z = _descend(tx, params, moments, objective)
    return params, moments, states, loss, scores(z, task, "validation")

  def predict(params: Any, task: Any, _: Any, view: View) -> Array:
    return scores(forward(params, task, view), task, view)

  return method(net, Algorithm(init, update, predict, outputs=True), recipe)
