"""Official weights: which tensor of the PyTorch models is which array here."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlab import interop


def from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Official weights as flax variables: of the CVAE (either form), LAGCN, LAGAT, LAGCNII, LASAGE, LAGCN of OGB, MLP.

  Which it is follows from the names.

  Raises:
    ValueError: if the names belong to none, or listing every missing, unused or misshaped tensor.
  """
  count = lambda prefix: len({n.split(".")[1] for n in state_dict if n.startswith(f"{prefix}.")})
  for name, rules in (
    ("encoder.MLP.L0.weight", _cvae),
    ("gcn1_list.0.weight", _gcn),
    ("gcn1_list.0.att_src", _gat),
    ("fcs.0.weight", _gcnii),
    ("convs_initial.0.bias", _ogb("gcn")),
    ("convs_initial.0.lin_l.weight", _ogb("sage")),
    ("layer1.weight", _mlp),
  ):
    if name in state_dict:
      return _stacked(interop.variables(state_dict, rules(state_dict, count)))
  raise ValueError(f"state_dict: got {sorted(state_dict)[:3]}, expected the names of an official LAGNN model")


def _cvae(state_dict, count):
  rules = {
    "params/encoder": interop.dense("encoder.MLP.L0"),
    "params/mean": interop.dense("encoder.linear_means"),
    "params/log_variance": interop.dense("encoder.linear_log_var"),
    "params/decoder": interop.dense("decoder.MLP.L0"),
    "params/output": interop.dense("decoder.MLP.L1"),
  }
  if "encoder.MLP.B0.weight" in state_dict:
    norms = {"encoder": "encoder.MLP.B0", "decoder": "decoder.MLP.B0", "output": "decoder.MLP.B1"}
    rules |= {f"params/{name}_norm": interop.batch_norm(prefix) for name, prefix in norms.items()}
  return rules


def _gcn(state_dict, count):
  # The official graph convolution keeps its weight as [inputs, outputs].
  rules = {"params/second/linear/kernel": interop.raw("gc2.weight"), "params/second/bias": interop.raw("gc2.bias")}
  for i in range(count("gcn1_list")):
    for name, source in (("kernel", "weight"), ("bias", "bias")):
      rules[f"params/first_{i}/{name}"] = interop.raw(f"gcn1_list.{i}.{source}")
  return rules


def _gat(state_dict, count):
  rules = {}
  names = {f"first_{i}": f"gcn1_list.{i}" for i in range(count("gcn1_list"))} | {"second": "conv2"}
  for name, prefix in names.items():
    path = f"params/{name}"
    rules |= {
      f"{path}/linear": interop.dense(f"{prefix}.lin", bias=False),
      f"{path}/attention_sender": interop.raw(f"{prefix}.att_src", lambda a: a[0]),  # [1, heads, F]
      f"{path}/attention_receiver": interop.raw(f"{prefix}.att_dst", lambda a: a[0]),
      f"{path}/bias": interop.raw(f"{prefix}.bias"),
    }
  return rules


def _gcnii(state_dict, count):
  first = count("fcs") - 1
  rules = {f"params/first_{i}": interop.dense(f"fcs.{i}") for i in range(first)}
  rules["params/classifier"] = interop.dense(f"fcs.{first}")
  for i in range(count("convs")):
    rules[f"params/convolutions/convolution/linear/{i}/kernel"] = interop.raw(f"convs.{i}.weight")
  return rules


def _ogb(convolution):
  def layer(path, prefix):
    if convolution == "sage":
      return {
        f"{path}/neighbor": interop.dense(f"{prefix}.lin_l", bias=False),
        f"{path}/root": interop.dense(f"{prefix}.lin_r", bias=False),
        f"{path}/root/bias": interop.raw(f"{prefix}.lin_l.bias"),
      }
    return {f"{path}/linear": interop.dense(f"{prefix}.lin", bias=False), f"{path}/bias": interop.raw(f"{prefix}.bias")}

  def rules(state_dict, count):
    last = count("convs") - 1
    made = layer("params/last", f"convs.{last}")
    names = [
      *((f"first_{i}", f"convs_initial.{i}", f"bns_initial.{i}") for i in range(count("convs_initial"))),
      *((f"middle_{i}", f"convs.{i}", f"bns.{i}") for i in range(last)),
    ]
    for name, convolution_prefix, norm in names:
      made |= layer(f"params/{name}", convolution_prefix)
      if f"{norm}.weight" in state_dict:
        made[f"params/{name}_norm"] = interop.batch_norm(norm)
    return made

  return rules


def _mlp(state_dict, count):
  rules = {}
  for name, layer, norm in (("first", "layer1", "bn1"), ("second", "layer2", "bn2")):
    rules[f"params/{name}/kernel"] = interop.raw(f"{layer}.weight")
    rules[f"params/{name}/bias"] = interop.raw(f"{layer}.bias")
    path = "input_norm" if name == "first" else "hidden_norm"
    rules[f"params/{path}"] = interop.batch_norm(norm)
  return rules


def _stacked(variables):
  """GCNII's convolutions as one array [depth, width, width]."""
  if "convolutions" not in variables["params"]:
    return variables
  kernels = variables["params"]["convolutions"]["convolution"]["linear"]
  stack = np.stack([kernels[str(i)]["kernel"] for i in range(len(kernels))])
  stacked = {"convolutions": {"convolution": {"linear": {"kernel": stack}}}}
  return variables | {"params": variables["params"] | stacked}
