"""FedZip's compression beside the official algorithm in PyTorch, and its bit streams beside DEFLATE.

Compression: ten clients' updates of the official network (1,199,882 weights) are pruned by 80 % and take three values.
The peer is the official algorithm, tensor by tensor: the threshold by `topk`, distances to all centroids, masks.
Streams: the symbols of one tensor of a million entries, encoded by the shortest of three methods; the peer is zlib.
"""

import functools
import zlib

import numpy as np

from benchmarks.harness import Case

SHAPES = {
  "conv0": ((3, 3, 1, 32), (32,)), "conv1": ((3, 3, 32, 64), (64,)), "dense0": ((9216, 128), (128,)),
  "dense1": ((128, 10), (10,)),
}  # fmt: skip


def _updates(clients):
  rng = np.random.default_rng(0)
  make = lambda shape: rng.standard_normal((clients, *shape)).astype("float32")
  return {name: {"kernel": make(kernel), "bias": make(bias)} for name, (kernel, bias) in SHAPES.items()}


def ours(clients, sizes):
  """All clients in one computation; with the count of bits or without."""
  import jax

  from jaxlab.decentral import fedzip

  updates, key = jax.device_put(_updates(clients)), jax.random.key(0)
  if sizes:
    code = jax.jit(jax.vmap(lambda u: fedzip.codec(0.8).code(u, key)))
  else:
    code = jax.jit(jax.vmap(lambda u: fedzip.restore(fedzip.compress(u), u)))
  return lambda: jax.block_until_ready(code(updates))


def _torch_compress(x, prune):
  import torch

  flat = x.reshape(-1)
  if prune:
    keep = flat.numel() - round(0.8 * flat.numel())
    flat = flat * (flat.abs() >= flat.abs().topk(keep).values.min())
  centroids = torch.linspace(flat.min(), flat.max(), 3)
  for _ in range(4):
    symbols = (flat[:, None] - centroids).abs().argmin(1)
    new = []
    for k in range(3):
      inside = symbols == k
      members = flat * inside
      count = inside.sum() if k == 1 else members.count_nonzero()
      new.append(members.sum() / count.clamp(min=1))
    centroids = torch.stack(new)
  return centroids[symbols].reshape(x.shape)


def torch_loop(clients):
  """The official algorithm, tensor after tensor."""
  import torch

  updates = _updates(clients)
  tensors = [
    (torch.from_numpy(part[i]), name) for p in updates.values() for name, part in p.items() for i in range(clients)
  ]

  def run():
    with torch.no_grad():
      for x, name in tensors:
        _torch_compress(x, name != "bias")

  return run


def _symbols():
  rng = np.random.default_rng(0)
  return rng.choice(3, 10**6, p=[0.05, 0.9, 0.05]).astype("int8")


def stream(back=False):
  """Writes a tensor's stream, or reads it."""
  from jaxlab.decentral import fedzip

  message = fedzip.Quantized(_symbols(), np.array([-1.0, 0.0, 1.0], "float32"))
  written = fedzip.encode(message, "gap")
  return (lambda: fedzip.decode(written, 10**6)) if back else (lambda: fedzip.encode(message, "gap"))


def deflate(back=False):
  """The same by zlib at its default level."""
  raw = _symbols().tobytes()
  written = zlib.compress(raw)
  return (lambda: zlib.decompress(written)) if back else (lambda: zlib.compress(raw))


def cases():
  """Compression on the device, streams on the host."""
  loop = {"PyTorch, official algorithm": functools.partial(torch_loop, 10)}
  return [
    Case("compress 10 updates of 1.2M weights", functools.partial(ours, 10, False), loop),
    Case("same, and count the bits of three codes", functools.partial(ours, 10, True), loop),
    Case("write the gaps of 1M symbols", stream, {"zlib": deflate}),
    Case("read them", functools.partial(stream, True), {"zlib": functools.partial(deflate, True)}),
  ]
