"""The published settings: a builder for each network, its recipe, and what the recipes are made of."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxlab.graph.nets.sir_gcn.networks import SIRGCN, DictionaryLookup, HeteroEdgeCount, PreNormSIRGCN


class Recipe(NamedTuple):
  """How a variant is trained: AdamW on loss + l1 sum |w| + l2 sum w^2 over all parameters.

  The rate rises linearly over `warmup` epochs and is halved where the training loss, in evaluation mode, has not
  improved for more than `patience` epochs (`next_rate`). The epoch of lowest validation loss counts.

  Attributes:
    learning_rate: after the warm-up.
    epochs: over the training set.
    batch_size: graphs a step; 0 for the whole graph.
    weight_decay: decoupled, as AdamW's, on all parameters.
    l1, l2: see above.
    patience, warmup: see above.
  """

  learning_rate: float = 1e-3
  epochs: int = 200
  batch_size: int = 128
  weight_decay: float = 0.0
  l1: float = 0.0
  l2: float = 0.0
  patience: int = 10
  warmup: int = 10


_SYNTHETIC = Recipe(epochs=500, batch_size=256, warmup=0)  # and stops where training and test loss are below 1e-3
_HETEROPHILOUS = Recipe(3e-5, 1000, 0, patience=1000)
_SUPERPIXELS = Recipe(l1=1e-6, l2=1e-6)
_SBM = Recipe(l1=1e-7, l2=1e-7)
RECIPES = {
  "dictionary_lookup": _SYNTHETIC,
  "hetero_edge_count": _SYNTHETIC,
  "roman_empire": _HETEROPHILOUS,
  "amazon_ratings": _HETEROPHILOUS,
  "minesweeper": _HETEROPHILOUS,
  "tolokers": _HETEROPHILOUS,
  "questions": _HETEROPHILOUS,
  "arxiv": Recipe(1e-2, 1000, 0, weight_decay=1e-3, patience=40, warmup=20),  # on `log_cross_entropy`
  "molhiv": Recipe(epochs=100, batch_size=64, weight_decay=1e-4),
  "zinc": Recipe(epochs=500, l1=1e-7, l2=1e-7),  # on the absolute error
  "mnist": _SUPERPIXELS,
  "cifar10": _SUPERPIXELS,
  "pattern": _SBM,
  "cluster": _SBM,
  "wikics": Recipe(batch_size=0, l1=1e-5, l2=1e-5),
}


def dictionary_lookup(size: int = 10, **changes: Any) -> DictionaryLookup:
  """DictionaryLookup of n keys, n in 10, 20, .. 50: 100 %. Parameters 7,800 / 30,800 / 69,000 / 122,400 / 191,000."""
  return DictionaryLookup(**{"size": size, "hidden": 4 * size} | changes)


def hetero_edge_count(num_classes: int = 2, **changes: Any) -> HeteroEdgeCount:
  """HeteroEdgeCount of c classes, c in 2, 4, .. 10. Parameters 1,300 / 5,080 / 11,340 / 20,080 / 31,300."""
  return HeteroEdgeCount(**{"num_classes": num_classes, "hidden": 10 * num_classes} | changes)


def _pre_norm(outputs, hidden, depth, aggregation, norm, changes):
  options = {"num_outputs": outputs, "hidden": hidden, "depth": depth, "aggregation": aggregation, "norm": norm}
  return PreNormSIRGCN(**options | changes)


def roman_empire(**changes: Any) -> PreNormSIRGCN:
  """roman-empire, 300 features: accuracy 87.67 %. Parameters 5,420,050."""
  return _pre_norm(18, 512, 5, "max", "layer", changes)


def amazon_ratings(**changes: Any) -> PreNormSIRGCN:
  """amazon-ratings, 300 features: accuracy 46.73 %. Parameters 869,125."""
  return _pre_norm(5, 256, 3, "max", "batch", changes)


def minesweeper(**changes: Any) -> PreNormSIRGCN:
  """minesweeper, 7 features: AUC 94.12 %. Parameters 1,319,937."""
  return _pre_norm(1, 256, 5, "sym", "batch", changes)


def tolokers(**changes: Any) -> PreNormSIRGCN:
  """tolokers, 10 features: AUC 82.85 %. Parameters 1,320,705."""
  return _pre_norm(1, 256, 5, "sym", "layer", changes)


def questions(**changes: Any) -> PreNormSIRGCN:
  """questions, 301 features: AUC 75.33 %. Parameters 3,309,569."""
  return _pre_norm(1, 512, 3, "sym", "layer", changes)


def _post_norm(outputs, hidden, depth, aggregation, encoder, residual, changes, **options):
  required = {"num_outputs": outputs, "hidden": hidden, "depth": depth, "aggregation": aggregation}
  return SIRGCN(**required | {"encoder": encoder, "residual": residual} | options | changes)


def arxiv(**changes: Any) -> SIRGCN:
  """ogbn-arxiv, 128 features, with reverse edges and self-loops: accuracy 72.52 %. Parameters 98,460."""
  return _post_norm(40, 95, 3, "sym", "linear", "identity", changes, dropout=0.2, message_dropout=0.2)


# Rows of OGB's tables: atomic number, chirality, degree, charge, hydrogens, radical electrons, hybridisation, aromatic,
# in a ring.
ATOM_FEATURES = (119, 5, 12, 12, 10, 6, 6, 2, 2)


def molhiv(**changes: Any) -> SIRGCN:
  """ogbg-molhiv: AUC 77.63 %. Parameters 96,201."""
  return _post_norm(
    1, 80, 4, "max", ATOM_FEATURES, "identity", changes,
    readout=(40, 20), pool="mean", pool_first=True, input_dropout=0.2, message_dropout=0.2,
  )  # fmt: skip


def zinc(**changes: Any) -> SIRGCN:
  """ZINC, 28 kinds of atoms: absolute error 0.278. Parameters 99,376."""
  return _post_norm(1, 75, 4, "sym", 28, "linear", changes, readout=(75,), pool="sum")


def _superpixels(changes):
  return _post_norm(
    10, 80, 4, "max", "none", "linear", changes,
    readout=(80, 80), pool="mean", message_dropout=0.1, branch_dropout=0.2,
  )  # fmt: skip


def mnist(**changes: Any) -> SIRGCN:
  """MNIST superpixels, 3 features: accuracy 97.90 %. Parameters 99,290."""
  return _superpixels(changes)


def cifar10(**changes: Any) -> SIRGCN:
  """CIFAR-10 superpixels, 5 features: accuracy 71.98 %. Parameters 99,770."""
  return _superpixels(changes)


def pattern(**changes: Any) -> SIRGCN:
  """PATTERN, 3 kinds of nodes: accuracy 85.75 %. Parameters 104,402."""
  return _post_norm(2, 80, 4, "sym", 3, "linear", changes)


def cluster(**changes: Any) -> SIRGCN:
  """CLUSTER, 7 kinds of nodes: accuracy 63.35 %. Parameters 105,046."""
  return _post_norm(6, 80, 4, "sym", 7, "linear", changes)


def wikics(**changes: Any) -> SIRGCN:
  """WikiCS, 300 features: accuracy 78.06 %. Parameters 102,610."""
  return _post_norm(
    10, 60, 4, "mean", "none", "linear", changes, input_dropout=0.3, dropout=0.1, branch_dropout=0.2
  )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ training


def penalty(params: Any, recipe: Recipe) -> Float[Array, ""]:
  """l1 sum |w| + l2 sum w^2 over all parameters, to be added to the loss."""
  each = [recipe.l1 * jnp.abs(p).sum() + recipe.l2 * (p**2).sum() for p in jax.tree.leaves(params)]
  return jnp.sum(jnp.stack(each), dtype="float32")


def log_cross_entropy(logits: Float[Array, "n c"], labels: Int[Array, " n"]) -> Float[Array, " n"]:
  """log(eps + CE) - log(eps) with eps = 1 - ln 2, of each node: the loss of ogbn-arxiv, which bounds outliers."""
  eps = 1 - jnp.log(2.0)
  each = optax.losses.softmax_cross_entropy_with_integer_labels(logits.astype("float32"), labels)
  return jnp.log(eps + each) - jnp.log(eps)


class Plateau(NamedTuple):
  """State of the learning rate: the rate of the coming epoch, the lowest loss, epochs since it was improved on."""

  rate: Float[Array, ""]
  lowest: Float[Array, ""]
  stale: Int[Array, ""]


def first_rate(recipe: Recipe) -> Plateau:
  """Before the first epoch."""
  rate = recipe.learning_rate / max(recipe.warmup, 1)
  return Plateau(jnp.float32(rate), jnp.float32(jnp.inf), jnp.int32(0))


def next_rate(state: Plateau, loss: Float[Array, ""], epochs: Int[Array, ""], recipe: Recipe) -> Plateau:
  """The rate after an epoch: torch's `ReduceLROnPlateau` by half, overwritten during the warm-up.

  Args:
    state: of the epoch that ended.
    loss: of the training set after it, in evaluation mode.
    epochs: how many have ended.
    recipe: patience, warm-up and rate.
  """
  better = loss < state.lowest * (1 - 1e-4)
  stale = jnp.where(better, 0, state.stale + 1)
  reduce = stale > recipe.patience
  rate = jnp.where(reduce, state.rate / 2, state.rate)
  warm = recipe.learning_rate * (epochs + 1) / max(recipe.warmup, 1)
  rate = jnp.where(epochs < recipe.warmup, warm, rate)
  return Plateau(rate, jnp.where(better, loss, state.lowest), jnp.where(reduce, 0, stale))
