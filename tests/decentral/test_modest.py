"""MoDeST: official orders and network; views as a semilattice; the protocol's bookkeeping; FedAvg as its limit."""

import functools
import json

import chex
import golden_rule
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny

from jaxlab.decentral import modest, simulator

GOLDEN = np.load(golden_rule.GOLDEN / "modest.npz")
IDS = [modest.node_id(i) for i in range(30)]


# ------------------------------------------------------------------------------------------------- samples and views


def numbers(nodes):
  return [int(node[5:]) for node in nodes]


def test_orders_are_the_official_ones():
  assert [numbers(modest.order(IDS, k)) for k in range(1, 21)] == GOLDEN["orders"].tolist()
  ten = IDS[:10]
  assert numbers(modest.order(ten, 1)) == [7, 6, 2, 8, 4, 0, 5, 1, 9, 3]
  assert numbers(modest.order(reversed(ten), 2)) == [2, 7, 6, 5, 3, 8, 4, 1, 0, 9]
  assert numbers(modest.order(ten, 3)) == [0, 4, 6, 3, 2, 9, 8, 5, 1, 7]


def test_activity_filter_is_the_official_one():
  view = {node: modest.Entry(3 * j) for j, node in enumerate(IDS)}
  for row, k in zip(GOLDEN["active"], (0, 40, 60, 100, 150), strict=True):
    found = modest.active(view, IDS[0], k, 50)
    np.testing.assert_array_equal([node in found for node in IDS], row.astype(bool))
  view[IDS[3]] = modest.Entry(9, 1, "leave")
  assert IDS[3] not in modest.active(view, IDS[0]) and IDS[3] in modest.active(view, IDS[3])


def test_samples_are_even_and_uncorrelated():
  nodes, s, rounds = [modest.node_id(i) for i in range(50)], 10, 2000
  hit = np.zeros((rounds, 50))
  for k in range(1, rounds + 1):
    hit[k - 1, numbers(modest.order(nodes, k)[:s])] = 1
  assert scipy.stats.chisquare(hit.sum(0)).pvalue > 0.01
  overlap = (hit[1:] * hit[:-1]).sum(1).mean()
  assert overlap == pytest.approx(s * s / 50, abs=0.1)


entries = st.builds(modest.Entry, st.integers(-1, 9), st.integers(0, 3), st.sampled_from(["join", "leave"]))
views = st.dictionaries(st.sampled_from(IDS[:5]), entries)


@hypothesis.given(views, views, views)
def test_views_are_a_semilattice(a, b, c):
  merge = modest.merge
  assert merge(a, b) == merge(b, a)
  assert merge(merge(a, b), c) == merge(a, merge(b, c))
  assert merge(a, a) == a
  together = merge(a, b)
  assert all(together[node].active >= entry.active for view in (a, b) for node, entry in view.items())
  assert merge(together, a) == together


# ------------------------------------------------------------------------------------------------------- the protocol


@functools.cache
def quiet(sample=5, aggregators=2, nodes=20, rounds=12):
  return modest.simulate(modest.Protocol(sample, aggregators), nodes, rounds)


def test_without_failures_the_samples_are_those_of_the_hash_and_all_averages_agree():
  trace, nodes = quiet(), [modest.node_id(i) for i in range(20)]
  assert len(trace.averaged) == 12
  for k in range(1, 13):
    sample, following = (numbers(modest.order(nodes, j))[:5] for j in (k, k + 1))
    assert set(trace.trained[k - 1]) == set(sample)  # and each trains once, although two averages arrive
    assert set(trace.averaged[k - 1]) == set(following[:2])
    assert all(set(senders) == set(sample) for senders in trace.averaged[k - 1].values())
    assert set(trace.trained[k - 1].values()) <= (set(trace.averaged[k - 2]) if k > 1 else {-1})
  assert sum(trace.failed) == 0 and np.all(np.diff(trace.time) > 0)


def test_models_sent_are_2sa_without_those_to_oneself():
  for s, a in ((5, 2), (4, 1)):
    trace, nodes = quiet(s, a), [modest.node_id(i) for i in range(20)]
    for k in range(1, 13):
      sample, following = (numbers(modest.order(nodes, j))[:s] for j in (k, k + 1))
      to_self = len(set(sample) & set(following[:a])) + a  # an aggregator is in the sample it serves
      assert trace.models[k - 1] == 2 * s * a - to_self


def crash(nodes=60, s=4, a=2, at=20, share=0.8, rounds=110, inactivity=70):
  """At a round, a share of the nodes vanishes, none of them at work in that very round."""
  ids = [modest.node_id(i) for i in range(nodes)]
  busy = {i for k in (at - 1, at, at + 1) for i in numbers(modest.order(ids, k))[:s]}
  idle = [i for i in range(nodes) if i not in busy]
  gone = np.random.default_rng(0).permutation(idle)[: round(share * nodes)]
  events = [modest.Event(at, "crash", int(i)) for i in gone]
  protocol = modest.Protocol(s, a, success_fraction=0.75, inactivity=inactivity)
  return modest.simulate(protocol, nodes, rounds, events=events), set(gone.tolist())


def test_rounds_go_on_when_most_have_crashed_and_pings_stop_failing():
  trace, gone = crash()
  assert len(gone) == 48 and len(trace.averaged) == 110
  assert sum(trace.failed[:18]) == 0 and max(trace.failed[20:30]) > 5
  assert all(not gone & set(trained) for trained in trace.trained[20:])
  assert sum(trace.failed[20 + 70 :]) == 0  # after Delta_k rounds the silent are no longer asked


def test_a_lost_round_stops_a_short_trace():
  events = [modest.Event(5, "crash", i) for i in range(18)]
  trace = modest.simulate(modest.Protocol(5, 1), 20, 12, events=events)
  assert 3 <= len(trace.averaged) <= 6


def test_fewer_models_do_after_a_timeout():
  nodes = [modest.node_id(i) for i in range(20)]
  sample, following = (numbers(modest.order(nodes, k))[:5] for k in (6, 7))
  lost = [i for i in sample if i not in following[:1]][:2]
  events = [modest.Event(6, "crash", i) for i in lost]
  waiting = modest.simulate(modest.Protocol(5, 1), 20, 12, events=events)
  patient = modest.simulate(modest.Protocol(5, 1, timeout=30.0), 20, 12, events=events)
  assert len(waiting.averaged) == 5 and len(patient.averaged) == 12
  assert sorted(next(iter(patient.averaged[5].values()))) == sorted(set(sample) - set(lost))
  assert patient.time[5] - patient.time[4] > 30


def test_a_joining_node_is_known_soon_and_then_sampled_and_one_that_left_is_not():
  events = [modest.Event(5, "join", 29), modest.Event(8, "leave", 3)]
  trace = modest.simulate(modest.Protocol(5, 1), 30, 60, events=events)
  share = np.array(trace.known[29])
  assert share[0] < 0.6 and (np.diff(share) >= -1e-9).all()
  assert np.flatnonzero(share >= 0.999)[0] < 30
  assert any(29 in trained for trained in trace.trained[10:])
  assert not any(3 in trained for trained in trace.trained[40:]) and len(trace.averaged) == 60


def test_late_models_count_when_too_few_came_in_time():
  nodes = [modest.node_id(i) for i in range(20)]
  sample, following = (numbers(modest.order(nodes, k))[:3] for k in (6, 7))
  slow, lost = [i for i in sample if i != following[0]][:2]
  latency = np.full((20, 20), 0.05)
  latency[slow, following[0]] = 40.0
  protocol = modest.Protocol(3, 1, timeout=10.0, least=2, ping_timeout=100.0)
  trace = modest.simulate(protocol, 20, 8, latency=latency, events=[modest.Event(6, "crash", lost)])
  assert len(trace.averaged) == 8 and slow in trace.averaged[5][following[0]] and lost not in trace.trained[5]


def test_nodes_join_again():
  # Views differ for a while after a join, so some models go to other aggregators.
  protocol, event = modest.Protocol(5, 2, success_fraction=0.6), modest.Event
  for events in (
    [event(3, "leave", 2), event(6, "join", 2)],
    [event(3, "crash", 2), event(6, "join", 2)],
    [event(3, "join", 2), event(12, "leave", 2), event(30, "join", 2)],
  ):
    trace = modest.simulate(protocol, 12, 80, events=events)
    assert len(trace.averaged) == 80
    there = [k for k in range(1, 81) if 2 in trace.trained[k - 1]]
    assert [k for k in there if k > 40], events
    back = events[-1].round
    gone = max((e.round for e in events if e.happening != "join"), default=0)
    assert not [k for k in there if gone + 15 < k < back]
    assert trace.known[2][-1] == 1 and trace.known[2][0] < 1


def test_events_happen_in_an_order_that_is_possible():
  event = modest.Event
  for events in (
    [event(3, "join", 2), event(5, "join", 2)],
    [event(3, "leave", 2), event(4, "crash", 2)],
    [event(2, "crash", 2), event(2, "leave", 2)],
    [event(2, "leave", 2), event(3, "join", 2), event(4, "join", 2)],
  ):
    with pytest.raises(ValueError, match="^events: got Event.*expected joins of absent"):
      modest.simulate(modest.Protocol(2, 1), 6, 3, events=events)
  gone = [event(2, "crash", i) for i in range(4)]
  with pytest.raises(ValueError, match="^events: got a node that joins in round 2"):
    modest.simulate(modest.Protocol(2), 4, 6, events=[*gone, event(2, "join", 0)])


# -------------------------------------------------------------------------------------------------------- the learner

DATA = tiny.clients((3,) * 8)
WORK = simulator.Work(2, 2)


LEARNER = modest.learner(tiny.MOMENTUM, WORK)


@pytest.mark.parametrize(("s", "a"), [(8, 1), (3, 2)])  # all take part; some do
def test_without_failures_it_is_fedavg_on_the_same_samples(s, a):
  trace = modest.simulate(modest.Protocol(s, a), 8, 4)
  state, history = tiny.run(LEARNER, modest.plan(trace, DATA), 4)
  samples = jnp.asarray([sorted(trained) for trained in trace.trained])
  choose = None if s == 8 else lambda key, round, n: samples[round]
  federated = simulator.federated(tiny.MOMENTUM, WORK, by_size=False, choose=choose)
  # The same start: that of the clients' common model.
  given = jax.jit(federated.init)(jax.random.key(0), DATA)
  first = jax.jit(LEARNER.init)(jax.random.key(0), modest.plan(trace, DATA))
  given = given.replace(model=jax.tree.map(lambda x: x[0], first.models))
  for _ in range(4):
    given, _ = jax.jit(federated.step)(given, DATA)
  for i in range(a):
    chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], state.models), given.model, atol=1e-6)
  assert int(history[-1]["sent"]) == sum(trace.models)


def test_averages_of_different_subsets_are_followed_by_those_who_took_them():
  trace = modest.Trace(
    trained=[{0: -1, 1: -1, 2: -1}, {3: 5, 4: 6}], averaged=[{5: [0, 1], 6: [1, 2]}, {7: [3, 4]}],
    models=[1, 1], pings=[0, 0], failed=[0, 0], time=[1.0, 2.0], known={},
  )  # fmt: skip
  learner = modest.learner(tiny.SGD, simulator.Work())
  plan = modest.plan(trace, DATA)
  state = jax.jit(learner.init)(jax.random.key(0), plan)
  start = jax.tree.map(lambda x: x[0], state.models["params"])
  for _ in range(2):
    state, _ = jax.jit(learner.step)(state, plan)
  train = lambda w, i: tiny.descend(w, *(DATA.examples[k][DATA.index[i]] for k in ("image", "label")))
  mean = lambda a, b: jax.tree.map(lambda x, y: (x + y) / 2, a, b)
  first, second = mean(train(start, 0), train(start, 1)), mean(train(start, 1), train(start, 2))
  expected = mean(train(first, 3), train(second, 4))
  chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], state.models["params"]), expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ networks


def test_golden():
  state = json.loads(str(GOLDEN["manifest"]))["state"]
  given = modest.from_torch({name: golden_rule.tensor(name, tuple(shape)) for name, shape in state})
  np.testing.assert_allclose(jax.jit(modest.GNLeNet().apply)(given, GOLDEN["in.x"]), GOLDEN["out"], atol=2e-5)


def test_parameter_counts():
  def count(model, *given):
    made = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(*given))
    return sum(x.size for x in jax.tree.leaves(made))

  counts = [
    count(modest.GNLeNet(), (1, 32, 32, 3), "float32"),
    count(modest.FEMNIST(), (1, 28, 28, 1), "float32"),
    count(modest.CelebA(), (1, 84, 84, 3), "float32"),
    count(modest.Factorization(), (1, 2), "int32"),
  ]
  assert counts == [85_354, 1_690_046, 30_242, 206_680] == GOLDEN["counts"].tolist()
