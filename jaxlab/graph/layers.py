"""The layers that graph systems and their baselines share. Each computes what its PyTorch Geometric namesake does.

A layer is called as `layer(graph, x)`. `graph` is a `jraph.GraphsTuple` sorted by receiver, or its `sparse.Operator`
made once with `sparse.operator(graph)`, which is faster; `x` [N, F] are node features, dense or themselves a
`sparse.Operator` (bag of words) where a layer starts with a linear map. `GCNConv` uses the edge weights that
`structure.normalize` stores; the others use the pattern of edges alone. Loops are edges like any other: where a layer
is defined with self-loops, add them with `structure`. Padding reaches no real node.

Parameters live in `param_dtype`, arithmetic runs in `dtype`; sums over neighbours, softmax and norms accumulate in
float32.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Bool, Float

from jaxlab.graph import sparse, structure
from jaxlab.graph.gated import gated_mean
from jaxlab.nn import product
from jaxlab.nn.dropout import dropout
from jaxlab.nn.initializers import torch_bias, torch_kernel

Graph: TypeAlias = jraph.GraphsTuple | sparse.Operator
Features: TypeAlias = Float[Array, "n f"] | sparse.Operator
_Same = TypeVar("_Same", bound=Features)


# ------------------------------------------------------------------------------------- dense or sparse node features


class Linear(nn.Module):
  """x W + b for dense or sparse features.

  Attributes:
    features: number of outputs.
    use_bias: whether there is a b.
    initializer: "torch" as `torch.nn.Linear`, or "glorot" with a bias of 0, as most graph layers.
    dtype: compute dtype.
    param_dtype: parameter dtype.
  """

  features: int
  use_bias: bool = True
  initializer: Literal["torch", "glorot"] = "torch"
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Features) -> Float[Array, "n features"]:
    """[N, F] -> [N, features]."""
    fan_in = x.shape[-1]
    glorot = self.initializer == "glorot"
    kernel_init = nn.initializers.glorot_uniform() if glorot else torch_kernel
    kernel = self.param("kernel", kernel_init, (fan_in, self.features), self.param_dtype)
    kernel = jnp.asarray(kernel, self.dtype)
    bias = None
    if self.use_bias:
      bias_init = nn.initializers.zeros if glorot else torch_bias(fan_in)
      bias = jnp.asarray(self.param("bias", bias_init, (self.features,), self.param_dtype), self.dtype)
    if not isinstance(x, sparse.Operator):
      return product.dense(jnp.asarray(x, self.dtype), kernel, bias)
    y = sparse.propagate(x, kernel)
    return y if bias is None else y + bias


class Dropout(nn.Module):
  """Zeroes each entry with probability `rate` and scales the others to keep the mean, in training only.

  For sparse features only stored entries are drawn, since a dropped zero is a zero: the same distribution as for the
  dense matrix, at a cost that follows the entries. Its random stream is named "dropout".

  Attributes:
    rate: as above.
    relu: of max(x, 0) instead of x, at no more cost.
  """

  rate: float
  relu: bool = False

  @nn.compact
  def __call__(self, x: _Same, *, train: bool) -> _Same:
    """Same shape and form as `x`."""
    values = x.values if isinstance(x, sparse.Operator) else jnp.asarray(x)
    if train and self.rate > 0:
      values = dropout(self.make_rng("dropout"), values, self.rate, relu=self.relu)
    elif self.relu:
      values = nn.relu(values)
    return x.replace_values(values) if isinstance(x, sparse.Operator) else values  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------ convolutions


class GCNConv(nn.Module):
  """Graph convolution of Kipf and Welling, ICLR 2017, arXiv:1609.02907, equation 2.

      y_i = sum_j w_ij W x_j + b,    w = D^-1/2 (A + I) D^-1/2 from `structure.normalize`

  Attributes: as `Linear`; Glorot weights, bias 0.
  """

  features: int
  use_bias: bool = True
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, graph: Graph, x: Features) -> Float[Array, "n features"]:
    """[N, F] -> [N, features]."""
    h = Linear(self.features, False, "glorot", self.dtype, self.param_dtype, name="linear")(x)
    h = sparse.propagate(as_operator(graph, h), h)
    return h + _bias(self, self.features) if self.use_bias else h


class SAGEConv(nn.Module):
  """GraphSAGE with mean aggregation, Hamilton et al., NeurIPS 2017, arXiv:1706.02216, algorithm 1.

      y_i = W_root x_i + W_neighbor mean_{j -> i} x_j + b

  A node without incoming edges has mean 0. Attributes: as `Linear`, with torch's initialisation.
  """

  features: int
  use_bias: bool = True
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, graph: Graph, x: Features) -> Float[Array, "n features"]:
    """[N, F] -> [N, features]."""
    linear = lambda bias, name: Linear(self.features, bias, "torch", self.dtype, self.param_dtype, name=name)
    h = linear(False, "neighbor")(x)  # the map first: it commutes with the mean, and wide or sparse x stays put
    operator = as_operator(graph, h)
    in_degree = jnp.diff(operator.row_starts)
    total = sparse.propagate(operator, h.astype("float32"), _ones(operator))
    mean = (total / jnp.maximum(in_degree, 1)[:, None]).astype(self.dtype)
    return linear(self.use_bias, "root")(x) + mean


class GATConv(nn.Module):
  """Graph attention, Velickovic et al., ICLR 2018, arXiv:1710.10903, equations 3 to 6.

      z = W x,   a_ij = softmax_{j -> i} LeakyReLU(u . z_i + v . z_j),   y_i = sum_j a_ij z_j + b     for each head

  Defined with self-loops: pass `structure.add_self_loops(graph)`.

  Attributes:
    features: outputs of each head.
    heads: number of heads.
    concat: whether heads are concatenated [N, heads * features] or averaged [N, features].
    negative_slope: of the LeakyReLU.
    dropout: rate on a_ij in training.
    use_bias, dtype, param_dtype: as `Linear`.
  """

  features: int
  heads: int = 1
  concat: bool = True
  negative_slope: float = 0.2
  dropout: float = 0.0
  use_bias: bool = True
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, graph: Graph, x: Features, *, train: bool = False) -> Float[Array, "n features_out"]:
    """[N, F] -> [N, heads * features] or [N, features]."""
    z = Linear(self.heads * self.features, False, "glorot", self.dtype, self.param_dtype, name="linear")(x)
    operator = as_operator(graph, z)
    z = z.reshape(-1, self.heads, self.features)
    glorot = nn.initializers.glorot_uniform()

    def project(name):
      vector = self.param(name, glorot, (self.heads, self.features), self.param_dtype)
      return jnp.einsum("nhf,hf->nh", z, vector, preferred_element_type="float32")

    to_receiver, to_sender = project("attention_receiver"), project("attention_sender")  # u . z and v . z, [N, heads]
    score = nn.leaky_relu(to_receiver[operator.rows] + to_sender[operator.columns], self.negative_slope)
    attention = sparse.segment_softmax(operator, score)  # [E, heads]
    if train and self.dropout > 0:
      attention = dropout(self.make_rng("dropout"), attention, self.dropout)
    y = jax.vmap(sparse.propagate, (None, 1, 1), 1)(operator, z, attention)
    y = y.reshape(y.shape[0], -1) if self.concat else y.mean(axis=1)
    return y + _bias(self, y.shape[-1]) if self.use_bias else y


class GCN2Conv(nn.Module):
  """Convolution of GCNII, Chen et al., ICML 2020, arXiv:2007.02133, equation 5.

      s = (1 - alpha) A x + alpha x_0,    y = (1 - strength) s + strength s W

  The network takes strength = log(theta / layer + 1), layer from 1.

  Attributes:
    alpha: share of the first layer's output.
    dtype, param_dtype: as `Linear`; W as torch initialises it.
  """

  alpha: float = 0.1
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(
    self, graph: Graph, x: Float[Array, "n f"], initial: Float[Array, "n f"], strength: float | Float[Array, ""]
  ) -> Float[Array, "n f"]:
    """[N, F], the first layer's [N, F] -> [N, F]."""
    x = jnp.asarray(x, self.dtype)
    s = (1 - self.alpha) * sparse.propagate(as_operator(graph, x), x) + self.alpha * jnp.asarray(initial, self.dtype)
    mapped = Linear(x.shape[-1], False, "torch", self.dtype, self.param_dtype, name="linear")(s)
    strength = jnp.asarray(strength, self.dtype)
    return (1 - strength) * s + strength * mapped


class GINConv(nn.Module):
  """Graph isomorphism layer, Xu et al., ICLR 2019, arXiv:1810.00826, equation 4.1.

      y_i = mlp((1 + eps) x_i + sum_{j -> i} x_j)

  Attributes:
    mlp: any function or module on [N, F].
    eps: initial or fixed eps.
    train_eps: whether it is learned.
  """

  mlp: Callable[[Array], Array]
  eps: float = 0.0
  train_eps: bool = False

  @nn.compact
  def __call__(self, graph: Graph, x: Float[Array, "n f"]) -> Float[Array, "n f_out"]:
    """[N, F] -> what `mlp` makes of [N, F]."""
    operator = as_operator(graph, x)
    eps = self.param("eps", nn.initializers.constant(self.eps), ()) if self.train_eps else self.eps
    total = sparse.propagate(operator, x.astype("float32"), _ones(operator))
    return self.mlp((total + (1 + eps) * x.astype("float32")).astype(x.dtype))


class GINEConv(nn.Module):
  """GIN with edge features, Hu et al., ICLR 2020, arXiv:1905.12265, in the form of PyTorch Geometric.

      y_i = mlp((1 + eps) x_i + sum_{j -> i} ReLU(x_j + e_ij))

  Attributes:
    mlp: any function or module on [N, F].
    eps: initial or fixed eps.
    train_eps: whether it is learned.
  """

  mlp: Callable[[Array], Array]
  eps: float = 0.0
  train_eps: bool = False

  @nn.compact
  def __call__(
    self, graph: Graph, x: Float[Array, "n f"], edges: Float[Array, "e f"] | None = None
  ) -> Float[Array, "n f_out"]:
    """[N, F] -> what `mlp` makes of [N, F]; without `edges`, e is 0."""
    operator = as_operator(graph, x)
    eps = self.param("eps", nn.initializers.constant(self.eps), ()) if self.train_eps else self.eps
    wide = x.astype("float32")
    if edges is None:
      total = sparse.propagate(operator, nn.relu(wide), _ones(operator))
    else:
      total = sparse.segment_sum(operator, nn.relu(at_senders(operator, wide) + edges))
    return self.mlp((total + (1 + eps) * wide).astype(x.dtype))


class GatedGCN(nn.Module):
  """Gated graph convolution of Bresson and Laurent, arXiv:1711.07553, with edge states as in arXiv:2003.00982.

      e'_ij = D x_i + E x_j + C e_ij        x'_i = A x_i + sum_{j -> i} s_ij B x_j / (sum_{j -> i} s_ij + 1e-6)

  with s = sigmoid(e'), each feature by itself; then both become x + dropout(ReLU(batch_norm(x'))), the residual only
  where widths agree.

  Attributes:
    features: width of nodes and edges.
    update_edges: whether new edge states are computed; False in the last layer of a stack.
    residual: whether to add the input.
    dropout: rate in training.
    batch_norm: whether there is normalisation.
    axis_name: device axis over which batch statistics are averaged.
    dtype, param_dtype: as `Linear`.
  """

  features: int
  update_edges: bool = True
  residual: bool = True
  dropout: float = 0.0
  batch_norm: bool = True
  axis_name: str | None = None
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(
    self,
    graph: Graph,
    x: Float[Array, "n f"],
    edges: Float[Array, "e g"] | None = None,
    *,
    mask: Bool[Array, " n"] | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "n features"], Float[Array, "e features"] | None]:
    """New states of nodes and edges, the latter None without `update_edges`.

    Args:
      graph: as the module says.
      x: node states.
      edges: edge states; None for 0.
      mask: real nodes, which batch statistics are taken of; None for all.
      train: as usual.
    """
    operator = as_operator(graph, x)
    linear = lambda size, name: Linear(size, True, "torch", self.dtype, self.param_dtype, name=name)
    to_edges = None if edges is None else linear(self.features, "edge")(edges)
    mean, gate = gated_mean(
      operator,
      linear(self.features, "receiver")(x),
      linear(2 * self.features, "sender")(x),  # E x_j and B x_j together
      to_edges,
      gates=self.update_edges,
    )
    new_x = linear(self.features, "root")(x) + mean.astype(self.dtype)

    def finish(name, new, old, mask):
      if self.batch_norm:
        norm = nn.BatchNorm(
          not train, momentum=0.9, dtype=self.dtype, param_dtype=self.param_dtype, axis_name=self.axis_name, name=name
        )
        new = norm(new, mask=None if mask is None else mask[:, None])
      new = Dropout(self.dropout, relu=True)(new, train=train)
      return new + old if self.residual and old is not None and old.shape == new.shape else new

    new_x = finish("norm", new_x, x, mask)
    if gate is None:
      return new_x, None
    return new_x, finish("edge_norm", gate.astype(self.dtype), edges, None if mask is None else mask[operator.rows])


class GraphNorm(nn.Module):
  """Normalisation over the nodes of each graph, Cai et al., ICML 2021, arXiv:2009.03294, equation 7.

      y = gamma (x - alpha mean(x)) / sqrt(mean((x - alpha mean(x))^2) + epsilon) + beta

  Attributes:
    epsilon: as above.
    dtype, param_dtype: as `Linear`.
  """

  epsilon: float = 1e-5
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, graph: jraph.GraphsTuple, x: Float[Array, "n f"]) -> Float[Array, "n f"]:
    """Same shape as `x`; statistics per graph of the tuple, so padding has its own."""
    ids = structure.graph_ids(graph._replace(nodes=x))
    count = jnp.maximum(graph.n_node, 1)[:, None]
    mean = lambda v: (jax.ops.segment_sum(v, ids, len(graph.n_node), indices_are_sorted=True) / count)[ids]
    gamma, beta, alpha = (
      self.param(name, init, x.shape[-1:], self.param_dtype)
      for name, init in (
        ("scale", nn.initializers.ones),
        ("bias", nn.initializers.zeros),
        ("mean_scale", nn.initializers.ones),
      )
    )
    x = x.astype("float32")
    x = x - alpha * mean(x)
    return (gamma * x * jax.lax.rsqrt(mean(x**2) + self.epsilon) + beta).astype(self.dtype)


def as_operator(graph: Graph, x: Float[Array, "n f"]) -> sparse.Operator:
  """The operator itself, or the graph's, where `x` says how many nodes there are."""
  return graph if isinstance(graph, sparse.Operator) else sparse.operator(graph._replace(nodes=x))


def at_senders(operator: sparse.Operator, x: Float[Array, "n f"]) -> Float[Array, "e f"]:
  """x[sender] of every edge, whose gradient is a product with the stored transpose instead of a scatter."""
  every = jnp.arange(operator.rows.shape[0] + 1, dtype="int32")
  order = operator.transpose_order
  select = sparse.Operator(
    every[:-1], operator.columns, _ones(operator), every, order, order, operator.transpose_starts
  )  # fmt: skip
  return sparse.propagate(select, x)


def _ones(operator: sparse.Operator) -> Float[Array, " e"]:
  return jnp.ones_like(operator.values, "float32")


def _bias(module: Any, features: int) -> Float[Array, " f"]:
  return jnp.asarray(module.param("bias", nn.initializers.zeros, (features,), module.param_dtype), module.dtype)
