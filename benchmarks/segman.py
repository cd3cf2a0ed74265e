"""SegMAN-T's training step and inference, and neighbourhood attention alone, beside the same in PyTorch.

The peer is written from the paper's definition in the official form (NCHW convolutions). The official code's CUDA
operators have plain forms there: neighbourhood attention gathers the window of every query, as those who port NATTEN to
CPU do, and the scan is the parallel one of `benchmarks/selective_scan.py`, which is faster there than a loop.
"""

import functools

from benchmarks import _sides
from benchmarks.harness import Case

WIDTHS, DEPTHS, HEADS, WINDOWS, RATIOS = (32, 64, 144, 192), (2, 2, 4, 2), (1, 2, 4, 8), (11, 9, 9, 7), (4, 4, 3, 3)
CLASSES, EMBED, MAP = 150, 128, 192


def ours(batch, size, what, dtype):
  """A step of AdamW, or inference at stride 8."""
  import jax
  import numpy as np
  import optax

  from jaxlab import train
  from jaxlab.models import segman

  rng = np.random.default_rng(0)
  image = rng.standard_normal((batch, size, size, 3)).astype("float32")
  label = rng.integers(0, CLASSES, (batch, size, size), dtype="int32")
  examples = jax.device_put({"image": image, "label": label})
  model = segman.segmenter("T", CLASSES, dtype=dtype)
  learner = train.supervised(model, train.cross_entropy(), optax.adamw(1e-4))
  if what == "inference":
    variables = jax.jit(model.init)(jax.random.key(0), examples["image"])
    return _sides.jax_call(functools.partial(model.apply, full_size=False), variables, examples["image"])
  return _sides.jax_step(learner, examples)


def torch_attention(q, k, v, window, bias):
  """[B, n, H, W, d] and [n, 2k - 1, 2k - 1] -> [B, n, H, W, d]; the window of every query is gathered."""
  import torch

  def positions(length):
    first = (torch.arange(length) - window // 2).clamp(0, length - window)
    return first[:, None] + torch.arange(window)

  rows, columns = positions(q.shape[2]), positions(q.shape[3])
  around = lambda x: x[:, :, rows][:, :, :, :, columns]  # [B, n, H, k, W, k, d]
  logits = torch.einsum("bnhwd,bnhiwjd->bnhwij", q * q.shape[-1] ** -0.5, around(k))
  down, right = (p - torch.arange(len(p))[:, None] + window - 1 for p in (rows, columns))
  logits = logits + bias[:, down[:, None, :, None], right[None, :, None, :]]
  weights = logits.flatten(-2).softmax(-1).view_as(logits)
  return torch.einsum("bnhwij,bnhiwjd->bnhwd", weights, around(v))


def torch(batch, size, what, dtype):
  """The same with torch; in bfloat16 under autocast."""
  import torch
  from torch import nn
  from torch.nn import functional as F

  from benchmarks.selective_scan import torch_parallel_scan

  scan = torch_parallel_scan()

  def depthwise(c, k):
    return nn.Conv2d(c, c, k, padding=k // 2, groups=c)

  def conv(i, o, k, s, p, act):
    return nn.Sequential(nn.Conv2d(i, o, k, s, p, bias=False), nn.BatchNorm2d(o), act)

  class Norm(nn.LayerNorm):
    def forward(self, x):
      return super().forward(x.movedim(1, -1)).movedim(-1, 1)

  class Scan(nn.Module):
    def __init__(self, c):
      super().__init__()
      self.rank = -(-c // 16)
      self.project = nn.Parameter(torch.randn(4, self.rank + 2, c) * c**-0.5)
      self.steps, self.bias = nn.Parameter(torch.randn(4, c, self.rank)), nn.Parameter(torch.randn(4, c) - 4)
      self.log, self.skip = nn.Parameter(torch.zeros(4, c)), nn.Parameter(torch.ones(4, c))

    def forward(self, x):
      b, c, h, w = x.shape
      rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
      u = torch.stack([rows, columns, rows.flip(-1), columns.flip(-1)], 1)  # [B, 4, C, L]
      d, into, out = torch.einsum("krc,bkcl->bkrl", self.project, u).split([self.rank, 1, 1], 2)
      delta = F.softplus(torch.einsum("kcr,bkrl->bkcl", self.steps, d).float() + self.bias[..., None])
      decay = torch.exp(-delta * self.log.exp()[..., None])
      last = lambda t: t.float().movedim(-1, 1)  # the scan runs over axis 1
      y = scan(last(decay), last(delta * into * u)).movedim(1, -1) * out + self.skip[..., None] * u
      rows, columns = (y[:, i] + y[:, i + 2].flip(-1) for i in (0, 1))
      return (rows + columns.view(b, c, w, h).transpose(2, 3).flatten(2)).view(b, c, h, w)

  class Mixer(nn.Module):
    def __init__(self, c, heads, window, side):
      super().__init__()
      self.heads, self.window, self.side = heads, window, side
      self.qkv, self.lepe, self.proj = nn.Conv2d(c, 3 * c, 1), depthwise(c, 5), nn.Conv2d(c, c, 1)
      self.bias = nn.Parameter(torch.zeros(heads, 2 * window - 1, 2 * window - 1))
      if side:
        self.everywhere = nn.Parameter(torch.zeros(heads, side**2, side**2))
      else:
        self.conv, self.scan, self.norm = conv(c, c, 3, 1, 1, nn.SiLU()), Scan(c), Norm(c, eps=1e-6)
        self.conv[0] = depthwise(c, 3)

    def rotate(self, x):
      h, w, d = x.shape[2:]
      frequency = 10000 ** -torch.linspace(0, 1, d // 4)
      row = (torch.arange(h)[:, None, None] * frequency).expand(h, w, -1)
      column = (torch.arange(w)[None, :, None] * frequency).expand(h, w, -1)
      angle = torch.cat([row, column], -1)
      even, odd, cos, sin = x[..., ::2], x[..., 1::2], angle.cos(), angle.sin()
      return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    def forward(self, x):
      b, c, h, w = x.shape
      qkv = self.qkv(x)
      lepe = self.lepe(qkv[:, -c:])
      q, k, v = qkv.view(b, 3, self.heads, -1, h, w).permute(1, 0, 2, 4, 5, 3)
      q, k = self.rotate(q), self.rotate(k)
      y = torch_attention(q, k, v, self.window, self.bias)
      if self.side:
        flat = lambda t: t.flatten(2, 3)
        bias = self.everywhere
        if bias.shape[1] != h * w:
          bias = F.interpolate(bias[None], (h * w, h * w), mode="bicubic")[0]
        logits = flat(q) @ flat(k).transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
        y = (logits.softmax(-1) @ flat(y)).transpose(2, 3).reshape(b, c, h, w)
      else:
        y = y.permute(0, 1, 4, 2, 3).reshape(b, c, h, w)
        y = y + self.norm(self.scan(self.conv(y)))
      return self.proj(y + lepe)

  class Mlp(nn.Module):
    def __init__(self, c, hidden):
      super().__init__()
      self.first, self.conv, self.second = nn.Conv2d(c, hidden, 1), depthwise(hidden, 3), nn.Conv2d(hidden, c, 1)

    def forward(self, x):
      x = F.gelu(self.first(x))
      return self.second(x + self.conv(x))

  class Block(nn.Module):
    def __init__(self, c, mixer, hidden):
      super().__init__()
      self.mixer, self.mlp, self.norms = mixer, Mlp(c, hidden), nn.ModuleList(Norm(c, eps=1e-6) for _ in range(2))
      self.places = nn.ModuleList(depthwise(c, 3) for _ in range(2))

    def forward(self, x):
      x = x + self.places[0](x)
      x = x + self.mixer(self.norms[0](x))
      x = x + self.places[1](x)
      return x + self.mlp(self.norms[1](x))

  class SegMAN(nn.Module):
    def __init__(self):
      super().__init__()
      c, e, none = WIDTHS[0], EMBED, nn.Identity()
      self.stem = nn.Sequential(
        conv(3, c // 2, 3, 2, 1, nn.GELU()), conv(c // 2, c // 2, 3, 1, 1, nn.GELU()),
        conv(c // 2, c, 3, 2, 1, nn.GELU()), conv(c, c, 3, 1, 1, none),
      )  # fmt: skip
      self.stages, self.downs = nn.ModuleList(), nn.ModuleList([none])
      for i, (width, depth, heads, window, ratio) in enumerate(
        zip(WIDTHS, DEPTHS, HEADS, WINDOWS, RATIOS, strict=True)
      ):
        mixer = functools.partial(Mixer, width, heads, window, 7 if i == 3 else 0)
        self.stages.append(nn.Sequential(*(Block(width, mixer(), int(ratio * width)) for _ in range(depth))))
        if i:
          self.downs.append(conv(WIDTHS[i - 1], width, 3, 2, 1, none))
      point = lambda i, o: conv(i, o, 1, 1, 0, nn.ReLU())
      self.maps = nn.ModuleList(nn.Conv2d(width, MAP, 1) for width in WIDTHS[1:])
      self.fuse, self.pool, self.short, self.spread = point(3 * MAP, e), point(e, e), point(e, e), point(3 * e, MAP)
      self.second, self.fourth = conv(e, 2 * e, 3, 2, 1, nn.ReLU()), conv(e, 4 * e, 5, 4, 1, nn.ReLU())
      self.reduce = nn.ModuleList(point(n * e, e) for n in (16, 8, 4))
      self.block = Block(3 * e, Scan(3 * e), 12 * e)
      self.join, self.head = point(5 * e + 3 * MAP, e), nn.Conv2d(e, CLASSES, 1)

    def forward(self, x):
      x, maps = self.stem(x), []
      for down, stage in zip(self.downs, self.stages, strict=True):
        x = stage(down(x))
        maps.append(x)
      c = [m(x) for m, x in zip(self.maps, maps[1:], strict=True)]
      side = c[0].shape[2:]
      up = lambda t: F.interpolate(t, side, mode="bilinear")
      c = [c[0], up(c[1]), up(c[2])]
      f = self.fuse(torch.cat(c[::-1], 1))
      scales = [F.pixel_unshuffle(f, 4), F.pixel_unshuffle(self.second(f), 2), self.fourth(f)]
      m = up(self.block(torch.cat([r(s) for r, s in zip(self.reduce, scales, strict=True)], 1)))
      shared = self.spread(m)
      parts = [self.short(f), up(self.pool(f.mean((2, 3), keepdim=True))), m, *(each + shared for each in c)]
      return self.head(self.join(torch.cat(parts, 1)))

  torch.manual_seed(0)
  model = SegMAN()
  image, label = torch.randn(batch, 3, size, size), torch.randint(0, CLASSES, (batch, size, size))
  if what == "inference":
    return _sides.torch_call(model, image, dtype=dtype)
  optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
  forward = lambda: F.interpolate(model(image), image.shape[2:], mode="bilinear")
  return _sides.torch_step(optimizer, forward, lambda logits: F.cross_entropy(logits.float(), label), dtype=dtype)


def our_attention(gradient):
  """Neighbourhood attention of SegMAN-T's first stage at 512 pixels."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from jaxlab.nn.neighborhood_attention import neighborhood_attention

  q, k, v = jnp.asarray(np.random.default_rng(0).standard_normal((3, 1, 128, 128, 32)).astype("float32"))
  bias = jnp.zeros((1, 21, 21))
  attend = lambda q, k, v, b: neighborhood_attention(q, k, v, window=11, num_heads=1, bias=b)
  call = jax.grad(lambda *x: (attend(*x) ** 2).sum(), (0, 1, 2, 3)) if gradient else attend
  call = jax.jit(call)
  return lambda: jax.block_until_ready(call(q, k, v, bias))


def their_attention(gradient):
  """The same by gathered windows."""
  import torch

  q, k, v = (torch.randn(1, 1, 128, 128, 32, requires_grad=gradient) for _ in range(3))
  bias = torch.zeros(1, 21, 21, requires_grad=gradient)

  def run():
    out = torch_attention(q, k, v, 11, bias)
    if gradient:
      (out**2).sum().backward()

  return run


def cases():
  """Small batches at 224 and 512 pixels, as two cores allow."""
  made = [
    Case(f"neighbourhood attention, 128x128x32, window 11, {name}", functools.partial(our_attention, gradient),
         {"PyTorch, gathered windows": functools.partial(their_attention, gradient)})
    for name, gradient in (("forward", False), ("forward and gradient", True))
  ]  # fmt: skip
  for what, batch, size, dtype in (
    ("training step", 4, 224, "float32"),
    ("training step", 4, 224, "bfloat16"),
    ("inference", 1, 512, "float32"),
  ):
    mine, peer = (functools.partial(side, batch, size, what, dtype) for side in (ours, torch))
    made.append(Case(f"SegMAN-T {what}, {batch} images of {size}x{size}, {dtype}", mine, {"PyTorch": peer}))
  return made
