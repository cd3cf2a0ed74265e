"""Image pipelines on a small TFDS set written here, and on the CIFAR-10 of `TFDS_DATA_DIR` where there is one."""

import io
import os
import pathlib

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from jaxlab.data import images

REAL = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "")) / "cifar10"
needs_cifar10 = pytest.mark.skipif(
  not (os.environ.get("TFDS_DATA_DIR") and REAL.is_dir()), reason="TFDS_DATA_DIR names no folder with cifar10/"
)
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


class JaxlabToyImages(tfds.core.GeneratorBasedBuilder):
  """23 training and 5 test images whose every pixel is ten times the label, which is the index."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {"image": tfds.features.Image(shape=(6, 6, 3)), "label": tfds.features.ClassLabel(num_classes=23)}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(23), "test": self._generate_examples(5)}

  def _generate_examples(self, count):
    for i in range(count):
      png = io.BytesIO()
      PIL.Image.fromarray(np.full((6, 6, 3), 10 * i, np.uint8)).save(png, format="PNG")
      yield i, {"image": png.getvalue(), "label": i}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("tfds")
  tfds.builder("jaxlab_toy_images", data_dir=root, file_format="array_record").download_and_prepare()
  return root


@pytest.fixture
def toy(folder):
  return images.source("jaxlab_toy_images", "train", folder)


def labels(iterator):
  return [batch["label"].tolist() for batch in iterator]


def test_source_and_arrays(folder, toy):
  assert len(toy) == 23 and toy[4]["label"] == 4 and (toy[4]["image"] == 40).all()
  arrays = images.as_arrays("jaxlab_toy_images", "train[10:20]", folder)
  assert arrays["image"].shape == (10, 6, 6, 3) and arrays["image"].dtype == np.uint8
  assert arrays["label"].tolist() == list(range(10, 20)) and arrays["label"].dtype == np.int32


def test_stored_order_and_normalisation(toy):
  mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
  whole = list(images.batches(toy, 5, seed=None, mean=mean, std=std, epochs=1, drop_remainder=False))
  assert [len(batch["label"]) for batch in whole] == [5, 5, 5, 5, 3]
  image = np.concatenate([batch["image"] for batch in whole])
  label = np.concatenate([batch["label"] for batch in whole])
  assert image.dtype == np.float32 and label.dtype == np.int32 and label.tolist() == list(range(23))
  expected = (10 * np.arange(23)[:, None] / 255 - mean) / std
  np.testing.assert_allclose(image[:, 2, 3], expected, atol=1e-6)


def test_shuffles_each_epoch_anew_and_by_seed(toy):
  def run(seed):
    return labels(images.batches(toy, 23, seed=seed, epochs=3, **PLAIN))

  first = run(0)
  assert len(first) == 3 and all(sorted(epoch) == list(range(23)) for epoch in first)
  assert first[0] != first[1] != first[2] and first == run(0) and first != run(1)


def test_in_memory_and_on_disk_agree(folder, toy):
  arrays = images.as_arrays("jaxlab_toy_images", "train", folder)
  options = {"seed": 3, "augment": images.crop_and_flip, "epochs": 2, **PLAIN}
  for a, b in zip(images.batches(toy, 4, **options), images.batches(arrays, 4, **options), strict=True):
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["label"], b["label"])


@pytest.mark.parametrize("stop", [0, 1, 4, 7])
def test_restored_iterator_continues_exactly(toy, stop):
  def make():
    return images.batches(toy, 4, seed=5, augment=images.crop_and_flip, **PLAIN)

  whole, iterator = make(), make()
  expected = [next(whole) for _ in range(12)]  # more than two epochs
  for _ in range(stop):
    next(iterator)
  state = iterator.get_state()
  resumed = make()
  resumed.set_state(state)
  for batch in expected[stop:]:
    got = next(resumed)
    np.testing.assert_array_equal(got["image"], batch["image"])
    np.testing.assert_array_equal(got["label"], batch["label"])


@pytest.mark.parametrize("drop_remainder", [True, False])
def test_shards_are_disjoint(toy, drop_remainder):
  shards = [
    labels(
      images.batches(toy, 2, seed=1, shard_index=i, shard_count=4, epochs=1, drop_remainder=drop_remainder, **PLAIN)
    )
    for i in range(4)
  ]
  seen = [label for shard in shards for batch in shard for label in batch]
  assert len(seen) == len(set(seen))
  if drop_remainder:  # shards of 5: two full batches each, whatever the shard
    assert [len(shard) for shard in shards] == [2] * 4
  else:
    assert sorted(seen) == list(range(23))


def test_shards_augment_by_themselves():
  """At each place in the order of a shard, another draw than at that of its neighbours."""
  blank = {"image": np.zeros((8, 2, 2, 1), np.uint8), "label": np.arange(8)}
  noise = lambda image, rng: rng.integers(0, 256, image.shape, np.uint8)
  first, second = (
    next(images.batches(blank, 4, seed=0, mean=(0.0,), std=(1.0,), augment=noise, shard_index=i, shard_count=2))
    for i in range(2)
  )
  assert not (first["image"] == second["image"]).all((1, 2, 3)).any()


@pytest.mark.parametrize("mode", [None, "constant", "reflect"])
def test_crop_and_flip(mode):
  image = np.arange(1, 49, dtype=np.uint8).reshape(4, 4, 3)
  rng = np.random.default_rng(0)
  seen, mirrored = set(), 0
  for _ in range(2000):
    out = images.crop_and_flip(image, rng, padding=1, **({"mode": mode} if mode else {}))
    assert out.shape == image.shape and out.dtype == np.uint8
    candidates = {}
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode=mode or "constant")
    for top in range(3):
      for left in range(3):
        crop = padded[top : top + 4, left : left + 4]
        candidates[crop.tobytes()], candidates[crop[:, ::-1].tobytes()] = (top, left, 0), (top, left, 1)
    found = candidates[out.tobytes()]  # nothing but a crop or its mirror image
    seen.add(found)
    mirrored += found[2]
  assert len(seen) == 18 and 900 < mirrored < 1100
  with pytest.raises(ValueError, match="mode: got 'wrap'"):
    images.crop_and_flip(image, rng, mode="wrap")


def test_augmentation_differs_between_examples_and_epochs():
  picture = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
  arrays = {"image": np.repeat(picture, 16, 0), "label": np.arange(16)}
  first, second = images.batches(arrays, 16, seed=0, augment=images.crop_and_flip, epochs=2, **PLAIN)
  assert len(np.unique(first["image"].reshape(16, -1), axis=0)) > 12
  order = [np.argsort(batch["label"]) for batch in (first, second)]
  assert (first["image"][order[0]] != second["image"][order[1]]).any(axis=(1, 2, 3)).sum() > 12


@pytest.mark.parametrize("channels", [1, 3])
def test_resize(channels):
  ramp = np.repeat(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], 16, 0)
  image = np.concatenate([ramp + 5 * c for c in range(channels)], 2)
  out = images.resize(image, 8)
  assert out.shape == (8, 8, channels) and out.dtype == np.uint8
  np.testing.assert_allclose(out[4, 2:-2], image[4].reshape(8, 2, channels).mean(1)[2:-2], atol=1)
  arrays = {"image": image[None], "label": np.zeros(1, int)}
  plain = {"mean": [0.0] * channels, "std": [1.0] * channels}
  batch = next(images.batches(arrays, 1, seed=None, size=8, **plain))
  np.testing.assert_allclose(batch["image"][0] * 255, out, atol=1e-3)


def test_normalize():
  image = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3), np.uint8)
  expected = (image / 255 - images.CIFAR10_MEAN) / images.CIFAR10_STD
  got = images.normalize(image, images.CIFAR10_MEAN, images.CIFAR10_STD)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_data_not_prepared(tmp_path):
  with pytest.raises(
    ValueError, match=r"directory: got no prepared 'cifar10' at \S+, .*TFDS_DATA_DIR.*download_and_prepare"
  ):
    images.source("cifar10", "train", tmp_path)


def test_truncated_file_is_named(folder, tmp_path):
  for path in (folder / "jaxlab_toy_images/1.0.0").iterdir():
    copy = tmp_path / "jaxlab_toy_images/1.0.0" / path.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes()
    copy.write_bytes(content[: len(content) // 2] if "train.array_record" in path.name else content)
  assert len(images.source("jaxlab_toy_images", "test", tmp_path)) == 5
  with pytest.raises(ValueError, match=r"jaxlab_toy_images/1\.0\.0: got .*(damaged|do not open)"):
    images.source("jaxlab_toy_images", "train", tmp_path)


@needs_cifar10
def test_cifar10():
  iterator = images.cifar10("train[:512]", 256, seed=0, augment=True, epochs=1)
  image = np.concatenate([batch["image"] for batch in iterator])
  assert image.shape == (512, 32, 32, 3) and image.dtype == np.float32
  plain = images.cifar10("train[:512]", 512, seed=None, augment=False, epochs=1)
  batch = next(plain)
  # Normalised by the statistics of the whole training set.
  np.testing.assert_allclose(batch["image"].mean((0, 1, 2)), 0, atol=0.15)
  np.testing.assert_allclose(batch["image"].std((0, 1, 2)), 1, atol=0.15)
  assert set(batch["label"].tolist()) == set(range(10))
  assert next(images.cifar10("test", 2, seed=None, augment=False, size=48))["image"].shape == (2, 48, 48, 3)
