import jax
import jax.numpy as jnp
import numpy as np
import optax
from contract_case import Case

from jaxlab.learning import mend
from jaxlab.models import language

TARGETS = ("block0/mlp/fc1", "block0/mlp/fc2")
V, N, WIDTH = 11, 5, 4
MODEL = language.LanguageModel(V, WIDTH, depth=1, num_heads=1, max_length=N, mlp_ratio=2)


def sentences(count, seed):
  tokens = np.random.default_rng(seed).integers(0, V, (count, N)).astype("int32")
  return {"tokens": tokens, "mask": np.arange(N) > np.array([[2]] * count)}


def inputs(seed):
  """Two edits and what the edited network is asked."""
  return {"edit": sentences(2, seed), "tokens": sentences(2, seed + 100)["tokens"]}


def editor(**changes):
  return mend.Editor(**{"targets": TARGETS, "rank": 3} | changes)


def drawn(shapes, seed):
  """Every array anew, so that nothing is near zero; the hidden units are on."""
  rng = np.random.default_rng(seed)
  shift = {"step_sizes": 0.3, "shift": 1.0, "bias": 0.5}
  return jax.tree_util.tree_map_with_path(
    lambda path, a: jnp.asarray(rng.standard_normal(a.shape) / 4 + shift.get(path[-1].key, 0), "float32"), shapes
  )


BASE = drawn(jax.eval_shape(MODEL.init, jax.random.key(0), inputs(0)["tokens"]), 0)
FACTORS = {
  path: mend.Factors(jnp.zeros((2 * N, m)), jnp.zeros((2 * N, n)))
  for path, m, n in ((TARGETS[0], WIDTH, 2 * WIDTH), (TARGETS[1], 2 * WIDTH, WIDTH))
}


def statistics():
  """As if many tokens had been seen."""
  shapes = jax.eval_shape(editor().init, jax.random.key(0), FACTORS)["statistics"]
  rng = np.random.default_rng(1)
  made = jax.tree.map(lambda a: jnp.asarray(rng.uniform(30, 300, a.shape), a.dtype), shapes)
  for each in made.values():
    each |= {"count": jnp.asarray(100, jnp.int32), "inputs_mean": each["inputs_mean"] / 1000}
    each["deltas_mean"] = each["deltas_mean"] / 1000
  return made


STATISTICS = statistics()


def run(**changes):
  """Logits of the edited network. The editor's parameters are the system's."""
  model = MODEL.clone(dtype=changes.get("dtype", "float32"))

  def function(params, given):
    trained = {"params": params, "statistics": STATISTICS}
    edits = mend.edit(model, BASE, editor(**changes), trained, given["edit"])
    return mend.apply(model, BASE, edits, given["tokens"]).astype(changes.get("dtype", "float32"))

  return function


def problems(**changes):
  make = lambda count: jax.tree.map(lambda a: a[None], sentences(count, 0))
  return {"edit": make(2), "paraphrase": make(2), "locality": make(3)} | changes


def start(batch=None, targets=TARGETS, **options):
  def call():
    learner = mend.learner(MODEL, BASE, editor(targets=targets), **options)
    jax.eval_shape(learner.init, jax.random.key(0), problems() if batch is None else batch)

  return call


def init(factors, **changes):
  return lambda: jax.eval_shape(editor(**changes).init, jax.random.key(0), factors)


def tune(**changes):
  given = {"targets": TARGETS, "sentences": sentences(1, 0), "tx": optax.sgd(0.1), "steps": 2} | changes
  return lambda: mend.fine_tune(MODEL, BASE, **given)


def masked(measure):
  return lambda: measure(np.zeros((1, N, V)), np.zeros((1, N), int), np.ones((1, N), int))


def words(batch):
  return lambda: jax.eval_shape(MODEL.apply, BASE, batch)


CASE = Case(
  function=run(),
  params=drawn(jax.eval_shape(editor().init, jax.random.key(0), FACTORS)["params"], 2),
  inputs=inputs,
  narrow=run(dtype="bfloat16"),
  narrow_tolerance=0.1,
  tolerance=5e-5,
  bad={
    "no layers": (lambda: editor(targets=()), "targets"),
    "a layer twice": (lambda: editor(targets=TARGETS[:1] * 2), "targets"),
    "rank of zero": (lambda: editor(rank=0), "rank"),
    "no networks": (lambda: editor(num_layers=0), "num_layers"),
    "unknown variant": (lambda: editor(variant="both"), "variant"),
    "unknown start": (lambda: editor(start="id"), "start"),
    "sign of zero": (lambda: editor(sign=0), "sign"),
    "factors of other layers": (init({"a": FACTORS[TARGETS[0]]}), "factors"),
    "factors of fewer tokens": (
      init(FACTORS | {TARGETS[0]: mend.Factors(jnp.zeros((3, WIDTH)), jnp.zeros((2, 2 * WIDTH)))}),
      "factors",
    ),
    "layers that are not there": (start(targets=("block7/mlp/fc1",)), "targets"),
    "a norm": (start(targets=("block0/norm1",)), "targets"),
    "a step that is no number": (lambda: editor(step_size=float("nan")), "step_size"),
    "paths that become one name": (lambda: editor(targets=("a/b_c", "a_b/c"), shared=False), "targets"),
    "no paraphrases": (start({name: problems()[name] for name in ("edit", "locality")}), "batch"),
    "a mask of whole numbers": (
      start(problems(locality={**problems()["locality"], "mask": np.ones((1, 3, N), int)})),
      "batch['locality']",
    ),
    "tokens as floats": (
      start(problems(edit={**problems()["edit"], "tokens": np.ones((1, 2, N), "float32")})),
      "batch['edit']",
    ),
    "no mask": (start(problems(edit={"tokens": problems()["edit"]["tokens"]})), "batch['edit']"),
    "success by a mask of whole numbers": (masked(language.sentence_success), "mask"),
    "likelihood by a mask of whole numbers": (masked(language.sentence_nll), "mask"),
    "divergence by a mask of whole numbers": (
      lambda: mend.kl_divergence(np.zeros((1, N, V)), np.zeros((1, N, V)), np.ones((1, N), int)), "mask",
    ),
    "fine-tuning by a mask of whole numbers": (
      tune(sentences={**sentences(1, 0), "mask": np.ones((1, N), int)}), "sentences",
    ),
    "negative weight": (start(edit_weight=-1.0), "edit_weight"),
    "negative weight of the KL": (start(locality_weight=-1.0), "locality_weight"),
    "edits without a problem axis": (start(problems(edit=sentences(2, 0))), "batch['edit']"),
    "fewer paraphrases than edits": (
      start(problems(paraphrase=jax.tree.map(lambda a: a[:, :1], problems()["edit"]))),
      "batch['paraphrase']",
    ),
    "locality of other problems": (
      start(problems(locality=jax.tree.map(lambda a: a.repeat(2, 0), problems()["locality"]))),
      "batch['locality']",
    ),
    "mask of another shape": (
      start(problems(edit={"tokens": problems()["edit"]["tokens"], "mask": np.ones((1, 2, 3), bool)})),
      "batch['edit']",
    ),
    "edits of other layers": (lambda: mend.merge(BASE["params"], {"norm": FACTORS[TARGETS[0]]}), "targets"),
    "no steps of fine-tuning": (tune(steps=0), "steps"),
    "fine-tuning of nothing": (tune(targets=()), "targets"),
    "checkpoint of another editor": (
      lambda: mend.from_torch({}, editor(), dict.fromkeys(TARGETS, (2, 2))), "state_dict",
    ),
    "shapes of other layers": (lambda: mend.from_torch({}, editor(), {"a": (2, 2)}), "shapes"),
    "words as floats": (words(np.zeros((1, N), "float32")), "tokens"),
    "a long sentence": (words(np.zeros((1, N + 1), "int32")), "tokens"),
    "heads that do not divide": (lambda: language.LanguageModel(V, 4, num_heads=3), "num_heads"),
    "no words": (lambda: language.LanguageModel(1), "vocab_size"),
  },
)  # fmt: skip
