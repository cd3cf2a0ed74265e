"""TAS: a network pruned by a search for the width of every convolution and the depth of every stage.

All networks share the weights of the full one. For each batch two widths c_j of a convolution are drawn, and depths are
mixed, by Gumbel noise u at a falling temperature tau:

    l = (log_softmax(a) + u) / tau,   p = softmax(l)
    j1, j2 ~ p without replacement,   w = softmax(l[j1, j2])                    widths
    y = sum_j w_j CWI(BN_j(conv(x)[:c_j]), max c_j)                             `MixedConv`
    x = sum_k p_k CWI(x_k, max c_k)                                             after a stage, over its depths

CWI, channel-wise interpolation, is adaptive average pooling along channels. Weights descend on one half of the training
set; then the logits a descend on the other half, with a cost of multiplications (F the most likely network's, E_F the
expected, T the target):

    CE + lambda { -log E_F if F < T - tolerance;  log E_F if F > T;  0 otherwise }

The most likely widths and depths are trained from scratch on labels and on the full network's softened outputs.

    space = resnet(32)
    tx = local.sgd(rate, weight_decay=5e-4)
    search = search_learner(SearchNetwork(space), tx, architecture_optimizer(), tau, ratio=0.5)
    genotype = extract(space, state.found)                  # does it meet the target? on_target(space, genotype, ...)
    student = distilled_learner(DerivedNetwork(space, genotype), tx, teacher, teacher_variables)

`SearchState.found` is the last architecture whose F was within the tolerance; `architecture` is the last of all, as in
the paper. For the best one evaluated, `extract` after each evaluation. What the authors found is in `reference`.

Dong and Yang, "Network Pruning via Transformable Architecture Search", NeurIPS 2019, arXiv:1905.09717. Official code:
`D-X-Y/AutoDL-Projects`. Symbols: alpha and beta, the logits, are `Architecture.widths` and `.depths`; lambda is
`cost_weight`; R is `ratio`.

Shapes are static: images have the full width with zeros beyond their channels, and as all eight BN_j see one output,
batch statistics are computed once and normalisation, alignment and mixture are one matrix after the convolution.

Differs from the paper, as the official code does: tau falls by a cosine from 5 to 0.1, not linearly from 10.
Differs from the official code:
- Multiplications are counted one by one, not in millions, which adds a constant to the cost.
- Pixels are averaged over the whole last image, not over 8 x 8: the same for images of 32 x 32.
- The architecture's step differentiates by the logits alone, not also by weights whose gradients are then dropped.
- `DerivedNetwork`'s running variances are the biased ones; PyTorch's are n / (n - 1) of that.
As there, a bottleneck's inserted shortcut has no normalisation. ImageNet's networks are not here; the experiment is on
CIFAR-10, with no option for CIFAR-100.
"""

from jaxlab.learning.transformable_search.derived import DerivedNetwork, derived_from_torch
from jaxlab.learning.transformable_search.learner import (
  DistilledState,
  SearchState,
  architecture_optimizer,
  cost,
  distilled_learner,
  knowledge_transfer,
  on_target,
  search_learner,
  temperature,
)
from jaxlab.learning.transformable_search.search import (
  MixedConv,
  Sample,
  SearchNetwork,
  from_torch,
  interpolation,
  sample,
)
from jaxlab.learning.transformable_search.space import (
  REFERENCES,
  Architecture,
  Genotype,
  Space,
  depth_choices,
  expected_macs,
  extract,
  found_macs,
  initial,
  macs,
  random,
  reference,
  resnet,
  uniform,
  width_choices,
)

__all__ = [
  "REFERENCES", "Architecture", "DerivedNetwork", "DistilledState", "Genotype", "MixedConv", "Sample", "SearchNetwork",
  "SearchState", "Space", "architecture_optimizer", "cost", "depth_choices", "derived_from_torch", "distilled_learner",
  "expected_macs", "extract", "found_macs", "from_torch", "initial", "interpolation", "knowledge_transfer", "macs",
  "on_target", "random", "reference", "resnet", "sample", "search_learner", "temperature", "uniform",
  "width_choices",
]  # fmt: skip
