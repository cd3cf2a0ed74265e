"""The reader of graph sets: the published files where they are at hand, and files of the same form made here."""

import numpy as np
import pytest

from jaxlab.data import files, tu

GRAPHS = """3
3 1
2 2 1 2
5 1 0
2 1 0 9 9
1 -1
5 0
2 1
2 2 1 0
2 1 0
"""


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "10fold_idx").mkdir()
  (tmp_path / "toy.txt").write_text(GRAPHS)
  for fold in range(1, 11):
    (tmp_path / f"10fold_idx/train_idx-{fold}.txt").write_text("0\n2\n")
    (tmp_path / f"10fold_idx/test_idx-{fold}.txt").write_text("1\n")
  return tmp_path


def test_format(folder):
  dataset = tu.load("toy", folder, published=False)
  first, second, third = dataset.graphs
  np.testing.assert_array_equal(first.features, [[1, 0], [0, 1], [1, 0]])
  np.testing.assert_array_equal([first.senders, first.receivers], [[1, 2, 0, 0], [0, 0, 1, 2]])  # attributes ignored
  assert second.features.shape == (1, 2) and second.senders.size == 0
  np.testing.assert_array_equal([third.senders, third.receivers], [[1, 0], [0, 1]])  # the loop is dropped
  np.testing.assert_array_equal(dataset.labels, [1, 0, 1])
  assert dataset.num_classes == 2
  assert [len(part) for part in dataset.folds[3]] == [2, 1]


@pytest.mark.parametrize("name", tu.PUBLISHED)
def test_published_file(name):
  try:
    dataset = tu.load(name)
  except files.MissingFile as error:
    pytest.skip(str(error))
  expected = tu.PUBLISHED[name]
  assert len(dataset.graphs) == expected.graphs
  assert [len(train) + len(test) for train, test in dataset.folds] == [expected.graphs] * tu.NUM_FOLDS
  share = {"MUTAG": 125 / 188, "PROTEINS": 450 / 1113}[name]  # of class 1
  assert dataset.labels.mean() == pytest.approx(share)


def test_bad_input_is_named(folder):
  with pytest.raises(ValueError, match="^name: got 'NCI1'"):
    tu.load("NCI1")
  with pytest.raises(ValueError, match="^directory: got None"):
    tu.load("toy", published=False)
  with pytest.raises(ValueError, match="^directory: got no file"):
    tu.load("other", folder, published=False)
  (folder / "10fold_idx/test_idx-7.txt").write_text("1\n2\n")
  with pytest.raises(ValueError, match="divide 3 graphs"):
    tu.load("toy", folder, published=False)
  (folder / "toy.txt").write_text(GRAPHS.replace("2 2 1 2", "2 2 1 7"))
  with pytest.raises(ValueError, match="does not read"):
    tu.load("toy", folder, published=False)
  (folder / "toy.txt").write_text(GRAPHS[:20])
  with pytest.raises(ValueError, match="does not read"):
    tu.load("toy", folder, published=False)
