import numpy as np
import pytest

from jaxlab.data import scenes


def test_labels_follow_marker_stripes_and_size():
  made = scenes.marked_shapes(40, 64, seed=1)
  assert made.image.shape == (40, 64, 64, 3) and made.image.min() >= 0 and made.image.max() <= 1
  red = np.abs(made.image - np.float32((0.9, 0.1, 0.1))).max(-1) < 1e-6
  blue = np.abs(made.image - np.float32((0.1, 0.1, 0.9))).max(-1) < 1e-6
  assert ((red.sum((1, 2)) == 16) ^ (blue.sum((1, 2)) == 16)).all()
  for image, label, marker in zip(made.image, made.label, blue.any((1, 2)), strict=True):
    assert not (label == (1 if marker else 2)).any()  # discs have the marker's class alone
    for kind, axis in ((3, 0), (4, 1)):
      inside = (label == kind) & np.roll(label == kind, 1, axis) & np.roll(label == kind, 1, 1 - axis)
      if inside.sum() > 20:  # stripes make neighbours across differ more than neighbours along
        change = [np.abs(image - np.roll(image, 1, a)).mean(-1)[inside].mean() for a in (axis, 1 - axis)]
        assert change[0] > change[1] + 0.1
  sizes = [(made.label == kind).sum((1, 2)).max() for kind in (5, 6)]
  assert sizes[1] > 2 * sizes[0]
  assert set(np.unique(made.label)) == set(range(len(scenes.CLASSES)))


def test_seed_and_bad_arguments():
  a, b, c = (scenes.marked_shapes(2, 32, seed=seed).image for seed in (0, 0, 1))
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()
  for change in ({"count": 0}, {"side": 16}, {"side": 500}, {"shapes": 0}):
    with pytest.raises(ValueError, match=next(iter(change))):
      scenes.marked_shapes(**{"count": 1, **change})
