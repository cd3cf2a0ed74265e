"""DistNE: embeddings of graphs too large for one machine, on Apache Spark, from embeddings of even-sized parts.

    z(v) = [ EMBED(G[V_p]) (v)  |  DISTNE(G[B]) (v) or 0 ],   v in V_p,   B = {v : v has a neighbour in another part}

Lin, "Large-Scale Network Embedding in Apache Spark", KDD 2021, arXiv:2106.10620. A graph is split into parts V_p, each
small enough for one task, and their subgraphs are embedded independently: the internal structure. The nodes on borders
between parts form a smaller graph, which is treated in the same way with its share of the columns: the external
structure. A level of n nodes of which m are on the border gives it floor(d m / (n + m)) of its d columns.

    spark = session("local[*]", memory="4g")
    result = embed(spark.read.parquet("edges"), Options(dim=128, leaf_nodes=1500))   # columns src and dst
    result.vectors.write.parquet("vectors")                                           # columns v and z

`partition.py` splits, `distributed.py` is the job, `leaf.py` what a task does, and `reference.py` the same in one
process of NumPy, whose vectors the job gives to the last bit, on any number of partitions and executors: all
randomness is a hash of the seed with node ids, or a key made of the seed, level and part. (Where executors have other
processors, a leaf's vectors may differ by rounding.) The driver sees only counts. Executors keep nodes and edges as
Spark does, spilling to disk; a task holds one leaf.

Names: k is `parts`, n_leaf `leaf_nodes`, d_min `min_dim`. Any `embedder(edges, num_nodes, dim, key)` can embed leaves
(`padded_operator` saves it compilations); the default is `netmf`. Isolated nodes have vectors of zeros.

Known of the paper are the scheme, the dimension rule and the zero padding. Chosen here: seeds of the growth are random;
a node joins the part that most of its neighbours have joined, unless that is full; label propagation then moves half of
all nodes at a time to where most of their neighbours are, if there is room (weighing votes by the free share of a part,
1 - size / cap, drives nodes out of full parts and cuts more edges); parts above `leaf_nodes` are split again,
before any is embedded; each leaf's vectors are scaled to a mean norm of 1; a border of over 95 % of the nodes, or at
`max_depth`, is the last; it is embedded in parts, so that no task ever holds more than `leaf_nodes`, unless
`last="whole"`; with `fusion="sum"` it is the internal vectors that are rotated, each part's to the frame that the
border shares, since parts have no frame in common.
"""

from jaxlab.graph.embedding.spark_embedding.distributed import Level, Result, embed, session
from jaxlab.graph.embedding.spark_embedding.leaf import Embedder, netmf, padded_operator
from jaxlab.graph.embedding.spark_embedding.options import Options, leaf_seed, xxhash64
from jaxlab.graph.embedding.spark_embedding.partition import partition
from jaxlab.graph.embedding.spark_embedding.reference import LocalLevel, LocalResult, reference

__all__ = [
  "Embedder",
  "Level",
  "LocalLevel",
  "LocalResult",
  "Options",
  "Result",
  "embed",
  "leaf_seed",
  "netmf",
  "padded_operator",
  "partition",
  "reference",
  "session",
  "xxhash64",
]
