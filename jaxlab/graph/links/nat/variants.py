"""The published models, how they are trained, and their official weights."""

from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlab import interop
from jaxlab.graph.links.nat.network import NAT


class Recipe(NamedTuple):
  """How the published models are trained: Adam, early stop on validation average precision."""

  batch_size: int = 64
  learning_rate: float = 1e-4
  epochs: int = 50
  patience: int = 3


# What the official README sets.
RECIPES = {"wikipedia": Recipe(batch_size=100), "wiki_talk": Recipe()}


def wikipedia(**changes: Any) -> NAT:
  """Wikipedia, 172 features of nodes and edges. Parameters 218,011."""
  published: dict[str, Any] = {"slots": (32, 16), "num_heads": 2, "replace_prob": 0.7}
  return NAT(**published | changes)


def wiki_talk(**changes: Any) -> NAT:
  """Wiki-talk, inductive: one hop, one head; one zero feature each."""
  published: dict[str, Any] = {"slots": (16,), "num_heads": 1, "replace_prob": 0.9}
  return NAT(**published | changes)


_TRANSPOSED: dict[str, Any] = {"to_flax": np.transpose, "to_torch": np.transpose}


def _gru(name: str, torch_name: str) -> dict[str, interop.Rule]:
  rules = {}
  for side, letters in (("input", "ih"), ("hidden", "hh")):
    rules[f"params/{name}/{side}_kernel"] = interop.raw(f"{torch_name}.weight_{letters}", **_TRANSPOSED)
    rules[f"params/{name}/{side}_bias"] = interop.raw(f"{torch_name}.bias_{letters}")
  return rules


_WEIGHTS = {
  "params/time_code/frequency": interop.raw("time_encoder.basis_freq"),
  "params/time_code/phase": interop.raw("time_encoder.phase"),
  "params/self_kernel": interop.raw("self_rep_linear.weight", **_TRANSPOSED),
  "params/slot_kernel": interop.raw("ngh_rep_linear.weight", **_TRANSPOSED),
  **_gru("self_gru", "self_aggregator.gru"),
  **_gru("slot_gru", "ngh_aggregator.gru"),
  "params/aggregation/position": interop.raw("trainable_embedding.weight"),
  "params/aggregation/kernel": interop.raw("gat.gat_net.0.linear_proj.weight", **_TRANSPOSED),
  "params/aggregation/bias": interop.raw("gat.gat_net.0.bias"),
  "params/hidden_layer": interop.dense("out_layer.fc1"),
  "params/output_layer": interop.dense("out_layer.fc2"),
}
_ATTENTION = {
  f"params/aggregation/attention_{end}": interop.raw(
    f"gat.gat_net.0.scoring_fn_{end}", to_flax=lambda a: a.reshape(a.shape[1:]), to_torch=lambda a: a[None]
  )
  for end in ("source", "target")
}


def from_torch(state_dict: dict[str, Any], aggregation: Literal["sum", "attention"] = "sum") -> dict[str, Any]:
  """Official weights (`NAT.state_dict()`) as flax variables. Feature tables and weights of no effect are left out.

  Raises:
    ValueError: listing every missing, unused or misshaped tensor.
  """
  ignore = ["n_feat_th", "e_feat_th", "*_raw_embed.weight", "affinity_score.*", "gat.gat_net.0.skip_proj.weight"]
  attention = aggregation == "attention"
  if not attention:
    ignore.append("gat.gat_net.0.scoring_fn_*")
  return interop.variables(state_dict, _WEIGHTS | (_ATTENTION if attention else {}), ignore=ignore)
