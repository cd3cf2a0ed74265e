"""Rounds of many learners beside a loop over PyTorch clients, and beside Flower's simulation.

Clients train a 784-64-10 MLP on their share of 4,000 MNIST digits for an epoch (minibatches of 10, SGD with momentum
0.9), then all models are averaged: by a server (FedAvg), or with peers by sparse gossip. The loop does one client after
the other with all cores, and mixes by one matrix product. Flower needs an interpreter with `flwr[simulation]` and
torch, named by the environment variable JAXLAB_FLOWER_PYTHON; without it that peer is left out.
"""

import functools
import os
import pathlib
import subprocess
import tempfile

import numpy as np

from benchmarks import _flower
from benchmarks.harness import Case

HIDDEN, BATCH, RATE = 64, 10, 0.01


def _data(num_clients):
  from jaxlab.data import mnist5k
  from jaxlab.decentral import partition

  training = mnist5k.images(val=0.1, test=0.1).train
  flat = {"image": training["image"].reshape(len(training["label"]), -1)[:4000], "label": training["label"][:4000]}
  return partition.clients(flat, np.split(np.arange(4000), num_clients))


def _network():
  import optax

  from jaxlab.decentral import simulator, single_merging

  network = single_merging.MLP(10, hidden=(HIDDEN,), dropout=0.0, batch_norm=False)
  return simulator.classifier(network, optax.sgd(RATE, momentum=0.9))


def ours(num_clients, rounds="server"):
  """A round of FedAvg, or of sparse gossip on fixed data."""
  import jax

  from jaxlab.decentral import simulator
  from jaxlab.decentral import single_merging as sm

  data = jax.device_put(_data(num_clients))
  if rounds == "server":
    learner, batch = simulator.federated(_network(), simulator.Work(BATCH)), data
  else:
    steps = -(-data.capacity // BATCH)
    schedule, batch = sm.Schedule("fixed", 0.2, max_steps=10**6), sm.Streams(data, None, None)
    learner = sm.learner(_network(), schedule, steps_per_round=steps, batch_size=min(BATCH, data.capacity))
  states, step = [jax.jit(learner.init)(jax.random.key(0), batch)], jax.jit(learner.step, donate_argnums=0)

  def run():
    states[0], _ = step(states[0], batch)
    jax.block_until_ready(states[0])

  return run


def torch_loop(num_clients, rounds="server"):
  """The same, client after client."""
  import torch

  data = _data(num_clients)
  image, label = torch.from_numpy(data.examples["image"]), torch.from_numpy(data.examples["label"]).long()
  make = lambda: _flower.network(784, HIDDEN, 10)
  clients = [make() for _ in range(num_clients)]
  server, rng = make(), np.random.default_rng(0)
  optimizers = [torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9) for net in clients]
  flat = lambda net: torch.nn.utils.parameters_to_vector(net.parameters()).detach()
  fill = lambda vector, net: torch.nn.utils.vector_to_parameters(vector, net.parameters())

  def epoch(net, optimizer, rows):
    for part in rows[torch.randperm(len(rows))].split(BATCH):
      optimizer.zero_grad()
      torch.nn.functional.cross_entropy(net(image[part]), label[part]).backward()
      optimizer.step()

  def server_round():
    total = 0
    for net, index, count in zip(clients, data.index, data.count, strict=True):
      net.load_state_dict(server.state_dict())
      epoch(net, torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9), torch.from_numpy(index[:count]).long())
      total = total + int(count) / 4000 * flat(net)
    fill(total, server)

  def gossip_round():
    for net, optimizer, index in zip(clients, optimizers, data.index, strict=True):
      epoch(net, optimizer, torch.from_numpy(index).long())
    matrix = np.eye(num_clients, dtype="float32")
    for row in np.flatnonzero(rng.random(num_clients) < 0.2):
      other = (row + 1 + rng.integers(num_clients - 1)) % num_clients
      matrix[row, [row, other]] = 0.5
    for vector, net in zip(
      torch.from_numpy(matrix) @ torch.stack([flat(net) for net in clients]), clients, strict=True
    ):
      fill(vector.clone(), net)

  return server_round if rounds == "server" else gossip_round


def flower(num_clients):
  """A round of FedAvg in Flower's simulation."""
  data, folder = _data(num_clients), tempfile.TemporaryDirectory()
  path = pathlib.Path(folder.name) / "data.npz"
  np.savez(path, **data.examples, index=data.index, count=data.count, hidden=HIDDEN, batch_size=BATCH, rate=RATE)
  command = [os.environ["JAXLAB_FLOWER_PYTHON"], str(pathlib.Path(_flower.__file__)), str(path)]
  process = subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
  )
  assert process.stdin is not None and process.stdout is not None
  stdin, stdout = process.stdin, process.stdout

  def run(keep=folder):  # the folder lives as long as the side
    stdin.write("\n")
    stdin.flush()
    if not stdout.readline():
      raise RuntimeError(f"Flower's process ended with code {process.wait()}")

  if not stdout.readline():  # after the evaluation of the start
    raise RuntimeError(f"Flower's process ended with code {process.wait()}")
  return run


def cases():
  """FedAvg and gossip with a hundred and a thousand clients."""
  made = []
  for n in (100, 1000):
    peers = {"PyTorch loop": functools.partial(torch_loop, n)}
    if "JAXLAB_FLOWER_PYTHON" in os.environ:
      peers["Flower simulation"] = functools.partial(flower, n)
    made.append(Case(f"FedAvg round, {n} clients", functools.partial(ours, n), peers))
    loop = {"PyTorch loop": functools.partial(torch_loop, n, "gossip")}
    made.append(Case(f"sparse gossip round, {n} clients", functools.partial(ours, n, "gossip"), loop))
  return made
