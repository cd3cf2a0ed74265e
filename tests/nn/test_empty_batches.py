import jax
import jax.numpy as jnp
import pytest

from jaxlab.nn import attention, conv, gelu, layer_norm, softmax

LAYERS = {
  "attention": ((5, 8), lambda x: attention.multi_head_attention(x, x, x, num_heads=2)),
  "layer_norm": ((8,), lambda x: layer_norm.layer_norm(x, jnp.ones(8), jnp.zeros(8))),
  "gelu": ((8,), gelu.gelu),
  "softmax": ((8,), softmax.softmax),
  "depthwise": ((6, 6, 16), lambda x: conv.depthwise(x, jnp.ones((3, 3, 1, 16)))),
  "dense": ((6, 6, 16), lambda x: conv.dense(x, jnp.ones((3, 3, 16, 8)), padding=1)),
  "grouped": ((16,), lambda x: conv.grouped_pointwise(x, jnp.ones((1, 1, 4, 32)))),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_batch_of_none_gives_none(layer):
  shape, function = LAYERS[layer]
  x = jnp.zeros((0, *shape))
  assert jax.jit(function)(x).shape[0] == 0
  assert jax.jit(jax.grad(lambda x: function(x).sum()))(x).shape == x.shape
