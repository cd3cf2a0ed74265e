"""Lip-CROWN: upper bounds of a ReLU network's Lipschitz constant around a point, by linear bounds of its gradient.

    max_{x in box} ||d f_c / d x||_1  <=  max (kappa g_0) + offsets,   g_{k-1} = W_k^T (g_k D_k),   g_{n-1} = W_n[c]

with D_k the Clarke derivative of ReLU: 1 or 0 where the sign of z_k is the same all over the box, anything in [0, 1]
elsewhere. There g D lies between two lines in g, the hull of what it can be; |g_0| lies below a chord, its slope kappa.
Shi, Wang, Zhang, Kolter and Hsieh, "Efficiently Computing Local Lipschitz Constants of Neural Networks via Bound
Propagation", NeurIPS 2022, arXiv:2210.07394; code `shizhouxing/Local-Lipschitz-Constants` and
`Verified-Intelligence/auto_LiRPA`. Symbols: the box is all x within eps, `radius`, of x_0 in l_inf; (l_k, u_k) are the
`Bounds` of z_k that `forward` returns; alpha are the slopes that `optimize` chooses.

    net = (Conv(**params["Conv_0"], padding="VALID"), Dense(**params["Dense_0"]), Dense(**params["Dense_1"]))
    around = box(x, 0.05, clip=(0, 1))
    found = forward(net, around)              # or optimize(net, around)
    lipschitz(net, found).max()               # the constant from l_inf to l_inf; each output by itself before max
    jacobian(net, found), jvp(net, found, v)  # bounds of every partial derivative, and of those along v
    branch_and_bound(net, found, timeout=60)  # tighter, by cases
    monotonicity(net, x, features=[0, 3])     # where a derivative keeps its sign

| bound, from tight to loose | how |
|---|---|
| branch and bound | `branch_and_bound` |
| Lip-CROWN, with alpha or without | `lipschitz`, of `optimize` or `forward` |
| RecurJac | `lipschitz(..., method="recurjac")` |
| interval arithmetic | `forward(..., method="interval")` and `lipschitz(..., method="interval")` |
| product of norms | `global_bound` |

All but `branch_and_bound` are for one input and can be traced: `jax.vmap` them over inputs, `jax.jit` them. Bounds are
sound in exact arithmetic; roundoff is not bounded, and a z within it of 0 may pass for one of known sign. Use float64
where that matters; bfloat16 networks are bounded in float32 and the bounds rounded.

Differs from the paper and the official code: ReLU networks that are chains of dense and convolutional layers, norm
l_inf only; no bound of a smooth activation's derivative. All rows are bounded together. Branch and bound splits
the worst cases of all rows, where the official one gives each class a share of time; bounds of hidden gradients are
computed anew for a case, where the official ones stay those of the whole box. Official RecurJac uses its
constants behind ReLUs that always pass too, which is looser. Of the paper's networks the experiment trains perceptrons
with two hidden layers and a convolutional net of its own; those for CIFAR-10, TinyImageNet and Adult are not built
here, nor are their published numbers of parameters held against anything.
"""

from jaxlab.analysis.local_lipschitz.branch_and_bound import Search, branch_and_bound
from jaxlab.analysis.local_lipschitz.layers import Bounds, Conv, Dense, apply, box, from_torch, global_bound
from jaxlab.analysis.local_lipschitz.monotonicity import Monotonicity, monotonicity
from jaxlab.analysis.local_lipschitz.propagation import forward, jacobian, jvp, lipschitz, optimize

__all__ = [
  "Bounds",
  "Conv",
  "Dense",
  "Monotonicity",
  "Search",
  "apply",
  "box",
  "branch_and_bound",
  "forward",
  "from_torch",
  "global_bound",
  "jacobian",
  "jvp",
  "lipschitz",
  "monotonicity",
  "optimize",
]
