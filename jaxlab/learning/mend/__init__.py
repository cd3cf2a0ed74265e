"""MEND: small editor networks that turn the gradient of one desired answer into an edit of a trained network.

    x_t, d_t  = input of a dense layer and gradient of the edit loss at its output, for each token t
    z         = [(x_t - mean) / sd, (d_t - mean) / sd]
    z         = z + relu(scale_l * (U V z + b) + shift_l)              twice, U = 0 at first
    x~_t, d~_t = z split again
    W_l'      = W_l - alpha_l * sum_t d~_t x~_t^T

Mitchell, Lin, Bosselut, Finn and Manning, "Fast Model Editing at Scale", ICLR 2022, arXiv:2110.11309. Official code:
`eric-mitchell/mend`.

The gradient of a dense layer is the sum of outer products sum_t d_t x_t^T, so the editor never needs it as a matrix:
`factors.collect` gives x and d, `editor.Editor` maps them, and `factors.apply` runs the edited network on them as they
are, y = W x - alpha_l sum_t d~_t (x~_t^T x), without forming W' either. `factors.merge` forms W' to keep. Editors work
on any flax model's `nn.Dense` layers; `training.learner` trains one for a decoder language model.

The paper's symbols: u, delta or x, d are `Factors.inputs` and `Factors.deltas`; g_l is `GradientTransform`; U, V are
`up`, `down`; s_l, o_l are `scale`, `shift`; alpha_l is `step_sizes`; c_e is `edit_weight`; x_e, x_e' and x_loc are the
batch's `edit`, `paraphrase` and `locality`. In the code the last four are edit_lrs, cedit, edit_inner, edit_outer, loc.

Differs from the paper: b in both layers and V normal with deviation 1, as in the official code.
Differs from the official code:
- The update has the paper's minus sign. `Editor(sign=1)` is the code's plus, with which first edits go uphill.
- Statistics merge a step's tokens at once (Chan's formula), not one by one: the same up to rounding.
- A step computes its edit problems side by side, and all their tokens enter the statistics before the first is
  normalised; the code takes ten problems in turn and then one optimizer step.
- The loss of several edits is the sum of their mean losses, so that a batched edit is the sum of single edits as the
  paper says (for the same statistics and linear loss); the code's is the mean over all their tokens.
- The step sizes really have a learning rate of their own; the code builds that optimizer but its gradients are always
  zero. `optimizer(1e-6, step_size_rate=1e-6)` is what the code does.
- The code skips a problem whose gradient is not finite; here training stops, as everywhere in `train.fit`.
- Training ends after a given number of steps; the code stops when the validation loss no longer falls.
- Losses are those of decoder language models. The code's for a classifier (BERT on FEVER: Bernoulli KL) and for an
  encoder with a decoder (BART, T5) are not here; `Editor`, `collect`, `apply` and `merge` do work on such networks.
"""

from jaxlab.learning.mend.editor import Editor, GradientTransform, from_torch
from jaxlab.learning.mend.factors import Factors, apply, collect, dense_layers, merge
from jaxlab.learning.mend.fine_tuning import fine_tune
from jaxlab.learning.mend.training import EditorState, edit, kl_divergence, learner, optimizer

__all__ = [
  "Editor", "EditorState", "Factors", "GradientTransform", "apply", "collect", "dense_layers", "edit", "fine_tune",
  "from_torch", "kl_divergence", "learner", "merge", "optimizer",
]  # fmt: skip
