"""LIB beside the official algorithm in PyTorch: bases and edges, and the training step of the network they explain.

The PyTorch side does what the official code does, in float64: gradients of one output after the other for the whole
batch, all kept for one product at the end; then edges from gradients of every output in the new bases. What it finds is
what we find, to 1e-6. Graphs are of a smaller transformer than the paper's, which takes minutes there; training is of
the paper's, for addition modulo 113 with all of its 3,830 examples.
"""

import functools

from benchmarks.harness import Case

PRIME, SMALL, WIDTH, EXAMPLES = 113, 43, 64, 384
SIZES, IMAGES = (784, 100, 100, 10), 512


@functools.cache
def _problem(name):
  """Folded weights and activations, in NumPy."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from jaxlab.analysis import local_interaction_basis as lib
  from jaxlab.data import mnist5k

  rng = np.random.default_rng(0)
  if name == "transformer":
    tokens = lib.pairs(SMALL)[0]["tokens"][:EXAMPLES]
    params = lib.ModularAddition(SMALL, WIDTH).init(jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda a: 2 * np.asarray(a, "float64"), params)
    with jax.enable_x64(True):
      network, x = lib.modular_addition(params), lib.embed(params, tokens)
      return jax.tree.map(np.asarray, (network, x))
  pairs = zip(SIZES, SIZES[1:], strict=False)
  layers = [{"kernel": rng.standard_normal((i, o)) / i**0.5, "bias": 0.1 * rng.standard_normal(o)} for i, o in pairs]
  images = mnist5k.images().train["image"][:IMAGES].reshape(IMAGES, 1, -1).astype("float64")
  with jax.enable_x64(True):
    return jax.tree.map(np.asarray, (lib.mlp(layers), lib.with_one(jnp.asarray(images))))


def ours(name, **options):
  """interaction_graph."""
  from jaxlab.analysis import local_interaction_basis as lib

  network, x = _problem(name)
  return lambda: lib.interaction_graph(network, x, **options)


# -------------------------------------------------------------------------------------------- the algorithm in PyTorch


def _section(section):
  """A section as a function of [B, P, D] tensors."""
  import torch

  kind = type(section).__name__
  weights = {n: torch.tensor(a) for n, a in vars(section).items() if hasattr(a, "shape")}
  act = torch.relu if getattr(section, "activation", "") == "relu" else lambda a: a
  if kind == "Dense":
    return lambda x: act(x @ weights["kernel"])
  if kind == "Block":
    return lambda x: x + act(x @ weights["inner"]) @ weights["outer"]

  def attention(x):
    q, k, v = (torch.einsum("bpd,hdk->bhpk", x, weights[n]) for n in ("query", "key", "value"))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return (x + torch.einsum("bhpv,hvd->bpd", mixed, weights["out"]))[:, -1:]

  return attention


def _eigen(matrix):
  import torch

  values, vectors = torch.linalg.eigh(matrix)
  order = values.abs().argsort(descending=True)
  return values[order].abs(), vectors[:, order]


def _rows(outputs, inputs):
  """The gradient of every output, one at a time."""
  import torch

  for t in range(outputs.shape[1]):
    for i in range(outputs.shape[2]):
      yield t, i, torch.autograd.grad(outputs[:, t, i].sum(), inputs, retain_graph=True)[0]


def torch_graph(name, method="lib", threshold=1e-15):
  """Bases from the outputs backwards, then edges."""
  import torch

  network, x = _problem(name)
  network, x = [_section(s) for s in network], torch.tensor(x)

  def basis(acts, section, to):
    count = acts.shape[0] * acts.shape[1]
    mean = acts.mean((0, 1))
    centred = acts - torch.cat([mean[:-1], torch.zeros(1, dtype=mean.dtype)])
    values, vectors = _eigen(torch.einsum("bpi,bpj->ij", centred / count, centred))
    constant = ((vectors[-1].abs() > 1e-6) & (values > 1e-6)).nonzero()[0, 0]
    order = torch.cat([constant[None], torch.arange(len(values))[torch.arange(len(values)) != constant]])
    values, vectors = values[order], vectors[:, order]
    keep = values > threshold
    values, vectors = values[keep], vectors[:, keep]
    shift = torch.eye(len(mean), dtype=mean.dtype)
    unshift = shift.clone()
    shift[-1, :-1], unshift[-1, :-1] = -mean[:-1], mean[:-1]
    into, back = shift @ vectors, vectors.T @ unshift
    if method == "pca":
      return into, back
    whiten, color = into / values.sqrt(), values.sqrt()[:, None] * back
    acts = acts.clone().requires_grad_()
    outputs = section(acts) @ to
    jacobian = torch.stack([g for _, _, g in _rows(outputs, acts)])
    gram = torch.einsum("rbsj,rbsk->jk", jacobian, jacobian) / count
    inner = color @ gram @ color.T
    values, vectors = _eigen(inner[1:, 1:])
    turn = torch.block_diag(torch.ones(1, 1, dtype=vectors.dtype), vectors)
    values = torch.cat([inner[:1, 0], values])
    keep = values >= threshold
    scale = values[keep].sqrt()
    return whiten @ turn[:, keep] * scale, turn[:, keep].T @ color / scale[:, None]

  def edges(acts, section, pair, to):
    features = (acts @ pair[0]).requires_grad_()
    outputs = section(features @ pair[1]) @ to
    found = torch.zeros(*outputs.shape, features.shape[-1], dtype=features.dtype)
    for t, i, gradient in _rows(outputs, features):
      found[:, t, i] = (gradient * features).sum(1).detach()
    return (found**2 / (acts.shape[0] * acts.shape[1])).sum((0, 1))

  def run():
    layers = [x]
    with torch.no_grad():
      for section in network:
        layers.append(section(layers[-1]))
    identity = torch.eye(layers[-1].shape[-1], dtype=x.dtype)
    bases = [(identity, identity)]
    for section, acts in zip(network[::-1], layers[-2::-1], strict=True):
      bases.insert(0, basis(acts, section, bases[0][0]))
    pairs = zip(layers, network, bases, bases[1:], strict=False)
    return bases, [edges(acts, section, pair, to[0]) for acts, section, pair, to in pairs]

  return run


# ---------------------------------------------------------------------------------------------------- a training step


def our_step(dtype):
  """Of all 3,830 examples."""
  import jax
  import optax

  from jaxlab import train
  from jaxlab.analysis import local_interaction_basis as lib

  batch = jax.device_put(lib.pairs(PRIME)[0])
  model = lib.ModularAddition(PRIME, dtype=dtype)
  learner = train.supervised(
    model, train.cross_entropy(), optax.adamw(1e-3, 0.9, 0.98, weight_decay=1.0), inputs=lambda b: b["tokens"]
  )
  state = [jax.jit(learner.init)(jax.random.key(0), batch)]
  step = jax.jit(learner.step, donate_argnums=0)

  def run():
    state[0], _ = step(state[0], batch)
    jax.block_until_ready(state[0].params)

  return run


def torch_step(dtype):
  """As the official model: attention and residual at all positions, the perceptron at the last."""
  import torch
  from torch import nn

  from jaxlab.analysis import local_interaction_basis as lib

  data = lib.pairs(PRIME)[0]
  tokens, labels = torch.from_numpy(data["tokens"]).long(), torch.from_numpy(data["label"]).long()

  class Transformer(nn.Module):
    def __init__(self, width=128, heads=4, hidden=512):
      super().__init__()
      draw = lambda *shape: nn.Parameter(torch.randn(shape) * 0.8 / width**0.5)
      zero = lambda *shape: nn.Parameter(torch.zeros(shape))
      self.embed, self.position = draw(PRIME + 1, width), draw(3, width)
      self.q, self.k, self.v, self.o = (draw(heads, width, width // heads) for _ in range(4))
      self.bq, self.bk, self.bv = (zero(heads, 1, width // heads) for _ in range(3))
      self.bo, self.w1, self.b1, self.w2, self.b2 = (
        zero(width), draw(width, hidden), zero(hidden), draw(hidden, width), zero(width)
      )  # fmt: skip
      self.unembed, self.bias = draw(width, PRIME + 1), zero(PRIME + 1)

    def forward(self, tokens):
      x = self.embed[tokens] + self.position
      q, k, v = (x[:, None] @ w + b for w, b in ((self.q, self.bq), (self.k, self.bk), (self.v, self.bv)))
      scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
      mixed = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf).softmax(-1) @ v
      x = (x + torch.einsum("bhpk,hdk->bpd", mixed, self.o) + self.bo)[:, -1]
      x = x + torch.relu(x @ self.w1 + self.b1) @ self.w2 + self.b2
      return x @ self.unembed + self.bias

  model = Transformer()
  assert sum(p.numel() for p in model.parameters()) == 227_442
  optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.98), weight_decay=1.0)

  def run():
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
      loss = nn.functional.cross_entropy(model(tokens), labels)
    loss.backward()
    optimizer.step()

  return run


def cases():
  """Graphs in float64; training in both precisions."""
  part = functools.partial
  peer = "the official algorithm, PyTorch"
  names = {
    "mlp": "MLP 784-100-100-10, 512 images",
    "transformer": f"addition mod {SMALL}, {WIDTH} wide, {EXAMPLES} examples",
  }
  made = [Case(f"{title}, bases and edges", part(ours, n), {peer: part(torch_graph, n)}) for n, title in names.items()]
  pca = {"method": "pca"}
  made.append(Case(f"{names['mlp']}, PCA and edges", part(ours, "mlp", **pca), {peer: part(torch_graph, "mlp", **pca)}))
  made += [
    Case(f"addition mod {PRIME}, training step, {d}", part(our_step, d), {"PyTorch": part(torch_step, d)})
    for d in ("float32", "bfloat16")
  ]
  return made
