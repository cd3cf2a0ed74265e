"""MAN's training step on a CIFAR ResNet-20 in 9 modules, and inference, beside the same in PyTorch.

The peer goes module by module as the official code does: forward, both losses, backward, detach, average; one optimizer
step. Averages follow weights by in-place operations.
"""

import functools

from benchmarks import _local_torch
from benchmarks.harness import Case

LAYERS, BATCH = 20, 64


def ours(what, dtype):
  """A step of SGD on all modules, or inference."""
  from jaxlab.learning import local
  from jaxlab.learning import momentum_auxiliary as man
  from jaxlab.models.backbones import cifar

  model = man.MomentumAuxiliary(cifar.resnet(LAYERS), cuts=tuple(range(1, 10)), dtype=dtype)
  learner = man.learner(model, local.sgd(0.1), [(5.0, 0.5)] * 8)
  return _local_torch.ours(learner, model, what, BATCH)


def torch(what, dtype):
  """The same with torch."""
  import torch
  from torch import nn
  from torch.nn import functional

  from jaxlab.learning.momentum_auxiliary import MEAN, STD

  Block, units, classifier = _local_torch.parts()
  made, last = units(LAYERS), classifier(64)
  blocks = (LAYERS - 2) // 6
  widths = (16,) * (blocks + 1) + (32,) * blocks + (64,) * blocks
  biases, averages, decoders, classifiers = (nn.ModuleList() for _ in range(4))
  for j in range(1, 9):
    width, out, stride = widths[j], widths[j + 1], 2 if widths[j] < widths[j + 1] else 1
    biases.append(Block(width, out, stride))
    averages.append(Block(width, out, stride).requires_grad_(False))
    decoders.append(
      nn.Sequential(nn.Conv2d(out, 12, 3, 1, 1), nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.Conv2d(12, 3, 3, 1, 1))
    )
    wide = min(2 * out, 64)
    classifiers.append(
      nn.Sequential(
        nn.Conv2d(out, wide, 3, 1 if out == 64 else 2, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(inplace=True),
        nn.Conv2d(wide, wide, 3, 1, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 128), nn.ReLU(inplace=True), nn.Linear(128, 10),
      )
    )  # fmt: skip
  everything = nn.ModuleList([*made, last, biases, averages, decoders, classifiers])
  everything.to(memory_format=torch.channels_last)
  mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))

  def step(image, label):
    target = (image * std + mean).clamp(0, 1)
    h = made[0](image.contiguous(memory_format=torch.channels_last))
    for j in range(8):
      h = made[j + 1](h)
      y = biases[j](h) + averages[j](h)
      large = functional.interpolate(y, (32, 32), mode="bilinear", align_corners=True)
      painted = functional.binary_cross_entropy_with_logits(decoders[j](large).float(), target)
      (5 * painted + 0.5 * functional.cross_entropy(classifiers[j](y), label)).backward()
      h = h.detach()
      with torch.no_grad():
        for kept, weight in zip(averages[j].parameters(), made[j + 2].parameters(), strict=True):
          kept.mul_(0.995).add_(weight, alpha=0.005)
    functional.cross_entropy(last(made[-1](h)), label).backward()

  step.parameters = [p for p in everything.parameters() if p.requires_grad]
  return _local_torch.run(made, step, what, dtype, BATCH, last)


def cases():
  """Step and inference in both precisions."""
  made = []
  for dtype in ("float32", "bfloat16"):
    for what in ("step", "inference"):
      sides = [functools.partial(side, what, dtype) for side in (ours, torch)]
      made.append(Case(f"ResNet-20 in 9 modules, {what}, {BATCH} images, {dtype}", sides[0], {"PyTorch": sides[1]}))
  return made
