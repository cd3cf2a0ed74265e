import networkx
import numpy as np
import pytest

from jaxlab.data import synthetic


def as_networkx(edges, num_nodes):
  senders, receivers = edges
  graph = networkx.Graph()
  graph.add_nodes_from(range(num_nodes))
  graph.add_edges_from(zip(senders.tolist(), receivers.tolist(), strict=True))
  return graph


def check_simple(edges):
  senders, receivers = edges
  assert senders.dtype == receivers.dtype == np.int32 and (senders != receivers).all()
  pairs = set(zip(senders.tolist(), receivers.tolist(), strict=True))
  assert len(pairs) == len(senders) and all((b, a) in pairs for a, b in pairs)
  order = receivers.astype(np.int64) * (senders.max(initial=0) + 1) + senders
  assert (np.diff(order) > 0).all()


@pytest.mark.parametrize("homophily", [0.1, 0.8])
def test_citation_has_the_asked_for_statistics(homophily):
  dataset = synthetic.citation(3000, 4, mean_degree=10, homophily=homophily, seed=2)
  check_simple((dataset.senders, dataset.receivers))
  assert len(dataset.senders) == 3000 * 10
  same = (dataset.labels[dataset.senders] == dataset.labels[dataset.receivers]).mean()
  assert abs(same - homophily) < 0.04
  assert np.bincount(dataset.labels).tolist() == [750] * 4
  degrees = np.bincount(dataset.receivers, minlength=3000)
  assert degrees.max() > 5 * degrees.mean() > 10 * degrees.std() / 10  # heavy-tailed
  assert dataset.features.shape == (3000, 500) and (dataset.features.data == 1).all()
  assert 15 < dataset.features.nnz / 3000 <= 20
  assert (dataset.train_mask.sum(), dataset.val_mask.sum(), dataset.test_mask.sum()) == (80, 500, 1000)


def test_citation_words_tell_the_class():
  def accuracy(share):
    dataset = synthetic.citation(1000, 5, topic_share=share, train_per_class=20, val=100, test=None, seed=0)
    part = np.arange(500) * 5 // 500
    votes = dataset.features @ np.eye(5)[part]
    return (votes.argmax(1) == dataset.labels).mean()

  assert accuracy(0.0) < 0.3 and accuracy(0.3) > 0.75 and accuracy(1.0) == 1.0


def test_seeds():
  one, again, other = (synthetic.citation(600, 3, val=50, test=50, seed=s) for s in (0, 0, 1))
  np.testing.assert_array_equal(one.senders, again.senders)
  np.testing.assert_array_equal(one.features.indices, again.features.indices)
  assert len(one.senders) != len(other.senders) or (one.senders != other.senders).any()
  for sample in (lambda s: synthetic.erdos_renyi(50, 100, seed=s), lambda s: synthetic.barabasi_albert(50, 3, seed=s)):
    np.testing.assert_array_equal(sample(0), sample(0))
    assert sample(0)[0].tolist() != sample(1)[0].tolist()


def test_erdos_renyi_is_uniform_over_pairs():
  counts = np.zeros((6, 6), int)
  for seed in range(2000):
    senders, receivers = synthetic.erdos_renyi(6, 5, seed=seed)
    assert len(senders) == 10
    counts[senders, receivers] += 1
  pairs = counts[np.triu_indices(6, 1)]  # 15 pairs, each in a third of the graphs
  assert pairs.sum() == 10000 and np.abs(pairs - 2000 / 3).max() < 5 * np.sqrt(2000 * 2 / 9)
  check_simple(synthetic.erdos_renyi(1000, 5000))


def test_barabasi_albert_has_a_power_law():
  edges = synthetic.barabasi_albert(20_000, 4, seed=0)
  check_simple(edges)
  assert 0.98 * 80_000 < len(edges[0]) / 2 <= 80_000
  degrees = np.bincount(edges[1])
  # P(degree >= d) = m (m + 1) / (d (d + 1)) for the model's limit; self-loops and repetitions thin it a little.
  for d in (8, 16, 32, 64):
    assert (degrees >= d).mean() == pytest.approx(4 * 5 / (d * (d + 1)), rel=0.2)
  graph = as_networkx(edges, 20_000)
  assert len(max(networkx.connected_components(graph), key=len)) > 0.99 * 20_000


def test_early_nodes_are_the_hubs_and_later_ones_attach_backwards():
  senders, receivers = synthetic.barabasi_albert(5000, 3, seed=1)
  degrees = np.bincount(receivers, minlength=5000)
  assert degrees[:50].mean() > 10 * degrees[-2500:].mean()
  # Each node brings at most 3 edges to nodes before it.
  assert np.bincount(receivers[senders < receivers]).max() <= 3


def test_stochastic_blocks_have_their_densities():
  sizes, p = (300, 500, 200), np.array([[0.1, 0.01, 0.0], [0.01, 0.05, 0.02], [0.0, 0.02, 1.0]])
  senders, receivers = synthetic.stochastic_blocks(sizes, p, seed=1)
  block = np.repeat(np.arange(3), sizes)
  counts = np.zeros((3, 3))
  np.add.at(counts, (block[senders], block[receivers]), 1)
  pairs = np.outer(sizes, sizes) - np.diag(sizes)
  np.testing.assert_allclose(counts / pairs, p, atol=5 * 0.5 / np.sqrt(pairs.min()))
  np.testing.assert_allclose(counts, counts.T)
  assert counts[2, 2] == 200 * 199 and counts[0, 2] == 0 and (senders != receivers).all()
  degree = np.bincount(receivers, minlength=1000)[:300]  # uniform within a block
  assert abs(np.corrcoef(degree, np.arange(300))[0, 1]) < 0.2
  np.testing.assert_array_equal(senders, synthetic.stochastic_blocks(sizes, p, seed=1)[0])
  for bad in (p[:2], p + 1, p + np.triu(np.full((3, 3), 1e-3), 1) * (p < 0.5)):
    with pytest.raises(ValueError, match="^probabilities: got"):
      synthetic.stochastic_blocks(sizes, bad)


def test_dictionaries_hold_a_permutation_each():
  graphs = synthetic.dictionary_lookup(4, 3000, seed=1)
  assert graphs.nodes.shape == (3000, 8, 2) and graphs.labels.shape == (3000, 4)
  assert {array.dtype for array in graphs} == {np.dtype("int32")}
  np.testing.assert_array_equal(graphs.nodes[:, :4, 0], np.tile(range(4), (3000, 1)))
  np.testing.assert_array_equal(graphs.nodes[:, 4:, 0], np.tile(range(4), (3000, 1)))
  assert (graphs.nodes[:, :4, 1] == 4).all()  # no value
  np.testing.assert_array_equal(graphs.nodes[:, 4:, 1], graphs.labels)
  pairs = set(zip(graphs.senders.tolist(), graphs.receivers.tolist(), strict=True))
  assert pairs == {(value, key) for value in range(4, 8) for key in range(4)} and (np.diff(graphs.receivers) >= 0).all()
  _, counts = np.unique(graphs.labels, axis=0, return_counts=True)
  assert len(counts) == 24 and np.abs(counts - 125).max() < 5 * np.sqrt(125)  # all permutations, evenly


def test_hetero_edge_count_against_a_loop():
  graphs = synthetic.hetero_edge_count(3, 300, max_nodes=9, seed=2)
  assert graphs.n_node.min() == 2 and graphs.n_node.max() == 9 and set(graphs.labels.tolist()) == {0, 1, 2}
  assert (graphs.n_edge >= graphs.n_node**2 // 4).all() and (graphs.n_edge <= graphs.n_node**2).all()
  assert (graphs.n_edge == graphs.n_node**2).any() and (graphs.n_edge == graphs.n_node**2 // 4).any()  # both ends
  node = edge = loops = 0
  for n, e, target in zip(graphs.n_node, graphs.n_edge, graphs.targets, strict=True):
    labels = graphs.labels[node : node + n]
    senders, receivers = graphs.senders[edge : edge + e], graphs.receivers[edge : edge + e]
    pairs = list(zip(receivers.tolist(), senders.tolist(), strict=True))
    assert sorted(set(pairs)) == pairs and all(max(pair) < n for pair in pairs)
    assert sum(labels[a] != labels[b] for a, b in pairs) == target
    loops += sum(a == b for a, b in pairs)
    node, edge = node + n, edge + e
  assert node == len(graphs.labels) and edge == len(graphs.senders) and loops > 100


def test_synthetic_tasks_follow_their_seed():
  for sample in (
    lambda s: synthetic.dictionary_lookup(5, 9, seed=s),
    lambda s: synthetic.hetero_edge_count(2, 9, seed=s),
  ):
    one, again, other = sample(0), sample(0), sample(1)
    for a, b in zip(one, again, strict=True):
      np.testing.assert_array_equal(a, b)
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
  "call, argument",
  [
    (lambda: synthetic.dictionary_lookup(0), "size"),
    (lambda: synthetic.dictionary_lookup(3, 0), "num_graphs"),
    (lambda: synthetic.dictionary_lookup(3, seed=-1), "seed"),
    (lambda: synthetic.hetero_edge_count(0), "num_classes"),
    (lambda: synthetic.hetero_edge_count(2, max_nodes=1), "max_nodes"),
  ],
)
def test_synthetic_tasks_name_bad_arguments(call, argument):
  with pytest.raises(ValueError, match=f"^{argument}: got "):
    call()


def test_fans_follow_their_community():
  graph = synthetic.fans(1000, 5000, 20, mean_follows=8, loyalty=0.7, seed=3)
  assert np.bincount(graph.labels).tolist() == [50] * 20 and graph.receivers.max() < 1000
  keys = graph.senders * 1000 + graph.receivers
  assert (np.diff(keys) > 0).all()  # sorted, none twice
  degree = np.bincount(graph.senders, minlength=5000)
  assert 7 < degree.mean() < 8  # what is drawn twice counts once
  mine = np.zeros((5000, 20), int)
  np.add.at(mine, (graph.senders, graph.labels[graph.receivers]), 1)
  many = degree >= 6
  share = mine[many].max(axis=1).sum() / mine[many].sum()
  assert 0.65 < share < 0.78  # loyal draws, and strays into the own community
  popular = np.sort(np.bincount(graph.receivers, minlength=1000))
  assert popular[-10:].mean() > 3 * popular.mean()


def test_fans_of_several_parts_share_accounts():
  first, again, second = (synthetic.fans(100, 400, 4, part=part, seed=1) for part in (0, 0, 1))
  for a, b in zip(first, again, strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(first.labels, second.labels)
  assert first.senders.max() < 400 <= second.senders.min() and second.senders.max() < 800
  counts = [np.bincount(part.receivers, minlength=100) for part in (first, second)]
  assert np.corrcoef(counts)[0, 1] > 0.9  # popularity is the accounts'
  assert len(first.receivers) != len(second.receivers) or (first.receivers != second.receivers).any()


@pytest.mark.parametrize(
  "changes, argument",
  [
    ({"num_accounts": 2}, "num_accounts"),
    ({"num_fans": 0}, "num_fans"),
    ({"loyalty": 1.5}, "loyalty"),
    ({"popularity_exponent": 2.0}, "popularity_exponent"),
    ({"part": -1}, "part"),
  ],
)
def test_fans_name_bad_arguments(changes, argument):
  with pytest.raises(ValueError, match=f"^{argument}: got "):
    synthetic.fans(**({"num_accounts": 10, "num_fans": 5, "num_communities": 3} | changes))
