"""FedZip: client updates as three symbols and their centroids, in a stream of bits that can be read back.

    update -> keep the largest (1 - z) N of each kernel -> 3-means of every tensor -> lossless code of the symbols

Malekijoo et al., "FEDZIP: A Compression Framework for Communication-Efficient Federated Learning", 2021,
arXiv:2102.01593. Symbols: z is `sparsity`, the three values are `centroids` c_0 < c_1 < c_2, which start at
linspace(min, max, 3); four Lloyd steps follow, in which the outer two average their members that are not zero and the
middle one all of its members, so that what was pruned becomes a small number rather than 0. Biases are not pruned.
The server averages what it decodes, w <- w + 0.1 mean.

`learner` is the federated algorithm, `codec` the compression as part of it; both run on a device and count bits.
`encode` and `decode` are the bits themselves, on the host; their length is what `bits` counts.

Differs from the official code: its "Huffman" size 2 c_1 + c_2 + c_3 is that of no prefix code, its addresses take 27
bits and its differences have no delimiters, so nothing there could be decoded; `official_bits` reproduces those counts.
Here each tensor takes the shortest of a canonical Huffman code, an address table and coded gaps, with a header of the
method and the centroids. An outer cluster without members that are not zero keeps its centroid (there: an error).
Only weights are compressed; running statistics are sent as they are. Not provided: the threshold by absolute value, the
VGG16 variant, EMNIST by writer.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numba
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxlab import checks
from jaxlab.decentral import simulator
from jaxlab.decentral.simulator import Codec
from jaxlab.train import Learner

Method = Literal["huffman", "address", "gap"]
METHODS: tuple[Method, ...] = get_args(Method)
_RICE = 24  # parameters 0 to 23 of Golomb-Rice codes; this number stands for Elias' gamma code
_LONGEST = 55  # bits of a code: such a one takes 10^11 symbols, and the sum over 127 codes fits into 64 bits
_ALONE = 255


class Quantized(NamedTuple):
  """A tensor as symbols and their values.

  Attributes:
    symbols: [N] int8, 0 to K - 1.
    centroids: [K] float32.
  """

  symbols: Int[Any, " n"]
  centroids: Float[Any, " k"]


# -------------------------------------------------------------------------------------------------------- quantization


def top(x: Float[Array, " n"], sparsity: float) -> Float[Array, " n"]:
  """The k = N - round(N z) entries of largest magnitude; the others, and nothing else, become 0. Ties all stay.

  Args:
    x: a tensor, flat.
    sparsity: z in [0, 1], static.
  """
  _check_sparsity(sparsity)
  keep = x.size - round(x.size * sparsity)
  if keep == x.size:
    return x
  if keep == 0:
    return jnp.zeros_like(x)
  # Magnitudes are ordered like their bits, so the k-th largest is found bit by bit: the largest number that at least
  # k magnitudes reach. That takes 31 passes (63 of float64), where sorting would take far longer.
  single = x.dtype != jnp.float64
  real, whole, places = (jnp.float32, jnp.int32, 31) if single else (jnp.float64, jnp.int64, 63)
  pattern = jax.lax.bitcast_convert_type(jnp.abs(x.astype(real)), whole)

  def settle(i: Int[Array, ""], found: Int[Array, ""]) -> Int[Array, ""]:
    candidate = found | (jnp.ones((), whole) << (places - 1 - i).astype(whole))
    return jnp.where(jnp.sum(pattern >= candidate, dtype=jnp.int32) >= keep, candidate, found)

  threshold = jax.lax.fori_loop(0, places, settle, jnp.zeros((), whole))
  return jnp.where(pattern >= threshold, x, 0)


def quantize(x: Float[Array, " n"], *, clusters: int = 3, iterations: int = 4, zero_aware: bool = False) -> Quantized:
  """K-means on the line from evenly spaced centroids.

  Args:
    x: a tensor, flat, zeros included.
    clusters: K; odd ones have a middle cluster, which averages its zeros too.
    iterations: Lloyd steps; symbols are those before the last update of the centroids.
    zero_aware: zeros are a symbol of their own, K - 1, with the value 0, and the other K - 1 centroids are those of
      plain Lloyd steps on what is not zero.
  """
  if checks.count("clusters", clusters, 2) > 127:
    raise ValueError(f"clusters: got {clusters}, expected at most 127")
  checks.count("iterations", iterations)
  if x.ndim != 1 or not x.size:
    raise ValueError(f"x: got shape {x.shape}, expected a flat tensor that is not empty")
  x = x.astype(jnp.float32)
  real = x != 0
  count = clusters - 1 if zero_aware else clusters
  middle = -1 if zero_aware or clusters % 2 == 0 else clusters // 2
  some = real if zero_aware else jnp.ones_like(real)
  low = jnp.min(jnp.where(some, x, jnp.inf))
  high = jnp.max(jnp.where(some, x, -jnp.inf))
  low, high = jnp.where(jnp.any(some), low, 0.0), jnp.where(jnp.any(some), high, 0.0)
  centroids = low + (high - low) * jnp.linspace(0.0, 1.0, count) if count > 1 else (low + high)[None] / 2

  def assign(centroids: Float[Array, " k"]) -> Int[Array, " n"]:
    best, symbol = jnp.abs(x - centroids[0]), jnp.zeros(x.shape, jnp.int8)
    for k in range(1, count):  # the first of equals, as argmin
      distance = jnp.abs(x - centroids[k])
      symbol = jnp.where(distance < best, jnp.int8(k), symbol)
      best = jnp.minimum(distance, best)
    return symbol

  def lloyd(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
    symbols, new = assign(state[1]), []
    for k in range(count):
      inside = symbols == k
      members = inside if k == middle else inside & real
      total, number = jnp.sum(jnp.where(inside, x, 0.0)), jnp.sum(members, dtype=jnp.float32)
      empty = 0.0 if k == middle else state[1][k]
      new.append(jnp.where(number > 0, total / jnp.maximum(number, 1.0), empty))
    return symbols, jnp.stack(new)

  symbols, centroids = jax.lax.fori_loop(0, iterations, lloyd, (jnp.zeros(x.shape, jnp.int8), centroids))
  if zero_aware:
    symbols = jnp.where(real, symbols, jnp.int8(count))
    centroids = jnp.append(centroids, 0.0)
  return Quantized(symbols, centroids)


def values(message: Quantized) -> Float[Array, " n"]:
  """What the symbols stand for."""
  return jnp.asarray(message.centroids)[jnp.asarray(message.symbols).astype(jnp.int32)]


def compress(
  update: PyTree, *, sparsity: float = 0.8, clusters: int = 3, iterations: int = 4, zero_aware: bool = False
) -> list[Quantized]:
  """Every tensor of an update, in the order of its leaves; those named `bias` are not pruned.

  Args:
    update: pytree of floating arrays.
    sparsity: z; 0.8 in the official code.
    clusters: K.
    iterations: of K-means.
    zero_aware: see `quantize`.
  """
  messages = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(update):
    flat = leaf.reshape(-1)
    bias = "bias" in jax.tree_util.keystr(path)
    kept = flat if bias else top(flat, sparsity)
    messages.append(quantize(kept, clusters=clusters, iterations=iterations, zero_aware=zero_aware))
  return messages


def restore(messages: list[Quantized], like: PyTree) -> PyTree:
  """The update that the server sees; `like` gives shapes and dtypes."""
  leaves, structure = jax.tree.flatten(like)
  if len(leaves) != len(messages):
    raise ValueError(f"messages: got {len(messages)}, expected one for each of the {len(leaves)} tensors")
  made = [values(m).reshape(leaf.shape).astype(leaf.dtype) for m, leaf in zip(messages, leaves, strict=True)]
  return jax.tree.unflatten(structure, made)


# ---------------------------------------------------------------------------------------------------- sizes, on device


def bits(message: Quantized) -> dict[Method, Int[Array, ""]]:
  """Length of what `encode` writes for a tensor, in bits, by method: whole bytes with header; N below 2^26."""
  symbols, clusters = jnp.asarray(message.symbols), message.centroids.shape[0]
  if symbols.size >= 2**26:  # sizes are summed in int32
    raise ValueError(f"message: got {symbols.size} symbols, expected fewer than 2^26, {2**26}")
  n, counts = symbols.size, jnp.stack([jnp.sum(symbols == k, dtype=jnp.int32) for k in range(clusters)])
  width, places = (n).bit_length(), _width(n)

  # Huffman: the sum of all merged weights, which is the sum of the leaves' depths times their counts.
  weights, huffman = jnp.where(counts > 0, counts, jnp.iinfo(jnp.int32).max), jnp.zeros((), jnp.int32)
  for _ in range(clusters - 1):
    weights = jnp.sort(weights)
    merge = weights[1] < jnp.iinfo(jnp.int32).max
    both = jnp.where(merge, weights[0] + jnp.where(merge, weights[1], 0), weights[0])
    huffman = huffman + jnp.where(merge, both, 0)
    weights = weights.at[0].set(both).at[1].set(jnp.where(merge, jnp.iinfo(jnp.int32).max, weights[1]))

  rarer = n - jnp.max(counts)
  address = (clusters - 1) * width + rarer * places

  place = jnp.arange(n, dtype=jnp.int32)

  def gap_bits(k: Int[Array, ""]) -> Int[Array, ""]:
    """Bits of one symbol's gaps by the best Golomb-Rice parameter, or by Elias' gamma code."""
    inside = symbols == k
    before = jax.lax.cummax(jnp.where(inside, place, -1))
    gaps = jnp.where(inside, place - jnp.concatenate([jnp.full(1, -1, jnp.int32), before[:-1]]), 1)
    p = jnp.arange(_RICE)
    rice = jnp.sum((gaps - 1)[None] >> p[:, None], axis=1, dtype=jnp.int32) + counts[k] * (p + 1)
    gamma = counts[k] + 2 * jnp.sum(31 - jax.lax.clz(gaps), dtype=jnp.int32)  # 31 - clz is floor(log2)
    return jnp.minimum(jnp.min(rice), gamma)

  costs = jax.lax.map(gap_bits, jnp.arange(clusters))
  gap = (clusters - 1) * width + jnp.sum(costs) - costs[jnp.argmax(counts)]  # the most frequent is implicit
  headers = {"huffman": 8 * clusters, "address": 8, "gap": 8 + 8 * (clusters - 1)}
  fixed = 8 + 32 * clusters
  payload: dict[Method, Array] = {"huffman": huffman, "address": address, "gap": gap}
  return {name: fixed + headers[name] + -(-size // 8) * 8 for name, size in payload.items()}


def total_bits(messages: list[Quantized], method: Method | None = None) -> Float[Array, ""]:
  """Size of an update, the shortest method for each tensor or always the same."""
  sizes = []
  for message in messages:
    by_method = bits(message)
    chosen = jnp.stack([by_method[m] for m in METHODS]).min() if method is None else by_method[method]
    sizes.append(chosen.astype(jnp.float32))
  return jnp.sum(jnp.stack(sizes))


def official_bits(symbols: Int[np.ndarray, " n"]) -> dict[str, int]:
  """Host. The published accounting, which cannot be decoded: `original`, `huffman`, `address` and `gap` (best pair).

  Args:
    symbols: [N] of three kinds.
  """
  symbols = np.asarray(symbols)
  counts = np.bincount(symbols, minlength=3)
  if len(counts) > 3:
    raise ValueError(f"symbols: got {symbols.max() + 1} kinds, expected three")
  low, mid, high = np.sort(counts).tolist()
  each = []
  for k in range(3):
    places = np.flatnonzero(symbols == k)
    gaps = np.diff(places, prepend=0)  # the first position itself, then differences
    each.append(sum(max(1, int(g).bit_length()) for g in gaps))
  a, b, c = each
  return {
    "original": 32 * len(symbols),
    "huffman": 2 * low + mid + high,
    "address": 27 * (low + mid),
    "gap": min(a + b, a + c, b + c),
  }


# --------------------------------------------------------------------------------------------------- bits, on the host


def encode(message: Quantized, method: Method | None = None) -> bytes:
  """Host. A tensor as bytes: method, centroids, what the method needs, and the symbols' bits.

  Args:
    message: of at most 2^31 - 1 symbols.
    method: None for the shortest.
  """
  symbols = np.asarray(message.symbols, np.int64)
  centroids = np.asarray(message.centroids, "<f4")
  if symbols.ndim != 1 or not symbols.size or symbols.min() < 0 or symbols.max() >= len(centroids):
    raise ValueError(f"message: got symbols of shape {symbols.shape}, expected [N] from 0 to {len(centroids) - 1}")
  if method is None:
    return min((encode(message, m) for m in METHODS), key=len)
  checks.choice("method", method, METHODS)
  head = bytes([METHODS.index(method)]) + centroids.tobytes()
  counts = np.bincount(symbols, minlength=len(centroids))
  n, implicit = len(symbols), int(counts.argmax())
  if method == "huffman":
    lengths = _huffman_lengths(counts)
    out = np.zeros(int((counts * lengths).sum()), np.uint8)
    _write_codes(out, symbols, lengths, _canonical(lengths))
    # A kind that is alone takes no bits; its length in the header is a number that no code has.
    table = np.where((lengths == 0) & (counts > 0), _ALONE, lengths)
    return head + bytes(table.tolist()) + np.packbits(out).tobytes()
  others = [k for k in range(len(centroids)) if k != implicit]
  places = {k: np.flatnonzero(symbols == k) for k in others}
  if method == "address":
    parts = [_fixed(counts[others], n.bit_length())]
    parts += [_fixed(places[k], _width(n)) for k in others]
    return head + bytes([implicit]) + np.packbits(np.concatenate(parts)).tobytes()
  parameters, parts = [], [_fixed(counts[others], n.bit_length())]
  for k in others:
    gaps = np.diff(places[k], prepend=-1)
    sizes = [int(((gaps - 1) >> p).sum()) + len(gaps) * (p + 1) for p in range(_RICE)]
    sizes.append(int(sum(2 * int(g).bit_length() - 1 for g in gaps)))
    parameters.append(int(np.argmin(sizes)))
    out = np.zeros(min(sizes), np.uint8)
    _write_gaps(out, gaps, parameters[-1])
    parts.append(out)
  return head + bytes([implicit, *parameters]) + np.packbits(np.concatenate(parts)).tobytes()


def decode(stream: bytes, n: int, clusters: int = 3) -> Quantized:
  """Host. What `encode` was given; the receiver knows the tensor's size N and K.

  Raises:
    ValueError: a stream that `encode` cannot have written for N symbols of K kinds, such as a shortened or longer one.
      A wrong N or a changed bit is noticed only where the result is no such stream: there is no checksum.
  """
  checks.count("n", n)
  checks.count("clusters", clusters, 2, 127)
  start = 1 + 4 * clusters
  if len(stream) < start or stream[0] >= len(METHODS):
    raise ValueError(f"stream: got {len(stream)} bytes, expected a header of {start} with a known method")
  method, centroids = METHODS[stream[0]], np.frombuffer(stream[1:start], "<f4").astype(np.float32)
  extra = {"huffman": clusters, "address": 1, "gap": clusters}[method]
  head = stream[start : start + extra]
  if len(head) < extra:
    raise ValueError(f"stream: got {len(stream)} bytes, expected at least {start + extra}")
  symbols = np.zeros(n, np.int8)
  body = np.unpackbits(np.frombuffer(stream[start + extra :], np.uint8))
  if method == "huffman":
    lengths = np.frombuffer(head, np.uint8).astype(np.int64)
    end, used = 0, lengths[lengths > 0]
    if used.tolist() == [_ALONE]:
      symbols[:] = lengths.argmax()
    elif not used.size or used.max() > _LONGEST or (1 << (_LONGEST - used)).sum() != 1 << _LONGEST:
      raise ValueError(f"stream: got codes of lengths {lengths.tolist()}, expected those of a complete prefix code")
    else:
      end = _read_codes(body, symbols, lengths, _canonical(lengths))
  else:
    implicit, width = head[0], n.bit_length()
    if implicit >= clusters or (method == "gap" and max(head[1:]) > _RICE):
      raise ValueError(f"stream: got a header {list(head)}, expected a kind below {clusters} and known codes")
    others = [k for k in range(clusters) if k != implicit]
    symbols[:] = implicit
    end, counts = _read_fixed(body, 0, len(others), width)
    for i, k in enumerate(others if end >= 0 else []):
      if method == "address":
        end, places = _read_fixed(body, end, int(counts[i]), _width(n))
      else:
        places = np.zeros(min(int(counts[i]), n), np.int64)
        end = _read_gaps(body, end, places, head[1 + i])
      if end < 0 or (len(places) and places.max() >= n):
        break
      symbols[places] = k
    if end >= 0 and (np.bincount(symbols, minlength=clusters)[others] != counts).any():
      raise ValueError(
        f"stream: got counts {counts.tolist()} with other places, expected as many places, all different"
      )
  if end < 0 or len(body) - end > 7 or body[end:].any():
    raise ValueError(f"stream: got {len(stream)} bytes, expected {n} symbols and zeros up to the end of a byte")
  return Quantized(symbols, centroids)


def _width(n: int) -> int:
  """Bits of a position among n."""
  return (n - 1).bit_length()


def _huffman_lengths(counts: Int[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
  """Lengths of an optimal prefix code; 0 for symbols that do not occur, and for one that is alone."""
  lengths = np.zeros(len(counts), np.int64)
  groups = sorted((int(c), [k]) for k, c in enumerate(counts) if c)
  while len(groups) > 1:
    (a, first), (b, second), *groups = groups
    lengths[first + second] += 1
    groups = sorted([*groups, (a + b, first + second)])
  return lengths


def _canonical(lengths: Int[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
  """The codes, by length, then symbol."""
  codes, code, before = np.zeros(len(lengths), np.int64), 0, 0
  for k in sorted(np.flatnonzero(lengths), key=lambda k: (lengths[k], k)):
    code <<= int(lengths[k]) - before
    codes[k], before = code, int(lengths[k])
    code += 1
  return codes


def _fixed(numbers: Int[np.ndarray, " m"], width: int) -> np.ndarray:
  """Numbers as bits, highest first."""
  return ((np.asarray(numbers)[:, None] >> np.arange(width)[::-1]) & 1).astype(np.uint8).reshape(-1)


def _read_fixed(bits: np.ndarray, start: int, count: int, width: int) -> tuple[int, np.ndarray]:
  end = start + count * width
  if start < 0 or end > len(bits):
    return -1, np.zeros(0, np.int64)
  return end, bits[start:end].reshape(count, width).astype(np.int64) @ (1 << np.arange(width)[::-1])


@numba.njit(cache=True)
def _write_codes(out, symbols, lengths, codes):
  at = 0
  for symbol in symbols:
    for b in range(lengths[symbol] - 1, -1, -1):
      out[at] = (codes[symbol] >> b) & 1
      at += 1


@numba.njit(cache=True)
def _read_codes(bits, symbols, lengths, codes):
  at = 0
  for i in range(len(symbols)):
    code, length, found = 0, 0, -1
    while found < 0:
      if at == len(bits):
        return -1
      code, length, at = 2 * code + bits[at], length + 1, at + 1
      for k in range(len(lengths)):
        if lengths[k] == length and codes[k] == code:
          found = k
    symbols[i] = found
  return at


@numba.njit(cache=True)
def _write_gaps(out, gaps, parameter):
  at = 0
  for gap in gaps:
    if parameter == _RICE:  # Elias: as many zeros as the number has bits after its first, then the number
      length = 0
      while gap >> (length + 1):
        length += 1
      at += length
      for b in range(length, -1, -1):
        out[at] = (gap >> b) & 1
        at += 1
    else:  # Rice: the quotient in zeros, a one, the remainder
      at += (gap - 1) >> parameter
      out[at] = 1
      at += 1
      for b in range(parameter - 1, -1, -1):
        out[at] = ((gap - 1) >> b) & 1
        at += 1


@numba.njit(cache=True)
def _read_gaps(bits, at, places, parameter):
  place = -1
  for i in range(len(places)):
    zeros = 0
    while at < len(bits) and bits[at] == 0:
      zeros, at = zeros + 1, at + 1
    rest = zeros if parameter == _RICE else parameter
    if at + 1 + rest > len(bits) or (parameter == _RICE and zeros > 31):
      return -1
    at += 1
    value = 1 if parameter == _RICE else zeros
    for _ in range(rest):
      value, at = 2 * value + bits[at], at + 1
    place += value if parameter == _RICE else value + 1
    places[i] = place
  return at


# ------------------------------------------------------------------------------------------------- codecs, the learner


def codec(
  sparsity: float = 0.8,
  *,
  clusters: int = 3,
  iterations: int = 4,
  zero_aware: bool = False,
  method: Method | None = None,
  feedback: bool = False,
) -> Codec:
  """FedZip for `simulator.federated`; arguments as in `compress` and `encode`, and `feedback` as in `Codec`."""
  _check_sparsity(sparsity)
  if method is not None and method not in METHODS:
    raise ValueError(f"method: got {method!r}, expected one of {METHODS}")

  def code(update: PyTree, key: Key[Array, ""]) -> tuple[PyTree, Array]:
    messages = compress(update, sparsity=sparsity, clusters=clusters, iterations=iterations, zero_aware=zero_aware)
    return restore(messages, update), total_bits(messages, method)

  return Codec(code, feedback)


def top_codec(share: float, *, feedback: bool = False) -> Codec:
  """A baseline: the largest entries of each tensor as floats with their positions, k (32 + ceil(log2 N)) bits."""
  checks.real("share", share)

  def code(update: PyTree, key: Key[Array, ""]) -> tuple[PyTree, Array]:
    kept = jax.tree.map(lambda x: top(x.reshape(-1), 1 - share).reshape(x.shape), update)
    sizes = [jnp.sum(x != 0, dtype=jnp.float32) * (32 + _width(x.size)) + 32 for x in jax.tree.leaves(kept)]
    return kept, jnp.sum(jnp.stack(sizes))

  return Codec(code, feedback)


def random_codec(share: float, *, feedback: bool = False) -> Codec:
  """A baseline: random entries as floats, scaled to keep the mean; a seed of 64 bits says which.

  Args:
    share: of the entries of each tensor, above 0; at least one is sent, since no scale makes up for none.
    feedback: see `Codec`.
  """
  if checks.real("share", share) == 0:
    raise ValueError(f"share: got {share}, expected a number above 0")

  def code(update: PyTree, key: Key[Array, ""]) -> tuple[PyTree, Array]:
    leaves, structure = jax.tree.flatten(update)
    made, size = [], 64
    for leaf, k in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
      keep = max(1, round(share * leaf.size))
      chosen = jax.random.permutation(k, leaf.size).reshape(leaf.shape) < keep
      # With feedback, what is left out comes again, and must not be scaled as well.
      made.append(jnp.where(chosen, leaf * (1.0 if feedback else leaf.size / keep), 0))
      size += 32 * keep
    return jax.tree.unflatten(structure, made), jnp.float32(size)

  return Codec(code, feedback)


def uniform_codec(width: int = 2, *, feedback: bool = False) -> Codec:
  """A baseline: every entry to the nearest of 2^width even levels between its tensor's extremes, which are sent too."""
  levels = 2 ** checks.count("width", width) - 1

  def code(update: PyTree, key: Key[Array, ""]) -> tuple[PyTree, Array]:
    def nearest(x: Array) -> Array:
      low, step = jnp.min(x), jnp.maximum((jnp.max(x) - jnp.min(x)) / levels, jnp.finfo(jnp.float32).tiny)
      return low + step * jnp.round((x - low) / step)

    size = sum(width * x.size + 64 for x in jax.tree.leaves(update))
    return jax.tree.map(nearest, update), jnp.float32(size)

  return Codec(code, feedback)


def learner(
  local: Learner,
  work: simulator.Work,
  compression: Codec | None = None,
  *,
  server_rate: float = 0.1,
  choose: simulator.Choose | None = None,
) -> Learner:
  """The federated algorithm. Its FedSGD variant is `Work()` with `optax.sgd(1.0)`: the update is minus the gradient.

  Args:
    local: the learner of a client; RMSprop at 0.001 in the official code.
    work: epochs of a round; 101 of minibatches of 10 there.
    compression: of updates; None for `codec()`.
    server_rate: 0.1 there; 1 is FedAvg's.
    choose: who takes part, None for all.

  Returns:
    `simulator.federated` with this codec.
  """
  return simulator.federated(
    local, work, choose=choose, server_rate=server_rate, codec=codec() if compression is None else compression
  )


class CNN(nn.Module):
  """The official network for 28x28 digits.

  Attributes:
    num_classes: C.
    dtype: of the computation.
    param_dtype: of the weights.
  """

  num_classes: int = 10
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b k"]:
    """Logits [B, C] of images [B, 28, 28, 1]."""
    kind: Mapping[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = nn.relu(nn.Conv(32, (3, 3), padding="VALID", **kind)(x))
    x = nn.relu(nn.Conv(64, (3, 3), padding="VALID", **kind)(x))
    x = nn.max_pool(x, (2, 2), (2, 2))
    x = nn.Dropout(0.25, deterministic=not train)(x).reshape(x.shape[0], -1)
    x = nn.relu(nn.Dense(128, **kind)(x))
    x = nn.Dropout(0.3, deterministic=not train)(x)
    return nn.Dense(self.num_classes, **kind)(x)


def _check_sparsity(sparsity: float) -> None:
  if not (math.isfinite(sparsity) and 0 <= sparsity <= 1):
    raise ValueError(f"sparsity: got {sparsity}, expected a number in [0, 1]")
