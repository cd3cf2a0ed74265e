"""CIFAR ResNets trained module by module in PyTorch, a backward pass a module, for the benchmarks of local learning."""

from benchmarks import _sides


def parts():
  """Functions that make a basic block, the units of a ResNet-n, and a global mean with a dense layer."""
  from torch import nn

  class Block(nn.Module):
    def __init__(self, width, out, stride):
      super().__init__()
      self.body = nn.Sequential(
        nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
        nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
      )  # fmt: skip
      changes = stride != 1 or width != out
      self.shortcut = nn.Sequential()
      if changes:
        self.shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
      return (self.body(x) + self.shortcut(x)).relu()

  def units(layers):
    blocks = (layers - 2) // 6
    made, width = [nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))], 16
    for stage, out in enumerate((16, 32, 64)):
      for i in range(blocks):
        made.append(Block(width, out, 2 if stage and i == 0 else 1))
        width = out
    return made

  def classifier(width, *between):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *between, nn.Linear(width, 10))

  return Block, units, classifier


def examples(batch, torch_layout=False, seed=0):
  """Normal images and labels."""
  import numpy as np

  rng = np.random.default_rng(seed)
  image = rng.standard_normal((batch, 32, 32, 3)).astype("float32")
  return np.ascontiguousarray(image.transpose(0, 3, 1, 2)) if torch_layout else image, rng.integers(0, 10, batch)


def run(units, train_step, what, dtype, batch, head):
  """What the harness calls: a step of SGD, or inference; bfloat16 under autocast."""
  import torch

  image, label = (torch.from_numpy(a) for a in examples(batch, torch_layout=True))
  if what == "inference":
    net = torch.nn.Sequential(*units, head).to(memory_format=torch.channels_last)
    return _sides.torch_call(net, image.contiguous(memory_format=torch.channels_last), dtype=dtype)
  optimizer = torch.optim.SGD(train_step.parameters, 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)

  def step():
    optimizer.zero_grad()
    with _sides.autocast(dtype):
      train_step(image, label)
    optimizer.step()

  return step


def ours(learner, model, what, batch):
  """The same of a jaxlab learner."""
  import jax

  image, label = examples(batch)
  given = jax.device_put({"image": image, "label": label})
  if what == "inference":
    state = jax.jit(learner.init)(jax.random.key(0), given)
    variables = {"params": state.params, "batch_stats": state.collections["batch_stats"]}
    return _sides.jax_call(model.apply, variables, given["image"])
  return _sides.jax_step(learner, given)
