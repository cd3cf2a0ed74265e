"""The memory of a stream, the network that reads it, and what events write into it."""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxlab import checks
from jaxlab.data.temporal import Batches
from jaxlab.graph import layers
from jaxlab.graph.links.nat._caches import Slots, insert, join, slot_of, sum_by_key
from jaxlab.nn.initializers import torch_bias, torch_kernel


class Latest(NamedTuple):
  """A node's latest event, not yet in its `self_rep`: updates are applied when the node is next touched."""

  partner: Int[Array, " n1"]
  edge: Int[Array, " n1"]
  time: Float[Array, " n1"]


class Memory(NamedTuple):
  """The state of a stream over nodes 1 to N; row 0 is nobody's and stays as it is.

  Attributes:
    slots: arrays [N + 1, S, ...].
    self_rep: [N + 1, F] float32.
    latest: arrays [N + 1].
    hash_seed: s of hash_k(a) = (a s + a^2 (s + 1)) mod M_k. With s = M_k - 1 that is -a, without collisions if M_k > N.
  """

  slots: Slots
  self_rep: Float[Array, "n1 F"]
  latest: Latest
  hash_seed: Int[Array, ""]


class Writes(NamedTuple):
  """What a batch changes: new rows of the memory. Those at N + 1, which does not exist, change nothing."""

  at: Int[Array, " b2"]
  slots: Slots
  self_rep: Float[Array, "b2 F"]
  latest: Latest


class Tables(NamedTuple):
  """Frozen features; row 0 of each is zero."""

  node: Float[Array, "n1 dn"]
  edge: Float[Array, "e1 de"]


class Read(NamedTuple):
  """What a batch of B events read and refreshed, for `changes`. Rows are senders, then receivers, then negatives."""

  ids: Int[Array, " b3"]
  slots: Slots  # as stored, [3B, S, ...]
  rep: Float[Array, "b3 s f"]  # refreshed, float32
  self_rep: Float[Array, "b3 F"]  # refreshed, float32


class GRU(nn.Module):
  """Gated recurrent cell with two biases, as `torch.nn.GRUCell`: the reset gate acts after the hidden bias."""

  features: int
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "*b i"], hidden: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """The next hidden state."""

    def gates(name, x):
      width, bound = 3 * self.features, torch_bias(self.features)
      kernel = self.param(f"{name}_kernel", bound, (x.shape[-1], width), self.param_dtype)
      bias = self.param(f"{name}_bias", bound, (width,), self.param_dtype)
      y = x.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)
      return jnp.split(y, 3, axis=-1)

    (r, z, n), (r_h, z_h, n_h) = gates("input", x), gates("hidden", hidden)
    z = nn.sigmoid(z + z_h)
    return (1 - z) * jnp.tanh(n + nn.sigmoid(r + r_h) * n_h) + z * hidden.astype(self.dtype)


class TimeCode(nn.Module):
  """cos(t w + phi) of absolute time, float32, with w_i = 10^(-linspace(0, 9, D_t)) at first."""

  features: int
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, time: Float[Array, "*b"]) -> Float[Array, "*b features"]:
    """[...] -> [..., D_t]."""
    spread = lambda _, shape, dtype: jnp.asarray(10.0 ** -np.linspace(0, 9, *shape), dtype)
    w = self.param("frequency", spread, (self.features,), self.param_dtype)
    phi = self.param("phase", nn.initializers.zeros, (self.features,), self.param_dtype)
    return jnp.cos(time[..., None] * w.astype("float32") + phi.astype("float32"))


class NAT(nn.Module):
  """Scores the events of a batch against as many negatives.

  Attributes:
    slots: (M_1, M_2), (M_1,) or (), for two, one and no hops.
    self_dim: F, width of a node's own representation.
    slot_dim: f, width of a slot's.
    time_dim: D_t.
    position_dim: P, width of the embedding of the 6 bits.
    num_heads: H.
    dropout: rate in training, before and after the aggregation's projection.
    replace_prob: alpha, with which a new key takes the slot of another.
    aggregation: "sum" over keys as the official code, or "attention" over them as the paper.
    dtype: compute dtype; the memory and sums over keys stay float32.
    param_dtype: parameter dtype.
  """

  slots: tuple[int, ...] = (32, 16)
  self_dim: int = 72
  slot_dim: int = 4
  time_dim: int = 1
  position_dim: int = 16
  num_heads: int = 2
  dropout: float = 0.1
  replace_prob: float = 0.9
  aggregation: Literal["sum", "attention"] = "sum"
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @property
  def sizes(self) -> tuple[int, ...]:
    """(1, M_1, M_2)."""
    return (1, *self.slots)

  @nn.compact
  def __call__(
    self, memory: Memory, tables: Tables, events: Batches, *, train: bool = False
  ) -> tuple[Float[Array, "2 b"], Read]:
    """Reads the memory, which `write` changes afterwards.

    Args:
      memory: from `reset` or `write`.
      tables: features of nodes and edges.
      events: arrays [B]; rows of zeros are padding. Edge ids and times are not read here: a score must not see them.
      train: draws dropout (stream "dropout").

    Returns:
      Logits in `dtype` of the events and of their negatives, [2, B], and what `changes` needs.

    Raises:
      ValueError: while tracing, if an attribute is out of range or arrays do not fit.
    """
    self._check(memory, tables, events)
    memory, tables, events = jax.tree.map(jnp.asarray, (memory, tables, events))
    ids = jnp.concatenate([events.senders, events.receivers, events.negatives])
    time_code = TimeCode(self.time_dim, self.param_dtype, name="time_code")

    def message(width, name, node, edge, time):
      # W [self(node); edge; T(time)], one block of W at a time.
      shape = (self.self_dim + tables.edge.shape[-1] + self.time_dim, width)
      kernel = self.param(f"{name}_kernel", torch_kernel, shape, self.param_dtype).astype(self.dtype)
      blocks = jnp.split(kernel, [self.self_dim, self.self_dim + tables.edge.shape[-1]])
      if len(memory.self_rep) <= node.size:  # every node once is less work than each that is asked for
        y = (memory.self_rep.astype(self.dtype) @ blocks[0])[node]
      else:
        y = memory.self_rep[node].astype(self.dtype) @ blocks[0]
      return y + tables.edge[edge].astype(self.dtype) @ blocks[1] + time_code(time).astype(self.dtype) @ blocks[2]

    def gru(width, name):
      return GRU(width, self.dtype, self.param_dtype, name=f"{name}_gru")

    stored = jax.tree.map(lambda a: a[ids], memory.slots)
    stored = stored._replace(key=stored.key.at[:, 0].set(ids))
    x = message(self.slot_dim, "slot", stored.key, stored.edge, stored.time)
    rep = jnp.where(stored.time[..., None] != 0, gru(self.slot_dim, "slot")(x, stored.rep), 0)

    # A node without events is refreshed too: with self(0) = 0, no edge and time 0.
    x = message(self.self_dim, "self", *jax.tree.map(lambda a: a[ids], memory.latest))
    self_rep = gru(self.self_dim, "self")(x, memory.self_rep[ids])

    aggregated = Aggregation(self.sizes, *self._aggregation(), name="aggregation")(
      stored.key, rep, tables.node, memory.hash_seed, train=train
    )
    sender, receiver, negative = jnp.split(self_rep, 3)
    pair = jnp.concatenate(
      [aggregated, jnp.concatenate([sender, sender]), jnp.concatenate([receiver, negative])], axis=-1
    )
    hidden = nn.relu(_head(pair.shape[-1], pair.shape[-1], self, "hidden_layer")(pair))
    logits = _head(1, pair.shape[-1], self, "output_layer")(hidden)
    read = jax.lax.stop_gradient(Read(ids, stored, rep.astype("float32"), self_rep.astype("float32")))
    return logits.reshape(2, -1), read

  def _aggregation(self):
    return self.position_dim, self.num_heads, self.dropout, self.aggregation, self.dtype, self.param_dtype

  def _check(self, memory, tables, events):
    _check_model(self)
    nodes, slots, width = memory.slots.rep.shape[-3:]
    if (slots, width) != (sum(self.sizes), self.slot_dim):
      raise ValueError(
        f"memory: got {slots} slots of width {width}, expected {sum(self.sizes)} of width {self.slot_dim}"
      )
    if memory.self_rep.shape != (nodes, self.self_dim):
      raise ValueError(f"memory: got self_rep of shape {memory.self_rep.shape}, expected {(nodes, self.self_dim)}")
    if tables.node.ndim != 2 or len(tables.node) != nodes or tables.edge.ndim != 2:
      raise ValueError(
        f"tables: got node {tables.node.shape} and edge {tables.edge.shape}, expected [{nodes}, D_n] and [E + 1, D_e]"
      )
    shapes = {np.shape(a) for a in events}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
      raise ValueError(f"events: got shapes {sorted(shapes)}, expected one batch, arrays [B]")
    if any(a.dtype.kind not in "iu" for a in events[:4]):
      raise ValueError("events: got ids that are not integers, expected int32")


class Aggregation(nn.Module):
  """Joins the slots of both ends of each pair by key and sums over keys; attributes as those of `NAT`."""

  sizes: tuple[int, ...]
  position_dim: int
  num_heads: int
  dropout: float
  aggregation: str
  dtype: jax.typing.DTypeLike
  param_dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(
    self,
    key: Int[Array, "b3 s"],
    rep: Float[Array, "b3 s f"],
    nodes: Float[Array, "n1 dn"],
    hash_seed: Int[Array, ""],
    *,
    train: bool,
  ) -> Float[Array, "b2 dn"]:
    """Of the pairs (sender, receiver), then (sender, negative)."""
    width = nodes.shape[-1]
    both = lambda a: jnp.concatenate([_twice(a[: len(a) // 3]), a[len(a) // 3 :]], axis=1)
    key, rep = both(key), both(rep)
    bits, place = join(key, self.sizes, hash_seed)
    first = place == jnp.arange(place.shape[1])
    embedding = self.param("position", nn.initializers.normal(1.0), (64, self.position_dim), self.param_dtype)
    # A key occurs at most once in a dictionary, so the bits count its slots.
    node = nodes[key] * jax.lax.population_count(bits)[..., None]
    parts = node, sum_by_key(rep.astype("float32"), place), jnp.asarray(embedding, "float32")[bits]
    row = jnp.concatenate(parts, -1) * first[..., None]

    shape = (row.shape[-1], self.num_heads * width)
    kernel = self.param("kernel", nn.initializers.glorot_uniform(), shape, self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, (width,), self.param_dtype)
    h = jnp.asarray(layers.Dropout(self.dropout)(row.astype(self.dtype), train=train)) @ kernel.astype(self.dtype)
    h = jnp.asarray(layers.Dropout(self.dropout)(h, train=train), "float32")
    h = h.reshape(*key.shape, self.num_heads, width)
    if self.aggregation == "attention":
      glorot = nn.initializers.glorot_uniform(in_axis=-2, out_axis=-1)
      scores = [
        (h * self.param(name, glorot, (self.num_heads, width), self.param_dtype).astype("float32")).sum(-1)
        for name in ("attention_source", "attention_target")
      ]
      score = nn.leaky_relu(scores[0] + scores[1], 0.2)
      h = h * jax.nn.softmax(score, axis=1, where=first[..., None])[..., None]
    return (h.sum(axis=1).mean(axis=1) + bias.astype("float32")).astype(self.dtype)


def _twice(a):
  return jnp.concatenate([a, a])


def _head(features, fan_in, model, name):
  xavier, bias = nn.initializers.xavier_normal(), torch_bias(fan_in)
  return nn.Dense(features, True, model.dtype, model.param_dtype, kernel_init=xavier, bias_init=bias, name=name)


# --------------------------------------------------------------------------------------------------------- the memory


def reset(model: NAT, num_nodes: int, hash_seed: int | Int[Array, ""] = 0) -> Memory:
  """The memory before the first event.

  Args:
    model: gives the sizes.
    num_nodes: N.
    hash_seed: s, drawn once a run from 0 to 99 and kept.

  Raises:
    ValueError: an attribute of the model is out of range, or there are no nodes.
  """
  _check_model(model)
  if num_nodes < 1:
    raise ValueError(f"num_nodes: got {num_nodes}, expected at least 1")
  n, s = num_nodes + 1, sum(model.sizes)
  # Hop 0 always holds the node itself.
  key = jnp.zeros((n, s), "int32").at[:, 0].set(jnp.arange(n))
  slots = Slots(key, jnp.zeros((n, s), "int32"), jnp.zeros((n, s)), jnp.zeros((n, s, model.slot_dim)))
  latest = Latest(jnp.zeros(n, "int32"), jnp.zeros(n, "int32"), jnp.zeros(n))
  return Memory(slots, jnp.zeros((n, model.self_dim)), latest, jnp.asarray(hash_seed, "int32"))


def changes(model: NAT, memory: Memory, events: Batches, read: Read, key: Key[Array, ""]) -> Writes:
  """What a batch of events writes. Rows count in order, senders before receivers: of several writes the last wins.

  Args:
    model: gives sizes and alpha.
    memory: which the batch was scored on.
    events: arrays [B]; rows with sender 0 write nothing.
    read: from the model's call on these arguments.
    key: decides which keys are replaced.

  Returns:
    For `write`, before the next batch is read.
  """
  rows = 2 * len(events.senders)
  own, row = read.ids[:rows], jnp.arange(rows)
  other = lambda a: jnp.roll(a, rows // 2, axis=0)  # of the other end of each event
  # All rows of a node stand behind its last one; a table of the batch's nodes is small however many nodes there are.
  last = jnp.max(jnp.where(own[:, None] == own[None, :], row, -1), axis=1)
  stored, refreshed = jax.tree.map(lambda a: a[:rows], (read.slots, read.rep))
  edge, time = jnp.tile(events.edges, 2), jnp.tile(events.times, 2)

  def part(slots: Slots, hop: int) -> Slots:
    start = sum(model.sizes[:hop])
    return jax.tree.map(lambda a: a[:, start : start + model.sizes[hop]], slots)

  offers = [(last, Slots(own, edge, time, refreshed[:, 0]))]
  if len(model.slots) > 0:
    mine = part(stored._replace(rep=refreshed), 1)
    slot = slot_of(other(own), memory.hash_seed, model.sizes[1])
    known = mine.key[row, slot] == other(own)
    offers.append((last, Slots(other(own), edge, time, mine.rep[row, slot] * known[:, None])))
  if len(model.slots) > 1:
    offers.append((jnp.repeat(other(last), model.sizes[1]), jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), mine)))
  ends = np.cumsum([len(at) for at, _ in offers]).tolist()
  replace = jnp.split(jax.random.uniform(key, (ends[-1],)) < model.replace_prob, ends[:-1])
  hops = [
    insert(part(stored, hop), at, offered, memory.hash_seed, replace[hop]) for hop, (at, offered) in enumerate(offers)
  ]
  written = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *hops)

  nobody = len(memory.self_rep)  # out of range: dropped
  at = jnp.where((row == last) & (own != 0), own, nobody)
  return Writes(at, written, read.self_rep[:rows], Latest(other(own), edge, time))


def write(memory: Memory, writes: Writes) -> Memory:
  """The memory with new rows."""
  put = lambda old, new: old.at[writes.at].set(new, mode="drop")
  slots, self_rep, latest = jax.tree.map(put, memory[:3], writes[1:])
  return Memory(slots, self_rep, latest, memory.hash_seed)


def _check_model(model: NAT) -> None:
  if len(model.slots) > 2 or not all(1 <= size <= 1024 for size in model.slots):
    raise ValueError(f"slots: got {model.slots}, expected at most two hops of 1 to 1024 slots")
  for name in ("self_dim", "slot_dim", "time_dim", "position_dim", "num_heads"):
    if getattr(model, name) < 1:
      raise ValueError(f"{name}: got {getattr(model, name)}, expected at least 1")
  checks.rate("dropout", model.dropout)
  checks.real("replace_prob", model.replace_prob)
  checks.choice("aggregation", model.aggregation, ("sum", "attention"))
