"""AugLocal's training step, backpropagation's and inference on a CIFAR ResNet-20 beside the same in PyTorch.

The peer goes module by module as the official code does: forward, loss, backward, detach; one optimizer step.
"""

import functools

from benchmarks import _local_torch
from benchmarks.harness import Case

LAYERS, BATCH = 20, 64


def ours(depth, what, dtype):
  """A step of SGD on all modules (depth 0: one module, backpropagation), or inference."""
  from jaxlab.learning import auglocal, local
  from jaxlab.models.backbones import cifar

  kind = {"depth": depth} if depth else {"modules": 1}
  model = auglocal.AugLocal(cifar.resnet(LAYERS), dtype=dtype, **kind)
  return _local_torch.ours(auglocal.learner(model, local.sgd(0.1)), model, what, BATCH)


def torch(depth, what, dtype):
  """The same with torch."""
  import torch
  from torch import nn

  from jaxlab.learning import auglocal

  Block, units, classifier = _local_torch.parts()
  made, last = units(LAYERS), classifier(64)
  blocks = (LAYERS - 2) // 6
  widths = (16,) * (blocks + 1) + (32,) * blocks + (64,) * blocks
  modules = len(made) - depth if depth else 1
  heads = []
  for unit, d in enumerate(auglocal.head_depths(depth or 1, modules)):
    body, width = [], widths[unit]
    for out, stride in auglocal.head_blocks(widths, unit, d):
      body.append(Block(width, out, stride))
      width = out
    heads.append(nn.Sequential(*body, classifier(width, *([nn.BatchNorm1d(width)] if d == 1 else []))))
  rest = nn.Sequential(*made[modules - 1 :], last)
  everything = nn.ModuleList([*made[: modules - 1], *heads, rest]).to(memory_format=torch.channels_last)

  def step(image, label):
    h = image.contiguous(memory_format=torch.channels_last)
    for unit, head in zip(made, heads, strict=False):
      h = unit(h)
      nn.functional.cross_entropy(head(h), label).backward()
      h = h.detach()
    nn.functional.cross_entropy(rest(h), label).backward()

  step.parameters = list(everything.parameters())
  return _local_torch.run(made, step, what, dtype, BATCH, last)


def cases():
  """Steps and inference in both precisions."""
  made = []
  for dtype in ("float32", "bfloat16"):
    for depth in (1, 3, 0):
      name = f"ResNet-20, {f'step with d = {depth}' if depth else 'step of backpropagation'}, {BATCH} images, {dtype}"
      sides = [functools.partial(side, depth, "step", dtype) for side in (ours, torch)]
      made.append(Case(name, sides[0], {"PyTorch": sides[1]}))
    sides = [functools.partial(side, 0, "inference", dtype) for side in (ours, torch)]
    made.append(Case(f"ResNet-20, inference, {BATCH} images, {dtype}", sides[0], {"PyTorch": sides[1]}))
  return made
