import os
import pathlib

import numpy as np
import PIL.Image
import pytest

from jaxlab.data import camvid, files

REAL = pathlib.Path(os.environ.get("JAXLAB_DATA", "")) / "camvid"


@pytest.mark.skipif(
  not (os.environ.get("JAXLAB_DATA") and REAL.is_dir()), reason="JAXLAB_DATA names no folder with camvid/"
)
def test_published_split():
  scenes = camvid.load("val", (45, 60))
  assert scenes.image.shape == (101, 45, 60, 3) and scenes.label.shape == (101, 45, 60)
  share = np.bincount(scenes.label.ravel(), minlength=12) / scenes.label.size
  assert share.argmax() == camvid.CLASSES.index("road") and (share > 0).all() and share[camvid.VOID] < 0.1
  top, bottom = scenes.label[:, :10], scenes.label[:, -10:]
  assert (top == 0).sum() > 100 * (bottom == 0).sum() and (bottom == 3).sum() > 100 * (top == 3).sum()


@pytest.fixture
def folder(tmp_path):
  for name in ("train", "trainannot"):
    (tmp_path / name).mkdir()
  for i, suffix in enumerate(("png", "jpg")):
    image = np.full((4, 6, 3), 100 * i + 50, np.uint8)
    PIL.Image.fromarray(image).save(tmp_path / f"train/{i}.{suffix}")
    label = np.repeat([[0, 11], [5, 3]], 2, 0).repeat(3, 1).astype(np.uint8)
    PIL.Image.fromarray(label).save(tmp_path / f"trainannot/{i}.png")
  return tmp_path


def test_reads_and_resizes(folder):
  scenes = camvid.load("train", (2, 2), folder, published=False)
  np.testing.assert_array_equal(scenes.label, [[[0, 11], [5, 3]]] * 2)
  assert scenes.image.shape == (2, 2, 2, 3) and scenes.image.dtype == np.uint8
  np.testing.assert_allclose(scenes.image.mean((1, 2, 3)), [50, 150], atol=2)


def test_what_is_wrong_is_named(folder, monkeypatch):
  with pytest.raises(ValueError, match="split: got 'all'"):
    camvid.load("all")
  with pytest.raises(ValueError, match="size: got 0"):
    camvid.load("train", (0, 5))
  with pytest.raises(files.MissingFile, match="directory: got no folder"):
    camvid.load("test", directory=folder)
  monkeypatch.delenv("JAXLAB_DATA", raising=False)
  with pytest.raises(files.MissingFile, match="JAXLAB_DATA: got nothing"):
    camvid.load("train")
  with pytest.raises(ValueError, match="got 2 images, expected 367"):
    camvid.load("train", directory=folder)
  PIL.Image.fromarray(np.full((4, 6), 12, np.uint8)).save(folder / "trainannot/0.png")
  with pytest.raises(ValueError, match=r"0\.png: got a file that does not read, expected a mask"):
    camvid.load("train", directory=folder, published=False)
  (folder / "train/0.png").write_bytes(b"no image")
  with pytest.raises(ValueError, match=r"0\.png: got a file that does not read, expected an image"):
    camvid.load("train", directory=folder, published=False)
  (folder / "train/0.png").unlink()
  with pytest.raises(ValueError, match="got 1 images and 2 masks"):
    camvid.load("train", directory=folder, published=False)
