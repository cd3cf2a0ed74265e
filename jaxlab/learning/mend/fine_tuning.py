"""The baseline: gradient steps on the same kernels that an editor would change."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxlab import checks
from jaxlab.learning.mend.factors import kernels, with_kernels
from jaxlab.learning.mend.training import kl_divergence
from jaxlab.models import language
from jaxlab.train.learner import Batch


def fine_tune(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  targets: Sequence[str],
  sentences: Batch,
  tx: optax.GradientTransformation,
  *,
  steps: int = 100,
  locality: Batch | None = None,
  edit_weight: float = 1.0,
  measure: Callable[[Mapping[str, PyTree]], Any] | None = None,
) -> tuple[dict[str, PyTree], Any]:
  """Fine-tunes some kernels until the model says the sentences.

  The loss is that of an editor, on the edit itself: edit_weight * -log p(y_e | x_e), the sum over sentences, plus
  KL(before || after) on locality sentences where given, the paper's "FT + KL".

  Args:
    model: tokens [E, N] -> logits [E, N, V].
    variables: its variables.
    targets: paths of the dense layers whose kernels may change.
    sentences: `tokens` [E, N] and `mask` [E, N], True at the tokens to say.
    tx: optimizer of these kernels.
    steps: updates.
    locality: `tokens` [M, N] and `mask` [M, N] of sentences whose predictions should stay; None for none.
    edit_weight: c_e; matters beside `locality` only, or for optimizers that feel scale.
    measure: of the variables after each step; default nothing.

  Returns:
    The variables after the last step, and what was measured, stacked over steps.

  Raises:
    ValueError: on paths that are no dense layers, tokens and mask of different shapes, no steps.
  """
  checks.count("steps", steps)
  language.check_sentences("sentences", sentences)
  start = kernels(variables["params"], targets)
  before: Any = None
  if locality is not None:
    language.check_sentences("locality", locality)
    before = model.apply(variables, locality["tokens"])

  def changed(weights: dict[str, Array]) -> dict[str, PyTree]:
    return {**variables, "params": with_kernels(variables["params"], weights)}

  def loss(weights: dict[str, Array]) -> Float[Array, ""]:
    now = changed(weights)
    logits: Any = model.apply(now, sentences["tokens"])
    value = edit_weight * jnp.sum(language.sentence_nll(logits, sentences["tokens"], sentences["mask"]))
    if locality is not None:
      kept: Any = model.apply(now, locality["tokens"])
      value += kl_divergence(before, kept, locality["mask"])
    return value

  def step(carry: tuple[dict[str, Array], Any], _: None) -> tuple[tuple[dict[str, Array], Any], Any]:
    weights, opt_state = carry
    updates, opt_state = tx.update(jax.grad(loss)(weights), opt_state, weights)
    weights = optax.apply_updates(weights, updates)
    return (weights, opt_state), None if measure is None else measure(changed(weights))

  (weights, _), measured = jax.lax.scan(step, (start, tx.init(start)), length=steps)
  return changed(weights), measured
