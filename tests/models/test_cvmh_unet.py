import chex
import golden_rule
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.special

from jaxlab import train
from jaxlab.models import cvmh_unet
from jaxlab.nn.scan_2d import CS2D, SS2D, SelectiveScan2D
from jaxlab.nn.selective_scan import selective_scan


def count(tree):
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ("model", "parameters"),
  [
    (cvmh_unet.vm_unet(), 27_427_686),
    (cvmh_unet.vm_unet(decoder_depths=(2, 2, 2, 2)), 27_533_094),
    # and 4 (C^2 + 13 C + k) for the blocks of each stage, 5/2 C^2 + 9/2 C + k for each fusion, counted by hand
    (cvmh_unet.CVMHUNet(), 27_533_094 + 3_208_392 + 486_877),
  ],
)
def test_parameter_counts(model, parameters):
  x = jnp.zeros((1, 180, 240, 3))
  logits, variables = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), x))
  assert count(variables["params"]) == parameters
  assert logits.shape == (1, 180, 240, 6)


def test_golden_vm_unet():
  shape = {"widths": (32, 64, 128), "encoder_depths": (2, 1, 1), "decoder_depths": (1, 1, 2)}
  model = jax.jit(cvmh_unet.vm_unet(5, **shape).apply)
  apply = lambda variables, inputs: model(variables, inputs["image"].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
  golden_rule.check("cvmh_unet", cvmh_unet.from_torch, apply, atol=1e-4)
  wrapped = lambda state: cvmh_unet.from_torch({f"vmunet.{name}": value for name, value in state.items()})
  golden_rule.check("cvmh_unet", wrapped, apply, atol=1e-4)


# ------------------------------------------------------------------------------------------------ parts, in NumPy


def randomised(model, *args, **kwargs):
  """Variables of a module, every one random, in float64 for the oracle; and the module's output."""
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *args))
  shapes = {name: tree for name, tree in shapes.items() if name != "intermediates"}
  rng = np.random.default_rng(0)
  draw = lambda path, s: (
    rng.uniform(0.5, 1.5, s.shape) if path[-1].key in ("var", "scale") else 0.4 * rng.standard_normal(s.shape)
  )
  variables = jax.tree_util.tree_map_with_path(draw, shapes)
  single = jax.tree.map(lambda a: a.astype("float32"), variables)
  return variables, jax.jit(lambda v: model.apply(v, *args, **kwargs))(single)


def normalise(variables, name, x):
  p, s = variables["params"][name], variables["batch_stats"][name]
  return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]


def channel_conv(kernel, v):
  kernel = kernel["conv"]["kernel"].reshape(-1)
  return np.stack([np.convolve(row, kernel[::-1], "same") for row in v.reshape(-1, v.shape[-1])]).reshape(v.shape)


def test_block_adds_attended_scan_and_convolution():
  x = np.random.default_rng(1).standard_normal((2, 5, 6, 8)).astype("float32")
  options = {"directions": CS2D, "state_size": 2}
  model = cvmh_unet.Block(**options)
  variables, got = randomised(model, x, False)
  params = variables["params"]
  bare = {name: value for name, value in params.items() if name != "attention" and not name.startswith("local")}
  single = jax.tree.map(lambda a: a.astype("float32"), bare)
  alone = cvmh_unet.Block(local=False, channel_attention=False, residual=False, **options)
  g = np.asarray(jax.jit(lambda p: alone.apply({"params": p}, x, False))(single), np.float64)

  u = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  u = u * params["norm"]["scale"] + params["norm"]["bias"]
  padded, kernel = np.pad(u, ((0, 0), (1, 1), (1, 1), (0, 0))), params["local_conv"]["kernel"][:, :, 0]
  lo = sum(kernel[i, j] * padded[:, i : i + 5, j : j + 6] for i in range(3) for j in range(3))
  lo = np.maximum(normalise(variables, "local_norm1", lo), 0) @ params["local_proj"]["kernel"]
  weight = scipy.special.expit(channel_conv(params["attention"], g.mean((1, 2))))
  want = x + g * weight[:, None, None] + normalise(variables, "local_norm2", lo)
  np.testing.assert_allclose(got, want, atol=5e-5)


@pytest.mark.parametrize(("channels", "taps"), [(8, 3), (96, 3), (192, 5), (384, 5), (768, 5), (2048, 7)])
def test_taps_grow_with_channels(channels, taps):
  assert cvmh_unet.taps(channels) == taps


PAIRS_U, PAIRS_V = ([int(k) for k in row.split()] for row in (
  "0 0 6 0 0 1 1 4 5 1 3 0 0 0 3 2", "0 1 0 5 2 0 2 0 0 6 0 4 6 3 5 2"
))  # fmt: skip


def statistics(x):
  """[B, s, s, C] -> [B, 3, C] in float64, means from scipy's transform, extremes from inverse transforms of pulses."""
  side, parts = x.shape[1], []
  for u, v in zip(np.array(PAIRS_U) * (side // 7), np.array(PAIRS_V) * (side // 7), strict=True):
    pulse = np.zeros((side, side))
    pulse[u, v] = 1
    m = x * scipy.fft.idctn(pulse, norm="ortho")[..., None]
    mean = scipy.fft.dctn(x, axes=(1, 2), norm="ortho")[:, u, v] / side**2
    parts.append(np.stack([mean, m.max((1, 2)), m.min((1, 2))], 1))
  return np.mean(parts, 0)


def adaptive(x, size):
  edges = lambda n: [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
  rows = [[x[:, a:b, c:d].mean((1, 2)) for c, d in edges(x.shape[2])] for a, b in edges(x.shape[1])]
  return np.stack([np.stack(row, 1) for row in rows], 1)


def test_fusion():
  e, d = np.random.default_rng(2).standard_normal((2, 2, 9, 12, 8)).astype("float32")
  model = cvmh_unet.Fusion(14)
  variables, (got, state) = randomised(model, e, d, mutable=["intermediates"])
  params = variables["params"]
  x = e.astype("float64") + d
  G = channel_conv(params["frequency_conv"], statistics(adaptive(x, 14))).sum(1)
  lo = np.maximum(normalise(variables, "point_norm1", x @ params["point1"]["kernel"]), 0) @ params["point2"]["kernel"]
  w = scipy.special.expit(G[:, None, None] + normalise(variables, "point_norm2", lo))
  (weight,) = state["intermediates"]["weight"]
  np.testing.assert_allclose(weight, w, atol=2e-5)
  assert weight.min() > 0 and weight.max() < 1 and weight.max() - weight.min() > 0.5
  out = np.concatenate([w * e + (1 - w) * d, x], -1) @ params["join"]["kernel"]
  np.testing.assert_allclose(got, np.maximum(normalise(variables, "join_norm", out), 0), atol=5e-5)
  with pytest.raises(ValueError, match="decoded: got shape"):
    model.init(jax.random.key(0), e, d[:, :8])


def test_fusion_without_pixels_and_with_dense_layers():
  e, d = np.random.default_rng(2).standard_normal((2, 2, 7, 7, 8)).astype("float32")
  model = cvmh_unet.Fusion(7, pointwise=False, attention="dense")
  variables, (_, state) = randomised(model, e, d, mutable=["intermediates"])
  params = variables["params"]
  assert set(params) == {"frequency_dense1", "frequency_dense2", "join", "join_norm"}
  hidden = np.maximum(statistics(e.astype("float64") + d) @ params["frequency_dense1"]["kernel"], 0)
  G = (hidden @ params["frequency_dense2"]["kernel"]).sum(1)
  (weight,) = state["intermediates"]["weight"]
  np.testing.assert_allclose(weight, scipy.special.expit(G)[:, None, None], atol=2e-5)


def test_fusion_of_equal_maps_is_that_map():
  e = np.random.default_rng(3).standard_normal((1, 7, 7, 4)).astype("float32")
  model = cvmh_unet.Fusion(7)
  variables, _ = randomised(model, e, e)
  kernel = np.concatenate([np.eye(4), np.zeros((4, 4))])  # joins y alone, and the norm after it does nothing
  variables["params"] |= {"join": {"kernel": kernel}, "join_norm": {"scale": np.ones(4), "bias": np.zeros(4)}}
  variables["batch_stats"]["join_norm"] = {"mean": np.zeros(4), "var": np.full(4, 1 - 1e-5)}
  np.testing.assert_allclose(jax.jit(model.apply)(variables, e, e), np.maximum(e, 0), atol=1e-6)


def test_frequencies_of_constants_and_averages():
  x = np.random.default_rng(4).standard_normal((2, 14, 14, 3)).astype("float32")
  average, largest, smallest = np.moveaxis(np.asarray(cvmh_unet.frequency_statistics(x, 1)), 1, 0)
  np.testing.assert_allclose(average, x.mean((1, 2)) / 14, atol=1e-7)
  np.testing.assert_allclose((largest, smallest), (x.max((1, 2)) / 14, x.min((1, 2)) / 14), atol=1e-7)
  flat = jnp.full((1, 14, 14, 2), 3.0)
  alone, together = (cvmh_unet.frequency_statistics(flat, k)[:, 0] for k in (1, 16))
  np.testing.assert_allclose(16 * together, alone, atol=1e-6)  # the other 15 see nothing of a constant


# ---------------------------------------------------------------------------------------------------------- scans


def test_scan_of_4096_pixels_is_the_loop():
  rng = np.random.default_rng(5)
  normal = lambda *shape: rng.standard_normal(shape).astype("float32")
  inputs = {"u": normal(4096, 3), "delta": rng.uniform(0.001, 0.1, (4096, 3)).astype("float32")}
  inputs |= {"A": -np.tile(np.arange(1.0, 17), (3, 1)).astype("float32"), "B": normal(4096, 16), "C": normal(4096, 16)}

  def loop(u, delta, A, B, C):
    def step(h, t):
      u, delta, B, C = t
      h = jnp.exp(delta[:, None] * A) * h + (delta * u)[:, None] * B
      return h, h @ C

    return jax.lax.scan(step, jnp.zeros((3, 16)), (u, delta, B, C))[1]

  target = normal(4096, 3)
  results = []
  for scan in (selective_scan, loop):
    value = lambda arrays, scan=scan: jnp.vdot(scan(**arrays), target)
    results.append((scan(**inputs), jax.jit(jax.grad(value))(inputs)))
  (y, gradient), (want, slope) = results
  np.testing.assert_allclose(y, want, atol=1e-5)
  for name, g in gradient.items():
    np.testing.assert_allclose(g, slope[name], atol=1e-5 * np.abs(slope[name]).max(), err_msg=name)


def test_cross_scan_costs_what_the_plain_one_does():
  x = jnp.zeros((1, 5, 6, 4))

  def cost(directions):
    model = SelectiveScan2D(3, directions=directions)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    equations = jax.make_jaxpr(model.apply)(params, x).jaxpr.eqns
    heavy = [e for e in equations if e.primitive.name == "dot_general" or len(e.invars) > 4]
    assert len(heavy) == 5  # the projection; for each way along the orders step sizes, and the scan
    return jax.tree.map(jnp.shape, params), sorted([v.aval.shape for v in (*e.invars, *e.outvars)] for e in heavy)

  assert cost(CS2D) == cost(SS2D)


# -------------------------------------------------------------------------------------------------- network and loss


def test_sizes_that_strides_do_not_divide_are_padded_and_cut():
  model = cvmh_unet.vm_unet(4, widths=(8,), encoder_depths=(1,), decoder_depths=(1,), state_size=2)
  x = np.random.default_rng(6).standard_normal((1, 13, 18, 3)).astype("float32")
  whole = np.pad(x, ((0, 0), (0, 3), (0, 2), (0, 0)), mode="edge")
  variables, got = randomised(model, x)
  assert got.shape == (1, 13, 18, 4)
  want = jax.jit(lambda v: model.apply(v, whole))(jax.tree.map(lambda a: a.astype("float32"), variables))
  np.testing.assert_allclose(got, want[:, :13, :18], atol=1e-5)


def tiny(**changes):
  shape = {"widths": (8, 8), "encoder_depths": (1, 1), "decoder_depths": (0, 0), "pool_sizes": (7,), "state_size": 1}
  shape |= {"directions": SS2D[:1], "local": False, "channel_attention": False}
  return cvmh_unet.CVMHUNet(3, **shape | changes)


def test_sum_for_a_skip():
  model, x = tiny(skip="add"), np.random.default_rng(8).standard_normal((1, 8, 8, 3)).astype("float32")
  variables, (_, state) = randomised(model, x, capture_intermediates=True, mutable=["intermediates"])
  made = {name: out["__call__"][0] for name, out in state["intermediates"].items() if "__call__" in out}
  want = (made["encoder1_block0"] + made["expand1_norm"]) @ variables["params"]["final"]["kernel"]
  np.testing.assert_allclose(made["final"], want, atol=1e-5)


def test_ablations_reach_the_parts():
  seen = {}

  def watch(next_call, args, kwargs, context):
    module = context.module
    if isinstance(module, cvmh_unet.Block | cvmh_unet.Fusion) and context.method_name == "__call__":
      seen[module.name] = module
    return next_call(*args, **kwargs)

  changes = {"residual": False, "pointwise": False, "attention": "dense", "frequencies": 3}
  with cvmh_unet.nn.intercept_methods(watch):
    jax.eval_shape(tiny(**changes).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  assert set(seen) == {"encoder1_block0", "encoder2_block0", "fusion1"}
  fusion = seen.pop("fusion1")
  assert (fusion.pointwise, fusion.attention, fusion.frequencies) == (False, "dense", 3)
  assert not any(block.residual for block in seen.values())


@pytest.mark.parametrize("skip", ["add", "add_before"])
def test_five_stages_of_sums_pool_nothing(skip):
  shape = {"widths": (8,) * 5, "encoder_depths": (1,) * 5, "decoder_depths": (0,) * 5, "state_size": 1}
  x = jnp.zeros((1, 64, 64, 3))
  logits, _ = jax.eval_shape(cvmh_unet.vm_unet(3, **shape, skip=skip).init_with_output, jax.random.key(0), x)
  assert logits.shape == (1, 64, 64, 3)
  with pytest.raises(ValueError, match="pool_sizes: got"):
    jax.eval_shape(cvmh_unet.CVMHUNet(3, **shape).init, jax.random.key(0), x)


def test_remat_changes_no_number():
  shape = {"widths": (8,), "encoder_depths": (2,), "decoder_depths": (0,), "local": True, "drop_path": 0.5}
  rng = np.random.default_rng(9)
  x = rng.standard_normal((4, 8, 8, 3)).astype("float32")
  shapes = jax.eval_shape(tiny(**shape).init, jax.random.key(0), x)
  variables = jax.tree.map(lambda s: rng.uniform(0.5, 1, s.shape).astype("float32"), shapes)

  def step(model):
    def loss(params):
      logits, state = model.apply(
        variables | {"params": params}, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)}
      )
      return (logits**2).mean(), (logits, state)

    traced = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(variables["params"])
    return str(traced.jaxpr).count("prevent_cse"), traced.lower().compile()(variables["params"])

  (plain, want), (recomputes, got) = (step(tiny(**shape, remat=remat)) for remat in (False, True))
  assert recomputes > plain
  chex.assert_tree_all_finite(want)
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)


def test_drop_path_rises_and_falls():
  model = cvmh_unet.vm_unet(widths=(8, 8, 8), encoder_depths=(2, 1, 1), decoder_depths=(1, 2, 1), drop_path=0.4)
  table = []

  def watch(next_call, args, kwargs, context):
    if isinstance(context.module, cvmh_unet.Block) and context.method_name == "__call__":
      table.append((context.module.name, context.module.drop_path))
    return next_call(*args, **kwargs)

  with cvmh_unet.nn.intercept_methods(watch):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  rates = [rate for _, rate in table]
  np.testing.assert_allclose(rates[:4], np.linspace(0, 0.4, 4))
  np.testing.assert_allclose(rates[4:], np.linspace(0.4, 0, 4))
  assert [name for name, _ in table[4:]] == [f"decoder{n}" for n in ("3_block0", "2_block0", "2_block1", "1_block0")]


def test_loss_is_cross_entropy_and_dice_of_what_counts():
  rng = np.random.default_rng(7)
  logits, labels, valid = rng.standard_normal((2, 3, 4, 5)), rng.integers(0, 5, (2, 3, 4)), rng.random((2, 3, 4)) < 0.7
  got = cvmh_unet.cross_entropy_and_dice(jnp.asarray(logits), jnp.where(valid, labels, 11), valid)
  p, y = scipy.special.softmax(logits[valid], -1), np.eye(5)[labels[valid]]
  dice = [(2 * (p[:, k] * y[:, k]).sum() + 1) / (p[:, k].sum() + y[:, k].sum() + 1) for k in range(5)]
  np.testing.assert_allclose(got, -np.log(p[y == 1]).mean() + 1 - np.mean(dice), rtol=1e-5)
  sure = jax.nn.one_hot(labels, 5) * 100
  np.testing.assert_allclose(cvmh_unet.cross_entropy_and_dice(sure, labels), 0, atol=1e-6)


def test_loss_refuses_what_it_would_broadcast():
  logits, labels = jnp.zeros((2, 3, 4, 5)), jnp.zeros((2, 3, 4), int)
  for argument, change in {
    "logits: got shape": {"logits": logits[..., :1]},
    "labels: got shape": {"labels": labels[:1]},
    "labels: got dtype": {"labels": labels.astype("float32")},
    "valid: got bool of shape": {"valid": jnp.ones((1, 1, 4), bool)},
    "valid: got int32": {"valid": labels + 2},
  }.items():
    with pytest.raises(ValueError, match=argument):
      cvmh_unet.cross_entropy_and_dice(**{"logits": logits, "labels": labels} | change)


def test_scans_keep_their_decays():
  model = cvmh_unet.CVMHUNet(widths=(8,), encoder_depths=(1,), decoder_depths=(1,))
  mask = train.decay_mask(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"])
  block = mask["encoder1_block0"]
  assert block["scan"] == {"x_proj": True, "dt_proj": True, "A_log": False, "D": False, "dt_bias": False}
  assert block["in_proj"]["kernel"] and not block["norm"]["scale"] and not block["conv"]["bias"]
