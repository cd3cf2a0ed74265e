import functools
import itertools
import json
import re

import flax.linen as nn
import golden_rule
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import interop
from jaxlab.models import scalelong
from jaxlab.nn.layer_norm import LayerNorm

KINDS = ("none", "inv_sqrt2", "constant", "learned", "learned_each")
TINY = scalelong.UViT(image_size=8, in_channels=1, width=16, depth=4, num_heads=2, mlp_ratio=1, kappa=0.7)
TINY_UNET = scalelong.UNet(1, 16, (1, 2), 1, (4,), num_groups=4, kappa=0.7)
SHAPE = (2, 8, 8, 1)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def shapes(model, side=None):
  side = side or getattr(model, "image_size", 32)
  inputs = [((1, side, side, model.in_channels), "float32"), ((1,), "float32")]
  inputs += [((1,), "int32")] * bool(getattr(model, "num_classes", 0))
  named = {}
  if getattr(model, "context_size", 0):
    named = {"context": jax.ShapeDtypeStruct((1, model.context_size, model.context_width), "float32")}
  return jax.eval_shape(model.init, jax.random.key(0), *(jax.ShapeDtypeStruct(*i) for i in inputs), **named)


def count(model):
  return sum(x.size for x in jax.tree.leaves(shapes(model)))


@functools.cache
def variables(model):
  """Every array drawn anew, so that no bias is 0 and no branch is off."""
  leaves, structure = jax.tree.flatten(shapes(model, 8))
  return jax.tree.unflatten(structure, [normal(*x.shape, seed=i) / 4 for i, x in enumerate(leaves)])


# ------------------------------------------------------------------------------------------ the published networks


@pytest.mark.parametrize(
  ("model", "expected"),
  [
    (scalelong.cifar10(), 44_255_328),
    (scalelong.cifar10(scaling="learned"), 44_255_328 + 8_497),
    (scalelong.cifar10(scaling="learned_each"), 44_255_328 + 6 * 8_497),
    (scalelong.celeba64(), 44_292_228),
    (scalelong.imagenet64(), 130_940_292),
    (scalelong.imagenet256(), 286_763_024),
    # cifar10's, and a fourth channel of patches (3), decoder and last convolution; 77 positions; the dense layer.
    (scalelong.coco256(), 44_255_328 + 4 * 512 + 4 * 513 + 64 + 77 * 512 + 769 * 512),
    (scalelong.ddpm_cifar10(), 35_746_307),
    # 12 skips, of 128 (4) and 256 channels (8); W (C / 16) both ways and both biases.
    (scalelong.ddpm_cifar10(scaling="learned"), 35_746_307 + 2_184 + 8_464),
    (scalelong.ddpm_cifar10(scaling="learned_each"), 35_746_307 + 4 * 2_184 + 8 * 8_464),
  ],
)
def test_parameter_counts(model, expected):
  assert count(model) == expected


def nchw(images):
  return images.transpose(0, 3, 1, 2)


def nhwc(images):
  return images.transpose(0, 2, 3, 1)


def split_modes(state):
  """U-ViT-S/2 with each scaling; only the gates differ in weights."""
  plain = scalelong.from_torch({name: x for name, x in state.items() if not name.startswith("se.")})
  gates = {}
  for kind in KINDS[3:]:
    table = {k: rule for k, rule in scalelong.weight_table(12, scaling=kind).items() if "/skips/" in k}
    mine = {
      name: x for name, x in state.items() if name.startswith("se.") and (kind[-4:] == "each") == (name[3] != "l")
    }
    gates[kind] = interop.variables(mine, table)["params"]
  return {kind: {"params": plain["params"] | gates.get(kind, {})} for kind in KINDS}


def test_parity_of_every_scaling():
  """The official U-ViT-S/2 in its five modes, kappa 0.7. Op by op, since the five share operations, not programs."""

  def apply(weights, inputs):
    images = nhwc(inputs["images"])
    models = {kind: scalelong.cifar10(scaling=kind, kappa=0.7) for kind in KINDS}
    return {kind: nchw(model.apply(weights[kind], images, inputs["timesteps"])) for kind, model in models.items()}

  golden_rule.check("scalelong", split_modes, apply, atol=1e-5)


def test_parity_with_labels():
  model = scalelong.UViT(16, 4, 4, 32, 4, 4, num_classes=5, final_conv=False, scaling="learned_each", kappa=0.3)

  def apply(weights, inputs):
    return nchw(jax.jit(model.apply)(weights, nhwc(inputs["images"]), inputs["timesteps"], inputs["labels"]))

  golden_rule.check("scalelong_labels", scalelong.from_torch, apply, atol=1e-5)


def test_parity_of_the_convolutional_network():
  model = scalelong.UNet(width=32, multiples=(1, 2), attention_sizes=(8,))

  def apply(weights, inputs):
    return nchw(jax.jit(model.apply)(weights, nhwc(inputs["images"]), inputs["timesteps"]))

  golden_rule.check("scalelong_unet", scalelong.from_ddpm, apply, atol=1e-5)


@pytest.mark.parametrize("slug", ["scalelong_labels", "scalelong_unet"])
def test_official_weights_go_there_and_back(slug):
  with np.load(golden_rule.GOLDEN / f"{slug}.npz") as file:
    state = golden_rule.state(json.loads(str(file["manifest"])))
  if slug == "scalelong_unet":
    convert, table = scalelong.from_ddpm, scalelong.ddpm_weight_table(state)
    like = shapes(scalelong.UNet(width=32, multiples=(1, 2), attention_sizes=(8,)), 16)
  else:
    convert = scalelong.from_torch
    table = scalelong.weight_table(4, scaling="learned_each", labels=True, final_conv=False)
    like = shapes(scalelong.UViT(16, 4, 4, 32, 4, 4, num_classes=5, final_conv=False, scaling="learned_each"))
  assert jax.tree.map(jnp.shape, convert(state)) == jax.tree.map(jnp.shape, like)
  back = interop.state_dict(convert(state), table)
  assert back.keys() == state.keys()
  assert all(np.array_equal(back[name], state[name]) for name in state)
  with pytest.raises(ValueError, match="unused: 'extra.weight'"):
    convert(state | {"extra.weight": np.zeros(3)})


def test_incomplete_weights_of_the_convolutional_network_are_reported():
  """A module of each kind is missing; the widths change in the last level only."""
  model = scalelong.UNet(1, 8, (1, 1, 2), 2, (4,), num_groups=4)
  names = ["down.2.block.0.nin_shortcut.weight", "down.1.attn.1.norm.weight", "down.2.block.1.norm1.weight"]
  table = scalelong.ddpm_weight_table(names)
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes(model, 8))
  state = interop.state_dict(params, table)
  scalelong.from_ddpm(state)
  modules = (
    "conv_in", "conv_out", "norm_out", "temb.dense.0", "temb.dense.1", "mid.block_1", "mid.attn_1", "mid.block_2",
    "down.0", "up.1", "down.1.attn", "up.1.attn.2", "up.0.block.2", "down.0.downsample", "up.2.upsample",
    "down.2.block.0.nin_shortcut", "up.0.block.2.nin_shortcut", "down.0.block.1.temb_proj", "up.1.block.1.norm2",
    "down.0.block.0.conv1", "mid.block_2.conv2", "mid.attn_1.q", "down.1.attn.0.proj_out",
  )  # fmt: skip
  for module in modules:
    rest = {name: x for name, x in state.items() if not name.startswith(f"{module}.")}
    with pytest.raises(ValueError, match=f"missing: '{re.escape(module)}"):
      scalelong.from_ddpm(rest)
  with pytest.raises(ValueError, match=r"unused: 'down\.1\.downsample\.conv\.bias'"):
    scalelong.from_ddpm({name: x for name, x in state.items() if ".2." not in name[:7]})


# ---------------------------------------------------------------------------------------------------- the scalings


def with_skip_kernels(weights, factors):
  """Multiplies the half of every skip_linear that sees the skip."""
  params = dict(weights["params"])
  for i, factor in enumerate(factors):
    kernel = np.array(params[f"skip_linear{i}"]["kernel"])
    kernel[TINY.width :] *= factor
    params[f"skip_linear{i}"] = params[f"skip_linear{i}"] | {"kernel": kernel}
  return {"params": params}


SAME_WEIGHTS = {
  **{kind: TINY.clone(scaling=kind) for kind in KINDS[:3]},
  "kappa 1": TINY.clone(scaling="constant", kappa=1.0),
  **{kind: TINY.clone(scaling=kind) for kind in KINDS[3:]},
}


@jax.jit
def run_all(weights, gates):
  """Every kind of scaling of one network."""
  inputs = normal(*SHAPE), jnp.array([0.4, 700.0])
  return {
    name: model.apply({"params": weights["params"] | ({"skips": gates[name]} if name in gates else {})}, *inputs)
    for name, model in SAME_WEIGHTS.items()
  }


def test_scalings_of_one_network_are_scalings_of_its_skip_kernels():
  plain = variables(TINY)
  gates = {kind: variables(TINY.clone(scaling=kind))["params"]["skips"] for kind in KINDS[3:]}
  outputs = run_all(plain, gates)
  np.testing.assert_array_equal(outputs["kappa 1"], outputs["none"])
  for kind, factors in (("inv_sqrt2", (2**-0.5,) * 2), ("constant", (1.0, 0.7))):  # the outermost first
    by_kernel = run_all(with_skip_kernels(plain, factors), gates)["none"]
    np.testing.assert_allclose(outputs[kind], by_kernel, atol=1e-6)
  for one, other in itertools.combinations((*KINDS[:3], *KINDS[3:]), 2):
    assert np.abs(outputs[one] - outputs[other]).max() > 1e-3
  without = run_all(with_skip_kernels(plain, (0.0, 0.0)), gates)
  for output in without.values():
    np.testing.assert_allclose(output, without["none"], atol=1e-6)


def test_the_convolutional_network_scales_its_deepest_skip_most():
  """Every map that the encoder made goes through the scaling, numbered from the outermost."""
  calls = []

  def note(call, args, kwargs, context):
    if isinstance(context.module, scalelong.SkipScaling) and context.method_name == "__call__":
      calls.append((args[1], args[0].shape[1:], context.module.num_skips))
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    shapes(TINY_UNET, 8)
  assert calls == [(3, (4, 4, 32), 4), (2, (4, 4, 16), 4), (1, (8, 8, 16), 4), (0, (8, 8, 16), 4)]
  maps = normal(1, 2, 2, 16)
  scaling = scalelong.SkipScaling("constant", 4, 0.7)
  for level in range(4):
    np.testing.assert_allclose(scaling.apply({}, maps, level), maps * 0.7**level, rtol=1e-6)


def test_gates_of_maps():
  """One multiplier a channel, by one gate for each width."""
  params = variables(TINY_UNET.clone(scaling="learned"))["params"]["skips"]
  assert sorted(params) == ["gate16", "gate32"]
  each = shapes(TINY_UNET.clone(scaling="learned_each"), 8)["params"]["skips"]
  assert sorted(each) == [f"gate{i}" for i in range(4)]
  maps = normal(2, 3, 5, 32)
  p = params["gate32"]
  hidden = np.maximum(maps.mean((1, 2)) @ p["squeeze"]["kernel"] + p["squeeze"]["bias"], 0)
  expected = 1 / (1 + np.exp(-(hidden @ p["excite"]["kernel"] + p["excite"]["bias"])))
  got = scalelong.SkipScaling("learned", 4).apply({"params": params}, maps, 1)
  np.testing.assert_allclose(got, maps * expected[:, None, None], rtol=1e-4)


def test_gates_of_tokens():
  module = scalelong.SkipScaling("learned", 2)
  skip = normal(2, 33, 8)
  weights = module.init(jax.random.key(0), skip, 0)
  call = jax.jit(lambda x: module.apply(weights, x, 1) / x)
  gate = np.asarray(call(skip))
  np.testing.assert_allclose(gate, np.broadcast_to(gate[..., :1], skip.shape), rtol=1e-5)  # one a token
  gate = gate[..., 0]
  assert gate.min() > 0 and gate.max() < 1 and 0.3 < gate.mean() < 0.7
  rng = np.random.default_rng(0)
  np.testing.assert_allclose(call(skip[..., rng.permutation(8)])[..., 0], gate, rtol=1e-5)
  order = rng.permutation(33)
  assert np.abs(call(skip[:, order])[..., 0] - gate[:, order]).max() > 1e-3


def test_gates_start_as_pytorch_linear_layers():
  params = scalelong.SkipScaling("learned", 2).init(jax.random.key(0), jnp.zeros((1, 1024, 1)), 0)["params"]["gate"]
  for layer, fan_in in (("squeeze", 1024), ("excite", 64)):
    for leaf in params[layer].values():
      bound = fan_in**-0.5
      assert np.abs(leaf).max() <= bound
      np.testing.assert_allclose(np.std(leaf), bound / 3**0.5, rtol=0.15)


def test_constants_are_no_weights_and_a_shared_gate_is_one_set():
  for kind in KINDS[:3]:
    assert "skips" not in variables(TINY.clone(scaling=kind))["params"]
  assert list(variables(TINY.clone(scaling="learned"))["params"]["skips"]) == ["gate"]
  assert sorted(variables(TINY.clone(scaling="learned_each"))["params"]["skips"]) == ["gate0", "gate1"]


# --------------------------------------------------------------------------------------------------- the networks


def test_weights_have_their_dtype():
  model = TINY.clone(num_classes=3, context_size=2, context_width=4, scaling="learned", param_dtype="bfloat16")
  assert {x.dtype for x in jax.tree.leaves(shapes(model))} == {jnp.dtype("bfloat16")}


def test_context_is_seen_as_labels_are():
  """A label's embedding as a row of the context's kernel: only the order of tokens, hence of positions, differs."""
  labelled = TINY.clone(depth=2, num_classes=3)
  texts = TINY.clone(depth=2, context_size=1, context_width=3)
  params = variables(labelled)["params"]
  table = scalelong.weight_table(2, context=True)
  kernel, position = params["label_embed"]["embedding"], params["position"]
  same = {name: x for name, x in params.items() if name != "label_embed"} | {
    "context_embed": {"kernel": kernel, "bias": np.zeros(16, "float32")},
    "position": np.concatenate([position[:, 1:2], position[:, :1], position[:, 2:]], 1),  # time, context, patches
  }
  converted = scalelong.from_torch(interop.state_dict({"params": same}, table))
  assert jax.tree.map(jnp.shape, converted) == jax.tree.map(jnp.shape, shapes(texts))
  images, times = normal(*SHAPE), jnp.array([0.4, 700.0])
  run = jax.jit(texts.apply)
  got = [run(converted, images, times, context=jnp.eye(3)[jnp.array(labels)][:, None]) for labels in ([0, 2], [1, 2])]
  expected = jax.jit(labelled.apply)({"params": params}, images, times, jnp.array([0, 2]))
  np.testing.assert_allclose(got[0], expected, atol=2e-5)
  assert np.abs(got[0][0] - got[1][0]).max() > 1e-3
  np.testing.assert_array_equal(got[0][1], got[1][1])


def test_recomputing_keeps_the_weights():
  for model in (TINY, TINY_UNET):
    remat = model.clone(remat=True)
    assert shapes(remat, 8) == shapes(model, 8)
    traced = str(jax.make_jaxpr(remat.apply)(shapes(model, 8), normal(*SHAPE), jnp.ones(2)))
    assert traced.count("remat") >= (5 if model is TINY else 8)  # a block each


def test_dropout_is_random_in_training_only():
  block = scalelong.unet.ResBlock(8, 2, 0.5)
  x, time = normal(1, 2, 2, 8), normal(1, 4)
  shape = jax.eval_shape(functools.partial(block.init, train=False), jax.random.key(0), x, time)
  weights = jax.tree.map(lambda a: normal(*a.shape), shape)

  def draw(key, train):
    return block.apply(weights, x, time, train, rngs={"dropout": key})

  drawn = jax.jit(jax.vmap(functools.partial(draw, train=True)))(jax.random.split(jax.random.key(0)))
  assert np.abs(drawn[0] - drawn[1]).max() > 0.1
  assert "random" not in str(jax.make_jaxpr(functools.partial(draw, train=False))(jax.random.key(0)))


def test_the_convolutional_network_computes_in_bfloat16():
  model = scalelong.UNet(1, 16, (1,), 1, (), num_groups=4, scaling="learned")
  both = [model.clone(dtype=dtype).apply for dtype in ("bfloat16", "float32")]
  inputs = normal(*SHAPE), jnp.array([0.4, 700.0])
  narrow, wide = jax.jit(lambda v: [apply(v, *inputs) for apply in both])(variables(model))
  assert narrow.dtype == jnp.bfloat16 and wide.dtype == jnp.float32
  assert np.abs(narrow.astype("float32") - wide).max() < 0.05 * np.abs(wide).max()


def test_norms_have_the_official_epsilons():
  found = set()

  def note(call, args, kwargs, context):
    if isinstance(context.module, LayerNorm | nn.GroupNorm):
      found.add((type(context.module), context.module.epsilon))
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    shapes(TINY), shapes(TINY_UNET, 8)
  assert found == {(LayerNorm, 1e-5), (nn.GroupNorm, 1e-6)}


# ------------------------------------------------------------------------------------------------------- the laws


def test_second_moments_follow_the_law():
  """|f_i|^2 / |x|^2 of every level, and |J d|^2 / |d|^2 of the output, in the mean over weights, x and d."""
  scales = np.array([scalelong.multipliers(*kind) for kind in (("none", 6), ("inv_sqrt2", 6), ("constant", 6, 0.7))])

  @jax.jit
  def moments(params, x, d):
    def ratios(k):
      f, tangent = jax.jvp(lambda x: scalelong.toy_unet(params, x, k), (x,), (d,))
      return jnp.append(jnp.sum(f**2, -1) / jnp.sum(x**2), jnp.sum(tangent[0] ** 2) / jnp.sum(d**2))

    return jax.vmap(ratios)(scales)

  rng, measured = np.random.default_rng(0), np.zeros((3, 8))
  for _ in range(300):
    weights = (
      rng.standard_normal((13, 2, 128, 128), "float32") * np.array([2 / 128, 1 / 128], "float32")[:, None, None] ** 0.5
    )
    params = scalelong.ToyUNet(weights[:6], weights[6:12], weights[12])
    measured += np.asarray(moments(params, *rng.standard_normal((2, 128), "float32"))) / 300
  for k, (*norms, sensitivity) in zip(scales, measured, strict=True):
    expected = np.array([1 + sum(k[i:] ** 2) for i in range(7)])
    np.testing.assert_allclose(scalelong.skip_norm_prediction(k), expected, rtol=1e-6)
    np.testing.assert_allclose(norms, expected, rtol=0.08)
    np.testing.assert_allclose(sensitivity, expected[0], rtol=0.08)


def test_initial_weights_of_the_toy_network():
  params = scalelong.init_toy_unet(jax.random.key(0), 3, 64)
  for weights in params.down, params.up, params.bottom[None]:
    np.testing.assert_allclose(np.std(weights, (0, 2, 3)), [(2 / 64) ** 0.5, (1 / 64) ** 0.5], rtol=0.05)


def test_depth_is_bounded_with_constant_scaling_only():
  """Forty levels of random isometries (signed permutations), for which the law has little noise."""
  rng, depth, width = np.random.default_rng(0), 40, 256
  signed = rng.choice([-1.0, 1.0], (2 * depth + 1, 1, width, 1)).astype("float32")
  weights = signed * np.stack([np.eye(width, dtype="float32")[rng.permutation(width)] for _ in signed])[:, None]
  params = scalelong.ToyUNet(weights[:depth], weights[depth:-1], weights[-1])
  x = normal(width)
  call = jax.jit(lambda scales: jnp.sum(scalelong.toy_unet(params, x, scales) ** 2, -1) / jnp.sum(x**2))
  constant, unscaled = (call(np.array(scalelong.multipliers(kind, depth, 0.7))) for kind in ("constant", "none"))
  np.testing.assert_allclose(constant[0], 1 + 1 / (1 - 0.7**2), rtol=0.15)
  np.testing.assert_allclose(unscaled, 1 + np.arange(depth, -1, -1), rtol=0.3)


@pytest.mark.parametrize(
  ("call", "argument"),
  [
    (lambda: scalelong.multipliers("learned", 3), "scaling"),
    (lambda: scalelong.multipliers("constant", 3, 1.5), "kappa"),
    (lambda: scalelong.multipliers("none", 0), "num_skips"),
    (lambda: scalelong.init_toy_unet(jax.random.key(0), 0, 4), "depth"),
    (lambda: scalelong.toy_unet(scalelong.init_toy_unet(jax.random.key(0), 2, 4), np.ones(5), np.ones(2)), "x"),
    (lambda: scalelong.toy_unet(scalelong.init_toy_unet(jax.random.key(0), 2, 4), np.ones(4), np.ones(3)), "scales"),
    (lambda: shapes(TINY_UNET, 7), "images"),
    (lambda: shapes(TINY_UNET.clone(num_groups=5), 8), "num_groups"),
    (lambda: shapes(TINY_UNET.clone(multiples=()), 8), "multiples"),
    (lambda: shapes(TINY_UNET.clone(dropout=1.0), 8), "dropout"),
    (lambda: shapes(TINY_UNET.clone(scaling="other"), 8), "scaling"),
    (lambda: jax.eval_shape(TINY_UNET.init, jax.random.key(0), normal(*SHAPE), jnp.ones(1)), "timesteps"),
  ],
)
def test_bad_input_is_named(call, argument):
  with pytest.raises(ValueError, match=f"^{argument}: got "):
    call()
