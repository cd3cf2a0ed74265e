"""Epochs of ForwardGNN's algorithms on Cora-ML beside the same algorithms from PyTorch Geometric's parts.

Four epochs a run, with a validation after every second one, on one split of Cora-ML (`jaxlab.data.citation_full`), GCN
of width 128. The peer does what the official scripts do: dense features, `GCNConv` on the graph with virtual nodes, its
normalisation computed in each pass as they leave it, and a forward pass of its own for each validation.
"""

import functools

from benchmarks.harness import Case

HIDDEN, EPOCHS, FOREVER = 128, 4, 10**8


def _dataset():
  from jaxlab import data
  from jaxlab.data import citation_full
  from jaxlab.graph.nets import forward_gnn

  cora = data.row_normalize_features(citation_full.cora_ml())
  return cora, forward_gnn.node_splits(cora.num_nodes)


def ours(name, depth=2, layer=0, splits=1):
  """Four epochs of an algorithm, or of one of the layers that it trains one by one."""
  import jax
  import jax.numpy as jnp

  from jaxlab.graph.nets import forward_gnn

  cora, masks = _dataset()
  recipe = forward_gnn.Recipe(epochs=FOREVER, patience=FOREVER, epochs_per_step=EPOCHS)
  links = name.startswith("link")
  if links:
    task = forward_gnn.link_task(cora.features, cora.senders, cora.receivers, range(splits))
  else:
    task = forward_gnn.node_task(cora.features, cora.senders, cora.receivers, cora.labels, masks[:splits])
  make = getattr(forward_gnn, name.replace("link_backprop", "backprop"))
  learner = make(forward_gnn.Net(None if links else 7, HIDDEN, depth), recipe).learner
  state = jax.jit(learner.init)(jax.random.key(0), task)
  if layer:
    hidden = jax.random.uniform(jax.random.key(1), state.run.hidden.shape)
    state = state._replace(layer=jnp.asarray(layer, "int32"), run=state.run._replace(hidden=hidden))
  step, states = jax.jit(learner.step, donate_argnums=0), [state]

  def run():
    states[0], _ = step(states[0], task)
    jax.block_until_ready(states[0])

  return run


def one_by_one(name, splits):
  """The splits of `ours`, each alone."""
  runs = [ours(name) for _ in range(splits)]
  return lambda: [run() for run in runs]


def _torch_graph():
  """Features, edges, labels and masks as tensors; and the graph with virtual nodes."""
  import numpy as np
  import torch

  cora, masks = _dataset()
  x = torch.from_numpy(np.asarray(cora.features.toarray(), "float32"))
  edges = torch.from_numpy(np.stack([cora.senders, cora.receivers]).astype("int64"))
  labels = torch.from_numpy(cora.labels.astype("int64"))
  train, validation = (torch.from_numpy(mask) for mask in masks[0][:2])
  nodes = train.nonzero()[:, 0]
  real, virtual = nodes, len(x) + labels[nodes]
  linked = torch.cat([edges, torch.stack([torch.cat([real, virtual]), torch.cat([virtual, real])])], 1)
  return x, edges, labels, train, validation, torch.cat([x, torch.randn(7, x.shape[1])]), linked


def _epochs(update, validate):
  """Four epochs, the scores of every second one."""

  def run():
    import torch

    for epoch in range(EPOCHS):
      update()
      if epoch % 2:
        with torch.no_grad():
          validate()

  return run


def _layer(width, out=HIDDEN):
  import torch
  from torch_geometric.nn import GCNConv

  conv = GCNConv(width, out)
  return conv, torch.optim.Adam(conv.parameters(), lr=1e-3, weight_decay=5e-4)


def _normal(x):
  return x / (x.norm(dim=1, keepdim=True) + 1e-8)


def torch_single_forward(layer=0):
  """SF's first or second layer."""
  import torch

  _, _, labels, train, validation, x, linked = _torch_graph()
  first, _ = _layer(x.shape[1])
  conv, optimizer = _layer(x.shape[1] if layer == 0 else HIDDEN)
  given = x if layer == 0 else torch.rand(len(x), HIDDEN)

  def forward(conv, h):
    return torch.relu(conv(_normal(h), linked))

  def update():
    z = forward(conv, given)
    loss = torch.nn.functional.cross_entropy((z[:-7] @ z[-7:].T)[train], labels[train])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

  def validate():  # all layers so far, as the official code
    h, total = x, 0
    for each in (first, conv)[1 - layer :]:
      h = forward(each, h)
      total = total + torch.softmax(h[:-7][validation] @ h[-7:].T, 1)
    return (total.argmax(1) == labels[validation]).float().mean().item()

  return _epochs(update, validate)


def torch_backprop():
  """Two layers end to end."""
  import torch
  from torch_geometric.nn import GCN

  x, edges, labels, train, validation, _, _ = _torch_graph()
  net = GCN(x.shape[1], HIDDEN, 2, 7)
  optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=5e-4)

  def update():
    loss = torch.nn.functional.cross_entropy(net(x, edges)[train], labels[train])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

  def validate():
    return (net(x, edges).argmax(1) == labels)[validation].float().mean().item()

  return _epochs(update, validate)


def torch_top_to_input():
  """Two layers, each with its own step; ten sweeps for a validation."""
  import torch

  _, _, labels, train, validation, x, linked = _torch_graph()
  top = torch.full((len(x), 7), 1 / 7)
  top[:-7][train] = torch.eye(7)[labels[train]]
  top[-7:] = torch.eye(7)
  layers = [_layer(x.shape[1] + HIDDEN), _layer(HIDDEN + 7)]
  states = [x, torch.rand(len(x), HIDDEN), torch.rand(len(x), HIDDEN), top]

  def forward(j, states):
    return torch.relu(layers[j][0](torch.cat([_normal(states[j]), _normal(states[j + 2])], 1), linked))

  def update():
    for j, (_, optimizer) in enumerate(layers):
      z = forward(j, states)
      loss = torch.nn.functional.cross_entropy((z[:-7] @ z[-7:].T)[train], labels[train])
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()
      states[j + 1] = z.detach()

  def validate():
    now, total = list(states), 0
    for sweep in range(10):
      for j in range(2):
        now[j + 1] = z = forward(j, now)
        if sweep >= 2:
          total = total + torch.softmax(z[:-7][validation] @ z[-7:].T, 1)
    return (total.argmax(1) == labels[validation]).float().mean().item()

  return _epochs(update, validate)


def torch_label_appending():
  """FF-LA's first layer: one positive and six negative inputs; seven more for a validation."""
  import torch

  x, edges, labels, train, validation, _, _ = _torch_graph()
  conv, optimizer = _layer(x.shape[1] + 7)

  def appended(classes, mask):
    label = torch.full((len(x), 7), 1 / 7)
    label[mask] = torch.eye(7)[classes[mask]]
    return _normal(torch.cat([x, label], 1))

  inputs = [appended((labels + shift) % 7, train) for shift in range(7)]
  asked = [appended(torch.where(validation, torch.full_like(labels, c), labels), train | validation) for c in range(7)]

  def update():
    goodness = [torch.relu(conv(h, edges))[train].square().sum(1) for h in inputs]
    positive = torch.nn.functional.softplus(2 - goodness[0]).mean()
    negative = torch.stack([torch.nn.functional.softplus(g - 2).mean() for g in goodness[1:]]).mean()
    optimizer.zero_grad()
    (positive + negative).backward()
    optimizer.step()

  def validate():
    goodness = torch.stack([torch.relu(conv(h, edges)).square().mean(1) for h in asked], 1)
    return (goodness.argmax(1) == labels)[validation].float().mean().item()

  return _epochs(update, validate)


def torch_link_forward():
  """FL-CE's first layer."""
  import numpy as np
  import torch
  from sklearn.metrics import roc_auc_score

  from jaxlab.graph.nets import forward_gnn

  x, edges, *_ = _torch_graph()
  cora, _ = _dataset()
  task = forward_gnn.link_task(cora.features, cora.senders, cora.receivers, [0])
  pairs = {}
  for name in ("train", "validation"):
    both = [np.asarray(part[0]) for part in getattr(task, name)]
    pairs[name] = torch.from_numpy(np.concatenate(both, 1).astype("int64"))
  keep = torch.from_numpy(np.asarray(task.messages[0]) > 0)
  seen = torch.from_numpy(np.stack([task.adjacency.columns, task.adjacency.rows]).astype("int64"))[:, keep]
  truth = {name: torch.arange(p.shape[1]) < p.shape[1] // 2 for name, p in pairs.items()}
  conv, optimizer = _layer(x.shape[1])
  given = _normal(x)

  def logits(name):
    z = torch.relu(conv(given, seen))
    return (z[pairs[name][0]] * z[pairs[name][1]]).sum(1)

  def update():
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits("train"), truth["train"].float())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

  def validate():
    return roc_auc_score(truth["validation"].numpy(), logits("validation").sigmoid().numpy())

  return _epochs(update, validate)


def cases():
  """Each algorithm; five splits at once."""
  call = functools.partial
  return [
    Case("SF, four epochs of layer 1 on Cora-ML", call(ours, "single_forward"), {"PyG": torch_single_forward}),
    Case(
      "SF, four epochs of layer 2 on Cora-ML",
      call(ours, "single_forward", layer=1),
      {"PyG": call(torch_single_forward, 1)},
    ),
    Case("BP, four epochs of 2 layers on Cora-ML", call(ours, "backprop"), {"PyG": torch_backprop}),
    Case(
      "SF-Top-To-Input, four epochs of 2 layers on Cora-ML", call(ours, "top_to_input"), {"PyG": torch_top_to_input}
    ),
    Case("FF-LA, four epochs of layer 1 on Cora-ML", call(ours, "label_appending"), {"PyG": torch_label_appending}),
    Case("FL-CE, four epochs of layer 1 on Cora-ML", call(ours, "link_forward"), {"PyG": torch_link_forward}),
    Case(
      "SF, four epochs of layer 1 of 5 splits on Cora-ML, vmapped",
      call(ours, "single_forward", splits=5),
      {"jaxlab, 5 in a row": call(one_by_one, "single_forward", 5)},
    ),
  ]
