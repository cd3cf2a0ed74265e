"""Conversions against what torch's layers are defined to compute, written here in NumPy and SciPy."""

import pickle
import re
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import scipy.signal

from jaxlab import interop


def torch_conv(x, w, bias, groups=1):
  """NC* input, [O, I/g, *k] weight, stride 1, no padding: cross-correlation, as `torch.nn.Conv` is defined."""
  n, o, per = x.shape[0], w.shape[0], w.shape[1]
  out = []
  for b in range(n):
    for c in range(o):
      group = c // (o // groups)
      maps = [scipy.signal.correlate(x[b, group * per + i], w[c, i], "valid", method="direct") for i in range(per)]
      out.append(sum(maps) + bias[c])
  return np.stack(out).reshape(n, o, *out[0].shape)


def torch_conv_transpose(x, w, bias, stride, padding, output_padding):
  """[N, I, L] input, [I, O, k] weight: every input value adds its scaled window to the output (1-D)."""
  n, _, length = x.shape
  k = w.shape[2]
  full = np.zeros((n, w.shape[1], (length - 1) * stride + k + output_padding))
  for t in range(length):
    full[:, :, t * stride : t * stride + k] += np.einsum("ni,iok->nok", x[:, :, t], w)
  return full[:, :, padding : full.shape[2] - padding] + bias[:, None]


def apply(layer, state_dict, rule, x, **kwargs):
  """Converts one layer's weights and applies it, with shapes checked against the layer's own."""
  shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
  converted = interop.variables(state_dict, {"params/layer": rule}, like={c: {"layer": v} for c, v in shapes.items()})
  return layer.apply({c: v["layer"] for c, v in converted.items()}, x, **kwargs)


def normal(*shape, seed=0):
  return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
  ("window", "channels", "features", "groups"),
  [((3,), 2, 4, 1), ((3, 2), 3, 4, 1), ((2, 3, 2), 2, 3, 1), ((3, 3), 4, 4, 4), ((1, 1), 6, 4, 2), ((2, 2), 4, 8, 4)],
  ids=["1d", "2d", "3d", "depthwise", "grouped-1x1", "multiplier"],
)
def test_conv(window, channels, features, groups):
  w, b = normal(features, channels // groups, *window), normal(features)
  x = normal(2, channels, *[5] * len(window))
  layer = nn.Conv(features, window, padding="VALID", feature_group_count=groups)
  got = apply(layer, {"c.weight": w, "c.bias": b}, interop.conv("c"), np.moveaxis(x, 1, -1))
  np.testing.assert_allclose(np.moveaxis(got, -1, 1), torch_conv(x, w, b, groups), atol=1e-5)


@pytest.mark.parametrize(
  ("kernel", "stride", "padding", "output_padding"),
  [(3, 1, 0, 0), (2, 2, 0, 0), (3, 2, 1, 1), (4, 2, 1, 0), (5, 3, 2, 1)],
)
def test_conv_transpose(kernel, stride, padding, output_padding):
  w, b, x = normal(3, 4, kernel), normal(4), normal(2, 3, 6)
  pads = [(kernel - 1 - padding, kernel - 1 - padding + output_padding)]
  layer = nn.ConvTranspose(4, (kernel,), strides=(stride,), padding=pads)
  got = apply(layer, {"c.weight": w, "c.bias": b}, interop.conv_transpose("c"), np.moveaxis(x, 1, -1))
  expected = torch_conv_transpose(x, w, b, stride, padding, output_padding)
  np.testing.assert_allclose(np.moveaxis(got, -1, 1), expected, atol=1e-5)


def test_dense_norms_and_embedding():
  x = normal(4, 6)
  w, b = normal(5, 6), normal(5)
  np.testing.assert_allclose(
    apply(nn.Dense(5), {"d.weight": w, "d.bias": b}, interop.dense("d"), x), x @ w.T + b, atol=1e-5
  )
  pointwise = {"d.weight": w[:, :, None, None]}
  np.testing.assert_allclose(
    apply(nn.Dense(5, use_bias=False), pointwise, interop.dense("d", bias=False, spatial=2), x), x @ w.T, atol=1e-5
  )
  scale, bias = normal(6), normal(6, seed=1)
  centred = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(
    apply(nn.LayerNorm(), {"n.weight": scale, "n.bias": bias}, interop.norm("n"), x), centred * scale + bias, atol=1e-4
  )
  mean, var = normal(6, seed=2), np.abs(normal(6, seed=3)) + 0.5
  state = {"n.weight": scale, "n.bias": bias, "n.running_mean": mean, "n.running_var": var}
  got = apply(nn.BatchNorm(use_running_average=True), state | {"n.num_batches_tracked": 7}, interop.batch_norm("n"), x)
  np.testing.assert_allclose(got, (x - mean) / np.sqrt(var + 1e-5) * scale + bias, atol=1e-4)
  table = normal(7, 3)
  ids = np.array([6, 0, 3])
  np.testing.assert_array_equal(apply(nn.Embed(7, 3), {"e.weight": table}, interop.embed("e"), ids), table[ids])


RULES = {
  "params/stem": interop.conv("stem.0", bias=False),
  "params/stem_norm": interop.batch_norm("stem.1"),
  "params/up": interop.conv_transpose("up"),
  "params/blocks/0/norm": interop.norm("blocks.0.norm"),
  "params/blocks/0/mix": interop.dense("blocks.0.mix", spatial=2),
  "params/tokens": interop.embed("tokens"),
  "params/position": interop.raw("pos", lambda p: p[0], lambda p: p[None]),
  "params/head": interop.dense("head", bias=False),
  "batch_stats/free": interop.batch_norm("free", affine=False),
}


@pytest.fixture
def official():
  return {
    "stem.0.weight": normal(4, 3, 3, 3),
    **{f"stem.1.{n}": normal(4) for n in ("weight", "bias", "running_mean", "running_var")},
    "up.weight": normal(4, 2, 2, 2),
    "up.bias": normal(2).astype(ml_dtypes.bfloat16),
    "blocks.0.norm.weight": normal(4).astype(np.float16),
    "blocks.0.norm.bias": normal(4).astype(np.float64),
    "blocks.0.mix.weight": normal(5, 4, 1, 1),
    "blocks.0.mix.bias": normal(5),
    "tokens.weight": normal(9, 4),
    "pos": normal(1, 9, 4),
    "head.weight": normal(3, 4),
    "free.running_mean": normal(4),
    "free.running_var": normal(4),
  }


def test_round_trip_is_exact(official):
  there = interop.variables(official, RULES)
  assert there["params"]["blocks"]["0"]["mix"]["kernel"].shape == (4, 5)
  assert there["batch_stats"].keys() == {"stem_norm", "free"}
  back = interop.state_dict(there, RULES)
  assert back.keys() == official.keys()
  for name, array in official.items():
    assert back[name].dtype == array.dtype and back[name].tobytes() == array.tobytes(), name
  # ... also from device arrays and through a frozen or jitted tree, for dtypes that JAX keeps.
  single = {name: array for name, array in official.items() if array.dtype != np.float64}
  rules = {key: rule for key, rule in RULES.items() if "norm" not in key} | {
    "params/n": interop.norm("blocks.0.norm", False)
  }
  single = {name: array for name, array in single.items() if not name.startswith("stem.1")}
  moved = jax.jit(lambda tree: tree)(interop.variables(single, rules))
  for name, array in interop.state_dict(moved, rules).items():
    np.testing.assert_array_equal(array, single[name])


def test_variables_do_not_share_memory_with_the_source(official):
  there = interop.variables(official, RULES)
  there["params"]["head"]["kernel"][:] = 0
  there["params"]["position"][:] = 0
  assert official["head.weight"].any() and official["pos"].any()


def test_every_mismatch_is_reported_at_once(official):
  official["extra.weight"] = np.zeros((2, 3))
  official["buffer.index"] = np.zeros(4, int)
  del official["stem.1.running_var"], official["up.bias"]
  official["head.weight"] = np.zeros((3, 4, 1))
  official["blocks.0.mix.weight"] = np.zeros((5, 4, 3, 3))
  with pytest.raises(ValueError) as error:
    interop.variables(official, RULES, ignore=("buffer.*",))
  message = str(error.value)
  assert message.startswith("state_dict: got 5 mismatches")
  assert "missing: 'stem.1.running_var', for batch_stats/stem_norm/var" in message
  assert "missing: 'up.bias', for params/up/bias" in message
  assert "unused: 'extra.weight' [2, 3]" in message
  assert "misshaped: 'head.weight' is [3, 4, 1], expected 2 axes, for params/head/kernel" in message
  assert "misshaped: 'blocks.0.mix.weight' is [5, 4, 3, 3]" in message


def test_like_checks_every_array():
  model = nn.Sequential([nn.Dense(4), nn.Dense(2)])
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 3)))["params"]
  like = {"params": dict(zip("ab", shapes.values(), strict=True))}
  state = {"a.weight": normal(4, 3), "a.bias": normal(4), "b.weight": normal(3, 4), "c.weight": normal(1, 1)}
  rules = {"params/a": interop.dense("a"), "params/b": interop.dense("b", bias=False)}
  with pytest.raises(ValueError) as error:
    interop.variables(state, rules | {"params/c": interop.dense("c", bias=False)}, like=like)
  message = str(error.value)
  assert "got 3 mismatches" in message
  assert "missing: no rule makes params/b/bias [2]" in message
  assert "misshaped: params/b/kernel would be [4, 3], expected [4, 2]" in message
  assert "unused: params/c/kernel [1, 1] is no variable of the model" in message
  # A missing tensor is not reported a second time as a missing variable.
  with pytest.raises(ValueError, match="got 1 mismatches"):
    interop.variables(
      {"a.weight": normal(4, 3)}, {"params/a": interop.dense("a")}, like={"params": {"a": shapes["layers_0"]}}
    )


def test_state_dict_reports_every_mismatch_at_once():
  rules = {"params/a": interop.dense("a"), "params/b": interop.norm("b", bias=False)}
  wrong = {"params": {"a": {"kernel": normal(2, 3), "bias": normal(1, 3)}, "c": {"kernel": normal(2, 2)}}}
  with pytest.raises(ValueError) as error:
    interop.state_dict(wrong, rules)
  message = str(error.value)
  assert "variables: got 3 mismatches" in message
  assert "missing: params/b/scale, for 'b.weight'" in message
  assert "misshaped: params/a/bias is [1, 3]" in message
  assert "unused: params/c/kernel [2, 2]" in message


def test_tied_weights():
  rules = {"params/embed": interop.embed("tied"), "params/head": interop.dense("tied", bias=False)}
  tied = {"tied.weight": normal(5, 3)}
  there = interop.variables(tied, rules)
  np.testing.assert_array_equal(there["params"]["embed"]["embedding"], there["params"]["head"]["kernel"].T)
  assert interop.state_dict(there, rules).keys() == {"tied.weight"}
  there["params"]["head"]["kernel"][0, 0] += 1
  with pytest.raises(ValueError, match=r"differs: params/head/kernel .* share 'tied.weight'"):
    interop.state_dict(there, rules)


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ({"classifier": interop.dense("W")}, r"rules: got key 'classifier', expected '<collection>/<path>'"),
    (
      {"params/a": interop.dense("W"), "params/a/bias": interop.raw("b")},
      r"rules: got two rules for \['params/a/bias'\]",
    ),
    ({"params/a": interop.raw("W"), "params/a/b": interop.raw("b")}, r"rules: got rules for \['params/a/b'\]"),
  ],
)
def test_bad_rules(rules, message):
  with pytest.raises(ValueError, match=message):
    interop.variables({"W.weight": normal(2, 2), "W.bias": normal(2), "b": normal(2)}, rules)


def test_load_npz_and_safetensors(tmp_path):
  state = {"a.weight": normal(2, 3), "n": np.array(3), "h": normal(3).astype(ml_dtypes.bfloat16), "i": np.arange(3)}
  safetensors.numpy.save_file(state, tmp_path / "w.safetensors")
  loaded = interop.load(tmp_path / "w.safetensors")
  assert loaded.keys() == state.keys()
  for name, array in state.items():
    assert loaded[name].dtype == array.dtype
    np.testing.assert_array_equal(loaded[name], array)
  np.savez(tmp_path / "w.npz", **{name: state[name] for name in ("a.weight", "h")})
  for name, array in interop.load(str(tmp_path / "w.npz")).items():
    assert array.dtype == state[name].dtype
    np.testing.assert_array_equal(array, state[name])


def bad_file(folder, case):
  def path(name, content=b""):
    (folder / name).write_bytes(content)
    return folder / name

  np.savez(folder / "objects.npz", x=np.array([{}], dtype=object))
  np.savez(folder / "good.npz", x=np.zeros(100))
  safetensors.numpy.save_file({"x": np.zeros(100)}, folder / "good.safetensors")
  np.savez_compressed(folder / "packed.npz", x=normal(1000))
  flipped = bytearray((folder / "packed.npz").read_bytes())
  flipped[80] ^= 255
  np.save(folder / "array.npy", np.ones(3))
  return {
    "one array": lambda: (folder / "array.npy").rename(folder / "array.npz"),
    "flipped bit": lambda: path("f.npz", bytes(flipped)),
    "missing": lambda: folder / "none.npz",
    "folder": lambda: folder,
    "suffix": lambda: path("w.h5"),
    "objects": lambda: folder / "objects.npz",
    "truncated npz": lambda: path("t.npz", (folder / "good.npz").read_bytes()[:-30]),
    "truncated safetensors": lambda: path("t.safetensors", (folder / "good.safetensors").read_bytes()[:-30]),
    "empty safetensors": lambda: path("e.safetensors"),
    "pickle as npz": lambda: path("p.npz", pickle.dumps({"x": 1})),
  }[case]()


@pytest.mark.parametrize(
  "case",
  [
    "missing",
    "folder",
    "suffix",
    "objects",
    "truncated npz",
    "truncated safetensors",
    "empty safetensors",
    "pickle as npz",
    "one array",
    "flipped bit",
  ],
)
def test_load_names_a_bad_file(tmp_path, case):
  path = bad_file(tmp_path, case)
  with pytest.raises(ValueError, match=f"path: got {re.escape(repr(str(path)))}"):
    interop.load(path)


def test_torch_file_without_torch_says_so(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)  # import fails
  (tmp_path / "w.pth").write_bytes(b"")
  with pytest.raises(ImportError, match=r"w\.pth.* needs PyTorch"):
    interop.load(tmp_path / "w.pth")


class Tensor:
  """As much of `torch.Tensor` as the conversion asks for."""

  dtype = "torch.float32"

  def __init__(self, array):
    self.array = array

  def detach(self):
    return self

  cpu = contiguous = detach

  def numpy(self):
    return self.array


def test_torch_file(tmp_path, monkeypatch):
  state = {"W.weight": Tensor(normal(2, 3)), "W.bias": Tensor(normal(2))}
  seen = {}

  def load(path, **options):
    seen.update(options)
    if path.name == "bad.pth":
      raise pickle.UnpicklingError("Unsupported global: os.system")
    return {"model": state, "epoch": 3} if path.name == "checkpoint.pth" else state

  monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load, Tensor=Tensor))
  for name in ("plain.pt", "checkpoint.pth", "bad.pth"):
    (tmp_path / name).write_bytes(b"x")
  np.testing.assert_array_equal(interop.load(tmp_path / "plain.pt")["W.weight"], normal(2, 3))
  assert seen == {"map_location": "cpu", "weights_only": True}
  assert interop.load(tmp_path / "checkpoint.pth", key="model").keys() == state.keys()
  with pytest.raises(ValueError, match=r"key: got None, expected the entry .* \['epoch', 'model'\]"):
    interop.load(tmp_path / "checkpoint.pth")
  with pytest.raises(ValueError, match=r"key: got 'ema', expected one of \['epoch', 'model'\]"):
    interop.load(tmp_path / "checkpoint.pth", key="ema")
  with pytest.raises(ValueError, match="does not load with weights_only=True"):
    interop.load(tmp_path / "bad.pth")
  for name in ("base_ep4k.model", "encoder.pth.tar", "last.ckpt"):  # as releases are called
    (tmp_path / name).write_bytes(b"x")
    assert interop.load(tmp_path / name).keys() == state.keys()
  # A live module's state dict converts as it is.
  kernel = interop.variables(state, {"params/d": interop.dense("W")})["params"]["d"]["kernel"]
  np.testing.assert_array_equal(kernel, normal(2, 3).T)


def test_key_is_for_torch_files(tmp_path):
  np.savez(tmp_path / "w.npz", x=normal(2))
  with pytest.raises(ValueError, match="key: got 'model', expected None"):
    interop.load(tmp_path / "w.npz", key="model")


def test_joined_parts_are_one_and_incomplete_ones_are_reported():
  state = {"a.weight": np.ones((2, 3)), "b.weight": np.zeros((1, 3)), "c.weight": np.ones((2, 2)), "d": np.ones(1)}
  made = interop.joined(state, {"ab.weight": ["a.weight", "b.weight"], "ce.weight": ["c.weight", "e.weight"]})
  assert set(made) == {"ab.weight", "d"}
  np.testing.assert_array_equal(made["ab.weight"], [[1, 1, 1], [1, 1, 1], [0, 0, 0]])
  assert set(state) == {"a.weight", "b.weight", "c.weight", "d"}
  with pytest.raises(ValueError, match="missing: 'ce.weight'"):
    rules = {f"params/{name}": interop.dense(name, bias=False) for name in ("ab", "ce")} | {
      "params/d": interop.raw("d")
    }
    interop.variables(made, rules)
