"""Rounds of MoDeST beside a loop over PyTorch trainers, and its samples beside hashing and sorting as published.

A round: ten of a hundred nodes train a 784-64-10 MLP for an epoch on their 40 of 4,000 MNIST digits (minibatches of 20,
SGD with momentum 0.9) and are averaged, by the plan of a simulated trace. The loop does one trainer after another with
all cores. Samples: the orders of ten rounds among a thousand nodes; the peer sorts ids, hashes, and sorts by digest.
"""

import hashlib

import numpy as np

from benchmarks import _flower
from benchmarks.harness import Case

HIDDEN, BATCH, RATE, NODES = 64, 20, 0.002, 100


def _plan():
  from jaxlab.data import mnist5k
  from jaxlab.decentral import modest, partition

  training = mnist5k.images(val=0.1, test=0.1).train
  flat = {"image": training["image"].reshape(len(training["label"]), -1)[:4000], "label": training["label"][:4000]}
  trace = modest.simulate(modest.Protocol(), NODES, 50)
  return modest.plan(trace, partition.clients(flat, np.split(np.arange(4000), NODES)))


def ours():
  """Fifty rounds in one scan, then again."""
  import jax
  import optax

  from jaxlab.decentral import modest, simulator, single_merging

  network = single_merging.MLP(10, hidden=(HIDDEN,), dropout=0.0, batch_norm=False)
  learner = modest.learner(simulator.classifier(network, optax.sgd(RATE, momentum=0.9)), simulator.Work(BATCH))
  plan = jax.device_put(_plan())
  state = jax.jit(learner.init)(jax.random.key(0), plan)
  rounds = jax.jit(lambda s: jax.lax.scan(lambda s, _: (learner.step(s, plan)[0], None), s, None, length=50)[0])
  return lambda: jax.block_until_ready(rounds(state))


def torch_loop():
  """The same fifty rounds, trainer after trainer."""
  import torch

  plan = _plan()
  image = torch.from_numpy(plan.clients.examples["image"])
  label = torch.from_numpy(plan.clients.examples["label"]).long()
  net = _flower.network(784, HIDDEN, 10)
  flat = lambda: torch.nn.utils.parameters_to_vector(net.parameters()).detach()
  start = flat()

  def run():
    average = start
    for ids in plan.ids:
      total = 0
      for i in ids:
        torch.nn.utils.vector_to_parameters(average.clone(), net.parameters())
        rows = torch.from_numpy(plan.clients.index[i]).long()
        _flower.train(net, image[rows], label[rows], BATCH, RATE)
        total = total + flat() / len(ids)
      average = total

  return run


def orders():
  """Ten rounds' samples."""
  from jaxlab.decentral import modest

  nodes = [modest.node_id(i) for i in range(1000)]
  return lambda: [modest.order(nodes, k)[:10] for k in range(10)]


def plain_orders():
  """The same: ids sorted, hashed, sorted by digest."""
  nodes = [b"peer-%02d" % i for i in range(1000)]

  def run():
    for k in range(10):
      pairs = [(node, hashlib.md5(b"%s-%d" % (node, k)).digest()) for node in sorted(nodes)]
      [node for node, _ in sorted(pairs, key=lambda pair: pair[1])][:10]

  return run


def cases():
  """Learning and sampling."""
  return [
    Case("50 rounds, 10 of 100 nodes", ours, {"PyTorch loop": torch_loop}),
    Case("samples of 10 rounds, 1,000 nodes", orders, {"hash and sort": plain_orders}),
  ]
