"""DAGNN's training step on Cora beside PyTorch Geometric, and ten seeds at once beside ten in a row.

Cora is read by `jaxlab.data.planetoid`. The peer is the same network from torch's and PyG's parts: dense features, two
linear layers with dropout, and GCN-normalised propagation by `LGConv`-like message passing with cached weights.
"""

import functools

from benchmarks.harness import Case

HOPS, HIDDEN, DROPOUT, SEEDS = 10, 64, 0.8, 10


def _task():
  from jaxlab import data
  from jaxlab.data import planetoid
  from jaxlab.graph import node_classification

  cora = data.row_normalize_features(planetoid.load("cora"))
  masks = [(cora.train_mask, cora.val_mask, cora.test_mask)]
  return cora, node_classification.task(cora.features, cora.senders, cora.receivers, cora.labels, masks)


def ours(seeds, together):
  """A step of Adam for one seed, or for several, vmapped or one after the other."""
  import jax
  import jax.numpy as jnp
  import optax

  from jaxlab.graph.nets import dagnn

  cora, task = _task()
  model = dagnn.cora()
  tx = optax.chain(optax.add_decayed_weights(0.005), optax.adam(0.01))
  labels, mask = jnp.asarray(cora.labels), jnp.asarray(cora.train_mask)

  def init(key):
    params = model.init(key, task.graph, task.operator)
    return params, tx.init(params), key

  def step(state, graph, operator):
    params, opt, key = state
    key, use = jax.random.split(key)

    def loss(params):
      logits = model.apply(params, graph, operator, train=True, rngs={"dropout": use})
      each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
      return (each * mask).sum() / mask.sum()

    updates, opt = tx.update(jax.grad(loss)(params), opt, params)
    return optax.apply_updates(params, updates), opt, key

  keys = jax.random.split(jax.random.key(0), seeds)
  if together:
    advance = jax.jit(jax.vmap(step, (0, None, None)), donate_argnums=0)
    states = [jax.vmap(init)(keys)]
  else:
    advance = jax.jit(step, donate_argnums=0)
    states = [init(key) for key in keys]

  def run():
    states[:] = [advance(state, task.graph, task.operator) for state in states]
    jax.block_until_ready(states)

  return run


def torch():
  """A step with PyG."""
  import numpy as np
  import torch
  from torch_geometric.nn import MessagePassing
  from torch_geometric.nn.conv.gcn_conv import gcn_norm

  class Propagation(MessagePassing):
    def forward(self, x, edges, weights):
      return self.propagate(edges, x=x, weights=weights)

    def message(self, x_j, weights):
      return weights[:, None] * x_j

  cora, _ = _task()
  x = torch.from_numpy(np.asarray(cora.features.toarray(), "float32"))
  edges = torch.from_numpy(np.stack([cora.senders, cora.receivers]).astype("int64"))
  edges, weights = gcn_norm(edges, num_nodes=x.shape[0])
  labels, mask = torch.from_numpy(cora.labels.astype("int64")), torch.from_numpy(cora.train_mask)
  hidden, classifier, gate = torch.nn.Linear(x.shape[1], HIDDEN), torch.nn.Linear(HIDDEN, 7), torch.nn.Linear(7, 1)
  propagation = Propagation()
  parameters = [p for layer in (hidden, classifier, gate) for p in layer.parameters()]
  optimizer = torch.optim.Adam(parameters, lr=0.01, weight_decay=0.005)
  drop = functools.partial(torch.nn.functional.dropout, p=DROPOUT)

  def run():
    optimizer.zero_grad()
    hops = [classifier(drop(torch.relu(hidden(drop(x)))))]
    for _ in range(HOPS):
      hops.append(propagation(hops[-1], edges, weights))
    stacked = torch.stack(hops, 1)
    logits = (torch.sigmoid(gate(stacked)) * stacked).sum(1)
    torch.nn.functional.cross_entropy(logits[mask], labels[mask]).backward()
    optimizer.step()

  return run


def cases():
  """One seed beside PyG; ten seeds vmapped beside ten in a row."""
  one_by_one = {f"jaxlab, {SEEDS} in a row": functools.partial(ours, SEEDS, False)}
  return [
    Case("training step on Cora", functools.partial(ours, 1, False), {"PyG": torch}),
    Case(f"training step of {SEEDS} seeds on Cora, vmapped", functools.partial(ours, SEEDS, True), one_by_one),
  ]
