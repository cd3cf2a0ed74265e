"""What one task does: embeds one subgraph, and rotates the vectors of one part to the frame of the border."""

from collections.abc import Callable

import jax
import jraph
import numpy as np
import threadpoolctl
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from jaxlab.graph import factorization, sparse

Embedder = Callable[[Int[np.ndarray, "2 e"], int, int, PRNGKeyArray], Float[np.ndarray, "n dim"]]

_netmf = jax.jit(factorization.netmf, static_argnames=("dim", "window", "negatives", "oversample", "iterations"))


def netmf(edges: Int[np.ndarray, "2 e"], num_nodes: int, dim: int, key: PRNGKeyArray) -> Float[np.ndarray, "n dim"]:
  """The default `Embedder`: `factorization.netmf`, padded to powers of two so that few programs are compiled.

  Args:
    edges: [2, E], each undirected edge once, numbered from 0.
    num_nodes: N.
    dim: columns.
    key: the randomness.
  """
  z = _netmf(padded_operator(edges, num_nodes), key, dim=power_of_two(dim))
  return np.asarray(z)[:num_nodes, :dim]


def padded_operator(edges: Int[np.ndarray, "2 e"], num_nodes: int) -> sparse.Operator:
  """Host. The symmetric adjacency, padded to powers of two nodes and entries: few programs for all leaves.

  Args:
    edges: [2, E], each undirected edge once, numbered from 0.
    num_nodes: N; nodes from there on are padding.
  """
  size, room = power_of_two(num_nodes), power_of_two(2 * edges.shape[1])
  senders, receivers = np.concatenate([edges, edges[::-1]], axis=1)
  order = np.lexsort((senders, receivers))
  padding = (0, room - len(order))
  # Padding entries of weight 0 belong to the last node, whether it is a real one or not.
  senders, receivers = (np.pad(x[order], padding, constant_values=size - 1) for x in (senders, receivers))
  weights = np.pad(np.ones(len(order), "float32"), padding)
  graph = jraph.GraphsTuple(
    nodes=np.zeros((size, 0)), edges=weights, senders=senders, receivers=receivers, globals=None,
    n_node=np.array([size]), n_edge=np.array([room]),
  )  # fmt: skip
  return sparse.operator(graph)


def power_of_two(n: int) -> int:
  """The smallest from 32 that is not below n."""
  return max(32, 1 << (int(n) - 1).bit_length())


def embed_leaf(
  nodes: Int[np.ndarray, " n"],
  sources: Int[np.ndarray, " e"],
  targets: Int[np.ndarray, " e"],
  dim: int,
  seed: int,
  embedder: Embedder,
  scale: bool,
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n dim"]]:
  """Host. Sorted nodes and their vectors, whatever order nodes and edges come in.

  Args:
    nodes: [N] ids, all different.
    sources: [E] ids.
    targets: [E] ids; each undirected edge once.
    dim: columns.
    seed: of the key.
    embedder: a function of local numbers.
    scale: to a mean row norm of 1.

  Raises:
    ValueError: the embedder returns another shape, or numbers that are not finite.
  """
  nodes = np.sort(nodes)
  if not len(sources):
    return nodes, np.zeros((len(nodes), dim), np.float32)
  edges = np.sort(np.searchsorted(nodes, np.stack([sources, targets])), axis=0)
  edges = edges[:, np.lexsort(edges[::-1])].astype(np.int32)
  # NumPy's sums depend on the number of threads, which differs between executors and the reference.
  with threadpoolctl.threadpool_limits(1):
    z = np.asarray(embedder(edges, len(nodes), dim, jax.random.key(seed)), np.float32)
  if z.shape != (len(nodes), dim) or not np.isfinite(z).all():
    raise ValueError(f"embedder: got {z.shape} with finite {np.isfinite(z).all()}, expected finite {len(nodes), dim}")
  norm = float(np.sqrt(np.square(z, dtype=np.float64).sum(axis=1)).mean()) if scale else 1.0
  return nodes, (z / (norm or 1.0)).astype(np.float32)


def align(
  internal: Float[np.ndarray, "n d"], border: Float[np.ndarray, "n d"], on_border: Bool[np.ndarray, " n"]
) -> Float[np.ndarray, "n d"]:
  """Host. internal Q + border, with the orthogonal Q for which ||internal Q - border|| is least on border nodes.

  Args:
    internal: vectors of a part, in its own frame.
    border: vectors in the common frame; anything where there is none.
    on_border: which nodes have one.
  """
  border = np.where(on_border[:, None], border, 0).astype(np.float64)
  with threadpoolctl.threadpool_limits(1):
    left, _, right = np.linalg.svd(internal[on_border].astype(np.float64).T @ border[on_border])
    return (internal.astype(np.float64) @ (left @ right) + border).astype(np.float32)
