"""CVMH-UNet's training step and inference, and the cross scan alone, beside the same in PyTorch.

There is no official code. The peer is written from the paper's definition as VM-UNet's code is (maps [B, H, W, C],
convolutions on NCHW), with as many parameters, which is checked. The CUDA scan's stand-in is the parallel one of
`benchmarks/selective_scan.py`, which is faster on CPU than a loop over pixels.
"""

import functools

from benchmarks import _sides
from benchmarks.harness import Case

WIDTHS, CLASSES, STATES, PARAMETERS = (96, 192, 384, 768), 6, 16, 31_228_363


def ours(batch, size, what, dtype):
  """A step of AdamW, or inference."""
  import jax
  import numpy as np
  import optax

  from jaxlab import train
  from jaxlab.models import cvmh_unet

  rng = np.random.default_rng(0)
  image = rng.standard_normal((batch, size, size, 3)).astype("float32")
  label = rng.integers(0, CLASSES, (batch, size, size), dtype="int32")
  examples = jax.device_put({"image": image, "label": label})
  model = cvmh_unet.CVMHUNet(CLASSES, dtype=dtype, drop_path=0.0)
  learner = train.supervised(model, train.cross_entropy(), optax.adamw(1e-4))
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  assert sum(p.size for p in jax.tree.leaves(shapes)) == PARAMETERS
  if what == "inference":
    variables = jax.jit(model.init)(jax.random.key(0), image)
    return _sides.jax_call(model.apply, variables, examples["image"])
  return _sides.jax_step(learner, examples)


def torch_cross_scan(channels, rank):
  """The sum of four scans as a PyTorch module on [B, H, W, C]."""
  import numpy as np
  import torch
  from torch import nn
  from torch.nn import functional as F

  from benchmarks.selective_scan import torch_parallel_scan

  scan = torch_parallel_scan()

  @functools.cache
  def orders(height, width):
    i, j = np.divmod(np.arange(height * width), width)
    rows, columns = np.arange(height * width), np.lexsort((i, j))[::-1]
    diagonals, antidiagonals = np.lexsort((i, i + j)), np.lexsort((i, i - j))[::-1]
    there = np.stack([rows, columns, diagonals, antidiagonals])
    return torch.from_numpy(there), torch.from_numpy(there.argsort(1))

  class CrossScan(nn.Module):
    def __init__(self):
      super().__init__()
      uniform = lambda *shape: nn.Parameter(torch.empty(shape).uniform_(-(shape[-1] ** -0.5), shape[-1] ** -0.5))
      self.project, self.steps = uniform(4, rank + 2 * STATES, channels), uniform(4, channels, rank)
      self.bias = nn.Parameter(torch.empty(4, channels).uniform_(-6.9, -2.3))
      self.log = nn.Parameter(torch.arange(1.0, STATES + 1).log().repeat(4, channels, 1))
      self.skip = nn.Parameter(torch.ones(4, channels))

    def forward(self, x):
      b, h, w, c = x.shape
      there, back = orders(h, w)
      u = x.view(b, h * w, c)[:, there]  # [B, 4, L, C]
      d, into, out = torch.einsum("bklc,krc->bklr", u, self.project).split([rank, STATES, STATES], -1)
      delta = F.softplus((torch.einsum("bklr,kcr->bklc", d, self.steps) + self.bias[:, None]).float())[..., None]
      u = u.float()
      decay = torch.exp(-delta * self.log.exp()[:, None])  # [B, 4, L, C, N]
      state = scan(decay.flatten(0, 1), (delta * into.float()[..., None, :] * u[..., None]).flatten(0, 1))
      y = (state.view(b, 4, h * w, c, STATES) @ out.float()[..., None])[..., 0] + self.skip[:, None] * u
      return sum(y[:, k, back[k]] for k in range(4)).view(b, h, w, c)

  return CrossScan()


def torch_network():
  """CVMH-UNet as a PyTorch module on [B, 3, H, W]."""
  import numpy as np
  import torch
  from torch import nn
  from torch.nn import functional as F

  U, V = (
    np.array([0, 0, 6, 0, 0, 1, 1, 4, 5, 1, 3, 0, 0, 0, 3, 2]),
    np.array([0, 1, 0, 5, 2, 0, 2, 0, 0, 6, 0, 4, 6, 3, 5, 2]),
  )
  linear = functools.partial(nn.Linear, bias=False)
  first, last = (lambda x: x.movedim(-1, 1)), (lambda x: x.movedim(1, -1))

  def taps(c):
    k = int(abs((np.log2(c) + 1) / 2))
    return k if k % 2 else k + 1

  def depthwise(c, bias=True):
    return nn.Conv2d(c, c, 3, padding=1, groups=c, bias=bias)

  class ECA(nn.Module):
    def __init__(self, c):
      super().__init__()
      self.conv = nn.Conv1d(1, 1, taps(c), padding=taps(c) // 2, bias=False)

    def forward(self, v):
      return self.conv(v.reshape(-1, 1, v.shape[-1])).view(v.shape)

  class Block(nn.Module):
    def __init__(self, c):
      super().__init__()
      self.norm, self.into, self.conv = nn.LayerNorm(c), linear(c, 4 * c), depthwise(2 * c)
      self.scan, self.scan_norm = torch_cross_scan(2 * c, -(-c // 16)), nn.LayerNorm(2 * c)
      self.out, self.attention = linear(2 * c, c), ECA(c)
      self.local = nn.Sequential(
        depthwise(c, False), nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c)
      )

    def forward(self, x):
      u = self.norm(x)
      a, z = self.into(u).chunk(2, -1)
      s = self.scan_norm(self.scan(last(F.silu(self.conv(first(a)))).contiguous()))
      g = self.out(s * F.silu(z))
      g = g * self.attention(g.mean((1, 2)))[:, None, None].sigmoid()
      return x + g + last(self.local(first(u)))

  class Fusion(nn.Module):
    def __init__(self, c, side):
      super().__init__()
      self.side, self.attention = side, ECA(c)
      wave = lambda k: np.cos(np.pi * k[:, None] * (np.arange(side) + 0.5) / side) * np.where(k[:, None], 2, 1) ** 0.5
      images = np.einsum("fi,fj->fij", wave(U * (side // 7)), wave(V * (side // 7))) / side
      self.register_buffer("images", torch.from_numpy(images.astype("float32")))
      self.point = nn.Sequential(
        nn.Conv2d(c, c // 4, 1, bias=False), nn.BatchNorm2d(c // 4), nn.ReLU(), nn.Conv2d(c // 4, c, 1, bias=False),
        nn.BatchNorm2d(c),
      )  # fmt: skip
      self.join = nn.Sequential(nn.Conv2d(2 * c, c, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU())

    def forward(self, e, d):
      e, d = first(e), first(d)
      x = e + d
      pooled = F.adaptive_avg_pool2d(x.float(), self.side)
      maps = [pooled * image for image in self.images]
      statistics = [sum(f(m) for m in maps) / len(maps) for f in (
        lambda m: m.mean((2, 3)), lambda m: m.amax((2, 3)), lambda m: m.amin((2, 3))
      )]  # fmt: skip
      w = (sum(map(self.attention, statistics))[..., None, None] + self.point(x)).sigmoid()
      return last(self.join(torch.cat([w * e + (1 - w) * d, x], 1)))

  class Merge(nn.Module):
    def __init__(self, c):
      super().__init__()
      self.norm, self.reduce = nn.LayerNorm(4 * c), linear(4 * c, 2 * c)

    def forward(self, x):
      return self.reduce(self.norm(torch.cat([x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], -1)))

  class Expand(nn.Module):
    def __init__(self, c, outputs, side):
      super().__init__()
      self.side, self.expand, self.norm = side, linear(c, outputs * side**2), nn.LayerNorm(outputs)

    def forward(self, x):
      b, h, w, _ = x.shape
      x = self.expand(x).view(b, h, w, self.side, self.side, -1).transpose(2, 3)
      return self.norm(x.reshape(b, h * self.side, w * self.side, -1))

  class CVMHUNet(nn.Module):
    def __init__(self):
      super().__init__()
      pair = lambda c: nn.Sequential(Block(c), Block(c))
      self.embed, self.norm = nn.Conv2d(3, WIDTHS[0], 4, 4), nn.LayerNorm(WIDTHS[0])
      self.down, self.up = (nn.ModuleList(map(pair, WIDTHS)) for _ in range(2))
      self.merge = nn.ModuleList(map(Merge, WIDTHS[:-1]))
      self.expand = nn.ModuleList(Expand(2 * c, c, 2) for c in WIDTHS[:-1])
      self.fuse = nn.ModuleList(map(Fusion, WIDTHS, (56, 28, 14)))
      self.final, self.head = Expand(WIDTHS[0], WIDTHS[0] // 4, 4), nn.Conv2d(WIDTHS[0] // 4, CLASSES, 1)

    def forward(self, image):
      x, maps = self.norm(last(self.embed(image))), []
      for i, stage in enumerate(self.down):
        x = stage(self.merge[i - 1](x) if i else x)
        maps.append(x)
      x = self.up[-1](x)
      for i in reversed(range(3)):
        x = self.up[i](self.fuse[i](maps[i], self.expand[i](x)))
      return self.head(first(self.final(x)))

  return CVMHUNet()


def torch(batch, size, what, dtype):
  """The same with torch; in bfloat16 under autocast."""
  import torch
  from torch.nn import functional as F

  torch.manual_seed(0)
  model = torch_network()
  assert sum(p.numel() for p in model.parameters()) == PARAMETERS
  image, label = torch.randn(batch, 3, size, size), torch.randint(0, CLASSES, (batch, size, size))
  if what == "inference":
    return _sides.torch_call(model, image, dtype=dtype)
  optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
  loss = lambda logits: F.cross_entropy(logits.float(), label)
  return _sides.torch_step(optimizer, lambda: model(image), loss, dtype=dtype)


def our_scan(side, gradient):
  """CS2D of 192 channels, that of the first stage at 4 * side pixels."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from jaxlab.nn.scan_2d import CS2D, SelectiveScan2D

  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, side, side, 192)).astype("float32"))
  layer = SelectiveScan2D(STATES, 6, CS2D)
  params = jax.jit(layer.init)(jax.random.key(0), x)
  call = jax.grad(lambda *a: (layer.apply(*a) ** 2).sum(), (0, 1)) if gradient else layer.apply
  call = jax.jit(call)
  return lambda: jax.block_until_ready(call(params, x))


def their_scan(side, gradient):
  """The same in PyTorch."""
  import torch

  layer, x = torch_cross_scan(192, 6), torch.randn(1, side, side, 192, requires_grad=gradient)

  def run():
    with torch.set_grad_enabled(gradient):
      y = layer(x)
    if gradient:
      (y**2).sum().backward()

  return run


def cases():
  """The scan at two sizes, whose times and memory show that both are linear in the pixels; then the network."""
  made = []
  for side, gradient in ((56, True), (112, True), (112, False)):
    name = f"CS2D of {side}x{side} pixels, 192 channels, 16 states, {'forward and gradient' if gradient else 'forward'}"
    mine, peer = (functools.partial(f, side, gradient) for f in (our_scan, their_scan))
    made.append(Case(name, mine, {"PyTorch": peer}))
  for what, batch, size, dtype in (
    ("training step", 2, 224, "float32"),
    ("training step", 2, 224, "bfloat16"),
    ("inference", 1, 512, "float32"),
    ("inference", 1, 512, "bfloat16"),
  ):
    mine, peer = (functools.partial(side, batch, size, what, dtype) for side in (ours, torch))
    made.append(Case(f"CVMH-UNet {what}, {batch} images of {size}x{size}, {dtype}", mine, {"PyTorch": peer}))
  return made
