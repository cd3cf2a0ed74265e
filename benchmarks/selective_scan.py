"""The selective scan, forward and gradient, beside PyTorch's two ways to compute it on CPU.

The peers store exp(delta A) and delta u B [B, L, C, N], as PyTorch code without a fused kernel does: "a loop" takes
one step after the other, the reference form of Mamba ports; "a parallel scan" combines pairs of steps recursively
(Blelloch's work-efficient scan) in an autograd function whose gradient is the same scan backwards.
"""

import functools

from benchmarks.harness import Case

BATCH, LENGTH, CHANNELS, STATES = 8, 1024, 192, 16


def _inputs(batch, length, channels, states):
  import numpy as np

  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype("float32")
  return {
    "u": normal(batch, length, channels),
    "delta": normal(batch, length, channels),
    "A": -np.tile(np.arange(1, states + 1, dtype="float32"), (channels, 1)),
    "B": normal(batch, length, states),
    "C": normal(batch, length, states),
    "D": np.ones(channels, "float32"),
    "z": normal(batch, length, channels),
    "delta_bias": np.log(np.expm1(np.exp(rng.uniform(np.log(1e-3), np.log(0.1), channels)))).astype("float32"),
  }


def ours(*sizes):
  """Value and gradients of all inputs."""
  import jax
  import jax.numpy as jnp

  from jaxlab.nn.selective_scan import selective_scan

  inputs = jax.tree.map(jnp.asarray, _inputs(*sizes))
  step = jax.jit(jax.value_and_grad(lambda inputs: (selective_scan(**inputs, delta_softplus=True) ** 2).sum()))
  return lambda: jax.block_until_ready(step(inputs))


def torch_parallel_scan():
  """The function (a, x) -> h with h_t = a_t h_{t-1} + x_t over axis 1, as an autograd function."""
  import torch

  def scan(a, x):
    if x.shape[1] == 1:
      return x
    pairs = x.shape[1] // 2
    even, odd = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    h = torch.empty_like(x)
    h[:, odd] = scan(a[:, odd] * a[:, even], torch.addcmul(x[:, odd], a[:, odd], x[:, even]))
    h[:, 0] = x[:, 0]
    h[:, 2::2] = torch.addcmul(x[:, 2::2], a[:, 2::2], h[:, 1 : x.shape[1] - 1 : 2])
    return h

  class Scan(torch.autograd.Function):
    @staticmethod
    def forward(context, a, x):
      h = scan(a, x)
      context.save_for_backward(a, h)
      return h

    @staticmethod
    def backward(context, gradient):
      a, h = context.saved_tensors
      following = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
      adjoint = scan(following.flip(1), gradient.flip(1)).flip(1)
      return torch.cat([torch.zeros_like(h[:, :1]), adjoint[:, 1:] * h[:, :-1]], 1), adjoint

  return Scan.apply


def torch_scan(parallel):
  """The scan as a PyTorch function of our arguments, softplus included."""
  import torch
  from torch.nn import functional as F

  def sequential(a, x):
    h, states = torch.zeros_like(x[:, 0]), []
    for a_t, x_t in zip(a.unbind(1), x.unbind(1), strict=True):  # indexing would cost a gradient of all steps for each
      h = a_t * h + x_t
      states.append(h)
    return torch.stack(states, 1)

  recurrence = torch_parallel_scan() if parallel else sequential

  def selective_scan(u, delta, A, B, C, D, z, delta_bias):
    delta = F.softplus(delta + delta_bias)[..., None]
    a, x = torch.exp(delta * A), delta * B[:, :, None] * u[..., None]
    return ((recurrence(a, x) @ C[..., None])[..., 0] + D * u) * F.silu(z)

  return selective_scan


def torch(parallel, *sizes):
  """Value and gradients in PyTorch."""
  import torch

  inputs = {name: torch.from_numpy(value).requires_grad_() for name, value in _inputs(*sizes).items()}
  selective_scan = torch_scan(parallel)

  def run():
    for value in inputs.values():
      value.grad = None
    (selective_scan(**inputs) ** 2).sum().backward()

  return run


def cases():
  """The size of the acceptance test, and one long sequence as of a packed graph."""
  made = []
  for name, sizes in {
    f"batch {BATCH}, {LENGTH} tokens, {CHANNELS} channels, {STATES} states": (BATCH, LENGTH, CHANNELS, STATES),
    "batch 1, 8192 tokens, 128 channels, 16 states": (1, 8192, 128, 16),
  }.items():
    peers = {"PyTorch, a loop": functools.partial(torch, False, *sizes)}
    peers["PyTorch, a parallel scan"] = functools.partial(torch, True, *sizes)
    made.append(Case(f"forward and gradient, {name}", functools.partial(ours, *sizes), peers))
  return made
