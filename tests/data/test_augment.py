import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.data import augment

# Every pixel of image i is i, so that a mixed pixel tells what it was made of.
IMAGES = jnp.broadcast_to(jnp.arange(8.0)[:, None, None, None], (8, 12, 16, 3))
LABELS = jax.nn.one_hot(jnp.arange(8), 8)
MIXES = {"mixup": augment.mixup, "cutmix": augment.cutmix, "either": augment.mixup_or_cutmix}
jitted = {name: jax.jit(mix) for name, mix in MIXES.items()}


@pytest.mark.parametrize("name", MIXES)
def test_labels_follow_pixels(name):
  for seed in range(20):
    images, labels = jitted[name](jax.random.key(seed), IMAGES, LABELS)
    assert images.shape == IMAGES.shape and images.dtype == IMAGES.dtype
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
    # The mean pixel is the same mixture of indices as the label: for both kinds of mixing.
    np.testing.assert_allclose(images.mean((1, 2, 3)), labels @ jnp.arange(8.0), atol=1e-4)
    np.testing.assert_allclose(images.mean(), IMAGES.mean(), atol=1e-4)  # a permutation loses nobody


def test_mixup_is_uniform_over_the_image_and_cutmix_is_a_box():
  images, _ = jitted["mixup"](jax.random.key(0), IMAGES, LABELS)
  np.testing.assert_allclose(images, images[:, :1, :1, :1] * jnp.ones_like(images), atol=1e-6)
  boxes = 0
  for seed in range(20):
    images, labels = jitted["cutmix"](jax.random.key(seed), IMAGES, LABELS)
    assert np.isin(images, np.arange(8)).all()  # pasted, never blended
    changed = np.asarray((images != IMAGES).any((0, 3)))
    rows, columns = changed.any(1), changed.any(0)
    np.testing.assert_array_equal(changed, rows[:, None] & columns)
    for line in (rows, columns):  # one interval
      assert np.abs(np.diff(line.astype(int), prepend=0, append=0)).sum() in (0, 2)
    boxes += bool(changed.any())
  assert boxes > 10


def test_mixup_share_is_beta_distributed():
  def share(key):
    _, labels = augment.mixup(key, IMAGES[:, :1, :1], LABELS, alpha=0.5)
    return jnp.max(labels[0])

  shares = jax.jit(jax.vmap(share))(jax.random.split(jax.random.key(0), 4000))
  # E max(l, 1 - l) for the arcsine law Beta(1/2, 1/2) is 1/2 + 1/pi; one permutation in eight keeps image 0 whole.
  expected = 7 / 8 * (0.5 + 1 / np.pi) + 1 / 8
  assert abs(float(shares.mean()) - expected) < 0.01


def test_either_takes_both():
  blended = [
    not np.isin(jitted["either"](jax.random.key(seed), IMAGES, LABELS)[0], np.arange(8)).all() for seed in range(40)
  ]
  assert 8 < sum(blended) < 32


@pytest.mark.parametrize("name", [*MIXES, "erase"])
def test_pure_in_its_key_without_retracing_and_in_bfloat16(name):
  function = augment.random_erase if name == "erase" else MIXES[name]
  arguments = (IMAGES,) if name == "erase" else (IMAGES, LABELS)
  counted = jax.jit(chex.assert_max_traces(function, n=1))
  one, again, other = (counted(jax.random.key(seed), *arguments) for seed in (3, 3, 5))
  chex.assert_trees_all_equal(one, again)
  assert any((a != b).any() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
  half = jax.tree.map(lambda x: x.astype("bfloat16"), arguments)
  if name in ("mixup", "cutmix"):  # "either" runs both; compiling takes the time, so types must do for each alone
    out = jax.eval_shape(function, jax.random.key(3), *half)
  else:
    out = jax.jit(function)(jax.random.key(3), *half)
    assert all(jnp.isfinite(leaf.astype("float32")).all() for leaf in jax.tree.leaves(out))
  assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(out))


def test_random_erase():
  images = jnp.full((400, 20, 30, 3), 9.0)
  erase = functools.partial(augment.random_erase, probability=0.4, area=(0.1, 0.2), aspect=2.0)
  out = jax.jit(erase)(jax.random.key(0), images)
  changed = np.asarray((out != images).any(-1))
  hit = changed.any((1, 2))
  assert 120 < hit.sum() < 200
  shares = changed[hit].mean((1, 2))
  assert shares.max() < 0.24 and shares.max() > 0.15  # rounding of the sides to whole pixels adds a little
  for image in changed[hit]:
    np.testing.assert_array_equal(image, image.any(1)[:, None] & image.any(0))
  noise = np.asarray(out)[np.asarray(out != images)]
  assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
  untouched = jax.jit(functools.partial(augment.random_erase, probability=0.0))(jax.random.key(0), images)
  np.testing.assert_array_equal(untouched, images)


BAD = {
  "alpha 0": (lambda: augment.mixup(jax.random.key(0), IMAGES, LABELS, alpha=0), "alpha: got 0"),
  "alpha below 0": (lambda: augment.cutmix(jax.random.key(0), IMAGES, LABELS, alpha=-1), "alpha: got -1"),
  "integer labels": (lambda: augment.mixup(jax.random.key(0), IMAGES, jnp.arange(8)), "labels: got int32"),
  "wrong batch": (lambda: augment.cutmix(jax.random.key(0), IMAGES, LABELS[:4]), "labels: got"),
  "uint8 images": (lambda: augment.mixup(jax.random.key(0), IMAGES.astype("uint8"), LABELS), "images: got uint8"),
  "one image": (lambda: augment.mixup(jax.random.key(0), IMAGES[0], LABELS), "images: got"),
  "share": (
    lambda: augment.mixup_or_cutmix(jax.random.key(0), IMAGES, LABELS, cutmix_share=1.5),
    "cutmix_share: got 1.5",
  ),
  "probability": (lambda: augment.random_erase(jax.random.key(0), IMAGES, probability=2), "probability: got 2"),
  "area": (lambda: augment.random_erase(jax.random.key(0), IMAGES, area=(0.5, 0.1)), "area: got"),
  "aspect": (lambda: augment.random_erase(jax.random.key(0), IMAGES, aspect=0.5), "aspect: got 0.5"),
  "flat": (lambda: augment.random_erase(jax.random.key(0), IMAGES[0]), "images: got shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
  call, message = BAD[case]
  with pytest.raises(ValueError, match=message):
    call()
