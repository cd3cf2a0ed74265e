"""LAGNN: a node's neighbours are imagined from its own features, and the network sees the imagined ones too.

    p(x_j | x_i) ~ CVAE trained on all edges j -> i          generated = rownorm(decoder(z, X)),  z ~ N(0, I) per node
    H = [relu(A G_1 W_1), ..., relu(A G_c W_c), relu(A X W)],   logits = A H V                            (LA-GCN)
    loss = mean_s NLL(P_s) + lambda mean_s |P_s - sharpen(mean_s P_s)|^2       over S fresh draws of z a step

Liu, Ying, Dong, Li, Xu, Rong, Zhao, Huang and Wu, "Local Augmentation for Graph Neural Networks", ICML 2022,
arXiv:2109.03856; code `SongtaoLiu0823/LAGNN`. Symbols: A is the operator of a graph with symmetric normalisation and
self-loops, X the row-normalised features, G_i (the paper's X bar) generated ones, c is `generated.shape[0]`, S is
`samples`, T is `temperature`, lambda is `consistency`.

    cvae          the generator: `CVAE`, `negative_elbo`, `generate`
    selector      when to stop training it: a scout network's disagreement U, as the Learner `selection`
    networks      LA-GCN, LA-GAT, LA-GCNII, the OGB networks (GCN, SAGE, "average") and GRAND's MLP
    training      consistency training of any of them as a Learner; the published recipes
    weights       `from_torch`

The decoder learns a neighbour from a centre but is used with each node as the centre: row i of G is an invented
neighbour of i, in the place of i.

Differs from the paper: U is the code's quantity, see `uncertainty`. Differs from the official code: edges are
indexed in each batch, not copied into two matrices [E, F]; BCE is computed from logits and so never clamped; the best
epoch keeps the key of its draws, from which the same draws follow, in place of the draws; for LA-GCNII it keeps those
that gave the lowest loss (the official script draws once to measure and once more to keep); in the OGB form generation
uses the running statistics of batch normalisation (the official pickles are in training mode and use those of the
batch; `generate(..., batch_statistics=True)` does that), whose remembered variance is the biased one.
"""

from jaxlab.graph.nets.local_augmentation.cvae import CVAE, Generator, generate, negative_elbo, row_normalize
from jaxlab.graph.nets.local_augmentation.networks import (
  GRANDMLP,
  LAGAT,
  LAGCN,
  LAGCNII,
  LAOGB,
  official_init,
  random_propagation,
)
from jaxlab.graph.nets.local_augmentation.selector import Pairs, Scout, pairs, selection, uncertainty
from jaxlab.graph.nets.local_augmentation.training import (
  RECIPES,
  Batch,
  Recipe,
  Views,
  augmented,
  batch,
  consistency_loss,
  grand,
  learner,
)
from jaxlab.graph.nets.local_augmentation.weights import from_torch

__all__ = [
  "CVAE",
  "GRANDMLP",
  "LAGAT",
  "LAGCN",
  "LAGCNII",
  "LAOGB",
  "RECIPES",
  "Batch",
  "Generator",
  "Pairs",
  "Recipe",
  "Scout",
  "Views",
  "augmented",
  "batch",
  "consistency_loss",
  "from_torch",
  "generate",
  "grand",
  "learner",
  "negative_elbo",
  "official_init",
  "pairs",
  "random_propagation",
  "row_normalize",
  "selection",
  "uncertainty",
]
