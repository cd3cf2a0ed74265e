"""NCN's and NCNC's training step on Cora, and batches of common neighbours, beside the official algorithm in PyTorch.

The peer does what the official code does with `torch_sparse`, in torch's own operations: rows of the adjacency are
gathered for both ends of every pair, each entry becomes the number row * 2^32 + column, one list is looked up in the
other by `searchsorted`, and what is found (or not) is a sparse matrix that multiplies node embeddings; its gradient
multiplies by the sorted transpose. Target edges are taken out by building the adjacency anew, sorted, for each batch.
Both sides prepare the batch (new edges, new negatives) inside the step.
"""

import functools

from benchmarks.harness import Case

# A graph and batch of ogbl-collab's degree: 235,868 nodes there.
NODES, EDGES, PAIRS, WIDTH = 50_000, 500_000, 65_536, 64


def _cora():
  import numpy as np

  from jaxlab.data import planetoid
  from jaxlab.graph import evaluation

  cora = planetoid.load("cora")
  split = evaluation.planetoid_link_split(np.stack([cora.senders, cora.receivers]), cora.num_nodes, 0)
  return cora, split


def _large():
  """A power-law graph [2, E], and pairs of which half are edges."""
  import numpy as np

  rng = np.random.default_rng(0)
  weight = np.cumsum(rng.pareto(2.0, NODES) + 1)
  ends = np.searchsorted(weight, rng.random((2, EDGES)) * weight[-1])
  ends = np.unique(np.sort(ends[:, ends[0] != ends[1]], axis=0), axis=1)
  pairs = np.concatenate(
    [ends[:, rng.choice(ends.shape[1], PAIRS // 2, replace=False)], rng.integers(0, NODES, (2, PAIRS // 2))], axis=1
  )
  return ends, pairs, rng.standard_normal((NODES, WIDTH)).astype("float32")


# ---------------------------------------------------------------------------------------------------------- our side


def step(variant):
  """A batch made and learned from."""
  import jax

  from jaxlab.graph import link_prediction
  from jaxlab.graph.links import neural_common_neighbor as ncn

  cora, split = _cora()
  task, recipe = link_prediction.task(cora.features, cora.num_nodes, split), ncn.RECIPES["cora"]
  model = ncn.cora(variant)
  batches = link_prediction.Batches(
    task, batch_size=recipe.batch_size, seed=0, needs=model.head.needs, edge_dropout=recipe.edge_dropout
  )
  learner = link_prediction.learner(model, encoder_rate=recipe.encoder_rate, head_rate=recipe.head_rate)
  advance = jax.jit(learner.step, donate_argnums=0)
  state, count = jax.jit(learner.init)(jax.random.key(0), batches(0)), 0

  def run():
    nonlocal state, count
    state, metrics = advance(state, batches(count))
    count += 1
    jax.block_until_ready((state, metrics))

  return run


def pooled(exclusive):
  """Sets of new pairs listed, and embeddings summed over the common ones (and the others)."""
  import jax
  import numpy as np

  from jaxlab.graph import common_neighbors, sparse

  edges, ends, x = _large()
  adjacency, x = common_neighbors.adjacency(edges, NODES), jax.numpy.asarray(x)
  sizes = common_neighbors.sizes(common_neighbors.pairs(adjacency, ends, exclusive=exclusive))

  @jax.jit
  def pool(made, x):
    return [sparse.propagate(op, x) for op in (made.common, made.exclusive) if op is not None]

  rng = np.random.default_rng(0)

  def run():
    shuffled = ends[:, rng.permutation(PAIRS)]
    jax.block_until_ready(pool(common_neighbors.pairs(adjacency, shuffled, exclusive=exclusive, at_least=sizes), x))

  return run


# --------------------------------------------------------------------------------------------------------- their side


class _Sparse:
  """Row-sorted sparse matrix of ones or values, as `torch_sparse.SparseTensor` stores it."""

  def __init__(self, row, column, shape, value=None, starts=None):
    self.row, self.column, self.shape, self.value, self._starts = row, column, shape, value, starts

  @property
  def starts(self):
    import torch

    if self._starts is None:
      counts = torch.bincount(self.row, minlength=self.shape[0])
      self._starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return self._starts

  def rows(self, index):
    """Some rows, as `adj[index]`."""
    import torch

    first, count = self.starts[index], self.starts[index + 1] - self.starts[index]
    row = torch.repeat_interleave(torch.arange(len(index)), count)
    offset = torch.arange(len(row)) - torch.repeat_interleave(count.cumsum(0) - count, count)
    return _Sparse(row, self.column[first[row] + offset], (len(index), self.shape[1]))

  def masked(self, keep):
    return _Sparse(self.row[keep], self.column[keep], self.shape)

  def csr(self):
    import torch

    value = torch.ones(len(self.row)) if self.value is None else self.value
    return torch.sparse_csr_tensor(self.starts, self.column, value, self.shape, check_invariants=False)

  def transposed(self):
    import torch

    order = torch.argsort(self.column, stable=True)
    return _Sparse(
      self.column[order], self.row[order], self.shape[::-1], None if self.value is None else self.value[order]
    )


@functools.cache
def _product():
  import torch

  class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, matrix):
      ctx.matrix = matrix
      return matrix.csr() @ x

    @staticmethod
    def backward(ctx, g):
      return ctx.matrix.transposed().csr() @ g.contiguous(), None

  return lambda matrix, x: Product.apply(x, matrix)


def _symmetric(edges, num_nodes):
  import torch

  both = torch.cat([edges, edges.flip(0)], 1)
  code = torch.sort(both[0] * num_nodes + both[1])[0]
  return _Sparse(code // num_nodes, code % num_nodes, (num_nodes, num_nodes))


def _overlap(adjacency, pairs, others):
  """Common entries, and with `others` those of one side alone."""
  import torch

  left, right = adjacency.rows(pairs[0]), adjacency.rows(pairs[1])
  a, b = (m.row * 2**32 + m.column for m in (left, right))
  if not others and len(b) > len(a):
    a, b = b, a
  at = torch.searchsorted(a[:-1], b)
  found = a[at] == b
  matrix = lambda code: _Sparse(code >> 32, code & (2**32 - 1), left.shape)
  if not others:
    return matrix(b[found])
  alone = torch.ones(len(a), dtype=torch.bool)
  alone[at[found]] = False
  return matrix(b[found]), matrix(a[alone]), matrix(b[~found])


def torch_step(completes):
  """The official step: Cora's settings of `IncompleteCN1Predictor` or `CNLinkPredictor`."""
  import numpy as np
  import torch
  from torch import nn

  from jaxlab.graph import evaluation

  cora, split = _cora()
  torch.manual_seed(0)
  n, h, batch, p = cora.num_nodes, 256, 1152, 0.05
  x = torch.from_numpy(np.asarray(cora.features.toarray(), "float32"))
  train, product = torch.from_numpy(split.train.astype("int64")), _product()
  embed = nn.Sequential(nn.Dropout(0.7), nn.Linear(x.shape[1], h), nn.Dropout(p))
  jumping = nn.Parameter(torch.randn(1))

  def long():
    return nn.Sequential(
      nn.Linear(h, h), nn.Dropout(p), nn.ReLU(), nn.Linear(h, h), nn.LayerNorm(h), nn.Dropout(p), nn.ReLU()
    )

  def short():
    return nn.Sequential(nn.Linear(h, h), nn.LayerNorm(h), nn.Dropout(p), nn.ReLU())

  node, common, of_product, score = long(), long(), short(), nn.Sequential(short(), nn.Linear(h, 1))
  beta = nn.Parameter(torch.ones(1))
  head = [q for block in (node, common, of_product, score) for q in block.parameters()]
  groups = [{"params": [*embed.parameters(), jumping], "lr": 0.0043}, {"params": [*head, beta], "lr": 0.0024}]
  optimizer = torch.optim.Adam(groups)

  def encode(adjacency):
    z = embed(x)
    norm = torch.rsqrt(1 + torch.diff(adjacency.starts).float())[:, None]
    z = norm * z
    z = norm * (product(adjacency, z) + z)
    return jumping * nn.functional.dropout(z, 0.3)

  def drop(adjacency):
    return adjacency.masked(torch.rand(len(adjacency.row)) > 0.4)

  def logits(z, adjacency, pairs, depth):
    adjacency = drop(adjacency)
    z_ij = z[pairs[0]] * z[pairs[1]]
    z = z + node(z)
    if depth:
      overlap, left, right = _overlap(adjacency, pairs, True)
      s = product(overlap, z)
      with torch.no_grad():
        for side, end in ((left, pairs[1]), (right, pairs[0])):
          r = logits(z, adjacency, torch.stack([end[side.row], side.column]), depth - 1)
          g = torch.sigmoid(4.3 * (r - 2.8))
          side.value = 0.75 * g / (0.75 * g + 1 - g)
      s = s + product(left, z) + product(right, z)
    else:
      s = product(_overlap(adjacency, pairs, False), z)
    return score(beta * common(s) + of_product(z_ij))[:, 0]

  state = {"order": None, "i": 0, "epoch": 0}

  def run():
    if state["order"] is None or (state["i"] + 1) * batch > train.shape[1]:
      state.update(order=torch.randperm(train.shape[1]), i=0, epoch=state["epoch"] + 1)
      negative = evaluation.negative_edges(split.train, n, train.shape[1], state["epoch"])
      state["negative"] = torch.from_numpy(negative.astype("int64"))
    chosen = state["order"][state["i"] * batch : (state["i"] + 1) * batch]
    state["i"] += 1
    keep = torch.ones(train.shape[1], dtype=torch.bool)
    keep[chosen] = False
    optimizer.zero_grad()
    adjacency = _symmetric(train[:, keep], n)
    z = encode(adjacency)
    loss = nn.functional.softplus(-logits(z, adjacency, train[:, chosen], completes)).mean()
    loss = loss + nn.functional.softplus(logits(z, adjacency, state["negative"][:, chosen], completes)).mean()
    loss.backward()
    optimizer.step()

  return run


def torch_pooled(exclusive):
  """`adjoverlap` and `spmm_add`."""
  import torch

  edges, ends, x = _large()
  adjacency = _symmetric(torch.from_numpy(edges), NODES)
  ends, x, product = torch.from_numpy(ends), torch.from_numpy(x), _product()

  def run():
    found = _overlap(adjacency, ends[:, torch.randperm(PAIRS)], exclusive)
    if not exclusive:
      return product(found, x)
    return product(found[0], x), product(found[1], x) + product(found[2], x)

  return run


def cases():
  """Two steps, two ways to pool."""
  peer = "official algorithm"
  part = functools.partial
  return [
    Case("NCN training step on Cora", part(step, "cn1"), {peer: part(torch_step, 0)}),
    Case("NCNC training step on Cora", part(step, "incn1cn1"), {peer: part(torch_step, 1)}),
    Case("65,536 pairs, common neighbours pooled", part(pooled, False), {peer: part(torch_pooled, False)}),
    Case("65,536 pairs, all three sets pooled", part(pooled, True), {peer: part(torch_pooled, True)}),
  ]
