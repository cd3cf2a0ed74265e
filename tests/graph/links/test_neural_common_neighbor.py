
import golden_rule
import numpy as np

from jaxlab.graph import common_neighbors, structure
from jaxlab.graph.links import neural_common_neighbor as ncn

H = 8
NODES = 14


def random_graph(seed, probability=0.3):
  rng = np.random.default_rng(seed)
  edges = np.argwhere(np.triu(rng.random((NODES, NODES)) < probability, 1)).T
  return common_neighbors.adjacency(edges, NODES)


def as_graph(adjacency, nodes):
  return structure.from_scipy(adjacency, nodes=nodes)


# -------------------------------------------------------------------------------------------------------------- golden

CALIBRATION = {"scale": 4.3, "offset": 0.2, "prior": 0.75, "alpha": 0.9}
USUAL = {"node_residual": True, "tail_activation": True}
HEADS = {
  "cn0": USUAL | {"variant": "cn0"},
  "scn1": USUAL | {"variant": "scn1"},
  "cn1": USUAL | {"variant": "cn1"},
  "cn1_two": {"variant": "cn1", "node_residual": True, "two_layer_score": True},
  "cn1_plain": {"variant": "cn1", "layer_norm": False},
  "cn1half": {"variant": "cn1.5"},
  "cn1res": {"variant": "cn1res"},
  "cn2": {"variant": "cn2"},
  "incn1cn1": USUAL | CALIBRATION | {"variant": "incn1cn1"},
  "incn1cn1_prior": USUAL | CALIBRATION | {"variant": "incn1cn1", "learn_prior": True},
  "incn1cn1_depth2": USUAL | CALIBRATION | {"variant": "incn1cn1", "depth": 2},
  "sincn1cn1": USUAL | CALIBRATION | {"variant": "sincn1cn1"},
}
ENCODERS = {
  "puregcn": {"conv": "puregcn", "num_layers": 2, "jumping": True},
  "puresum": {"conv": "puresum", "residual": True},
  "puremean": {"conv": "puremean", "num_layers": 2},
  "puremax": {"conv": "puremax"},
  "gcn": {"conv": "gcn"},
  "gcn3": {"conv": "gcn", "num_layers": 3, "residual": True, "jumping": True},
  "sage": {"conv": "sage", "num_layers": 2},
  "gin": {"conv": "gin", "num_layers": 2},
  "max": {"conv": "max", "num_layers": 2},
  "ids": {"conv": "gcn", "num_layers": 2, "num_embeddings": 4},
}


def test_golden():
  """Every head and every MPNN of the official code, on a graph with an isolated node and adjacent pairs."""

  def part(state, name):
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}

  def convert(state):
    made = {}
    for name in HEADS:
      model = ncn.LinkPredictor(ncn.Encoder(H, num_layers=2, jumping=True), ncn.Head(H, **HEADS[name]))
      variables = ncn.from_torch(model, part(state, "encoder_puregcn"), part(state, f"head_{name}"))
      made[f"head_{name}"] = variables["params"]["head"]
    for name in ENCODERS:
      model = ncn.LinkPredictor(ncn.Encoder(H, **ENCODERS[name]), ncn.Head(H, **HEADS["cn1"]))
      variables = ncn.from_torch(model, part(state, f"encoder_{name}"), part(state, "head_cn1"))
      made[f"encoder_{name}"] = variables["params"]["encoder"]
    return made

  def apply(made, inputs):
    adjacency = common_neighbors.adjacency(inputs["edges"], NODES)
    outputs = {}
    for name, attributes in HEADS.items():
      head = ncn.Head(H, **attributes)
      pairs = common_neighbors.pairs(adjacency, inputs["pairs"], **head.needs)
      logits = head.apply({"params": made[f"head_{name}"]}, inputs["h"], pairs)
      outputs[f"head_{name}"] = logits[: inputs["pairs"].shape[1]]
    for name, attributes in ENCODERS.items():
      graph = as_graph(adjacency, inputs["ids"] if name == "ids" else inputs["x"])
      outputs[f"encoder_{name}"] = ncn.Encoder(H, **attributes).apply({"params": made[f"encoder_{name}"]}, graph)
    return outputs

  golden_rule.check("neural_common_neighbor", convert, apply, atol=2e-6, rtol=1e-5)
