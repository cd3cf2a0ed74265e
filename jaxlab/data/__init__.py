"""Datasets and generators. Loaders are host code and return documented NumPy arrays; nothing here knows a system.

Files come from a folder of yours or are downloaded once and checked. `JAXLAB_DATA` names the folder (each loader says
which subfolder it reads), `TFDS_DATA_DIR` the one of TensorFlow Datasets image sets.
"""

from jaxlab.data.node import NodeDataset, random_split, row_normalize_features, undirected

__all__ = ["NodeDataset", "undirected", "random_split", "row_normalize_features"]
