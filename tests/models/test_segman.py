import json

import chex
import golden_rule
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.models import segman
from jaxlab.nn.resize import resize


def count(tree):
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ("variant", "maps", "classifier", "total"),
  [
    ("T", 2_281_334, 3_506_014, 6_397_260),
    ("S", 23_955_222, 25_507_582, 29_424_636),
    ("B", 43_419_170, 45_020_682, 51_802_820),
    ("L", 79_301_840, 80_985_272, 92_335_734),
  ],
)
def test_parameter_counts(variant, maps, classifier, total):
  encoder, decoder = segman.encoder(variant), segman.segmenter(variant).decoder
  params = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
  assert count(params) == classifier
  assert count({name: value for name, value in params.items() if not name.startswith("head")}) == maps
  pyramid = [jnp.zeros((1, 32 >> i, 32 >> i, width)) for i, width in enumerate(encoder.widths[1:])]
  assert maps + count(jax.eval_shape(decoder.init, jax.random.key(0), pyramid)["params"]) == total


def nhwc(x):
  return jnp.asarray(x).transpose(0, 2, 3, 1)


def test_golden_encoder():
  model = jax.jit(segman.encoder("T").apply)

  def apply(variables, inputs):
    logits = model(variables, nhwc(inputs["image"]))
    return logits / logits.std()  # with these weights they reach 700

  golden_rule.check("segman_encoder", segman.encoder_from_torch, apply, atol=2e-4)


def narrow(num_classes=7, **changes):
  shape = {"widths": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "heads": (1, 2, 2, 4), "windows": (5, 5, 3, 3)}
  options = {"mlp_ratios": (4, 2, 3, 3.4), "global_tokens": 9, "layer_scale": 1e-6, "drop_path": 0.1}
  return segman.Encoder(**{"num_classes": num_classes, **shape, **options, **changes})


def test_golden_narrow_with_layer_scales():
  model = jax.jit(narrow().apply)
  apply = lambda variables, inputs: model(variables, nhwc(inputs["image"]))
  golden_rule.check("segman_narrow", segman.encoder_from_torch, apply, atol=2e-4)


def test_golden_decoder():
  model = jax.jit(segman.Decoder(12).apply)
  apply = lambda variables, inputs: model(variables, [nhwc(inputs[f"c{i}"]) for i in (2, 3, 4)]).transpose(0, 3, 1, 2)
  golden_rule.check("segman_decoder", segman.decoder_from_torch, apply, atol=2e-4)


def test_whole_segmenter_is_converted_as_its_parts():
  parts = {}
  for part in ("encoder", "decoder"):
    with np.load(golden_rule.GOLDEN / f"segman_{part}.npz") as file:
      state = golden_rule.state(json.loads(str(file["manifest"])))
    parts[part] = {name: value for name, value in state.items() if not name.startswith("classifier.")}
  whole = {f"backbone.{name}": value for name, value in parts["encoder"].items()}
  whole |= {f"decode_head.{name}": value for name, value in parts["decoder"].items()}
  got = segman.from_torch(whole)
  model = segman.segmenter("T", 12)
  chex.assert_trees_all_equal_shapes(got, jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3))))
  want = {
    "encoder": segman.encoder_from_torch(parts["encoder"]),
    "decoder": segman.decoder_from_torch(parts["decoder"]),
  }
  for collection, trees in got.items():
    chex.assert_trees_all_equal(trees, {part: tree[collection] for part, tree in want.items()})

  broken = whole | {"auxiliary_head.conv_seg.bias": np.zeros(12)}
  del broken["backbone.patch_embed.0.weight"], broken["decode_head.cat.conv.weight"]
  with pytest.raises(ValueError, match="got 3 mismatches") as error:
    segman.from_torch(broken)
  for name in whole.keys() ^ broken.keys():
    assert name in str(error.value)


def test_last_mixer_is_attention_twice():
  # With the window as large as the map and no biases both steps are softmax(q k^T): out = A (A v).
  mixer = segman.Mixer(num_heads=2, window=3, global_tokens=9)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 3, 8)), "float32")
  params = jax.jit(mixer.init)(jax.random.key(1), x)["params"]
  params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), params)
  params["local_bias"], params["global_bias"] = (0 * params[name] for name in ("local_bias", "global_bias"))
  got = jax.jit(mixer.apply)({"params": params}, x)

  q, k, v = np.split(np.asarray(x @ params["qkv"]["kernel"] + params["qkv"]["bias"], np.float64), 3, -1)
  r, c = np.divmod(np.arange(9), 3)
  angle = np.stack([r, c], 1)  # with 4 channels a head the only frequency is 1, for the row's pair and the column's

  def turn(a):
    z = a.reshape(9, 2, 2, 2)
    z = (z[..., 0] + 1j * z[..., 1]) * np.exp(1j * angle)[:, None]
    return np.stack([z.real, z.imag], -1).reshape(9, 2, 4)

  logits = np.einsum("qhd,khd->hqk", turn(q), turn(k)) / 2
  weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  out = np.einsum("hqk,hkl,lhd->qhd", weights, weights, v.reshape(9, 2, 4)).reshape(1, 3, 3, 8)
  padded = np.pad(v, ((0, 0), (2, 2), (2, 2), (0, 0)))
  kernel = np.asarray(params["lepe"]["kernel"])[:, :, 0]
  lepe = sum(kernel[i, j] * padded[:, i : i + 3, j : j + 3] for i in range(5) for j in range(5))
  want = (out + lepe + np.asarray(params["lepe"]["bias"])) @ params["proj"]["kernel"] + params["proj"]["bias"]
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_pixel_unshuffle_counts_channels_as_pytorch():
  x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
  y = segman.pixel_unshuffle(x, 2)
  for b, i, j, c, dy, dx in [(0, 0, 0, 0, 0, 0), (1, 1, 2, 2, 1, 0), (0, 1, 0, 1, 0, 1)]:
    assert y[b, i, j, c * 4 + dy * 2 + dx] == x[b, 2 * i + dy, 2 * j + dx, c]
  with pytest.raises(ValueError, match="x: got 4x6 pixels"):
    segman.pixel_unshuffle(x, 4)


@pytest.mark.parametrize("side", [256, 384])
def test_decoder_scans_a_map_of_stride_32(side):
  model = segman.segmenter("T", 5)
  shapes = jax.eval_shape(
    lambda: model.init_with_output(
      jax.random.key(0), jnp.zeros((1, side, side, 3)), full_size=False, capture_intermediates=True,
      mutable=["params", "batch_stats", "intermediates"],
    )
  )  # fmt: skip
  logits, state = shapes
  assert logits.shape == (1, side // 8, side // 8, 5)
  assert state["intermediates"]["decoder"]["block"]["__call__"][0].shape == (1, side // 32, side // 32, 384)


def test_global_bias_is_resized_to_the_map():
  made_for, at_hand = (segman.Mixer(num_heads=2, window=3, global_tokens=count) for count in (9, 20))
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 5, 8)), "float32")
  params = jax.jit(made_for.init)(jax.random.key(0), x)["params"]
  params["qkv"]["kernel"] *= 30
  bias = jax.random.normal(jax.random.key(1), (2, 9, 9))
  got = jax.jit(made_for.apply)({"params": params | {"global_bias": bias}}, x)
  apply = jax.jit(at_hand.apply)
  want, linear = (
    apply({"params": params | {"global_bias": resize(bias[..., None], (20, 20), method)[..., 0]}}, x)
    for method in ("cubic", "linear")
  )
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert np.abs(got - linear).max() > 1e-3


def test_without_local_attention_windows_need_no_room():
  model, small = narrow(local=False), jnp.zeros((1, 32, 32, 3))
  assert jax.eval_shape(model.init_with_output, jax.random.key(0), small)[0].shape == (1, 7)
  with pytest.raises(ValueError, match="images: got 32x32 pixels, expected at least 33x33 for window 5 of stage 2"):
    jax.eval_shape(narrow().init, jax.random.key(0), small)


def test_remat_changes_no_number():
  shape = {"num_classes": 0, "widths": (4,), "depths": (2,), "heads": (1,), "windows": (3,), "mlp_ratios": (1,)}
  shape |= {"global_tokens": 9, "drop_path": 0.5}
  rng = np.random.default_rng(0)
  x = rng.standard_normal((4, 12, 12, 3)).astype("float32")
  shapes = jax.eval_shape(segman.Encoder(**shape).init, jax.random.key(0), x)
  variables = jax.tree.map(lambda s: rng.uniform(0.5, 1, s.shape).astype("float32"), shapes)

  def step(model):
    def loss(params):
      (y,), state = model.apply(
        variables | {"params": params}, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)}
      )
      return (y**2).sum(), (y, state)

    traced = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(variables["params"])
    return "prevent_cse" in str(traced.jaxpr), traced.lower().compile()(variables["params"])

  (plain, want), (recomputes, got) = (step(segman.Encoder(**shape, remat=remat)) for remat in (False, True))
  assert recomputes and not plain
  chex.assert_tree_all_finite(want)
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_lone_image_is_not_trained_on():
  model, maps = segman.Decoder(3, 8, 8), [jnp.ones((1, side, side, 4)) for side in (4, 2, 1)]
  train = lambda model, maps: jax.eval_shape(
    lambda: model.init_with_output({"params": jax.random.key(0), "dropout": jax.random.key(1)}, maps, train=True)[0]
  )
  with pytest.raises(ValueError, match="maps: got a batch of 1 to train on"):
    train(model, maps)
  assert train(model, [jnp.tile(m, (2, 1, 1, 1)) for m in maps]).shape == (2, 4, 4, 3)
  assert train(model.clone(axis_name="batch"), maps).shape == (1, 4, 4, 3)  # the other devices have more
