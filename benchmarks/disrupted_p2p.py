"""A round of peers on a graph beside a loop over PyTorch peers.

Fifty or five hundred peers on a Barabasi-Albert graph, a third of them gone, average with their neighbours and train a
784-64-10 MLP for five epochs (minibatches of 32, SGD with momentum 0.5) on their share of 4,000 MNIST digits. The loop
averages and trains one living peer after the other with all cores; nothing is done there for the dead.
"""

import functools

import numpy as np

from benchmarks import _flower
from benchmarks.harness import Case

HIDDEN, BATCH, RATE, EPOCHS = 64, 32, 0.01, 5


def _world(peers):
  from jaxlab.data import mnist5k
  from jaxlab.decentral import disrupted_p2p as dp
  from jaxlab.decentral import partition

  training = mnist5k.images(val=0.1, test=0.1).train
  flat = {"image": training["image"].reshape(len(training["label"]), -1)[:4000], "label": training["label"][:4000]}
  adjacency = dp.barabasi_albert(peers, 2, seed=0)
  removed = dp.choose_removed(adjacency, 0.3, "random", seed=0)
  return dp.World(partition.clients(flat, np.split(np.arange(4000), peers)), adjacency, removed, np.int32(0))


def ours(peers):
  """A round in one compiled computation."""
  import jax
  import optax

  from jaxlab.decentral import disrupted_p2p as dp
  from jaxlab.decentral import simulator

  world = jax.device_put(_world(peers))
  local = simulator.classifier(dp.MLP(10, (HIDDEN,)), optax.sgd(RATE, momentum=0.5))
  learner = dp.learner(local, simulator.Work(BATCH, EPOCHS))
  states, step = [jax.jit(learner.init)(jax.random.key(0), world)], jax.jit(learner.step, donate_argnums=0)

  def run():
    states[0], _ = step(states[0], world)
    jax.block_until_ready(states[0])

  return run


def torch_loop(peers):
  """The same, peer after peer."""
  import torch

  world = _world(peers)
  image = torch.from_numpy(world.clients.examples["image"])
  label = torch.from_numpy(world.clients.examples["label"]).long()
  alive = np.flatnonzero(~world.removed)
  nets = {i: _flower.network(784, HIDDEN, 10) for i in alive}
  optimizers = {i: torch.optim.SGD(nets[i].parameters(), lr=RATE, momentum=0.5) for i in alive}
  hears = {i: [j for j in alive if j == i or world.adjacency[i, j]] for i in alive}
  rows = {i: torch.from_numpy(world.clients.index[i]).long() for i in alive}

  def run():
    vectors = {i: torch.nn.utils.parameters_to_vector(nets[i].parameters()).detach() for i in alive}
    for i in alive:
      mean = sum(vectors[j] for j in hears[i]) / len(hears[i])
      torch.nn.utils.vector_to_parameters(mean, nets[i].parameters())
    for i in alive:
      for _ in range(EPOCHS):
        for part in rows[i][torch.randperm(len(rows[i]))].split(BATCH):
          optimizers[i].zero_grad()
          torch.nn.functional.cross_entropy(nets[i](image[part]), label[part]).backward()
          optimizers[i].step()

  return run


def cases():
  """Two sizes of network."""
  return [
    Case(
      f"round, {n} peers, a third gone", functools.partial(ours, n), {"PyTorch loop": functools.partial(torch_loop, n)}
    )
    for n in (50, 500)
  ]
