"""PaRot: point clouds described so that turning them changes nothing.

A cloud is cut into local patches (the nearest points of S sampled centres) and seen as a whole from each centre (a few
points of the cloud, relative to the centre). A small PointNet turns every patch into a feature f and two unit vectors
that should turn with the patch. Training shows it two random rotations R1, R2 of each patch and asks for vectors
d1 and d2 = d1 R1^T R2. With their cross product they make a frame O, and what frames say about each other and about an
offset v does not depend on the orientation of the cloud, by algebra alone:

    pose(O_a, O_b, v) = [||v||, O_a O_b^T, O_a v / ||v||, O_b v / ||v||]              16 numbers
    l_i = max_j MLP[f_j, f_j - f_i, embed(pose(O_j, O_i, q_j - q_i))]                 j: centres near centre i
    e   = max_i MLP[l_i, g_i, embed(pose(O^local_i, O^global_i, q_i))]                g: feature of the global patch

`PaRot` classifies e. `PaRotParts` labels points: e goes back to the centres, and from the centres nearest to a point p
to the point, with [||v||, O^local v / ||v||, O^global v / ||v||], v = p - q.

Zhang et al., "PaRot: Patch-Wise Rotation-Invariant Network via Feature Disentanglement and Pose Restoration", AAAI
2023, arXiv:2302.02331. So invariance has two sources: poses are invariant exactly, f and the frames as far as they have
learned to be. Points are rows, rotated as p R. The origin is part of the description: clouds must be centred.

Differs from the official code: where evaluation needs a first point to sample from, it is the one farthest from the
origin, not a random one, so that evaluation is deterministic; the running variance of batch normalisation is the biased
one (flax); maps of patches are reduced before the last normalisation and activation, which are monotone, and the first
layer of the aggregation over neighbours is computed a centre at a time, both the same function at less cost.
"""

from jaxlab.models.parot.geometry import (
  direction_loss,
  frame,
  normalize,
  orthogonality_loss,
  relative_pose,
  rotate,
  unrotate,
)
from jaxlab.models.parot.networks import (
  MLP,
  Disentangle,
  Encoder,
  Encoding,
  JointDense,
  PaRot,
  PaRotParts,
  Siamese,
  objective,
)
from jaxlab.models.parot.variants import classifier, from_torch, segmenter, weight_table

__all__ = [
  "MLP",
  "Disentangle",
  "Encoder",
  "Encoding",
  "JointDense",
  "PaRot",
  "PaRotParts",
  "Siamese",
  "classifier",
  "direction_loss",
  "frame",
  "from_torch",
  "normalize",
  "objective",
  "orthogonality_loss",
  "relative_pose",
  "rotate",
  "segmenter",
  "unrotate",
  "weight_table",
]
