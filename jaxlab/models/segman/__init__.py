"""SegMAN: a pyramid whose mixer chains neighbourhood attention and a four-way scan, and a decoder of one scan block.

    Mixer:   [q, k, v] = x W;  y = NA(rope(q), rope(k), v)
             stages 1-3: out = y + LN(SS2D(SiLU(BN(DWConv(y)))));   stage 4: out = softmax(rope(q) rope(k)^T + bias) y
             (out + DWConv(v)) W_proj
    Block:   x += DWConv(x);  x += Mixer(LN(x));  x += DWConv(x);  x += FFN(LN(x))
    MMSCopE: maps of strides 8, 16, 32 fused to f at stride 8;  M = block([f, f/2, f/4], all unshuffled to stride 32);
             logits from [f, mean(f), M, and each of the three maps + M]

Fu, Lou and Yu, "SegMAN: Omni-scale Context Modeling with State Space Models and Local Attention for Semantic
Segmentation", CVPR 2025, arXiv:2412.11890. Paper's terms: LASS is `Mixer`, NA is `nn.neighborhood_attention`, SS2D is
`nn.scan_2d` with one state a channel, MMSCopE is `Decoder`.

Differs from the official code: maps stay [B, H, W, C]; its `fused_na` path, which drops the bias, does not exist here;
running variances are biased (flax); the decoder starts as the encoder does, from truncated normals of deviation 0.02,
where the official head has the defaults of its libraries (He normals by fan-out before norms, deviation 0.01 for the
classifier, uniform elsewhere). Drop path of variant L is not published; ours is that of B.
"""

from jaxlab.models.segman.networks import Block, Decoder, Encoder, Mixer, Mlp, SegMAN, pixel_unshuffle
from jaxlab.models.segman.variants import decoder_from_torch, encoder, encoder_from_torch, from_torch, segmenter

__all__ = [
  "Block",
  "Decoder",
  "Encoder",
  "Mixer",
  "Mlp",
  "SegMAN",
  "decoder_from_torch",
  "encoder",
  "encoder_from_torch",
  "from_torch",
  "pixel_unshuffle",
  "segmenter",
]
