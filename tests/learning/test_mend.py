"""MEND against the official transform, autodiff, NumPy, and what the paper says of it."""

import dataclasses
import json

import chex
import flax.linen as nn
import golden_rule
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.learning import mend
from jaxlab.models import language

TARGETS = ("block0/mlp/fc1", "block0/mlp/fc2")
V, N, WIDTH = 13, 7, 8
MODEL = language.LanguageModel(V, WIDTH, depth=1, num_heads=2, max_length=N, mlp_ratio=2)
EDITOR = mend.Editor(TARGETS, rank=5)


def sentences(*shape, seed=0):
  """Random tokens, the last ones padding; the targets are the last real ones."""
  rng = np.random.default_rng(seed)
  length = rng.integers(4, N + 1, shape)[..., None]
  place = np.arange(N)
  tokens = np.where(place < length, rng.integers(1, V, (*shape, N)), 0).astype("int32")
  return {"tokens": tokens, "mask": (place < length) & (place >= length - 2)}


def problems(count=3, edits=2, seed=0):
  make = lambda many, k: sentences(count, many, seed=10 * seed + k)
  return {"edit": make(edits, 0), "paraphrase": make(edits, 1), "locality": make(4, 2)}


@pytest.fixture(scope="module")
def variables():
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, N), jnp.int32))
  rng = np.random.default_rng(0)
  draw = lambda path, a: jnp.asarray(
    rng.standard_normal(a.shape) / (1 if path[-1].key == "embedding" else 3) + (path[-1].key == "scale"), jnp.float32
  )
  return jax.tree_util.tree_map_with_path(draw, shapes)


predict = jax.jit(MODEL.apply)


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def targets_of(batch):
  """Where the targets are, and which."""
  s, t = np.nonzero(batch["mask"])
  return s, t - 1, batch["tokens"][s, t]


def nll(logits, batch):
  """Sum over sentences of mean negative log-likelihoods; written out for the tests."""
  s, t, token = targets_of(batch)
  return -jnp.sum(jax.nn.log_softmax(logits)[s, t, token] / batch["mask"].sum(-1)[s])


# ----------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("mend", {}),
    ("mend_separate", {"variant": "separate"}),
    ("mend_smaller", {"variant": "smaller"}),
    ("mend_deltas", {"variant": "deltas"}),
    ("mend_unnormalized", {"normalize": False}),
    ("mend_xavier", {"start": "xavier"}),
  ],
)
def test_transform_is_the_official_one(name, options):
  """Three layers of one shape: two calls in training, whose tokens enter the statistics, one in evaluation."""
  m, n, paths = 8, 32, ("a", "b", "c")
  editor = mend.Editor(paths, rank=6, sign=1, **options)
  key = f"mend.{(m, n)}."
  buffers = {"u_mean": (m,), "u_s": (m,), "u_std": (m,), "v_mean": (n,), "v_s": (n,), "v_std": (n,), "k": (1,)}

  def convert(state):
    untrained = {key + buffer: np.full(shape, np.nan, "float32") for buffer, shape in buffers.items()}
    return mend.from_torch(state | untrained, editor, dict.fromkeys(paths, (m, n)))

  transform = mend.GradientTransform(6, modes=3, **options)

  @jax.jit
  def three_calls(inside, factors):
    edits = []
    for call, given in enumerate(factors):
      edit, updated = transform.apply(inside, given, call, train=call < 2, mutable=["statistics"])
      inside = {**inside, **updated}
      edits.append(edit)
    return edits, inside["statistics"]

  def apply(converted, given):
    inside = {kind: converted[kind][f"transform_{m}x{n}"] for kind in ("params", "statistics")}
    factors = [mend.Factors(given[f"u{call}"].copy(), given[f"v{call}"].copy()) for call in range(3)]
    for u, v in factors:  # tokens that are not there
      v[0, :3], u[1, 5] = 0, 0
    edits, statistics = jax.device_get(three_calls(inside, factors))
    out = {}
    for call, ((u, v), (x, d)) in enumerate(zip(factors, edits, strict=True)):
      there = u.any(-1) & v.any(-1)
      assert not x[~there].any() and not d[~there].any()
      out |= {f"x{call}": x[there], f"d{call}": d[there]}
      out[f"gradient{call}"] = x.reshape(-1, m).T @ d.reshape(-1, n)
    for mine, theirs in (("inputs", "u"), ("deltas", "v")):
      out |= {f"{theirs}_mean": statistics[f"{mine}_mean"], f"{theirs}_s": statistics[f"{mine}_squares"]}
      out[f"{theirs}_std"] = np.sqrt(statistics[f"{mine}_squares"] / (statistics["count"] - 1))
    return out | {"k": statistics["count"][None]}

  golden_rule.check(name, convert, apply, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
  ("width", "parameters"),
  [(768, 59_089_920), (2560, 196_966_400), (4096, 315_146_240)],
  ids=["GPT-2 small, distilGPT-2, BERT-base", "GPT-Neo 2.7B", "GPT-J"],
)
def test_published_sizes(width, parameters):
  """Six MLP matrices, two shapes. Nothing of the size of a matrix is among them."""
  paths = tuple(f"block{i}/mlp/fc{j}" for i in range(3) for j in (1, 2))
  shape = lambda path: (width, 4 * width) if path.endswith("1") else (4 * width, width)
  factors = {path: mend.Factors(*(jnp.zeros((1, size)) for size in shape(path))) for path in paths}
  found = jax.eval_shape(mend.Editor(paths).init, jax.random.key(0), factors)["params"]
  assert found.pop("step_sizes").shape == (6,)
  assert sum(leaf.size for leaf in jax.tree.leaves(found)) == parameters
  assert parameters == 2 * 2 * (2 * 5 * width * 1920 + 5 * width + 2 * 3 * 5 * width)


# ---------------------------------------------------------------------------------------------------------- factors


def test_factors_multiply_to_the_gradient(variables):
  batch = sentences(3)
  loss = lambda logits: nll(logits, batch)
  found = jax.jit(lambda v: mend.collect(MODEL, v, TARGETS, batch["tokens"], loss))(variables)
  expected = jax.jit(jax.grad(lambda v: loss(MODEL.apply(v, batch["tokens"]))))(variables)["params"]
  for path in TARGETS:
    block, mlp, layer = path.split("/")
    gradient = np.einsum("snm,snk->mk", found[path].inputs, found[path].deltas)
    np.testing.assert_allclose(gradient, expected[block][mlp][layer]["kernel"], rtol=1e-4, atol=1e-6)
    padding = batch["tokens"] == 0
    assert padding.any() and not np.asarray(found[path].deltas)[padding].any()


def _shapes(jaxpr):
  """Shapes of all that a program computes, those of programs inside it too."""
  for equation in jaxpr.eqns:
    yield from (variable.aval.shape for variable in equation.outvars)
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield from _shapes(inner)


def test_training_makes_no_matrix_of_the_size_of_a_kernel(variables):
  """Neither as a gradient, nor in the editor, nor as the edited kernel."""
  learner, batch = mend.learner(MODEL, variables, EDITOR), problems()
  state = jax.eval_shape(learner.init, jax.random.key(0), batch)
  program = jax.make_jaxpr(learner.step)(state, batch)
  forbidden = {(WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)}
  made = [shape for shape in _shapes(program.jaxpr) if shape[-2:] in forbidden]
  assert not made
  sizes = {leaf.shape for leaf in jax.tree.leaves(state.params) if leaf.ndim == 2}
  assert (3 * WIDTH, 5) in sizes and not sizes & forbidden


def test_edited_network_is_the_network_of_merged_kernels(variables):
  rng = np.random.default_rng(0)
  widths = {"fc1": (WIDTH, 2 * WIDTH), "fc2": (2 * WIDTH, WIDTH)}
  edits = {
    path: mend.Factors(*(rng.standard_normal((4, size)).astype("float32") / 3 for size in widths[path[-3:]]))
    for path in TARGETS
  }
  tokens = sentences(3)["tokens"]
  merged = mend.merge(variables["params"], edits)
  expected = predict({"params": merged}, tokens)
  edited = jax.jit(lambda *given: mend.apply(MODEL, *given))(variables, edits, tokens)
  np.testing.assert_allclose(edited, expected, atol=1e-4)
  assert np.abs(expected - predict(variables, tokens)).max() > 0.1
  kernel = np.asarray(variables["params"]["block0"]["mlp"]["fc1"]["kernel"])
  apart = jax.tree.map(lambda a: a.reshape(2, 2, -1), edits)  # two sentences' edits, two tokens each
  np.testing.assert_allclose(jax.jit(lambda *given: mend.apply(MODEL, *given))(variables, apart, tokens), edited)
  chex.assert_trees_all_equal(mend.merge(variables["params"], apart), merged)
  by_hand = kernel + sum(np.outer(x, d) for x, d in zip(*edits["block0/mlp/fc1"], strict=True))
  np.testing.assert_allclose(merged["block0"]["mlp"]["fc1"]["kernel"], by_hand, atol=1e-5)


def test_layers_called_twice_or_never_are_refused():
  class Net(nn.Module):
    def setup(self):
      self.used, self.unused = nn.Dense(3), nn.Dense(3)

    def __call__(self, x, everything=False):
      x = self.used(self.used(x))
      return self.unused(x) if everything else x

  x = jnp.ones((2, 3))
  layer = {"kernel": jnp.eye(3), "bias": jnp.ones(3)}
  weights = {"params": {"used": layer, "unused": layer}}
  for path, why in (("used", "more than once"), ("unused", "never called")):
    with pytest.raises(ValueError, match=f"^targets: got .*{path}.*{why}"):
      jax.eval_shape(lambda path=path: mend.collect(Net(), weights, (path,), x, jnp.sum))


# ----------------------------------------------------------------------------------------------------------- editor


def train(editor):
  return jax.jit(lambda v, factors: editor.apply(v, factors, train=True, mutable=["statistics"]))


def random_factors(seed, *shape, path="a"):
  rng = np.random.default_rng(seed)
  return {path: mend.Factors(*(rng.standard_normal((*shape, size)).astype("float32") for size in (3, 5)))}


def test_statistics_are_those_of_all_tokens_in_any_batching():
  editor = mend.Editor(("a",), rank=2)
  calls = [random_factors(seed, *shape) for seed, shape in enumerate([(4,), (2, 3), (4,)])]
  calls[0]["a"].inputs[1] = 0  # not there
  calls[1]["a"].deltas[1, 2] = 0
  variables = jax.jit(editor.init)(jax.random.key(0), calls[0])
  for factors in calls:
    edits, updated = train(editor)(variables, factors)
    variables |= updated
  tokens = [np.concatenate([c["a"][i].reshape(-1, w) for c in calls]) for i, w in ((0, 3), (1, 5))]
  there = tokens[0].any(1) & tokens[1].any(1)
  assert there.sum() == 12
  statistics = variables["statistics"]["transform_3x5"]
  assert statistics["count"] == 12
  last = []
  for name, values, now in zip(("inputs", "deltas"), tokens, calls[-1]["a"], strict=True):
    mean, deviation = values[there].mean(0), values[there].std(0, ddof=1)
    np.testing.assert_allclose(statistics[f"{name}_mean"], mean, atol=1e-6)
    np.testing.assert_allclose(np.sqrt(statistics[f"{name}_squares"] / 11), deviation, rtol=1e-5)
    last.append((now - mean) / deviation)
  # The first editor is the identity on normalised factors, and goes downhill.
  np.testing.assert_allclose(edits["a"].inputs, last[0], atol=1e-5)
  np.testing.assert_allclose(edits["a"].deltas, -1e-4 * last[1], atol=1e-9)
  frozen = jax.jit(editor.apply)(variables, calls[-1])
  chex.assert_trees_all_close(frozen, edits, atol=1e-6)


def test_an_editor_without_statistics_says_so():
  outputs, _ = jax.jit(mend.Editor(("a",), rank=2).init_with_output)(jax.random.key(0), random_factors(0, 4))
  assert np.isnan(outputs["a"].inputs).all()


def test_first_gradient_reaches_up_through_the_relu_at_zero():
  editor, factors = mend.Editor(("a",), rank=2), random_factors(0, 6)
  variables = jax.jit(editor.init)(jax.random.key(0), factors)

  def loss(params):
    edits, _ = train(editor)({**variables, "params": params}, factors)
    return edits["a"].inputs.sum() + edits["a"].deltas.sum()

  grads = jax.jit(jax.grad(loss))(variables["params"])["transform_3x5"]
  for layer in ("combined0", "combined1"):
    assert not np.asarray(variables["params"]["transform_3x5"][layer]["up"]).any()
    assert np.abs(grads[layer]["up"]).min() > 0


def test_which_layers_share_and_which_way_an_edit_goes():
  paths = ("a", "b", "c")
  factors = random_factors(0, 6, path="a") | random_factors(1, 6, path="b")
  factors["c"] = mend.Factors(*reversed(factors["a"]))
  params = lambda **options: jax.eval_shape(mend.Editor(paths, **options).init, jax.random.key(0), factors)["params"]
  assert set(params()) == {"step_sizes", "transform_3x5", "transform_5x3"}
  assert params()["transform_3x5"]["combined0"]["scale"].shape == (2, 8)
  assert set(params(shared=False)) == {"step_sizes", "a", "b", "c"}
  assert "scale" not in params(shared=False)["a"]["combined0"]
  assert set(params(variant="inputs")["transform_5x3"]) == {"inputs0", "inputs1"}
  assert set(params(variant="separate")["transform_5x3"]) == {"inputs0", "inputs1", "deltas0", "deltas1"}
  assert set(params(variant="smaller")["transform_5x3"]) == {"deltas0", "deltas1"}
  editor = mend.Editor(("a",), rank=2)
  one = random_factors(0, 6)
  variables = jax.jit(editor.init)(jax.random.key(0), one)
  down, up = (train(dataclasses.replace(editor, sign=sign))(variables, one)[0]["a"] for sign in (-1, 1))
  np.testing.assert_array_equal(down.deltas, -up.deltas)
  assert np.sum(up.deltas * one["a"].deltas) > 0


@pytest.mark.parametrize(("variant", "mapped"), [("inputs", "inputs"), ("deltas", "deltas"), ("smaller", "inputs")])
def test_half_an_editor_leaves_the_other_factor_as_it_is(variant, mapped):
  """The mapped factor by NumPy, the other normalised alone."""
  m, n = 3, 5
  transform, factors = mend.GradientTransform(2, 1, None, variant, normalize=False), random_factors(0, 6)["a"]
  rng = np.random.default_rng(1)
  width = m if mapped == "inputs" else n
  layer = {name: rng.standard_normal(shape).astype("float32") for name, shape in
           (("down", (width, 2)), ("up", (2, width)), ("bias", (width,)))}  # fmt: skip
  statistics = jax.eval_shape(transform.init, jax.random.key(0), factors)["statistics"]
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), statistics)
  found = jax.jit(transform.apply)({"params": {f"{mapped}0": layer}, "statistics": zeros}, factors)
  z = getattr(factors, mapped)
  expected = factors._replace(**{mapped: z + np.maximum(z @ layer["down"] @ layer["up"] + layer["bias"], 0)})
  chex.assert_trees_all_close(found, expected, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def training(variables):
  """A learner with large learning rates, as a toy of this size needs, its step, a batch and the state to start from."""
  tx = mend.optimizer(1e-2, step_size_rate=1e-2)
  learner = mend.learner(MODEL, variables, EDITOR, tx, edit_weight=1.0)
  batch = problems(4)
  return learner, jax.jit(learner.step), batch, jax.jit(learner.init)(jax.random.key(0), batch)


@pytest.fixture(scope="module")
def trained(training):
  learner, step, batch, state = training
  history = []
  for _ in range(30):
    state, metrics = step(state, batch)
    history.append(float(metrics["loss"]))
  return learner, batch, state, history


def test_training_lowers_the_loss_and_leaves_the_network_alone(trained, variables):
  _, _, state, history = trained
  assert history[-1] < 0.8 * history[0] and np.isfinite(history).all()
  chex.assert_trees_all_equal(state.base, variables)
  assert state.step == 30 and state.statistics["transform_8x16"]["count"] > 100


def test_metrics_are_those_of_the_merged_network(trained, variables):
  """Each problem by itself, with kernels that its edit was added to, and losses written out."""
  learner, batch, state, _ = trained
  found = jax.jit(learner.evaluate)(state, batch)
  rows = []
  merge = jax.jit(
    lambda edited: mend.merge(variables["params"], mend.edit(MODEL, variables, EDITOR, state.variables, edited))
  )
  for b in range(4):
    edited, asked, kept = (
      jax.tree.map(lambda a, b=b: a[b], batch[name]) for name in ("edit", "paraphrase", "locality")
    )
    params = {"params": merge(edited)}
    said, answered = predict(params, edited["tokens"]), log_softmax(predict(params, asked["tokens"]))
    before, after = (log_softmax(predict(v, kept["tokens"])) for v in (variables, params))
    kl = np.mean(np.sum(np.exp(before) * (before - after), -1)[targets_of(kept)[:2]])
    edit_loss = -np.mean(answered[targets_of(asked)])

    def right(scores, given):
      hits = np.asarray(scores).argmax(-1)[:, :-1] == given["tokens"][:, 1:]
      return np.mean([hit[mask].all() for hit, mask in zip(hits, given["mask"][:, 1:], strict=True)])

    drawdown = right(before, kept) - right(after, kept)
    rows.append([edit_loss, kl, right(answered, asked), drawdown, right(said, edited)])
  names = ("edit_loss", "locality_loss", "success", "drawdown", "edit_success")
  for name, value in zip(names, np.mean(rows, axis=0), strict=True):
    np.testing.assert_allclose(found[name], value, atol=2e-4, err_msg=name)
  np.testing.assert_allclose(found["loss"], found["edit_loss"] + found["locality_loss"], rtol=1e-5)


def test_step_size_zero_changes_nothing(trained):
  learner, batch, state, _ = trained
  still = dataclasses.replace(state, params=state.params | {"step_sizes": jnp.zeros(len(TARGETS))})
  found = jax.jit(learner.evaluate)(still, batch)
  assert abs(found["locality_loss"]) < 1e-6 and found["drawdown"] == 0


def test_a_batched_edit_is_the_sum_of_single_edits(trained, variables):
  _, batch, state, _ = trained
  asked = jax.tree.map(lambda a: a[0], batch["edit"])
  change = jax.jit(lambda given: mend.edit(MODEL, variables, EDITOR, state.variables, given))
  product = lambda edits: {path: x.T @ d for path, (x, d) in edits.items()}
  singles = [product(change(jax.tree.map(lambda a, e=e: a[e : e + 1], asked))) for e in range(2)]
  expected = jax.tree.map(jnp.add, *singles)
  both = change(asked)
  chex.assert_trees_all_close(product(both), expected, rtol=1e-4, atol=1e-5)
  padding = (asked["tokens"] == 0).reshape(-1)
  assert padding.any() and all(not np.asarray(factor)[padding].any() for factor in jax.tree.leaves(both))


def test_two_devices_take_the_step_of_one(training, variables):
  _, step, batch, state = training
  tx = mend.optimizer(1e-2, step_size_rate=1e-2)
  two = mend.learner(MODEL, variables, dataclasses.replace(EDITOR, axis_name="data"), tx, edit_weight=1.0)
  expected, metrics = step(state, batch)
  halves = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), batch)
  found, seen = jax.jit(jax.vmap(two.step, (None, 0), axis_name="data"))(state, halves)
  for device in range(2):
    mine = jax.tree.map(lambda a, device=device: a[device], found)
    chex.assert_trees_all_close(mine.statistics, expected.statistics, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(mine.params, expected.params, atol=1e-4)
  np.testing.assert_allclose(seen["loss"][0], metrics["loss"], rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ fine-tuning


def test_fine_tuning_changes_the_targets_alone_and_says_the_sentence(variables):
  asked, kept = sentences(1), sentences(4, seed=5)
  run = jax.jit(
    lambda locality: mend.fine_tune(
      MODEL, variables, TARGETS, asked, optax.adam(0.1), steps=150, locality=locality,
      measure=lambda now: nll(MODEL.apply(now, asked["tokens"]), asked),
    )
  )  # fmt: skip
  free, losses = run(None)
  held, _ = run(kept)
  assert losses.shape == (150,) and losses[-1] < 0.3 * losses[0]
  outside = lambda v: {
    jax.tree_util.keystr(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(v)
    if "['block0']['mlp']" not in jax.tree_util.keystr(path) or "bias" in jax.tree_util.keystr(path)
  }
  chex.assert_trees_all_equal(outside(free), outside(variables))
  before = predict(variables, kept["tokens"])
  moved = [mend.kl_divergence(before, predict(now, kept["tokens"]), kept["mask"]) for now in (free, held)]
  assert moved[1] < 0.5 * moved[0]


# ------------------------------------------------------------------------------------------------------- the model


def test_language_model_is_causal_and_ties_its_embedding(variables):
  tokens = sentences(2)["tokens"]
  logits = predict(variables, tokens)
  changed = tokens.copy()
  changed[:, 4:] = 1 + (changed[:, 4:] + 3) % (V - 1)
  others = predict(variables, changed)
  np.testing.assert_allclose(others[:, :4], logits[:, :4], atol=1e-5)
  assert np.abs(others[:, 4:] - logits[:, 4:]).max() > 0.1
  count = sum(leaf.size for leaf in jax.tree.leaves(variables))
  block = 12 * 768**2 + 13 * 768
  gpt2 = jax.eval_shape(
    language.LanguageModel(50257, 768, 12, 12, 1024).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32)
  )
  assert (
    sum(leaf.size for leaf in jax.tree.leaves(gpt2)) == 50257 * 768 + 1024 * 768 + 12 * block + 2 * 768 == 124_439_808
  )
  assert count < 2000


def test_next_token_loss_counts_targets_alone(variables):
  batch = sentences(3)
  logits = predict(variables, batch["tokens"])
  next_token = jax.jit(language.next_token)
  loss, metrics = next_token(logits, batch)
  np.testing.assert_allclose(loss, -np.mean(log_softmax(logits)[targets_of(batch)]), rtol=1e-5)
  perfect = 10 * jax.nn.one_hot(np.roll(batch["tokens"], -1, 1), V)
  assert next_token(perfect, batch)[1]["accuracy"] == 1
  assert metrics["accuracy"] < 1


def test_golden_files_are_small():
  for path in golden_rule.GOLDEN.glob("mend*.npz"):
    assert path.stat().st_size < 20_000
    with np.load(path) as file:
      assert json.loads(str(file["manifest"]))["state"]
