"""SMT-T's training step and inference beside the same network in PyTorch.

The peer is written from the paper's definition in the official form: NCHW convolutions, tokens [B, N, C] for the dense
layers, a reshape between the two.
"""

import functools

from benchmarks import _sides
from benchmarks.harness import Case

WIDTHS, DEPTHS, HEADS, RATIOS, CLASSES = (64, 128, 256, 512), (2, 2, 8, 1), (None, None, 8, 16), (4, 4, 4, 2), 1000


def ours(batch, size, what, dtype):
  """A step of AdamW, or inference."""
  import jax
  import numpy as np
  import optax

  from jaxlab import train
  from jaxlab.models import smt

  rng = np.random.default_rng(0)
  examples = {
    "image": rng.standard_normal((batch, size, size, 3)).astype("float32"),
    "label": rng.integers(0, CLASSES, batch),
  }
  examples = jax.device_put(examples)
  model = smt.tiny(CLASSES, dtype=dtype)
  learner = train.supervised(model, train.cross_entropy(), optax.adamw(1e-3))
  if what == "inference":
    variables = jax.jit(model.init)(jax.random.key(0), examples["image"])
    return _sides.jax_call(model.apply, variables, examples["image"])
  return _sides.jax_step(learner, examples)


def torch(batch, size, what, dtype):
  """The same with torch; in bfloat16 under autocast."""
  import torch
  from torch import nn
  from torch.nn import functional

  def to_map(x, h, w):
    return x.transpose(1, 2).reshape(x.shape[0], -1, h, w)

  def to_tokens(x):
    return x.flatten(2).transpose(1, 2)

  def depthwise(c, k):
    return nn.Conv2d(c, c, k, padding=k // 2, groups=c)

  class Modulation(nn.Module):
    def __init__(self, c, heads=4):
      super().__init__()
      self.heads = heads
      self.v, self.s, self.proj = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
      self.local = nn.ModuleList(depthwise(c // heads, 3 + 2 * i) for i in range(heads))
      self.mix, self.norm = nn.Conv2d(c, 2 * c, 1, groups=c // heads), nn.BatchNorm2d(2 * c)
      self.fuse = nn.Conv2d(2 * c, c, 1)

    def forward(self, x, h, w):
      parts = to_map(self.s(x), h, w).chunk(self.heads, 1)
      z = torch.stack([conv(p) for conv, p in zip(self.local, parts, strict=True)], 2).flatten(1, 2)
      m = self.fuse(functional.gelu(self.norm(self.mix(z))))
      return self.proj(to_tokens(m) * self.v(x))

  class Attention(nn.Module):
    def __init__(self, c, heads):
      super().__init__()
      self.heads = heads
      self.q, self.kv, self.proj, self.local = nn.Linear(c, c), nn.Linear(c, 2 * c), nn.Linear(c, c), depthwise(c, 3)

    def forward(self, x, h, w):
      b, n, c = x.shape
      split = lambda t: t.reshape(b, n, self.heads, -1).transpose(1, 2)
      k, v = self.kv(x).chunk(2, -1)
      q = split(self.q(x))
      a = (q @ split(k).transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
      y = (a @ split(v)).transpose(1, 2).reshape(b, n, c)
      return self.proj(y + to_tokens(self.local(to_map(v, h, w))))

  class Block(nn.Module):
    def __init__(self, c, mixer, ratio, drop_path):
      super().__init__()
      self.norm1, self.norm2, self.mixer = nn.LayerNorm(c, 1e-6), nn.LayerNorm(c, 1e-6), mixer
      self.fc1, self.fc2, self.local = nn.Linear(c, ratio * c), nn.Linear(ratio * c, c), depthwise(ratio * c, 3)
      self.drop_path = drop_path

    def keep(self, y):
      if not self.training or not self.drop_path:
        return y
      kept = torch.empty(y.shape[0], 1, 1).bernoulli_(1 - self.drop_path) / (1 - self.drop_path)
      return y * kept

    def forward(self, x, h, w):
      x = x + self.keep(self.mixer(self.norm1(x), h, w))
      u = self.fc1(self.norm2(x))
      return x + self.keep(self.fc2(functional.gelu(u + to_tokens(self.local(to_map(u, h, w))))))

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      c = WIDTHS[0]
      stem = [nn.Conv2d(3, c, 3, 2, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, 2, 2)]
      downs = [nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(WIDTHS[:-1], WIDTHS[1:], strict=True)]
      self.embeds = nn.ModuleList([nn.Sequential(*stem), *downs])
      self.embed_norms = nn.ModuleList(nn.LayerNorm(c) for c in WIDTHS)
      self.norms = nn.ModuleList(nn.LayerNorm(c, 1e-6) for c in WIDTHS)
      rates = iter(torch.linspace(0, 0.1, sum(DEPTHS)).tolist())
      self.stages = nn.ModuleList()
      for i, (c, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
        attention = [i == 3 or (i == 2 and j % 2 == 1) for j in range(depth)]
        mixers = [Attention(c, HEADS[i]) if a else Modulation(c) for a in attention]
        self.stages.append(nn.ModuleList(Block(c, mixer, RATIOS[i], next(rates)) for mixer in mixers))
      self.head = nn.Linear(WIDTHS[-1], CLASSES)

    def forward(self, x):
      for embed, embed_norm, stage, norm in zip(self.embeds, self.embed_norms, self.stages, self.norms, strict=True):
        x = embed(x)
        h, w = x.shape[2:]
        x = embed_norm(to_tokens(x))
        for block in stage:
          x = block(x, h, w)
        tokens = norm(x)
        x = to_map(tokens, h, w)
      return self.head(tokens.mean(1))

  network = Network()
  assert sum(p.numel() for p in network.parameters()) == 11_506_536
  x, y = torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,))
  if what == "inference":
    return _sides.torch_call(network, x, dtype=dtype)
  optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
  loss = lambda logits: functional.cross_entropy(logits.float(), y)
  return _sides.torch_step(optimizer, lambda: network(x), loss, dtype=dtype)


def cases():
  """Training and inference at both sizes of the foundation's bar."""
  made = [(b, s, what, "float32") for b, s in ((8, 224), (64, 32)) for what in ("training step", "inference")]
  made.append((8, 224, "training step", "bfloat16"))
  return [
    Case(
      f"SMT-T {what}, {batch} images of {size}x{size}, {dtype}",
      functools.partial(ours, batch, size, what, dtype),
      {"PyTorch": functools.partial(torch, batch, size, what, dtype)},
    )
    for batch, size, what, dtype in made
  ]
