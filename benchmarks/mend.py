"""MEND's edits and training steps beside the official algorithm in PyTorch.

The peer takes inputs and output gradients from hooks, as the official code does, forms the edited kernels for a
functional call, and goes through the ten problems of a step in turn. It is spared what the official code does besides:
gradients of weights that are not edited, one update of the statistics a token, and norms of all gradients for a log.
"""

import functools

from benchmarks.harness import Case

VOCABULARY, LENGTH, DEPTH, HEADS, BLOCKS = 2000, 16, 4, 4, 3
PROBLEMS, LOCALITY = 10, 4
RATE, STEP_RATE, CLIP, EDIT_WEIGHT = 1e-6, 1e-4, 100.0, 0.1


def _sentences(*shape):
  """Random words, 10 to 16 of them; the last two are the answer."""
  import numpy as np

  rng = np.random.default_rng(len(shape) + shape[-1])
  length = rng.integers(10, LENGTH + 1, shape)[..., None]
  place = np.arange(LENGTH)
  tokens = np.where(place < length, rng.integers(1, VOCABULARY, (*shape, LENGTH)), 0).astype("int32")
  return {"tokens": tokens, "mask": (place < length) & (place >= length - 2)}


def _parameters(width, rank):
  wide, rank = 5 * width, min(rank, 5 * width)
  return 2 * 2 * (2 * wide * rank + wide + 2 * BLOCKS * wide)


def ours(what, width, rank, dtype):
  """An edit and the answer of the edited network, or a training step."""
  import jax

  from jaxlab.learning import mend
  from jaxlab.models import language

  model = language.LanguageModel(VOCABULARY, width, DEPTH, HEADS, LENGTH, dtype=dtype)
  targets = tuple(f"block{i}/mlp/{layer}" for i in range(DEPTH - BLOCKS, DEPTH) for layer in ("fc1", "fc2"))
  editor = mend.Editor(targets, rank=rank, dtype=dtype)
  batch = {
    "edit": _sentences(PROBLEMS, 1),
    "paraphrase": _sentences(PROBLEMS, 1),
    "locality": _sentences(PROBLEMS, LOCALITY),
  }
  base = jax.jit(model.init)(jax.random.key(0), batch["edit"]["tokens"][0])
  learner = mend.learner(model, base, editor, edit_weight=EDIT_WEIGHT)
  state = [jax.jit(learner.init)(jax.random.key(0), batch)]
  networks = {name: leaf for name, leaf in state[0].params.items() if name != "step_sizes"}
  assert sum(leaf.size for leaf in jax.tree.leaves(networks)) == _parameters(width, rank)
  step = jax.jit(learner.step, donate_argnums=0)
  state[0], _ = step(state[0], batch)

  if what == "edit":

    @jax.jit
    def edited(base, trained, sentences, asked):
      return mend.apply(model, base, mend.edit(model, base, editor, trained, sentences), asked)

    one, asked = jax.tree.map(lambda a: a[0], batch["edit"]), batch["locality"]["tokens"][0]
    return lambda: jax.block_until_ready(edited(state[0].base, state[0].variables, one, asked))

  def run():
    state[0], _ = step(state[0], batch)
    jax.block_until_ready(state[0])

  return run


def torch(what, width, rank, dtype):
  """The same with torch; in bfloat16 under autocast."""
  import torch
  from torch import nn
  from torch.nn import functional

  class Block(nn.Module):
    def __init__(self):
      super().__init__()
      self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
      self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
      self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
      b, n, _ = x.shape
      q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
      attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
      x = x + self.proj(attended.transpose(1, 2).reshape(b, n, width))
      return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))

  class Language(nn.Module):
    def __init__(self):
      super().__init__()
      self.embed = nn.Embedding(VOCABULARY, width)
      self.position = nn.Parameter(0.02 * torch.randn(LENGTH, width))
      self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
      self.norm = nn.LayerNorm(width)

    def forward(self, tokens):
      x = self.embed(tokens) + self.position
      for block in self.blocks:
        x = block(x)
      return self.norm(x) @ self.embed.weight.T

  class LowRank(nn.Module):
    def __init__(self, size):
      super().__init__()
      inner = min(rank, size)
      self.up, self.down = nn.Parameter(torch.zeros(size, inner)), nn.Parameter(torch.randn(inner, size))
      self.bias = nn.Parameter(torch.zeros(size))
      self.scale, self.shift = nn.Parameter(torch.ones(BLOCKS, size)), nn.Parameter(torch.zeros(BLOCKS, size))

    def forward(self, z, mode):
      a = functional.linear(functional.linear(z, self.down), self.up, self.bias)
      return z + (self.scale[mode] * a + self.shift[mode]).clamp(min=0)

  class Transform(nn.Module):
    def __init__(self, m, n):
      super().__init__()
      self.layers = nn.ModuleList([LowRank(m + n), LowRank(m + n)])
      self.sizes, self.count = [m, n], 0
      self.mean, self.squares = torch.zeros(m + n), torch.zeros(m + n)

    def forward(self, x, d, mode):
      x, d = x.reshape(-1, x.shape[-1]).float(), d.reshape(-1, d.shape[-1]).float()
      there = (x != 0).any(-1) & (d != 0).any(-1)
      z = torch.cat([x[there], d[there]], -1)
      if self.training:
        total = self.count + len(z)
        mean = z.mean(0)
        shift = mean - self.mean
        self.squares += (z - mean).square().sum(0) + shift.square() * self.count * len(z) / total
        self.mean += shift * len(z) / total
        self.count = total
      z = (z - self.mean) / ((self.squares / (self.count - 1)).sqrt() + 1e-7)
      for layer in self.layers:
        z = layer(z, mode)
      return z.split(self.sizes, -1)

  torch.manual_seed(0)
  model = Language()
  for parameter in model.parameters():
    parameter.requires_grad_(False)
  edited = {}
  for i in range(DEPTH - BLOCKS, DEPTH):
    for name in ("fc1", "fc2"):
      edited[f"blocks.{i}.{name}.weight"] = getattr(model.blocks[i], name)
  seen = {}
  for name, layer in edited.items():
    layer.weight.requires_grad_(True)
    layer.register_forward_hook(lambda _, given, out, name=name: seen.update({name: [given[0].detach()]}))
    layer.register_full_backward_hook(lambda _, grad_in, grad, name=name: seen[name].append(grad[0].detach()))
  transforms = nn.ModuleDict({"fc1": Transform(width, 4 * width), "fc2": Transform(4 * width, width)})
  assert sum(p.numel() for p in transforms.parameters()) == _parameters(width, rank)
  steps = nn.Parameter(torch.full((len(edited),), 1e-4))
  networks = list(transforms.parameters())
  optimizer = torch.optim.Adam([{"params": networks, "lr": RATE}, {"params": [steps], "lr": STEP_RATE}], foreach=True)
  autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=dtype == "bfloat16")
  tensors = lambda batch: {name: torch.from_numpy(a) for name, a in batch.items()}
  batch = {
    "edit": tensors(_sentences(PROBLEMS, 1)),
    "paraphrase": tensors(_sentences(PROBLEMS, 1)),
    "locality": tensors(_sentences(PROBLEMS, LOCALITY)),
  }

  def nll(logits, tokens, mask):
    chosen = logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None].long())[..., 0]
    return -(chosen * mask[:, 1:]).sum() / mask[:, 1:].sum()

  def edit(tokens, mask):
    with autocast():
      loss = nll(model(tokens), tokens, mask)
    loss.backward()
    kernels = {}
    for i, (name, layer) in enumerate(edited.items()):
      given, delta = seen[name][0], seen[name][-1]
      with autocast():
        x, d = transforms[name.split(".")[-2]](given, delta, i // 2)
        kernels[name] = layer.weight.detach() - steps[i] * (d.T @ x)
      layer.weight.grad = None
    return kernels

  def answer(kernels, tokens):
    with autocast():
      return torch.func.functional_call(model, kernels, (tokens,))

  if what == "edit":
    edit(batch["edit"]["tokens"][0], batch["edit"]["mask"][0])
    transforms.eval()
    asked = batch["locality"]["tokens"][0]

    def run():
      kernels = edit(batch["edit"]["tokens"][0], batch["edit"]["mask"][0])
      with torch.no_grad():
        return answer({name: kernel.detach() for name, kernel in kernels.items()}, asked)

    return run

  def step():
    optimizer.zero_grad()
    for b in range(PROBLEMS):
      kernels = edit(batch["edit"]["tokens"][b], batch["edit"]["mask"][b])
      asked, kept = ({name: a[b] for name, a in batch[part].items()} for part in ("paraphrase", "locality"))
      with torch.no_grad(), autocast():
        before = model(kept["tokens"])[:, :-1].float().log_softmax(-1)
      edit_loss = nll(answer(kernels, asked["tokens"]), asked["tokens"], asked["mask"])
      after = answer(kernels, kept["tokens"])[:, :-1].float().log_softmax(-1)
      divergence = (before.exp() * (before - after)).sum(-1)
      mask = kept["mask"][:, 1:]
      loss = EDIT_WEIGHT * edit_loss + (divergence * mask).sum() / mask.sum()
      (loss / PROBLEMS).backward()
    torch.nn.utils.clip_grad_norm_([*networks, steps], CLIP)
    optimizer.step()

  return step


def cases():
  """A small model with an editor of rank 640, and for single edits one of GPT-2's width with the paper's rank."""
  made = []
  for what, width, rank, name in (
    ("edit", 256, 640, "an edit and 4 answers, width 256"),
    ("edit", 768, 1920, "an edit and 4 answers, width 768"),
    ("step", 256, 640, f"training step, {PROBLEMS} problems, width 256"),
  ):
    for dtype in ("float32", "bfloat16"):
      mine, peer = (functools.partial(side, what, width, rank, dtype) for side in (ours, torch))
      made.append(Case(f"MEND {name}, {dtype}", mine, {"PyTorch": peer}))
  return made
