"""DAGNN: predict once with an MLP, propagate the predictions K hops, and keep of each hop what a gate lets through.

    Z = MLP(X),   H_0 = Z,   H_k = A H_{k-1},   logits_i = sum_{k=0..K} sigmoid(H_k[i] . s + b) H_k[i]

Liu, Gao and Ji, "Towards Deeper Graph Neural Networks", KDD 2020, arXiv:2007.09296; code `divelab/DeeperGNN`.
Symbols: A is the operator of a graph with symmetric normalisation and self-loops (`structure.normalize`), K is `hops`,
(s, b) is `gate`, one for all nodes and hops. The receptive field grows with K and the parameters do not, so a large K
does not over-smooth: see `stationary_direction`, `second_eigenvalue` and `smoothness` for the paper's account of that.

Differs from the paper: the gate has a bias, as in the official code. Differs from the official code: returns logits,
not their log-softmax; one class or one node work; the variance that batch normalisation remembers is the biased one.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np
import scipy.sparse.linalg
from jaxtyping import Array, Float

from jaxlab import checks, interop, kernels
from jaxlab.graph import layers, sparse, structure
from jaxlab.nn.initializers import torch_bias, torch_kernel


class Features(NamedTuple):
  """What is behind the logits: logits[n] = sum_k gates[n, k] hops[n, k]."""

  hops: Float[Array, "n k1 c"]
  gates: Float[Array, "n k1"]


class DAGNN(nn.Module):
  """Node classifier.

  Attributes:
    num_classes: C.
    hops: K, number of propagation steps; 0 is a gated MLP.
    hidden: width of the MLP's hidden layer.
    dropout: rate in training, on the hidden layer and (without `batch_norm`) on the input.
    batch_norm: the ogbn-arxiv form: batch normalisation before the ReLU, no dropout on the input.
    axis_name: device axis over which batch statistics are averaged.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  num_classes: int
  hops: int = 10
  hidden: int = 64
  dropout: float = 0.8
  batch_norm: bool = False
  axis_name: str | None = None
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(
    self,
    graph: jraph.GraphsTuple,
    operator: sparse.Operator | None = None,
    *,
    train: bool = False,
    features: bool = False,
  ) -> Float[Array, "n c"] | tuple[Float[Array, "n c"], Features]:
    """Class scores of every node.

    Args:
      graph: `nodes` [N, F], dense or a `sparse.Operator`; `edges` [E] from `structure.normalize`. Padding is ignored.
      operator: `sparse.operator(graph)`, made once where the same graph is used again; default made here.
      train: draws dropout (stream "dropout") and updates batch statistics.
      features: also return hops and gates, which takes K + 1 times the memory.

    Returns:
      Logits [N, C], and `Features` if asked for.

    Raises:
      ValueError: while tracing, if the graph has no node features or no weights, or an attribute is out of range.
    """
    self._check(graph, operator)
    x = graph.nodes
    if not self.batch_norm:
      x = layers.Dropout(self.dropout)(x, train=train)
    x = layers.Linear(self.hidden, dtype=self.dtype, param_dtype=self.param_dtype, name="hidden_layer")(x)
    if self.batch_norm:
      norm = nn.BatchNorm(
        not train, momentum=0.9, dtype=self.dtype, param_dtype=self.param_dtype, axis_name=self.axis_name, name="norm"
      )
      x = norm(x, mask=structure.node_mask(graph)[:, None])
    x = layers.Dropout(self.dropout, relu=True)(x, train=train)
    z = layers.Linear(self.num_classes, dtype=self.dtype, param_dtype=self.param_dtype, name="classifier")(x)
    if operator is None:
      operator = layers.as_operator(graph, z)
    logits, seen = AdaptivePropagation(self.hops, self.param_dtype, name="gate")(operator, z, features=features)
    return logits if seen is None else (logits, seen)

  def _check(self, graph, operator):
    for name, low in (("num_classes", 1), ("hops", 0), ("hidden", 1)):
      checks.count(name, getattr(self, name), low)
    checks.rate("dropout", self.dropout)
    shape = getattr(graph.nodes, "shape", None)
    if shape is None or len(shape) != 2:
      raise ValueError(f"graph: got nodes of shape {shape}, expected features [N, F]")
    if operator is None and getattr(graph.edges, "ndim", 0) != 1:
      raise ValueError("graph: got edges without weights, expected [E] from structure.normalize")
    if operator is not None and operator.shape != (shape[0], shape[0]):
      raise ValueError(f"operator: got shape {operator.shape}, expected {(shape[0], shape[0])}, one row per node")


class AdaptivePropagation(nn.Module):
  """sum_{k=0..K} sigmoid(H_k s + b) * H_k with H_k = A^k Z: the part of DAGNN that sees the graph.

  Attributes:
    hops: K.
    param_dtype: parameter dtype.
  """

  hops: int
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(
    self, operator: sparse.Operator, z: Float[Array, "n c"], *, features: bool = False
  ) -> tuple[Float[Array, "n c"], Features | None]:
    """Sums on the fly, so that K hops need the memory of one unless `features` asks for all of them."""
    classes = z.shape[-1]
    s = self.param("kernel", torch_kernel, (classes, 1), self.param_dtype)
    b = self.param("bias", torch_bias(classes), (1,), self.param_dtype)

    # H_k s = A^k (Z s): the score propagates beside the classes as one more column, and no hop multiplies by s.
    scored = jnp.concatenate([z, (z.astype("float32") @ jnp.asarray(s, "float32")).astype(z.dtype)], -1)

    def gate(h):
      return nn.sigmoid(h[:, -1:].astype("float32") + b)  # [N, 1]

    def hop(carry, _):
      h, total = carry
      h = sparse.propagate(operator, h)
      g = gate(h)
      return (h, total + _gated(g, h)), (h[:, :-1], g[:, 0]) if features else None

    first = gate(scored)
    # Unrolled, since a loop copies every hop into a stack for the gradient, which on CPU takes as long as the hop.
    (_, total), seen = jax.lax.scan(hop, (scored, _gated(first, scored)), length=self.hops, unroll=10)
    total = total[:, :-1]
    if features:
      hops, gates = (jnp.concatenate([a[None], b]) for a, b in zip((z, first[:, 0]), seen, strict=True))
      seen = Features(jnp.moveaxis(hops, 0, 1), gates.T)
    return total.astype(z.dtype), seen


@jax.custom_vjp
def _gated(gate, h):
  """gate * h: [N, 1], [N, C]. Its gradient adds up a few columns, which XLA's reduction on CPU is slow at."""
  return gate * h


def _gated_gradient(saved, g):
  gate, h = saved
  return kernels.added((g * h).T)[:, None].astype(gate.dtype), (g * gate).astype(h.dtype)


_gated.defvjp(lambda gate, h: (_gated(gate, h), (gate, h)), _gated_gradient)


# -------------------------------------------------------------------------------------------------- published variants


class Recipe(NamedTuple):
  """How a variant is trained: Adam on the whole graph, mean cross-entropy on training nodes.

  Attributes:
    learning_rate: of Adam.
    l2: coefficient of the L2 term, added to the gradient of every parameter before Adam's moments (not AdamW).
    epochs: most steps.
    patience: after half of the epochs, stop once the validation loss exceeds the mean of this many before it; 0 never.
  """

  learning_rate: float = 0.01
  l2: float = 0.0
  epochs: int = 1000
  patience: int = 100


# The paper's table of hyper-parameters, as the official `run.sh` and `main_ogbnarxiv.py` set them.
RECIPES = {
  "cora": Recipe(l2=0.005),
  "citeseer": Recipe(l2=0.02),
  "pubmed": Recipe(l2=0.005),
  "coauthor_cs": Recipe(),
  "coauthor_physics": Recipe(),
  "amazon_computers": Recipe(l2=5e-5, epochs=3000, patience=300),
  "amazon_photo": Recipe(l2=5e-4),
  "arxiv": Recipe(learning_rate=0.005, patience=0),
}


def cora(**changes: Any) -> DAGNN:
  """Cora, 1433 features: 84.4 % on the fixed split. Parameters 92,239."""
  return DAGNN(**{"num_classes": 7, "hops": 10, "dropout": 0.8} | changes)


def citeseer(**changes: Any) -> DAGNN:
  """CiteSeer, 3703 features: 73.3 % on the fixed split. Parameters 237,453."""
  return DAGNN(**{"num_classes": 6, "hops": 10, "dropout": 0.5} | changes)


def pubmed(**changes: Any) -> DAGNN:
  """PubMed, 500 features: 80.5 % on the fixed split. Parameters 32,263."""
  return DAGNN(**{"num_classes": 3, "hops": 20, "dropout": 0.8} | changes)


def coauthor_cs(**changes: Any) -> DAGNN:
  """Coauthor CS, 6805 features."""
  return DAGNN(**{"num_classes": 15, "hops": 5, "dropout": 0.8} | changes)


def coauthor_physics(**changes: Any) -> DAGNN:
  """Coauthor Physics, 8415 features."""
  return DAGNN(**{"num_classes": 5, "hops": 5, "dropout": 0.8} | changes)


def amazon_computers(**changes: Any) -> DAGNN:
  """Amazon Computers, 767 features, largest component."""
  return DAGNN(**{"num_classes": 10, "hops": 5, "dropout": 0.5} | changes)


def amazon_photo(**changes: Any) -> DAGNN:
  """Amazon Photo, 745 features, largest component."""
  return DAGNN(**{"num_classes": 8, "hops": 5, "dropout": 0.5} | changes)


def arxiv(**changes: Any) -> DAGNN:
  """ogbn-arxiv, 128 features, edges made undirected: 72.09 % test. Parameters 43,857."""
  return DAGNN(**{"num_classes": 40, "hops": 16, "hidden": 256, "dropout": 0.2, "batch_norm": True} | changes)


_WEIGHTS = {
  "params/hidden_layer": interop.dense("lin1"),
  "params/classifier": interop.dense("lin2"),
  "params/gate": interop.dense("prop.proj"),
}


def from_torch(state_dict: dict[str, Any]) -> dict[str, Any]:
  """Official weights (`Net.state_dict()` of either script) as flax variables.

  Raises:
    ValueError: listing every missing, unused or misshaped tensor.
  """
  norm = {"params/norm": interop.batch_norm("bn")} if "bn.weight" in state_dict else {}
  return interop.variables(state_dict, _WEIGHTS | norm)


# --------------------------------------------------------------------------------- what propagation does in the limit


def stationary(graph: jraph.GraphsTuple) -> Float[np.ndarray, " n"]:
  """Host. pi = d / sum(d), d counting the self-loop: every row of (D^-1 (A + I))^k for k to infinity.

  Args:
    graph: connected and undirected, weights not normalised.
  """
  degree = structure.to_scipy(structure.add_self_loops(graph)).sum(axis=1)
  return degree / degree.sum()


def stationary_direction(graph: jraph.GraphsTuple) -> Float[np.ndarray, " n"]:
  """Host. phi = sqrt(pi), so that (D^-1/2 (A + I) D^-1/2)^k tends to phi phi^T."""
  return np.sqrt(stationary(graph))


def second_eigenvalue(graph: jraph.GraphsTuple) -> float:
  """Host. |lambda_2| of D^-1/2 (A + I) D^-1/2, second largest modulus: the distance to the limit is |lambda_2|^k.

  Args:
    graph: undirected with at least two nodes, weights not normalised.

  Raises:
    ValueError: if the graph is not symmetric or too small.
  """
  if not structure.is_symmetric(graph) or structure.num_nodes(graph) < 2:
    raise ValueError("graph: got a directed graph or a single node, expected an undirected graph of two or more")
  matrix = structure.to_scipy(structure.normalize(graph)).astype("float64")
  if matrix.shape[0] <= 500:
    values = np.linalg.eigvalsh(matrix.toarray())
  else:
    values = scipy.sparse.linalg.eigsh(matrix, k=2, which="LM", return_eigenvectors=False)
  return float(np.sort(np.abs(values))[-2])


def smoothness(x: Float[Array, "n c"]) -> Float[Array, " n"]:
  """SMV_i = mean over j != i of |x_i / |x_i| - x_j / |x_j|| / 2; 0 is fully smoothed.

  Its mean over i is the paper's SMV_G. A row of zeros stays zero. Takes N^2 C operations, in blocks of rows.

  Args:
    x: features of two or more nodes.

  Raises:
    ValueError: x of another rank or of fewer nodes.
  """
  if x.ndim != 2 or len(x) < 2:
    raise ValueError(f"x: got shape {x.shape}, expected [N, C] with N at least 2, or no node has another")
  x = x.astype("float32")
  unit = x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), jnp.finfo("float32").tiny)
  distance = jax.lax.map(lambda u: jnp.sum(jnp.linalg.norm(unit - u, axis=1)) / 2, unit, batch_size=64)
  return distance / (x.shape[0] - 1)
