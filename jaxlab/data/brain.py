"""The MNI152 brain that nilearn ships: an averaged T1 image with the grey and the white matter, to segment in 3-D.

The files are the ICBM 2009a symmetric atlas (Fonov et al., NeuroImage 2011): its left half is the mirror image of its
right half, exactly. Parts for training and testing must therefore differ along another axis, from back to front here
(`split`). There is one brain; `scans` makes several images of it as different scanners might.
"""

import functools
import importlib.util
import pathlib
from typing import NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import Float, Int

from jaxlab import checks

CLASSES = ("background", "grey matter", "white matter")
_FILE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"


class Brain(NamedTuple):
  """A volume and the class of every voxel; axes run from left to right, back to front, bottom to top.

  Attributes:
    image: [X, Y, Z] T1 intensity in [0, 1], 0 outside the brain.
    label: [X, Y, Z], an index into `CLASSES`.
  """

  image: Float[np.ndarray, "x y z"]
  label: Int[np.ndarray, "x y z"]


@functools.cache
def mni152(spacing: int = 2) -> Brain:
  """Host. The brain, cut to its bounding box.

  Args:
    spacing: 1 or 2 mm between voxels; 2 averages blocks of 8.

  Returns:
    [143, 180, 154] voxels at 1 mm, [72, 90, 76] at 2 mm. A voxel is background unless grey and white matter together
    are more likely than not, and then the more likely of both.

  Raises:
    ValueError: another spacing.
    ImportError: nilearn is missing.
  """
  checks.count("spacing", spacing, 1, 2)
  found = importlib.util.find_spec("nilearn")
  if found is None or found.origin is None:
    raise ImportError("nilearn: not installed, which ships the brain (`pip install jaxlab[volumes]`)")
  import nibabel  # comes with nilearn

  folder = pathlib.Path(found.origin).parent / "datasets" / "data"

  def read(name: str) -> np.ndarray:
    volume = np.asarray(nibabel.load(folder / _FILE.format(name)).dataobj, np.float32) / 255  # type: ignore[attr-defined]
    if spacing == 1:
      return volume
    even = volume[: volume.shape[0] // 2 * 2, : volume.shape[1] // 2 * 2, : volume.shape[2] // 2 * 2]
    return even.reshape(even.shape[0] // 2, 2, even.shape[1] // 2, 2, even.shape[2] // 2, 2).mean((1, 3, 5))

  image, grey, white = map(read, ("t1", "gm", "wm"))
  label = np.where(grey + white > 0.5, np.where(grey >= white, 1, 2), 0).astype(np.int32)
  box = scipy.ndimage.find_objects((label > 0).astype(np.int8))[0]
  return Brain(image[box], label[box])


def split(brain: Brain, fraction: float = 0.6, gap: int = 4) -> tuple[Brain, Brain]:
  """Host. The back of the brain to train on and the front to test on, without a voxel in common.

  Args:
    brain: from `mni152`.
    fraction: of the slices, for training.
    gap: slices between both that belong to neither, since neighbours are alike.

  Raises:
    ValueError: if one of them would be empty.
  """
  checks.count("gap", gap, 0)
  slices = brain.image.shape[1]
  last = round(fraction * slices)
  if not 0 < last < last + gap < slices:
    raise ValueError(f"fraction: got {fraction}, expected slices on both sides of a gap of {gap}, of {slices}")
  return Brain(brain.image[:, :last], brain.label[:, :last]), Brain(
    brain.image[:, last + gap :], brain.label[:, last + gap :]
  )


def scans(
  brain: Brain, count: int, *, noise: float = 0.06, bias: float = 0.4, gamma: float = 0.3, seed: int = 0
) -> Float[np.ndarray, "n x y z 1"]:
  """Host. Images of a brain with the faults of magnetic resonance: every scan has its own.

      scan = |T1^(1 + g) * exp(b) + n|,   then minus its mean, over its standard deviation

  Args:
    brain: what is scanned.
    count: N.
    noise: standard deviation of n, white noise.
    bias: standard deviation of b, a field that varies over about a quarter of the brain (coils are not uniform).
    gamma: g is uniform in [-gamma, gamma]: contrasts of tissues differ.
    seed: of everything.

  Returns:
    Float32 of mean 0 and variance 1 each, with a channel.

  Raises:
    ValueError: no scans, or a negative strength.
  """
  checks.count("count", count)
  for name, value in (("noise", noise), ("bias", bias), ("gamma", gamma)):
    checks.real(name, value, 0, 10)
  rng = np.random.default_rng(seed)
  made = np.empty((count, *brain.image.shape, 1), np.float32)
  for scan in made:
    smooth = rng.standard_normal(brain.image.shape)
    field = scipy.ndimage.gaussian_filter(smooth, [n / 8 for n in smooth.shape], mode="nearest")
    field *= bias / max(field.std(), 1e-12)
    signal = brain.image ** (1 + rng.uniform(-gamma, gamma)) * np.exp(field)
    signal = np.abs(signal + noise * rng.standard_normal(signal.shape))
    scan[..., 0] = (signal - signal.mean()) / signal.std()
  return made


def patches(
  images: Float[np.ndarray, "n x y z c"],
  label: Int[np.ndarray, "x y z"],
  side: int,
  count: int,
  *,
  foreground: float = 1 / 3,
  seed: int | tuple[int, ...] = 0,
) -> tuple[Float[np.ndarray, "b s s s c"], Int[np.ndarray, "b s s s"]]:
  """Host. Random cubes of random scans, mirrored at random along each axis.

  Args:
    images: scans of one brain.
    label: its classes.
    side: S, in voxels.
    count: B.
    foreground: fraction of the cubes (rounded up) that lie around a voxel of a random class other than 0, as far as the
      border allows.
    seed: of everything.

  Returns:
    Cubes and their classes.

  Raises:
    ValueError: a cube that does not fit, images and classes of different sizes, a fraction outside [0, 1].
  """
  if images.ndim != 5 or images.shape[1:4] != label.shape:
    raise ValueError(f"images: got shape {images.shape}, expected (N, *{label.shape}, channels)")
  checks.count("side", side, 1, min(label.shape))
  checks.count("count", count)
  checks.real("foreground", foreground)
  rng = np.random.default_rng(seed)
  cubes = np.empty((count, side, side, side, images.shape[-1]), np.float32)
  classes = np.empty((count, side, side, side), np.int32)
  most = np.array(label.shape) - side
  for b in range(count):
    start = rng.integers(0, most + 1)
    if b < np.ceil(foreground * count):
      inside = np.flatnonzero(label == rng.choice(np.unique(label[label > 0])))
      start = np.clip(np.array(np.unravel_index(rng.choice(inside), label.shape)) - side // 2, 0, most)
    here = tuple(slice(i, i + side) for i in start)
    flips = tuple(slice(None, None, step) for step in rng.choice((-1, 1), 3))
    cubes[b] = images[rng.integers(len(images))][here][flips]
    classes[b] = label[here][flips]
  return cubes, classes
