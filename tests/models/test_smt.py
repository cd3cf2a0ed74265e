import functools
import json

import flax.linen as nn
import golden_rule
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from jaxlab import interop
from jaxlab.models import smt
from jaxlab.nn.drop_path import DropPath
from jaxlab.nn.layer_norm import LayerNorm

# Sixteen channels and heads of four, so that each of the four kernels of a modulation sees four channels.
C = 16
TINY = smt.SMT(num_classes=5, widths=(C,) * 4, depths=(1, 1, 2, 1), mlp_ratios=(2,) * 4, head_dim=4)
EVERY_VARIANT = {"tiny": 11_506_536, "small": 22_550_952, "base": 32_037_352, "large": 80_620_264}


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


def randomised(variables, seed=0):
  """Every array drawn anew, so that no bias is 0, no scale is 1 and no statistic is that of an identity."""
  leaves, structure = jax.tree.flatten(variables)
  rng = np.random.default_rng(seed)
  leaves = [rng.uniform(0.5, 1.5, x.shape) if x.ndim == 1 else rng.standard_normal(x.shape) / 4 for x in leaves]
  return jax.tree.unflatten(structure, [x.astype("float32") for x in leaves])


@functools.cache
def variables(module=TINY, shape=(1, 64, 64, 3)):
  return randomised(jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, "float32")))


@functools.partial(jax.jit, static_argnames="model")
def evaluate(model, variables, images):
  return model.apply(variables, images)


@functools.partial(jax.jit, static_argnames="model")
def train_step(model, variables, images, key):
  return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})


def shapes(module, side=64):
  images = jax.ShapeDtypeStruct((1, side, side, module.in_channels), "float32")
  return jax.eval_shape(module.init, jax.random.key(0), images)


def modules(model, kind):
  """The modules of one class that run, in order."""
  found = []

  def note(call, args, kwargs, context):
    if isinstance(context.module, kind) and context.method_name == "__call__":
      found.append(context.module)
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    shapes(model)
  return found


# ------------------------------------------------------------------------------------------- the published network


@pytest.mark.parametrize("name", EVERY_VARIANT)
def test_parameter_counts_are_the_official_ones(name):
  count = sum(x.size for x in jax.tree.leaves(shapes(getattr(smt, name)())["params"]))
  assert count == EVERY_VARIANT[name]


def test_large_without_layer_scale_is_the_official_default():
  count = sum(x.size for x in jax.tree.leaves(shapes(smt.large(layer_scale=None))["params"]))
  assert count == EVERY_VARIANT["large"] - 2 * sum(
    c * d for c, d in zip((96, 192, 384, 768), (4, 6, 28, 4), strict=True)
  )


def test_parity_with_the_official_model():
  """SMT-T with random weights and batch statistics: logits, and the spread over positions of each stage's channels."""
  model = smt.tiny()

  @jax.jit
  def run(variables, images):
    features = [maps[0].std((0, 1), ddof=1) for maps in model.apply(variables, images, features=True)]
    return {"logits": model.apply(variables, images), **{f"stage{i}": x for i, x in enumerate(features, start=1)}}

  def both_shapes(variables, inputs):
    outputs = {name: run(variables, images.transpose(0, 2, 3, 1)) for name, images in inputs.items()}
    return {f"{key}_{name}": array for name in outputs for key, array in outputs[name].items()}

  golden_rule.check("smt", smt.from_torch, both_shapes, atol=2e-5)  # the bar is 2e-4


def test_norms_keep_their_official_epsilons():
  """Parity hardly sees these: they change logits by 1e-5."""
  norms = modules(TINY, LayerNorm)
  assert norms
  for module in norms:
    after_embedding = module.name.endswith("embed_norm") or "stem" in module.path
    assert module.epsilon == (1e-5 if after_embedding else 1e-6), module.path
  assert {module.epsilon for module in modules(TINY, nn.BatchNorm)} == {1e-5}


@pytest.fixture(scope="module")
def official_state():
  with np.load(golden_rule.GOLDEN / "smt.npz") as file:
    return golden_rule.state(json.loads(str(file["manifest"])))


def test_official_weights_go_there_and_back(official_state):
  table = smt.weight_table((2, 2, 8, 1))
  converted = smt.from_torch(official_state)
  like = shapes(smt.tiny())
  assert jax.tree.map(jnp.shape, converted) == jax.tree.map(jnp.shape, like)
  back = interop.state_dict(converted, table)
  assert back.keys() == {name for name in official_state if not name.endswith("num_batches_tracked")}
  assert all(np.array_equal(back[name], official_state[name]) for name in back)


def test_from_torch_reads_layer_scales_and_reports_what_does_not_fit():
  model = TINY.clone(layer_scale=0.1)
  state = interop.state_dict(variables(model), smt.weight_table(model.depths, layer_scale=True))
  np.testing.assert_array_equal(state["block3.1.gamma_2"], variables(model)["params"]["stage3_block1"]["scale2"])
  jax.tree.map(np.testing.assert_array_equal, smt.from_torch(state), variables(model))
  del state["block3.0.attn.local_conv_4.weight"]
  with pytest.raises(ValueError, match=r"(?s)missing: 'block3.0.attn.local_conv_4.weight'.*unused: 'extra'"):
    smt.from_torch(state | {"extra": np.zeros(3)})


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("convolution", ["local_conv", "dw_conv"])
def test_from_torch_reads_backbones_of_detectors(prefix, convolution):
  state = interop.state_dict(variables(), smt.weight_table(TINY.depths))
  state = {name.replace("attn.local_conv.", f"attn.{convolution}."): w for name, w in state.items()}
  detector = {f"{prefix}{name}": w for name, w in state.items() if not name.startswith("head.")}
  if prefix:
    detector["neck.convs.0.weight"] = np.zeros((1, 2, 3, 3))
  weights = smt.from_torch(detector)
  expected = {**variables(), "params": {k: v for k, v in variables()["params"].items() if k != "head"}}
  jax.tree.map(np.testing.assert_array_equal, weights, expected)
  maps = jax.eval_shape(functools.partial(TINY.apply, features=True), weights, IMAGES)
  assert len(maps) == 4
  del state["head.bias"]
  with pytest.raises(ValueError, match="missing: 'head.bias'"):  # half a classifier
    smt.from_torch(state)


def test_stage_3_alternates_modulation_and_attention():
  params = shapes(smt.tiny())["params"]
  modulation = {"v", "s", "mix", "mix_norm", "fuse", "proj", *(f"local_conv_{k}x{k}" for k in (3, 5, 7, 9))}
  attention = {"q", "kv", "local_conv", "proj"}
  kinds = [[modulation] * 2, [modulation] * 2, [modulation, attention] * 4, [attention]]
  for stage, expected in enumerate(kinds, start=1):
    found = [params[f"stage{stage}_block{j}"]["mixer"].keys() for j in range(len(expected))]
    assert found == expected
  assert params["stage3_block1"]["mixer"]["kv"]["kernel"].shape == (256, 512)


def test_nothing_in_the_tree_depends_on_position():
  assert jax.tree.map(jnp.shape, shapes(TINY)) == jax.tree.map(jnp.shape, shapes(TINY, side=224))


# ------------------------------------------------------------------------------------------------------ the mixers

MIXER = smt.ScaleAwareModulation()
MAPS = normal(2, 11, 12, C)


@pytest.fixture(scope="module")
def mixer():
  """A jitted mixer that returns (output, outputs of its layers), and its variables."""

  @jax.jit
  def run(variables, x):
    out, state = MIXER.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])
    return out, {name: layer["__call__"][0] for name, layer in state["intermediates"].items() if "__call__" in layer}

  return run, variables(MIXER, MAPS.shape)


def test_each_head_has_a_kernel_of_its_own_size(mixer):
  run, weights = mixer
  layers = run(weights, MAPS)[1]
  for head, k in enumerate((3, 5, 7, 9)):
    kernel, bias = (np.asarray(weights["params"][f"local_conv_{k}x{k}"][name]) for name in ("kernel", "bias"))
    for t in range(C // 4):
      channel = np.asarray(layers["s"])[0, :, :, head * (C // 4) + t]
      expected = scipy.signal.correlate2d(channel, kernel[:, :, 0, t], mode="same") + bias[t]
      np.testing.assert_allclose(layers[f"local_conv_{k}x{k}"][0, :, :, t], expected, atol=1e-4)


@pytest.mark.parametrize("head", range(4))
def test_a_group_of_the_mix_holds_the_same_channel_of_every_head(mixer, head):
  run, weights = mixer
  select = {"kernel": jnp.zeros((1, 1, 4, 2 * C)).at[0, 0, head].set(1), "bias": jnp.zeros(2 * C)}
  layers = run({**weights, "params": {**weights["params"], "mix": select}}, MAPS)[1]
  k = 3 + 2 * head
  # Each group t of 8 outputs repeats channel t of the chosen head.
  np.testing.assert_allclose(layers["mix"], np.repeat(layers[f"local_conv_{k}x{k}"], 8, axis=-1), rtol=1e-6)


def without_bias(params, name):
  return {**params, name: {**params[name], "bias": jnp.zeros_like(params[name]["bias"])}}


def scaled(params, name, factor):
  return {**params, name: jax.tree.map(lambda x: factor * x, params[name])}


def test_modulation_is_linear_in_the_value(mixer):
  run, weights = mixer
  params = without_bias(weights["params"], "proj")
  once = run({**weights, "params": params}, MAPS)[0]
  thrice = run({**weights, "params": scaled(params, "v", 3.0)}, MAPS)[0]
  np.testing.assert_allclose(thrice, 3 * once, rtol=1e-4, atol=1e-3)
  # ... and in nothing else: the modulation is not linear in s.
  other = run({**weights, "params": scaled(params, "s", 3.0)}, MAPS)[0]
  assert not np.allclose(other, 3 * once, rtol=0.1, atol=0.1)


def test_attention_mixer_equals_its_equation():
  module = smt.LocalAttention(head_dim=4)
  params = variables(module, MAPS.shape)["params"]
  x = np.asarray(MAPS, np.float64)
  q, kv = (x @ params[name]["kernel"] + params[name]["bias"] for name in ("q", "kv"))
  k, v = (y.reshape(2, -1, C // 4, 4) for y in (kv[..., :C], kv[..., C:]))  # [batch, position, head, channel]
  weights = np.exp(np.einsum("bnhd,bmhd->bhnm", q.reshape(k.shape), k) / 2)
  attended = np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), v).reshape(x.shape)
  kernel = params["local_conv"]["kernel"][:, :, 0]
  maps = kv[..., C:]
  local = np.stack(
    [[scipy.signal.correlate2d(y[..., c], kernel[..., c], mode="same") for c in range(C)] for y in maps]
  ).transpose(0, 2, 3, 1)
  expected = (attended + local + params["local_conv"]["bias"]) @ params["proj"]["kernel"] + params["proj"]["bias"]
  np.testing.assert_allclose(jax.jit(module.apply)({"params": params}, MAPS), expected, atol=2e-3)


def seen_from_centre(call, shape):
  """Which pixels the output at the centre depends on, by the gradient."""
  row, column = shape[1] // 2, shape[2] // 2
  gradient = jax.grad(lambda x: jnp.sum(call(x)[0, row, column] * jnp.arange(1.0, C + 1)))
  return np.abs(jax.jit(gradient)(normal(*shape))[0]).max(-1) > 0


def window(shape, radius):
  rows, columns = np.ogrid[: shape[1], : shape[2]]
  return (abs(rows - shape[1] // 2) <= radius) & (abs(columns - shape[2] // 2) <= radius)


@pytest.mark.parametrize(
  ("module", "arguments", "radius"),
  [
    (MIXER, (), 4),  # exactly 9x9
    (smt.Block("modulation", 2), (False,), 5),  # one more through the MLP
    (smt.LocalAttention(head_dim=4), (), 99),  # everything
    (smt.Block("attention", 2, head_dim=4), (False,), 99),
  ],
  ids=["modulation", "modulation block", "attention", "attention block"],
)
def test_receptive_fields(module, arguments, radius):
  shape = (1, 15, 13, C)
  weights = randomised(jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(shape), *arguments)))
  seen = seen_from_centre(lambda x: module.apply(weights, x, *arguments), shape)
  np.testing.assert_array_equal(seen, window(shape, radius))


def test_early_stages_are_translation_equivariant():
  model = TINY.clone(widths=(4, 4), depths=(1, 1), mixers=("modulation",) * 2, mlp_ratios=(1, 1))
  weights = variables(model)
  scene = normal(1, 208, 208, 3)
  features = jax.jit(functools.partial(model.apply, features=True))
  here, there = features(weights, scene[:, :200, :200]), features(weights, scene[:, 8:, 8:])
  # A shift by 8 pixels is 2 cells of stage 1 and 1 of stage 2, away from the borders that a cell can see.
  for i, (cells, margin) in enumerate([(2, 8), (1, 10)]):
    inner = slice(margin, here[i].shape[1] - margin - cells)
    shifted = slice(margin + cells, here[i].shape[1] - margin)
    assert inner.stop - inner.start >= 4
    np.testing.assert_allclose(there[i][:, inner, inner], here[i][:, shifted, shifted], atol=2e-4)
    assert not np.allclose(there[i], here[i], atol=0.1)


# ----------------------------------------------------------------------------------------------------- the network

IMAGES = normal(2, 64, 64, 3)


def test_features_are_a_pyramid_and_the_last_gives_the_logits():
  shapes = jax.eval_shape(functools.partial(TINY.apply, features=True), variables(), normal(2, 64, 96, 3))
  assert [maps.shape for maps in shapes] == [(2, 16, 24, C), (2, 8, 12, C), (2, 4, 6, C), (2, 2, 3, C)]
  features = jax.jit(functools.partial(TINY.apply, features=True))(variables(), IMAGES)
  head = variables()["params"]["head"]
  expected = features[-1].mean((1, 2)) @ head["kernel"] + head["bias"]
  np.testing.assert_allclose(evaluate(TINY, variables(), IMAGES), expected, atol=1e-4)


@pytest.mark.parametrize(("side", "cells"), [(3, [1, 1, 1, 1]), (33, [8, 4, 2, 1]), (46, [11, 6, 3, 2])])
def test_sides_round_as_in_the_official_code(side, cells):
  images = jax.ShapeDtypeStruct((1, side, 64, 3), "float32")
  features = jax.eval_shape(functools.partial(TINY.apply, features=True), variables(), images)
  assert [maps.shape[1] for maps in features] == cells


def test_every_parameter_learns():
  model = TINY.clone(layer_scale=0.1)
  weights = variables(model)

  @jax.jit
  def gradient(params):
    out = functools.partial(model.apply, images=IMAGES)
    return jax.grad(lambda p: jnp.sum(jnp.sin(out({**weights, "params": p}))))(params)

  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(weights["params"])):
    assert np.isfinite(leaf).all() and np.any(leaf != 0), jax.tree_util.keystr(path)


def test_training_uses_and_updates_batch_statistics():
  before = variables()
  out, after = train_step(TINY, before, IMAGES, jax.random.key(0))
  kernel = before["params"]["stem"]["conv1"]["kernel"]
  x = jax.lax.conv_general_dilated(IMAGES, kernel, (2, 2), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))
  for name, now in (("mean", x.mean((0, 1, 2))), ("var", x.var((0, 1, 2)))):
    expected = 0.9 * before["batch_stats"]["stem"]["norm1"][name] + 0.1 * now
    np.testing.assert_allclose(after["batch_stats"]["stem"]["norm1"][name], expected, rtol=1e-4)
  moved = jax.tree.map(lambda a, b: not np.allclose(a, b), before["batch_stats"], after["batch_stats"])
  assert all(jax.tree.leaves(moved)) and len(jax.tree.leaves(moved)) == 2 * (1 + 3)
  # What was stored does not reach the output of a training step, but does that of an evaluation.
  other = {**before, "batch_stats": jax.tree.map(lambda a: 2 * a, before["batch_stats"])}
  np.testing.assert_array_equal(train_step(TINY, other, IMAGES, jax.random.key(0))[0], out)
  assert not np.allclose(evaluate(TINY, other, IMAGES), evaluate(TINY, before, IMAGES), atol=1e-3)


def test_drop_path_acts_in_training_only_and_never_on_the_first_block():
  model = TINY.clone(drop_path=0.9)
  first, second = (train_step(model, variables(), IMAGES, jax.random.key(i))[0] for i in (0, 1))
  assert not np.allclose(first, second)
  np.testing.assert_array_equal(evaluate(model, variables(), IMAGES), evaluate(TINY, variables(), IMAGES))
  rates = [module.rate for module in modules(model, DropPath)]
  np.testing.assert_allclose(rates, np.repeat(np.linspace(0, 0.9, 5), 2))


def test_rematerialised_blocks_give_the_same_gradients():
  model = TINY.clone(widths=(C, C), depths=(1, 1), mixers=("modulation", "attention"), mlp_ratios=(1, 1))

  def gradient(model):
    def loss(params):
      weights = {**variables(model), "params": params}
      out, state = model.apply(weights, IMAGES, train=True, mutable=["batch_stats"])
      return jnp.sum(jnp.sin(out)), state

    return jax.jit(jax.grad(loss, has_aux=True))(variables(model)["params"])

  plain, remat = gradient(model), gradient(model.clone(remat=True))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), remat, plain)


def test_bfloat16_compute_keeps_float32_parameters_and_stays_close():
  model = TINY.clone(dtype="bfloat16")
  assert {x.dtype.name for x in jax.tree.leaves(shapes(model))} == {"float32"}
  out = evaluate(model, variables(), IMAGES)
  assert out.dtype == "bfloat16"
  exact = evaluate(TINY, variables(), IMAGES)
  assert np.abs(out.astype("float32") - exact).max() < 0.1 * np.abs(exact).max()
  half = shapes(TINY.clone(param_dtype="bfloat16"))
  assert {x.dtype.name for x in jax.tree.leaves(half["params"])} == {"bfloat16"}


def test_initial_values_have_the_stated_spread():
  model = smt.tiny(widths=(64, 64), depths=(1, 1), mixers=("modulation",) * 2, mlp_ratios=(2, 2), layer_scale=1e-4)
  params = jax.jit(model.init)(jax.random.key(0), IMAGES)["params"]
  block = params["stage1_block0"]
  spread = {
    0.02: [block["mixer"]["v"]["kernel"], block["mlp"]["fc1"]["kernel"], params["head"]["kernel"]],
    np.sqrt(2 / 81): [block["mixer"]["local_conv_9x9"]["kernel"]],
    np.sqrt(2 / 9): [block["mlp"]["local_conv"]["kernel"]],
    np.sqrt(2 / 8): [block["mixer"]["mix"]["kernel"]],
    np.sqrt(2 / 64): [block["mixer"]["fuse"]["kernel"]],
    np.sqrt(2 / (9 * 64)): [params["stage2_embed"]["kernel"], params["stem"]["conv1"]["kernel"]],
  }
  for expected, kernels in spread.items():
    for kernel in kernels:
      # Five standard errors of the standard deviation of as many normal numbers.
      assert abs(kernel.std() / expected - 1) < 5 / np.sqrt(2 * kernel.size)
  assert all(np.all(leaf == 1e-4) for leaf in (block["scale1"], block["scale2"]))
  assert all(np.all(leaf == 0) for leaf in (block["mixer"]["v"]["bias"], block["mixer"]["mix"]["bias"]))


@pytest.mark.parametrize(
  ("change", "images", "message"),
  [
    ({}, IMAGES[0], "images: got shape"),
    ({}, IMAGES.astype("uint8"), "images: got dtype uint8"),
    ({}, IMAGES[..., :1], "images: got 1 channels"),
    ({}, IMAGES.transpose(0, 3, 1, 2), "images: got 64 channels"),
    ({}, IMAGES[:, :2], "images: got 2x64 pixels"),
    ({"num_classes": 0}, IMAGES, "num_classes: got 0"),
    ({"widths": ()}, IMAGES, "widths: got none"),
    ({"widths": (18, 16, 16, 16)}, IMAGES, "widths: got 18"),
    ({"head_dim": 5}, IMAGES, "widths: got 16, expected a multiple of head_dim, 5"),
    ({"depths": (1, 1, 2)}, IMAGES, "depths: got"),
    ({"depths": (1, 1, 2, 0)}, IMAGES, "depths: got"),
    ({"mixers": ("attention",)}, IMAGES, "mixers: got"),
    ({"mixers": ("modulation",) * 3 + ("pooling",)}, IMAGES, "mixers: got 'pooling'"),
    ({"mlp_ratios": (2, 2)}, IMAGES, "mlp_ratios: got"),
    ({"stem_kernel": 4}, IMAGES, "stem_kernel: got 4"),
    ({"drop_path": 1.0}, IMAGES, "drop_path: got 1.0"),
  ],
)
def test_bad_arguments(change, images, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(TINY.clone(**change).init, jax.random.key(0), images)
