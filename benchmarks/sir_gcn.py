"""SIR-GCN's training step beside the same network written with PyTorch Geometric's `MessagePassing`.

The graph is random with the size of minesweeper: 10,000 nodes, 39,402 undirected edges. Networks are the demo's (three
blocks of 64, GELU, sym) and the published one (five of 256); single convolutions are measured by value and gradient.
"""

import functools

from benchmarks.harness import Case

NODES, EDGES, FEATURES = 10_000, 39_402, 7


def _edges():
  from jaxlab.data import synthetic

  return synthetic.erdos_renyi(NODES, EDGES)


def network(hidden, depth):
  """A step of AdamW on the whole graph."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from jaxlab.graph import sparse, structure
  from jaxlab.graph.nets import sir_gcn

  rng = np.random.default_rng(0)
  x, labels = rng.normal(size=(NODES, FEATURES)).astype("float32"), jnp.asarray(rng.integers(0, 2, NODES))
  graph = structure.from_edges(*_edges(), num_nodes=NODES, nodes=x)
  graph, operator = jax.device_put((graph, sparse.operator(graph)))
  net, tx = sir_gcn.minesweeper(hidden=hidden, depth=depth), optax.adamw(1e-3)
  variables = jax.jit(net.init)(jax.random.key(0), graph, operator)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, graph, operator, labels):
    params, statistics, moments, key = state
    key, dropout = jax.random.split(key)

    def loss(params):
      logits, updated = net.apply(
        {"params": params, "batch_stats": statistics}, graph, operator, train=True, rngs={"dropout": dropout},
        mutable=["batch_stats"],
      )  # fmt: skip
      return optax.losses.sigmoid_binary_cross_entropy(logits[:, 0], labels).mean(), updated["batch_stats"]

    grads, statistics = jax.grad(loss, has_aux=True)(params)
    updates, moments = tx.update(grads, moments, params)
    return optax.apply_updates(params, updates), statistics, moments, key

  state = [(variables["params"], variables["batch_stats"], tx.init(variables["params"]), jax.random.key(1))]

  def run():
    state[0] = step(state[0], graph, operator, labels)
    jax.block_until_ready(state[0])

  return run


def convolution(hidden, activation, aggregation):
  """Value of a convolution and the gradients of weights and features."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from jaxlab.graph import sparse, structure
  from jaxlab.graph.nets import sir_gcn

  x = jnp.asarray(np.random.default_rng(0).normal(size=(NODES, hidden)), "float32")
  operator = jax.device_put(sparse.operator(structure.from_edges(*_edges(), num_nodes=NODES, nodes=np.asarray(x))))
  conv = sir_gcn.SIRConv(hidden, hidden, activation, aggregation)
  variables = conv.init(jax.random.key(0), operator, x)
  function = jax.jit(jax.grad(lambda v, x, op: (conv.apply(v, op, x) ** 2).sum(), (0, 1)))

  def run():
    jax.block_until_ready(function(variables, x, operator))

  return run


def _layer(hidden, activation, aggregation, dropout=0.0):
  """The convolution in PyTorch Geometric."""
  from torch import nn
  from torch_geometric.nn import MessagePassing
  from torch_geometric.utils import degree

  class Layer(MessagePassing):
    def __init__(self):
      super().__init__(aggr="add" if aggregation == "sym" else aggregation)
      self.query, self.key = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden, bias=False)
      self.relation, self.drop = nn.Linear(hidden, hidden), nn.Dropout(dropout)

    def forward(self, x, edges):
      q, k, n = self.drop(self.query(x)), self.drop(self.key(x)), x.shape[0]
      scale = [degree(edges[i], n).clamp(min=1).pow(-0.5)[:, None] for i in (0, 1)] if aggregation == "sym" else None
      if scale is None:
        y = self.propagate(edges, q=q, k=k, weight=None)
      else:
        y = scale[1] * self.propagate(edges, q=q, k=k, weight=scale[0])
      return y if aggregation == "max" else self.relation(y)

    def message(self, q_i, k_j, weight_j):
      m = activation(q_i + k_j)
      m = self.relation(m) if aggregation == "max" else m
      return m if weight_j is None else weight_j * m

  return Layer()


def _torch_edges():
  import numpy as np
  import torch

  return torch.from_numpy(np.stack(_edges()).astype("int64"))


def torch_network(hidden, depth):
  """The step with PyG."""
  import torch
  from torch import nn

  class Net(nn.Module):
    def __init__(self):
      super().__init__()
      self.first, self.last = nn.Linear(FEATURES, hidden), nn.Linear(hidden, 1)
      self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(depth + 1))
      self.convs = nn.ModuleList(_layer(hidden, nn.functional.gelu, "sym", 0.2) for _ in range(depth))
      self.linears = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth))
      self.drop, self.act = nn.Dropout(0.2), nn.GELU()

    def forward(self, x, edges):
      x = self.act(self.drop(self.first(x)))
      for norm, conv, linear in zip(self.norms, self.convs, self.linears, strict=False):
        x = x + self.drop(linear(self.act(self.drop(conv(norm(x), edges)))))
      return self.last(self.norms[-1](x))[:, 0]

  net, edges = Net(), _torch_edges()
  x, labels = torch.randn(NODES, FEATURES), torch.randint(0, 2, (NODES,)).float()
  optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0)

  def run():
    optimizer.zero_grad()
    nn.functional.binary_cross_entropy_with_logits(net(x, edges), labels).backward()
    optimizer.step()

  return run


def torch_convolution(hidden, activation, aggregation):
  """Value and gradients with PyG."""
  import torch
  from torch import nn

  functions = {"relu": nn.functional.relu, "gelu": nn.functional.gelu}
  functions["leaky_relu"] = lambda z: nn.functional.leaky_relu(z, 0.2)
  layer, edges = _layer(hidden, functions[activation], aggregation), _torch_edges()
  x = torch.randn(NODES, hidden, requires_grad=True)

  def run():
    layer.zero_grad()
    x.grad = None
    (layer(x, edges) ** 2).sum().backward()

  return run


def cases():
  """Two networks, then convolutions by aggregation and activation."""
  partial, made = functools.partial, []
  for name, hidden, depth in (("3 blocks of 64", 64, 3), ("5 blocks of 256, as published", 256, 5)):
    peers = {"PyG": partial(torch_network, hidden, depth)}
    made.append(Case(f"training step, {name}", partial(network, hidden, depth), peers))
  for setting in ((64, "relu", "sum"), (95, "leaky_relu", "sym"), (64, "relu", "max")):
    name = "SIRConv of width {}, {}, {}, value and gradient".format(*setting)
    made.append(Case(name, partial(convolution, *setting), {"PyG": partial(torch_convolution, *setting)}))
  return made
