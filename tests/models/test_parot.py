import functools

import flax.linen as nn
import golden_rule
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from jaxlab import interop
from jaxlab.models import parot
from jaxlab.nn.points import nearest_points

TINY = parot.PaRot(num_classes=3, num_patches=6, patch_size=5, global_size=4, neighbors=3, width=8)
PARTS = parot.PaRotParts(4, 2, num_patches=6, patch_size=5, global_size=4, neighbors=3, interpolate=3, width=8)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def rotations(*shape, seed=0):
  count = int(np.prod(shape, dtype=int))
  matrices = Rotation.random(count, np.random.default_rng(seed)).as_matrix()
  return matrices.reshape(*shape, 3, 3).astype("float32")


def randomised(variables, seed=0):
  """Every array drawn anew; scales of either sign."""
  leaves, structure = jax.tree.flatten(variables)
  rng = np.random.default_rng(seed)
  leaves = [rng.uniform(0.5, 1.5, x.shape) if x.ndim == 1 else rng.standard_normal(x.shape) / 2 for x in leaves]
  return jax.tree.unflatten(structure, [x.astype("float32") for x in leaves])


def shapes(model, inputs):
  return jax.eval_shape(model.init, jax.random.key(0), inputs)


@functools.cache
def variables(model):
  points = jax.ShapeDtypeStruct((1, 20, 3), "float32")
  return randomised(shapes(model, points if model is TINY else (points, jax.ShapeDtypeStruct((1,), "int32"))))


@functools.partial(jax.jit, static_argnames="model")
def evaluate(model, inputs):
  return model.apply(variables(model), inputs)


def watch(run, kept, replaced=None):
  """Calls `run`, noting inputs and outputs of the modules named in `kept`, the calls of some classes replaced."""

  def note(call, args, kwargs, context):
    if context.method_name != "__call__":
      return call(*args, **kwargs)
    make = (replaced or {}).get(type(context.module))
    out = call(*args, **kwargs) if make is None else make(*args)  # their variables are left alone
    if context.module.name in kept:
      kept[context.module.name] = (args, out)
    return out

  with nn.intercept_methods(note):
    return run()


# ------------------------------------------------------------------------------------------- the published network


def test_parameter_counts_are_the_official_ones():
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  points = jax.ShapeDtypeStruct((1, 2048, 3), "float32")
  params = shapes(parot.classifier(), points)["params"]
  assert count(params) == 1_630_888
  encoder = params["encoder"]
  assert count(encoder["world"]) == 79_744 and count(encoder) - count(encoder["world"]) == 150_720
  assert count(shapes(parot.segmenter(), (points, jax.ShapeDtypeStruct((1,), "int32")))["params"]) == 1_534_738


def test_parity_with_the_official_classifier():
  model = parot.classifier()

  @jax.jit
  def run(variables, points):
    seen = dict.fromkeys(("local", "world", "neighbor_pose", "scale_pose", "encoder"))
    logits = watch(lambda: model.apply(variables, points), seen)
    feature, directions = seen["local"][1]
    centres = seen["encoder"][1].centres
    index, pose = nearest_points(centres, centres, model.neighbors)[0], seen["neighbor_pose"][0][0][0]
    near = feature[0][index].mean(1)
    # The official input of this layer, its pose in the official order.
    pose = jnp.concatenate([pose[..., 1:10], pose[..., 13:], pose[..., 10:13], pose[..., :1]], -1).mean(1)
    code = seen["encoder"][1]
    return {
      "logits": logits,
      "centres": code.centres[0, ::8],
      "directions_local": directions[0, ::4],
      "directions_global": seen["world"][1][1][0, ::4],
      "neighbor_input": jnp.concatenate([near, near - feature[0], pose], -1)[::16],
      "local": code.local[1].mean(0),
      "scale_pose": seen["scale_pose"][0][0][0, ::8],
    }

  golden_rule.check("parot", parot.from_torch, lambda v, x: run(v, x["points"]), atol=2e-5)  # the bar is 2e-4


def test_parity_with_the_official_segmenter():
  model = parot.segmenter(centre_quirk=True)

  @jax.jit
  def run(variables, points, category):
    logits = model.apply(variables, (points, category))
    return {"logits": logits[:, ::32], "mean": logits.mean(1)}

  golden_rule.check("parot_parts", parot.from_torch, lambda v, x: run(v, x["points"], x["category"]), atol=1e-4)


@pytest.mark.parametrize("slug", ["parot", "parot_parts"])
def test_weights_return_to_their_official_names(slug):
  import json

  with np.load(golden_rule.GOLDEN / f"{slug}.npz") as file:
    state = golden_rule.state(json.loads(str(file["manifest"])))
  table = parot.weight_table(parts=slug == "parot_parts")
  back = interop.state_dict(parot.from_torch(state), table)
  assert back.keys() == {name for name in state if not name.endswith("num_batches_tracked")}
  for name, array in back.items():
    np.testing.assert_array_equal(array, state[name], name)
  del state["local_enc.intra_layer.pos.weight"]
  with pytest.raises(ValueError, match="missing: 'local_enc.intra_layer.pos.weight'"):
    parot.from_torch(state)


# ------------------------------------------------------------------------------------- invariance that holds by algebra


def test_poses_are_invariant_under_rotation_and_not_under_reflection():
  first, second, offset = normal(50, 2, 3), normal(50, 2, 3, seed=1), normal(50, 3, seed=2)
  unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)

  @jax.jit
  def pose(first, second, offset):
    return parot.relative_pose(parot.frame(first), parot.frame(second), offset)

  given = pose(unit(first), unit(second), offset)
  for seed in range(3):
    r = rotations(seed=seed)
    np.testing.assert_allclose(pose(unit(first) @ r, unit(second) @ r, offset @ r), given, atol=1e-6)
  mirror = np.diag([1, 1, -1]).astype("float32")
  assert np.abs(pose(unit(first) @ mirror, unit(second) @ mirror, offset @ mirror) - given).max() > 0.1
  assert np.abs(pose(unit(first) @ r, unit(second), offset) - given).max() > 0.1


def test_pose_is_what_frames_see():
  """Against the definition, an element at a time."""
  a, b, v = normal(2, 3), normal(2, 3, seed=1), normal(3, seed=2)
  frames = [np.stack([*f, np.cross(*f) / np.linalg.norm(np.cross(*f))]) for f in (a, b)]
  expected = [np.linalg.norm(v)]
  expected += [frames[0][i] @ frames[1][j] for i in range(3) for j in range(3)]
  expected += [f[i] @ v / np.linalg.norm(v) for f in frames for i in range(3)]
  found = jax.jit(lambda a, b, v: parot.relative_pose(parot.frame(a), parot.frame(b), v))(a, b, v)
  np.testing.assert_allclose(found, expected, atol=1e-6)


def oracle(patches):
  """A constant feature, and directions that turn with the patch exactly: to its mean and to its farthest point."""
  far = jnp.take_along_axis(patches, (patches**2).sum(-1).argmax(-1)[..., None, None], 2)[:, :, 0]
  directions = jnp.stack([patches.mean(2), far], -2)
  return jnp.ones((*patches.shape[:2], 8)), directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)


def test_network_is_invariant_where_directions_turn_with_patches():
  """With exact directions in place of learned ones the whole network does not see a rotation, but a reflection it does.
  With networks for directions that have not learned, it sees both. (The segmenter has all of the classifier.)"""
  points, category, made = normal(2, 20, 3), np.array([0, 1]), variables(PARTS)

  @jax.jit
  def run(points):
    kept = dict.fromkeys(("neighbor_pose", "point_pose", "scale_pose"))
    logits = watch(lambda: PARTS.apply(made, (points, category)), kept, {parot.Disentangle: oracle})
    return logits, [call[0][0] for call in kept.values()]

  logits, poses = run(points)
  for seed in range(2):
    turned = run(points @ rotations(2, seed=seed))
    np.testing.assert_allclose(turned[0], logits, atol=2e-5 * np.abs(logits).max())
    for mine, given in zip(turned[1], poses, strict=True):
      np.testing.assert_allclose(mine, given, atol=2e-6)
  assert np.abs(run(points * np.array([1, 1, -1], "float32"))[0] - logits).max() > 1e-3
  assert np.abs(evaluate(PARTS, (points @ rotations(2), category)) - evaluate(PARTS, (points, category))).max() > 1e-3


def test_order_of_points_does_not_matter():
  points = normal(2, 20, 3)
  order = np.random.default_rng(1).permutation(20)
  category = np.array([1, 0])
  moved, logits = evaluate(PARTS, (points[:, order], category)), evaluate(PARTS, (points, category))
  np.testing.assert_allclose(moved, logits[:, order], atol=1e-5)
  assert np.abs(evaluate(PARTS, (points, 1 - category)) - logits).max() > 1e-3  # the category is heard


def test_clouds_of_a_batch_do_not_meet():
  points, category = normal(2, 20, 3), np.array([0, 1])
  twice = evaluate(PARTS, (points[[0, 0]], category[[0, 0]]))
  np.testing.assert_array_equal(twice[0], twice[1])
  np.testing.assert_allclose(twice[0], evaluate(PARTS, (points, category))[0], atol=1e-4)


def test_centre_quirk_moves_centres_to_the_sphere():
  quirk, category = PARTS.clone(centre_quirk=True), np.array([0, 1])
  run = jax.jit(lambda x: quirk.apply(variables(PARTS), (x, category)))
  axes = np.concatenate([np.eye(3), -np.eye(3)]).astype("float32")  # of length one exactly
  on_sphere = np.stack([np.tile(axes, (4, 1))[:20]] * 2)
  np.testing.assert_allclose(run(on_sphere), evaluate(PARTS, (on_sphere, category)), atol=1e-4)
  assert np.abs(run(2 * on_sphere) - evaluate(PARTS, (2 * on_sphere, category))).max() > 1e-3


# --------------------------------------------------------------------------------------- invariance that is learned


def test_direction_loss_is_zero_for_what_turns_with_the_patch():
  patches, r1, r2 = normal(4, 6, 10, 3), rotations(4, 6), rotations(4, 6, seed=1)
  one, two = parot.rotate(patches, r1), parot.rotate(patches, r2)
  np.testing.assert_allclose(one, patches @ r1, atol=1e-6)
  np.testing.assert_allclose(parot.unrotate(one, r1), patches, atol=1e-6)
  d1, d2 = oracle(one)[1], oracle(two)[1]
  assert parot.direction_loss(d1, d2, r1, r2) < 1e-12
  expected = np.mean((d1 - np.einsum("bsvi,bsji,bsjk->bsvk", d2, r1, r2)) ** 2)  # rotations exchanged: far from zero
  assert expected > 0.1
  np.testing.assert_allclose(parot.direction_loss(d1, d2, r2, r1), expected, rtol=1e-5)
  fixed = np.broadcast_to(np.eye(3, dtype="float32")[:2], d1.shape)  # constant directions
  # Two independent unit vectors differ by |a - b|^2 = 2 in the mean, over three entries.
  assert 0.4 < parot.direction_loss(fixed, fixed, r1, r2) < 0.95


def test_orthogonality_loss():
  directions = np.broadcast_to(np.eye(3, dtype="float32")[:2], (7, 2, 3))
  assert parot.orthogonality_loss(directions) == 0
  assert parot.orthogonality_loss(directions[:, [0, 0]]) == 1
  tilted = np.stack([directions[:, 0], [0.6, 0.8, 0] * np.ones((7, 1), "float32")], 1)
  np.testing.assert_allclose(parot.orthogonality_loss(tilted), 0.36, rtol=1e-6)


def test_training_turns_directions_back():
  """With exact directions the rotations of training leave no trace: L_dir is 0, and logits are those of other keys.
  All points are centres, in whichever order they are sampled."""
  model = TINY.clone(num_patches=8, global_size=8, dropout=0.0)
  points, made = normal(2, 8, 3), variables(TINY)

  @jax.jit
  def run(key):
    call = functools.partial(model.apply, made, points, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
    return watch(call, {}, {parot.Disentangle: oracle})[0]

  (logits, siamese), (again, _) = run(jax.random.key(0)), run(jax.random.key(1))
  np.testing.assert_allclose(again, logits, atol=1e-4)
  np.testing.assert_allclose(siamese.direction, 0, atol=1e-10)
  np.testing.assert_array_equal(siamese.invariance, 0)


def test_training_returns_the_siamese_losses():
  points, label = normal(4, 20, 3), np.array([0, 1, 2, 1])

  @jax.jit
  def run(variables, key):
    rngs = {"dropout": key}
    return TINY.apply(variables, points, train=True, rngs=rngs, mutable=["batch_stats"])

  start = variables(TINY)
  (logits, siamese), updated = run(start, jax.random.key(0))
  (again, _), _ = run(start, jax.random.key(1))
  assert np.abs(logits - again).max() > 1e-3  # other rotations, other starts
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), start["batch_stats"], updated["batch_stats"])
  assert all(jax.tree.leaves(moved))
  assert all(term.shape == (2,) and (term > 0).all() for term in siamese)

  value, metrics = parot.objective(invariance=(0.5, 0.25))((logits, siamese), {"label": label})
  target = np.full((4, 3), 0.1)
  target[np.arange(4), label] = 0.8
  entropy = -(target * jax.nn.log_softmax(logits)).sum(-1).mean()
  np.testing.assert_allclose(metrics["cross_entropy"], entropy, rtol=1e-5)
  expected = entropy + siamese.direction.sum() + siamese.orthogonality @ np.array([0.2, 0.1])
  np.testing.assert_allclose(value, expected + siamese.invariance @ np.array([0.5, 0.25]), rtol=1e-5)
  np.testing.assert_allclose(parot.objective()(logits, {"label": label})[0], entropy, rtol=1e-5)
  with pytest.raises(ValueError, match=r"direction: got \(1.0,\)"):
    parot.objective(direction=(1.0,))
  with pytest.raises(ValueError, match="label_smoothing: got 0.6, expected less than 0.5"):
    parot.objective(label_smoothing=0.6)(logits[:, :2], {"label": label % 2})


# --------------------------------------------------------------------------------------------------------------- layers


def test_joint_layer_is_a_dense_layer_of_the_concatenation():
  x, y = normal(2, 6, 5), normal(2, 6, 4, seed=1)
  layer = parot.JointDense(7)
  made = layer.init(jax.random.key(0), x, y)
  expected = np.concatenate([x, y], -1) @ made["params"]["kernel"]
  np.testing.assert_allclose(sum(layer.apply(made, x, y)), expected, atol=1e-5)


def test_geometry_stays_finite_at_the_origin():

  @jax.jit
  def grads(v, parallel, directions):
    pose = jax.grad(lambda v: parot.relative_pose(jnp.eye(3), jnp.eye(3), v)[1:].sum())(v)
    whole = jax.grad(lambda d: parot.frame(d).sum())(parallel)
    third = [jax.grad(lambda d, s=s: parot.frame(d, differentiable=s)[2].sum())(directions) for s in (True, False)]
    return pose, whole, *third

  pose, whole, passed, stopped = grads(jnp.zeros(3), jnp.ones((2, 3)) / np.sqrt(3), normal(2, 3))
  np.testing.assert_array_equal(pose, 0)
  assert np.isfinite(whole).all()
  # Between scales no gradient goes through the cross product.
  assert np.abs(passed).max() > 0.1
  np.testing.assert_array_equal(stopped, 0)


def test_points_are_not_rounded_to_bfloat16():
  """Compute is narrow, geometry is not: an offset of a thousandth far from the origin survives."""
  kept = {"encoder": None}
  model = TINY.clone(dtype="bfloat16")
  points, made = normal(1, 20, 3) + np.float32(0.001), variables(TINY)
  watch(lambda: jax.eval_shape(lambda: model.apply(made, points)), kept)
  code = kept["encoder"][1]
  assert {x.dtype for x in (code.centres, code.pose, *code.frames)} == {jnp.dtype("float32")}
  assert code.local.dtype == jnp.bfloat16


def test_hidden_poses_are_not_used():
  points, known = normal(2, 20, 3), variables(TINY)
  other = jax.tree_util.tree_map_with_path(
    lambda path, x: -x if "scale_pose" in jax.tree_util.keystr(path) and x.ndim == 2 else x, known
  )
  moved = {}
  for restore in (True, False):
    apply = jax.jit(TINY.clone(restore_pose=restore).apply)
    moved[restore] = np.abs(apply(known, points) - apply(other, points)).max()
  assert moved[True] > 1e-3 and moved[False] == 0
