"""Networks without node features, for embeddings, communities and search."""

import os
import pathlib
from typing import NamedTuple

import numpy as np
import scipy.io
import scipy.sparse
from jaxtyping import Bool, Int

from jaxlab.data import files, node


class Network(NamedTuple):
  """A simple undirected graph with labelled nodes, on the host.

  Attributes:
    adjacency: [N, N] CSR of float32 ones, symmetric, zero diagonal, indices sorted.
    labels: [N] int32 class, or [N, L] bool where a node may have several labels.
  """

  adjacency: scipy.sparse.csr_array
  labels: Int[np.ndarray, " n"] | Bool[np.ndarray, "n l"]


class DirectedNetwork(NamedTuple):
  """A directed graph with labelled nodes, on the host: edges in the file's order, self-loops kept.

  Attributes:
    senders: [E] int32.
    receivers: [E] int32.
    labels: [N] int32 class.
  """

  senders: Int[np.ndarray, " e"]
  receivers: Int[np.ndarray, " e"]
  labels: Int[np.ndarray, " n"]


def blogcatalog(directory: str | os.PathLike[str] | None = None, *, published: bool = True) -> Network:
  """Host. BlogCatalog friendships: 10,312 bloggers, 333,983 undirected edges, 39 interest groups (multi-label).

  Tang and Liu, "Relational learning via latent social dimensions", KDD 2009, in the file that node2vec and FastRP use.

  Args:
    directory: folder with `blogcatalog.mat`. Default: `JAXLAB_DATA/embedding`, else a checked download.
    published: check for the published file. False reads any .mat file of that name with sparse `network` [N, N] and
      `group` [N, L], such as the same collections' Flickr or YouTube.

  Returns:
    Labels [N, 39] bool.

  Raises:
    ValueError: missing (`files.MissingFile`), damaged or ill-formed file.
  """
  path = files.fetch(
    "embedding",
    "blogcatalog.mat",
    url="https://github.com/GTmac/FastRP/raw/master/example_graphs/blogcatalog.mat",
    sha256="d4f4fb89ce1ccd4b7e2a183386c000773cc9362cc61f1be5b246a6d9c259da8f" if published else None,
    directory=directory,
  )

  def read(path: pathlib.Path) -> tuple[scipy.sparse.coo_array, np.ndarray]:
    content = scipy.io.loadmat(path, variable_names=["network", "group"])
    return scipy.sparse.coo_array(content["network"]), scipy.sparse.csr_array(content["group"]).toarray() != 0

  network, groups = files.parse(path, read, "a MATLAB file with sparse `network` and `group`")
  if network.shape != (len(groups), len(groups)):
    raise ValueError(f"{path}: got network {network.shape} and group {groups.shape}, expected [N, N] and [N, L]")
  return Network(_adjacency(network.row, network.col, len(groups)), groups)


def email_eu_core(directory: str | os.PathLike[str] | None = None, *, published: bool = True) -> Network:
  """Host. Who mailed whom in a European research institution: 1,005 people, 16,064 undirected edges, 42 departments.

  Leskovec et al., SNAP; the direction of mails and mails to oneself are dropped.

  Args:
    directory: folder with `email-Eu-core.txt` (an edge a line) and `labels.txt` (node and department a line). Default:
      `JAXLAB_DATA/embedding/email_eu_core`, else a checked download.
    published: check for the published files. False reads any of the format.

  Returns:
    Labels [N] in 0 to 41.

  Raises:
    ValueError: missing (`files.MissingFile`), damaged or ill-formed file.
  """
  senders, receivers, labels = email_eu_core_directed(directory, published=published)
  return Network(_adjacency(senders, receivers, len(labels)), labels)


def email_eu_core_directed(
  directory: str | os.PathLike[str] | None = None, *, published: bool = True
) -> DirectedNetwork:
  """Host. As `email_eu_core`, with all 25,571 edges from who wrote to who received, and 642 of them to oneself."""
  folder, snap = "embedding/email_eu_core", "https://snap.stanford.edu/data/"
  edge_file = files.fetch(
    folder,
    "email-Eu-core.txt",
    url=snap + "email-Eu-core.txt.gz",
    sha256="23e0ca0bce21a053025e78f7e9691ac9210ae806a0689bd5edff3c3bac572d4c" if published else None,
    directory=directory,
  )
  label_file = files.fetch(
    folder,
    "labels.txt",
    url=snap + "email-Eu-core-department-labels.txt.gz",
    sha256="91a089f21ee35eb224066456fa5322c8ad57c0f07b2da7a58a3220c72b5d54b5" if published else None,
    directory=directory,
  )
  edges = files.parse(edge_file, _integers, "two integers a line")
  labels = files.parse(label_file, _integers, "two integers a line")
  n = len(labels)
  if edges.shape[1:] != (2,) or labels.shape[1:] != (2,) or not np.array_equal(np.sort(labels[:, 0]), np.arange(n)):
    raise ValueError(f"{label_file}: got {labels.shape} and edges {edges.shape}, expected a label for each node id")
  if edges.size and not (edges.min() >= 0 and edges.max() < n):
    raise ValueError(f"{edge_file}: got nodes {edges.min()} to {edges.max()}, expected [0, {n})")
  senders, receivers = edges.astype(np.int32).T
  return DirectedNetwork(senders, receivers, labels[np.argsort(labels[:, 0]), 1].astype(np.int32))


def amazon_photo(directory: str | os.PathLike[str] | None = None, *, published: bool = True) -> Network:
  """Host. Photo products often bought together: 7,650 products, 119,081 undirected edges, 8 categories.

  Shchur et al., "Pitfalls of graph neural network evaluation", 2018, arXiv:1811.05868, without its node features.

  Args:
    directory: folder with `adj.txt` (line i: the neighbours of product i, counted from 1) and `labels.txt` (categories
      from 1). Default: `JAXLAB_DATA/embedding/amazon_photo`, else a checked download.
    published: check for the published files. False reads any of the format.

  Returns:
    Labels [N] in 0 to 7.

  Raises:
    ValueError: missing (`files.MissingFile`), damaged or ill-formed file.
  """
  digests = (
    "65fa15d955f4018028f81e2a413484b775326757a3f7d70edd5d22527694fa58",
    "68a15e9fb793e453e20e2fc95e7a4d3a2da85bd52ece4ba1439065b3e0354fea",
  )
  return _neighbour_lists("amazon_photo", digests if published else (None, None), directory)


def coauthor_cs(directory: str | os.PathLike[str] | None = None, *, published: bool = True) -> Network:
  """Host. Who wrote with whom in computer science: 18,333 authors, 81,894 undirected edges, 15 fields.

  From the same source and of the same format as `amazon_photo`, also for the arguments; labels are in 0 to 14.
  """
  digests = (
    "a14b4466a9b795b09bc76ab18639100d899c4b7fab9a648a2a00a997da259890",
    "076f20c4f196146a2b7095d7dee2a3984a8f39abce784eafaa13fa13bace417f",
  )
  return _neighbour_lists("coauthor_cs", digests if published else (None, None), directory)


def _neighbour_lists(name, digests, directory):
  folder, url = f"embedding/{name}", f"https://github.com/s-h-yang/WFD/raw/main/data/{name}/"
  adj_file, label_file = (
    files.fetch(folder, file, url=url + file, sha256=digest, directory=directory)
    for file, digest in zip(("adj.txt", "labels.txt"), digests, strict=True)
  )

  def read(path: pathlib.Path) -> list[np.ndarray]:
    return [np.array(line.split(), np.int64) for line in path.read_text().splitlines()]

  neighbours = files.parse(adj_file, read, "integers")
  labels = files.parse(label_file, _integers, "an integer a line").reshape(-1)
  n = len(neighbours)
  if len(labels) != n:
    raise ValueError(f"{label_file}: got {len(labels)} labels, expected {n}, the lines of {adj_file.name}")
  rows = np.repeat(np.arange(n), [len(line) for line in neighbours])
  columns = np.concatenate([np.zeros(0, np.int64), *neighbours]) - 1
  return Network(_adjacency(rows, columns, n), (labels - 1).astype(np.int32))


def _integers(path: pathlib.Path) -> np.ndarray:
  return np.loadtxt(path, dtype=np.int64, ndmin=2)


def _adjacency(rows: np.ndarray, columns: np.ndarray, n: int) -> scipy.sparse.csr_array:
  senders, receivers = node.undirected(rows, columns, n)
  starts = np.searchsorted(receivers, np.arange(n + 1))
  return scipy.sparse.csr_array((np.ones(len(senders), np.float32), senders, starts.astype(np.int32)), shape=(n, n))
