import numpy as np
import pytest

from jaxlab.data import photographs


def test_every_level_is_worse_than_the_one_before():
  made = photographs.graded(("cat", "coins"), 128, seed=1)
  assert len(made.image) == (2 * 19 - 1) * 5  # the grey one is not saturated
  error = [np.square(a.astype(float) - b).mean() for a, b in zip(made.image, made.reference, strict=True)]
  kinds = list(photographs.DISTORTIONS)
  for content, distortion in {(c, d) for c, d in zip(made.content, made.distortion, strict=True)}:
    rows = np.flatnonzero((made.content == content) & (made.distortion == distortion))
    np.testing.assert_array_equal(made.level[rows], [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(made.quality[rows], [1, 0.75, 0.5, 0.25, 0])
    steps = np.array(error)[rows]
    if kinds[distortion] == "colour shift":  # beyond the size of things a shift is as wrong as a longer one
      steps = steps[:3]
    assert steps[0] > 0 and (np.diff(steps) > 0).all(), (kinds[distortion], steps)
  for image, reference, content in zip(made.image, made.reference, made.content, strict=True):
    assert image.shape == reference.shape and image.dtype == np.uint8
    assert reference.shape == ((128, 170, 3) if photographs.CONTENTS[content] == "cat" else (128, 162, 3))


def test_contents_differ_and_are_dealt_without_overlap():
  pictures = [photographs.photograph(name, 16) for name in photographs.CONTENTS]
  assert len({picture.tobytes() for picture in pictures}) == len(pictures) == 16
  for name, picture in zip(photographs.CONTENTS, pictures, strict=True):
    assert min(picture.shape[:2]) == 16 and max(picture.shape[:2]) <= 21
    assert (name in photographs.GREY) == (np.ptp(picture.astype(int), -1) == 0).all()
  for seed in range(5):
    split = photographs.split(val=2, test=5, seed=seed)
    assert [len(part) for part in split] == [9, 2, 5]
    assert set().union(*split) == set(photographs.CONTENTS)
  assert photographs.split(seed=0) == photographs.split(seed=0) != photographs.split(seed=1)


def test_chosen_distortions_are_as_among_all():
  some, every = (photographs.graded(("moon",), 48, distortions=d) for d in (("JPEG", "block shuffle"), None))
  kinds = [list(photographs.DISTORTIONS).index(name) for name in ("JPEG", "block shuffle")]
  np.testing.assert_array_equal(some.distortion, np.repeat(kinds, 5))
  np.testing.assert_array_equal(some.image, [every.image[i] for i in np.flatnonzero(np.isin(every.distortion, kinds))])
  shuffled, whole = some.image[-1], some.reference[-1]
  np.testing.assert_array_equal(np.sort(shuffled, None), np.sort(whole, None))  # blocks change places, nothing else
  moved = [np.any(x != r, -1).mean() for x, r in zip(some.image[-5:], some.reference[-5:], strict=True)]
  assert (np.diff(moved) > 0).all() and moved[-1] > 0.8


def test_noise_depends_on_seed_and_picture_alone():
  alone, beside = (photographs.graded(names, 16, seed=2) for names in (("moon",), ("rocket", "moon")))
  np.testing.assert_array_equal(alone.image, beside.image[-len(alone.image) :])
  other = photographs.graded(("moon",), 16, seed=3)
  noisy = alone.distortion == list(photographs.DISTORTIONS).index("white noise")
  assert all((a != b).any() for a, b, n in zip(alone.image, other.image, noisy, strict=True) if n)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: photographs.photograph("dog"), "name: got 'dog'"),
    (lambda: photographs.photograph("cat", 300), "side: got 300"),
    (lambda: photographs.graded(()), "contents: got none"),
    (lambda: photographs.graded(("dog",)), "name: got 'dog'"),
    (lambda: photographs.graded_pictures({}), "pictures: got none"),
    (lambda: photographs.graded(("cat",), distortions=("fog",)), r"distortions: got \('fog',\)"),
    (lambda: photographs.split(val=8, test=8), "test: got 8"),
    (lambda: photographs.distort(np.zeros((9, 9, 3)), "JPEG", 1, np.random.default_rng(0)), "image: got float64"),
    (lambda: photographs.distort(np.zeros((9, 9, 3), "uint8"), "JPEG", 6, np.random.default_rng(0)), "level: got 6"),
    (lambda: photographs.distort(np.zeros((9, 9, 3), "uint8"), "fog", 1, np.random.default_rng(0)), "name: got 'fog'"),
  ],
)
def test_bad_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()
