import functools
import json

import golden_rule
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import interop, train
from jaxlab.learning import auglocal, local
from jaxlab.models.backbones import cifar

# Keeps gradients as its state and changes nothing.
KEEP = optax.GradientTransformation(
  lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, state, params: (jax.tree.map(jnp.zeros_like, g), g)
)


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


# ---------------------------------------------------------------------------------------------------- rules and sizes


@pytest.mark.parametrize(
  ("units", "depth", "expected"),
  [
    (16, 3, [3] * 6 + [2] * 6),
    (16, 5, [5, 5, 5, 4, 4, 4, 4, 3, 3, 3]),
    (55, 3, [3] * 25 + [2] * 26),
    (55, 6, [6] * 10 + [5] * 19 + [4] * 19),
  ],
)
def test_head_depths(units, depth, expected):
  assert auglocal.head_depths(depth, units - depth) == tuple(expected)
  assert auglocal.head_depths(depth, units - depth, 0.0) == (depth,) * (units - depth - 1)


def test_head_depths_of_few_modules():
  assert auglocal.head_depths(4, 1) == () and auglocal.head_depths(4, 2) == (4,)


@pytest.mark.parametrize(
  ("units", "depth", "unit", "expected"),
  [
    (16, 3, 0, [5, 10, 15]),
    (16, 3, 1, [6, 10, 15]),
    (16, 3, 5, [8, 12, 15]),
    (16, 2, 6, [10, 15]),
    (16, 2, 11, [13, 15]),
    (55, 6, 0, [9, 18, 27, 36, 45, 54]),
    (55, 3, 10, [25, 39, 54]),
    (55, 2, 40, [47, 54]),
    (16, 4, 12, [13, 14, 15]),
  ],
)
def test_sampled_units(units, depth, unit, expected):
  assert auglocal.sampled_units(unit, units, depth) == tuple(expected)


def test_an_owed_halving_is_paid_by_the_next_block():
  widths = cifar.resnet(32).widths
  assert auglocal.head_blocks(widths, 0, 1) == ((64, 2),)
  assert auglocal.head_blocks((16, 64, 64, 64), 0, 3) == ((64, 2), (64, 2), (64, 1))


@functools.cache
def head_count(kind, blocks, depth, width):
  head = auglocal.Head(kind, blocks, depth == 1, 10)
  return count(jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((1, 8, 8, width)))["params"])


@pytest.mark.parametrize(
  ("layers", "depth", "heads", "expected"),
  [
    (32, 1, 14, 806_412),
    (32, 2, 13, 1_341_058),
    (32, 3, 12, 1_511_608),
    (32, 5, 10, 1_684_388),
    (32, 6, 9, 1_727_898),
    (110, 1, 53, 3_166_354),
    (110, 3, 51, 7_240_702),
    (110, 5, 49, 10_279_466),
    (110, 6, 48, 12_466_400),
  ],
)
def test_head_parameters(layers, depth, heads, expected):
  model = auglocal.AugLocal(cifar.resnet(layers), depth=depth)
  widths, depths = model.backbone.widths, auglocal.head_depths(depth, model.num_modules)
  assert model.num_modules - 1 == heads == len(depths)
  blocks = [auglocal.head_blocks(widths, i, d) for i, d in enumerate(depths)]
  assert sum(head_count("resnet", b, d, w) for b, d, w in zip(blocks, depths, widths, strict=False)) == expected


@pytest.mark.parametrize(("layers", "expected"), [(32, 466_906), (110, 1_730_714)])
def test_backbone_parameters(layers, expected):
  model = auglocal.AugLocal(cifar.resnet(layers), modules=1)
  assert count(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]) == expected


def test_dgl_parameters():
  sizes = {}
  for width in (16, 32, 64):
    shapes = jax.eval_shape(
      auglocal.DGLHead(10).init, jax.random.key(0), jnp.zeros((1, 512 // width, 512 // width, width))
    )
    sizes[width] = count(shapes["params"])
  assert 6 * sizes[16] + 5 * sizes[32] + 4 * sizes[64] == 838_294
  assert 19 * sizes[16] + 18 * sizes[32] + 17 * sizes[64] == 3_375_036


@pytest.mark.parametrize("depth", [4, 5])
def test_heads_as_deep_as_the_network(depth):
  with pytest.raises(ValueError, match=f"depth: got {depth}, .* at most 3"):
    auglocal.AugLocal(cifar.resnet(8), depth=depth)
  assert auglocal.AugLocal(cifar.resnet(8), depth=depth, modules=2).num_modules == 2


def test_dgl_head_is_the_reference():
  """Side 8: convolutions on 2 x 2 pixels, whose channels come first when they are laid out in a row."""
  head = auglocal.DGLHead(3)
  h = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype("float32")
  variables = head.init(jax.random.key(0), h)
  params = jax.tree.map(np.asarray, variables["params"])
  relu = lambda x: np.maximum(x / np.sqrt(1 + 1e-5), 0)  # of a normalisation that has seen nothing
  y = h.reshape(2, 2, 4, 2, 4, 4).mean((2, 4))
  for i in range(3):
    y = relu(y @ params[f"convs_{i}"]["kernel"][0, 0])
  row = np.stack([[y[b, p, q, c] for c in range(4) for p in range(2) for q in range(2)] for b in range(2)])
  for i in range(2):
    row = relu(row @ params[f"dense_{i}"]["kernel"])
  expected = row @ params["classifier"]["kernel"] + params["classifier"]["bias"]
  np.testing.assert_allclose(head.apply(variables, h), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8), (8, 1)])
def test_a_maximum_of_one_pixel(shape):
  model = auglocal.AugLocal(TINY, 3, modules=1)
  with pytest.raises(ValueError, match="images: got .* pixels before a maximum over 2 x 2"):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, *shape, 3)))


def test_vgg19_is_the_usual_one():
  model = auglocal.vgg19()
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
  backbone = {name: value for name, value in params.items() if not name.startswith("heads")}
  assert count(backbone) == 20_040_522  # convolutions and norms of torchvision's vgg19_bn, and a layer of 512 x 10 + 10
  assert model.ends() == (*range(12), 15)
  assert auglocal.head_blocks(model.backbone.widths, 0, 3) == ((256, 2), (512, 2), (512, 2))


# ------------------------------------------------------------------------------------------------------ official code


def official(depth, modules, head):
  return auglocal.AugLocal(cifar.resnet(8), depth=depth, modules=modules, pyramid=1.0, head_kind=head)


@pytest.mark.parametrize(
  ("slug", "model"), [("auglocal", official(2, 3, "auglocal")), ("auglocal_greedy", official(2, 4, "greedy"))]
)
def test_golden(slug, model):
  """Logits, and of a training step the loss, every tensor's gradient (three sums each) and the running means."""
  with np.load(golden_rule.GOLDEN / f"{slug}.npz") as file:
    manifest = json.loads(str(file["manifest"]))
  learner, rules = auglocal.learner(model, KEEP), auglocal.weights(model)
  apply, step = jax.jit(model.apply), jax.jit(learner.step)

  def run(variables, inputs):
    batch = {"image": jnp.moveaxis(jnp.asarray(inputs["image"]), 1, -1), "label": inputs["label"]}
    params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
    state = train.TrainState(jnp.zeros((), "int32"), params, stats, KEEP.init(params), None, jax.random.key(0))
    state, metrics = step(state, batch)
    torch = interop.state_dict({"params": state.opt_state, **state.collections}, rules)
    rows = []
    for name in manifest["parameters"]:
      g = np.asarray(torch[name], np.float64).ravel()
      rows.append([g.sum(), np.sqrt((g**2).sum()), (g * np.cos(np.arange(g.size))).sum()])
    last = metrics["loss"] - metrics["local_loss"] * (model.num_modules - 1)
    means = np.array([torch[name].mean() for name in manifest["buffers"]])
    return {
      "logits": apply(variables, batch["image"]),
      "loss": last,
      "gradients": np.array(rows),
      "running_means": means,
    }

  golden_rule.check(slug, functools.partial(auglocal.from_torch, model=model), run, atol=2e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------- the algorithm

TINY = cifar.Backbone("vgg", (4, 4, 8, 8), (1, 2, 2, 1))
MODEL = auglocal.AugLocal(TINY, 3, depth=1)  # three modules: two of one unit with heads, one of two units
CROSS_ENTROPY = train.cross_entropy()


def batch(seed, size=8):
  rng = np.random.default_rng(seed)
  return {"image": rng.standard_normal((size, 8, 8, 3)).astype("float32"), "label": rng.integers(0, 3, size)}


@functools.cache
def start():
  learner = auglocal.learner(MODEL, KEEP)
  return jax.jit(learner.init)(jax.random.key(0), batch(0)), jax.jit(learner.step)


@functools.cache
def weighted():
  """Gradient of sum_j w_j L_j of the whole network, borders by `stop_gradient`."""

  def total(params, stats, given, weight):
    outputs, _ = MODEL.apply(
      {"params": params, "batch_stats": stats}, given["image"], train=True, heads=True, mutable=["batch_stats"]
    )
    losses = jnp.stack([-jnp.mean(jax.nn.log_softmax(o)[jnp.arange(8), given["label"]]) for o in outputs])
    return losses @ weight, losses

  return jax.jit(jax.grad(total, has_aux=True))


def test_a_loss_reaches_its_own_module_alone():
  state, _ = start()
  assert MODEL.num_modules == 3
  for j in range(3):
    grads, _ = weighted()(state.params, state.collections["batch_stats"], batch(1), jnp.eye(3)[j])
    for name, tree in grads.items():
      mine = name in MODEL.members(j)
      assert all(np.any(leaf) == mine for leaf in jax.tree.leaves(tree)), (j, name)
  assert sorted(name for j in range(3) for name in MODEL.members(j)) == sorted(state.params)


def test_module_by_module_is_the_gradient_of_the_sum():
  state, step = start()
  new, metrics = step(state, batch(1))
  grads, losses = weighted()(state.params, state.collections["batch_stats"], batch(1), jnp.ones(3))
  for a, b in zip(jax.tree.leaves(new.opt_state), jax.tree.leaves(grads), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  np.testing.assert_allclose(metrics["loss"], losses.sum(), rtol=1e-6)
  np.testing.assert_allclose(metrics["local_loss"], losses[:2].mean(), rtol=1e-6)


def test_later_modules_do_not_matter_to_earlier_ones():
  state, step = start()
  changed = dict(state.params)
  for name in MODEL.members(1):
    changed[name] = jax.tree.map(lambda p: p + 0.3, changed[name])
  first, second = step(state, batch(1))[0].opt_state, step(state.replace(params=changed), batch(1))[0].opt_state
  for name in MODEL.members(0):
    for a, b in zip(jax.tree.leaves(first[name]), jax.tree.leaves(second[name]), strict=True):
      np.testing.assert_array_equal(a, b)
  assert not np.allclose(first["units_2"]["conv"]["kernel"], second["units_2"]["conv"]["kernel"])


def test_one_module_is_backpropagation():
  model = auglocal.AugLocal(TINY, 3, depth=3, modules=1)
  assert auglocal.AugLocal(TINY, 3, depth=3).num_modules == 1  # the rule's M = n - d
  ours, plain = auglocal.learner(model, KEEP), train.supervised(model, CROSS_ENTROPY, KEEP)
  state = jax.jit(plain.init)(jax.random.key(0), batch(0))
  a, mine = jax.jit(ours.step)(state, batch(1))
  b, theirs = jax.jit(plain.step)(state, batch(1))
  assert mine["loss"] == theirs["loss"]
  for left, right in zip(
    jax.tree.leaves((a.opt_state, a.collections)), jax.tree.leaves((b.opt_state, b.collections)), strict=True
  ):
    np.testing.assert_array_equal(left, right)


def test_evaluation_needs_no_heads():
  state, _ = start()
  whole = state.variables
  bare = {**whole, "params": {k: v for k, v in whole["params"].items() if not k.startswith("heads")}}
  apply = jax.jit(MODEL.apply)
  np.testing.assert_array_equal(apply(whole, batch(2)["image"]), apply(bare, batch(2)["image"]))


def test_a_step_needs_the_memory_of_a_module():
  backbone = cifar.Backbone("vgg", (8,) * 8, (1,) * 8)
  given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch(0, 32))

  def megabytes(modules):
    learner = auglocal.learner(auglocal.AugLocal(backbone, 3, modules=modules, head_kind="greedy"), local.sgd(0.1))
    state = jax.eval_shape(learner.init, jax.random.key(0), given)
    return jax.jit(learner.step, donate_argnums=0).lower(state, given).compile().memory_analysis().temp_size_in_bytes

  assert megabytes(8) < 0.5 * megabytes(1)


def test_devices_share_a_batch():
  # Two devices with a half each give what one device gives with all of it.
  kind = {"backbone": cifar.Backbone("vgg", (4, 4), (1, 2)), "num_classes": 3, "head_kind": "dgl"}
  make = lambda axis: auglocal.learner(auglocal.AugLocal(**kind, axis_name=axis), KEEP)
  state = jax.jit(make(None).init)(jax.random.key(0), batch(0))
  one, _ = jax.jit(make(None).step)(state, batch(1))
  parts = jax.tree.map(lambda a: a.reshape(2, 4, *a.shape[1:]), batch(1))
  two, _ = jax.pmap(make("data").step, axis_name="data", in_axes=(None, 0), devices=jax.devices()[:2])(state, parts)
  for a, b in zip(
    jax.tree.leaves((one.opt_state, one.collections)), jax.tree.leaves((two.opt_state, two.collections)), strict=True
  ):
    np.testing.assert_allclose(a, b[0], atol=1e-5)


def test_optimizer_and_schedule():
  rate = local.schedule(0.8, 400, 7)
  cosine = lambda e: 0.4 * (1 + np.cos(np.pi * e / 400))
  for epoch in (1, 5, 10, 11, 200, 400):
    expected = cosine(epoch) * (epoch - 1) / 10 + 0.01 * (11 - epoch) / 10 if epoch <= 10 else cosine(epoch)
    for step in (7 * (epoch - 1), 7 * epoch - 1):
      np.testing.assert_allclose(rate(step), expected, rtol=1e-5, atol=1e-7)
  tx, weight, velocity = local.sgd(0.1, weight_decay=0.01), 2.0, 0.0
  params = {"bias": jnp.asarray(weight)}
  state = tx.init(params)
  for g in (0.5, -1.0, 0.25):
    updates, state = tx.update({"bias": jnp.asarray(g)}, state, params)
    params = optax.apply_updates(params, updates)
    g += 0.01 * weight
    velocity = 0.9 * velocity + g
    weight -= 0.1 * (g + 0.9 * velocity)
    np.testing.assert_allclose(params["bias"], weight, rtol=1e-6)
