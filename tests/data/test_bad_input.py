"""Wrong arguments of loaders and generators: each a `ValueError` that names the argument and what was given."""

import numpy as np
import pytest

from jaxlab.data import (
  NodeDataset,
  digits,
  heterophilous,
  images,
  mnist5k,
  networks,
  planetoid,
  random_split,
  undirected,
)
from jaxlab.data import synthetic as syn


def labelled():
  nothing = np.zeros(30, bool)
  labels = np.repeat(np.arange(3), 10).astype(np.int32)
  ids = np.zeros(0, np.int32)
  return NodeDataset(np.zeros((30, 2), np.float32), ids, ids, labels, nothing, nothing, nothing)


def pictures(count=10, **changes):
  examples = {"image": np.zeros((count, 4, 4, 3), np.uint8), "label": np.zeros(count, int)} | changes
  options = {"seed": 0, "mean": (0, 0, 0), "std": (1, 1, 1)}
  return lambda batch_size=2, **more: images.batches(examples, batch_size, **(options | more))


CASES = {
  "planetoid name": (lambda d: planetoid.load("reddit"), "name: got 'reddit', expected one of"),
  "planetoid capital": (lambda d: planetoid.load("Cora"), "name: got 'Cora'"),
  "planetoid own files nowhere": (lambda d: planetoid.load("x", published=False), "directory: got None"),
  "planetoid empty folder": (lambda d: planetoid.load("cora", d), "directory: got no file"),
  "planetoid no folder": (lambda d: planetoid.load("cora", d / "none"), "directory: got no file"),
  "heterophilous name": (lambda d: heterophilous.load("cora"), "name: got 'cora'"),
  "heterophilous split": (lambda d: heterophilous.load("texas", 10), "split: got 10, .* at most 9"),
  "heterophilous negative split": (lambda d: heterophilous.load("texas", -1), "split: got -1"),
  "heterophilous split type": (lambda d: heterophilous.load("texas", 0.5), "split: got 0.5"),
  "heterophilous own files nowhere": (lambda d: heterophilous.load("x", published=False), "directory: got None"),
  "heterophilous empty folder": (lambda d: heterophilous.load("texas", 0, d), "directory: got no file"),
  "blogcatalog empty folder": (lambda d: networks.blogcatalog(d), "directory: got no file"),
  "email empty folder": (lambda d: networks.email_eu_core(d), "directory: got no file"),
  "photo empty folder": (lambda d: networks.amazon_photo(d), "directory: got no file"),
  "digits neighbors 0": (lambda d: digits.graph(neighbors=0), "neighbors: got 0"),
  "digits neighbors all": (lambda d: digits.graph(neighbors=1797), "neighbors: got 1797, .* at most 1796"),
  "digits train": (lambda d: digits.graph(train_per_class=500), "train_per_class: got 500, expected at most 174"),
  "digits train 0": (lambda d: digits.graph(train_per_class=0), "train_per_class: got 0"),
  "digits val": (lambda d: digits.graph(val=1700), "val: got 1700, expected at most 1597"),
  "digits test": (lambda d: digits.graph(test=1500), "test: got 1500, expected at most 1097"),
  "digits seed": (lambda d: digits.graph(seed=-1), "seed: got -1"),
  "digits fraction": (lambda d: digits.images(val=1.5), "val: got 1.5"),
  "digits nan": (lambda d: digits.images(test=float("nan")), "test: got nan"),
  "digits nothing left": (lambda d: digits.images(val=0.5, test=0.5), "val, test: got 0.5, 0.5"),
  "digits nothing to validate": (lambda d: digits.images(val=0.0), "val, test: got 0.0"),
  "mnist seed": (lambda d: mnist5k.images(seed=1.5), "seed: got 1.5"),
  "split seed": (lambda d: random_split(labelled(), seed=None), "seed: got None"),
  "split train": (lambda d: random_split(labelled(), seed=0, train_per_class=11), "train_per_class: got 11"),
  "split val": (lambda d: random_split(labelled(), seed=0, train_per_class=5, val=16), "val: got 16"),
  "split bool": (lambda d: random_split(labelled(), seed=0, train_per_class=True), "train_per_class: got True"),
  "edges lengths": (lambda d: undirected(np.zeros(2, int), np.zeros(3, int), 4), r"columns: got shape \(3,\)"),
  "edges range": (lambda d: undirected(np.array([0]), np.array([4]), 4), r"columns: got indices in \[4, 4\]"),
  "edges negative": (lambda d: undirected(np.array([-1]), np.array([0]), 4), "rows: got indices"),
  "image set": (lambda d: images.source("no_such_set", "train", d), "name: got 'no_such_set'"),
  "image set not there": (lambda d: images.cifar10("train", 8, seed=0, augment=True, directory=d), "directory: got no"),
  "batch 0": (lambda d: pictures()(0), "batch_size: got 0"),
  "batch too large": (lambda d: pictures()(11), "batch_size: got 11, .* at most 10"),
  "batch too large for a shard": (lambda d: pictures()(6, shard_count=2), "batch_size: got 6, .* at most 5"),
  "shard": (lambda d: pictures()(shard_index=2, shard_count=2), "shard_index: got 2"),
  "shards": (lambda d: pictures()(shard_count=0), "shard_count: got 0"),
  "epochs": (lambda d: pictures()(epochs=0), "epochs: got 0"),
  "size": (lambda d: pictures()(size=0), "size: got 0"),
  "pipeline seed": (lambda d: pictures()(seed="a"), "seed: got 'a'"),
  "augment without seed": (lambda d: pictures()(seed=None, augment=images.crop_and_flip), "seed: got None"),
  "mean": (lambda d: pictures()(mean=(0,)), "mean, std: got"),
  "std": (lambda d: pictures()(std=(1, 1, 0)), "mean, std: got"),
  "float pictures": (lambda d: pictures(image=np.zeros((10, 4, 4, 3)))(), "examples: got image float64"),
  "labels of another length": (lambda d: pictures(label=np.zeros(9))(), r"label \(9,\)"),
  "no pictures": (lambda d: pictures(0)(), "examples: got"),
  "citation classes": (lambda d: syn.citation(num_classes=1), "num_classes: got 1"),
  "citation nodes": (lambda d: syn.citation(10), "num_nodes: got 10"),
  "citation homophily": (lambda d: syn.citation(homophily=1.1), "homophily: got 1.1"),
  "citation degree": (lambda d: syn.citation(mean_degree=1000), "mean_degree: got 1000"),
  "citation exponent": (lambda d: syn.citation(degree_exponent=2), "degree_exponent: got 2"),
  "citation features": (lambda d: syn.citation(num_features=2), "num_features: got 2"),
  "citation words": (lambda d: syn.citation(words_per_node=0), "words_per_node: got 0"),
  "citation topic": (lambda d: syn.citation(topic_share=-0.1), "topic_share: got -0.1"),
  "random edges": (lambda d: syn.erdos_renyi(4, 4), "num_edges: got 4, .* at most 3"),
  "random nodes": (lambda d: syn.erdos_renyi(1, 0), "num_nodes: got 1"),
  "attachments": (lambda d: syn.barabasi_albert(5, 0), "attachments: got 0"),
  "attachments of too many": (lambda d: syn.barabasi_albert(5, 5), "attachments: got 5"),
}


@pytest.mark.parametrize("case", CASES)
def test_names_argument_and_value(case, tmp_path):
  call, message = CASES[case]
  with pytest.raises(ValueError, match=message):
    call(tmp_path)
