"""Graphs as data: from edge lists, scipy or networkx to validated `jraph.GraphsTuple`s, and back. Host.

Conventions that every graph system relies on:

- `senders`, `receivers` [E] int32, sorted by receiver, then by sender. An undirected edge is stored in both directions.
- `nodes` [N, ...] features or None, `edges` [E] float32 weights, [E, ...] features, or None, `n_node` and `n_edge`
  [number of graphs] int32. Leaves are NumPy arrays.
- As a matrix, the row is the receiver and the column the sender: `to_scipy(graph) @ x` sums over incoming edges.
- A tuple with one graph has no padding. One with several ends in padding graphs, which `pad` and `batch` append: the
  first of them holds all padding nodes and edges, the others are empty. `node_mask` tells real nodes from padding.

Nothing is dropped, summed or symmetrised unless an option says so; whatever else is wrong raises a `ValueError`.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import scipy.sparse
from jaxtyping import Array, Bool, Float, Int

from jaxlab import checks
from jaxlab.graph import sparse

Duplicates = Literal["error", "sum", "drop"]
SelfLoops = Literal["error", "keep", "drop"]

# ------------------------------------------------------------------------------------------------ from other formats


def from_edges(
  senders: Int[np.ndarray, " e"],
  receivers: Int[np.ndarray, " e"],
  *,
  num_nodes: int,
  nodes: Any = None,
  edges: Float[np.ndarray, "e ..."] | None = None,
  duplicates: Duplicates = "error",
  self_loops: SelfLoops = "error",
  undirected: bool = False,
) -> jraph.GraphsTuple:
  """A validated graph from an edge list.

  Args:
    senders: [E] integer source of each edge, in [0, num_nodes).
    receivers: [E] integer target of each edge.
    num_nodes: N, isolated nodes included.
    nodes: array or pytree of arrays with N rows, or a `sparse.Operator` of N rows; kept as it is.
    edges: [E] weights, stored as float32, or [E, ...] features (float64 becomes float32); finite.
    duplicates: an edge given twice is an error, is "sum"med (without `edges`: its weight becomes its multiplicity), or
      is "drop"ped after its first occurrence.
    self_loops: an edge from a node to itself is an error, is kept, or is dropped.
    undirected: add the reverse of every edge. Then (i, j) and (j, i) in the input are duplicates of each other, and
      a self-loop is stored once.

  Returns:
    One graph, edges sorted by receiver, then sender.

  Raises:
    ValueError: naming the argument that is wrong.
  """
  num_nodes = checks.count("num_nodes", num_nodes, 0, 2**31 - 1)
  senders, receivers = _ids("senders", senders, num_nodes), _ids("receivers", receivers, num_nodes)
  if senders.shape != receivers.shape:
    raise ValueError(f"receivers: got {receivers.size} entries, expected {senders.size}, one per sender")
  checks.choice("duplicates", duplicates, Duplicates)
  checks.choice("self_loops", self_loops, SelfLoops)
  _check_nodes(nodes, num_nodes)
  if edges is not None:
    edges = _finite("edges", edges)
    if edges.ndim == 0 or len(edges) != senders.size:
      raise ValueError(f"edges: got shape {edges.shape}, expected {senders.size} rows, one per edge")
    if edges.ndim == 1:
      edges = edges.astype("float32")

  if undirected:  # one representative per pair; its mirror image is added at the end
    senders, receivers = np.minimum(senders, receivers), np.maximum(senders, receivers)

  loop = senders == receivers
  if loop.any() and self_loops == "error":
    raise ValueError(
      f"self_loops: got {loop.sum()} edges from a node to itself (first at node {senders[loop][0]}), expected none; "
      "choose 'keep' or 'drop'"
    )
  if self_loops == "drop":
    senders, receivers = senders[~loop], receivers[~loop]
    edges = None if edges is None else edges[~loop]

  key = receivers * num_nodes + senders
  unique, first, inverse, count = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
  if unique.size < key.size:
    if duplicates == "error":
      worst = first[np.argmax(count)]
      raise ValueError(
        f"duplicates: got {key.size - unique.size} repeated edges (for instance {senders[worst]} -> {receivers[worst]}"
        f", {count.max()} times), expected none; choose 'sum' or 'drop'"
      )
    if duplicates == "drop":
      edges = None if edges is None else edges[first]
  if duplicates == "sum":
    weights = np.ones(key.size, "float32") if edges is None else edges
    edges = np.zeros((unique.size, *weights.shape[1:]), weights.dtype)
    np.add.at(edges, inverse, weights)
  elif edges is not None and unique.size == key.size:
    edges = edges[first]
  senders, receivers = unique % max(num_nodes, 1), unique // max(num_nodes, 1)

  if undirected:
    mirrored = np.flatnonzero(senders != receivers)
    senders, receivers = np.append(senders, receivers[mirrored]), np.append(receivers, senders[mirrored])
    edges = None if edges is None else np.concatenate([edges, edges[mirrored]])
  return _sorted(senders, receivers, edges, nodes, np.array([num_nodes]))


def from_scipy(
  matrix: scipy.sparse.spmatrix | scipy.sparse.sparray,
  *,
  nodes: Any = None,
  duplicates: Duplicates = "error",
  self_loops: SelfLoops = "error",
  undirected: bool = False,
) -> jraph.GraphsTuple:
  """A graph from a square sparse matrix: entry (i, j) is the weight of edge j -> i. Every stored entry is an edge.

  Arguments and errors as `from_edges`; the matrix of an undirected graph is usually symmetric already, and needs
  `undirected` only if it holds one triangle. A repeated entry of a COO matrix is a duplicate.
  """
  coo = scipy.sparse.coo_array(matrix)
  if coo.shape[0] != coo.shape[1]:
    raise ValueError(f"matrix: got shape {coo.shape}, expected a square matrix")
  return from_edges(
    coo.col,
    coo.row,
    num_nodes=coo.shape[0],
    nodes=nodes,
    edges=coo.data,
    duplicates=duplicates,
    self_loops=self_loops,
    undirected=undirected,
  )


def from_networkx(
  graph: Any,
  *,
  weight: str | None = None,
  features: str | None = None,
  duplicates: Duplicates = "error",
  self_loops: SelfLoops = "error",
) -> jraph.GraphsTuple:
  """A graph from networkx (which need not be installed for the rest). Node i is the i-th of `graph.nodes`.

  Args:
    graph: `networkx.Graph`, `DiGraph` or their multi forms; undirected ones are stored in both directions.
    weight: name of the edge attribute with the weight or feature vector; None leaves edges unweighted.
    features: name of the node attribute with the feature vector.
    duplicates: as `from_edges`, for parallel edges of multigraphs.
    self_loops: as `from_edges`.
  """
  index = {node: i for i, node in enumerate(graph.nodes)}
  pairs = np.array([(index[u], index[v]) for u, v in graph.edges()], "int64").reshape(-1, 2)
  edges, nodes = None, None
  if weight is not None:
    edges = _attributes("weight", weight, [data for _, _, data in graph.edges(data=True)], np.empty(0, "float32"))
  if features is not None:
    nodes = _attributes("features", features, [data for _, data in graph.nodes(data=True)], np.empty((0, 0), "float32"))
  return from_edges(
    pairs[:, 0],
    pairs[:, 1],
    num_nodes=len(index),
    nodes=nodes,
    edges=edges,
    duplicates=duplicates,
    self_loops=self_loops,
    undirected=not graph.is_directed(),
  )


def to_scipy(graph: jraph.GraphsTuple) -> scipy.sparse.csr_array:
  """The weighted adjacency [N, N], row = receiver, column = sender; edges without weights count 1."""
  n = num_nodes(graph)
  return scipy.sparse.csr_array((_weights(graph), (graph.receivers, graph.senders)), shape=(n, n))


# ----------------------------------------------------------------------------------------------------- normalisation


def add_self_loops(graph: jraph.GraphsTuple, weight: float = 1.0) -> jraph.GraphsTuple:
  """A loop of the given weight at every node that has none; a loop that exists keeps its own weight.

  Unweighted edges stay unweighted. Apply before padding.
  """
  lonely = np.ones(num_nodes(graph), bool)
  lonely[graph.receivers[graph.senders == graph.receivers]] = False
  new = np.flatnonzero(lonely)
  edges = graph.edges
  if edges is not None:
    edges = np.append(_weights(graph), np.full(new.size, weight, "float32"))
  elif weight != 1:
    raise ValueError(f"weight: got {weight} for a graph without weights, expected 1")
  senders, receivers = np.append(graph.senders, new), np.append(graph.receivers, new)
  return _sorted(senders, receivers, edges, graph.nodes, graph.n_node, graph.globals)


def normalize(
  graph: jraph.GraphsTuple, kind: Literal["symmetric", "row"] = "symmetric", *, self_loops: bool = True
) -> jraph.GraphsTuple:
  """The propagation weights of a graph convolution, as the edges of the graph that is returned.

      symmetric:  w_ij / sqrt(d_i d_j)        row:  w_ij / d_i        with d_i = sum_j w_ij over incoming edges

  A node of degree 0 gets weights 0. With self-loops, an isolated node's row is that of the identity.

  Args:
    graph: weights [E] >= 0 in `edges`, or None for 1 everywhere. Not padded yet.
    kind: which of the two.
    self_loops: first add a loop of weight 1 where there is none (`add_self_loops`).

  Returns:
    The graph with weights [E'] float32.

  Raises:
    ValueError: if weights are negative or edges are feature vectors.

  Source: Kipf and Welling, ICLR 2017, arXiv:1609.02907, equation 2. Degrees count incoming edges where the graph is
  directed, as in PyTorch Geometric's `gcn_norm`.
  """
  checks.choice("kind", kind, Literal["symmetric", "row"])
  if self_loops:
    graph = add_self_loops(graph)
  weights = _weights(graph)
  if (weights < 0).any():
    raise ValueError(f"edges: got a weight of {weights.min()}, expected no negative weight")
  degree = np.bincount(graph.receivers, weights, num_nodes(graph)).astype("float64")  # integers if there are no edges
  power = np.zeros_like(degree)
  np.power(degree, -0.5 if kind == "symmetric" else -1.0, out=power, where=degree > 0)
  weights = weights * power[graph.receivers] * (power[graph.senders] if kind == "symmetric" else 1)
  return graph._replace(edges=weights.astype("float32"))


def is_symmetric(graph: jraph.GraphsTuple) -> bool:
  """Whether every edge has its reverse with the same weight: its operator then is its own transpose."""
  matrix = to_scipy(graph)
  mirrored = scipy.sparse.csr_array(matrix.T)
  mirrored.sort_indices()
  matrix.sort_indices()
  return all(np.array_equal(getattr(matrix, f), getattr(mirrored, f)) for f in ("indptr", "indices", "data"))


def to_undirected(graph: jraph.GraphsTuple, *, duplicates: Duplicates = "drop") -> jraph.GraphsTuple:
  """Adds the reverse of every edge of one graph. `duplicates` says what becomes of edges that had theirs already."""
  return from_edges(
    graph.senders,
    graph.receivers,
    num_nodes=num_nodes(graph),
    nodes=graph.nodes,
    edges=graph.edges,
    duplicates=duplicates,
    self_loops="keep",
    undirected=True,
  )._replace(globals=graph.globals)


# -------------------------------------------------------------------------------------------------- parts of a graph


def subgraph(graph: jraph.GraphsTuple, keep: Bool[np.ndarray, " n"]) -> jraph.GraphsTuple:
  """One graph's nodes in the mask, and the edges among them; nodes are renumbered in order.

  Raises:
    ValueError: if `keep` is not a mask over the nodes.
  """
  _require_dense(graph)
  keep = np.asarray(keep)
  if keep.shape != (num_nodes(graph),) or keep.dtype != bool:
    raise ValueError(f"keep: got {keep.dtype} of shape {keep.shape}, expected bool of shape {(num_nodes(graph),)}")
  number = np.cumsum(keep) - 1
  inside = keep[graph.senders] & keep[graph.receivers]
  rows = lambda tree, mask: jax.tree.map(lambda leaf: np.asarray(leaf)[mask], tree)
  return graph._replace(
    senders=number[graph.senders[inside]].astype("int32"),
    receivers=number[graph.receivers[inside]].astype("int32"),
    nodes=rows(graph.nodes, keep),
    edges=rows(graph.edges, inside),
    n_node=np.array([keep.sum()], "int32"),
    n_edge=np.array([inside.sum()], "int32"),
  )


def largest_component(graph: jraph.GraphsTuple) -> tuple[jraph.GraphsTuple, Bool[np.ndarray, " n"]]:
  """The largest weakly connected component of one graph, and the mask of its nodes (to select labels with)."""
  pattern = to_scipy(graph._replace(edges=None))
  _, component = scipy.sparse.csgraph.connected_components(pattern, directed=False)
  keep = component == np.argmax(np.bincount(component, minlength=1))
  return subgraph(graph, keep), keep


# ----------------------------------------------------------------------------------------------------- static shapes


def pad(graph: jraph.GraphsTuple, *, nodes: int, edges: int, graphs: int | None = None) -> jraph.GraphsTuple:
  """Appends padding up to static sizes, so that graphs of different sizes share one compilation.

  Padding edges come after all others, join the first padding node to itself, and have weight 0; they reach no real
  node. Edges stay sorted.

  Args:
    graph: one graph or several, not padded yet.
    nodes: N' > N, since padding edges need a node.
    edges: E' >= E.
    graphs: number of graphs with padding; default one more than there are.
  """
  validate(graph)
  _require_dense(graph)
  graphs = len(graph.n_node) + 1 if graphs is None else graphs
  for name, got, least in (
    ("nodes", nodes, int(np.sum(graph.n_node)) + 1),
    ("edges", edges, int(np.sum(graph.n_edge))),
    ("graphs", graphs, len(graph.n_node) + 1),
  ):
    if got < least:
      raise ValueError(f"{name}: got {got}, expected at least {least} (one padding node and graph included)")
  padded = jraph.pad_with_graphs(graph, nodes, edges, graphs)
  return jax.tree.map(_int32, padded)


def batch(
  graphs: Sequence[jraph.GraphsTuple],
  *,
  nodes: int | None = None,
  edges: int | None = None,
  num_graphs: int | None = None,
) -> jraph.GraphsTuple:
  """Several graphs as one tuple of disjoint graphs, padded.

  Args:
    graphs: not padded, with the same features.
    nodes: as `pad`; default the least that fits, which is a new shape for every batch.
    edges: likewise.
    num_graphs: likewise, padding included.
  """
  if not graphs:
    raise ValueError("graphs: got none, expected at least one")
  for graph in graphs:
    validate(graph)
    _require_dense(graph)
  structures = {jax.tree.structure((g.nodes, g.edges, g.globals)) for g in graphs}
  shapes = {tuple(leaf.shape[1:] for leaf in jax.tree.leaves((g.nodes, g.edges, g.globals))) for g in graphs}
  if len(structures) > 1 or len(shapes) > 1:
    raise ValueError(f"graphs: got features of shapes {sorted(shapes)}, expected the same in every graph")
  joined = jraph.batch_np(graphs)
  nodes = int(np.sum(joined.n_node)) + 1 if nodes is None else nodes
  edges = int(np.sum(joined.n_edge)) if edges is None else edges
  return pad(joined, nodes=nodes, edges=edges, graphs=num_graphs)


def node_mask(graph: jraph.GraphsTuple) -> Bool[Array, " n"]:
  """True for real nodes, False for padding; see the module's conventions. Works while tracing if there are `nodes`."""
  total = _rows(graph)
  if graph.n_node.shape[0] == 1:
    return jnp.ones(total, bool)
  # The last graph that has nodes is the padding graph, for `pad` leaves it at least one.
  occupied = jnp.where(graph.n_node > 0, jnp.arange(graph.n_node.shape[0]), 0)
  return jnp.arange(total) < total - graph.n_node[jnp.max(occupied)]


def graph_ids(graph: jraph.GraphsTuple) -> Int[Array, " n"]:
  """The graph that each node belongs to; padding nodes belong to a padding graph. Traces as `node_mask` does."""
  return jnp.repeat(jnp.arange(graph.n_node.shape[0], dtype="int32"), graph.n_node, total_repeat_length=_rows(graph))


def num_nodes(graph: jraph.GraphsTuple) -> int:
  """Number of nodes in all graphs of the tuple, padding included. Host."""
  return int(np.sum(graph.n_node))


# -------------------------------------------------------------------------------------------------------- validation


def validate(graph: jraph.GraphsTuple) -> None:
  """Checks a graph that was not made here.

  Raises:
    ValueError: if indices are out of range or unsorted, lengths disagree, or numbers are not finite.
  """
  n = num_nodes(graph)
  senders, receivers = _ids("senders", graph.senders, n), _ids("receivers", graph.receivers, n)
  if senders.shape != receivers.shape or np.sum(graph.n_edge) != senders.size:
    raise ValueError(
      f"receivers: got {receivers.size} for {senders.size} senders and n_edge of {np.sum(graph.n_edge)}, expected equal"
    )
  if (np.diff(receivers) < 0).any():
    raise ValueError("receivers: got edges in another order, expected them sorted by receiver")
  _check_nodes(graph.nodes, n)
  for leaf in jax.tree.leaves(graph.edges):
    if len(_finite("edges", leaf)) != senders.size:
      raise ValueError(f"edges: got {len(leaf)} rows, expected {senders.size}, one per edge")


def _sorted(senders, receivers, edges, nodes, n_node, global_features=None):
  order = np.argsort(receivers * np.int64(max(np.sum(n_node), 1)) + senders, kind="stable")  # linear if sorted already
  receivers = receivers[order].astype("int32")
  graph_of_node = np.repeat(np.arange(len(n_node)), n_node)
  return jraph.GraphsTuple(
    nodes=nodes,
    edges=None if edges is None else edges[order],
    senders=senders[order].astype("int32"),
    receivers=receivers,
    globals=global_features,
    n_node=np.asarray(n_node, "int32"),
    n_edge=np.bincount(graph_of_node[receivers], minlength=len(n_node)).astype("int32"),
  )


def _weights(graph: jraph.GraphsTuple) -> np.ndarray:
  if graph.edges is None:
    return np.ones(len(graph.senders), "float32")
  if getattr(graph.edges, "ndim", 0) != 1:
    raise ValueError(f"edges: got features {jax.tree.map(np.shape, graph.edges)}, expected weights [E] or None")
  return np.asarray(graph.edges)


def _rows(graph: jraph.GraphsTuple) -> int:
  """Number of nodes, from shapes alone where there are node features."""
  if graph.nodes is None:
    return num_nodes(graph)
  return graph.nodes.shape[0] if _is_operator(graph.nodes) else jax.tree.leaves(graph.nodes)[0].shape[0]


def _is_operator(nodes: Any) -> bool:
  """Whether features are stored as one `sparse.Operator`, a matrix whose leaves do not have a row per node."""
  return isinstance(nodes, sparse.Operator)


def _require_dense(graph: jraph.GraphsTuple) -> None:
  if _is_operator(graph.nodes):
    raise ValueError("nodes: got a sparse operator, expected arrays; take or pad its rows first")


def _check_nodes(nodes: Any, n: int) -> None:
  if _is_operator(nodes):
    leaves, values = [nodes], nodes.values
  else:
    leaves = values = jax.tree.leaves(nodes)
  for leaf in leaves:
    if not np.shape(leaf) or leaf.shape[0] != n:
      raise ValueError(f"nodes: got shape {np.shape(leaf)}, expected {n} rows, one per node")
  for leaf in jax.tree.leaves(values):
    _finite("nodes", leaf)


def _ids(name: str, ids: Any, n: int) -> np.ndarray:
  ids = np.asarray(ids)
  if ids.size == 0:
    ids = ids.astype("int64")  # an empty list has no type of its own
  if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(f"{name}: got {ids.dtype} of shape {ids.shape}, expected integers of shape [E]")
  if ids.size and (ids.min() < 0 or ids.max() >= n):
    wrong = ids[(ids < 0) | (ids >= n)][0]
    raise ValueError(f"{name}: got node {wrong}, expected nodes in [0, {n})")
  return ids.astype("int64")


def _finite(name: str, values: Any) -> np.ndarray:
  values = np.asarray(values)
  if values.dtype == object or values.dtype.kind in "bcmMSU":
    raise ValueError(f"{name}: got {values.dtype}, expected real numbers")
  if values.dtype.kind == "f" and not np.isfinite(values).all():
    raise ValueError(f"{name}: got NaN or infinite values, expected finite numbers")
  return values.astype("float32") if values.dtype == np.float64 else values


def _attributes(argument: str, name: str, records: list[dict], empty: np.ndarray) -> np.ndarray:
  missing = sum(name not in record for record in records)
  if missing:
    raise ValueError(f"{argument}: got {name!r}, which {missing} of {len(records)} lack, expected it on each")
  return np.array([record[name] for record in records]) if records else empty


def _int32(leaf):
  return leaf.astype("int32") if leaf.dtype == np.int64 else leaf
