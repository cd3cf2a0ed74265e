"""The published models, how they were trained, and the official weights."""

from typing import Any, NamedTuple

from jaxlab import interop
from jaxlab.graph.links.neural_common_neighbor.networks import Encoder, Head, LinkPredictor, Variant


class Recipe(NamedTuple):
  """How a dataset's model is trained, see `link_prediction.learner` and `link_prediction.Batches`.

  Attributes:
    encoder_rate: learning rate of the MPNN.
    head_rate: of the head.
    batch_size: positive pairs of a step.
    epochs: passes over the training edges.
    edge_dropout: on the edges that sets of neighbours are listed from.
    remove_targets: take a batch's positive edges out of the graph.
    k: of the Hits@K that picks the epoch; 0 for the mean reciprocal rank.
    validation_edges: let the graph that tests are scored on have the validation edges too.
    max_exclusive: neighbours drawn for completion, or None for all.
  """

  encoder_rate: float
  head_rate: float
  batch_size: int
  epochs: int = 100
  edge_dropout: float = 0.0
  remove_targets: bool = True
  k: int = 100
  validation_edges: bool = False
  max_exclusive: int | None = None


# As the official README's commands set them.
RECIPES = {
  "cora": Recipe(0.0043, 0.0024, 1152, edge_dropout=0.4),
  "citeseer": Recipe(0.0085, 0.0078, 384),
  "pubmed": Recipe(0.0097, 0.002, 2048),
  "collab": Recipe(0.0082, 0.0037, 65536, k=50, validation_edges=True),
  "ppa": Recipe(0.0013, 0.0013, 16384, epochs=25),
  "citation2": Recipe(0.0088, 0.0058, 32768, epochs=20, k=0, remove_targets=False, max_exclusive=128),
  "ddi": Recipe(0.0021, 0.0018, 24576, k=20),
}


def cora(variant: Variant = "cn1", **changes: Any) -> LinkPredictor:
  """Cora, 1433 features. Parameters: NCN 764,163; NCNC as many, 830,212 with `learn_prior`."""
  return _predictor(
    variant, changes, {"jumping": True, "input_dropout": 0.7, "dropout": 0.05, "tail_dropout": 0.3},
    {"dropout": 0.05, "offset": 2.8, "scale": 4.3, "prior": 0.75},
  )  # fmt: skip


def citeseer(variant: Variant = "cn1", **changes: Any) -> LinkPredictor:
  """CiteSeer, 3703 features. Parameters: NCN 1,411,587; NCNC as many, 1,477,636 with `learn_prior`."""
  return _predictor(
    variant, changes, {"jumping": True, "input_dropout": 0.4, "dropout": 0.75},
    {"dropout": 0.55, "two_layer_score": True, "offset": 4.4, "scale": 6.5, "prior": 0.75, "alpha": 0.4},
  )  # fmt: skip


def pubmed(variant: Variant = "cn1", **changes: Any) -> LinkPredictor:
  """PubMed, 500 features. Parameters: NCN 525,315; NCNC as many, 591,364 with `learn_prior`."""
  return _predictor(
    variant, changes, {"jumping": True, "input_dropout": 0.3, "dropout": 0.1},
    {"dropout": 0.05, "offset": 0.5, "scale": 5.3, "prior": 0.5, "alpha": 0.3},
  )  # fmt: skip


def collab(variant: Variant = "cn1", **changes: Any) -> LinkPredictor:
  """ogbl-collab, 128 features. Parameters: NCN 33,922."""
  encoder = {"features": 64, "conv": "gcn", "residual": True, "input_dropout": 0.25, "tail_dropout": 0.05}
  return _predictor(
    variant, changes, encoder | {"dropout": 0.1, "edge_dropout": 0.25},
    {"dropout": 0.3, "offset": 6.0, "scale": 2.5, "prior": 0.1, "alpha": 1.05},
  )  # fmt: skip


def ppa(variant: Variant = "cn1", **changes: Any) -> LinkPredictor:
  """ogbl-ppa, 58 species as ids. Parameters: NCN 33,538."""
  encoder = {"features": 64, "conv": "gcn", "num_layers": 3, "num_embeddings": 58, "residual": True}
  return _predictor(
    variant, changes, encoder | {"edge_dropout": 0.1},
    {"node_residual": False, "dropout": 0.1, "offset": 8.5, "scale": 4.0, "prior": 0.1, "alpha": 0.9},
  )  # fmt: skip


def citation2(variant: Variant = "cn1", **changes: Any) -> LinkPredictor:
  """ogbl-citation2, 128 features. Parameters: NCN 33,794."""
  encoder = {"features": 64, "num_layers": 3, "residual": True, "dropout": 0.2, "tail_dropout": 0.3}
  return _predictor(variant, changes, encoder, {"dropout": 0.2, "offset": 4.7, "scale": 7.0, "prior": 0.3})


def ddi(variant: Variant = "cn1", **changes: Any) -> LinkPredictor:
  """ogbl-ddi, 4267 drugs as ids (the table has one row more, as in the code). Parameters: NCN 1,412,098."""
  encoder = {"features": 224, "conv": "puresum", "num_embeddings": 4268, "residual": True}
  head = {"tail_activation": False, "two_layer_score": True, "offset": 3.0, "scale": 10.0, "prior": 0.1, "alpha": 0.5}
  return _predictor(variant, changes, encoder | {"input_dropout": 0.05, "dropout": 0.4}, head | {"dropout": 0.6})


def _predictor(variant, changes, encoder, head):
  """Both parts; changes go to the part that has the attribute, or both, or are dicts named `encoder` and `head`."""
  plain = variant in ("cn1.5", "cn1res", "cn2")  # which the official script builds without these options
  head = {"features": encoder.get("features", 256), "node_residual": True, "tail_activation": True} | head
  if plain:
    head = head | {"node_residual": False, "tail_activation": False, "two_layer_score": False}
  encoder, head = {"features": 256} | encoder, head | {"variant": variant}
  changes = dict(changes)
  own = changes.pop("encoder", {}), changes.pop("head", {})
  fields = tuple({f for f in part.__dataclass_fields__ if f not in ("parent", "name")} for part in (Encoder, Head))
  unknown = changes.keys() - (fields[0] | fields[1])
  if unknown or "dropout" in changes:
    raise ValueError(
      f"changes: got {sorted(unknown) or 'dropout'}, expected attributes, or encoder={{...}}, head={{...}}"
    )
  parts = []
  for part, settings, names, mine in zip((Encoder, Head), (encoder, head), fields, own, strict=True):
    parts.append(part(**settings | {k: v for k, v in changes.items() if k in names} | mine))
  return LinkPredictor(*parts)


def from_torch(model: LinkPredictor, encoder_state: dict[str, Any], head_state: dict[str, Any]) -> dict[str, Any]:
  """Official weights as flax variables.

  Args:
    model: of the same settings; blocks that it does not use are left out.
    encoder_state: `GCN.state_dict()`.
    head_state: the predictor's `state_dict()`.

  Raises:
    ValueError: listing every missing, unused or misshaped tensor.
  """
  encoder, head = model.encoder, model.head
  rules = {}
  if encoder.num_embeddings is not None:
    rules["encoder/embedding"] = interop.embed("xemb.0")
  elif encoder.conv.startswith("pure") or encoder.num_layers == 0 or encoder.conv == "none":
    rules["encoder/linear"] = interop.dense("xemb.1")
  if not encoder.conv.startswith("pure") and encoder.conv != "none":
    for i in range(encoder.num_layers):
      rules[f"encoder/conv_{i}"] = interop.dense(f"convs.{i}.lin", bias=False)
      rules[f"encoder/conv_{i}_bias"] = interop.raw(f"convs.{i}.bias")
      if encoder.layer_norm and (i < encoder.num_layers - 1 or encoder.num_layers == 1):
        rules[f"encoder/norm_{i}"] = interop.norm(f"lins.{i}.0")
  if encoder.jumping and encoder.num_layers and encoder.conv != "none":
    rules["encoder/jumping"] = interop.raw("jkparams")

  common = "xcn1lin" if head.variant == "cn2" else "xcnlin"
  two_hop = "xcn2lin" if head.variant == "cn2" else "xcn12lin"
  long = [("linear_0", "0", False), ("linear_1", "3", False), ("norm_1", "4", True)]
  tail = [] if head.tail_activation else [("tail", "7", False)]
  score = [("linear_0", "0", False), ("norm_0", "1", True), ("tail", "8" if head.variant != "cn2" else "4", False)]
  if head.two_layer_score:
    score += [("linear_1", "4", False), ("norm_1", "5", True)]
  product = [("linear_0", "0", False), ("norm_0", "1", True), *(("tail", "4", False) for _ in tail)]
  blocks = {"product": ("xijlin", product), "score": ("lin", score)}
  needs = head.needs
  if head.variant != "cn0":
    blocks["common"] = (common, long + tail)
    rules["head/beta"] = interop.raw("beta")
  if head.node_residual and head.variant in ("cn1", "incn1cn1", "cn1.5", "cn1res"):
    blocks["node"] = ("xlin", long)
  if needs["exclusive"]:
    blocks["exclusive"] = ("xcnreslin", long + tail)
  if needs["two_hop"]:
    blocks["two_hop"] = (two_hop, long + tail)
  if head.variant == "cn2":
    blocks["four_hop"] = ("xcn4lin", long + tail)
    rules["head/weights"] = interop.raw("alpha")
  if head.completes and head.learn_prior:
    blocks["prior_of"] = ("ptlin", [("linear_0", "0", False), ("tail", "2", False)])
  for ours, (theirs, entries) in blocks.items():
    for name, index, norm in entries:
      if head.layer_norm or not norm:
        rules[f"head/{ours}/{name}"] = (interop.norm if norm else interop.dense)(f"{theirs}.{index}")

  used = {theirs for theirs, _ in blocks.values()}
  ignore = [f"{theirs}.*" for theirs in ("xlin", "xcnlin", "ptlin") if theirs not in used]
  ignore += ["adjdrop.ratio", "dropadj.ratio", "pt", "scale", "offset"]
  ignore += ["alpha"] * (head.variant != "cn2") + ["beta"] * (head.variant == "cn0")
  # Both parts have names that start alike ("lins", "lin"), but none in common.
  return interop.variables(
    {**encoder_state, **head_state}, {f"params/{path}": rule for path, rule in rules.items()}, ignore=ignore
  )
