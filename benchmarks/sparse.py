"""Propagation on a graph of 100,000 nodes and a million edges, and a full-batch GCN step on it."""

import functools

import numpy as np

from benchmarks.harness import Case

NODES, EDGES, CLASSES, HIDDEN = 100_000, 1_000_000, 10, 64


def _edges():
  rng = np.random.default_rng(0)
  return rng.integers(0, NODES, EDGES), rng.integers(0, NODES, EDGES)


def _operator():
  import scipy.sparse

  from jaxlab.graph import sparse

  senders, receivers = _edges()
  # Degrees of the sum over j of w_ij with w = 1 / sqrt(d_i d_j), self-loops added: what GCNConv caches.
  matrix = scipy.sparse.csr_array((np.ones(EDGES), (receivers, senders)), (NODES, NODES)) + scipy.sparse.eye_array(
    NODES
  )
  scale = scipy.sparse.diags_array(np.asarray(matrix.sum(1)) ** -0.5)
  return sparse.from_scipy(scale @ matrix @ scale)


def ours(width, what):
  """propagate."""
  import jax
  import jax.numpy as jnp

  from jaxlab.graph import sparse

  op, x = _operator(), jnp.asarray(np.random.default_rng(1).standard_normal((NODES, width)), "float32")

  def both(op, x):
    y, vjp = jax.vjp(lambda x: sparse.propagate(op, x), x)
    return y, vjp(x)

  run = jax.jit(sparse.propagate if what == "forward" else both)
  return lambda: jax.block_until_ready(run(op, x))


def torch(form, width, what):
  """GCNConv's propagation with cached weights, a CSR product, or index_add_."""
  import torch

  senders, receivers = (torch.from_numpy(e) for e in _edges())
  x = torch.randn(NODES, width, requires_grad=what != "forward")
  weights = torch.rand(EDGES)
  if form == "PyG GCNConv":
    from torch_geometric.nn import GCNConv

    layer = GCNConv(width, width, cached=True, bias=False)
    layer.lin = torch.nn.Identity()  # the map is a dense product, which is not what is compared
    edges = torch.stack([senders, receivers])
    forward = lambda: layer(x, edges)
  elif form == "torch CSR":
    order = torch.argsort(receivers, stable=True)
    starts = torch.searchsorted(receivers[order], torch.arange(NODES + 1))
    matrix = torch.sparse_csr_tensor(starts, senders[order], weights[order], (NODES, NODES))
    forward = lambda: matrix @ x
  else:
    forward = lambda: torch.zeros(NODES, width).index_add(0, receivers, x[senders] * weights[:, None])
  g = torch.randn(NODES, width)

  def run():
    with torch.set_grad_enabled(what != "forward"):
      y = forward()
    if what != "forward":
      torch.autograd.grad(y, x, g)

  return run


def our_gcn():
  """Full-batch training step of a 2-layer GCN."""
  import flax.linen as nn
  import jax
  import jax.numpy as jnp
  import optax

  from jaxlab.graph import layers

  class GCN(nn.Module):
    @nn.compact
    def __call__(self, op, x):
      return layers.GCNConv(CLASSES)(op, nn.relu(layers.GCNConv(HIDDEN)(op, x)))

  rng = np.random.default_rng(0)
  op, x = _operator(), jnp.asarray(rng.standard_normal((NODES, HIDDEN)), "float32")
  labels = jnp.asarray(rng.integers(0, CLASSES, NODES))
  model, tx = GCN(), optax.adam(1e-2)
  params = model.init(jax.random.key(0), op, x)
  state = [params, tx.init(params)]

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, opt, op, x, labels):
    def loss(params):
      return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, op, x), labels).mean()

    updates, opt = tx.update(jax.grad(loss)(params), opt)
    return optax.apply_updates(params, updates), opt

  def run():
    state[:] = step(*state, op, x, labels)
    jax.block_until_ready(state)

  return run


def torch_gcn():
  """The same with PyG."""
  import torch
  from torch_geometric.nn import GCNConv

  senders, receivers = (torch.from_numpy(e) for e in _edges())
  edges, x, labels = torch.stack([senders, receivers]), torch.randn(NODES, HIDDEN), torch.randint(CLASSES, (NODES,))
  first, second = GCNConv(HIDDEN, HIDDEN, cached=True), GCNConv(HIDDEN, CLASSES, cached=True)
  optimizer = torch.optim.Adam([*first.parameters(), *second.parameters()], lr=1e-2)

  def run():
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(second(torch.relu(first(x, edges)), edges), labels).backward()
    optimizer.step()

  return run


def cases():
  """propagate at 16, 64 and 256 wide, and the GCN step."""
  forms = ("PyG GCNConv", "torch CSR", "index_add")
  made = [
    Case(
      f"propagate 100k nodes, 1M edges, {width} wide, {what}",
      functools.partial(ours, width, what),
      {form: functools.partial(torch, form, width, what) for form in forms},
    )
    for width in (16, 64, 256)
    for what in ("forward", "forward and gradient")
  ]
  return [*made, Case("2-layer GCN, full-batch training step, same graph", our_gcn, {"PyG": torch_gcn})]
