"""MoDeST: federated averaging without a server, where a hash says who trains and who averages in each round.

    S^k = the first s ids that answer, of order(k) = ids sorted by MD5(id || "-" || k)
    trainers of round k: S^k;    aggregators of round k: the first a of S^{k+1};    w^{k+1} = mean of the trained models

De Vos, Dhasade, Kermarrec et al., "MoDeST: Bridging the Gap between Federated and Decentralized Learning with
Decentralized Sampling", 2023, arXiv:2302.13837. Symbols: s is `sample_size`, a `num_aggregators`, sf `success_fraction`
(of s models an aggregator waits for), Delta_k `inactivity` (rounds after which a silent node is no longer sampled).

Every node keeps a view (id -> last round it was active, last membership event). Views travel with the models and form a
join-semilattice under `merge`, so that nodes agree on samples without coordination.

Two parts, since what is learnt does not steer the protocol. `simulate` is the protocol on the host: an event loop with
a clock, latencies, crashes, leaves and joins; its `Trace` says who trained which model and who averaged whose. The
`learner` runs the rounds of a trace on a device, all trainers of a round in one vmapped computation. A trace without
failures is FedAvg with those samples.

Differs from the code of February 2023: merging keeps the later of two activities and the later of two events
separately (as later versions do; there, an event overwrote the activity with its counter). Every model takes the same
time to send; bandwidth is not shared. `timeout` is of later versions: an aggregator then makes do with what it has.
Not provided: what later versions do besides (acknowledgements, aggregators that pass on their models when they leave,
the fastest node as the aggregator), the measured latencies of 227 sites, gossip learning as a baseline.
"""

from jaxlab.decentral.modest.networks import FEMNIST, CelebA, Factorization, GNLeNet, from_torch
from jaxlab.decentral.modest.protocol import (
  Entry,
  Event,
  Protocol,
  Trace,
  View,
  active,
  merge,
  node_id,
  order,
  simulate,
)
from jaxlab.decentral.modest.training import Plan, Rounds, learner, plan

__all__ = [
  "FEMNIST",
  "CelebA",
  "Entry",
  "Event",
  "Factorization",
  "GNLeNet",
  "Plan",
  "Protocol",
  "Rounds",
  "Trace",
  "View",
  "active",
  "from_torch",
  "learner",
  "merge",
  "node_id",
  "order",
  "plan",
  "simulate",
]
