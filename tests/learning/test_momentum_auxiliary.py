import functools
import json

import flax.linen
import golden_rule
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import interop, train
from jaxlab.learning import local
from jaxlab.learning import momentum_auxiliary as man
from jaxlab.models.backbones import cifar

# Keeps gradients as its state and changes nothing.
KEEP = optax.GradientTransformation(
  lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, state, params: (jax.tree.map(jnp.zeros_like, g), g)
)


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


# -------------------------------------------------------------------------------------------------------------- sizes


@functools.cache
def sizes(layers, modules):
  model = {32: man.resnet32, 110: man.resnet110}[layers](modules)
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  kinds = {kind: count({k: v for k, v in params.items() if k.startswith(kind)}) for kind in ("biases", "averages")}
  return kinds, count({k: v for k, v in params.items() if k.startswith(("units", "classifier"))}), params


@pytest.mark.parametrize(
  ("layers", "modules", "block", "backbone"),
  [(32, 2, 18_560, 466_906), (32, 3, 72_256, 466_906), (32, 4, 97_216, 466_906), (110, 4, 97_216, 1_730_714)],
)
def test_parameter_counts(layers, modules, block, backbone):
  kinds, size, _ = sizes(layers, modules)
  assert (kinds, size) == ({"biases": block, "averages": block}, backbone)


@pytest.mark.parametrize(
  ("layers", "modules", "number", "block"),
  [
    (32, 8, 8, 208_960),
    (32, 16, 15, 461_120),
    (110, 2, 2, 18_560),
    (110, 16, 16, 416_768),
    (110, 32, 32, 970_432),
    (110, 55, 54, 1_724_928),
  ],
)
def test_cuts(layers, modules, number, block):
  """The blocks behind the cuts have the published sizes."""
  model = {32: man.resnet32, 110: man.resnet110}[layers](modules)
  assert model.num_modules == number

  def size(i):
    width, before = model.backbone.widths[i], model.backbone.widths[i - 1]
    return 9 * width * (before + width) + 4 * width + (0 if before == width else width * (before + 2))

  assert sum(size(end + 1) for end in model.cuts[:-1]) == block


def test_head_parameters():
  heads = sizes(32, 4)[2]
  for j, (decoder, classifier) in enumerate([(2_091, 19_466), (3_819, 65_162), (7_275, 83_594)]):
    parts = heads[f"heads_{j}"]
    assert count({k: v for k, v in parts.items() if k.startswith("decoder")}) == decoder
    assert count({k: v for k, v in parts.items() if not k.startswith("decoder")}) == classifier


# ------------------------------------------------------------------------------------------------------ official code


def test_golden():
  """Logits, and of a training step the loss, gradients (three sums each), averages and running means."""
  model = man.MomentumAuxiliary(cifar.resnet(8), cuts=(1, 3), feature_dim=24, image_size=16)
  with np.load(golden_rule.GOLDEN / "momentum_auxiliary.npz") as file:
    manifest = json.loads(str(file["manifest"]))
  weights = man.stage_weights(model, 4, (5.0, 0.5), (1.0, 0.25))
  learner = man.learner(model, KEEP, weights, momentum=0.9)
  apply, step = jax.jit(model.apply), jax.jit(learner.step)

  def run(variables, batch):
    image = jnp.moveaxis(jnp.asarray(batch["image"]), 1, -1)
    params, averages = local.split_averages(model, variables["params"])
    collections = {"batch_stats": variables["batch_stats"], "averages": averages}
    state = train.TrainState(jnp.zeros((), "int32"), params, collections, KEEP.init(params), None, jax.random.key(0))
    state, metrics = step(state, {"image": image, "label": batch["label"]})
    stats, averages = state.collections["batch_stats"], state.collections["averages"]
    table = man.weight_table(model)
    torch = interop.state_dict({"params": {**state.opt_state, **averages}, "batch_stats": stats}, table)
    cosine = lambda g: (g * np.cos(np.arange(g.size))).sum()
    tensors = lambda names: [np.asarray(torch[name], np.float64).ravel() for name in names]
    rows = [[g.sum(), np.sqrt((g**2).sum()), cosine(g)] for g in tensors(manifest["parameters"])]
    return {
      "logits": apply(variables, image),
      "loss": metrics["loss"] - metrics["local_loss"],
      "gradients": np.array(rows),
      "averages": np.array([[g.sum(), cosine(g)] for g in tensors(manifest["averages"])]),
      "running_means": np.array([g.mean() for g in tensors(manifest["buffers"])]),
    }

  golden_rule.check("momentum_auxiliary", functools.partial(man.from_torch, model=model), run, atol=2e-4, rtol=1e-4)


def test_supervised_contrast():
  rng = np.random.default_rng(0)
  z, labels = rng.standard_normal((6, 5)), np.array([0, 1, 0, 2, 1, 0])
  u = z / np.linalg.norm(z, axis=1, keepdims=True)
  terms = []
  for i in range(6):
    others = [k for k in range(6) if k != i]
    total = np.log(sum(np.exp(u[i] @ u[k] / 0.07) for k in others))
    same = [u[i] @ u[k] / 0.07 - total for k in others if labels[k] == labels[i]]
    terms.append(-np.mean(same) if same else 0.0)
  got = man.supervised_contrast(jnp.asarray(z, "float32"), jnp.asarray(labels))
  np.testing.assert_allclose(got, np.mean(terms), rtol=1e-5)


def test_loss_weights():
  np.testing.assert_allclose(man.linear_weights(4, (5, 0.5), (1, 0.3)), [(5, 0.5), (3, 0.4), (1, 0.3)])
  assert man.linear_weights(2, (5, 0.5), (0, 0)) == [(5, 0.5)]
  stage = man.stage_weights(man.resnet32(16), 16, (5, 0.5), (0, 0))
  np.testing.assert_allclose(
    stage[:1] + stage[4:6] + stage[-1:], [(4.643, 0.464), (4.286, 0.429), (4.286, 0.429), (3.929, 0.393)], atol=1e-3
  )


@pytest.mark.parametrize(
  ("model", "modules", "name"),
  [
    (man.resnet32(4), 4, "modules"),  # (2.5, 0.25), (0, 0), (-2.5, -0.25)
    (man.MomentumAuxiliary(cifar.vgg19(), cuts=(3, 15)), 8, "model"),
    (man.MomentumAuxiliary(cifar.Backbone("resnet", (4,) * 6, (1,) * 6), cuts=(3, 5)), 8, "model"),
  ],
)
def test_stage_weights_that_are_none(model, modules, name):
  with pytest.raises(ValueError, match=f"{name}: got"):
    man.stage_weights(model, modules, (5, 0.5), (0, 0))


def test_contrast_of_a_row_of_zeros():
  z = jnp.zeros((4, 3)).at[1:].set(jax.random.normal(jax.random.key(0), (3, 3)))
  value, gradient = jax.value_and_grad(man.supervised_contrast)(z, jnp.array([0, 0, 1, 1]))
  assert np.isfinite(value) and np.isfinite(gradient).all() and np.abs(gradient).max() < 1e3


# ------------------------------------------------------------------------------------------------------- the algorithm

# Unit 2 follows module 0 with a stride and another width, unit 3 follows module 1.
BACKBONE = cifar.Backbone("vgg", (4, 4, 8, 8), (1, 1, 2, 1))
SHAPE = {"cuts": (1, 2, 3), "feature_dim": 6, "image_size": 8, "convolutions": 1}
MODEL = man.MomentumAuxiliary(BACKBONE, 3, **SHAPE)
WEIGHTS = [(1.0, 0.5), (2.0, 0.7)]
M = 0.75


def batch(seed, size=8):
  rng = np.random.default_rng(seed)
  image = (rng.uniform(0, 1, (size, 8, 8, 3)) - man.MEAN) / man.STD
  return {"image": image.astype("float32"), "label": rng.integers(0, 3, size)}


@functools.cache
def start():
  learner = man.learner(MODEL, local.sgd(0.05), WEIGHTS, momentum=M)
  return jax.jit(learner.init)(jax.random.key(0), batch(0)), jax.jit(learner.step)


@functools.cache
def weighted():
  """Gradient of sum_j w_j L_j in all weights, averages too, borders by `stop_gradient`."""
  target = lambda image: image * jnp.asarray(man.STD, "float32") + jnp.asarray(man.MEAN, "float32")

  def total(params, stats, given, weight):
    *local_outputs, logits = MODEL.apply(
      {"params": params, "batch_stats": stats}, given["image"], train=True, heads=True, mutable=["batch_stats"]
    )[0]
    entropy = lambda o: -jnp.mean(jax.nn.log_softmax(o)[jnp.arange(8), given["label"]])
    losses = []
    for (a, b), (pixels, guess) in zip(WEIGHTS, local_outputs, strict=True):
      p, t = jax.nn.sigmoid(pixels), target(given["image"])
      losses.append(-a * jnp.mean(t * jnp.log(p) + (1 - t) * jnp.log(1 - p)) + b * entropy(guess))
    return jnp.stack([*losses, entropy(logits)]) @ weight

  return jax.jit(jax.grad(total))


def gradient(state, weight, **changes):
  params = {**state.params, **state.collections["averages"], **changes}
  return weighted()(params, state.collections["batch_stats"], batch(1), jnp.asarray(weight, jnp.float32))


def test_a_loss_reaches_its_own_module_alone():
  state, _ = start()
  for j in range(3):
    for name, tree in gradient(state, np.eye(3)[j]).items():
      mine = name in MODEL.members(j) or name == f"averages_{j}"  # which the step keeps from the optimizer
      assert all(np.any(leaf) == mine for leaf in jax.tree.leaves(tree)), (j, name)
  assert "units_2" in MODEL.averaged(0).values() and "units_2" not in MODEL.members(0)


def test_gradient_passes_through_the_average():
  state, _ = start()
  zero = jax.tree.map(jnp.zeros_like, state.collections["averages"]["averages_0"])
  with_, without = gradient(state, [1, 0, 0]), gradient(state, [1, 0, 0], averages_0=zero)
  assert not np.allclose(with_["units_1"]["conv"]["kernel"], without["units_1"]["conv"]["kernel"], rtol=0.1)


def test_steps_follow_the_closed_form():
  """Weights by gradients of the sum of losses and Nesterov; averages by E_t = m^t E_0 + (1 - m) sum m^(t-1-s) w_s."""
  state, step = start()
  first, history, steps = state, [], 4
  velocity = jax.tree.map(jnp.zeros_like, state.params)
  for t in range(steps):
    history.append(state.params)
    new, _ = step(state, batch(1))
    if t < 2:
      grads, _ = local.split_averages(MODEL, gradient(state, [1, 1, 1]))
      grads = jax.tree.map(lambda g, p: g + 1e-4 * p, grads, state.params)
      velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
      expected = jax.tree.map(lambda p, g, v: p - 0.05 * (g + 0.9 * v), state.params, grads, velocity)
      for a, b in zip(jax.tree.leaves(new.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    state = new
  for name, source in (("averages_0", "units_2"), ("averages_1", "units_3")):
    closed = jax.tree.map(
      lambda e, *w: M**steps * e + (1 - M) * sum(M ** (steps - 1 - s) * x for s, x in enumerate(w)),
      first.collections["averages"][name],
      *(params[source] for params in history),
    )
    for a, b in zip(jax.tree.leaves(state.collections["averages"][name]), jax.tree.leaves(closed), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)
  # Its statistics are its own: not those of the block that it follows.
  stats = state.collections["batch_stats"]
  assert not np.allclose(stats["averages_0"]["norm"]["mean"], stats["units_2"]["norm"]["mean"], rtol=1e-2)


def test_without_momentum_the_average_is_the_next_block():
  """y of EMA alone, with m = 0 after a step: n(j) of before that step, on this step's features."""
  model = man.MomentumAuxiliary(BACKBONE, 3, bias=False, **SHAPE)
  state, _ = start()
  params = {k: v for k, v in state.params.items() if not k.startswith("biases")}
  params["averages_0"] = params["units_2"]  # what m = 0 gives; the closed form is tested above
  seen = {}

  def spy(next_call, args, kwargs, context):
    out = next_call(*args, **kwargs)
    if context.method_name == "__call__" and context.module.name in ("units_2", "averages_0", "heads_0"):
      seen[context.module.name] = (args[0], out)
    return out

  variables = {"params": {**state.collections["averages"], **params}, "batch_stats": state.collections["batch_stats"]}
  with flax.linen.intercept_methods(spy):
    model.apply(variables, batch(1)["image"], train=True, heads=True, mutable=["batch_stats"])
  np.testing.assert_array_equal(seen["averages_0"][1], seen["units_2"][1])
  np.testing.assert_array_equal(seen["heads_0"][0], seen["averages_0"][1])


@pytest.mark.parametrize("m", [0.0, 1.0])
def test_limits_of_the_momentum(m):
  model = man.MomentumAuxiliary(cifar.Backbone("vgg", (4, 4), (1, 2)), 3, **SHAPE | {"cuts": (0, 1)})
  learner = man.learner(model, local.sgd(0.05), [(1.0, 1.0)], momentum=m)
  state = jax.jit(learner.init)(jax.random.key(0), batch(0))
  moved = jax.jit(lambda state, given: learner.step(state, given)[0].collections["averages"])(state, batch(1))
  expected = state.params["units_1"] if m == 0 else state.collections["averages"]["averages_0"]
  for a, b in zip(jax.tree.leaves(moved["averages_0"]), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b)


def test_averages_of_bfloat16_weights_move():
  """In bfloat16 0.995 + 0.005 * 0.8 is 1 again."""
  m = 0.995
  backbone = cifar.Backbone("vgg", (4, 4), (1, 2))
  model = man.MomentumAuxiliary(backbone, 3, **SHAPE | {"cuts": (0, 1)}, param_dtype="bfloat16")
  learner = man.learner(model, local.sgd(0.0), [(1.0, 1.0)], momentum=m)
  state = jax.jit(learner.init)(jax.random.key(0), batch(0))
  fill = lambda tree, value: jax.tree.map(lambda leaf: jnp.full_like(leaf, value), tree)
  state = state.replace(
    params=state.params | {"units_1": fill(state.params["units_1"], 0.8)},
    collections=state.collections | {"averages": fill(state.collections["averages"], 1.0)},
  )
  step = jax.jit(learner.step)
  for _ in range(3):
    state, _ = step(state, batch(1))
  weight = float(jnp.bfloat16(0.8))
  for leaf in jax.tree.leaves(state.collections["averages"]):
    assert leaf.dtype == jnp.float32
    np.testing.assert_allclose(leaf, m**3 + (1 - m**3) * weight, rtol=1e-6)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"bfloat16"}


def test_contrast_trains_every_module_by_its_own_loss():
  """The gradients of a step are those of each loss alone in its own module, and none is without."""
  model = man.MomentumAuxiliary(BACKBONE, 3, **SHAPE, loss_mode="contrast")
  step = jax.jit(man.learner(model, KEEP, WEIGHTS, momentum=M).step)
  state, _ = start()
  rng, params = np.random.default_rng(0), dict(state.params)
  for j in (0, 1):  # the one layer whose shape is not that of logits
    features = {"kernel": rng.standard_normal((6, 6)), "bias": rng.standard_normal(6)}
    params[f"heads_{j}"] = params[f"heads_{j}"] | {"classifier": jax.tree.map(jnp.float32, features)}
  state = state.replace(params=params, opt_state=params)
  new, metrics = step(state, batch(1))
  assert np.isfinite(metrics["loss"]) and new.params.keys() == new.opt_state.keys()
  for leaf in jax.tree.leaves(new.opt_state):
    assert np.isfinite(leaf).all() and np.any(leaf)
  # What comes after module 0 is no matter to it, the block that it averages included.
  later = {name for j in (1, 2) for name in model.members(j)}
  changed = {k: jax.tree.map(lambda p: p + 0.3, v) if k in later else v for k, v in state.params.items()}
  other, _ = step(state.replace(params=changed), batch(1))
  for name in model.members(0):
    for a, b in zip(jax.tree.leaves(new.opt_state[name]), jax.tree.leaves(other.opt_state[name]), strict=True):
      np.testing.assert_array_equal(a, b)


def test_images_of_another_size_than_is_painted():
  model = man.MomentumAuxiliary(cifar.Backbone("vgg", (4, 4), (1, 2)), 3, **SHAPE | {"cuts": (0, 1), "image_size": 16})
  learner = man.learner(model, KEEP, [(1.0, 1.0)])
  state = jax.eval_shape(learner.init, jax.random.key(0), batch(0))
  with pytest.raises(ValueError, match="image_size: got 16, .*8, 8"):
    jax.eval_shape(learner.step, state, batch(0))


def test_a_step_needs_the_memory_of_a_module():
  backbone = cifar.Backbone("vgg", (8,) * 16, (1,) * 16)
  given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch(0, 64))

  def megabytes(*cuts):
    model = man.MomentumAuxiliary(backbone, 3, **SHAPE | {"cuts": cuts})
    learner = man.learner(model, local.sgd(0.1), [(1.0, 1.0)] * (len(cuts) - 1))
    state = jax.eval_shape(learner.init, jax.random.key(0), given)
    return jax.jit(learner.step, donate_argnums=0).lower(state, given).compile().memory_analysis().temp_size_in_bytes

  assert megabytes(4, 9, 15) < 0.75 * megabytes(15)


def test_one_module_is_backpropagation():
  model = man.MomentumAuxiliary(cifar.Backbone("vgg", (4, 4), (1, 2)), 3, cuts=(1,))
  ours, plain = man.learner(model, KEEP, []), train.supervised(model, train.cross_entropy(), KEEP)
  state = jax.jit(plain.init)(jax.random.key(0), batch(0))
  a, mine = jax.jit(ours.step)(state, batch(1))
  b, theirs = jax.jit(plain.step)(state, batch(1))
  assert mine["loss"] == theirs["loss"]
  for left, right in zip(jax.tree.leaves(a.opt_state), jax.tree.leaves(b.opt_state), strict=True):
    np.testing.assert_array_equal(left, right)


def test_evaluation_needs_the_backbone_alone():
  state, _ = start()
  names = ("units", "classifier")
  bare = {"params": {k: v for k, v in state.params.items() if k.startswith(names)}}
  bare["batch_stats"] = {k: v for k, v in state.collections["batch_stats"].items() if k.startswith(names)}
  apply = jax.jit(MODEL.apply)
  whole = {"params": state.params, "batch_stats": state.collections["batch_stats"]}
  np.testing.assert_array_equal(apply(whole, batch(2)["image"]), apply(bare, batch(2)["image"]))
