"""NAT: link prediction on a stream of edges from small dictionaries of neighbours that each node keeps up to date.

A node owns a slot for itself and M_k slots for hop k = 1, 2. A slot holds a neighbour's id (the key), when and by which
edge it was last met, and a tiny vector; key a of hop k lives in slot hash_k(a), so joining the dictionaries of two
nodes finds common neighbours without a search. With the slots of u and v refreshed and grouped by key a,

    rep'(slot)  = GRU(L_n [self(a); edge; cos(t w + phi)], rep)
    self'(u)    = GRU(L_s [self(partner); edge; cos(t w + phi)], self(u)), of u's latest event
    x_a         = sum of [node(a); rep'] over slots with key a
    code_a      = which of the 2 x 3 dictionaries hold a, 6 bits
    agg         = mean over heads of sum_a W [x_a; Emb(code_a)] + b
    logit(u, v) = MLP [agg; self'(u); self'(v)]

Then the batch's events (u, v, t) are written: u becomes a key of v at hop 1 and the other way round, and all hop-1
slots of either are offered to hop 2 of the other. An offer always takes a free slot or one with the same key; another
key it replaces with probability alpha. Cost and memory of an event do not depend on the stream's length.

Luo and Li, "Neighborhood-aware Scalable Temporal Network Representation Learning", LoG 2022, arXiv:2209.01084; code
`Graph-COM/Neighborhood-Aware-Temporal-Network`. Symbols: M_k is `slots`, F `self_dim` (72), f `slot_dim` (4), D_t
`time_dim`, P `position_dim`, alpha `replace_prob`, the N-caches are `Memory.slots`. The state is a pytree, every
function is pure, and a batch reads the state that the batch before it wrote; gradients do not cross batches.

Differs from the paper: keys are summed, not attended to, as in the official code, where the attention weights are
computed but never used (`aggregation="attention"` uses them); the hash is the code's. Differs from the official code:
ids are integers, not float32; of several writes to a slot the last wins, which torch only does with one thread; unused
weights are left out (186,297 of 404,308 for Wikipedia); vectors of empty slots are 0, not random (they are never read);
with alpha = 0 free slots still fill; dropout and replacement draw anew in each epoch; after training the best epoch is
taken even if no early stop occurred.
"""

from jaxlab.graph.links.nat.network import (
  GRU,
  NAT,
  Aggregation,
  Latest,
  Memory,
  Read,
  Tables,
  TimeCode,
  Writes,
  changes,
  reset,
  write,
)
from jaxlab.graph.links.nat.training import (
  Best,
  Run,
  Task,
  Training,
  batch_average_precision,
  learner,
  stream,
  train_stream,
)
from jaxlab.graph.links.nat.variants import RECIPES, Recipe, from_torch, wiki_talk, wikipedia

__all__ = [
  "GRU",
  "NAT",
  "RECIPES",
  "Aggregation",
  "Best",
  "Latest",
  "Memory",
  "Read",
  "Recipe",
  "Run",
  "Tables",
  "Task",
  "TimeCode",
  "Training",
  "Writes",
  "batch_average_precision",
  "changes",
  "from_torch",
  "learner",
  "reset",
  "stream",
  "train_stream",
  "wiki_talk",
  "wikipedia",
  "write",
]
