"""LAGNN on Cora beside the official algorithm in PyTorch: a training step of LA-GCN, and a step of the selection.

Both sides draw four fresh views a training step, and look 100 times at the generated features after a CVAE step. The
peer works on dense features and all nodes, as the official scripts do; a selection step is timed without fine-tuning,
which happens in few of them.
"""

import functools

from benchmarks.harness import Case

SAMPLES, HIDDEN, LATENT, WIDTH, PASSES, BATCH = 4, 8, 10, 256, 100, 64


def _cora():
  from jaxlab.data import planetoid

  return planetoid.load("cora")


def training_step():
  """One Adam step of LA-GCN: four views with fresh draws, the consistency loss; no evaluation."""
  import jax
  import jax.numpy as jnp
  import optax

  from jaxlab import data
  from jaxlab.graph import node_classification, sparse
  from jaxlab.graph.nets import local_augmentation as la

  cora = _cora()
  normal = data.row_normalize_features(cora)
  masks = [(cora.train_mask, cora.val_mask, cora.test_mask)]
  task = node_classification.task(normal.features, cora.senders, cora.receivers, cora.labels, masks)
  net = la.CVAE(cora.num_features, LATENT, WIDTH)
  row = jnp.zeros((1, cora.num_features))
  variables = jax.jit(net.init)(jax.random.key(0), row, row, jnp.zeros((1, LATENT)))
  batch = la.batch(task, la.Generator(variables, sparse.from_scipy(cora.features)))
  views = la.augmented(la.LAGCN(7, HIDDEN), lambda made, key: la.generate(net, made, key), samples=SAMPLES)
  tx = optax.chain(optax.add_decayed_weights(5e-4), optax.adam(0.01))
  params = jax.jit(views.init)(jax.random.key(1), batch)["params"]

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, batch):
    params, moments, key = state
    key, use = jax.random.split(key)

    def loss(params):
      logits, _ = views.train({"params": params}, batch, use)
      log_p = jax.nn.log_softmax(logits)[:, jnp.arange(logits.shape[1]), batch.labels]
      supervised = -jnp.mean(jnp.sum(log_p * batch.train, 1) / jnp.sum(batch.train))
      return supervised + la.consistency_loss(logits)

    updates, moments = tx.update(jax.grad(loss)(params), moments, params)
    return optax.apply_updates(params, updates), moments, key

  state = [(params, tx.init(params), jax.random.key(2))]

  def run():
    state[0] = step(state[0], batch)
    jax.block_until_ready(state[0])

  return run


def selection_step():
  """A CVAE step, generation, 100 passes of the scout, the score."""
  import jax

  from jaxlab.graph.nets import local_augmentation as la

  cora = _cora()
  pairs = la.pairs(cora.features, cora.senders, cora.receivers, cora.labels, cora.train_mask)
  net = la.CVAE(cora.num_features, LATENT, WIDTH)
  learner = la.selection(net, 7, passes=PASSES, batch_size=BATCH, warmup=10**9, steps_per_call=1)
  state, step = [jax.jit(learner.init)(jax.random.key(0), pairs)], jax.jit(learner.step, donate_argnums=0)

  def run():
    state[0], metrics = step(state[0], pairs)
    jax.block_until_ready(metrics)

  return run


def _torch_parts():
  """Dense features, sparse adjacency, a generator and a 2-layer graph convolution, as functions of torch tensors."""
  import numpy as np
  import torch

  cora = _cora()
  raw = torch.from_numpy(np.asarray(cora.features.toarray(), "float32"))
  normal = raw / raw.sum(1, keepdim=True).clamp(min=1)
  a = cora.adjacency.tolil()
  a.setdiag(1)
  a = a.tocoo()
  scale = np.asarray(a.sum(1)).ravel() ** -0.5
  values = torch.from_numpy((scale[a.row] * scale[a.col]).astype("float32"))
  places = torch.from_numpy(np.stack([a.row, a.col]).astype("int64"))
  adjacency = torch.sparse_coo_tensor(places, values, a.shape).coalesce()
  features = raw.shape[1]
  layers = torch.nn.ModuleDict(
    {
      "encoder": torch.nn.Linear(2 * features, WIDTH),
      "mean": torch.nn.Linear(WIDTH, LATENT),
      "log_variance": torch.nn.Linear(WIDTH, LATENT),
      "decoder": torch.nn.Linear(LATENT + features, WIDTH),
      "output": torch.nn.Linear(WIDTH, features),
    }
  )

  def decode(z, condition):
    return torch.sigmoid(layers["output"](torch.relu(layers["decoder"](torch.cat([z, condition], 1)))))

  def generate():
    made = decode(torch.randn(len(raw), LATENT), raw)
    scale = 1 / made.sum(1)
    scale[torch.isinf(scale)] = 0
    return (scale[:, None] * made).detach()

  def weights(width_in, width_out):
    w = torch.nn.Parameter(torch.randn(width_in, width_out) * width_out**-0.5)
    return w, torch.nn.Parameter(torch.zeros(width_out))

  drop = functools.partial(torch.nn.functional.dropout, p=0.5)

  def convolve(x, w):
    return torch.sparse.mm(adjacency, x @ w[0]) + w[1]

  labels, train = torch.from_numpy(cora.labels.astype("int64")), torch.from_numpy(cora.train_mask)
  return cora, raw, normal, layers, decode, generate, weights, drop, convolve, labels, train


def torch_training_step():
  """The same four views and losses."""
  import torch

  _, _, normal, _, _, generate, weights, drop, convolve, labels, train = _torch_parts()
  first = [weights(normal.shape[1], HIDDEN) for _ in range(2)]
  second = weights(2 * HIDDEN, 7)
  parameters = [p for w in [*first, second] for p in w]
  optimizer = torch.optim.Adam(parameters, lr=0.01, weight_decay=5e-4)

  def run():
    optimizer.zero_grad()
    views = []
    for _ in range(SAMPLES):
      hidden = [torch.relu(convolve(drop(x), w)) for x, w in zip((generate(), normal), first, strict=True)]
      views.append(torch.log_softmax(convolve(drop(torch.cat(hidden, 1)), second), 1))
    loss = sum(torch.nn.functional.nll_loss(v[train], labels[train]) for v in views) / SAMPLES
    p = torch.stack(views).exp()
    q = p.mean(0) ** 2
    q = (q / q.sum(1, keepdim=True)).detach()
    (loss + ((p - q) ** 2).sum(2).mean()).backward()
    optimizer.step()

  return run


def torch_selection_step():
  """The same on all nodes, with dense products, one pass after another."""
  import numpy as np
  import torch

  cora, raw, _, layers, decode, generate, weights, drop, convolve, labels, train = _torch_parts()
  senders, receivers = (torch.from_numpy(np.asarray(e, "int64")) for e in (cora.senders, cora.receivers))
  optimizer = torch.optim.Adam(layers.parameters(), lr=0.01)
  scout = weights(raw.shape[1], 32), weights(32, 7)
  nll = torch.nn.functional.nll_loss

  def run():
    chosen = torch.randint(0, len(senders), (BATCH,))
    x, c = raw[senders[chosen]], raw[receivers[chosen]]
    h = torch.relu(layers["encoder"](torch.cat([x, c], 1)))
    mean, log_variance = layers["mean"](h), layers["log_variance"](h)
    made = decode(mean + torch.exp(log_variance / 2) * torch.randn_like(mean), c)
    bce = torch.nn.functional.binary_cross_entropy(made, x, reduction="sum")
    kl = -0.5 * torch.sum(1 + log_variance - mean**2 - log_variance.exp())
    optimizer.zero_grad()
    ((bce + kl) / BATCH).backward()
    optimizer.step()
    features, total, entropy = generate(), 0.0, 0.0
    for _ in range(PASSES):
      logits = convolve(drop(torch.relu(convolve(drop(features), scout[0]))), scout[1])
      total = total + torch.softmax(logits, 1)
      entropy = entropy + nll(torch.log_softmax(logits, 1)[train], labels[train])
    score = nll(torch.log(total / PASSES)[train], labels[train]) - entropy / PASSES
    return score.item()

  return run


def cases():
  """Training and selection."""
  return [
    Case("training step of LA-GCN on Cora, 4 fresh draws", training_step, {"official algorithm": torch_training_step}),
    Case(
      f"selection step on Cora, {PASSES} passes of the scout", selection_step,
      {"official algorithm": torch_selection_step},
    ),
  ]  # fmt: skip
