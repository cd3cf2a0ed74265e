"""Graph Mamba's training step on a grid beside the same network in PyTorch and PyTorch Geometric.

The peer takes message passing from PyG, the blocks from torch's own operations and either form of the scan in
`benchmarks.selective_scan`; it reads the tokens that `jaxlab.graph.tokens` has drawn.
"""

import functools

from benchmarks.harness import Case

FEATURES, STATES = 32, 16


def _problem(side, length):
  """A grid with diagonals, as minesweeper's, with random features and classes; and its tokens, or None."""
  import numpy as np

  from jaxlab.graph import structure, tokens

  number = np.arange(side * side).reshape(side, side)
  pairs = [(number[:, 1:], number[:, :-1]), (number[1:], number[:-1])]
  pairs += [(number[1:, 1:], number[:-1, :-1]), (number[1:, :-1], number[:-1, 1:])]
  ends = [np.concatenate([pair[i].reshape(-1) for pair in pairs]) for i in (0, 1)]
  rng = np.random.default_rng(0)
  graph = structure.from_edges(*ends, num_nodes=side * side, undirected=True)
  graph = graph._replace(nodes=rng.standard_normal((side * side, 15)).astype("float32"))
  return graph, rng.integers(0, 2, side * side), tokens.sample(graph, length=length, walks=4) if length else None


def ours(side, length):
  """A step of Adam."""
  import jax
  import jax.numpy as jnp
  import optax

  from jaxlab.graph import sparse, tokens
  from jaxlab.graph.nets import graph_mamba

  graph, labels, drawn = _problem(side, length)
  inputs = jax.tree.map(
    jnp.asarray, (graph, None if drawn is None else tokens.subgraphs(drawn), sparse.operator(graph))
  )
  labels, net, tx = jnp.asarray(labels), graph_mamba.gmn(2, features=FEATURES), optax.adam(1e-3)

  def step(state, inputs):
    params, statistics, opt, key = state
    key, use = jax.random.split(key)

    def loss(params):
      variables = {"params": params, "batch_stats": statistics}
      logits, new = net.apply(variables, *inputs, train=True, rngs={"dropout": use}, mutable=["batch_stats"])
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new["batch_stats"]

    gradient, statistics = jax.grad(loss, has_aux=True)(params)
    updates, opt = tx.update(gradient, opt, params)
    return optax.apply_updates(params, updates), statistics, opt, key

  variables = jax.jit(net.init)(jax.random.key(0), *inputs)
  state = [(variables["params"], variables["batch_stats"], tx.init(variables["params"]), jax.random.key(1))]
  advance = jax.jit(step, donate_argnums=0)

  def run():
    state[0] = advance(state[0], inputs)
    jax.block_until_ready(state)

  return run


def peer(parallel, side, length):
  """A step with PyG."""
  import numpy as np
  import torch
  from torch import nn
  from torch.nn import functional as F
  from torch_geometric.nn import MessagePassing

  from benchmarks.selective_scan import torch_scan

  graph, labels, drawn = _problem(side, length)
  long_scan, short_scan = torch_scan(parallel), torch_scan(False)  # a loop is the faster one for three tokens

  class Gated(MessagePassing):
    def __init__(self):
      super().__init__(aggr="add")
      self.root, self.receiver = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
      self.gate, self.value = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
      self.norm = nn.BatchNorm1d(FEATURES)

    def forward(self, x, edges):
      sums = self.propagate(edges, p=self.receiver(x), q=self.gate(x), m=self.value(x))
      above, below = sums.chunk(2, -1)
      return x + torch.relu(self.norm(self.root(x) + above / (below + 1e-6)))

    def message(self, p_i, q_j, m_j):
      weight = torch.sigmoid(p_i + q_j)
      return torch.cat([weight * m_j, weight], -1)

  class Mixer(nn.Module):
    def __init__(self, scan):
      super().__init__()
      inner, self.rank, self.scan = 2 * FEATURES, -(-FEATURES // 16), scan
      self.into = nn.Linear(FEATURES, 2 * inner, bias=False)
      self.conv = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
      self.x_proj = nn.Linear(inner, self.rank + 2 * STATES, bias=False)
      self.dt = nn.Linear(self.rank, inner)
      self.A_log = nn.Parameter(torch.log(torch.arange(1.0, STATES + 1)).repeat(inner, 1))
      self.D, self.out = nn.Parameter(torch.ones(inner)), nn.Linear(inner, FEATURES, bias=False)

    def forward(self, x):
      hidden, z = self.into(x).chunk(2, -1)
      hidden = F.silu(self.conv(hidden.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
      delta, B, C = self.x_proj(hidden).split([self.rank, STATES, STATES], -1)
      y = self.scan(hidden, delta @ self.dt.weight.T, -torch.exp(self.A_log), B, C, self.D, z, self.dt.bias)
      return self.out(y)

  class Block(nn.Module):
    def __init__(self, scan):
      super().__init__()
      self.norm, self.out = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, FEATURES, bias=False)
      self.ahead, self.back = Mixer(scan), Mixer(scan)

    def forward(self, x):
      normed = self.norm(x)
      return x + self.out(self.ahead(normed) + self.back(normed.flip(1)).flip(1))

  class Net(nn.Module):
    def __init__(self):
      super().__init__()
      self.encoder, self.head = nn.Linear(15, FEATURES), nn.Linear(FEATURES, 2)
      self.norm, self.block, self.mpnn = nn.LayerNorm(FEATURES), Block(long_scan), Gated()
      if drawn is not None:
        self.mark, self.phi = nn.Parameter(torch.randn(FEATURES)), Gated()
        self.token, self.token_block = nn.Linear(2 * FEATURES, FEATURES), Block(short_scan)

    def forward(self, x):
      x = y = self.encoder(x)
      if drawn is not None:
        h = self.phi(x[members] + own[:, None] * self.mark, union)
        total = torch.zeros(len(first), FEATURES).index_add(0, which, h)
        phi = self.token(torch.cat([total / counts[:, None], h[first]], -1))
        y = self.token_block(phi.reshape(len(x), -1, FEATURES))[:, -1]
      order = torch.argsort(degree + torch.rand(len(degree)))
      mixed = torch.empty_like(y)
      mixed[order] = self.block(y[order][None])[0]
      return self.head(self.norm(mixed + self.mpnn(x, edges)))

  tensor = lambda a: torch.from_numpy(np.asarray(a, "int64"))
  x, edges, labels = torch.from_numpy(graph.nodes), tensor([graph.senders, graph.receivers]), tensor(labels)
  degree = torch.bincount(edges[1], minlength=len(x)).float()
  if drawn is not None:
    members, union = tensor(drawn.members), tensor([drawn.senders, drawn.receivers])
    sizes = drawn.counts.reshape(-1)
    which, first = tensor(np.repeat(np.arange(len(sizes)), sizes)), tensor(np.cumsum(sizes) - sizes)
    own = torch.zeros(len(members)).index_fill(0, first, 1.0)
    counts = torch.from_numpy(sizes.astype("float32"))
  net = Net()
  optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

  def run():
    optimizer.zero_grad()
    F.cross_entropy(net(x), labels).backward()
    optimizer.step()

  return run


def cases():
  """Node tokens alone, and with subgraph tokens of walks of two steps."""
  made = []
  for name, length in (("m = 0", 0), ("m = 2", 2)):
    peers = {"PyG, a parallel scan": functools.partial(peer, True, 64, length)}
    peers["PyG, a loop"] = functools.partial(peer, False, 64, length)
    made.append(Case(f"training step, grid of 4096 nodes, {name}", functools.partial(ours, 64, length), peers))
  return made
