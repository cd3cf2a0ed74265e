"""FedAvg in Flower's simulation (Ray), a round at a time, run by another interpreter that has `flwr[simulation]` and
torch: it reads a line, does a round, and prints a line.

    python benchmarks/_flower.py data.npz

Flower runs each client in an actor with one core; the model, the data and the local steps are those of the caller.
"""

import contextlib
import os
import sys

os.environ.setdefault("RAY_DEDUP_LOGS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def network(features: int, hidden: int, classes: int):
  """The torch model of both peers."""
  import torch

  return torch.nn.Sequential(torch.nn.Linear(features, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, classes))


def train(net, image, label, batch_size: int, rate: float) -> None:
  """An epoch of SGD with momentum 0.9."""
  import torch

  optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
  for rows in torch.randperm(len(label)).split(batch_size):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(net(image[rows]), label[rows]).backward()
    optimizer.step()


def main(path: str) -> None:
  """Serves rounds."""
  import numpy as np
  import torch
  from flwr.client import ClientApp, NumPyClient
  from flwr.common import Context, ndarrays_to_parameters
  from flwr.server import ServerApp, ServerAppComponents, ServerConfig
  from flwr.server.strategy import FedAvg
  from flwr.simulation import run_simulation

  with np.load(path) as file:
    image, label, index, count = (file[k] for k in ("image", "label", "index", "count"))
    hidden, batch_size, rate = int(file["hidden"]), int(file["batch_size"]), float(file["rate"])
  clients, classes = len(index), int(label.max()) + 1
  make = lambda: network(image.shape[1], hidden, classes)

  class Client(NumPyClient):
    def __init__(self, number: int):
      rows = index[number, : count[number]]
      self.image, self.label = torch.from_numpy(image[rows]), torch.from_numpy(label[rows]).long()

    def fit(self, parameters, config):
      torch.set_num_threads(1)
      net = make()
      net.load_state_dict(dict(zip(net.state_dict(), map(torch.from_numpy, parameters), strict=True)))
      train(net, self.image, self.label, batch_size, rate)
      return [p.detach().numpy() for p in net.state_dict().values()], len(self.label), {}

  def client(context: Context):
    return Client(int(context.node_config["partition-id"])).to_client()

  def after_round(server_round, parameters, config):
    print("round", server_round, flush=True, file=reply)
    if not sys.stdin.readline():
      os._exit(0)
    return 0.0, {}

  def server(context: Context):
    start = ndarrays_to_parameters([p.detach().numpy() for p in make().state_dict().values()])
    strategy = FedAvg(
      fraction_fit=1.0, fraction_evaluate=0.0, min_fit_clients=clients, min_available_clients=clients,
      initial_parameters=start, evaluate_fn=after_round,
    )  # fmt: skip
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=10**6))

  reply = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # Ray writes to the standard output too
  with contextlib.suppress(KeyboardInterrupt):
    run_simulation(
      ServerApp(server_fn=server), ClientApp(client_fn=client), clients,
      backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )  # fmt: skip


if __name__ == "__main__":
  main(sys.argv[1])
