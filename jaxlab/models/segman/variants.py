"""The published sizes, and official weights."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from jaxlab import checks, interop
from jaxlab.models.segman.networks import Decoder, Encoder, SegMAN

# The published variants: encoder, width and map width of the decoder.
_VARIANTS: dict[str, tuple[dict[str, Any], int, int]] = {
  "T": ({}, 128, 192),
  "S": (
    {"widths": (64, 144, 288, 512), "depths": (2, 2, 10, 4), "heads": (2, 4, 8, 16), "windows": (11, 9, 7, 7)}
    | {"mlp_ratios": (4, 4, 3.4, 3.4), "drop_path": 0.15},
    144,
    288,
  ),
  "B": (
    {"widths": (96, 160, 364, 560), "depths": (4, 4, 18, 4), "heads": (4, 8, 13, 20), "windows": (11, 9, 7, 7)}
    | {"mlp_ratios": (4, 4, 3, 3), "drop_path": 0.3, "layer_scale": 1e-6},
    180,
    320,
  ),
  "L": (
    {"widths": (96, 192, 432, 640), "depths": (4, 4, 28, 4), "heads": (4, 8, 12, 20), "windows": (11, 9, 7, 7)}
    | {"mlp_ratios": (4, 4, 3, 3), "drop_path": 0.3, "layer_scale": 1e-6},
    224,
    432,
  ),
}


def _variant(letter: str) -> tuple[dict[str, Any], int, int]:
  return _VARIANTS[checks.choice("variant", letter, _VARIANTS)]


def encoder(variant: str = "T", num_classes: int = 1000, **overrides: Any) -> Encoder:
  """Classifier T, S, B or L: 3,506,014, 25,507,582, 45,020,682 or 80,985,272 parameters for 1000 classes."""
  return Encoder(**{"num_classes": num_classes, **_variant(variant)[0], **overrides})


def segmenter(variant: str = "T", num_classes: int = 150, **overrides: Any) -> SegMAN:
  """SegMAN-T, S, B or L: 6,397,260, 29,424,636, 51,802,820 or 92,335,734 parameters for 150 classes.

  Args:
    variant: letter.
    num_classes: K.
    **overrides: fields of the encoder; precision and `axis_name` also of the decoder.
  """
  _, width, map_width = _variant(variant)
  both = {name: overrides[name] for name in ("dtype", "param_dtype", "axis_name") if name in overrides}
  return SegMAN(encoder(variant, 0, **overrides), Decoder(num_classes, width, map_width, **both))


def from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Official weights of a segmenter, names `backbone.*` and `decode_head.*`, as flax variables of `SegMAN`.

  Args:
    state_dict: official names -> NumPy arrays or tensors.

  Returns:
    {"params", "batch_stats"}, each {"encoder", "decoder"}.

  Raises:
    ValueError: names missing, left over or misshaped, all in one message.
  """
  backbone, head = "backbone.", "decode_head."
  names = [name.removeprefix(backbone) for name in state_dict if name.startswith(backbone)]
  table = {}
  for part, prefix, rules in (("encoder", backbone, _encoder_table(names)), ("decoder", head, _decoder_table())):
    for path, rule in rules.items():
      table[f"params/{part}/{path}"] = tuple(leaf._replace(source=prefix + leaf.source) for leaf in rule)
  return interop.variables(state_dict, table, ignore=_BUFFERS)


def encoder_from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Official weights of an encoder, with or without classifier, as flax variables of `Encoder`.

  Args:
    state_dict: official names -> NumPy arrays or tensors.

  Returns:
    {"params", "batch_stats"}.

  Raises:
    ValueError: names missing, left over or misshaped, all in one message.
  """
  rules = {f"params/{path}": rule for path, rule in _encoder_table(state_dict).items()}
  return interop.variables(state_dict, rules, ignore=_BUFFERS)


def decoder_from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Official weights of the decoder as flax variables of `Decoder`; arguments, result and errors as the encoder's."""
  return interop.variables(state_dict, {f"params/{path}": rule for path, rule in _decoder_table().items()})


_BUFFERS = ("*.rope.angle",)  # computed here


def _encoder_table(names: Collection[str]) -> dict[str, interop.Rule]:
  """As deep, and with scales and a classifier or without, as the names say."""
  depths = [0] * 4
  for name in names:
    match = re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name)
    if match and int(match[1]) in (0, 2, 4, 6):
      depths[int(match[1]) // 2] = max(depths[int(match[1]) // 2], int(match[2]) + 1)
  table: dict[str, interop.Rule] = {}
  for n, place in enumerate((0, 3, 6, 9), start=1):
    table[f"stem_conv{n}"] = interop.conv(f"patch_embed.{place}", bias=False)
    table[f"stem_norm{n}"] = interop.batch_norm(f"patch_embed.{place + 1}")
  for i, depth in enumerate(depths):
    if i:
      table[f"stage{i + 1}_conv"] = interop.conv(f"layers.{2 * i - 1}.0", bias=False)
      table[f"stage{i + 1}_norm"] = interop.batch_norm(f"layers.{2 * i - 1}.1")
    for j in range(depth):
      name, path = f"layers.{2 * i}.blocks.{j}", f"stage{i + 1}_block{j}"
      table |= {f"{path}/{key}": rule for key, rule in _block_table(name).items()}
      mixer = f"{name}.token_mixer"
      table |= {
        f"{path}/mixer/qkv": interop.dense(f"{mixer}.qkv", spatial=2),
        f"{path}/mixer/lepe": interop.conv(f"{mixer}.lepe"),
        f"{path}/mixer/proj": interop.dense(f"{mixer}.proj", spatial=2),
        f"{path}/mixer/local_bias": interop.raw(f"{mixer}.rpb.0"),
      }
      if i == len(depths) - 1:
        table[f"{path}/mixer/global_bias"] = interop.raw(f"{mixer}.rpb.1")
      else:
        table |= {
          f"{path}/mixer/conv": interop.conv(f"{mixer}.dwconv.0"),
          f"{path}/mixer/conv_norm": interop.batch_norm(f"{mixer}.dwconv.1"),
          f"{path}/mixer/norm": interop.norm(f"{mixer}.norm"),
          **{f"{path}/mixer/scan/{key}": rule for key, rule in _scan_table(f"{mixer}.ssm").items()},
        }
      for n in (1, 2):
        if f"{name}.layer_scale{n}.weight" in names:
          table[f"{path}/scale{n}"] = interop.raw(
            f"{name}.layer_scale{n}.weight", lambda w: w.reshape(-1), lambda s: s.reshape(-1, 1, 1, 1)
          )
          table[f"{path}/shift{n}"] = interop.raw(f"{name}.layer_scale{n}.bias")
  if "classifier.0.weight" in names:
    table |= {
      "head_proj": interop.dense("classifier.0", spatial=2),
      "head_norm": interop.batch_norm("classifier.1"),
      "head": interop.dense("classifier.4", spatial=2),
    }
  return table


def _decoder_table() -> dict[str, interop.Rule]:
  block = _block_table("vssm") | {f"mixer/{k}": rule for k, rule in _scan_table("vssm.token_mixer").items()}
  table: dict[str, interop.Rule] = {
    **{f"map{i}": interop.dense(f"linear_c{i}.proj") for i in (2, 3, 4)},
    **{f"block/{path}": rule for path, rule in block.items()},
    "head": interop.dense("conv_seg", spatial=2),
  }
  convs = {
    "fuse": "linear_fuse", "pool": "image_pool.1", "half": "conv_downsample_2", "quarter": "conv_downsample_4",
    "reduce4": "reduce_channels.0", "reduce2": "reduce_channels.1", "reduce1": "reduce_channels.2",
    "short": "short_path", "spread": "proj_out", "join": "cat",
  }  # fmt: skip
  for path, name in convs.items():
    square = path in ("half", "quarter")
    rule = interop.conv(f"{name}.conv", bias=False) if square else interop.dense(f"{name}.conv", False, spatial=2)
    table |= {path: rule, f"{path}_norm": interop.batch_norm(f"{name}.bn")}
  return table


def _block_table(name: str) -> dict[str, interop.Rule]:
  return {
    "position1": interop.conv(f"{name}.cpe1"),
    "position2": interop.conv(f"{name}.cpe2"),
    "norm1": interop.norm(f"{name}.norm1"),
    "norm2": interop.norm(f"{name}.norm2"),
    "mlp/fc1": interop.dense(f"{name}.mlp.fc1", spatial=2),
    "mlp/conv": interop.conv(f"{name}.mlp.dwconv"),
    "mlp/fc2": interop.dense(f"{name}.mlp.fc2", spatial=2),
  }


def _scan_table(name: str) -> dict[str, interop.Rule]:
  """Of four orders; their projections are the rows of one 1x1 convolution."""
  return {
    "x_proj": interop.raw(
      f"{name}.x_proj_weight",
      lambda w: w.reshape(4, -1, w.shape[1]).swapaxes(1, 2),
      lambda k: k.swapaxes(1, 2).reshape(-1, k.shape[1], 1),
    ),
    "dt_proj": interop.raw(f"{name}.dt_projs_weight", lambda w: w.swapaxes(1, 2), lambda k: k.swapaxes(1, 2)),
    "dt_bias": interop.raw(f"{name}.dt_projs_bias"),
    "A_log": interop.raw(f"{name}.A_logs", lambda a: a.reshape(4, -1, a.shape[1]), lambda a: a.reshape(-1, a.shape[2])),
    "D": interop.raw(f"{name}.Ds", lambda d: d.reshape(4, -1), lambda d: d.reshape(-1)),
  }
