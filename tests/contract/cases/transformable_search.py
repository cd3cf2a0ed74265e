import jax
import numpy as np
from contract_case import Case

from jaxlab.learning import local
from jaxlab.learning import transformable_search as tas

SPACE = tas.resnet(14, 5, widths=(9, 9, 9, 9), image_size=8)
FULL = tas.macs(SPACE, SPACE.full)


def inputs(seed):
  return np.random.default_rng(seed).standard_normal((2, 8, 8, 3)).astype("float32")


def drawn(architecture):
  """With noise of a fixed key, so that it is a function of the logits."""
  return tas.sample(architecture, jax.random.key(3), 1.0)


def weighted(weights):
  """The network with these weights of the two widths."""
  sample = drawn(tas.initial(SPACE, jax.random.key(0)))._replace(weights=weights)
  return lambda: jax.eval_shape(tas.SearchNetwork(SPACE).init, jax.random.key(0), inputs(0), sample)


def variables(x=None, space=SPACE, **changes):
  image = inputs(0) if x is None else x
  architecture = tas.initial(SPACE, jax.random.key(0))
  init = lambda: tas.SearchNetwork(space, **changes).init(jax.random.key(0), image, drawn(architecture))
  return jax.eval_shape(init), architecture


def filled():
  """Values without a compilation of `init`."""
  made, architecture = variables()
  rng = np.random.default_rng(7)
  normal = lambda a: rng.standard_normal(a.shape) * (np.prod(a.shape[:-1], dtype=int) ** -0.5 if a.ndim > 1 else 0.3)
  fill = lambda path, a: (normal(a) + (path[-1].key == "scale")).astype("float32")
  params = jax.tree_util.tree_map_with_path(fill, made["params"])
  stats = jax.tree_util.tree_map_with_path(
    lambda path, a: np.full(a.shape, path[-1].key == "var", "float32"), made["batch_stats"]
  )
  return {"weights": params, "architecture": architecture._asdict()}, stats


PARAMS, STATS = filled()


def apply(**changes):
  network = tas.SearchNetwork(SPACE, **changes)

  def function(params, x):
    architecture = tas.Architecture(**params["architecture"])
    return network.apply({"params": params["weights"], "batch_stats": STATS}, x, drawn(architecture))

  return function


def learner(**changes):
  settings = {"ratio": 0.5} | changes
  tx = local.sgd(0.1), tas.architecture_optimizer()
  return lambda: tas.search_learner(tas.SearchNetwork(SPACE), *tx, tas.temperature(2, 3), **settings)


def derived(widths=SPACE.convolutions, depths=(2, 2, 2), images=None):
  genotype, x = tas.Genotype(widths, depths), inputs(0) if images is None else images
  return lambda: jax.eval_shape(tas.DerivedNetwork(SPACE, genotype).init, jax.random.key(0), x)


CASE = Case(
  function=apply(),
  params=PARAMS,
  inputs=inputs,
  narrow=apply(dtype="bfloat16"),
  bad={
    "one image without a batch": (lambda: variables(inputs(0)[0]), "images"),
    "bytes": (lambda: variables(np.zeros((2, 8, 8, 3), "uint8")), "images"),
    "grey": (lambda: variables(inputs(0)[..., :1]), "images"),
    "images of another size": (lambda: variables(np.zeros((2, 16, 16, 3), "float32")), "images"),
    "images of another size for a derived network": (derived(images=np.zeros((2, 8, 4, 3), "float32")), "images"),
    "a sample of another space": (lambda: variables(space=tas.resnet(20, image_size=8)), "drawn"),
    "one weight for two widths": (weighted(np.ones((len(SPACE.convolutions), 1), "float32")), "drawn"),
    "halves of channels": (derived(widths=(8.5, *SPACE.convolutions[1:])), "genotype"),
    "half a block": (derived(depths=(2, 1.5, 2)), "genotype"),
    "a width with seven choices": (lambda: tas.resnet(20, widths=(8, 8, 16, 32)), "width"),
    "two stages": (lambda: tas.Space(3, (16, 16, 32)), "widths"),
    "one block a stage": (lambda: tas.Space(1), "blocks"),
    "no ResNet of 21 layers": (lambda: tas.resnet(21), "layers"),
    "no ResNet of 32 layers with bottlenecks": (lambda: tas.resnet(32, bottleneck=True), "layers"),
    "an image that does not halve twice": (lambda: tas.Space(3, image_size=30), "image_size"),
    "a missing width": (derived(widths=SPACE.convolutions[1:]), "genotype"),
    "wider than full": (derived(widths=(10, *SPACE.convolutions[1:])), "genotype"),
    "a stage without blocks": (derived(depths=(2, 0, 2)), "genotype"),
    "logits of another space": (
      lambda: tas.extract(SPACE, tas.initial(tas.resnet(20), jax.random.key(0))),
      "architecture",
    ),
    "more than the full network": (learner(ratio=1.5), "ratio"),
    "a tolerance below zero": (learner(tolerance=-0.1), "tolerance"),
    "a cost that attracts": (learner(cost_weight=-1.0), "cost_weight"),
    "no epochs": (lambda: tas.temperature(0, 3), "epochs"),
    "a teacher that counts twice": (lambda: tas.knowledge_transfer(alpha=2.0), "alpha"),
    "cold": (lambda: tas.knowledge_transfer(heat=0.0), "heat"),
    "a budget of nothing": (lambda: tas.uniform(SPACE, 10.0), "budget"),
    "a budget above everything": (
      lambda: tas.random(SPACE, 2.0 * FULL, np.random.default_rng(0), attempts=10),
      "budget",
    ),
    "no such network": (lambda: tas.reference("C10-R44"), "name"),
    "names of another network": (lambda: tas.from_torch({"a": np.ones(2)}, SPACE), "state_dict"),
    "no names of a derived network": (lambda: tas.derived_from_torch({}, SPACE, SPACE.full), "state_dict"),
  },
)
