import numpy as np
import pytest

from jaxlab.data import aerial


def test_classes_are_as_unequal_as_asked():
  made = aerial.tiles(60, 96, 128, seed=1)
  assert made.image.shape == (60, 96, 128, 3) and made.image.dtype == made.label.dtype == np.uint8
  share = np.bincount(made.label.ravel(), minlength=6) / made.label.size
  car = aerial.CLASSES.index("car")
  assert share.argmin() == car and 0.003 < share[car] < 0.02
  assert (np.delete(share, car) > 0.03).all() and share[2] == share.max()


def test_texture_and_colour_tell_classes_and_shadows_fall():
  made = aerial.tiles(40, seed=2)
  green, red = (made.image[..., k].astype(int) for k in (1, 0))
  plants = np.isin(made.label, (2, 3))
  assert (green - red)[plants].mean() > 10 > (green - red)[~plants].mean()
  edge = np.roll(made.label == 1, 2, (1, 2))[:, 4:, 4:] & (made.label != 1)[:, 4:, 4:] & (made.label != 3)[:, 4:, 4:]
  beside = np.roll(made.label == 1, -2, (1, 2))[:, 4:, 4:] & (made.label != 1)[:, 4:, 4:] & (made.label != 3)[:, 4:, 4:]
  assert red[:, 4:, 4:][edge].mean() < 0.8 * red[:, 4:, 4:][beside].mean()


def test_diagonal_roads_follow_diagonals():
  def persistence(roads):
    """How much likelier impervious ground goes on along a diagonal than along a row or column."""
    road = aerial.tiles(60, seed=3, roads=roads).label == 0
    on = lambda dy, dx: (road[:, 32:-32, 32:-32] & road[:, 32 + dy : 96 + dy, 32 + dx : 96 + dx]).mean()
    return (on(20, 20) + on(20, -20)) / (on(0, 28) + on(28, 0))

  assert persistence("diagonal") > 1.1 * persistence("any")


def test_seed_and_bad_arguments():
  a, b, c = (aerial.tiles(2, 32, 32, seed=seed) for seed in (0, 0, 1))
  np.testing.assert_array_equal(a.image, b.image)
  assert (a.image != c.image).any()
  for change in ({"count": 0}, {"height": 16}, {"width": 16}, {"roads": "curved"}):
    with pytest.raises(ValueError, match=next(iter(change))):
      aerial.tiles(**{"count": 1, **change})
