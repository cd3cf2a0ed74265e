"""U-ViT-S/2's training step and inference, with the shared learned gate, beside the same network in PyTorch.

The peer is written from the definition: fused qkv, `scaled_dot_product_attention`, AdamW, a moving average of the
weights by `torch._foreach_lerp_`. A step of both draws times and noise.
"""

import functools

from benchmarks import _sides
from benchmarks.harness import Case

PARAMETERS = 44_263_825
RATE, BETAS, DECAY, AVERAGE = 2e-4, (0.99, 0.999), 0.03, 0.9999


def ours(batch, what, dtype):
  """A step of the learner, or predicted noise."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from jaxlab.models import scalelong
  from jaxlab.nn.diffusion import VariancePreserving
  from jaxlab.train import diffusion

  images = jnp.asarray(np.random.default_rng(0).standard_normal((batch, 32, 32, 3)).astype("float32"))
  model = scalelong.cifar10(scaling="learned", dtype=dtype)
  if what == "inference":
    variables = jax.jit(model.init)(jax.random.key(0), images, jnp.ones(batch))
    assert sum(p.size for p in jax.tree.leaves(variables)) == PARAMETERS
    return _sides.jax_call(model.apply, variables, images, jnp.linspace(1, 999, batch))
  tx = optax.adamw(RATE, *BETAS, weight_decay=DECAY)
  learner = diffusion.learner(
    model, VariancePreserving(), tx, time_scale=scalelong.TIME_SCALE, ema_decay=AVERAGE
  )  # fmt: skip
  return _sides.jax_step(learner, {"image": images})


def torch(batch, what, dtype):
  """The same with torch; in bfloat16 under autocast."""
  import copy
  import math

  import torch
  from torch import nn
  from torch.nn import functional

  width, heads, depth, patch, tokens = 512, 8, 12, 2, 257

  class Block(nn.Module):
    def __init__(self, skip):
      super().__init__()
      self.skip = nn.Linear(2 * width, width) if skip else None
      self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
      self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
      self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, skip=None):
      if self.skip is not None:
        x = self.skip(torch.cat([x, skip], -1))
      b, n, _ = x.shape
      q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
      x = x + self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width))
      return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      self.embed = nn.Conv2d(3, width, patch, patch)
      self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
      self.encoder = nn.ModuleList(Block(False) for _ in range(depth // 2))
      self.middle = Block(False)
      self.decoder = nn.ModuleList(Block(True) for _ in range(depth // 2))
      self.gate = nn.Sequential(nn.Linear(tokens, 16), nn.ReLU(), nn.Linear(16, tokens), nn.Sigmoid())
      self.norm, self.predict = nn.LayerNorm(width), nn.Linear(width, 3 * patch**2)
      self.last = nn.Conv2d(3, 3, 3, padding=1)
      self.register_buffer("frequencies", torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2)))

    def forward(self, x, time):
      angles = time[:, None] * self.frequencies
      time = torch.cat([angles.cos(), angles.sin()], -1)[:, None]
      x = torch.cat([time, self.embed(x).flatten(2).transpose(1, 2)], 1) + self.position
      skips = []
      for block in self.encoder:
        x = block(x)
        skips.append(x)
      x = self.middle(x)
      for block in self.decoder:
        skip = skips.pop()
        x = block(x, skip * self.gate(skip.mean(-1))[..., None])
      x = self.predict(self.norm(x))[:, 1:].view(-1, 16, 16, patch, patch, 3)
      return self.last(x.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, 32, 32))

  network = Network()
  assert sum(p.numel() for p in network.parameters()) == PARAMETERS
  images = torch.randn(batch, 3, 32, 32)
  if what == "inference":
    return _sides.torch_call(network, images, torch.linspace(1, 999, batch), dtype=dtype)
  optimizer = torch.optim.AdamW(network.parameters(), RATE, BETAS, weight_decay=DECAY, foreach=True)
  average = list(copy.deepcopy(network).requires_grad_(False).parameters())

  def step():
    t, noise = torch.rand(batch), torch.randn_like(images)
    log_alpha = (-0.05 * t - 4.975 * t**2)[:, None, None, None]
    noisy = log_alpha.exp() * images + (-torch.expm1(2 * log_alpha)).sqrt() * noise
    optimizer.zero_grad()
    with _sides.autocast(dtype):
      predicted = network(noisy, 999 * t)
    functional.mse_loss(predicted.float(), noise).backward()
    optimizer.step()
    with torch.no_grad():
      torch._foreach_lerp_(average, list(network.parameters()), 1 - AVERAGE)

  return step


def cases():
  """Small batches, as two cores allow; the time of a step is nearly proportional to the batch."""
  made = []
  for what, batch in (("training step", 4), ("inference", 4)):
    for dtype in ("float32", "bfloat16"):
      mine, peer = (functools.partial(side, batch, what, dtype) for side in (ours, torch))
      name = f"U-ViT-S/2 {what}, {batch} images of 32x32, {dtype}"
      made.append(Case(name, mine, {"PyTorch": peer}))
  return made
