import numpy as np
import pytest

from jaxlab.data import brain


def test_brain_is_symmetric_and_tissues_differ():
  whole = brain.mni152(2)
  assert whole.image.shape == whole.label.shape
  assert whole.image.min() >= 0 and whole.image.max() <= 1 and set(np.unique(whole.label)) == {0, 1, 2}
  assert (whole.label > 0).any((1, 2)).all() and (whole.label > 0).any((0, 2)).all()
  # Why a split by halves would test on the training set: see the module.
  fine = brain.mni152(1)
  np.testing.assert_array_equal(fine.label, fine.label[::-1])
  np.testing.assert_array_equal(fine.image, fine.image[::-1])
  grey, white = (whole.image[whole.label == k].mean() for k in (1, 2))
  assert white > grey + 0.1 > whole.image[whole.label == 0].mean() + 0.1
  volumes = np.bincount(fine.label.ravel())[1:] / 1e6  # litres
  assert 0.9 < volumes[0] < 1.3 and 0.5 < volumes[1] < 0.8


def test_parts_do_not_meet():
  whole = brain.mni152(2)
  train, test = brain.split(whole, 0.6, 4)
  slices = whole.image.shape[1]
  assert train.image.shape[1] + test.image.shape[1] == slices - 4
  np.testing.assert_array_equal(train.label, whole.label[:, : train.label.shape[1]])
  np.testing.assert_array_equal(test.image, whole.image[:, -test.label.shape[1] :])
  with pytest.raises(ValueError, match="fraction: got"):
    brain.split(whole, 0.98, 4)


def test_scans_differ_as_asked():
  small = brain.Brain(*(a[20:52, 20:52, 20:52] for a in brain.mni152(2)))
  clean = brain.scans(small, 1, noise=0, bias=0, gamma=0)[0, ..., 0]
  np.testing.assert_allclose(clean, (small.image - small.image.mean()) / small.image.std(), atol=1e-4)
  made = brain.scans(small, 3, seed=1)
  np.testing.assert_allclose(made.mean((1, 2, 3, 4)), 0, atol=1e-4)
  np.testing.assert_allclose(made.std((1, 2, 3, 4)), 1, atol=1e-4)
  np.testing.assert_array_equal(made, brain.scans(small, 3, seed=1))
  assert np.abs(made[0] - made[1]).mean() > 0.1
  # A field is smooth: it moves a voxel's neighbour alike, noise does not.
  rough = [np.abs(np.diff(brain.scans(small, 1, seed=2, **o)[0, ..., 0] - clean, axis=0)).mean() for o in (
    {"noise": 0, "gamma": 0}, {"noise": 0.2, "bias": 0, "gamma": 0},
  )]  # fmt: skip
  assert rough[0] < 0.5 * rough[1]


def test_patches_lie_inside_and_around_tissue():
  label = np.zeros((9, 10, 11), np.int32)
  label[6, 2, 8] = 2
  images = np.arange(2 * label.size, dtype=np.float32).reshape(2, *label.shape, 1)
  cubes, classes = brain.patches(images, label, 5, 30, foreground=0.5)
  assert cubes.shape == (30, 5, 5, 5, 1) and (classes[:15] == 2).any((1, 2, 3)).all()
  for cube, some in zip(cubes[..., 0], classes, strict=True):
    index = cube.astype(int) % label.size  # each number tells where it comes from
    np.testing.assert_array_equal(label.ravel()[index], some)
    assert len(np.unique(cube)) == 125 and np.ptp(cube) == 4 * (110 + 11 + 1)
  assert len(np.unique(cubes[:, 0, 0, 0, 0] // label.size)) == 2
  assert len({tuple(np.sign(cube[[-1, 0, 0], [0, -1, 0], [0, 0, -1], 0] - cube[0, 0, 0, 0])) for cube in cubes}) == 8


@pytest.mark.parametrize(
  ("call", "argument"),
  [
    (lambda: brain.mni152(3), "spacing"),
    (lambda: brain.scans(brain.mni152(2), 0), "count"),
    (lambda: brain.scans(brain.mni152(2), 1, noise=-1), "noise"),
    (lambda: brain.patches(np.zeros((1, 4, 4, 4, 1)), np.zeros((4, 4, 5), int), 2, 1), "images"),
    (lambda: brain.patches(np.zeros((1, 4, 4, 4, 1)), np.zeros((4, 4, 4), int), 5, 1), "side"),
    (lambda: brain.patches(np.zeros((1, 4, 4, 4, 1)), np.zeros((4, 4, 4), int), 2, 1, foreground=2), "foreground"),
  ],
)
def test_bad_arguments(call, argument):
  with pytest.raises(ValueError, match=f"{argument}: got"):
    call()
