"""Mamba's mixer beside `transformers`' sequential path, and the bidirectional block."""

import golden_rule
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import interop, kernels
from jaxlab.nn import mamba
from jaxlab.nn.selective_scan import selective_scan

MIXER = mamba.MambaMixer(state_size=4, dt_rank=2)
RULES = mamba.weights("params", "")


def test_golden():
  """Values and gradients of the mixer and of the scan alone, for 64 and 1000 tokens."""
  swap = lambda a: jnp.swapaxes(a, -1, -2)

  def outputs(variables, inputs):
    made = {}
    for length in (64, 1000):
      x, gy = inputs[f"mixer{length}_x"], inputs[f"mixer{length}_gy"]
      y, back = jax.vjp(lambda v, x: MIXER.apply(v, x), variables, x)
      grads, gx = back(gy)
      made |= {f"mixer{length}_y": y, f"mixer{length}_x": gx}
      made |= {f"mixer{length}_{name}": g for name, g in interop.state_dict(grads, RULES).items()}

      i = {name.split("_", 1)[1]: a for name, a in inputs.items() if name.startswith(f"scan{length}_")}
      i |= {name: swap(i[name]) for name in ("u", "delta", "B", "C", "z", "gy")} | {"A": -np.exp(i["A"])}
      gy = i.pop("gy")
      y, back = jax.vjp(lambda i: selective_scan(**i, delta_softplus=True), i)
      (grads,) = back(gy)
      grads |= {"y": y}
      tokens = {name: swap(grads[name]) for name in ("y", "u", "delta", "B", "C", "z")}
      made |= {f"scan{length}_{name}": g for name, g in (grads | tokens).items()}
    return made

  golden_rule.check("graph_mamba", lambda state: interop.variables(state, RULES), outputs, atol=1e-4, rtol=1e-5)


def test_parameters():
  shapes = jax.eval_shape(mamba.MambaMixer().init, jax.random.key(0), jnp.zeros((1, 5, 768)))
  # state-spaces/mamba-130m has 24 such mixers, each followed by a norm of 768 and 50280 embeddings and a last norm.
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert 24 * (count + 768) + 50280 * 768 + 768 == 129_135_360


def test_step_sizes_start_between_a_thousandth_and_a_tenth():
  variables = jax.jit(mamba.MambaMixer().init)(jax.random.key(0), jnp.zeros((1, 2, 64)))
  step = np.asarray(jax.nn.softplus(variables["params"]["dt_proj"]["bias"]))
  assert 1e-3 <= step.min() < 2e-3 and 0.05 < step.max() <= 0.1
  assert abs(np.median(np.log10(step)) + 2) < 0.3


@pytest.fixture(scope="module")
def block():
  net = mamba.BidirectionalMamba(state_size=4)
  x = jax.random.normal(jax.random.key(1), (2, 23, 6))
  return net, jax.jit(net.init)(jax.random.key(0), x), x, jax.jit(net.apply)


def test_both_directions_are_alike(block):
  net, variables, x, apply = block
  params = variables["params"]
  swapped = {"params": params | {"forward": params["backward"], "backward": params["forward"]}}
  np.testing.assert_allclose(apply(swapped, x[:, ::-1])[:, ::-1], apply(variables, x), atol=1e-6)
  assert np.abs(apply(variables, x[:, ::-1])[:, ::-1] - apply(variables, x)).max() > 1e-3


def test_segments_do_not_see_each_other(block):
  _, variables, x, apply = block
  starts = np.isin(np.arange(23), [0, 2, 9, 10])[None].repeat(2, 0)
  whole = apply(variables, x, starts)
  for a, b in ((0, 2), (9, 10), (10, 23)):
    np.testing.assert_allclose(whole[:, a:b], apply(variables, x[:, a:b]), atol=1e-6)
  assert np.abs(whole - apply(variables, x)).max() > 1e-3


def test_one_direction_is_causal(block):
  _, variables, x, _ = block
  net = mamba.BidirectionalMamba(bidirectional=False, state_size=4)
  params = {k: v for k, v in variables["params"].items() if k != "backward"}
  apply = jax.jit(net.apply)
  before, after = apply({"params": params}, x), apply({"params": params}, x.at[:, 11, 0].add(1))
  np.testing.assert_array_equal(before[:, :11], after[:, :11])
  assert (np.abs(before - after)[:, 11:].max(-1) > 0).all()


def test_residual_alone_where_the_block_is_silent(block):
  net, variables, x, apply = block
  params = variables["params"] | {"out": jax.tree.map(jnp.zeros_like, variables["params"]["out"])}
  np.testing.assert_array_equal(apply({"params": params}, x), x)


def test_narrow_compute(block):
  _, variables, x, apply = block
  net = mamba.BidirectionalMamba(state_size=4, dtype="bfloat16")
  narrow = jax.jit(net.apply)(variables, x.astype("bfloat16"))
  assert narrow.dtype == jnp.bfloat16
  np.testing.assert_allclose(narrow.astype("float32"), apply(variables, x), atol=0.05)


def test_last_output_alone(block):
  net, variables, x, apply = block
  backward = {name: p for name, p in variables["params"]["backward"].items() if name != "A_log"}
  params = variables["params"] | {"backward": backward}  # of a state that is never used again
  alone = jax.jit(net.clone(last_only=True).apply)({"params": params}, x)
  np.testing.assert_allclose(alone, apply(variables, x)[:, -1:], atol=1e-6)
  zoh = [net.clone(discretization="zoh", last_only=last) for last in (True, False)]
  alone, whole = (jax.jit(n.apply)(variables, x) for n in zoh)
  np.testing.assert_allclose(alone, whole[:, -1:], atol=1e-6)


@pytest.mark.skipif(not kernels.available(), reason="host kernels are for the CPU backend")
@pytest.mark.parametrize("reverse", [False, True])
def test_forms_of_the_convolution_agree(reverse):
  """Values and gradients, with more tokens than a work item makes and segments shorter than the kernel."""
  rng = np.random.default_rng(0)
  x, g = rng.standard_normal((2, 1100, 5)).astype("float32")
  kernel, bias = rng.standard_normal((4, 5)).astype("float32"), rng.standard_normal(5).astype("float32")
  segment = np.cumsum(rng.random(1100) < 0.1).astype("int32")
  expected = np.tile(bias, (1100, 1))
  for t in range(1100):
    for i in range(4):
      other = t + i if reverse else t - i
      if 0 <= other < 1100 and segment[other] == segment[t]:
        expected[t] += kernel[3 - i] * x[other]

  def both(form):
    y, back = jax.vjp(lambda *a: form(reverse, *a, segment), x, kernel, bias)
    return y, back(g)

  host, plain = jax.jit(lambda: both(mamba._host_conv))(), jax.jit(lambda: both(mamba.plain_conv))()
  np.testing.assert_allclose(host[0], expected, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-4), host, plain)


@pytest.mark.parametrize("name", ["state_size", "expand", "conv_size"])
def test_bad_input_is_named(name):
  with pytest.raises(ValueError, match=f"^{name}: got 0"):
    mamba.MambaMixer(**{name: 0}).init(jax.random.key(0), jnp.zeros((1, 2, 4)))
  with pytest.raises(ValueError, match="^recurrent: got False for 2 tokens"):
    jax.eval_shape(mamba.MambaMixer(recurrent=False).init, jax.random.key(0), jnp.zeros((1, 2, 4)))
