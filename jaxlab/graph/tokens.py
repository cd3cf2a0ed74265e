"""Every node as a sequence of subgraphs that random walks find around it, from wide to narrow. Host.

For a node v, a length i and a repetition, `walks` uniform random walks of i steps start at v; the nodes that they visit
induce one token, a subgraph. A node's sequence is `repetitions` tokens of the greatest length, ..., `repetitions` of
length 1, and last the node alone (Behrouz and Hashemi, "Graph Mamba", KDD 2024, section 4.1). A walk follows edges from
sender to receiver; where there is none it stays.

Walks are drawn from a stream that depends on the seed and on the node's key alone, and choose among neighbours in the
order of their keys: a graph whose nodes are numbered otherwise, with the keys that go along, has the same tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax.numpy as jnp
import jraph
import numba
import numpy as np
import scipy.sparse
from jaxtyping import Array, Bool, Int

from jaxlab.graph import sparse, structure


class Tokens(NamedTuple):
  """Tokens of N nodes, each with a sequence of T = length * repetitions + 1, as one list of members.

  Attributes:
    counts: [N, T] members of each token.
    members: [P] node behind each member; tokens follow each other, each with its own node first.
    senders: [Q] edges of the induced subgraphs, as numbers of members.
    receivers: [Q] likewise, ascending.
    edges: [Q] number of the graph's edge behind each.
    walks: [N, T, walks, length + 1] nodes in the order of the walk, -1 after its end.
    repetitions: tokens of one length.
  """

  counts: Int[np.ndarray, "n t"]
  members: Int[np.ndarray, " p"]
  senders: Int[np.ndarray, " q"]
  receivers: Int[np.ndarray, " q"]
  edges: Int[np.ndarray, " q"]
  walks: Int[np.ndarray, "n t walks steps"]
  repetitions: int


def sample(
  graph: jraph.GraphsTuple,
  *,
  length: int,
  walks: int,
  repetitions: int = 1,
  seed: int = 0,
  keys: Int[np.ndarray, " n"] | None = None,
) -> Tokens:
  """Draws the tokens of every node.

  Args:
    graph: one graph or several, not padded; features are not read.
    length: m, steps of the longest walks.
    walks: M, for each token.
    repetitions: s, tokens of each length.
    seed: of all walks.
    keys: distinct identities of the nodes; default their numbers.

  Raises:
    ValueError: a count below 1, or keys that repeat.
  """
  for name, value in (("length", length), ("walks", walks), ("repetitions", repetitions)):
    if value < 1:
      raise ValueError(f"{name}: got {value}, expected a positive integer")
  n = structure.num_nodes(graph)
  keys = np.arange(n) if keys is None else np.asarray(keys)
  if keys.shape != (n,) or np.unique(keys).size != n:
    raise ValueError(f"keys: got {np.unique(keys).size} distinct ones of shape {keys.shape}, expected {n}")
  senders, receivers = np.asarray(graph.senders, "int64"), np.asarray(graph.receivers, "int64")
  forward = np.lexsort((keys[receivers], senders))
  bounds = lambda ends: np.searchsorted(ends, np.arange(n + 1))
  counts, members, inner_senders, inner_receivers, edges, paths = _sample(
    bounds(senders[forward]), receivers[forward], bounds(receivers), senders, keys.astype("uint64"), length, walks,
    repetitions, np.uint64(seed % 2**64),
  )  # fmt: skip
  return Tokens(counts, members, inner_senders, inner_receivers, edges, paths, repetitions)


@numba.njit(cache=True, inline="always")
def _mix(x):
  """A bijection of 64-bit words that looks random: the finalizer of SplitMix64."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


@numba.njit(cache=True)
def _sample(out_starts, out_nodes, in_starts, in_nodes, keys, length, walks, repetitions, seed):
  n, tokens = len(keys), length * repetitions + 1
  counts = np.zeros((n, tokens), np.int32)
  paths = np.full((n, tokens, walks, length + 1), -1, np.int32)
  members = np.empty(n * (1 + repetitions * (length + walks * length * (length + 1) // 2)), np.int32)
  last, place = np.full(n, -1, np.int64), np.zeros(n, np.int64)  # the token that met a node last, and its member there
  total = edges = 0
  for v in range(n):
    state = _mix(keys[v] ^ _mix(seed + np.uint64(0x9E3779B97F4A7C15)))
    for t in range(tokens):
      first, token = total, v * tokens + t
      members[total], last[v] = v, token
      total += 1
      steps = length - t // repetitions if t < tokens - 1 else 0
      for w in range(walks):
        paths[v, t, w, 0] = here = v
        for i in range(steps):
          choices = out_starts[here + 1] - out_starts[here]
          state += np.uint64(0x9E3779B97F4A7C15)
          if choices > 0:
            here = out_nodes[out_starts[here] + np.int64(_mix(state) % np.uint64(choices))]
          paths[v, t, w, i + 1] = here
          if last[here] != token:
            last[here], members[total] = token, here
            total += 1
      counts[v, t] = total - first
      for p in range(first, total):
        for e in range(in_starts[members[p]], in_starts[members[p] + 1]):
          edges += last[in_nodes[e]] == token
  senders, receivers, ids = np.empty(edges, np.int32), np.empty(edges, np.int32), np.empty(edges, np.int32)
  last[:] = -1
  q = start = 0
  for token in range(n * tokens):
    stop = start + counts[token // tokens, token % tokens]
    for p in range(start, stop):
      last[members[p]], place[members[p]] = token, p
    for p in range(start, stop):
      for e in range(in_starts[members[p]], in_starts[members[p] + 1]):
        if last[in_nodes[e]] == token:
          senders[q], receivers[q], ids[q] = place[in_nodes[e]], p, e
          q += 1
    start = stop
  return counts, members[:total].copy(), senders, receivers, ids, paths


def batch(
  tokens: Sequence[Tokens],
  *,
  graph_edges: Sequence[int],
  nodes: int | None = None,
  members: int | None = None,
  edges: int | None = None,
) -> Tokens:
  """Tokens of several graphs as those of `structure.batch` of the graphs, padded to static sizes.

  Padding nodes have empty tokens, but for the last one's last token, which holds all padding members.

  Args:
    tokens: of each graph, drawn with the same settings.
    graph_edges: number of edges of each graph.
    nodes: with padding; default one more than there are.
    members: with padding; default as many as there are.
    edges: of the induced subgraphs, with padding; default as many as there are.

  Raises:
    ValueError: a size that is too small, or tokens of different settings.
  """
  settings = {(t.counts.shape[1], *t.walks.shape[1:], t.repetitions) for t in tokens}
  if len(settings) != 1 or len(graph_edges) != len(tokens):
    raise ValueError(f"tokens: got settings {settings} and {len(graph_edges)} edge counts, expected one kind, one each")
  offsets = lambda sizes: np.cumsum([0, *sizes])[:-1]
  first_node, first_edge = offsets([len(t.counts) for t in tokens]), offsets(graph_edges)
  first_member = offsets([len(t.members) for t in tokens])
  joined = Tokens(
    np.concatenate([t.counts for t in tokens]),
    np.concatenate([t.members + a for t, a in zip(tokens, first_node, strict=True)]),
    np.concatenate([t.senders + a for t, a in zip(tokens, first_member, strict=True)]),
    np.concatenate([t.receivers + a for t, a in zip(tokens, first_member, strict=True)]),
    np.concatenate([t.edges + a for t, a in zip(tokens, first_edge, strict=True)]),
    np.concatenate([np.where(t.walks < 0, -1, t.walks + a) for t, a in zip(tokens, first_node, strict=True)]),
    tokens[0].repetitions,
  )
  n, p, q = len(joined.counts), len(joined.members), len(joined.edges)
  nodes = n + 1 if nodes is None else nodes
  members = p + (edges is not None and edges > q) if members is None else members
  edges = q if edges is None else edges
  for name, got, least in (("nodes", nodes, n + 1), ("members", members, p + (edges > q)), ("edges", edges, q)):
    if got < least:
      raise ValueError(f"{name}: got {got}, expected at least {least}")
  counts = np.zeros((nodes, joined.counts.shape[1]), "int32")
  counts[:n] = joined.counts
  counts[-1, -1] = members - p

  def pad(array, size, value):
    rows = np.full((size - len(array), *array.shape[1:]), value, "int32")
    return np.concatenate([array, rows]).astype("int32")

  return Tokens(
    counts,
    pad(joined.members, members, nodes - 1),
    pad(joined.senders, edges, members - 1),
    pad(joined.receivers, edges, members - 1),
    pad(joined.edges, edges, 0),
    pad(joined.walks, nodes, -1),
    joined.repetitions,
  )


# --------------------------------------------------------------------------------------- what a network takes of tokens


@flax.struct.dataclass
class SubgraphTokens:
  """Induced subgraphs on the device: all members as the nodes of one graph of P nodes.

  Attributes:
    subgraphs: [P, P] their edges, values 1.
    members: [P, N] one entry a row: the node behind each member.
    pool: [N * T, P] the mean over a token's members.
    edges: [Q] number of the graph's edge behind each edge of `subgraphs`.
    repetitions: tokens of one length.
  """

  subgraphs: sparse.Operator
  members: sparse.Operator
  pool: sparse.Operator
  edges: Int[Array, " q"]
  repetitions: int = flax.struct.field(pytree_node=False)

  @property
  def own(self) -> Int[Array, " nt"]:
    """[N * T] the member that is the token's own node; of an empty token any member."""
    return jnp.minimum(self.pool.row_starts[:-1], self.members.shape[0] - 1)


@flax.struct.dataclass
class WalkTokens:
  """Walks on the device, R = N * T * walks * (length + 1) positions in that order.

  Attributes:
    positions: [R, N] one entry a row: 1 at the node of the position, or a 0 after the walk's end.
    bits: [N, T, walks, length + 1, 2 window - 1] what the walk repeats, see `walk_bits`.
    edges: [N, T, walks, length + 1] number of the edge that led to a position, -1 for none.
    repetitions: tokens of one length.
  """

  positions: sparse.Operator
  bits: Bool[Array, "n t walks steps b"]
  edges: Int[Array, "n t walks steps"]
  repetitions: int = flax.struct.field(pytree_node=False)


def subgraphs(tokens: Tokens) -> SubgraphTokens:
  """The form for encoders that see the induced subgraphs."""
  n, p = len(tokens.counts), len(tokens.members)
  counts = tokens.counts.reshape(-1)
  rows = np.repeat(np.arange(len(counts)), counts)
  every = np.arange(p)
  graph = jraph.GraphsTuple(every, None, tokens.receivers, tokens.senders, None, np.array([p]), np.array([0]))
  one = np.ones(p, "float32")
  return SubgraphTokens(
    sparse.operator(graph, jnp.ones(len(tokens.edges))),
    sparse.from_scipy(scipy.sparse.csr_array((one, (every, tokens.members)), shape=(p, n))),
    sparse.from_scipy(scipy.sparse.csr_array((one / counts[rows], (rows, every)), shape=(len(counts), p))),
    jnp.asarray(tokens.edges, "int32"),
    tokens.repetitions,
  )


def walk_tokens(tokens: Tokens, graph: jraph.GraphsTuple, *, window: int = 8) -> WalkTokens:
  """The form for encoders that see the walks, with the bits of CRaWl (Toenshoff et al., arXiv:2102.08786).

  Args:
    tokens: of the graph, padded or not.
    graph: what they were drawn from, padded alike.
    window: W, how far back a position is compared with.

  Raises:
    ValueError: a window below 1.
  """
  if window < 1:
    raise ValueError(f"window: got {window}, expected a positive integer")
  n = len(tokens.counts)
  flat = tokens.walks.reshape(-1)
  positions = scipy.sparse.csr_array(
    ((flat >= 0).astype("float32"), (np.arange(flat.size), np.maximum(flat, 0))), shape=(flat.size, n)
  )
  starts = np.searchsorted(graph.receivers, np.arange(n + 1))
  bits, edges = walk_bits(tokens.walks, starts, np.asarray(graph.senders), window)
  return WalkTokens(sparse.from_scipy(positions), jnp.asarray(bits), jnp.asarray(edges), tokens.repetitions)


@numba.njit(cache=True)
def walk_bits(
  walks: Int[np.ndarray, "n t walks steps"], starts: Int[np.ndarray, " n1"], senders: Int[np.ndarray, " e"], window: int
) -> tuple[Bool[np.ndarray, "n t walks steps b"], Int[np.ndarray, "n t walks steps"]]:
  """For each position w_i: 1[w_i = w_{i-k}] for k = 1..W, then 1[w_{i-k} -> w_i is an edge] for k = 2..W; and the edge
  from w_{i-1}.

  Args:
    walks: nodes, -1 after the end.
    starts: edges into node v are `starts[v]` up to `starts[v + 1]`, sorted by sender.
    senders: of the edges.
    window: W.
  """
  n, tokens, count, steps = walks.shape
  bits = np.zeros((n, tokens, count, steps, 2 * window - 1), np.bool_)
  edges = np.full((n, tokens, count, steps), -1, np.int32)
  for v in range(n):
    for t in range(tokens):
      for w in range(count):
        for i in range(1, steps):
          here = walks[v, t, w, i]
          if here < 0:
            break
          for k in range(1, min(window, i) + 1):
            before = walks[v, t, w, i - k]
            bits[v, t, w, i, k - 1] = before == here
            row = senders[starts[here] : starts[here + 1]]
            e = np.searchsorted(row, before)
            if e < len(row) and row[e] == before:
              if k > 1:
                bits[v, t, w, i, window + k - 2] = True
              else:
                edges[v, t, w, i] = starts[here] + e
  return bits, edges
