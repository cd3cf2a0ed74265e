"""MANIQA's training step and inference at the published size, beside the same in PyTorch.

The peer is written from the definition in the official form: NCHW maps between stages, windows cut by permuting.
Like ours, it leaves out what has no part in the score (the official network computes it).
"""

import functools

from benchmarks import _sides
from benchmarks.harness import Case

WIDTH, HEADS, BLOCKS, TAPS, WINDOW, HIDDEN = 768, 12, 10, (6, 7, 8, 9), 4, 768


def ours(size, batch, what, dtype):
  """A step of Adam, or scores of crops."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from jaxlab import train
  from jaxlab.models import maniqa

  rng = np.random.default_rng(0)
  image = rng.standard_normal((batch, size, size, 3)).astype("float32")
  examples = jax.device_put({"image": image, "quality": rng.random(batch).astype("float32")})
  model = maniqa.base(image_size=size, dtype=dtype)
  loss = lambda scores, batch: (jnp.mean((scores.astype("float32") - batch["quality"]) ** 2), {})
  learner = train.supervised(model, loss, optax.adam(1e-5))
  if what == "inference":
    variables = jax.jit(model.init)(jax.random.key(0), image)
    return _sides.jax_call(model.apply, variables, examples["image"])
  return _sides.jax_step(learner, examples)


def network(size):
  """The peer: [B, 3, S, S] -> [B]."""
  import torch
  from torch import nn
  from torch.nn import functional as F

  side = size // 8

  class Vit(nn.Module):
    def __init__(self, c):
      super().__init__()
      self.norm1, self.norm2 = nn.LayerNorm(c, 1e-6), nn.LayerNorm(c, 1e-6)
      self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)
      self.mlp = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))

    def forward(self, x):
      b, n, c = x.shape
      q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
      x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
      return x + self.mlp(self.norm2(x))

  class Tab(nn.Module):
    def __init__(self, t):
      super().__init__()
      self.q, self.k, self.v, self.drop = nn.Linear(t, t), nn.Linear(t, t), nn.Linear(t, t), nn.Dropout(0.1)

    def forward(self, x):
      attention = (self.q(x) @ self.k(x).transpose(1, 2) * x.shape[-1] ** -0.5).softmax(-1)
      return x + self.drop((attention @ self.v(x)).transpose(1, 2).reshape(x.shape))

  class DropPath(nn.Module):
    def __init__(self, rate):
      super().__init__()
      self.rate = rate

    def forward(self, x):
      if not self.training or not self.rate:
        return x
      return x * (torch.rand(len(x), 1, 1, device=x.device) >= self.rate) / (1 - self.rate)

  class Swin(nn.Module):
    def __init__(self, c, shift, rate):
      super().__init__()
      self.shift, self.drop = shift, DropPath(rate)
      self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
      self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)
      self.mlp = nn.Sequential(nn.Linear(c, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, c))
      self.table = nn.Parameter(0.02 * torch.randn((2 * WINDOW - 1) ** 2, 4))
      y, x = torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")
      apart = [p.flatten()[:, None] - p.flatten() + WINDOW - 1 for p in (y, x)]
      self.register_buffer("index", apart[0] * (2 * WINDOW - 1) + apart[1])
      part = (torch.arange(side) >= side - WINDOW).int() + (torch.arange(side) >= side - shift).int()
      region = self.cut((3 * part[:, None] + part)[None, :, :, None]).squeeze(-1)
      self.register_buffer("mask", -100.0 * (region[:, None] != region[:, :, None]).float())

    def cut(self, x):
      b, h, w, c = x.shape
      x = x.view(b, h // WINDOW, WINDOW, w // WINDOW, WINDOW, c)
      return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, WINDOW**2, c)

    def forward(self, x):
      b, n, c = x.shape
      y = self.norm1(x).view(b, side, side, c)
      if self.shift:
        y = y.roll((-self.shift, -self.shift), (1, 2))
      y = self.cut(y)
      q, k, v = self.qkv(y).view(-1, WINDOW**2, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
      logits = q * (c // 4) ** -0.5 @ k.transpose(-2, -1) + self.table[self.index].permute(2, 0, 1)
      if self.shift:
        shape = logits.shape
        logits = (logits.view(b, -1, *shape[1:]) + self.mask[:, None]).view(shape)
      y = self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(-1, WINDOW**2, c))
      cells = side // WINDOW
      y = y.view(b, cells, cells, WINDOW, WINDOW, c).permute(0, 1, 3, 2, 4, 5).reshape(b, side, side, c)
      if self.shift:
        y = y.roll((self.shift, self.shift), (1, 2))
      x = x + self.drop(y.reshape(b, n, c))
      return x + self.drop(self.mlp(self.norm2(x)))

  class Stage(nn.Module):
    def __init__(self, c):
      super().__init__()
      rates, self.drop = torch.linspace(0, 0.1, 4).tolist(), nn.Dropout(0.1)
      self.blocks = nn.ModuleList(Swin(c, WINDOW // 2 * (i % 2), rate) for i, rate in enumerate(rates))
      self.convs = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for _ in range(2))

    def forward(self, x):
      b, c = x.shape[:2]
      x = self.drop(x).flatten(2).transpose(1, 2)
      for i, conv in enumerate(self.convs):
        y = self.blocks[2 * i + 1](self.blocks[2 * i](x)).transpose(1, 2).reshape(b, c, side, side)
        x = 0.8 * F.relu(conv(y)).flatten(2).transpose(1, 2) + x
      return x.transpose(1, 2).reshape(b, c, side, side)

  class Net(nn.Module):
    def __init__(self):
      super().__init__()
      c, t = WIDTH, side**2
      self.embed, self.token = nn.Conv2d(3, c, 8, 8), nn.Parameter(torch.zeros(1, 1, c))
      self.position = nn.Parameter(0.02 * torch.randn(1, t + 1, c))
      self.vit = nn.ModuleList(Vit(c) for _ in range(BLOCKS))
      self.tabs = nn.ModuleList(nn.Sequential(Tab(t), Tab(t)) for _ in range(2))
      self.reduce = nn.ModuleList([nn.Conv2d(4 * c, c, 1), nn.Conv2d(c, c // 2, 1)])
      self.stages = nn.ModuleList([Stage(c), Stage(c // 2)])
      head = lambda: nn.Sequential(nn.Linear(c // 2, c // 2), nn.ReLU(), nn.Dropout(0.1), nn.Linear(c // 2, 1))
      self.score, self.weight = head(), head()

    def forward(self, image):
      x = self.embed(image).flatten(2).transpose(1, 2)
      x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
      kept = []
      for i, block in enumerate(self.vit):
        x = block(x)
        if i in TAPS:
          kept.append(x[:, 1:])
      x = torch.cat(kept, 2).transpose(1, 2)
      for tabs, reduce, stage in zip(self.tabs, self.reduce, self.stages, strict=True):
        x = tabs(x)
        x = stage(reduce(x.view(*x.shape[:2], side, side))).flatten(2)
      x = x.transpose(1, 2)
      f, g = F.relu(self.score(x)), torch.sigmoid(self.weight(x))
      return ((f * g).sum(1) / g.sum(1))[:, 0]

  torch.manual_seed(0)
  return Net()


def torch(size, batch, what, dtype):
  """The same with torch; in bfloat16 under autocast."""
  import torch

  model = network(size)
  image, quality = torch.randn(batch, 3, size, size), torch.rand(batch)
  if what == "inference":
    return _sides.torch_call(model, image, dtype=dtype)
  optimizer = torch.optim.Adam(model.parameters(), 1e-5)
  loss = lambda score: ((score.float() - quality) ** 2).mean()
  return _sides.torch_step(optimizer, lambda: model(image), loss, dtype=dtype)


def cases():
  """One image at a time, which is what two cores allow."""
  made = []
  for what in ("inference", "training step"):
    for dtype in ("float32", "bfloat16"):
      mine, peer = (functools.partial(side, 224, 1, what, dtype) for side in (ours, torch))
      made.append(Case(f"MANIQA {what}, 1 crop of 224x224, {dtype}", mine, {"PyTorch": peer}))
  return made
