"""A step of TAS's search, and of training what was found under a teacher, beside the same in PyTorch.

The peer goes as the official code does: arrays of the sampled sizes, two normalisations and two adaptive averages over
channels for each convolution, gradients of everything in both halves of the step. Both sides search ResNet-20; the
network that is found is the released C10-R20.
"""

import functools

from benchmarks import _sides
from benchmarks._local_torch import examples
from benchmarks.harness import Case

LAYERS, BATCH, RATIO = 20, 64, 0.55


def ours(what, dtype):
  """A step of the search or of distillation."""
  import jax

  from jaxlab.learning import local
  from jaxlab.learning import transformable_search as tas

  batches = [dict(zip(("image", "label"), examples(BATCH, seed=seed), strict=True)) for seed in range(2)]
  space, tx = tas.resnet(LAYERS), local.sgd(0.1, weight_decay=5e-4)
  if what == "search":
    tau = tas.temperature(100, 100)
    model = tas.SearchNetwork(space, dtype=dtype)
    learner = tas.search_learner(model, tx, tas.architecture_optimizer(), tau, ratio=RATIO)
    return _sides.jax_step(learner, jax.device_put({"weights": batches[0], "architecture": batches[1]}))
  space, genotype = tas.reference("C10-R20")
  teacher, student = (tas.DerivedNetwork(space, g, dtype=dtype) for g in (space.full, genotype))
  variables = jax.jit(teacher.init)(jax.random.key(1), batches[0]["image"])
  learner = tas.distilled_learner(student, tx, teacher, variables)
  return _sides.jax_step(learner, jax.device_put(batches[0]))


def torch(what, dtype):
  """The same with torch."""
  import torch

  from jaxlab.learning import transformable_search as tas

  fast = torch.channels_last
  pairs = [tuple(map(torch.from_numpy, examples(BATCH, torch_layout=True, seed=seed))) for seed in range(2)]
  cross_entropy = torch.nn.functional.cross_entropy
  space = tas.resnet(LAYERS)
  sgd = lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)

  if what == "search":
    # Channels first, as the official code: slices of channels are slower in the other layout.
    net, full = search_network(space), tas.macs(space, space.full) / 1e6
    logits = [net.widths, net.depths]
    weights = [p for p in net.parameters() if all(p is not a for a in logits)]
    tx, architecture_tx = sgd(weights), torch.optim.Adam(logits, 1e-3, betas=(0.5, 0.999), weight_decay=1e-3)

    def step():
      (image, label), (held_image, held_label) = pairs
      tx.zero_grad()
      with _sides.autocast(dtype):
        outputs, _ = net(image)
      cross_entropy(outputs.float(), label).backward()
      tx.step()
      architecture_tx.zero_grad()
      with _sides.autocast(dtype):
        outputs, expected = net(held_image)
      loss, found = cross_entropy(outputs.float(), held_label), net.found()
      if found > RATIO * full:
        loss = loss + 2 * expected.log()
      elif found < (RATIO - 0.05) * full:
        loss = loss - 2 * expected.log()
      loss.backward()
      architecture_tx.step()

    return step

  space, genotype = tas.reference("C10-R20")
  teacher = derived_network(space, space.full).to(memory_format=fast).eval()
  student = derived_network(space, genotype).to(memory_format=fast)
  tx, (image, label) = sgd(student.parameters()), pairs[0]
  image = image.contiguous(memory_format=fast)

  def loss(outputs):
    outputs, said = (a.float() / 4 for a in outputs)
    log_softmax = torch.nn.functional.log_softmax
    soft = torch.nn.functional.kl_div(log_softmax(outputs, 1), torch.softmax(said, 1), reduction="batchmean")
    return 0.1 * cross_entropy(4 * outputs, label) + 0.9 * 16 * soft

  def forward():
    with torch.no_grad():
      said = teacher(image)
    return student(image), said

  return _sides.torch_step(tx, forward, loss, dtype=dtype)


def derived_network(space, genotype):
  """Plain layers of the genotype's sizes."""
  import torch
  from torch import nn

  def conv(i, o, kernel, stride=1, norm=True):
    layer = nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(o)) if norm else layer

  class Block(nn.Module):
    def __init__(self, inputs, a, b, stride):
      super().__init__()
      self.body = nn.Sequential(conv(inputs, a, 3, stride), nn.ReLU(inplace=True), conv(a, b, 3))
      if stride == 2:
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), conv(inputs, b, 1, norm=False))
      else:
        self.shortcut = conv(inputs, b, 1) if inputs != b else nn.Identity()

    def forward(self, x):
      return torch.relu(self.shortcut(x) + self.body(x))

  width = genotype.widths[0]
  layers = [conv(3, width, 3), nn.ReLU(inplace=True)]
  for block in space.layout:
    if block.position <= genotype.depths[block.stage]:
      a, b = genotype.widths[block.first : block.first + 2]
      layers.append(Block(width, a, b, block.stride))
      width = b
  return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, space.num_classes))


def search_network(space):
  """The shared weights and the logits; a call gives logits of a sampled network and its expected cost in millions."""
  import torch
  from torch import nn
  from torch.nn import functional as F

  def align(y, channels):
    return y if y.shape[1] == channels else F.adaptive_avg_pool3d(y, (channels, *y.shape[2:]))

  def add(a, b):
    a, b = (a, b) if a.shape[1] >= b.shape[1] else (b, a)
    out = a.clone()
    out[:, : b.shape[1]] += b
    return out

  class Mixed(nn.Module):
    def __init__(self, i, o, kernel, stride=1, halve=False):
      super().__init__()
      self.halve, self.inputs, self.stride = halve, i, stride
      self.conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False)
      self.choices = sorted({int(o * t / 10) for t in range(3, 11)})
      self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in self.choices)

    def forward(self, x, indices, weights, probabilities, expected):
      x = F.avg_pool2d(x, 2) if self.halve else x
      missing = self.inputs - x.shape[1]
      x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1) if missing else x
      y = self.conv(x)
      parts = [self.norms[j](y[:, : self.choices[j]]) for j in indices]
      widest = max(part.shape[1] for part in parts)
      mine = sum(p * c for p, c in zip(probabilities, self.choices, strict=True))
      cost = self.conv.kernel_size[0] ** 2 * y.shape[2] * y.shape[3] / 1e6 * expected * mine
      return sum(w * align(part, widest) for w, part in zip(weights, parts, strict=True)), mine, cost

  class Block(nn.Module):
    def __init__(self, i, o, stride):
      super().__init__()
      self.a, self.b = Mixed(i, o, 3, stride), Mixed(o, o, 3)
      self.shortcut = Mixed(i, o, 1, halve=stride == 2) if stride == 2 or i != o else None

    def forward(self, x, indices, weights, probabilities, expected):
      args = list(zip(indices, weights, probabilities, strict=True))
      h, inner, cost = self.a(x, *args[0], expected)
      h, out, more = self.b(F.relu(h), *args[1], inner)
      total = cost + more
      if self.shortcut is not None:
        x, _, more = self.shortcut(x, *args[1], expected)
        total = total + more
      return F.relu(add(x, h)), out, total

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      self.stem = Mixed(space.in_channels, space.widths[0], 3)
      self.blocks = nn.ModuleList(Block(b.widths[0], b.widths[-1], b.stride) for b in space.layout)
      self.classifier = nn.Linear(space.widths[-1], space.num_classes)
      self.widths = nn.Parameter(0.01 * torch.randn(space.table.shape))
      self.depths = nn.Parameter(0.01 * torch.randn(3, len(space.depths)))
      self.tau = 5.0

    def noisy(self, logits):
      noise = -torch.empty_like(logits).exponential_().log()
      return (logits.log_softmax(1) + noise) / self.tau

    def forward(self, x):
      scores = self.noisy(self.widths)
      with torch.no_grad():
        chosen = torch.multinomial(scores.softmax(1) + 1e-7, 2)
      weights, depths = scores.gather(1, chosen).softmax(1), self.noisy(self.depths).softmax(1)
      probabilities, at_least = self.widths.softmax(1), self.depths.softmax(1).flip(1).cumsum(1).flip(1)
      indices = chosen.tolist()
      x, expected, total = self.stem(x, indices[0], weights[0], probabilities[0], space.in_channels)
      x, ends = F.relu(x), []
      for block, made in zip(space.layout, self.blocks, strict=True):
        at = slice(block.first, block.first + 2)
        x, expected, cost = made(x, indices[at], weights[at], probabilities[at], expected)
        covers = sum(d < block.position for d in space.depths)
        total = total + at_least[block.stage, covers] * cost
        if block.position in space.depths:
          ends.append(x)
        if block.position == space.blocks:
          widest = max(e.shape[1] for e in ends)
          x, ends = sum(w * align(e, widest) for w, e in zip(depths[block.stage], ends, strict=True)), []
      h = x.mean((2, 3))
      logits = F.linear(h, self.classifier.weight[:, : h.shape[1]], self.classifier.bias)
      return logits, total + expected * space.num_classes / 1e6

    def found(self):
      from jaxlab.learning import transformable_search as tas

      widths = tuple(int(row[j]) for row, j in zip(space.table, self.widths.argmax(1).tolist(), strict=True))
      depths = tuple(space.depths[j] for j in self.depths.argmax(1).tolist())
      return tas.macs(space, tas.Genotype(widths, depths), connected=False) / 1e6

  return Network()


def cases():
  """Both steps in both precisions."""
  names = {
    "search": f"search of ResNet-{LAYERS}, step, 2 x {BATCH} images",
    "distillation": f"C10-R20 under ResNet-20, step, {BATCH} images",
  }
  made = []
  for dtype in ("float32", "bfloat16"):
    for what, name in names.items():
      sides = [functools.partial(side, what, dtype) for side in (ours, torch)]
      made.append(Case(f"{name}, {dtype}", sides[0], {"PyTorch": sides[1]}))
  return made
