"""NCN and NCNC: a link is scored from its two ends and from their common neighbours, seen and (NCNC) probable.

    H = MPNN(X, A),   H' = H + mlp(H),
    logit(i, j) = mlp( beta * mlp(s_ij) + mlp(H_i * H_j) )
    NCN:   s_ij = sum over u in N(i) & N(j) of H'_u
    NCNC:  s_ij += sum over u in N(i) \\ N(j) of P_ju H'_u  +  sum over u in N(j) \\ N(i) of P_iu H'_u
           P = alpha pt g / (pt g + 1 - g),   g = sigmoid(scale (r - offset)),   r = NCN's own logit of the pair

Wang, Yang and Zhang, "Neural Common Neighbor with Completion for Link Prediction", ICLR 2024, arXiv:2302.00890; code
`GraphPKU/NeuralCommonNeighbor`. The MPNN runs once on the whole graph; `common_neighbors.pairs` lists the sets N on the
host. Pairs are a `common_neighbors.Pairs` with the depth that the head completes to.

The code's names for the heads, `variant`: cn0 is a graph auto-encoder (GAE), cn1 is NCN, incn1cn1 is NCNC (with
`depth=2` NCNC2), scn1 and sincn1cn1 count neighbours where these two sum embeddings, cn1res adds the exclusive
neighbours with weight 1 (NCN-diff), cn1.5 (NCN2) and cn2 add neighbours at two hops. Its blocks: xlin is
`node`, xcnlin `common`, xijlin `product`, lin `score`, ptlin `prior`.

Differs from the paper: `inner="official"` scores candidates as the code does, on H' in place of H (so that the residual
acts twice) and with dropout in training; `inner="paper"` on the embeddings that the outer pair sees, without dropout.
Differs from the official code: blocks that a variant does not use have no parameters; a candidate pair that occurs
several times in a batch is scored once; those without common neighbours share one evaluation of `common`, hence one
dropout mask there.
"""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Float

from jaxlab import interop
from jaxlab.graph import layers, sparse
from jaxlab.graph.common_neighbors import Pairs

Conv = Literal["gcn", "sage", "gin", "max", "puregcn", "puresum", "puremean", "puremax", "none"]
Variant = Literal["cn0", "scn1", "cn1", "cn1.5", "cn1res", "cn2", "incn1cn1", "sincn1cn1"]

# ----------------------------------------------------------------------------------------------------------- the MPNN


class Encoder(nn.Module):
  """Node embeddings: a linear map or table, then graph convolutions of one kind.

  Attributes:
    features: H.
    num_layers: convolutions; 0 gives the linear map alone.
    conv: "gcn" normalises symmetrically with self-loops; "sage", "gin" and "max" take the mean, sum and maximum over
      neighbours after a linear map; "puregcn", "puremean", "puresum" and "puremax" do so without any weights.
    num_embeddings: rows of a table, for graphs whose nodes are integer ids; None for features.
    layer_norm: before each ReLU, which only the weighted kinds have.
    residual: add a layer's input to its output where the shapes agree.
    jumping: return sum_l w_l h_l over layers, w free (not a softmax).
    input_dropout: rate on features; dropout: after the linear map or table, and before each ReLU; tail_dropout: after
      the last convolution without weights; edge_dropout: on edges, for each layer anew, the others scaled up.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  features: int
  num_layers: int = 1
  conv: Conv = "puregcn"
  num_embeddings: int | None = None
  layer_norm: bool = True
  residual: bool = False
  jumping: bool = False
  input_dropout: float = 0.0
  dropout: float = 0.0
  tail_dropout: float = 0.0
  edge_dropout: float = 0.0
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(
    self, graph: jraph.GraphsTuple, operator: sparse.Operator | None = None, *, train: bool = False
  ) -> Float[Array, "n h"]:
    """Embeddings of every node.

    Args:
      graph: `nodes` [N, F], dense or a `sparse.Operator`, or ids [N].
      operator: adjacency; entries of value 0 are no edges. Default `sparse.operator(graph)`.
      train: draws dropout.

    Raises:
      ValueError: while tracing, on an attribute out of range, or nodes that do not fit `num_embeddings`.
    """
    self._check(graph, operator)
    x: Any = graph.nodes
    if self.num_embeddings is not None:
      table = nn.Embed(
        self.num_embeddings, self.features, dtype=self.dtype, param_dtype=self.param_dtype,
        embedding_init=nn.initializers.orthogonal(), name="embedding",
      )  # fmt: skip
      x = layers.Dropout(self.dropout)(table(x), train=train)
    else:
      x = layers.Dropout(self.input_dropout)(x, train=train)
      if self.conv.startswith("pure") or self.num_layers == 0 or self.conv == "none":
        x = layers.Linear(self.features, dtype=self.dtype, param_dtype=self.param_dtype, name="linear")(x)
        x = layers.Dropout(self.dropout)(x, train=train)
    if self.num_layers == 0 or self.conv == "none":
      return x

    if operator is None:
      operator = sparse.operator(graph)
    seen = []
    for i in range(self.num_layers):
      weights = operator.values.astype("float32")
      if train and self.edge_dropout > 0:
        weights = layers.dropout(self.make_rng("dropout"), weights, self.edge_dropout)
      h: Any = self._convolve(i, operator, weights, x)
      if self.conv.startswith("pure"):
        if i == self.num_layers - 1:
          h = layers.Dropout(self.tail_dropout)(h, train=train)
      elif i < self.num_layers - 1 or self.num_layers == 1:
        if self.layer_norm:
          h = _layer_norm(self, f"norm_{i}")(h)
        h = layers.Dropout(self.dropout)(h, train=train)
        h = nn.relu(h)
      x = h + x if self.residual and h.shape == x.shape else h
      seen.append(x)
    if self.jumping:
      w = jnp.asarray(self.param("jumping", nn.initializers.normal(1.0), (self.num_layers,), self.param_dtype), x.dtype)
      x = sum(w[i] * h for i, h in enumerate(seen))
    return x

  def _convolve(self, i, operator, weights, x):
    if self.conv.startswith("pure"):
      return aggregate(operator, weights, x, self.conv.removeprefix("pure"))
    how = {"gcn": "gcn", "sage": "mean", "gin": "sum", "max": "max"}[self.conv]
    h = layers.Linear(self.features, False, "glorot", self.dtype, self.param_dtype, name=f"conv_{i}")(x)
    bias = self.param(f"conv_{i}_bias", nn.initializers.zeros, (self.features,), self.param_dtype)
    return aggregate(operator, weights, h, how) + jnp.asarray(bias, self.dtype)

  def _check(self, graph, operator):
    if self.features < 1:
      raise ValueError(f"features: got {self.features}, expected at least 1")
    if self.num_layers < 0:
      raise ValueError(f"num_layers: got {self.num_layers}, expected at least 0")
    if self.conv not in Conv.__args__:
      raise ValueError(f"conv: got {self.conv!r}, expected one of {Conv.__args__}")
    for name in ("input_dropout", "dropout", "tail_dropout", "edge_dropout"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"{name}: got {getattr(self, name)}, expected a rate in [0, 1)")
    shape, axes = getattr(graph.nodes, "shape", None), 2 if self.num_embeddings is None else 1
    if shape is None or len(shape) != axes:
      raise ValueError(f"graph: got nodes of shape {shape}, expected {'features [N, F]' if axes == 2 else 'ids [N]'}")
    if self.num_embeddings is not None and not jnp.issubdtype(graph.nodes.dtype, jnp.integer):
      raise ValueError(f"graph: got nodes of {graph.nodes.dtype}, expected integer ids")
    if operator is not None and operator.shape != (shape[0], shape[0]):
      raise ValueError(f"operator: got shape {operator.shape}, expected {(shape[0], shape[0])}, one row per node")


def aggregate(
  operator: sparse.Operator, weights: Float[Array, " e"], x: Float[Array, "n h"], how: str
) -> Float[Array, "n h"]:
  """What a node receives from its neighbours; entries of weight 0 are no edges, and a node without edges receives 0.

      sum: sum_j w_ij x_j     mean: that over the number of edges     max: max_j w_ij x_j
      gcn: sum_j w_ij x_j / sqrt(d_i d_j) + x_i / d_i,   d_i = 1 + sum_j w_ij

  Args:
    operator: pattern.
    weights: [E], in place of the stored ones.
    x: [N, H].
    how: one of the four.
  """
  if how == "sum":
    return sparse.propagate(operator, x, weights)
  if how == "mean":
    count = sparse.segment_sum(operator, (weights != 0).astype("float32"))
    return (sparse.propagate(operator, x, weights) / jnp.maximum(count, 1)[:, None]).astype(x.dtype)
  if how == "max":
    messages = weights[:, None] * x[operator.columns].astype("float32")
    messages = jnp.where(weights[:, None] != 0, messages, -jnp.inf)
    largest = sparse.segment_max(operator, messages, empty=-jnp.inf)
    return jnp.where(jnp.isfinite(largest), largest, 0).astype(x.dtype)
  scale = jax.lax.rsqrt(1 + sparse.segment_sum(operator, weights))[:, None].astype(x.dtype)
  x = scale * x
  return scale * (sparse.propagate(operator, x, weights) + x)


# ----------------------------------------------------------------------------------------------------------- the head


class MLP(nn.Module):
  """Linear, LayerNorm where `norms` says so, dropout and ReLU, once for each entry of `norms`; then a linear `tail`.

  Attributes:
    features: width of the hidden layers.
    norms: for each hidden layer, whether it is normalised.
    tail: outputs of a last linear map; None ends with the ReLU.
    dropout: rate.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  features: int
  norms: tuple[bool, ...]
  tail: int | None = None
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "p f"], train: bool) -> Float[Array, "p o"]:
    """[P, F] -> [P, features] or [P, tail]."""
    for i, norm in enumerate(self.norms):
      x = layers.Linear(self.features, dtype=self.dtype, param_dtype=self.param_dtype, name=f"linear_{i}")(x)
      if norm:
        x = _layer_norm(self, f"norm_{i}")(x)
      dropped: Any = layers.Dropout(self.dropout)(x, train=train)
      x = nn.relu(dropped)
    if self.tail is not None:
      x = layers.Linear(self.tail, dtype=self.dtype, param_dtype=self.param_dtype, name="tail")(x)
    return x


class Head(nn.Module):
  """Logits of pairs from node embeddings: NCN, NCNC and the variants that the paper compares.

  Attributes:
    features: H.
    variant: see the module's docstring.
    depth: levels of completion, for incn1cn1 and sincn1cn1.
    node_residual: the mlp in H' = H + mlp(H); without it H' = H.
    tail_activation: `product` and `common` end with a ReLU, not a linear map.
    two_layer_score: a second hidden layer in `score`.
    layer_norm: in every block.
    dropout: rate in every block.
    alpha, scale, offset, prior: alpha, scale, offset and pt above.
    learn_prior: pt is a function of H_i * H_j, not a constant.
    inner: how candidates are scored, see the module's docstring.
    chunk: candidates scored at a time at the last level, to save memory; None for all at once.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  features: int
  variant: Variant = "cn1"
  depth: int = 1
  node_residual: bool = False
  tail_activation: bool = False
  two_layer_score: bool = False
  layer_norm: bool = True
  dropout: float = 0.0
  alpha: float = 1.0
  scale: float = 5.0
  offset: float = 3.0
  prior: float = 0.5
  learn_prior: bool = False
  inner: Literal["official", "paper"] = "official"
  chunk: int | None = None
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @property
  def completes(self) -> bool:
    """Whether unseen common neighbours are scored."""
    return self.variant in ("incn1cn1", "sincn1cn1")

  @property
  def needs(self) -> dict[str, Any]:
    """Which sets `common_neighbors.pairs` must list, as its arguments."""
    return {
      "depth": self.depth if self.completes else 0,
      "exclusive": self.variant == "cn1res",
      "two_hop": self.variant in ("cn1.5", "cn2"),
    }

  def setup(self) -> None:
    """Declares the blocks that the variant uses."""
    norm, tail = self.layer_norm, None if self.tail_activation else self.features

    def block(norms, tail, dropout=self.dropout):
      return MLP(self.features, norms, tail, dropout, self.dtype, self.param_dtype)

    self.product = block((norm,), tail)
    self.score = block((norm,) * (1 + self.two_layer_score), 1)
    self.node = None
    if self.variant in ("cn1", "incn1cn1", "cn1.5", "cn1res") and self.node_residual:
      self.node = block((False, norm), None)
    if self.variant != "cn0":
      self.common = block((False, norm), tail)
      self.beta = self.param("beta", nn.initializers.ones, (1,), self.param_dtype)
    if self.variant == "cn1res":
      self.exclusive = block((False, norm), tail)
    if self.variant in ("cn1.5", "cn2"):
      self.two_hop = block((False, norm), tail)
    if self.variant == "cn2":
      self.four_hop = block((False, norm), tail)
      self.weights = self.param("weights", nn.initializers.ones, (3,), self.param_dtype)
    if self.completes and self.learn_prior:
      self.prior_of = block((False,), 1, 0.0)

  def __call__(self, x: Float[Array, "n h"], pairs: Pairs, *, train: bool = False) -> Float[Array, " p"]:
    """Logits of pairs.

    Args:
      x: embeddings H of nodes, before the residual.
      pairs: from `common_neighbors.pairs(..., **self.needs)`.
      train: draws dropout.

    Raises:
      ValueError: while tracing, on an attribute out of range, or pairs without the sets that the variant needs.
    """
    self._check(x, pairs)
    x = jnp.asarray(x, self.dtype)
    counts = self.variant in ("scn1", "sincn1cn1")  # a sum of ones
    return self._logits(x, jnp.ones((x.shape[0], 1), x.dtype) if counts else self._residual(x, train), pairs, train)

  def _residual(self, x, train):
    """H'."""
    return x + self.node(x, train) if self.node is not None else x

  def _logits(self, x, nodes, pairs, train):
    """Logits from H and H', which is a one for each node where neighbours are counted."""
    x_ij = x[pairs.left] * x[pairs.right]
    h = self.product(x_ij, train)
    if self.variant == "cn0":
      return self.score(h, train)[:, 0]
    s = sparse.propagate(pairs.common, nodes)
    if pairs.inner is not None:
      s = s + self._completion(x, x_ij, nodes, pairs, train)
    common = self.common(s, train)
    beta = jnp.asarray(self.beta, h.dtype)
    if self.variant == "cn2":
      first, second, both = (sparse.propagate(op, nodes) for op in pairs.two_hop)
      w = jnp.cumprod(nn.sigmoid(jnp.asarray(self.weights, h.dtype)))
      mixed = w[1] * self.two_hop(first, train) * self.two_hop(second, train) + w[2] * self.four_hop(both, train)
      return self.score(w[0] * common + mixed + beta * h, train)[:, 0]
    h = beta * common + h
    if self.variant == "cn1res":
      h = h + self.exclusive(sparse.propagate(pairs.exclusive, nodes), train)
    if self.variant == "cn1.5":
      first, second = (sparse.propagate(op, nodes) for op in pairs.two_hop[:2])
      h = h + self.two_hop(first + second, train)
    return self.score(h, train)[:, 0]

  def _completion(self, x, x_ij, nodes, pairs, train):
    """Sum over the exclusive neighbours u of P_u H'_u."""
    seen = nodes
    if self.inner == "paper":
      train = False
    elif self.variant == "incn1cn1":
      x, seen = nodes, self._residual(nodes, train)
    score = self._candidates if pairs.inner.inner is None else self._logits
    logits = jax.lax.stop_gradient(score(x, seen, pairs.inner, train))[pairs.candidates]
    prior = self.prior
    if self.learn_prior:
      prior = nn.sigmoid(self.prior_of(x_ij, False).astype("float32"))[pairs.exclusive.rows, 0]
    p = calibrate(logits, prior, alpha=self.alpha, scale=self.scale, offset=self.offset)
    return sparse.propagate(pairs.exclusive, nodes, pairs.exclusive.values * p)

  def _candidates(self, x, nodes, pairs, train):
    """Logits at the last level, where `common` is evaluated only for pairs that have common neighbours, and once more
    for all others."""
    s = sparse.propagate(pairs.common, nodes)
    common = self.common(jnp.concatenate([s, jnp.zeros_like(s[:1])]), train)
    row = jnp.minimum(jnp.arange(pairs.left.shape[0]), s.shape[0])
    if self.chunk is None or self.is_initializing():
      return self._candidate(x, common, pairs.left, pairs.right, row, train)

    frozen, variables = self.clone(parent=None), {"params": self.variables["params"]}
    key = self.make_rng("dropout") if train and self.dropout > 0 else jax.random.key(0)

    def part(i, left, right, row):
      rngs = {"dropout": jax.random.fold_in(key, i)}
      return frozen.apply(variables, x, common, left, right, row, train, rngs=rngs, method="_candidate")

    count = -(-row.shape[0] // self.chunk)
    split = lambda a: jnp.pad(a, (0, count * self.chunk - a.shape[0])).reshape(count, self.chunk)  # noqa: E731
    parts = jnp.arange(count), split(pairs.left), split(pairs.right), split(row)
    return jax.lax.map(lambda args: part(*args), parts).reshape(-1)[: row.shape[0]]

  def _candidate(self, x, common, left, right, row, train):
    h = self.product(x[left] * x[right], train)
    return self.score(jnp.asarray(self.beta, h.dtype) * common[row] + h, train)[:, 0]

  def _check(self, x, pairs):
    if self.variant not in Variant.__args__:
      raise ValueError(f"variant: got {self.variant!r}, expected one of {Variant.__args__}")
    if self.inner not in ("official", "paper"):
      raise ValueError(f"inner: got {self.inner!r}, expected 'official' or 'paper'")
    if self.chunk is not None and self.chunk < 1:
      raise ValueError(f"chunk: got {self.chunk}, expected at least 1, or None")
    if self.depth < 0:
      raise ValueError(f"depth: got {self.depth}, expected 0 or more")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"dropout: got {self.dropout}, expected a rate in [0, 1)")
    if x.ndim != 2 or x.shape[1] != self.features:
      raise ValueError(f"x: got shape {x.shape}, expected embeddings [N, {self.features}]")
    if pairs.common.shape[1] != x.shape[0]:
      raise ValueError(f"pairs: got sets over {pairs.common.shape[1]} nodes, expected {x.shape[0]}, one per embedding")
    got = {"depth": pairs.depth, "exclusive": pairs.exclusive is not None, "two_hop": pairs.two_hop is not None}
    needs = self.needs | {"exclusive": self.needs["exclusive"] or self.needs["depth"] > 0}
    if got["depth"] != needs["depth"] or any(needs[name] and not got[name] for name in ("exclusive", "two_hop")):
      raise ValueError(f"pairs: got {got}, expected {needs} for {self.variant!r}")


def calibrate(
  logits: Float[Array, " e"],
  prior: float | Float[Array, " e"],
  *,
  alpha: float,
  scale: float,
  offset: float,
) -> Float[Array, " e"]:
  """P = alpha pt g / (pt g + 1 - g) with g = sigmoid(scale (logit - offset)), in float32: in (0, alpha) and increasing.

  Source: the official code's `clampprob`. P = alpha pt / (1 + pt) where the logit is `offset`.
  """
  # pt g / (pt g + 1 - g) has log-odds z + log(pt), which neither overflows nor cancels.
  z = scale * (logits.astype("float32") - offset)
  return alpha * nn.sigmoid(z + jnp.log(jnp.asarray(prior, "float32")))


def _layer_norm(module, name):
  return nn.LayerNorm(1e-5, module.dtype, module.param_dtype, use_fast_variance=False, name=name)


class LinkPredictor(nn.Module):
  """Encoder and head.

  Attributes:
    encoder: makes node embeddings.
    head: scores pairs.
  """

  encoder: Encoder
  head: Head

  def __call__(
    self,
    graph: jraph.GraphsTuple,
    pairs: Pairs,
    operator: sparse.Operator | None = None,
    *,
    train: bool = False,
  ) -> Float[Array, " p"]:
    """Logits of pairs of nodes.

    Args:
      graph: `nodes` are features or ids, see `Encoder`; padding is ignored.
      pairs: from `common_neighbors.pairs`, over the same graph.
      operator: adjacency; entries of value 0 are no edges. Default `sparse.operator(graph)`.
      train: draws dropout (stream "dropout").

    Returns:
      [P]; those of padding pairs mean nothing.
    """
    return self.head(self.encoder(graph, operator, train=train), pairs, train=train)


# ------------------------------------------------------------------------------------------------ published variants


class Recipe(NamedTuple):
  """How a dataset's model is trained, see `link_prediction.learner` and `link_prediction.Batches`.

  Attributes:
    encoder_rate: learning rate of the MPNN.
    head_rate: of the head.
    batch_size: positive pairs of a step.
    epochs: passes over the training edges.
    edge_dropout: on the edges that sets of neighbours are listed from.
    remove_targets: take a batch's positive edges out of the graph.
    k: of the Hits@K that picks the epoch; 0 for the mean reciprocal rank.
    validation_edges: let the graph that tests are scored on have the validation edges too.
    max_exclusive: neighbours drawn for completion, or None for all.
  """

  encoder_rate: float
  head_rate: float
  batch_size: int
  epochs: int = 100
  edge_dropout: float = 0.0
  remove_targets: bool = True
  k: int = 100
  validation_edges: bool = False
  max_exclusive: int | None = None


# As the official README's commands set them.
RECIPES = {
  "cora": Recipe(0.0043, 0.0024, 1152, edge_dropout=0.4),
  "citeseer": Recipe(0.0085, 0.0078, 384),
  "pubmed": Recipe(0.0097, 0.002, 2048),
  "collab": Recipe(0.0082, 0.0037, 65536, k=50, validation_edges=True),
  "ppa": Recipe(0.0013, 0.0013, 16384, epochs=25),
  "citation2": Recipe(0.0088, 0.0058, 32768, epochs=20, k=0, remove_targets=False, max_exclusive=128),
  "ddi": Recipe(0.0021, 0.0018, 24576, k=20),
}


def cora(variant: Variant = "cn1", **changes: Any) -> LinkPredictor:
  """Cora, 1433 features. Parameters: NCN 764,163; NCNC as many, 830,212 with `learn_prior`."""
  return _predictor(
    variant, changes, {"jumping": True, "input_dropout": 0.7, "dropout": 0.05, "tail_dropout": 0.3},
    {"dropout": 0.05, "offset": 2.8, "scale": 4.3, "prior": 0.75},
  )  # fmt: skip


def citeseer(variant: Variant = "cn1", **changes: Any) -> LinkPredictor:
  """CiteSeer, 3703 features. Parameters: NCN 1,411,587; NCNC as many, 1,477,636 with `learn_prior`."""
  return _predictor(
    variant, changes, {"jumping": True, "input_dropout": 0.4, "dropout": 0.75},
    {"dropout": 0.55, "two_layer_score": True, "offset": 4.4, "scale": 6.5, "prior": 0.75, "alpha": 0.4},
  )  # fmt: skip


def pubmed(variant: Variant = "cn1", **changes: Any) -> LinkPredictor:
  """PubMed, 500 features. Parameters: NCN 525,315; NCNC as many, 591,364 with `learn_prior`."""
  return _predictor(
    variant, changes, {"jumping": True, "input_dropout": 0.3, "dropout": 0.1},
    {"dropout": 0.05, "offset": 0.5, "scale": 5.3, "prior": 0.5, "alpha": 0.3},
  )  # fmt: skip


def collab(variant: Variant = "cn1", **changes: Any) -> LinkPredictor:
  """ogbl-collab, 128 features. Parameters: NCN 33,922."""
  encoder = {"features": 64, "conv": "gcn", "residual": True, "input_dropout": 0.25, "tail_dropout": 0.05}
  return _predictor(
    variant, changes, encoder | {"dropout": 0.1, "edge_dropout": 0.25},
    {"dropout": 0.3, "offset": 6.0, "scale": 2.5, "prior": 0.1, "alpha": 1.05},
  )  # fmt: skip


def ppa(variant: Variant = "cn1", **changes: Any) -> LinkPredictor:
  """ogbl-ppa, 58 species as ids. Parameters: NCN 33,538."""
  encoder = {"features": 64, "conv": "gcn", "num_layers": 3, "num_embeddings": 58, "residual": True}
  return _predictor(
    variant, changes, encoder | {"edge_dropout": 0.1},
    {"node_residual": False, "dropout": 0.1, "offset": 8.5, "scale": 4.0, "prior": 0.1, "alpha": 0.9},
  )  # fmt: skip


def citation2(variant: Variant = "cn1", **changes: Any) -> LinkPredictor:
  """ogbl-citation2, 128 features. Parameters: NCN 33,794."""
  encoder = {"features": 64, "num_layers": 3, "residual": True, "dropout": 0.2, "tail_dropout": 0.3}
  return _predictor(variant, changes, encoder, {"dropout": 0.2, "offset": 4.7, "scale": 7.0, "prior": 0.3})


def ddi(variant: Variant = "cn1", **changes: Any) -> LinkPredictor:
  """ogbl-ddi, 4267 drugs as ids (the table has one row more, as in the code). Parameters: NCN 1,412,098."""
  encoder = {"features": 224, "conv": "puresum", "num_embeddings": 4268, "residual": True}
  head = {"tail_activation": False, "two_layer_score": True, "offset": 3.0, "scale": 10.0, "prior": 0.1, "alpha": 0.5}
  return _predictor(variant, changes, encoder | {"input_dropout": 0.05, "dropout": 0.4}, head | {"dropout": 0.6})


def _predictor(variant, changes, encoder, head):
  """Both parts; changes go to the part that has the attribute, or both, or are dicts named `encoder` and `head`."""
  plain = variant in ("cn1.5", "cn1res", "cn2")  # which the official script builds without these options
  head = {"features": encoder.get("features", 256), "node_residual": True, "tail_activation": True} | head
  if plain:
    head = head | {"node_residual": False, "tail_activation": False, "two_layer_score": False}
  encoder, head = {"features": 256} | encoder, head | {"variant": variant}
  changes = dict(changes)
  own = changes.pop("encoder", {}), changes.pop("head", {})
  fields = tuple({f for f in part.__dataclass_fields__ if f not in ("parent", "name")} for part in (Encoder, Head))
  unknown = changes.keys() - (fields[0] | fields[1])
  if unknown or "dropout" in changes:
    raise ValueError(
      f"changes: got {sorted(unknown) or 'dropout'}, expected attributes, or encoder={{...}}, head={{...}}"
    )
  parts = []
  for part, settings, names, mine in zip((Encoder, Head), (encoder, head), fields, own, strict=True):
    parts.append(part(**settings | {k: v for k, v in changes.items() if k in names} | mine))
  return LinkPredictor(*parts)


def from_torch(model: LinkPredictor, encoder_state: dict[str, Any], head_state: dict[str, Any]) -> dict[str, Any]:
  """Official weights as flax variables.

  Args:
    model: of the same settings; blocks that it does not use are left out.
    encoder_state: `GCN.state_dict()`.
    head_state: the predictor's `state_dict()`.

  Raises:
    ValueError: listing every missing, unused or misshaped tensor.
  """
  encoder, head = model.encoder, model.head
  rules = {}
  if encoder.num_embeddings is not None:
    rules["encoder/embedding"] = interop.embed("xemb.0")
  elif encoder.conv.startswith("pure") or encoder.num_layers == 0 or encoder.conv == "none":
    rules["encoder/linear"] = interop.dense("xemb.1")
  if not encoder.conv.startswith("pure") and encoder.conv != "none":
    for i in range(encoder.num_layers):
      rules[f"encoder/conv_{i}"] = interop.dense(f"convs.{i}.lin", bias=False)
      rules[f"encoder/conv_{i}_bias"] = interop.raw(f"convs.{i}.bias")
      if encoder.layer_norm and (i < encoder.num_layers - 1 or encoder.num_layers == 1):
        rules[f"encoder/norm_{i}"] = interop.norm(f"lins.{i}.0")
  if encoder.jumping and encoder.num_layers and encoder.conv != "none":
    rules["encoder/jumping"] = interop.raw("jkparams")

  common = "xcn1lin" if head.variant == "cn2" else "xcnlin"
  two_hop = "xcn2lin" if head.variant == "cn2" else "xcn12lin"
  long = [("linear_0", "0", False), ("linear_1", "3", False), ("norm_1", "4", True)]
  tail = [] if head.tail_activation else [("tail", "7", False)]
  score = [("linear_0", "0", False), ("norm_0", "1", True), ("tail", "8" if head.variant != "cn2" else "4", False)]
  if head.two_layer_score:
    score += [("linear_1", "4", False), ("norm_1", "5", True)]
  product = [("linear_0", "0", False), ("norm_0", "1", True), *(("tail", "4", False) for _ in tail)]
  blocks = {"product": ("xijlin", product), "score": ("lin", score)}
  needs = head.needs
  if head.variant != "cn0":
    blocks["common"] = (common, long + tail)
    rules["head/beta"] = interop.raw("beta")
  if head.node_residual and head.variant in ("cn1", "incn1cn1", "cn1.5", "cn1res"):
    blocks["node"] = ("xlin", long)
  if needs["exclusive"]:
    blocks["exclusive"] = ("xcnreslin", long + tail)
  if needs["two_hop"]:
    blocks["two_hop"] = (two_hop, long + tail)
  if head.variant == "cn2":
    blocks["four_hop"] = ("xcn4lin", long + tail)
    rules["head/weights"] = interop.raw("alpha")
  if head.completes and head.learn_prior:
    blocks["prior_of"] = ("ptlin", [("linear_0", "0", False), ("tail", "2", False)])
  for ours, (theirs, entries) in blocks.items():
    for name, index, norm in entries:
      if head.layer_norm or not norm:
        rules[f"head/{ours}/{name}"] = (interop.norm if norm else interop.dense)(f"{theirs}.{index}")

  used = {theirs for theirs, _ in blocks.values()}
  ignore = [f"{theirs}.*" for theirs in ("xlin", "xcnlin", "ptlin") if theirs not in used]
  ignore += ["adjdrop.ratio", "dropadj.ratio", "pt", "scale", "offset"]
  ignore += ["alpha"] * (head.variant != "cn2") + ["beta"] * (head.variant == "cn0")
  # Both parts have names that start alike ("lins", "lin"), but none in common.
  return interop.variables(
    {**encoder_state, **head_state}, {f"params/{path}": rule for path, rule in rules.items()}, ignore=ignore
  )
