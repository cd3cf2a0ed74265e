"""The published networks, and official weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlab import interop
from jaxlab.models.parot.networks import PaRot, PaRotParts


def classifier(num_classes: int = 40, **overrides: Any) -> PaRot:
  """For 1024 points; 1,630,888 parameters with 40 classes."""
  return PaRot(**{"num_classes": num_classes, **overrides})


def segmenter(num_parts: int = 50, num_categories: int = 16, **overrides: Any) -> PaRotParts:
  """For 2048 points; 1,534,738 parameters with ShapeNet's 50 parts of 16 categories."""
  return PaRotParts(**{"num_parts": num_parts, "num_categories": num_categories, **overrides})


def from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Official weights of either network as flax variables. Segmentation weights belong to `centre_quirk=True`.

  Args:
    state_dict: official names -> NumPy arrays or tensors.

  Returns:
    {"params", "batch_stats"}.

  Raises:
    ValueError: names missing, left over or misshaped, all in one message.
  """
  return interop.variables(state_dict, weight_table(parts=any("pt_fp2" in name for name in state_dict)))


def weight_table(*, parts: bool) -> dict[str, interop.Rule]:
  """Which official tensor is which variable. Args: parts, for segmentation. Returns flax path -> rule."""
  table: dict[str, interop.Rule] = {}

  def layers(path: str, pairs: Sequence[tuple[str, str]], spatial: int) -> None:
    for i, (dense, norm) in enumerate(pairs, start=1):
      table[f"params/{path}/dense{i}"] = interop.dense(dense, bias=False, spatial=spatial)
      table[f"params/{path}/norm{i}"] = interop.batch_norm(norm)

  def sequence(path: str, name: str, count: int, spatial: int = 0) -> None:
    """Of convolution, norm and activation in turn."""
    layers(path, [(f"{name}.{3 * i}", f"{name}.{3 * i + 1}") for i in range(count)], spatial)

  for scope, official in (("local", "local_enc"), ("world", "global_enc")):
    inner, net = f"encoder/{scope}", f"{official}.disNet"
    sequence(f"{inner}/points", f"{net}.pn_encoder", 3, spatial=1)
    sequence(f"{inner}/feature", f"{net}.inv_encoder", 2)
    for i in (1, 2):
      sequence(f"{inner}/direction{i}", f"{net}.equi_encoder{i}", 2)
      table[f"params/{inner}/direction{i}_out"] = interop.dense(f"{net}.equi_encoder{i}.6", bias=False)
  intra = "local_enc.intra_layer"
  table["params/encoder/neighbor_pose/dense1/kernel"] = interop.raw(f"{intra}.pos.weight", _pose_in, _pose_out)
  table["params/encoder/neighbor_pose/norm1"] = interop.batch_norm(f"{intra}.bnpos")
  table["params/encoder/neighbor_edge"] = interop.dense(f"{intra}.conv1", bias=False, spatial=2)
  table["params/encoder/neighbor_mlp/norm0"] = interop.batch_norm(f"{intra}.bn1")
  layers("encoder/neighbor_mlp", [(f"{intra}.conv{i}", f"{intra}.bn{i}") for i in (2, 3)], spatial=2)
  sequence("scale_pose", "classifier.posembed", 1, spatial=1)
  sequence("scale_mlp", "classifier.encoder" if parts else "classifier.inter_layer", 3, spatial=1)
  if not parts:
    for i, place in ((1, 0), (2, 4)):  # dropout stands between
      layers(f"head{i}", [(f"classifier.cls.{place}", f"classifier.cls.{place + 1}")], spatial=0)
    table["params/logits"] = interop.dense("classifier.cls.8")
    return table
  down, up = "classifier.pt_fp1", "classifier.pt_fp2"
  sequence("centre_pose", f"{down}.posembed", 1, spatial=1)
  sequence("point_pose", f"{up}.posembed", 1, spatial=2)
  for path, name, count, spatial in (("centre", down, 2, 1), ("point", up, 3, 2)):
    table[f"params/{path}_joint"] = interop.dense(f"{name}.backbone.Conv_0", bias=False, spatial=spatial)
    table[f"params/{path}_mlp/norm0"] = interop.batch_norm(f"{name}.backbone.Bn_0")
    pairs = [(f"{name}.backbone.Conv_{i}", f"{name}.backbone.Bn_{i}") for i in range(1, count)]
    layers(f"{path}_mlp", pairs, spatial)
  layers("head", [("classifier.convex", "classifier.bnex"), ("classifier.conv1", "classifier.bn1")], spatial=1)
  table["params/logits"] = interop.dense("classifier.cls", spatial=1)
  return table


# Between neighbours the official order is [O_j O_i^T (9), O_i v^ (3), O_j v^ (3), ||v||].
_POSE = np.array([15, *range(9), 12, 13, 14, 9, 10, 11])


def _pose_in(w: np.ndarray) -> np.ndarray:
  return w.reshape(w.shape[:2]).T[_POSE]


def _pose_out(kernel: np.ndarray) -> np.ndarray:
  return kernel[np.argsort(_POSE)].T[..., None, None]
