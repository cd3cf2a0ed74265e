"""ScaleLong: multipliers on the long skip connections of a diffusion network keep its training steady.

A denoiser shaped like a U keeps the feature h_i of each encoder block and hands it to the decoder block at the same
level. ScaleLong hands on k_i h_i instead, where i = 1 is the outermost pair and N the number of pairs:

    "none"          k_i = 1
    "inv_sqrt2"     k_i = 2^(-1/2)
    "constant"      k_i = kappa^(i - 1), so the deepest skip gets the smallest multiplier                      (CS)
    "learned"       k_i = sigmoid(W_2 ReLU(W_1 mean(h_i) + b_1) + b_2), one small network for all skips        (LS)
    "learned_each"  the same with a network for each skip                                          (LS, non-shared)

Norms of features and gradients and the answer to a perturbed input of an unscaled network grow with the sum of k_i^2
over skips, which for CS stays below 1 / (1 - kappa^2) at any depth.

Huang, Zhou, Yan and Lin, "ScaleLong: Towards More Stable Training of Diffusion Model via Scaling Network Long Skip
Connection", NeurIPS 2023, arXiv:2310.13545; code `sail-sg/ScaleLong`. Its modes 0 to 4 are the five above, in order;
kappa_i there is k_i, r is `REDUCTION`.

    skips     the multipliers: `SkipScaling`, `multipliers`
    uvit      `UViT`, a vision transformer with long skips, its published variants and `from_torch`
    unet      `UNet`, the convolutional network of DDPM
    toy       `toy_unet`, on which the paper's bounds are exact laws, and `skip_norm_prediction`

The diffusion process, its samplers and its training are in `jaxlab.nn.diffusion` and `jaxlab.train.diffusion`; these
networks receive `TIME_SCALE` times t.

Differs from the official code: it has no convolutional network. How the paper shares one LS network among skips of
several widths there is not said; `UNet` has one for each width. The biases of U-ViT's two convolutions start at zero.
"""

from jaxlab.models.scalelong.skips import REDUCTION, Scaling, SkipScaling, multipliers
from jaxlab.models.scalelong.toy import ToyUNet, init_toy_unet, skip_norm_prediction, toy_unet
from jaxlab.models.scalelong.unet import UNet, ddpm_cifar10, ddpm_weight_table, from_ddpm
from jaxlab.models.scalelong.uvit import (
  TIME_SCALE,
  UViT,
  celeba64,
  cifar10,
  coco256,
  from_torch,
  imagenet64,
  imagenet256,
  weight_table,
)

__all__ = [
  "REDUCTION",
  "TIME_SCALE",
  "Scaling",
  "SkipScaling",
  "ToyUNet",
  "UNet",
  "UViT",
  "celeba64",
  "cifar10",
  "coco256",
  "ddpm_cifar10",
  "ddpm_weight_table",
  "from_ddpm",
  "from_torch",
  "imagenet64",
  "imagenet256",
  "init_toy_unet",
  "multipliers",
  "skip_norm_prediction",
  "toy_unet",
  "weight_table",
]
