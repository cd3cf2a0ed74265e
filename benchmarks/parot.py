"""PaRot's training step and inference at the published sizes beside the same network in PyTorch, and its point choices.

The peer is written from the paper's definition in the official form: channels before points, convolutions of size one,
neighbours' features gathered before the layer that reads them. Inference needs one pass through the patch networks;
the official code makes two, equal to each other, and the peer is spared the second. Farthest point sampling, a CUDA
operator there, is a loop over batches of distances, and nearest points come from `cdist` and `topk`.
"""

import functools

from benchmarks import _sides
from benchmarks.harness import Case

CLASSES, PATCHES, LOCAL, GLOBAL, NEAR, PARTS, CATEGORIES, UP = 40, 256, 64, 32, 32, 50, 16, 11


def ours(batch, points, what, dtype):
  """A step of Adam, or inference; 2048 points are segmented, fewer classified."""
  import jax
  import numpy as np
  import optax

  from jaxlab import train
  from jaxlab.models import parot

  rng = np.random.default_rng(0)
  clouds = rng.standard_normal((batch, points, 3)).astype("float32")
  parts = points == 2048
  label = rng.integers(0, CATEGORIES, batch, dtype="int32")
  examples = {"x": (clouds, label) if parts else clouds, "label": label}
  if parts:
    examples["label"] = rng.integers(0, PARTS, (batch, points), dtype="int32")
  examples = jax.device_put(examples)
  model = parot.segmenter(PARTS, CATEGORIES, dtype=dtype) if parts else parot.classifier(CLASSES, dtype=dtype)
  tx = optax.chain(optax.add_decayed_weights(1e-6), optax.adam(1e-3))
  learner = train.supervised(model, parot.objective(), tx, inputs=lambda b: b["x"])
  if what == "inference":
    variables = jax.jit(model.init)(jax.random.key(0), examples["x"])
    return _sides.jax_call(model.apply, variables, examples["x"])
  return _sides.jax_step(learner, examples)


def torch_points():
  """Farthest and nearest points in torch, (points, count) -> index and (queries, points, k) -> index."""
  import torch

  def farthest(x, count):
    rows = torch.arange(len(x))
    last = torch.randint(0, x.shape[1], (len(x),))
    chosen = torch.empty(len(x), count, dtype=torch.long)
    nearest = torch.full(x.shape[:2], torch.inf)
    for s in range(count):
      chosen[:, s] = last
      nearest = torch.minimum(nearest, ((x - x[rows, last][:, None]) ** 2).sum(-1))
      last = nearest.argmax(-1)
    return chosen

  def nearest(queries, x, k):
    return torch.cdist(queries, x).topk(k, largest=False).indices

  return farthest, nearest


def torch(batch, points, what, dtype):
  """The same with torch; in bfloat16 under autocast."""
  import torch
  from torch import nn
  from torch.nn import functional as F

  farthest, nearest = torch_points()
  parts = points == 2048
  seen, near = (2 * GLOBAL, NEAR // 2) if parts else (GLOBAL, NEAR)

  def layers(kind, norm, widths, slope=0.0):
    made = []
    for a, b in zip(widths, widths[1:], strict=False):
      made += [kind(a, b, 1, bias=False) if kind is not nn.Linear else nn.Linear(a, b, bias=False), norm(b)]
      made.append(nn.LeakyReLU(slope, inplace=True) if slope else nn.ReLU(inplace=True))
    return nn.Sequential(*made)

  lines = functools.partial(layers, nn.Conv1d, nn.BatchNorm1d)
  planes = functools.partial(layers, nn.Conv2d, nn.BatchNorm2d)
  rows = functools.partial(layers, nn.Linear, nn.BatchNorm1d)

  def gather(x, index):  # [B, N, C], [B, ...] -> [B, ..., C]
    return x[torch.arange(len(x)).view(-1, *[1] * (index.ndim - 1)), index]

  def rotations(count):
    w, x, y, z = F.normalize(torch.randn(count, 4), dim=-1).unbind(-1)
    return torch.stack(
      [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
       2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
       2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1).view(count, 3, 3)  # fmt: skip

  def frame(d):
    return torch.cat([d, F.normalize(torch.linalg.cross(d[..., 0, :], d[..., 1, :]), dim=-1)[..., None, :]], -2)

  def see(frames, v):
    return (frames @ v[..., None])[..., 0]

  class Disentangle(nn.Module):
    def __init__(self):
      super().__init__()
      self.points, self.feature = lines((3, 64, 128, 128)), rows((128, 128, 128))
      self.direction = nn.ModuleList(nn.Sequential(*rows((128, 64, 32)), nn.Linear(32, 3, bias=False)) for _ in "12")

    def once(self, x):
      u = self.points(x.transpose(1, 2)).amax(-1)
      return self.feature(u), torch.stack([F.normalize(d(u).float(), dim=-1) for d in self.direction], 1)

    def forward(self, x):
      if not self.training:
        return *self.once(x), 0.0
      r1, r2 = rotations(len(x)), rotations(len(x))
      (f, d1), (_, d2) = self.once(x @ r1), self.once(x @ r2)
      loss = F.mse_loss(d1, d2 @ r2.mT @ r1) + 0.2 * ((d1[:, 0] * d1[:, 1]).sum(-1) ** 2).mean()
      return f, d1 @ r1.mT, loss

  class PaRot(nn.Module):
    def __init__(self):
      super().__init__()
      self.local, self.world = Disentangle(), Disentangle()
      self.near_pose, self.near = planes((16, 32)), planes((288, 128, 128, 128))
      self.scale_pose, self.scale = lines((16, 32), slope=0.2), lines((288, 256, 512, 1024), slope=0.2)
      if parts:
        self.down_pose, self.down = lines((16, 32), slope=0.2), lines((1312, 256, 256))
        self.up_pose, self.up = planes((7, 32), slope=0.2), planes((304, 256, 128, 128))
        self.head = nn.Sequential(lines((128, 128, 128)), nn.Dropout(0.5), nn.Conv1d(128, PARTS, 1))
      else:
        drop = lambda: nn.Dropout(0.5)
        self.head = nn.Sequential(
          rows((1024, 512), slope=0.2), drop(), rows((512, 256), slope=0.2), drop(), nn.Linear(256, CLASSES)
        )

    def forward(self, x, category):
      b = len(x)
      q = gather(x, farthest(x, PATCHES))
      patches = gather(x, nearest(q, x, LOCAL)) - q[:, :, None]
      views = gather(x, farthest(x, seen))[:, None] - q[:, :, None]
      f, d, loss = self.local(patches.flatten(0, 1))
      g, e, other = self.world(views.flatten(0, 1))
      f, g, d, e = f.view(b, PATCHES, 128), g.view(b, PATCHES, 128), d.view(b, -1, 2, 3), e.view(b, -1, 2, 3)

      index = nearest(q, q, near)
      own = frame(d)
      there = gather(own.flatten(2), index).view(b, PATCHES, near, 3, 3)
      offset = gather(q, index) - q[:, :, None]
      unit, here = F.normalize(offset, dim=-1), own[:, :, None]
      pose = torch.cat(
        [(there @ here.mT).flatten(-2), see(here, unit), see(there, unit), offset.norm(dim=-1)[..., None]], -1
      )
      fj = gather(f, index)
      h = self.near_pose(pose.permute(0, 3, 1, 2))
      pairs = torch.cat([fj, fj - f[:, :, None]], -1).permute(0, 3, 1, 2)
      around = self.near(torch.cat([pairs, h], 1)).amax(-1)

      here, there, unit = frame(d), frame(e), F.normalize(q, dim=-1)
      pose = torch.cat(
        [q.norm(dim=-1)[..., None], (here @ there.mT).flatten(-2), see(here, unit), see(there, unit)], -1
      )
      pose = pose.transpose(1, 2)
      both = torch.cat([around, g.transpose(1, 2)], 1)
      whole = self.scale(torch.cat([both, self.scale_pose(pose)], 1)).amax(-1)
      if not parts:
        return self.head(whole), loss + other
      y = self.down(torch.cat([whole[..., None].expand(-1, -1, PATCHES), both, self.down_pose(pose)], 1)).transpose(
        1, 2
      )
      index = nearest(x, q, UP)
      offset = x[:, :, None] - gather(q, index)
      unit = F.normalize(offset, dim=-1)
      views = [see(gather(o.flatten(2), index).unflatten(-1, (3, 3)), unit) for o in (here, there)]
      pose = self.up_pose(torch.cat([offset.norm(dim=-1)[..., None], *views], -1).permute(0, 3, 1, 2))
      kind = F.one_hot(category, CATEGORIES)[:, :, None, None].expand(-1, -1, *index.shape[1:])
      y = self.up(torch.cat([gather(y, index).permute(0, 3, 1, 2), pose, kind.float()], 1)).sum(-1)
      return self.head(y), loss + other

  torch.manual_seed(0)
  model = PaRot()
  count = sum(p.numel() for p in model.parameters())
  assert count == (1_534_738 if parts else 1_630_888), count
  x, category = torch.randn(batch, points, 3), torch.randint(0, CATEGORIES, (batch,))
  label = torch.randint(0, PARTS, (batch, points)) if parts else torch.randint(0, CLASSES, (batch,))
  if what == "inference":
    return _sides.torch_call(model, x, category, dtype=dtype)
  optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-6)

  def loss(outputs):
    logits, siamese = outputs
    return F.cross_entropy(logits.float(), label, label_smoothing=0.2) + siamese

  return _sides.torch_step(optimizer, lambda: model(x, category), loss, dtype=dtype)


def our_points(batch):
  """Choice of 256 of 1024 points, and the 64 points nearest to each."""
  import jax
  import numpy as np

  from jaxlab.nn.points import farthest_points, gather_points, nearest_points

  x = jax.device_put(np.random.default_rng(0).standard_normal((batch, 1024, 3)).astype("float32"))

  @jax.jit
  def call(x):
    q = gather_points(x, farthest_points(x, PATCHES))
    return nearest_points(q, x, LOCAL)

  return lambda: jax.block_until_ready(call(x))


def their_points(batch):
  """The same with torch."""
  import torch

  farthest, nearest = torch_points()
  x = torch.randn(batch, 1024, 3)

  def run():
    q = x[torch.arange(batch)[:, None], farthest(x, PATCHES)]
    nearest(q, x, LOCAL)

  return run


def cases():
  """Small batches, as two cores allow."""
  made = [
    Case("choice of 256 patches of 64 points, 8 clouds of 1024", functools.partial(our_points, 8),
         {"PyTorch": functools.partial(their_points, 8)})
  ]  # fmt: skip
  for what, batch, points, dtype in (
    ("training step", 4, 1024, "float32"),
    ("training step", 4, 1024, "bfloat16"),
    ("inference", 8, 1024, "float32"),
    ("inference", 8, 1024, "bfloat16"),
    ("training step", 2, 2048, "float32"),
    ("inference", 4, 2048, "float32"),
  ):
    mine, peer = (functools.partial(side, batch, points, what, dtype) for side in (ours, torch))
    task = "segmentation" if points == 2048 else "classification"
    made.append(Case(f"{task}, {what}, {batch} clouds of {points} points, {dtype}", mine, {"PyTorch": peer}))
  return made
