"""STU-Net's training step and inference beside the same in PyTorch.

The peer is written from the paper's definition in the official form: NCDHW, and maps upsampled before their 1x1x1
convolution. In bfloat16 it runs under autocast. Parameter counts are compared on both sides.
"""

import functools

from benchmarks import _sides
from benchmarks.harness import Case

WIDTHS = {"S": 16, "B": 32}
CLASSES, COUNT = 105, {"S": 14_596_941, "B": 58_262_669}


def ours(variant, batch, side, what, dtype):
  """A step of SGD under deep supervision, or inference at the full scale."""
  import jax
  import numpy as np
  import optax

  from jaxlab import train
  from jaxlab.models import stu_net

  rng = np.random.default_rng(0)
  volume = rng.standard_normal((batch, side, side, side, 1)).astype("float32")
  label = rng.integers(0, CLASSES, (batch, side, side, side), dtype="int32")
  examples = jax.device_put({"image": volume, "label": label})
  model = stu_net.stu_net(variant, CLASSES, dtype=dtype, deep_supervision=what == "training step")
  tx = optax.chain(
    optax.clip_by_global_norm(12.0), optax.add_decayed_weights(3e-5), optax.sgd(0.01, 0.99, nesterov=True)
  )
  learner = train.supervised(model, stu_net.segmentation_loss(), tx)
  shapes = jax.eval_shape(model.init, jax.random.key(0), volume)
  assert sum(p.size for p in jax.tree.leaves(shapes)) == COUNT[variant]
  if what == "inference":
    variables = jax.jit(model.init)(jax.random.key(0), volume)
    return _sides.jax_call(model.apply, variables, examples["image"])
  return _sides.jax_step(learner, examples)


def torch(variant, batch, side, what, dtype):
  """The same with torch."""
  import torch
  from torch import nn
  from torch.nn import functional as F

  class Block(nn.Module):
    def __init__(self, i, o, stride):
      super().__init__()
      self.conv1, self.conv2 = nn.Conv3d(i, o, 3, stride, 1), nn.Conv3d(o, o, 3, 1, 1)
      self.norm1, self.norm2 = (nn.InstanceNorm3d(o, affine=True) for _ in range(2))
      self.skip = nn.Conv3d(i, o, 1, stride)

    def forward(self, x):
      y = F.leaky_relu(self.norm1(self.conv1(x)), 0.01, inplace=True)
      return F.leaky_relu(self.norm2(self.conv2(y)) + self.skip(x), 0.01, inplace=True)

  class STUNet(nn.Module):
    def __init__(self):
      super().__init__()
      w = [WIDTHS[variant] * n for n in (1, 2, 4, 8, 16, 16)]
      self.encoder = nn.ModuleList(Block(i, o, 1 if i == 1 else 2) for i, o in zip([1, *w[:-1]], w, strict=True))
      self.up = nn.ModuleList(nn.Conv3d(w[k + 1], w[k], 1) for k in range(5))
      self.decoder = nn.ModuleList(Block(2 * w[k], w[k], 1) for k in range(5))
      self.head = nn.ModuleList(nn.Conv3d(w[k], CLASSES, 1) for k in range(5))

    def forward(self, x):
      maps, logits = [], []
      for stage in self.encoder:
        x = stage(x)
        maps.append(x)
      for k in range(4, -1, -1):
        x = self.up[k](F.interpolate(x, scale_factor=2, mode="nearest"))
        x = self.decoder[k](torch.cat([x, maps[k]], 1))
        if what == "training step" or k == 0:
          logits.append(self.head[k](x))
      return logits[::-1]

  torch.manual_seed(0)
  model = STUNet()
  assert sum(p.numel() for p in model.parameters()) == COUNT[variant]
  volume, label = torch.randn(batch, 1, side, side, side), torch.randint(0, CLASSES, (batch, side, side, side))
  if what == "inference":
    return _sides.torch_call(model, volume, dtype=dtype)
  optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.99, weight_decay=3e-5, nesterov=True)

  def loss(logits, label):
    p = logits.softmax(1)
    truth = F.one_hot(label, CLASSES).movedim(-1, 1)
    hit, either = (p * truth).sum((0, 2, 3, 4))[1:], (p + truth).sum((0, 2, 3, 4))[1:]
    return F.cross_entropy(logits, label) - ((2 * hit + 1e-5) / (either + 1e-5)).mean()

  def step():
    optimizer.zero_grad()
    with _sides.autocast(dtype):
      scales = model(volume)
    total = 0.0
    for k, weight in enumerate((8, 4, 2, 1)):
      first, stride = 2**k // 2, 2**k
      total = total + weight / 15 * loss(scales[k].float(), label[:, first::stride, first::stride, first::stride])
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 12.0)
    optimizer.step()

  return step


def cases():
  """One volume at a time, as two cores allow; 128 voxels a side are the published input."""
  made = []
  for variant, what, side, dtype in (
    ("S", "training step", 64, "float32"),
    ("S", "training step", 64, "bfloat16"),
    ("S", "inference", 128, "float32"),
    ("B", "inference", 64, "float32"),
    ("B", "inference", 64, "bfloat16"),
    ("B", "training step", 64, "float32"),
  ):
    mine, peer = (functools.partial(f, variant, 1, side, what, dtype) for f in (ours, torch))
    made.append(Case(f"STU-Net-{variant} {what}, {side}x{side}x{side}, {dtype}", mine, {"PyTorch": peer}))
  return made
