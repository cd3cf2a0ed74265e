"""Lip-CROWN beside the official algorithm in PyTorch, and beside auto_LiRPA itself where that is installed.

The PyTorch side does what the official code does: bounds of one output at a time, all rows of a layer in one product,
eagerly; nothing is traced again, as auto_LiRPA's engine does for each output. Both sides are in float32. All outputs of
a network are bounded around one image; as in branch and bound, 256 cases of one output are bounded together.
"""

import functools
import importlib.util

from benchmarks.harness import Case

RADIUS = 0.02
DENSE = {"MLP 784-128-128-10": (784, 128, 128, 10), "MLP 784-20-20-10": (784, 20, 20, 10)}
CONV = "CNN 8x8, 8 and 8 channels"


@functools.cache
def _network(name):
  """Kernels and biases in flax's layout, and an image."""
  import numpy as np

  rng = np.random.default_rng(0)
  draw = lambda *shape: (rng.standard_normal(shape) / np.prod(shape[:-1]) ** 0.5).astype("float32")
  if name == CONV:
    shapes = ((3, 3, 1, 8), (3, 3, 8, 8), (128, 10))
    return [(draw(*s), draw(s[-1])) for s in shapes], rng.uniform(size=(8, 8, 1)).astype("float32")
  sizes = DENSE[name]
  return [(draw(i, o), draw(o)) for i, o in zip(sizes, sizes[1:], strict=False)], rng.uniform(size=sizes[0]).astype(
    "float32"
  )


def _ours(name):
  import jax.numpy as jnp

  from jaxlab.analysis import local_lipschitz as ll

  layers, x = _network(name)
  layers = [(jnp.asarray(k), jnp.asarray(b)) for k, b in layers]
  net = tuple(ll.Dense(k, b) if k.ndim == 2 else ll.Conv(k, b, padding="VALID") for k, b in layers)
  return net, ll.box(x, RADIUS)


def ours(name, steps=0):
  """forward or optimize, and lipschitz."""
  import jax

  from jaxlab.analysis import local_lipschitz as ll

  @jax.jit
  def run(net, box):
    return ll.lipschitz(net, ll.optimize(net, box, steps=steps) if steps else ll.forward(net, box))

  net, box = _ours(name)
  return lambda: jax.block_until_ready(run(net, box))


# -------------------------------------------------------------------------------------------- the algorithm in PyTorch


def _torch_network(name):
  """As `_network`, in torch's layout."""
  import numpy as np

  layers, x = _network(name)
  if name == CONV:
    kernel, bias = layers[-1]
    layers[-1] = kernel.reshape(4, 4, 8, -1).transpose(2, 0, 1, 3).reshape(kernel.shape), bias
    x = x.transpose(2, 0, 1)
  layers = [(k.transpose(3, 2, 0, 1) if k.ndim == 4 else k.T, b) for k, b in layers]
  return [(np.ascontiguousarray(k), b) for k, b in layers], np.ascontiguousarray(x)


class _Torch:
  """Layers as torch has them, and the two passes over them; arrays are [batch, rows, ...] and [batch, ...]."""

  def __init__(self, name):
    import torch

    self.torch = torch
    layers, x = _torch_network(name)
    self.weights = [torch.from_numpy(k) for k, _ in layers]
    self.biases = [torch.from_numpy(b) for _, b in layers]
    x = torch.from_numpy(x)
    self.low, self.high = x - RADIUS, x + RADIUS
    self.shapes = [tuple(x.shape)]
    for k in range(len(layers)):
      self.shapes.append(tuple(self.push(k, torch.zeros(1, 1, *self.shapes[-1])).shape[2:]))

  def push(self, k, x):
    weight = self.weights[k]
    if weight.ndim == 2:
      return x.flatten(2) @ weight.T
    z = self.torch.nn.functional.conv2d(x.flatten(0, 1), weight)
    return z.reshape(*x.shape[:2], *z.shape[1:])

  def pull(self, k, z):
    weight, shape = self.weights[k], self.shapes[k]
    if weight.ndim == 2:
      return (z @ weight).reshape(*z.shape[:2], *shape)
    x = self.torch.nn.functional.conv_transpose2d(z.flatten(0, 1), weight)
    return x.reshape(*z.shape[:2], *shape)

  def bias(self, k):
    return self.biases[k].reshape(-1, *[1] * (len(self.shapes[k + 1]) - 1))

  def total(self, a):
    return a.flatten(2).sum(2)

  def chord(self, lower, upper):
    lower = lower.clamp(max=0)
    upper = self.torch.maximum(upper.clamp(min=0), lower + 1e-8)
    slope = upper / (upper - lower)
    return slope, -lower * slope

  def unit(self, k):
    size = 1
    for n in self.shapes[k]:
      size *= n
    return self.torch.eye(size).reshape(1, size, *self.shapes[k])

  def forward(self):
    found = [(self.low, self.high)]
    for k in range(len(self.weights)):
      sides = []
      for sign in (-1, 1):
        a, total = sign * self.unit(k + 1), 0
        for i in reversed(range(k + 1)):
          total = total + self.total(a * self.bias(i))
          a = self.pull(i, a)
          positive, negative = a.clamp(min=0), a.clamp(max=0)
          if i:
            slope, offset = self.chord(*found[i])
            total = total + self.total(positive * offset)
            a = positive * slope + negative * (slope > 0.5)
          else:
            total = total + self.total(positive * self.high + negative * self.low)
        sides.append(total.reshape(self.shapes[k + 1]))
      found.append((-sides[0], sides[1]))
    return found

  def upward(self, k, a, lines, top):
    total = 0
    for i in range(k + 1, len(self.weights)):
      upper_slope, upper_offset, lower_slope, lower_offset = lines[i]
      positive, negative = a.clamp(min=0), a.clamp(max=0)
      total = total + self.total(positive * upper_offset + negative * lower_offset)
      a = positive * upper_slope + negative * lower_slope
      if i < len(self.weights) - 1:
        a = self.push(i, a)
    return total + self.total(a * top)

  def norm(self, phases, top):
    """Of cases: phases [batch, ...] of every hidden layer, top [batch, 1, ...]."""
    torch, n = self.torch, len(self.weights)
    gradient, lines = (top, top), {}
    for k in reversed(range(n - 1)):
      phase = phases[k][:, None]
      above, below = self.chord(*gradient), self.chord(-gradient[1], -gradient[0])
      active, unknown = (phase > 0).float(), (phase == 0).float()
      lines[k + 1] = (active + unknown * above[0], unknown * above[1], active + unknown * below[0], -unknown * below[1])
      start = self.push(k, self.unit(k))
      upper, lower = (self.upward(k, sign * start, lines, top) for sign in (1, -1))
      batch = len(upper)
      gradient = (-lower.reshape(batch, 1, *self.shapes[k]), upper.reshape(batch, 1, *self.shapes[k]))
    lower = gradient[0].clamp(max=0)
    upper = torch.maximum(gradient[1].clamp(min=0), lower + 1e-8)
    slope = (upper + lower) / (upper - lower)
    offset = -lower - slope * lower
    return self.upward(0, self.push(0, slope), lines, top) + self.total(offset)

  def phases(self, found):
    return [((low > 0).float() - (high < 0).float())[None] for low, high in found[1:-1]]

  def top(self, output):
    return self.weights[-1][output].reshape(1, 1, *self.shapes[-2])


def torch_bounds(name):
  """Forward bounds, then one output at a time."""
  net = _Torch(name)

  def run():
    with net.torch.no_grad():
      phases = net.phases(net.forward())
      return [net.norm(phases, net.top(output)) for output in range(len(net.weights[-1]))]

  return run


def torch_cases(name, pairs=128):
  """The bounds alone of a batch of cases, without a queue around them."""
  net = _Torch(name)
  phases = [p.repeat(2 * pairs, *[1] * (p.ndim - 1)) for p in net.phases(net.forward())]
  top = net.top(0).repeat(2 * pairs, 1, *[1] * (len(net.shapes[-2])))

  def run():
    with net.torch.no_grad():
      return net.norm(phases, top)

  return run


def our_cases(name, pairs=128):
  """The same, compiled."""
  import jax
  import jax.numpy as jnp

  from jaxlab.analysis.local_lipschitz import forward, propagation, relaxation

  net, box = _ours(name)
  phases = [relaxation.phase(b) for b in jax.jit(forward)(net, box)[1:-1]]
  phases = [jnp.tile(p, (2 * pairs, *[1] * p.ndim)) for p in phases]
  row = jnp.eye(net[-1].kernel.shape[1])[0]
  run = jax.jit(
    lambda net, phases: jax.vmap(lambda p: propagation.gradients(net, p, row, shape=box.lower.shape).norm)(phases)
  )
  return lambda: jax.block_until_ready(run(net, phases))


def auto_lirpa(name, optimize=False):
  """compute_jacobian_bounds, one output at a time; models are built before."""
  import numpy as np
  import torch
  from auto_LiRPA import BoundedModule, BoundedTensor
  from auto_LiRPA.jacobian import GradNorm, JacobianOP
  from auto_LiRPA.perturbations import PerturbationLpNorm
  from torch import nn

  layers, x = _torch_network(name)
  parts: list[nn.Module] = []
  for weight, bias in layers:
    if weight.ndim == 4:
      part = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2])
    else:
      part = nn.Linear(weight.shape[1], weight.shape[0])
      if x.ndim == 3:
        parts.append(nn.Flatten())
    part.weight.data, part.bias.data = torch.from_numpy(weight), torch.from_numpy(bias)
    parts += [part, nn.ReLU()]
  net = nn.Sequential(*parts[:-1])
  outputs = len(layers[-1][1])

  class Norm(nn.Module):
    def __init__(self):
      super().__init__()
      self.net, self.norm = net, GradNorm(norm=1)

    def forward(self, x, mask):
      return self.norm(JacobianOP.apply(self.net(x).matmul(mask), x))

  centre = torch.from_numpy(x)[None]
  box = BoundedTensor(centre, PerturbationLpNorm(norm=np.inf, eps=RADIUS))
  masks = [torch.eye(outputs)[:, i : i + 1] for i in range(outputs)]
  models = [
    (BoundedModule(Norm(), (BoundedTensor(centre), mask), bound_opts={"conv_mode": "matrix"}), mask) for mask in masks
  ]
  return lambda: [
    model.compute_jacobian_bounds((box, mask), optimize=optimize, bound_lower=False) for model, mask in models
  ]


def cases():
  """Bounds of all outputs, dense and convolutional; with alpha; cases of branch and bound."""
  part = functools.partial
  installed = importlib.util.find_spec("auto_LiRPA") is not None
  engine = lambda name, **options: {"auto_LiRPA": part(auto_lirpa, name, **options)} if installed else {}
  peer = "the official algorithm, PyTorch"
  made = [
    Case(f"{name}, 10 outputs", part(ours, name), {peer: part(torch_bounds, name)} | engine(name))
    for name in (*DENSE, CONV)
  ]
  small = "MLP 784-20-20-10"
  made.append(
    Case(f"{small}, bounds of 256 cases", part(our_cases, small), {peer: part(torch_cases, small)})
  )  # fmt: skip
  if installed:
    made.append(Case(f"{small}, 20 steps of alpha", part(ours, small, steps=20), engine(small, optimize=True)))
  return made
