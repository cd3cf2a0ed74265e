"""The networks that see generated features beside the real ones, each through a first layer of its own.

All are called as `net(graph, generated, operator, train=...)`: `graph.nodes` [N, F] are the real features, dense or
sparse, `generated` [c, N, F] the c generated ones; in the k = c + 1 parallel first layers generated ones come first and
the real ones last. c = 0 is the plain network. Padding is ignored.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Float, Key, PyTree

from jaxlab import checks
from jaxlab.graph import layers, sparse, structure
from jaxlab.graph.layers import Features


class _Network(nn.Module):
  """What all share: attributes and checks."""

  num_classes: int
  hidden: int = 8
  dropout: float = 0.5
  axis_name: str | None = None
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  def _inputs(self, graph, generated, operator, weighted=True):
    """The k inputs and the operator."""
    checks.rate("dropout", self.dropout)
    shape = getattr(graph.nodes, "shape", None)
    if shape is None or len(shape) != 2:
      raise ValueError(f"graph: got nodes of shape {shape}, expected features [N, F]")
    if generated.ndim != 3 or generated.shape[1:] != shape:
      raise ValueError(f"generated: got shape {generated.shape}, expected [c, {shape[0]}, {shape[1]}]")
    if operator is None:
      if weighted and getattr(graph.edges, "ndim", 0) != 1:
        raise ValueError("graph: got edges without weights, expected [E] from structure.normalize")
      operator = sparse.operator(graph)
    if operator.shape != (shape[0], shape[0]):
      raise ValueError(f"operator: got shape {operator.shape}, expected {(shape[0], shape[0])}, one row per node")
    return [*generated, graph.nodes], operator

  @property
  def _types(self) -> dict[str, Any]:
    return {"dtype": self.dtype, "param_dtype": self.param_dtype}

  def _drop(self, x, train):
    return layers.Dropout(self.dropout)(x, train=train)

  def _norm(self, x, graph, train, name):
    norm = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name, name=name, **self._types)
    return norm(x, mask=structure.node_mask(graph._replace(nodes=x))[:, None])


class LAGCN(_Network):
  """logits = A [relu(A X_1 W_1 + b_1), ..., relu(A X_k W_k + b_k)] V + b, dropout before each product.

  With c = 0 it is the 2-layer GCN. Attributes: `num_classes`; `hidden`, of each of the k; `dropout`, rate in training;
  `dtype`, `param_dtype`.
  """

  @nn.compact
  def __call__(
    self,
    graph: jraph.GraphsTuple,
    generated: Float[Array, "c n f"],
    operator: sparse.Operator | None = None,
    *,
    train: bool = False,
  ) -> Float[Array, "n classes"]:
    """Class scores of every node.

    Args:
      graph: features as nodes, `edges` [E] from `structure.normalize`.
      generated: [c, N, F], c at least 0.
      operator: `sparse.operator(graph)`, made once where the same graph is used again; default made here.
      train: draws dropout, stream "dropout".

    Raises:
      ValueError: while tracing, on features, weights or an operator that do not belong together.
    """
    inputs, operator = self._inputs(graph, generated, operator)
    hidden = [
      nn.relu(FirstConvolution(self.hidden, name=f"first_{i}", **self._types)(operator, self._drop(x, train)))
      for i, x in enumerate(inputs)
    ]
    h = self._drop(jnp.concatenate(hidden, -1), train)
    return layers.GCNConv(self.num_classes, name="second", **self._types)(operator, h)


class FirstConvolution(nn.Module):
  """`layers.GCNConv` where features are wide and outputs few, with the product in a form that CPUs do fast.

  Attributes: as `layers.GCNConv`.
  """

  features: int
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, operator: sparse.Operator, x: Features) -> Float[Array, "n features"]:
    """[N, F] -> [N, features]."""
    glorot, zeros = nn.initializers.glorot_uniform(), nn.initializers.zeros
    kernel = jnp.asarray(self.param("kernel", glorot, (x.shape[1], self.features), self.param_dtype), self.dtype)
    bias = jnp.asarray(self.param("bias", zeros, (self.features,), self.param_dtype), self.dtype)
    h = sparse.propagate(x, kernel) if isinstance(x, sparse.Operator) else tall_product(x.astype(self.dtype), kernel)
    return sparse.propagate(operator, h) + bias


@jax.custom_vjp
def tall_product(x: Float[Array, "n f"], kernel: Float[Array, "f h"]) -> Float[Array, "n h"]:
  """x W. Its gradient in W, x^T g, is computed as (g^T x)^T with g padded to a multiple of 16 columns.

  With few columns that product of a tall matrix runs at a fraction of the speed in either order without padding.
  """
  return x @ kernel


def _tall_product_gradient(saved, g):
  x, kernel = saved
  wide = jnp.pad(g, ((0, 0), (0, -g.shape[1] % 16)))
  return g @ kernel.T, (wide.T @ x)[: g.shape[1]].T


tall_product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _tall_product_gradient)


class LAGAT(_Network):
  """Graph attention in place of convolution: k `GATConv`s, ELU with `alpha`, concatenation, one `GATConv`.

  Attributes, beyond those of `LAGCN`: `heads` of a first layer; `alpha` of the ELU. The dropout rate is that of the
  attention weights too. Only the pattern of edges counts, self-loops included.
  """

  dropout: float = 0.6
  heads: int = 4
  alpha: float = 0.2

  @nn.compact
  def __call__(
    self,
    graph: jraph.GraphsTuple,
    generated: Float[Array, "c n f"],
    operator: sparse.Operator | None = None,
    *,
    train: bool = False,
  ) -> Float[Array, "n classes"]:
    """As `LAGCN`."""
    inputs, operator = self._inputs(graph, generated, operator)
    hidden = []
    for i, x in enumerate(inputs):
      attend = layers.GATConv(self.hidden, self.heads, dropout=self.dropout, name=f"first_{i}", **self._types)
      hidden.append(nn.elu(attend(operator, self._drop(x, train), train=train), self.alpha))
    h = self._drop(jnp.concatenate(hidden, -1), train)
    attend = layers.GATConv(self.num_classes, 1, False, dropout=self.dropout, name="second", **self._types)
    return attend(operator, h, train=train)


class LAGCNII(_Network):
  """k linear layers make H_0 = [relu(X_1 W_1), ...]; then `depth` convolutions of GCNII, of width k hidden.

      S = (1 - alpha) A H + alpha H_0,   H = relu((1 - t_l) S + t_l S W_l),   t_l = log(theta / l + 1)

  Attributes, beyond those of `LAGCN`: `depth`; `alpha`; `theta` (lambda in the paper). The parameters of all
  convolutions are stacked under "convolutions", one kernel [depth, k hidden, k hidden].
  """

  hidden: int = 32
  dropout: float = 0.6
  depth: int = 64
  alpha: float = 0.1
  theta: float = 0.5

  @nn.compact
  def __call__(
    self,
    graph: jraph.GraphsTuple,
    generated: Float[Array, "c n f"],
    operator: sparse.Operator | None = None,
    *,
    train: bool = False,
  ) -> Float[Array, "n classes"]:
    """As `LAGCN`."""
    inputs, operator = self._inputs(graph, generated, operator)
    linear = lambda width, name: layers.Linear(width, name=name, **self._types)
    first = [nn.relu(linear(self.hidden, f"first_{i}")(self._drop(x, train))) for i, x in enumerate(inputs)]
    initial = jnp.concatenate(first, -1)

    strengths = jnp.log(self.theta / jnp.arange(1, self.depth + 1) + 1)
    scan = nn.scan(
      _Convolution,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(nn.broadcast, nn.broadcast, 0),
    )
    stack = scan(self.alpha, self.dropout, train, self.dtype, self.param_dtype, name="convolutions")
    h, _ = stack(initial, operator, initial, strengths)
    return linear(self.num_classes, "classifier")(self._drop(h, train))


class _Convolution(nn.Module):
  """One layer of the scan: dropout, convolution, ReLU."""

  alpha: float
  dropout: float
  train: bool
  dtype: jax.typing.DTypeLike
  param_dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(self, h, operator, initial, strength):
    h = layers.Dropout(self.dropout)(h, train=self.train)
    convolve = layers.GCN2Conv(self.alpha, self.dtype, self.param_dtype, name="convolution")
    return nn.relu(convolve(operator, h, initial, strength)), None


class LAOGB(_Network):
  """The networks for the Open Graph Benchmark: k first convolutions, then ordinary ones of width k hidden.

  Attributes, beyond those of `LAGCN`:
    convolution: "gcn" or "sage".
    depth: number of layers, at least 2.
    batch_norm: after every layer but the last (ogbn-arxiv; the official proteins and products networks have none).
    average: one first layer on the mean of generated and real features, (G + X) / 2, in place of k of them.
    axis_name: device axis over which batch statistics are averaged.
  """

  hidden: int = 128
  convolution: Literal["gcn", "sage"] = "gcn"
  depth: int = 3
  batch_norm: bool = True
  average: bool = False

  @nn.compact
  def __call__(
    self,
    graph: jraph.GraphsTuple,
    generated: Float[Array, "c n f"],
    operator: sparse.Operator | None = None,
    *,
    train: bool = False,
  ) -> Float[Array, "n classes"]:
    """As `LAGCN`; for "sage" pass a graph, or its operator, without self-loops."""
    checks.choice("convolution", self.convolution, ("gcn", "sage"))
    if self.depth < 2:
      raise ValueError(f"depth: got {self.depth}, expected at least 2")
    inputs, operator = self._inputs(graph, generated, operator, weighted=self.convolution == "gcn")
    if self.average:
      inputs = [sum(inputs) / len(inputs)]
    layer = layers.GCNConv if self.convolution == "gcn" else layers.SAGEConv

    def block(x, width, name):
      x = layer(width, name=name, **self._types)(operator, x)
      if self.batch_norm:
        x = self._norm(x, graph, train, f"{name}_norm")
      return self._drop(nn.relu(x), train)

    h = jnp.concatenate([block(x, self.hidden, f"first_{i}") for i, x in enumerate(inputs)], -1)
    for i in range(self.depth - 2):
      h = block(h, len(inputs) * self.hidden, f"middle_{i}")
    return layer(self.num_classes, name="last", **self._types)(operator, h)


class GRANDMLP(_Network):
  """GRAND's classifier of propagated features, Feng et al., NeurIPS 2020, arXiv:2005.11079: two linear layers.

  Called as `net(graph, x, train=...)` on the output of `random_propagation`; the graph only says what is padding.

  Attributes, beyond those of `LAGCN`: `dropout` of the input; `hidden_dropout`; `batch_norm` before both layers.
  """

  hidden: int = 32
  hidden_dropout: float = 0.5
  batch_norm: bool = False

  @nn.compact
  def __call__(
    self, graph: jraph.GraphsTuple, x: Float[Array, "n f"], *, train: bool = False
  ) -> Float[Array, "n classes"]:
    """[N, F] -> logits [N, C]."""
    for name, rate in (("dropout", self.dropout), ("hidden_dropout", self.hidden_dropout)):
      checks.rate(name, rate)
    if x.ndim != 2:
      raise ValueError(f"x: got shape {x.shape}, expected [N, F]")
    x = self._norm(x, graph, train, "input_norm") if self.batch_norm else x
    h = nn.relu(layers.Linear(self.hidden, name="first", **self._types)(self._drop(x, train)))
    h = self._norm(h, graph, train, "hidden_norm") if self.batch_norm else h
    dropped = layers.Dropout(self.hidden_dropout)(h, train=train)
    return layers.Linear(self.num_classes, name="second", **self._types)(dropped)


def random_propagation(
  operator: sparse.Operator,
  x: Features,
  hops: int,
  rate: float,
  key: Key[Array, ""] | None = None,
) -> Float[Array, "n f"]:
  """GRAND's input: mean of A^0 Y, ..., A^K Y, where Y is X with whole rows dropped and the others not scaled.

  Args:
    operator: A.
    x: [N, F], dense or sparse.
    hops: K.
    rate: probability of a row to be dropped.
    key: of the draw; None in evaluation, where every row is scaled by 1 - rate.
  """
  if hops < 0 or not 0 <= rate < 1:
    raise ValueError(f"hops, rate: got {hops}, {rate}, expected at least 0 and a rate in [0, 1)")
  if isinstance(x, sparse.Operator):
    x = sparse.propagate(x, jnp.eye(x.shape[1], dtype=x.dtype))
  keep = jnp.full(x.shape[0], 1 - rate) if key is None else jax.random.bernoulli(key, 1 - rate, x.shape[:1])
  y = x * keep[:, None].astype(x.dtype)

  def hop(carry, _):
    power, total = carry
    power = sparse.propagate(operator, power)
    return (power, total + power), None

  (_, total), _ = jax.lax.scan(hop, (y, y), length=hops)
  return total / (hops + 1)


def official_init(key: Key[Array, ""], params: PyTree) -> PyTree:
  """The official GCN's and GRAND's first weights: every array ~ N(-s, s^2), s = 1 / sqrt(its number of outputs).

  A normal with a negative mean, where a uniform in (-s, s) was meant: nearly all hidden units start dead and come back
  as the L2 term shrinks the weights. Use it to follow the official recipe; networks here start as their layers say.
  """
  leaves, tree = jax.tree.flatten(params)
  made = []
  for leaf, k in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
    s = leaf.shape[-1] ** -0.5
    made.append((s * jax.random.normal(k, leaf.shape) - s).astype(leaf.dtype))
  return jax.tree.unflatten(tree, made)
