"""An editor's training on edit and locality pairs, and what an edit did: success and drawdown.

    W' = edit(W, x_e, y_e)
    L  = c_e * -log p_W'(y_e' | x_e') + KL(p_W(. | x_loc) || p_W'(. | x_loc))

x_e' says in other words what x_e says, x_loc has nothing to do with either. Gradients reach the editor through W' only:
the factors of the edit's gradient are constants.

A batch has B editing problems of E edits and M locality sentences each, of `jaxlab.models.language`'s kind:
`edit` and `paraphrase`, each of `tokens` [B, E, N] and `mask` [B, E, N], and `locality` of [B, M, N].
"""

from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxlab import checks
from jaxlab.learning.mend.editor import Editor
from jaxlab.learning.mend.factors import Factors, apply, collect
from jaxlab.models import language
from jaxlab.train.learner import Batch, Learner, Metrics


@flax.struct.dataclass
class EditorState:
  """State of a `learner`.

  Attributes:
    step: updates done.
    params: the editor's weights and step sizes.
    statistics: of the factors, see `GradientTransform`.
    opt_state: of the optimizer.
    base: variables of the network to edit, which no step changes.
  """

  step: Int[Array, ""]
  params: PyTree
  statistics: PyTree
  opt_state: PyTree
  base: Mapping[str, PyTree]

  @property
  def variables(self) -> dict[str, PyTree]:
    """What `editor.apply` takes."""
    return {"params": self.params, "statistics": self.statistics}


def kl_divergence(
  before: Float[Array, "*b n v"], after: Float[Array, "*b n v"], mask: Bool[Array, "*b n"]
) -> Float[Array, ""]:
  """KL(before || after) of the predictions of the masked tokens, the mean over them, in float32.

  Args:
    before: logits of the network before the edit.
    after: logits after it.
    mask: True at the tokens t whose predictions, the logits at t - 1, are compared.

  Raises:
    ValueError: a mask that is not bool.
  """
  language.check_mask("mask", mask)
  p, q = (jax.nn.log_softmax(logits[..., :-1, :].astype(jnp.float32)) for logits in (before, after))
  weight = mask[..., 1:].astype(jnp.float32)
  divergence = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
  return jnp.sum(weight * divergence) / jnp.maximum(jnp.sum(weight), 1.0)


def optimizer(
  learning_rate: optax.ScalarOrSchedule = 1e-6, *, step_size_rate: optax.ScalarOrSchedule = 1e-4, clip: float = 100.0
) -> optax.GradientTransformation:
  """The paper's: Adam after clipping by global norm, with a learning rate of its own for the step sizes alpha."""
  kind = lambda params: {name: "step_sizes" if name == "step_sizes" else "networks" for name in params}
  rates = {"networks": optax.adam(learning_rate), "step_sizes": optax.adam(step_size_rate)}
  return optax.chain(optax.clip_by_global_norm(clip), optax.partition(rates, kind))


def edit(
  model: nn.Module, variables: Mapping[str, PyTree], editor: Editor, trained: Mapping[str, PyTree], sentences: Batch
) -> dict[str, Factors]:
  """The edit after which the model should say these sentences.

  Args:
    model: tokens [E, N] -> logits [E, N, V].
    variables: its variables.
    editor: for some of its layers.
    trained: the editor's variables, `EditorState.variables`.
    sentences: `tokens` [E, N] and `mask` [E, N], True at the tokens to say: one edit or several at once.

  Returns:
    For `apply`, which runs the edited model, and `merge`, which gives its parameters.

  Raises:
    ValueError: tokens and mask of different shapes, layers that the model does not have.
  """
  _check("sentences", sentences, 2)
  edits: Any = editor.apply(trained, _joined(_edit_factors(model, variables, editor.targets, sentences), 0))
  return edits


def learner(
  model: nn.Module,
  base: Mapping[str, PyTree],
  editor: Editor,
  tx: optax.GradientTransformation | None = None,
  *,
  edit_weight: float = 0.1,
  locality_weight: float = 1.0,
) -> Learner:
  """Trains an editor; the network it edits stays as it is.

  Args:
    model: tokens [B, N] -> logits [B, N, V].
    base: its variables.
    editor: for some of its layers; its `axis_name` is the learner's.
    tx: of the editor's parameters; default `optimizer()`. A step takes the mean gradient of its B problems, so that
      the paper's 10 problems in turn are B = 10 here.
    edit_weight: c_e.
    locality_weight: of the KL divergence.

  Returns:
    A learner on the batches above whose state is an `EditorState`. Its metrics, also those of `evaluate`: `loss`,
    `edit_loss` and `locality_loss`, the terms without weights; `edit_success` and `success`, the fractions of edits
    whose answer the edited network gives in their own words and in the paraphrase; `drawdown`, the loss of accuracy on
    locality sentences.

  Raises:
    ValueError: negative weights; while tracing, batches of other shapes, layers that the model does not have.
  """
  checks.real("edit_weight", edit_weight, 0.0, float("inf"))
  checks.real("locality_weight", locality_weight, 0.0, float("inf"))
  optimize = optimizer() if tx is None else tx
  axis_name = editor.axis_name

  def collected(state_base: Mapping[str, PyTree], batch: Batch) -> dict[str, Factors]:
    # The sum over all problems' losses: no token's delta depends on another problem.
    shape = batch["edit"]["tokens"].shape
    flat = jax.tree.map(lambda a: jnp.reshape(a, (-1, a.shape[-1])), batch["edit"])
    factors = _edit_factors(model, state_base, editor.targets, flat)
    return _joined(jax.tree.map(lambda a: jnp.reshape(a, (*shape[:2], *a.shape[1:])), factors), 1)

  def init(key: Key[Array, ""], batch: Batch) -> EditorState:
    _check_batch(batch)
    factors = jax.eval_shape(collected, base, batch)
    variables = dict(editor.init(key, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), factors)))
    params = variables.pop("params")
    return EditorState(
      jnp.zeros((), jnp.int32), params, variables["statistics"], optimize.init(params), jax.tree.map(jnp.asarray, base)
    )

  def outcome(
    edits: dict[str, Factors], state_base: Mapping[str, PyTree], batch: Batch
  ) -> tuple[Float[Array, ""], Metrics]:
    """Loss and metrics of all problems, each with the network that its edit makes."""
    edited = lambda sentences: jax.vmap(lambda e, tokens: apply(model, state_base, e, tokens))(edits, sentences)
    edits_per_problem = batch["edit"]["tokens"].shape[1]
    locality = batch["locality"]
    tokens = jnp.concatenate([batch["paraphrase"]["tokens"], locality["tokens"]], axis=1)
    logits = edited(tokens)
    paraphrase, kept = logits[:, :edits_per_problem], logits[:, edits_per_problem:]
    before: Any = model.apply(state_base, jnp.reshape(locality["tokens"], (-1, tokens.shape[-1])))
    before = jnp.reshape(before, kept.shape)
    asked, mask = batch["paraphrase"]["tokens"], batch["paraphrase"]["mask"]
    weight = mask[..., 1:].astype(jnp.float32)
    likelihood = weight * language.log_likelihood(paraphrase, asked)
    nll = jnp.mean(-jnp.sum(likelihood, axis=(1, 2)) / jnp.maximum(jnp.sum(weight, axis=(1, 2)), 1.0))
    kl = jnp.mean(jax.vmap(kl_divergence)(before, kept, locality["mask"]))
    right = [language.sentence_success(out, locality["tokens"], locality["mask"]) for out in (before, kept)]
    metrics = {
      "edit_loss": nll,
      "locality_loss": kl,
      "success": jnp.mean(language.sentence_success(paraphrase, asked, mask)),
      "drawdown": jnp.mean(right[0] - right[1]),
    }
    return edit_weight * nll + locality_weight * kl, metrics

  def step(state: EditorState, batch: Batch) -> tuple[EditorState, Metrics]:
    _check_batch(batch)
    factors = collected(state.base, batch)

    def objective(params: PyTree) -> tuple[Float[Array, ""], tuple[PyTree, Metrics]]:
      edits, updated = editor.apply(
        {"params": params, "statistics": state.statistics}, factors, train=True, mutable=["statistics"]
      )
      loss, metrics = outcome(edits, state.base, batch)
      return loss, (updated["statistics"], {"loss": loss, **metrics})

    grads, (statistics, metrics) = jax.grad(objective, has_aux=True)(state.params)
    if axis_name is not None:  # the statistics are already those of all devices' tokens
      grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
    updates, opt_state = optimize.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = EditorState(state.step + 1, params, statistics, opt_state, state.base)
    return state, {**metrics, "grad_norm": optax.global_norm(grads)}

  def evaluate(state: EditorState, batch: Batch) -> Metrics:
    _check_batch(batch)
    edits: Any = editor.apply(state.variables, collected(state.base, batch))
    loss, metrics = outcome(edits, state.base, batch)
    asked = batch["edit"]
    logits = jax.vmap(lambda e, tokens: apply(model, state.base, e, tokens))(edits, asked["tokens"])
    said = jnp.mean(language.sentence_success(logits, asked["tokens"], asked["mask"]))
    metrics = {"loss": loss, **metrics, "edit_success": said}
    return metrics if axis_name is None else jax.lax.pmean(metrics, axis_name)

  return Learner(init, step, evaluate, axis_name)


def _edit_factors(
  model: nn.Module, variables: Mapping[str, PyTree], targets: tuple[str, ...], sentences: Batch
) -> dict[str, Factors]:
  """Factors [S, N, m] and [S, N, n] of the sum of the sentences' mean losses."""

  def loss(logits: Any) -> Float[Array, ""]:
    return jnp.sum(language.sentence_nll(logits, sentences["tokens"], sentences["mask"]))

  return collect(model, variables, targets, sentences["tokens"], loss)


def _joined(factors: dict[str, Factors], axis: int) -> dict[str, Factors]:
  """[*b, S, N, c] -> [*b, S N, c]: the tokens of all sentences after one another; `axis` is that of S."""
  return jax.tree.map(lambda a: jnp.reshape(a, (*a.shape[:axis], -1, a.shape[-1])), factors)


def _check(name: str, sentences: Batch, ndim: int) -> None:
  language.check_sentences(name, sentences)
  if sentences["tokens"].ndim != ndim:
    raise ValueError(f"{name}: got tokens {sentences['tokens'].shape}, expected {ndim} axes")


def _check_batch(batch: Batch) -> None:
  if missing := [name for name in ("edit", "paraphrase", "locality") if name not in batch]:
    raise ValueError(f"batch: got {sorted(batch)}, expected {', '.join(missing)} too")
  for name in ("edit", "paraphrase", "locality"):
    _check(f"batch[{name!r}]", batch[name], 3)
  edits, paraphrases, locality = (batch[name]["tokens"].shape for name in ("edit", "paraphrase", "locality"))
  if paraphrases[:2] != edits[:2]:
    raise ValueError(f"batch['paraphrase']: got {paraphrases[:2]} sentences for {edits[:2]} edits, expected as many")
  if locality[0] != edits[0] or locality[2] != paraphrases[2]:
    raise ValueError(
      f"batch['locality']: got shape {locality}, expected [{edits[0]}, sentences, {paraphrases[2]}], the problems and "
      "the length of the paraphrases"
    )
