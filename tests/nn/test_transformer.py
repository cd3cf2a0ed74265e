import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import interop
from jaxlab.nn.transformer import Block, weight_table

B, N, C, HEADS = 2, 5, 8, 2


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def weights(block, scale=0.5):
  shapes = jax.eval_shape(block.init, jax.random.key(0), jax.ShapeDtypeStruct((1, N, C), "float32"))
  leaves, structure = jax.tree.flatten(shapes)
  return jax.tree.unflatten(structure, [scale * normal(*x.shape, seed=i) for i, x in enumerate(leaves)])


def oracle(params, x, *, epsilon, causal=False, mask=None):
  """One token, one head at a time, in float64."""
  params = jax.tree.map(lambda a: np.asarray(a, "float64"), params)

  def dense(p, y):
    return y @ p["kernel"] + p.get("bias", 0.0)

  def norm(p, y):
    centred = y - y.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]

  out = np.asarray(x, "float64")
  y = dense(params["attn"]["qkv"], norm(params["norm1"], out))
  mixed, d = np.zeros_like(out), C // HEADS
  for b in range(len(out)):
    for h in range(HEADS):
      q, k, v = (y[b, :, part * C + h * d : part * C + (h + 1) * d] for part in range(3))
      for i in range(N):
        seen = [j for j in range(N) if (not causal or j <= i) and (mask is None or mask[b, i, j])]
        weight = np.array([math.exp(q[i] @ k[j] / math.sqrt(d)) for j in seen])
        mixed[b, i, h * d : (h + 1) * d] = weight @ v[seen] / weight.sum()
  out = out + dense(params["attn"]["proj"], mixed)
  hidden = dense(params["mlp"]["fc1"], norm(params["norm2"], out))
  gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
  return out + dense(params["mlp"]["fc2"], gelu)


@pytest.mark.parametrize(("causal", "masked", "qkv_bias"), [(False, False, True), (True, True, False)])
def test_block_is_its_definition(causal, masked, qkv_bias):
  block = Block(HEADS, 2.0, qkv_bias, causal, epsilon=0.1)  # an epsilon that shows
  variables, x = weights(block), normal(B, N, C, seed=9)
  mask = normal(B, N, N, seed=7) > -0.5 if masked else None
  if masked:
    mask |= np.eye(N, dtype=bool)
  out = jax.jit(block.apply)(variables, x, None if mask is None else mask[:, None])
  expected = oracle(variables["params"], x, epsilon=0.1, causal=causal, mask=mask)
  np.testing.assert_allclose(out, expected, atol=5e-6)
  assert ("bias" in variables["params"]["attn"]["qkv"]) == qkv_bias


def test_precision_and_counts():
  block = Block(HEADS, dtype="bfloat16", param_dtype="bfloat16")
  x = jax.ShapeDtypeStruct((B, N, 64), "float32")
  shapes = jax.eval_shape(block.init, jax.random.key(0), x)
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 12 * 64**2 + 13 * 64
  assert jax.eval_shape(block.apply, shapes, x).dtype == jnp.bfloat16


def test_weights_of_timm_blocks_go_there_and_back():
  block = Block(HEADS, qkv_bias=False)
  variables = weights(block)
  table = {f"params/{path}": rule for path, rule in weight_table("blocks.3", qkv_bias=False).items()}
  state = interop.state_dict(variables, table)
  np.testing.assert_array_equal(state["blocks.3.attn.qkv.weight"], variables["params"]["attn"]["qkv"]["kernel"].T)
  jax.tree.map(np.testing.assert_array_equal, interop.variables(state, table, like=variables), variables)


def test_bad_input_is_named():
  block = Block(3)
  with pytest.raises(ValueError, match="^num_heads: got 3"):
    jax.eval_shape(block.init, jax.random.key(0), normal(B, N, C))
  with pytest.raises(ValueError, match=r"^tokens: got shape \(5, 8\)"):
    jax.eval_shape(block.init, jax.random.key(0), normal(N, C))
