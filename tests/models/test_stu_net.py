import itertools
import math

import golden_rule
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import interop
from jaxlab.models import stu_net

EVERY = (5, 3, 2, 1, 1)  # the recorded voxels of each scale


def shapes(model, x):
  return jax.eval_shape(model.init, jax.random.key(0), x)


def filled(model, x):
  """Variables without the time that compiling an initialiser takes."""
  rng = np.random.default_rng(0)
  make = lambda a: (rng.standard_normal(a.shape) * max(np.prod(a.shape[:-1]), 10) ** -0.5).astype("float32")
  return jax.tree.map(make, shapes(model, x))


def count(model):
  model = model.clone(strides=((1, 1, 1),) * 5)  # has the same weights
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(model, jnp.zeros((1, 1, 1, 2, 1)))))


@pytest.mark.parametrize(
  ("variant", "of_105_classes", "of_2_classes", "tera"),
  [
    ("S", 14_596_941, 14_545_338, 0.1294),
    ("B", 58_262_669, 58_159_978, 0.5062),
    ("L", 440_302_605, 440_097_738, 3.8035),
    ("H", 1_457_326_221, 1_457_019_178, 12.5934),
  ],
)
def test_parameters_and_multiplications(variant, of_105_classes, of_2_classes, tera):
  model = stu_net.stu_net(variant)
  assert count(model) == of_105_classes
  assert count(stu_net.stu_net(variant, 2)) == of_2_classes
  np.testing.assert_allclose(stu_net.multiply_adds(model, (128, 128, 128)) / 1e12, tera, rtol=1e-3)


def check_golden(name, model):
  run = jax.jit(model.apply)

  def apply(variables, inputs):
    x = jnp.asarray(inputs["volume"]).transpose(0, 2, 3, 4, 1)
    outputs = run(variables, x)
    labels = (x[..., 0] > 0).astype(int) + (x[..., 0] > 1)  # also of the recorded losses
    losses = {
      f"loss{int(each)}": jax.jit(stu_net.segmentation_loss(batch_dice=each))(outputs, {"label": labels})[0]
      for each in (True, False)
    }
    maps = {
      f"out{k}": y[:, ::e, ::e, ::e].transpose(0, 4, 1, 2, 3)
      for k, (y, e) in enumerate(zip(outputs, EVERY, strict=True))
    }
    return maps | losses

  golden_rule.check(name, stu_net.from_torch, apply, atol=1e-4)


def test_golden_small():
  check_golden("stu_net_small", stu_net.stu_net("S", 3, deep_supervision=True))


def narrow(**changes):
  return stu_net.STUNet(**{"num_classes": 3, "widths": stu_net.scaled_widths(4), "deep_supervision": True, **changes})


def test_golden_anisotropic_with_four_channels():
  strides = stu_net.fit_strides([(1, 2, 2)] + [(2, 2, 2)] * 7)
  check_golden("stu_net", narrow(in_channels=4, depths=(2,) * 6, strides=strides))


def test_official_names_round_trip():
  model = stu_net.STUNet(3, widths=(4, 4, 8), depths=(2, 2, 2), strides=((2, 2, 2),) * 2)
  variables = jax.tree.map(
    lambda a: np.random.default_rng(a.size).standard_normal(a.shape), shapes(model, jnp.zeros((1, 8, 8, 8, 1)))
  )
  official = interop.state_dict(variables, stu_net.weight_table((2, 2, 2)))
  assert official["seg_outputs.0.weight"].shape == (3, 4, 1, 1, 1)
  back = stu_net.from_torch(official)
  jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_heads_at_five_scales_and_a_tree_that_strides_do_not_change():
  model = narrow()

  def both(model, sides):
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), jnp.zeros((2, *sides, 1)))

  outputs, variables = both(model, (64, 64, 64))
  assert [o.shape for o in outputs] == [(2, n, n, n, 3) for n in (64, 32, 16, 8, 4)]
  flat = narrow(strides=stu_net.fit_strides([(2, 2, 2), (1, 2, 2)]), deep_supervision=False)
  output, same = both(flat, (2, 8, 12))
  assert output.shape == (2, 2, 8, 12, 3)
  assert jax.tree.structure(same) == jax.tree.structure(variables)
  assert jax.tree.leaves(same) == jax.tree.leaves(variables)
  assert stu_net.fit_strides([(2, 2, 2)] * 7) == ((2, 2, 2),) * 5


@pytest.fixture(scope="module")
def toy():
  model = stu_net.STUNet(3, widths=(8, 8), depths=(1, 1), strides=((2, 2, 2),))
  variables = filled(model, jnp.zeros((1, 8, 8, 8, 1)))
  return model, variables, jax.jit(model.apply)


def test_volumes_are_normalised_one_by_one(toy):
  _, variables, apply = toy
  x = jax.random.normal(jax.random.key(1), (2, 8, 8, 8, 1))
  both = apply(variables, x)
  np.testing.assert_allclose(both, jnp.concatenate([apply(variables, x[:1]), apply(variables, x[1:])]), atol=2e-5)
  # The skip of the first block keeps the scale, so only a network with that skip at zero ignores it.
  silent = jax.tree.map(jnp.zeros_like, variables["params"]["encoder0"]["block0"]["skip"])
  block = variables["params"]["encoder0"]["block0"] | {"skip": silent}
  variables = {"params": variables["params"] | {"encoder0": {"block0": block}}}
  np.testing.assert_allclose(apply(variables, 5 * x), apply(variables, x), atol=2e-4)
  assert np.abs(apply(variables, x**3) - apply(variables, x)).max() > 0.1


def test_checkpoints_of_stages_keep_gradients_and_halve_memory():
  x = jax.random.normal(jax.random.key(0), (1, 16, 16, 16, 1))
  label = jnp.zeros(x.shape[:-1], int)

  def gradient(remat):
    model = stu_net.STUNet(2, widths=(8, 8), depths=(4, 1), strides=((2, 2, 2),), remat=remat)
    loss = lambda variables, x: stu_net.dice_cross_entropy(model.apply(variables, x), label)
    lowered = jax.jit(jax.grad(loss)).lower(filled(model, x), x)
    # XLA's CPU backend would merge what is computed twice: its pass that removes the barriers between is left out.
    return lowered.compile({"xla_disable_hlo_passes": "cse_barrier_expander"}), filled(model, x)

  (whole, variables), (less, _) = gradient(False), gradient(True)
  sizes = [compiled.memory_analysis().temp_size_in_bytes for compiled in (whole, less)]
  assert sizes[0] > 1.8 * sizes[1]
  same = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)
  jax.tree.map(same, whole(variables, x), less(variables, x))


def reference_loss(logits, labels, batch_dice):
  """In NumPy, class by class."""
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  groups = [range(len(p))] if batch_dice else [[n] for n in range(len(p))]
  dice = []
  for rows, c in itertools.product(groups, range(1, p.shape[-1])):
    mine, truth = p[list(rows), ..., c], labels[list(rows)] == c
    tp, fp, fn = mine[truth].sum(), mine[~truth].sum(), (1 - mine[truth]).sum()
    dice.append((2 * tp + 1e-5) / (2 * tp + fp + fn + 1e-5 + 1e-8))
  chosen = np.take_along_axis(p, labels[..., None], -1)
  return -np.log(chosen).mean() - np.mean(dice), np.mean(dice)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_loss_against_numpy_and_finite_differences(batch_dice):
  rng = np.random.default_rng(0)
  logits, labels = rng.standard_normal((2, 3, 4, 5, 4)), rng.integers(0, 3, (2, 3, 4, 5))
  loss = lambda x: stu_net.dice_cross_entropy(x, labels, batch_dice=batch_dice)
  expected, dice = reference_loss(logits, labels, batch_dice)
  np.testing.assert_allclose(loss(logits), expected, rtol=1e-5)
  np.testing.assert_allclose(stu_net.soft_dice(logits, labels, batch_dice=batch_dice), dice, rtol=1e-5)
  direction = rng.standard_normal(logits.shape)
  ahead, behind = (reference_loss(logits + s * 1e-5 * direction, labels, batch_dice)[0] for s in (1, -1))
  slope = (jax.jit(jax.grad(loss))(jnp.asarray(logits, "float32")) * direction).sum()
  np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-4)


def test_loss_of_perfect_and_absent_classes():
  labels = jnp.asarray(np.random.default_rng(0).integers(0, 2, (1, 4, 4, 4)))  # class 2 is absent
  perfect = 100 * jax.nn.one_hot(labels, 3)
  np.testing.assert_allclose(stu_net.soft_dice(perfect, labels), 1, atol=2e-3)
  np.testing.assert_allclose(stu_net.dice_cross_entropy(perfect, labels), -1, atol=2e-3)
  # Deep supervision weighs 8, 4, 2, 1, 0; labels of a coarse voxel are those of the voxel behind its middle.
  np.testing.assert_allclose(np.array(stu_net.supervision_weights(5)) * 15, [8, 4, 2, 1, 0], rtol=1e-6)
  assert stu_net.supervision_weights(1) == (1.0,)
  fine = jnp.arange(2 * 4 * 3).reshape(1, 2, 4, 3)
  np.testing.assert_array_equal(stu_net.nearest_labels(fine, (1, 2, 1))[0, 0, :, 0], [12 + 3 + 1, 12 + 9 + 1])


def test_weights_go_to_a_new_task(toy):
  old, variables, apply = toy
  new = stu_net.STUNet(5, 2, widths=(8, 8), depths=(1, 1), strides=((1, 2, 2),))
  x = jax.random.normal(jax.random.key(1), (1, 8, 8, 8, 1))
  fresh = filled(new, jnp.concatenate([x, x], -1))
  moved = stu_net.transfer(variables, fresh)
  assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, fresh)
  np.testing.assert_array_equal(moved["params"]["head0"]["kernel"], fresh["params"]["head0"]["kernel"])
  np.testing.assert_array_equal(moved["params"]["up0"]["kernel"], variables["params"]["up0"]["kernel"])
  # A second channel of zeros changes nothing, and both channels see the volume with the same kernels.
  same = old.clone(in_channels=2)
  both = stu_net.transfer(variables, filled(same, jnp.concatenate([x, x], -1)))
  both["params"]["head0"] = variables["params"]["head0"]
  run = jax.jit(same.apply)
  for pair in ((x, 0 * x), (0 * x, x)):
    np.testing.assert_allclose(run(both, jnp.concatenate(pair, -1)), apply(variables, x), atol=1e-4)
  with pytest.raises(ValueError, match=r"pretrained: got \d+ mismatches"):
    stu_net.transfer({"params": {}}, fresh)


def test_no_block_is_left_behind(toy):
  _, small, _ = toy
  deep = filled(stu_net.STUNet(3, widths=(8, 8), depths=(1, 2), strides=((2, 2, 2),)), jnp.zeros((1, 8, 8, 8, 1)))
  with pytest.raises(ValueError, match=r"pretrained: got 8 mismatches.*encoder1/block1/conv1/bias has no place"):
    stu_net.transfer(deep, small)
  heads = {"params": small["params"] | {"head7": {"kernel": jnp.ones(1)}}}  # of scales that the new task has no use for
  jax.tree.map(np.testing.assert_array_equal, stu_net.transfer(heads, small), small)
