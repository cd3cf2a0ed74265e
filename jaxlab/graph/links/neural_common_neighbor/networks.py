"""The MPNN, the head in all its variants, and both together: see the package's docstring for the equations."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Float

from jaxlab import checks
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
    checks.choice("conv", self.conv, Conv)
    for name in ("input_dropout", "dropout", "tail_dropout", "edge_dropout"):
      checks.rate(name, getattr(self, name))
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
      x = layers.Dropout(self.dropout, relu=True)(x, train=train)
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
    split = lambda a: jnp.pad(a, (0, count * self.chunk - a.shape[0])).reshape(count, self.chunk)
    parts = jnp.arange(count), split(pairs.left), split(pairs.right), split(row)
    return jax.lax.map(lambda args: part(*args), parts).reshape(-1)[: row.shape[0]]

  def _candidate(self, x, common, left, right, row, train):
    h = self.product(x[left] * x[right], train)
    return self.score(jnp.asarray(self.beta, h.dtype) * common[row] + h, train)[:, 0]

  def _check(self, x, pairs):
    checks.choice("variant", self.variant, Variant)
    checks.choice("inner", self.inner, ("official", "paper"))
    if self.chunk is not None and self.chunk < 1:
      raise ValueError(f"chunk: got {self.chunk}, expected at least 1, or None")
    if self.depth < 0:
      raise ValueError(f"depth: got {self.depth}, expected 0 or more")
    checks.rate("dropout", self.dropout)
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
