import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.datasets import load_digits

from jaxlab.graph.search import _hnsw, hnsw

GOLDEN = np.load(pathlib.Path(__file__).parents[2] / "golden/hnsw.npz")  # what hnswlib 0.8 made of the same numbers


def uniform(n, dim, seed=0):
  return np.random.default_rng(seed).random((n, dim)).astype("float32")


def check_golden(name, index):
  for field in ("levels", "links", "upper", "head"):
    np.testing.assert_array_equal(getattr(index, field), GOLDEN[f"{name}/{field}"], err_msg=f"{name} {field}")


def recall(index, queries, found, k=10):
  """Share of the k points found that are as near as the k nearest."""
  bound = np.asarray(hnsw.exact_search(index, queries, k=k)[1])[:, -1:]
  return np.mean(found[1][:, :k] <= bound * (1 + 1e-5) + 1e-6)


@pytest.fixture(scope="module")
def small():
  """400 points; do not change."""
  return hnsw.build(uniform(400, 6, 1), max_links=6, ef_construction=30, seed=7)


@pytest.mark.parametrize(("space", "n"), [("l2", 1500), ("cosine", 500), ("ip", 500)])
def test_every_link_is_that_of_the_official_code(space, n):
  check_golden(space, hnsw.build(uniform(n, 8), space=space, max_links=8, ef_construction=40))


def test_new_vectors_for_old_labels_repair_the_graph_as_the_official_code_does(small):
  check_golden("updated", hnsw.add(small, uniform(50, 6, 2), np.arange(50) * 7))


def test_deleted_points_and_deleted_entry():
  x = uniform(400, 6, 1)
  index = hnsw.build(x[:300], max_links=6, ef_construction=30, seed=7)
  gone = np.unique(np.append(np.arange(0, 300, 5), index.head[_hnsw.ENTRY]))
  index = hnsw.add(hnsw.delete(index, gone), x[300:])
  check_golden("deleted", index)
  queries = uniform(40, 6, 3)
  labels, distances = hnsw.search(index, queries, k=5, ef=20)
  np.testing.assert_array_equal(labels, GOLDEN["deleted/labels"])
  np.testing.assert_allclose(distances, GOLDEN["deleted/distances"], rtol=1e-5, atol=1e-6)
  assert not np.isin(labels, gone).any()
  on_device = jax.jit(hnsw.device_search, static_argnames=("k", "ef"))(index, queries, k=5, ef=20)
  assert (np.asarray(on_device[0]) == labels).mean() > 0.99 and not np.isin(on_device[0], gone).any()


def test_levels_are_geometric():
  m, count = 8, 100_000
  levels, _ = hnsw._levels(100, count, m)
  observed = np.bincount(levels, minlength=8)
  expected = count * (m ** -np.arange(8.0) - m ** -np.arange(1.0, 9.0))
  keep = expected > 5
  pooled = [np.append(a[keep], a[~keep].sum()) for a in (observed, expected)]
  statistic = ((pooled[0] - pooled[1]) ** 2 / pooled[1]).sum()
  assert scipy.stats.chi2.sf(statistic, len(pooled[0]) - 1) > 1e-3


def check_structure(index):
  m = index.max_links
  for node in range(index.size):
    for layer in range(index.levels[node] + 1):
      row = index.links[node] if layer == 0 else index.upper[index.first_upper[node] + layer - 1]
      count = int((row >= 0).sum())
      assert (row[:count] >= 0).all() and len(row) == (2 * m if layer == 0 else m)
      assert node not in row and len(set(row[:count])) == count
      assert (index.levels[row[:count]] >= layer).all()
  assert index.levels[index.head[_hnsw.ENTRY]] == index.head[_hnsw.TOP] == index.levels.max()


@pytest.mark.parametrize("threads", [1, 2])
def test_structure(threads):
  index = hnsw.build(uniform(1000, 5), max_links=5, ef_construction=30, threads=threads)
  check_structure(index)
  index = hnsw.add(index, uniform(300, 5, 1), threads=threads)
  index = hnsw.delete(index, np.arange(100))
  index = hnsw.add(index, uniform(60, 5, 2), np.arange(2000, 2060), replace_deleted=True)
  assert index.size == 1300 and index.deleted.sum() == 40 and np.isin(np.arange(2000, 2060), index.labels).all()
  check_structure(index)


@pytest.mark.parametrize("threads", [1, 2])
def test_points_find_themselves_and_wide_beams_find_all(threads):
  x = load_digits().data.astype("float32")
  index = hnsw.build(x, max_links=8, ef_construction=60, threads=threads)
  labels, distances = hnsw.search(index, x, k=1, ef=20)
  distinct = [np.array_equal(x[i], x[label]) for i, label in enumerate(labels[:, 0])]
  assert np.mean(distinct) > 0.99 and (distances[np.array(distinct)] == 0).all()
  queries = x[:200] + np.float32(0.3)
  scores = [recall(index, queries, hnsw.search(index, queries, k=10, ef=ef)) for ef in (10, 40, 160)]
  assert scores == sorted(scores) and scores[1] > 0.95
  # A beam as wide as the index finds what links lead to: all of it if one thread built it, as good as all if two did.
  reached = reachable(index)
  assert reached.mean() == 1 if threads == 1 else reached.mean() > 0.995
  order = np.argsort(((queries[:, None] - x[reached]) ** 2).sum(-1), axis=1, kind="stable")[:, :10]
  _, distances = hnsw.search(index, queries, k=10, ef=len(x))
  nearest = ((queries[:, None] - x[reached][order]) ** 2).sum(-1)
  np.testing.assert_allclose(distances, nearest, rtol=1e-4)


def reachable(index):
  """Which points links of layer 0 lead to from the entry point, itself only if some link leads back."""
  found = np.zeros(index.size, bool)
  row = index.links[index.head[_hnsw.ENTRY]]
  found[row[row >= 0]] = True
  while True:
    row = index.links[found]
    wider = found.copy()
    wider[row[row >= 0]] = True
    if (wider == found).all():
      return found
    found = wider


@pytest.mark.parametrize("space", ["l2", "ip", "cosine"])
def test_device_search_is_the_host_search(space):
  index = hnsw.build(uniform(700, 8) - 0.3, np.arange(700)[::-1] + 5, space=space, max_links=8, ef_construction=40)
  queries, allowed = uniform(30, 8, 4) - 0.3, np.random.default_rng(0).random(700) < 0.6
  for keep in (None, allowed):
    labels, distances = hnsw.search(index, queries, k=6, ef=25, allowed=keep)
    on_device = hnsw.device_search(index, jnp.asarray(queries), k=6, ef=25, allowed=keep)
    assert (labels == np.asarray(on_device[0])).mean() > 0.995
    np.testing.assert_allclose(np.sort(distances), np.sort(on_device[1]), rtol=1e-4, atol=1e-5)
    if keep is not None:
      assert keep[700 - 1 - (labels - 5)].all()


def test_distances_and_exact_search():
  x, q = uniform(50, 4), uniform(5, 4, 1)
  unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)
  for space, want in (
    ("l2", ((q[:, None] - x) ** 2).sum(-1)), ("ip", 1 - q @ x.T), ("cosine", 1 - unit(q) @ unit(x).T),
  ):  # fmt: skip
    index = hnsw.build(x, space=space)
    for labels, distances in (hnsw.search(index, q, k=50, ef=50), hnsw.exact_search(index, q, k=50)):
      np.testing.assert_allclose(distances, np.sort(want), rtol=1e-4, atol=1e-6)
      np.testing.assert_allclose(np.take_along_axis(want, np.asarray(labels), 1), distances, rtol=1e-4, atol=1e-6)


def test_choosing_diverse_neighbours_matters():
  """Twenty tight blobs: nearest neighbours alone leave them unconnected."""
  rng = np.random.default_rng(0)
  x = (rng.uniform(0, 10, (20, 16))[rng.integers(0, 20, 2500)] + 0.3 * rng.standard_normal((2500, 16))).astype("f4")
  index = hnsw.build(x, max_links=8, ef_construction=60)
  queries = x[:300] + np.float32(0.01)
  assert recall(index, queries, hnsw.search(index, queries, k=10, ef=50)) > 0.98
  nearest = hnsw.build(x, max_links=8, ef_construction=60, diverse=False)
  assert recall(nearest, queries, hnsw.search(nearest, queries, k=10, ef=50)) < 0.9


def test_distances_grow_slowly_with_the_number_of_points():
  counts = [
    hnsw.count_distances(hnsw.build(uniform(n, 8), max_links=8, ef_construction=40), uniform(200, 8, 1))
    for n in (1000, 16_000)
  ]
  assert counts[0] < counts[1] < 2 * counts[0]


def test_deletion_is_undone_exactly_and_filters_hold(small):
  queries = uniform(20, 6, 5)
  before = hnsw.search(small, queries, k=5, ef=20)
  gone = before[0][:, 0]
  fewer = hnsw.delete(small, np.unique(gone))
  after = hnsw.search(fewer, queries, k=5, ef=20)
  assert not np.isin(after[0], gone).any()
  np.testing.assert_array_equal(hnsw.search(small, queries, k=5, ef=20)[0], before[0])  # the first index is unchanged
  again = hnsw.search(hnsw.delete(fewer, np.unique(gone), undo=True), queries, k=5, ef=20)
  np.testing.assert_array_equal(again[0], before[0])
  np.testing.assert_array_equal(again[1], before[1])
  few = np.zeros(400, bool)
  few[[3, 70]] = True
  labels, distances = hnsw.search(small, queries, k=5, ef=400, allowed=few)
  assert set(labels.ravel()) == {3, 70, -1} and np.isinf(distances[labels < 0]).all() and (labels[:, 2:] == -1).all()


def test_files(small, tmp_path):
  index = hnsw.delete(small, [4, 9])
  path = tmp_path / "index.npz"
  hnsw.save(index, path)
  again = hnsw.load(path)
  queries = uniform(20, 6, 5)
  for a, b in zip(hnsw.search(index, queries), hnsw.search(again, queries), strict=True):
    np.testing.assert_array_equal(a, b)
  assert [p.name for p in tmp_path.iterdir()] == ["index.npz"]
  grown = hnsw.add(again, uniform(10, 6, 8), np.arange(500, 510))
  for name, value in vars(hnsw.add(index, uniform(10, 6, 8), np.arange(500, 510))).items():
    np.testing.assert_array_equal(getattr(grown, name), value)  # the generator of levels goes on
  bad = index.links.copy()
  bad[3, 0] = 4000
  hnsw.save(index.replace(links=bad), path)
  with pytest.raises(ValueError, match="out of range"):
    hnsw.load(path)
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(ValueError, match="index.npz: got a file that does not read"):
    hnsw.load(path)


def test_one_by_one_into_reserved_room_is_the_same(small):
  x = uniform(400, 6, 1)
  index = hnsw.add(hnsw.create(6, max_links=6, ef_construction=30, seed=7), x[:1], capacity=400)
  for i in range(1, 400):
    index = hnsw.add(index, x[i : i + 1], donate=True)
  for name, value in vars(small).items():
    np.testing.assert_array_equal(getattr(index, name), value)


def test_duplicates():
  index = hnsw.build(np.repeat(uniform(20, 4), 30, axis=0), max_links=8)
  labels, distances = hnsw.search(index, uniform(20, 4), k=5, ef=100)
  assert (distances[:, 0] == 0).mean() > 0.9 and all(len(set(row)) == 5 for row in labels)


def test_memory():
  index = hnsw.build(uniform(2000, 32))
  layer_0, above = 4 + 4 * 32 + 4 * 32 + 8, (4 + 4 * 16) * int(index.levels.sum())
  assert index.nbytes < 1.05 * (2000 * layer_0 + above)  # what hnswlib needs


@pytest.mark.parametrize("n", [1, 4])
def test_a_graph_of_one_layer_on_a_device(n):
  x = np.random.default_rng(0).normal(size=(n, 4)).astype("float32")
  index = hnsw.build(x)
  assert len(index.upper) == 0
  labels, distances = hnsw.device_search(index, jnp.asarray(x), k=1)
  np.testing.assert_array_equal(labels[:, 0], np.arange(n))
  np.testing.assert_allclose(distances, 0, atol=1e-6)


def test_exact_search_fills_up_what_is_not_there():
  x = np.random.default_rng(0).normal(size=(4, 4)).astype("float32")
  labels, distances = hnsw.exact_search(hnsw.delete(hnsw.build(x), [0, 1]), x[:1], k=3)
  assert set(np.asarray(labels[0, :2])) == {2, 3} and labels[0, 2] == -1
  assert np.isfinite(distances[0, :2]).all() and np.isinf(distances[0, 2])
  for search in (hnsw.exact_search, hnsw.device_search):
    with pytest.raises(ValueError, match="^index: got no points"):
      search(hnsw.create(4), x)
    with pytest.raises(ValueError, match="^queries: got shape"):
      search(hnsw.build(x), x[:, :3])


def test_capacity_can_shrink_to_what_is_used():
  x = np.random.default_rng(0).normal(size=(23, 4)).astype("float32")
  index = hnsw.add(hnsw.add(hnsw.build(x[:20]), x[20:21], capacity=60), x[21:], capacity=40)
  assert len(index.labels) == 40 and index.size == 23
  np.testing.assert_array_equal(hnsw.search(index, x, k=1)[0][:, 0], np.arange(23))
