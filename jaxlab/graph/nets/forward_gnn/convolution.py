"""Graph convolutions on a graph with virtual nodes, in a form that lets a frozen input be aggregated once."""

import functools
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Float

from jaxlab import interop
from jaxlab.graph import sparse
from jaxlab.nn.initializers import torch_bias, torch_kernel

Kind = Literal["gcn", "sage", "gat"]


class Bordered(NamedTuple):
  """A graph of N nodes and C virtual ones, as the blocks of one adjacency matrix [N + C, N + C]:

      [ A    M ]
      [ M^T  0 ]

  M differs between splits, and between positive and negative graphs, while A does not: kept apart, all of them share
  one sparse product, and the product with M, which has at most one entry a row, is a small dense one.

  Attributes:
    adjacency: A, without self-loops; a stored entry of value 0 is no edge.
    links: M, 1 where a node is linked, in both directions, with the virtual node of a class. [N, 0] for none.
    linked: sums of the rows of M, kept apart since positive and negative graphs have it in common: what a real node
      receives from real ones is then the same in all of them, and `vmap` over graphs computes it once.
  """

  adjacency: sparse.Operator
  links: Float[Array, "n c"]
  linked: Float[Array, " n"]


class Stacked(NamedTuple):
  """Sparse features of the N nodes above dense ones of the C virtual nodes: [N + C, F]."""

  real: sparse.Operator
  virtual: Float[Array, "c f"]

  @property
  def shape(self) -> tuple[int, int]:
    """[N + C, F]."""
    return self.real.shape[0] + self.virtual.shape[0], self.real.shape[1]


Features: TypeAlias = Float[Array, "nc f"] | sparse.Operator | Stacked
Some = TypeVar("Some", Array, sparse.Operator, Stacked, Features)


def bordered(graph: jraph.GraphsTuple, links: Float[Array, "n c"] | None = None) -> Bordered:
  """A graph, whose edge weights are not read, and its links; traces, and takes padded graphs.

  Raises:
    ValueError: links without a row for each node.
  """
  adjacency = sparse.operator(graph._replace(edges=None))
  if links is not None and links.shape[0] != adjacency.shape[0]:
    raise ValueError(f"links: got shape {links.shape}, expected {adjacency.shape[0]} rows, one for each node")
  links = jnp.zeros((adjacency.shape[0], 0)) if links is None else links
  return Bordered(adjacency, links, links.sum(axis=1))


def stack(features: Features, virtual: Float[Array, "c f"]) -> Features:
  """Features of the nodes [N, F], dense or sparse, above those of virtual nodes."""
  if isinstance(features, sparse.Operator):
    return Stacked(features, virtual) if virtual.shape[0] else features
  return jnp.concatenate([jnp.asarray(features), virtual])


def squared_norm(x: Features) -> Float[Array, " nc"]:
  """|x_i|^2 of each row, in float32."""
  if isinstance(x, Stacked):
    return jnp.concatenate([squared_norm(x.real), squared_norm(x.virtual)])
  if isinstance(x, sparse.Operator):
    return sparse.segment_sum(x, x.values.astype("float32") ** 2)
  return jnp.sum(x.astype("float32") ** 2, axis=-1)


def normalize(x: Some, squares: Float[Array, " nc"] | None = None) -> Some:
  """n(x) = x / (|x| + 1e-8), row by row; `squares`, if given, stand for |x_i|^2 (of a row that x is a part of)."""
  scale = 1 / (jnp.sqrt(squared_norm(x) if squares is None else squares) + 1e-8)
  if isinstance(x, Stacked):
    n = x.real.shape[0]
    real = x.real.replace_values(x.real.values * scale[x.real.rows])
    return Stacked(real, x.virtual * scale[n:, None])
  if isinstance(x, sparse.Operator):
    return x.replace_values(x.values * scale[x.rows])  # type: ignore[return-value]
  return (x.astype("float32") * scale[:, None]).astype(x.dtype)


def product(x: Features, kernel: Float[Array, "f g"]) -> Float[Array, "nc g"]:
  """x W, in the dtype of W."""
  if isinstance(x, Stacked):
    return jnp.concatenate([product(x.real, kernel), product(x.virtual, kernel)])
  if isinstance(x, sparse.Operator):
    return sparse.propagate(x, kernel)
  return jnp.asarray(x, kernel.dtype) @ kernel


def aggregate(kind: Kind, graph: Bordered, x: Float[Array, "nc f"]) -> Float[Array, "nc f"]:
  """The linear map over neighbours of a GCN, D^-1/2 (A + I) D^-1/2 x with the whole adjacency as A, or SAGE's mean."""
  adjacency, links, linked = graph
  n, links = links.shape[0], links.astype("float32")
  degrees = sparse.segment_sum(adjacency, adjacency.values.astype("float32")) + linked, links.sum(axis=0)
  if kind == "gcn":
    real, virtual = scales = [jax.lax.rsqrt(d + 1)[:, None] for d in degrees]
    real, virtual = x[:n].astype("float32") * real, x[n:].astype("float32") * virtual
    total = sparse.propagate(adjacency, real) + real + links @ virtual, links.T @ real + virtual
  else:
    scales = [1 / jnp.maximum(d, 1)[:, None] for d in degrees]
    real, virtual = x[:n].astype("float32"), x[n:].astype("float32")
    total = sparse.propagate(adjacency, real) + links @ virtual, links.T @ real
  return jnp.concatenate([t * s for t, s in zip(total, scales, strict=True)]).astype(x.dtype)


class Conv(nn.Module):
  """GCN, GraphSAGE with mean, or GAT: PyTorch Geometric's of these names, with self-loops in the first and the last.

  The input is a list of blocks of features that stand side by side, so that sparse, dense, shared and changing parts
  each take the way that suits them. Neighbours are summed after the map to `features` outputs, A (x W), except for
  blocks whose aggregate is given: (A x) W, which is the same and needs no sparse product where x stays as it is.

  Attributes:
    features: number of outputs, of all heads together where they are concatenated.
    kind: which of the three.
    heads: of GAT.
    concat: whether GAT's heads are concatenated, `features / heads` outputs each, or averaged.
    dtype: compute dtype; attention and sums over neighbours are in float32.
    param_dtype: parameter dtype.
  """

  features: int
  kind: Kind = "gcn"
  heads: int = 4
  concat: bool = True
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(
    self, graph: Bordered, blocks: Sequence[Features], aggregated: Sequence[Array | None] | None = None
  ) -> Float[Array, "nc features"]:
    """[N + C, F_1], [N + C, F_2], ... -> [N + C, features].

    Args:
      graph: with C columns of links.
      blocks: of the input.
      aggregated: for each block `frozen_aggregate` of it, or None.
    """
    aggregated = [None] * len(blocks) if aggregated is None else aggregated
    if self.kind == "gat":
      return self._attend(graph, blocks)
    kernels = self._kernels("linear" if self.kind == "gcn" else "neighbor", blocks)
    parts = list(zip(blocks, aggregated, kernels, strict=True))
    fresh = [product(x, kernel) for x, known, kernel in parts if known is None]
    y = [aggregate(self.kind, graph, functools.reduce(jnp.add, fresh))] if fresh else []
    y += [product(known, kernel) for _, known, kernel in parts if known is not None]
    if self.kind == "sage":
      y += [product(x, kernel) for x, kernel in zip(blocks, self._kernels("root", blocks), strict=True)]
    return functools.reduce(jnp.add, y) + self._bias(blocks, self.features)

  def _kernels(self, name, blocks, features=None):
    """The rows of one kernel that belong to each block."""
    widths = [x.shape[-1] for x in blocks]
    init = torch_kernel if self.kind == "sage" else nn.initializers.glorot_uniform()
    kernel = self.param(f"{name}_kernel", init, (sum(widths), features or self.features), self.param_dtype)
    kernel, starts = jnp.asarray(kernel, self.dtype), [sum(widths[:i]) for i in range(1, len(widths))]
    return jnp.split(kernel, starts)

  def _bias(self, blocks, features):
    init = torch_bias(sum(x.shape[-1] for x in blocks)) if self.kind == "sage" else nn.initializers.zeros
    return jnp.asarray(self.param("bias", init, (features,), self.param_dtype), self.dtype)

  def _attend(self, graph, blocks):
    """a_ij = softmax over j of LeakyReLU(u . z_i + v . z_j), j being neighbours, the node itself, and virtual nodes."""
    adjacency, links, _ = graph
    width = self.features // self.heads if self.concat else self.features
    kernels = self._kernels("linear", blocks, self.heads * width)
    z = sum(product(x, kernel) for x, kernel in zip(blocks, kernels, strict=True))
    z = z.reshape(-1, self.heads, width)

    def project(name):
      vector = self.param(name, nn.initializers.glorot_uniform(), (self.heads, width), self.param_dtype)
      return jnp.einsum("nhf,hf->nh", z, jnp.asarray(vector, self.dtype), preferred_element_type="float32")

    receive, send = project("attention_receiver"), project("attention_sender")  # u . z and v . z, [N + C, heads]
    score = lambda r, s: nn.leaky_relu(r + s, 0.2)
    where = lambda there, x: jnp.where(there, x, -jnp.inf)
    n = links.shape[0]
    linked = (links > 0)[:, :, None]
    own = score(receive, send)
    edge = where((adjacency.values > 0)[:, None], score(receive[:n][adjacency.rows], send[:n][adjacency.columns]))
    down = where(linked, score(receive[:n, None], send[None, n:]))  # [N, C, heads], from virtual to real nodes
    up = where(linked, score(receive[None, n:], send[:n, None]))  # and back

    top = jnp.maximum(own[:n], sparse.segment_max(adjacency, edge, empty=-jnp.inf))
    top = jnp.maximum(top, jnp.max(down, axis=1, initial=-jnp.inf))
    top = jax.lax.stop_gradient(jnp.concatenate([top, jnp.maximum(own[n:], jnp.max(up, axis=0, initial=-jnp.inf))]))
    own, edge = jnp.exp(own - top), jnp.exp(edge - top[adjacency.rows])
    down, up = jnp.exp(down - top[:n, None]), jnp.exp(up - top[None, n:])
    total = own + jnp.concatenate([sparse.segment_sum(adjacency, edge) + down.sum(axis=1), up.sum(axis=0)])

    wide = z.astype("float32")
    real = jax.vmap(sparse.propagate, (None, 1, 1), 1)(adjacency, wide[:n], edge)
    real = real + jnp.einsum("nch,chf->nhf", down, wide[n:])
    y = own[:, :, None] * wide + jnp.concatenate([real, jnp.einsum("nch,nhf->chf", up, wide[:n])])
    y = (y / total[:, :, None]).astype(self.dtype)
    y = y.reshape(-1, self.features) if self.concat else y.mean(axis=1)
    return y + self._bias(blocks, self.features)


def apply(
  conv: Conv, params: Any, graph: Bordered, blocks: Sequence[Features], aggregated: Sequence[Array | None] | None = None
) -> Float[Array, "nc features"]:
  """A layer with these parameters."""
  return jnp.asarray(conv.apply({"params": params}, graph, blocks, aggregated))


def frozen_aggregate(kind: Kind, graph: Bordered, blocks: Sequence[Features]) -> list[Array | None]:
  """What a layer can compute once for an input that stays: aggregates of dense blocks, where the kind is linear.

  Sparse blocks stay as they are. Their aggregate has a dense row for each training node, which is linked with a
  virtual node of dense features: the product with it would cost a hundred times that with the sparse block.
  """
  if kind == "gat":
    return [None] * len(blocks)
  return [None if isinstance(x, sparse.Operator | Stacked) else aggregate(kind, graph, x) for x in blocks]


_MATRIX: dict[str, Any] = {"to_flax": lambda w: w.T, "to_torch": lambda w: w.T, "axes": (2,)}
_VECTOR: dict[str, Any] = {"to_flax": lambda w: w[0], "to_torch": lambda w: w[None], "axes": (3,)}
# A layer of PyTorch Geometric: (torch name, name here, layout). SAGE has the bias where the neighbours are mapped.
_WEIGHTS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
  "gcn": [("lin.weight", "linear_kernel", _MATRIX), ("bias", "bias", {})],
  "sage": [
    ("lin_l.weight", "neighbor_kernel", _MATRIX), ("lin_r.weight", "root_kernel", _MATRIX), ("lin_l.bias", "bias", {})
  ],
  "gat": [
    ("lin.weight", "linear_kernel", _MATRIX), ("att_dst", "attention_receiver", _VECTOR),
    ("att_src", "attention_sender", _VECTOR), ("bias", "bias", {}),
  ],
}  # fmt: skip


def from_torch(state_dict: dict[str, Any]) -> dict[str, Any]:
  """Official weights, or those of PyG's `GCN`, `GraphSAGE` and `GAT`, as parameters by layer.

  Raises:
    ValueError: listing every missing, unused or misshaped tensor.
  """
  prefixes = sorted({m[0] for m in map(re.compile(r"layers\.\d+\.gnn_layer\.gnn|convs\.\d+").match, state_dict) if m},
                    key=lambda prefix: int(prefix.split(".")[1]))  # fmt: skip
  names = " ".join(state_dict)
  kind = "gat" if "att_src" in names else "sage" if "lin_l" in names else "gcn"
  table = {
    f"params/layer_{i}": tuple(interop.Leaf(f"{prefix}.{source}", name, **how) for source, name, how in _WEIGHTS[kind])
    for i, prefix in enumerate(prefixes)
  }
  if not table:
    raise ValueError(f"state_dict: got {sorted(state_dict)}, expected layers.<i>.gnn_layer.gnn or convs.<i>")
  return interop.variables(state_dict, table)["params"]
