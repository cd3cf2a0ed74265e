"""NAT's training stream beside its official algorithm in PyTorch, and late events beside early ones.

The stream is the e-mails of `email-Enron`, batches of 100 as published, two hops of 32 and 16 slots. The peer does what
the official class does, operation for operation: ragged lists of neighbours, `unique` over (pair, key), sums by
`scatter_add_`, caches written through fancy indices; its network is made of torch's modules.
"""

import copy
import functools

import numpy as np

from benchmarks.harness import Case

SLOTS, SELF, REP, POSITION, HEADS, DROPOUT, ALPHA, BATCH = (1, 32, 16), 72, 4, 16, 2, 0.1, 0.7, 100


def _events(start, stop):
  """Batches of the events in [start, stop) and the size of the stream."""
  from jaxlab.data import temporal

  stream = temporal.simplicial("email-Enron")
  chosen = np.zeros(len(stream.times), bool)
  chosen[start:stop] = True
  everyone = np.ones_like(chosen)
  return temporal.batches(stream, chosen, batch_size=BATCH, seed=0, destinations=everyone), stream


def ours(start, stop):
  """Trains on events [start, stop), with the memory that the events before them left."""
  import jax
  import jax.numpy as jnp
  import optax

  from jaxlab.graph.links import nat

  (batches, stream), model, tx = _events(start, stop), nat.wikipedia(), optax.adam(1e-4)
  tables = jax.tree.map(jnp.asarray, nat.Tables(stream.node_features, stream.edge_features))
  batches = jax.tree.map(jnp.asarray, batches)
  memory, key = nat.reset(model, stream.num_nodes, 7), jax.random.key(0)
  params = model.init(key, memory, tables, jax.tree.map(lambda a: a[0], batches))["params"]
  if start:
    memory, _ = jax.jit(functools.partial(nat.stream, model))(params, memory, tables, _events(0, start)[0], key)
  step = jax.jit(functools.partial(nat.train_stream, model, tx))
  start_state = nat.Training(params, tx.init(params), memory)  # each run starts with it: the same history for all

  def run():
    jax.block_until_ready(step(start_state, tables, batches, key))

  return run


def _network(num_nodes, num_edges):
  """The official network from torch's modules: a class, as torch may be imported in the peer's process only."""
  import torch
  from torch import nn

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      self.register_buffer("nodes", torch.zeros(num_nodes + 1, 1))
      self.register_buffer("edges", torch.zeros(num_edges + 1, 1))
      self.frequency, self.phase = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
      self.self_linear, self.slot_linear = nn.Linear(SELF + 2, SELF, bias=False), nn.Linear(SELF + 2, REP, bias=False)
      self.self_gru, self.slot_gru = nn.GRUCell(SELF, SELF), nn.GRUCell(REP, REP)
      self.position = nn.Embedding(64, POSITION)
      self.projection, self.bias = nn.Linear(1 + REP + POSITION, HEADS, bias=False), nn.Parameter(torch.zeros(1))
      self.drop = nn.Dropout(DROPOUT)
      self.hidden, self.output = nn.Linear(1 + 2 * SELF, 1 + 2 * SELF), nn.Linear(1 + 2 * SELF, 1)

    def reset(self):
      # Key, edge, time and vector of a slot in one float row, as officially.
      self.caches = [torch.zeros((num_nodes + 1) * size, 3 + REP) for size in SLOTS]
      self.self_rep, self.latest = torch.zeros(num_nodes + 1, SELF), torch.zeros(num_nodes + 1, 3)

    def message(self, linear, node, edge, time):
      code = torch.cos(time[:, None] * self.frequency + self.phase)
      return linear(torch.cat((self.self_rep[node], self.edges[edge], code), -1))

    def read(self, ids, hop):
      rows = self.caches[hop].view(num_nodes + 1, SLOTS[hop], -1)[ids].view(-1, 3 + REP)
      x = self.message(self.slot_linear, rows[:, 0].long(), rows[:, 1].long(), rows[:, 2])
      rep = self.slot_gru(x, rows[:, 3:]) * (rows[:, 2] != 0)[:, None]
      return torch.cat((rows[:, :3], rep), -1)

    def refresh(self, ids):
      node, edge, time = self.latest[ids].unbind(1)
      return self.self_gru(self.message(self.self_linear, node.long(), edge.long(), time), self.self_rep[ids])

    def join(self, pair, key, rows):
      groups, which = torch.stack((pair, key), 1).unique(dim=0, return_inverse=True)
      sums = torch.zeros(len(groups), rows.shape[1])
      sums = sums.scatter_add_(0, which[:, None].expand_as(rows), rows)
      return groups[:, 0], torch.cat((sums[:, :-1], self.position(sums[:, -1].long())), -1)

    def forward(self, u, v, w, edge, time):
      count, ids = len(u), torch.cat((u, v, w))
      self.caches[0].view(num_nodes + 1, -1)[ids, 0] = ids.float()
      hops = [self.read(ids, hop) for hop in range(3)]
      bits = [torch.full((len(rows), 1), 2.0**hop) for hop, rows in enumerate(hops)]
      table = torch.cat(
        [torch.cat(part, -1).view(3 * count, -1, 4 + REP) for part in zip(hops, bits, strict=True)], dim=1
      )
      there = table[:, :, 0] != 0
      rows, row_of = table[there], torch.arange(3 * count).repeat_interleave(there.sum(1))
      key, side = rows[:, 0].long(), row_of // count
      code = rows[:, -1:] * torch.where(side == 0, 1.0, 8.0)[:, None]
      rows = torch.cat((self.nodes[key], rows[:, 3:-1], code), -1)
      pairs, joined = [], []
      for other in (1, 2):
        mine = torch.cat((torch.nonzero(side == 0)[:, 0], torch.nonzero(side == other)[:, 0]))
        group, features = self.join(row_of[mine] % count + (other - 1) * count, key[mine], rows[mine])
        pairs.append(group)
        joined.append(features)
      h = self.drop(self.projection(self.drop(torch.cat(joined))))
      pair = torch.cat(pairs)
      pooled = torch.zeros(2 * count, HEADS).scatter_add_(0, pair[:, None].expand_as(h), h)
      pooled = pooled.mean(1, keepdim=True) + self.bias
      su, sv, sw = (self.refresh(part) for part in (u, v, w))
      x = torch.cat((pooled, torch.cat((su, su)), torch.cat((sv, sw))), -1)
      p = torch.sigmoid(self.output(torch.relu(self.hidden(x)))[:, 0])
      with torch.no_grad():
        self.write(u, v, edge, time, su, sv, hops)
      return p[:count], p[count:]

    def write(self, u, v, edge, time, su, sv, hops):
      self.self_rep[u], self.self_rep[v] = su.detach(), sv.detach()
      self.latest[u], self.latest[v] = (torch.stack((x.float(), edge.float(), time), 1) for x in (v, u))
      own, opp, count = torch.cat((u, v)), torch.cat((v, u)), 2 * len(u)
      edge, time = edge.float().repeat(2)[:, None], time.repeat(2)[:, None]
      first = hops[1].detach()[: count * SLOTS[1]]
      there = first[:, 0] != 0
      self.insert(opp.repeat_interleave(there.view(count, -1).sum(1)), first[there], 2)
      found = first[torch.arange(count) * SLOTS[1] + self.hash(opp, 1)]
      found = found * (found[:, 0] == opp)[:, None]
      self.insert(own, torch.cat((opp[:, None].float(), edge, time, found[:, 3:]), -1), 1)
      self.insert(own, torch.cat((own[:, None].float(), edge, time, hops[0].detach()[:count, 3:]), -1), 0)

    def hash(self, key, hop):
      return (key * 7 + key * key * 8) % SLOTS[hop]

    def insert(self, node, entries, hop):
      key = entries[:, 0]
      place = node * SLOTS[hop] + self.hash(key.long(), hop)
      held = self.caches[hop][place, 0]
      occupied = (held != 0) & (held != key)
      self.caches[hop][place * ((occupied * torch.rand(len(key))) < ALPHA) * (key != 0)] = entries

  return Network()


def torch_stream(start, stop):
  """The same for the official algorithm in torch."""
  import torch

  batches, stream = _events(start, stop)
  net = _network(stream.num_nodes, len(stream.times))
  optimizer, loss = torch.optim.Adam(net.parameters(), lr=1e-4), torch.nn.BCELoss()
  net.reset()

  def prepare(batch):
    ids = [torch.from_numpy(np.asarray(a, "int64")) for a in batch[:4]]
    return *ids, torch.from_numpy(batch[4])

  if start:
    net.eval()
    with torch.no_grad():
      for batch in zip(*_events(0, start)[0], strict=True):
        net(*prepare(batch))
    net.train()
  prepared = [prepare(batch) for batch in zip(*batches, strict=True)]
  names = ("caches", "self_rep", "latest")
  history = copy.deepcopy([getattr(net, name) for name in names])

  def run():
    for name, value in zip(names, copy.deepcopy(history), strict=True):
      setattr(net, name, value)
    for batch in prepared:
      optimizer.zero_grad()
      positive, negative = net(*batch)
      (loss(positive, torch.ones_like(positive)) + loss(negative, torch.zeros_like(negative))).backward()
      optimizer.step()

  return run


def cases():
  """A thousand events after six thousand, beside the peer and beside the first thousand."""
  late = (6900, 7900)
  peers = {"PyTorch, official algorithm": functools.partial(torch_stream, *late)}
  first = {"jaxlab, first 1000": functools.partial(ours, 0, 1000)}
  return [
    Case("training on 1000 e-mails", functools.partial(ours, *late), peers),
    Case("training on the last 1000 e-mails", functools.partial(ours, *late), first),
  ]
