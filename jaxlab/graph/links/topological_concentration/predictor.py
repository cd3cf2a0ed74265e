"""The link predictor, GCN or GraphSAGE with an MLP on products of embeddings, and what re-weights its messages.

    H = encoder(X, A_w),    logit(i, j) = mlp(H_i * H_j)
    GCN:   H' = A_w X Theta + b,             w_rc = 1 / sqrt(d_r d_c)
    SAGE:  H' = A_w X Theta + b + X Theta',  w_rc = 1 / d_r            degrees d with the self-loop that each node gets

Re-weighting adds, for every centre i, alpha times the base weight of its messages, shared out by a softmax of scores:

    c = A_base H,   s_ij = sigmoid(mlp(c_i * H_j)),   g_ij = softmax_j(s_ij),   w'_ij = w_ij + alpha g_ij sum_j w_ij
"""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Float, Int

from jaxlab import checks, interop
from jaxlab.graph import layers, sparse
from jaxlab.graph.links.topological_concentration.measures import Receiver
from jaxlab.nn.initializers import torch_bias

Conv = Literal["gcn", "sage"]

# -------------------------------------------------------------------------------------------------------------- model


class WeightedSAGEConv(nn.Module):
  """y_i = sum_j w_ij x_j Theta + b + x_i Theta', with the stored weights: a mean if each row's sum is 1.

  Attributes:
    features: outputs.
    normalize: scale each output row to Euclidean length 1.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  features: int
  normalize: bool = False
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, operator: sparse.Operator, x: layers.Features) -> Float[Array, "n features"]:
    """[N, F] -> [N, features]."""
    linear = lambda name: layers.Linear(self.features, False, "torch", self.dtype, self.param_dtype, name=name)
    bias = self.param("bias", torch_bias(x.shape[-1]), (self.features,), self.param_dtype)
    y = sparse.propagate(operator, linear("neighbor")(x)) + linear("root")(x) + jnp.asarray(bias, self.dtype)
    if self.normalize:
      length = jnp.sqrt(jnp.sum(jnp.square(y.astype("float32")), axis=-1, keepdims=True) + 1e-24)
      y = (y / length).astype(self.dtype)
    return y


class Encoder(nn.Module):
  """Graph convolutions, ReLU and dropout between them, none after the last.

  Attributes:
    features: width of each.
    conv: "gcn" or "sage".
    num_layers: convolutions, 1 or more. The official option n_layers = 1 builds two.
    normalize: of "sage", each layer's rows have length 1.
    dropout: rate.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  features: int = 256
  conv: Conv = "gcn"
  num_layers: int = 2
  normalize: bool = False
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, operator: sparse.Operator, x: layers.Features, *, train: bool = False) -> Float[Array, "n h"]:
    """[N, F] -> [N, features]."""
    h: Any = x
    for i in range(self.num_layers):
      if self.conv == "gcn":
        conv: Any = layers.GCNConv(self.features, True, self.dtype, self.param_dtype, name=f"conv_{i}")
      else:
        conv = WeightedSAGEConv(self.features, self.normalize, self.dtype, self.param_dtype, name=f"conv_{i}")
      h = conv(operator, h)
      if i < self.num_layers - 1:
        h = layers.Dropout(self.dropout, relu=True)(h, train=train)
    return h


class LinkPredictor(nn.Module):
  """Encoder and scorer.

  Attributes:
    features: H, width of every layer.
    conv: "gcn" or "sage".
    num_layers: of the encoder and of the MLP; with L the MLP has L - 1 hidden layers.
    normalize: of "sage", each layer's rows have length 1.
    dropout: rate in the encoder.
    head_dropout: rate in the MLP.
    num_embeddings: rows of a table of width H, for graphs whose nodes are integer ids; None for features.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  features: int = 256
  conv: Conv = "gcn"
  num_layers: int = 2
  normalize: bool = False
  dropout: float = 0.0
  head_dropout: float = 0.0
  num_embeddings: int | None = None
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  def setup(self) -> None:
    """Declares the parts."""
    self.encoder = Encoder(
      self.features, self.conv, self.num_layers, self.normalize, self.dropout, self.dtype, self.param_dtype
    )
    self.head = _Head(self.features, self.num_layers, self.head_dropout, self.dtype, self.param_dtype)
    if self.num_embeddings is not None:
      self.embedding = nn.Embed(
        self.num_embeddings, self.features, dtype=self.dtype, param_dtype=self.param_dtype,
        embedding_init=nn.initializers.normal(1.0),
      )  # fmt: skip

  def __call__(
    self,
    graph: jraph.GraphsTuple,
    pairs: Int[Array, "2 p"],
    operator: sparse.Operator | None = None,
    *,
    train: bool = False,
  ) -> Float[Array, " p"]:
    """Logits of pairs of nodes.

    Args:
      graph: as in `encode`.
      pairs: [2, P] nodes.
      operator: as in `encode`.
      train: draws dropout (stream "dropout").

    Raises:
      ValueError: while tracing, on an attribute out of range or an input that does not fit.
    """
    pairs = jnp.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[0] != 2 or not jnp.issubdtype(pairs.dtype, jnp.integer):
      raise ValueError(f"pairs: got {pairs.dtype} of shape {pairs.shape}, expected integers [2, P]")
    h = self.encode(graph, operator, train=train)
    return self.score(h[pairs[0]] * h[pairs[1]], train=train)

  def encode(
    self, graph: jraph.GraphsTuple, operator: sparse.Operator | None = None, *, train: bool = False
  ) -> Float[Array, "n h"]:
    """Embeddings of nodes.

    Args:
      graph: `nodes` [N, F], dense or a `sparse.Operator`, or ids [N]; padding is ignored.
      operator: message weights; default those of `graph.edges`, from `structure.normalize(graph, ...)`.
      train: draws dropout.
    """
    self._check(graph, operator)
    x = graph.nodes if self.num_embeddings is None else self.embedding(graph.nodes)
    return self.encoder(sparse.operator(graph) if operator is None else operator, x, train=train)

  def score(self, products: Float[Array, "p h"], *, train: bool = False) -> Float[Array, " p"]:
    """Logits of products of two embeddings."""
    return self.head(products, train=train)

  def _check(self, graph, operator):
    for name, least in (("features", 1), ("num_layers", 1)):
      if getattr(self, name) < least:
        raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
    checks.choice("conv", self.conv, Conv)
    if self.normalize and self.conv != "sage":
      raise ValueError(f"normalize: got {self.normalize} with {self.conv!r}, expected it with 'sage' only")
    for name in ("dropout", "head_dropout"):
      checks.rate(name, getattr(self, name))
    shape, axes = getattr(graph.nodes, "shape", None), 2 if self.num_embeddings is None else 1
    if shape is None or len(shape) != axes or (axes == 1 and not jnp.issubdtype(graph.nodes.dtype, jnp.integer)):
      raise ValueError(f"graph: got nodes of shape {shape}, expected {'features [N, F]' if axes == 2 else 'ids [N]'}")
    if operator is None and getattr(graph.edges, "ndim", 0) != 1:
      raise ValueError("graph: got edges without weights, expected those of structure.normalize, or an operator")
    if operator is not None and operator.shape != (shape[0], shape[0]):
      raise ValueError(f"operator: got shape {operator.shape}, expected {(shape[0], shape[0])}, one row for each node")


class _Head(nn.Module):
  """The MLP: Linear, ReLU and dropout, then a Linear to one number."""

  features: int
  num_layers: int
  dropout: float
  dtype: jax.typing.DTypeLike
  param_dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(self, x, *, train):
    for i in range(self.num_layers):
      last = i == self.num_layers - 1
      x = layers.Linear(
        1 if last else self.features, dtype=self.dtype, param_dtype=self.param_dtype, name=f"linear_{i}"
      )(x)
      x = x if last else layers.Dropout(self.dropout, relu=True)(x, train=train)
    return x[:, 0]


# ------------------------------------------------------------------------------------------------------- re-weighting


class Reweighting(NamedTuple):
  """When and how much messages are re-weighted: after epochs e >= `warm_up` (1 is the first) with e % `interval` == 0.

  Attributes:
    alpha: added weight over base weight.
    interval: in epochs.
    warm_up: first epoch.
    context: weights of A_base in c = A_base H.
    receiver: see `reweight`.
  """

  alpha: float
  interval: int = 1
  warm_up: int = 1
  context: Conv = "gcn"
  receiver: Receiver = "neighbour"


def degree_weights(operator: sparse.Operator, conv: Conv) -> Float[Array, " e"]:
  """What `structure.normalize` stores: 1 / sqrt(d_r d_c) for "gcn", 1 / d_r for "sage", d counting entries of a row."""
  checks.choice("conv", conv, Conv)
  degree = jnp.maximum(jnp.diff(operator.row_starts), 1).astype("float32")
  if conv == "sage":
    return 1 / degree[operator.rows]
  return jax.lax.rsqrt(degree[operator.rows]) * jax.lax.rsqrt(degree[operator.columns])


def reweight(
  model: LinkPredictor,
  variables: Any,
  graph: jraph.GraphsTuple,
  base: sparse.Operator,
  weights: Float[Array, " e"] | None = None,
  *,
  alpha: float,
  context: Conv = "gcn",
  receiver: Receiver = "neighbour",
) -> Float[Array, " e"]:
  """New message weights, w + alpha g times the base weight of the centre; always from the base, never accumulated.

  The softmax g_ij is over the neighbours j of a centre i, i itself among them. "neighbour" puts the weight of (i, j) at
  entry (j, i), so that it scales what j receives from i, and keeps the sum over what leaves i: the official code.
  "centre" puts it at (i, j), what i receives from j, as the paper reads. No gradient passes.

  Args:
    model: in evaluation.
    variables: its.
    graph: nodes.
    base: [N, N] base weights; a symmetric pattern that holds every real node's self-loop.
    weights: [E] those in force, with which H is computed; None for the base.
    alpha: 0 gives the base weights to the bit.
    context: see `Reweighting`.
    receiver: who receives the message that is scaled.

  Returns:
    [E] float32.

  Source: `update_adj` of the official code.
  """
  checks.choice("receiver", receiver, Receiver)
  if weights is not None and weights.shape != base.rows.shape:
    raise ValueError(f"weights: got shape {weights.shape}, expected {base.rows.shape}, one for each entry")
  if not isinstance(alpha, jax.Array) and not 0 <= alpha < float("inf"):
    raise ValueError(f"alpha: got {alpha}, expected a number of 0 or more")
  current = base if weights is None else base.replace_values(weights)
  h: Any = model.apply(variables, graph, current, method="encode")
  center = sparse.propagate(base, h, degree_weights(base, context))
  logits: Any = model.apply(variables, center[base.rows] * h[base.columns], method="score")
  share = sparse.segment_softmax(base, nn.sigmoid(logits.astype("float32")))
  w = base.values.astype("float32")
  mirror = base.transpose_order  # of a symmetric pattern: entry (i, j) -> entry (j, i)
  if receiver == "centre":
    added = share * sparse.segment_sum(base, w)[base.rows]
  else:
    added = (share * sparse.segment_sum(base, w[mirror])[base.rows])[mirror]
  return jax.lax.stop_gradient(w + alpha * added)


# ------------------------------------------------------------------------------------------------ published variants


class Recipe(NamedTuple):
  """How a dataset's model is trained; rates 1e-3, 1000 epochs, picked by validation Hits@K.

  Attributes:
    features: width of the re-weighted model; every plain one has 256.
    normalize: of SAGE.
    batch_size: positive pairs of a step; the last, smaller batch of an epoch is left out.
    reweighting: or None.
    k: of Hits@K.
  """

  features: int
  normalize: bool
  batch_size: int
  reweighting: Reweighting
  k: int = 100


# As the official scripts set them, by dataset and encoder.
RECIPES = {
  ("cora", "gcn"): Recipe(256, False, 1152, Reweighting(2.0, 1, 1)),
  ("cora", "sage"): Recipe(128, True, 1152, Reweighting(0.01, 1, 10)),
  ("citeseer", "gcn"): Recipe(256, False, 1152, Reweighting(2.0, 1, 5)),
  ("citeseer", "sage"): Recipe(256, False, 1152, Reweighting(2.0, 1, 1)),
  ("pubmed", "gcn"): Recipe(256, False, 1152, Reweighting(0.2, 2, 5)),
  ("pubmed", "sage"): Recipe(256, False, 1152, Reweighting(0.5, 2, 5)),
  ("reptile", "gcn"): Recipe(256, False, 256, Reweighting(3.0, 20, 50)),
  ("reptile", "sage"): Recipe(64, True, 256, Reweighting(1.0, 1, 1)),
  ("vole", "gcn"): Recipe(256, False, 256, Reweighting(1.0, 30, 40)),
  ("vole", "sage"): Recipe(256, True, 256, Reweighting(0.5, 20, 40)),
  ("collab", "gcn"): Recipe(256, False, 65536, Reweighting(1.0, 50, 50), 50),
  ("collab", "sage"): Recipe(256, False, 65536, Reweighting(1.0, 50, 50), 50),
}


def cora(conv: Conv = "gcn", **changes: Any) -> LinkPredictor:
  """Cora, 1433 features. Encoder parameters: GCN 432,896, SAGE 865,280; the MLP has 66,049."""
  return LinkPredictor(**{"conv": conv, "normalize": conv == "sage"} | changes)


def citeseer(conv: Conv = "gcn", **changes: Any) -> LinkPredictor:
  """CiteSeer, 3703 features. Encoder parameters: GCN 1,014,016, SAGE 2,027,520."""
  return LinkPredictor(**{"conv": conv} | changes)


def pubmed(conv: Conv = "gcn", **changes: Any) -> LinkPredictor:
  """PubMed, 500 features. Encoder parameters: GCN 194,048, SAGE 387,584."""
  return LinkPredictor(**{"conv": conv} | changes)


def reptile(num_nodes: int, conv: Conv = "gcn", **changes: Any) -> LinkPredictor:
  """A contact network without features: a table of 256 for each node."""
  return LinkPredictor(**{"conv": conv, "normalize": conv == "sage", "num_embeddings": num_nodes} | changes)


vole = reptile


def collab(conv: Conv = "gcn", **changes: Any) -> LinkPredictor:
  """ogbl-collab, 128 features, three layers. Encoder parameters: GCN 164,608, SAGE 328,448; the MLP has 131,841."""
  return LinkPredictor(**{"conv": conv, "num_layers": 3} | changes)


def from_torch(model: LinkPredictor, encoder_state: dict[str, Any], head_state: dict[str, Any]) -> dict[str, Any]:
  """Official weights as flax variables.

  Args:
    model: of the same settings; a table of embeddings, which the official script holds apart, comes as `emb.weight`.
    encoder_state: `GCN.state_dict()` or `SAGE.state_dict()`.
    head_state: `MLP.state_dict()`.

  Raises:
    ValueError: listing every missing, unused or misshaped tensor.
  """
  rules: dict[str, Any] = {}
  for i in range(model.num_layers):
    ours, theirs = f"encoder/conv_{i}", f"convs.{i}"
    if model.conv == "gcn":
      rules[f"{ours}/linear"] = interop.dense(f"{theirs}.lin", bias=False)
      rules[f"{ours}/bias"] = interop.raw(f"{theirs}.bias")
    else:
      rules[f"{ours}/neighbor"] = interop.dense(f"{theirs}.lin_l", bias=False)
      rules[f"{ours}/bias"] = interop.raw(f"{theirs}.lin_l.bias")
      rules[f"{ours}/root"] = interop.dense(f"{theirs}.lin_r", bias=False)
    rules[f"head/linear_{i}"] = interop.dense(f"lins.{i}")
  if model.num_embeddings is not None:
    rules["embedding"] = interop.embed("emb")
  return interop.variables({**encoder_state, **head_state}, {f"params/{path}": rule for path, rule in rules.items()})
