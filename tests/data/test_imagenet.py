import functools

import numpy as np
import PIL.Image
import pytest

from jaxlab.data import imagenet

NOISE = np.random.default_rng(1).integers(20, 220, (24, 24, 3)).astype(np.uint8)
# Red grows to the right, green downwards, blue is constant: a crop tells where it came from.
RAMP = np.stack([*np.meshgrid(np.arange(200), np.arange(120)), np.full((120, 200), 77)], axis=-1).astype(np.uint8)


def crops(n=200, **options):
  rng = np.random.default_rng(0)
  return np.stack([imagenet.train_crop(RAMP, rng, size=16, augment=False, **options) for _ in range(n)]).astype(int)


def test_train_crops_cover_the_stated_areas_and_aspects():
  batch = crops()
  assert batch.shape == (200, 16, 16, 3)
  width = abs(batch[:, 8, -1, 0] - batch[:, 8, 0, 0]) * 16 / 15
  height = (batch[:, -1, 8, 1] - batch[:, 0, 8, 1]) * 16 / 15
  area, aspect = width * height / (200 * 120), width / height
  assert 0.05 < area.min() < 0.2 and 0.7 < area.max() <= 1.02
  assert 0.7 < aspect.min() < 0.85 and 1.2 < aspect.max() < 1.45


def test_half_of_the_crops_are_mirrored_and_none_upside_down():
  batch = crops()
  mirrored = (batch[:, 8, 0, 0] > batch[:, 8, -1, 0]).mean()
  assert abs(mirrored - 0.5) < 5 * np.sqrt(0.25 / 200)
  assert (batch[:, -1, 8, 1] > batch[:, 0, 8, 1]).all()


def test_long_images_fall_back_to_their_centre():
  long = np.tile(np.arange(250, dtype=np.uint8)[None, :, None], (4, 1, 3))
  out = imagenet.train_crop(long, np.random.default_rng(0), size=8, augment=False).astype(int)
  assert abs(out.mean() - 124.5) < 4


def test_evaluation_crop_is_the_centre_of_the_shorter_side():
  out = imagenet.evaluation_crop(RAMP, size=112).astype(int)  # 120 -> 128, so that 105 of 120 rows remain
  assert out.shape == (112, 112, 3)
  np.testing.assert_allclose(out[[0, -1], 50, 1], [7.5, 112], atol=1)
  np.testing.assert_allclose(out[50, [0, -1], 0], [47.5, 152], atol=1)
  np.testing.assert_array_equal(out[..., 2], 77)


def test_rand_augment_applies_half_of_two_operations():
  rng = np.random.default_rng(0)
  same = [np.array_equal(imagenet.rand_augment(NOISE, rng), NOISE) for _ in range(400)]
  assert abs(np.mean(same) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 400)
  assert np.array_equal(imagenet.rand_augment(NOISE, rng, probability=0.0), NOISE)
  assert np.array_equal(imagenet.rand_augment(NOISE, rng, layers=0), NOISE)


@pytest.mark.parametrize("operation", range(len(imagenet._OPERATIONS)))
def test_operations_grow_with_strength(operation):
  # Noise shows changes of colour and sharpness, a ramp those of place.
  picture = PIL.Image.fromarray(RAMP[:100, :100] if operation in (6, 11, 12, 13, 14) else NOISE)
  apply = functools.partial(imagenet._OPERATIONS[operation], picture)

  def change(strength):
    out = apply(strength, np.random.default_rng(0))
    assert out.size == picture.size and out.mode == "RGB"
    return np.abs(np.asarray(out, int) - np.asarray(picture, int)).mean()

  if operation < 3:  # autocontrast, equalize, invert have no strength
    assert change(0.2) == change(1.0) > 0
  else:
    assert change(0.0) <= change(0.5) < change(1.0)
    assert change(0.0) < 0.5 or operation == 3  # posterising leaves 4 bits at most


def test_translation_moves_by_the_stated_part():
  picture = PIL.Image.fromarray(RAMP[:100, :100])
  across = np.asarray(imagenet._OPERATIONS[13](picture, 1.0, np.random.default_rng(1)), int)
  down = np.asarray(imagenet._OPERATIONS[14](picture, 1.0, np.random.default_rng(1)), int)
  assert abs(across[50, 50, 0] - 50) == 45 and across[50, 50, 1] == 50
  assert abs(down[50, 50, 1] - 50) == 45 and down[50, 50, 0] == 50


@pytest.mark.parametrize("image", [RAMP[..., 0], RAMP[..., :1], RAMP.astype("float32"), np.zeros((0, 4, 3), np.uint8)])
def test_bad_images(image):
  for call in (imagenet.evaluation_crop, lambda x: imagenet.train_crop(x, np.random.default_rng(0))):
    with pytest.raises(ValueError, match="image: got"):
      call(image)


def test_bad_strengths():
  for options, message in (
    ({"magnitude": 11}, "magnitude"),
    ({"probability": -1}, "probability"),
    ({"layers": -1}, "layers"),
  ):
    with pytest.raises(ValueError, match=message):
      imagenet.rand_augment(RAMP, np.random.default_rng(0), **options)
