import functools
import json

import golden_rule
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.models import maniqa

SHAPE = {"image_size": 16, "patch_size": 4, "width": 8, "num_heads": 2, "mlp_ratio": 2, "taps": (0,), "num_tab": 1}
SHAPE |= {"depths": (1,), "stage_heads": (2,), "window": 2, "mlp_width": 8}


def model(**changes):
  return maniqa.MANIQA(**SHAPE | changes)


@functools.cache
def network():
  """(variables, jitted score of three images, jitted patches, images); scores far from where they start."""
  rng = np.random.default_rng(0)
  images = rng.standard_normal((3, 16, 16, 3)).astype("float32")
  shapes = jax.eval_shape(model().init, jax.random.key(0), images)
  variables = jax.tree.map(lambda p: 0.5 * rng.standard_normal(p.shape, np.float32), shapes)
  both = jax.jit(lambda v, x: (model().apply(v, x), model().apply(v, x, patches=True)))
  return variables, lambda v, x: both(v, x)[0], lambda v, x: both(v, x)[1], images


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_parameter_counts():
  net = maniqa.base()
  params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
  part = lambda prefix: count({name: tree for name, tree in params.items() if name.startswith(prefix)})
  tail = 2 * 7_087_872 + 1_536  # blocks 10 and 11, the last norm
  strided = 5_309_184, 1_327_488  # the convolutions that the official stages never call
  assert part("backbone") == 86_576_872 - 769_000 - tail
  assert part("tab_a") == part("tab_b") == 3_692_640
  assert (part("reduce_a"), part("reduce_b")) == (2_360_064, 295_296)
  assert (part("stage_a"), part("stage_b")) == (30_114_832 - strided[0], 8_718_736 - strided[1])
  assert part("score") == part("weight") == 148_225
  assert count(params) == 135_747_530 - 769_000 - tail - sum(strided) == 114_164_578


def queries_scaled(state):
  """With the rule's weights the softmax of channels is a near tie of large logits, which magnifies rounding."""
  return maniqa.from_torch({name: w / 32 if ".c_q." in name else w for name, w in state.items()})


def test_golden():
  net = maniqa.MANIQA(image_size=64, width=32, num_heads=4, mlp_width=24)

  @jax.jit
  def run(variables, images):
    score, state = net.apply(variables, images, capture_intermediates=True)
    parts = {name: state["intermediates"][name]["__call__"][0] for name in ("tab_a1", "stage_a", "stage_b")}
    patches = net.apply(variables, images, patches=True)
    return {
      "score": score,
      "attended": parts["tab_a1"],
      **{name: parts[name].transpose(0, 3, 1, 2) for name in ("stage_a", "stage_b")},
      **{name: y.reshape(2, -1) for name, y in zip(("patch_score", "patch_weight"), patches, strict=True)},
    }

  apply = lambda variables, inputs: run(variables, inputs["image"].transpose(0, 2, 3, 1))
  golden_rule.check("maniqa", queries_scaled, apply, atol=5e-5)


def test_weights_go_where_they_belong():
  with np.load(golden_rule.GOLDEN / "maniqa.npz") as file:
    state = golden_rule.state(json.loads(str(file["manifest"])))
  converted = maniqa.from_torch(state)["params"]
  vit = {name.removeprefix("vit."): w for name, w in state.items() if name.startswith("vit.")}
  jax.tree.map(np.testing.assert_array_equal, maniqa.backbone_from_timm(vit), converted["backbone"])
  with pytest.raises(ValueError, match=r"(?s)missing: 'conv1.bias'.*unused: 'conv3.bias'"):
    maniqa.from_torch({name.replace("conv1.bias", "conv3.bias"): w for name, w in state.items()})


def channel_attention(params, x, scramble):
  """By sums over channels; `scramble` moves entry (t, c) of the transposed result by its place in memory."""
  q, k, v = np.split(x @ np.float64(params["qkv"]["kernel"]) + np.float64(params["qkv"]["bias"]), 3, axis=-1)
  channels, patches = x.shape
  out = np.empty(x.shape)
  for c in range(channels):
    weight = np.exp([q[c] @ k[d] / np.sqrt(patches) for d in range(channels)])
    row = sum(w * v[d] for d, w in enumerate(weight)) / weight.sum()
    for t in range(patches):
      at = divmod(t * channels + c, patches) if scramble else (c, t)
      out[at] = row[t]
  return x + out


@pytest.mark.parametrize("scramble", [True, False])
def test_channel_attention(scramble):
  tab = maniqa.TransposedAttention(scramble=scramble)
  apply, rng = jax.jit(tab.apply), np.random.default_rng(0)
  x = rng.standard_normal((2, 6, 4)).astype("float32")
  shapes = jax.eval_shape(tab.init, jax.random.key(0), x)
  variables = jax.tree.map(lambda p: rng.standard_normal(p.shape, np.float32), shapes)
  y = apply(variables, x)
  for one, given in zip(y, x, strict=True):
    np.testing.assert_allclose(one, channel_attention(variables["params"], given, scramble), atol=1e-5)
  order = np.array([3, 1, 5, 0, 2, 4])
  moved = np.abs(apply(variables, x[:, order]) - y[:, order]).max()
  assert moved > 0.1 if scramble else moved < 1e-5


def test_channel_attention_drops_what_it_adds():
  tab = maniqa.TransposedAttention(rate=0.25)
  x = np.random.default_rng(0).standard_normal((4, 32, 16)).astype("float32")
  variables = jax.jit(tab.init)(jax.random.key(1), x)
  added = jax.jit(tab.apply)(variables, x) - x
  got = jax.jit(functools.partial(tab.apply, train=True))(variables, x, rngs={"dropout": jax.random.key(2)}) - x
  added, got = np.asarray(added), np.asarray(got)
  kept = np.abs(got) > 1e-6
  np.testing.assert_allclose(got[kept], added[kept] / 0.75, atol=1e-5)
  assert 0.7 < kept.mean() < 0.8


def test_score_is_the_weighted_mean_of_the_patches():
  variables, score, patches, images = network()
  f, g = (np.asarray(y, np.float64).reshape(3, -1) for y in patches(variables, images))
  assert f.min() >= 0 and f.std() > 0.05 and g.std() > 0.05 and g.min() >= 0 and g.max() <= 1
  np.testing.assert_allclose(score(variables, images), (f * g).sum(1) / g.sum(1), rtol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 60.0, -300.0])
def test_weighted_mean_is_a_convex_combination(shift):
  rng = np.random.default_rng(0)
  f, z = rng.exponential(size=(5, 9)).astype("float32"), rng.normal(0, 3, (5, 9)).astype("float32") + np.float32(shift)
  got = maniqa.weighted_mean(f, z)
  assert (f.min(1) <= got).all() and (got <= f.max(1)).all()
  if shift > 0:  # every g is 1
    np.testing.assert_allclose(got, f.mean(1), rtol=1e-6)
  else:  # below, every g underflows but their ratios are those of exp(z)
    g = 1 / (1 + np.exp(-np.float64(z)))
    np.testing.assert_allclose(got, (f * g).sum(1) / g.sum(1), rtol=1e-4)
  narrow = maniqa.weighted_mean(jnp.asarray(f, "bfloat16"), jnp.asarray(z, "bfloat16"))
  assert narrow.dtype == jnp.bfloat16 and np.isfinite(np.asarray(narrow, "float32")).all()


def test_images_do_not_see_each_other():
  variables, score, _, images = network()
  together = score(variables, images)
  mixed = np.concatenate([images[:1], 2 * images[:2]])
  np.testing.assert_allclose(score(variables, mixed)[0], together[0], rtol=1e-5)
  assert abs(together[0] - together[1]) > 1e-3


def test_stage_without_scale_is_the_identity():
  x = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype("float32")
  stage = maniqa.SwinStage((1,), (2,), 2, 8, 0.0)
  y, _ = jax.jit(stage.init_with_output)(jax.random.key(1), x)
  np.testing.assert_array_equal(y, x)


def test_shifted_block_sees_its_region():
  side, window, shift = 8, 4, 2
  block = maniqa.SwinBlock(1, window, shift, 4, 0.0)
  x = np.random.default_rng(0).standard_normal((1, side, side, 4)).astype("float32")
  changed = np.repeat(x, side**2 + 1, 0)  # the last as it was, in the others one pixel each differs
  changed[np.arange(side**2), *np.divmod(np.arange(side**2), side)] += np.float32([1, -2, 3, 1])
  y, _ = jax.jit(block.init_with_output)(jax.random.key(1), changed)
  reach = np.abs(y[:-1] - y[-1]).max(-1).reshape(side**2, side**2) > 1e-6
  # Shifted by 2, windows of 4 cut the axis at 2 and 6, and what wraps around stays apart.
  part = np.digitize(np.arange(side), [shift, side - window + shift])
  region = (3 * part[:, None] + part).ravel()
  np.testing.assert_array_equal(reach, region[:, None] == region)


def test_dead_scores():
  images = np.random.default_rng(0).standard_normal((3, 16, 16, 3)).astype("float32")
  net = model(num_tab=0, depths=(), stage_heads=())
  variables = jax.jit(jax.vmap(net.init, (0, None)))(jax.random.split(jax.random.key(0), 64), images)
  scores = jax.jit(jax.vmap(lambda v: jax.value_and_grad(lambda v: net.apply(v, images).sum())(v)))

  def start(bias):
    variables["params"]["score"]["bias"] = jnp.full((64, 1), bias)
    values, grads = scores(variables)
    moves = sum(np.abs(g).reshape(64, -1).sum(1) for g in jax.tree.leaves(grads))
    np.testing.assert_array_equal(moves == 0, values == 0)  # a dead network never recovers
    return np.mean(values == 0)

  assert start(-1e3) == 1
  assert start(0.0) > 0.2  # of the networks that begin about 0 as the official one does
  assert start(net.score_bias) == 0


def test_training_draws_noise():
  x = np.random.default_rng(0).standard_normal((4, 4, 4, 4)).astype("float32")
  stage = maniqa.SwinStage((1,), (2,), 2, 4, 1.0, 0.5, 0.0)
  variables = jax.jit(stage.init)(jax.random.key(0), x)
  noisy = jax.jit(lambda key: stage.apply(variables, x, train=True, rngs={"dropout": key}))
  one, again, other = (np.asarray(noisy(jax.random.key(seed))) for seed in (0, 0, 1))
  np.testing.assert_array_equal(one, again)
  # What is added is not below 0, so an entry below 0 was there from the start, doubled, and at most half of them stay.
  kept = one < 0
  assert (one[kept] >= 2 * x[kept] - 1e-6).all() and 0.2 < kept[x < 0].mean() < 0.6
  assert (one != other).mean() > 0.3


def test_without_groups_there_are_no_stages():
  x = np.zeros((1, 16, 16, 3), "float32")
  shapes = jax.eval_shape(model(num_tab=0, depths=(), stage_heads=()).init, jax.random.key(0), x)
  assert not [name for name in shapes["params"] if name.startswith(("stage", "tab"))]


def test_drop_paths_grow_over_the_blocks_of_a_stage():
  x = np.random.default_rng(0).standard_normal((64, 4, 4, 4)).astype("float32")
  stage = maniqa.SwinStage((1, 1), (2, 2), 2, 4, 1.0, 0.0, 0.9)
  params = jax.jit(stage.init)(jax.random.key(0), x)["params"]
  # Without its convolution the first group is the identity; the second is one only where its block's paths are dropped.
  params["group0_conv"] = jax.tree.map(jnp.zeros_like, params["group0_conv"])
  kernel = np.zeros((3, 3, 4, 4), "float32")
  kernel[1, 1] = np.eye(4)
  params["group1_conv"] = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(4)}
  y = jax.jit(lambda p: stage.apply({"params": p}, x, train=True, rngs={"dropout": jax.random.key(1)}))(params)
  same = np.isclose(np.asarray(y), x + np.maximum(x, 0), atol=1e-6).all((1, 2, 3))
  assert 0.6 < same.mean() < 0.95  # both paths of the block are dropped in 0.81 of the samples
  whole = jax.jit(lambda p: stage.apply({"params": p}, x))(params)
  assert not np.isclose(np.asarray(whole), x + np.maximum(x, 0), atol=1e-6).all((1, 2, 3)).any()


def test_crops():
  rows, columns = np.mgrid[:7, :9]
  image = jnp.asarray(np.stack([rows, columns, 0 * rows], -1), "float32")
  crops = np.asarray(maniqa.random_crops(jax.random.key(0), image, 5, 200))
  corner = crops[:, 0, 0].astype(int)
  assert {tuple(c[:2]) for c in corner} == {(y, x) for y in range(3) for x in range(5)}
  for (y, x, _), crop in zip(corner, crops, strict=True):
    np.testing.assert_array_equal(crop, image[y : y + 5, x : x + 5])
  corners = [tuple(c) for c in np.asarray(maniqa.five_crops(image, 5))[:, 0, 0, :2].astype(int)]
  assert corners == [(0, 0), (0, 4), (2, 0), (2, 4), (1, 2)]
  for call in (lambda: maniqa.random_crops(jax.random.key(0), image, 8), lambda: maniqa.five_crops(image, 8)):
    with pytest.raises(ValueError, match="image: got shape"):
      call()
  with pytest.raises(ValueError, match="count: got 0"):
    maniqa.random_crops(jax.random.key(0), image, 5, 0)
  with pytest.raises(ValueError, match="size: got 0"):
    maniqa.five_crops(image, 0)


def test_ensemble_is_the_mean_over_crops():
  variables, score, _, _ = network()
  image = jnp.asarray(np.random.default_rng(3).standard_normal((20, 24, 3)), "float32")
  crops = maniqa.random_crops(jax.random.key(4), image, 16, 3)
  of_crops = functools.partial(score, variables)
  got = maniqa.ensemble_score(of_crops, image, jax.random.key(4), size=16, count=3)
  np.testing.assert_allclose(got, score(variables, crops).mean(), rtol=1e-5)
