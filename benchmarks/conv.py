"""Depthwise and grouped 1x1 convolution beside torch, channels last, forward and with all gradients."""

import functools

import numpy as np

from benchmarks.harness import Case

SHAPES = ((8, 56, 56, 96), (8, 28, 28, 256), (8, 14, 14, 512))


def ours(shape, k, groups_of, gradient):
  """k x k depthwise, or with `groups_of` channels a group 1x1 grouped to twice the channels."""
  import jax
  import jax.numpy as jnp

  from jaxlab.nn import conv

  rng = np.random.default_rng(0)
  channels = shape[-1]
  x = jnp.asarray(rng.standard_normal(shape), "float32")
  if groups_of:
    function, out = conv.grouped_pointwise, 2 * channels
    w = jnp.asarray(rng.standard_normal((1, 1, groups_of, out)), "float32")
  else:
    function, out = conv.depthwise, channels
    w = jnp.asarray(rng.standard_normal((k, k, 1, channels)), "float32")
  b, g = jnp.zeros(out), jnp.asarray(rng.standard_normal((*shape[:-1], out)), "float32")

  def both(x, w, b, g):
    y, vjp = jax.vjp(function, x, w, b)
    return y, vjp(g)

  step = jax.jit(both) if gradient else jax.jit(lambda x, w, b, g: function(x, w, b))
  return lambda: jax.block_until_ready(step(x, w, b, g))


def torch(shape, k, groups_of, gradient):
  """The same with torch."""
  import torch

  n, h, w, c = shape
  out, groups = (2 * c, c // groups_of) if groups_of else (c, c)
  layer = torch.nn.Conv2d(c, out, k, padding=k // 2, groups=groups).to(memory_format=torch.channels_last)
  x = torch.randn(n, c, h, w).to(memory_format=torch.channels_last).requires_grad_(gradient)
  g = torch.randn(n, out, h, w).to(memory_format=torch.channels_last)

  def run():
    with torch.set_grad_enabled(gradient):
      y = layer(x)
    if gradient:
      torch.autograd.grad(y, (x, layer.weight, layer.bias), g)

  return run


def cases():
  """All shapes and kernels of the foundation's bar."""
  made = []
  for shape in SHAPES:
    size = "x".join(map(str, shape))
    for gradient, what in ((False, "forward"), (True, "forward and gradient")):
      for k in (3, 5, 7, 9):
        made.append((f"depthwise {k}x{k}, {size}, {what}", (shape, k, 0, gradient)))
      made.append((f"grouped 1x1, groups of 4 to 8, {size}, {what}", (shape, 1, 4, gradient)))
  return [
    Case(name, functools.partial(ours, *args), {"torch channels-last": functools.partial(torch, *args)})
    for name, args in made
  ]
