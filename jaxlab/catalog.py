"""The table of the 63 systems. Documentation, tests and the README read it; nothing else lists systems.

A system's slug is the name of its module, experiment, benchmark and test, so only the room is stored.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class System:
  """One published system.

  Attributes:
    slug: the module's name.
    room: the package it lives in, below `jaxlab`.
    name: the authors' short name.
    paper: title of the paper.
    arxiv: arXiv identifier.
    status: "done" once module, tests, experiment and benchmark stand; "planned" before.
  """

  slug: str
  room: str
  name: str
  paper: str
  arxiv: str
  status: str = "planned"

  @property
  def module(self) -> str:
    """Dotted path of the module."""
    return f"jaxlab.{self.room}.{self.slug}"

  @property
  def experiment(self) -> str:
    """Path of the experiment's script in a checkout."""
    return f"experiments/{self.slug}.py"


# fmt: off
SYSTEMS: tuple[System, ...] = (
  System("smt", "models", "SMT", "Scale-Aware Modulation Meet Transformer", "2307.08579", "done"),
  System("segman", "models", "SegMAN", "SegMAN: Omni-scale Context Modeling with State Space Models and Local Attention for Semantic Segmentation", "2412.11890", "done"),
  System("maformer", "models", "MAFormer", "MAFormer: A Transformer Network with Multi-scale Attention Fusion for Visual Recognition", "2209.01620"),
  System("cvmh_unet", "models", "CVMH-UNet", "Remote Sensing Image Segmentation Using Vision Mamba and Multi-Scale Multi-Frequency Feature Fusion", "2410.05624", "done"),
  System("medusa", "models", "MEDUSA", "MEDUSA: Multi-scale Encoder-Decoder Self-Attention Deep Neural Network Architecture for Medical Image Analysis", "2110.06063"),
  System("maniqa", "models", "MANIQA", "MANIQA: Multi-dimension Attention Network for No-Reference Image Quality Assessment", "2204.08958", "done"),
  System("stu_net", "models", "STU-Net", "STU-Net: Scalable and Transferable Medical Image Segmentation Models Empowered by Large-Scale Supervised Pre-training", "2304.06716", "done"),
  System("varifocal_net", "models", "Varifocal-Net", "Varifocal-Net: A Chromosome Classification Approach using Deep Convolutional Networks", "1810.05943"),
  System("hmode", "models", "HMoDE", "Redesigning Multi-Scale Neural Network for Crowd Counting", "2208.02894"),
  System("rcnet", "models", "RCNet", "RCNet: Reverse Feature Pyramid and Cross-scale Shift Network for Object Detection", "2110.12130"),
  System("connnet", "models", "ConnNet", "ConnNet: A Long-Range Relation-Aware Pixel-Connectivity Network for Salient Segmentation", "1804.07836"),
  System("topnet", "models", "TopNet", "TopNet: Transformer-based Object Placement Network for Image Compositing", "2304.03372"),
  System("glace", "models", "GLACE", "GLACE: Global Local Accelerated Coordinate Encoding", "2406.04340"),
  System("ordinal_shading", "models", "Ordinal shading", "Intrinsic Image Decomposition via Ordinal Shading", "2311.12792"),
  System("iagc", "models", "IAGC", "Low-Light Image Enhancement with Illumination-Aware Gamma Correction and Complete Image Modelling Network", "2308.08220"),
  System("parot", "models", "PaRot", "PaRot: Patch-Wise Rotation-Invariant Network via Feature Disentanglement and Pose Restoration", "2302.02331", "done"),
  System("scalelong", "models", "ScaleLong", "ScaleLong: Towards More Stable Training of Diffusion Model via Scaling Network Long Skip Connection", "2310.13545", "done"),
  System("decentralized_diffusion", "models", "DDM", "Decentralized Diffusion Models", "2501.05450"),
  System("fast_fourier_cnn", "models", "FFDNN", "A Fast Fourier Convolutional Deep Neural Network For Accurate and Explainable Discrimination Of Wheat Yellow Rust And Nitrogen Deficiency From Sentinel-2 Time-Series Data", "2306.17207"),
  System("mip_hypernetwork", "models", "MIP", "Magnitude Invariant Parametrizations Improve Hypernetwork Learning", "2304.07645"),
  System("dagnn", "graph.nets", "DAGNN", "Towards Deeper Graph Neural Networks", "2007.09296", "done"),
  System("sir_gcn", "graph.nets", "SIR-GCN", "Contextualized Messages Boost Graph Representations", "2403.12529", "done"),
  System("graph_mamba", "graph.nets", "Graph Mamba", "Graph Mamba: Towards Learning on Graphs with State Space Models", "2402.08678", "done"),
  System("large_graph_transformer", "graph.nets", "LargeGT", "Graph Transformers for Large Graphs", "2312.11109"),
  System("subgraph_equivariant", "graph.nets", "SPEN", "Subgraph Permutation Equivariant Networks", "2111.11840"),
  System("local_augmentation", "graph.nets", "LAGNN", "Local Augmentation for Graph Neural Networks", "2109.03856", "done"),
  System("forward_gnn", "graph.nets", "ForwardGNN", "Forward Learning of Graph Neural Networks", "2403.11004", "done"),
  System("oneforecast", "graph.nets", "OneForecast", "OneForecast: A Universal Framework for Global and Regional Weather Forecasting", "2502.00338"),
  System("recurrent_graph_evolution", "graph.nets", "ReGENN", "From Cities to Series: Complex Networks and Deep Learning for Improved Spatial and Temporal Analytics", "2206.01176"),
  System("graphfm", "graph.nets", "GraphFM", "GraphFM: A Comprehensive Benchmark for Graph Foundation Model", "2406.08310"),
  System("neural_common_neighbor", "graph.links", "NCN, NCNC", "Neural Common Neighbor with Completion for Link Prediction", "2302.00890", "done"),
  System("nat", "graph.links", "NAT", "Neighborhood-aware Scalable Temporal Network Representation Learning", "2209.01084", "done"),
  System("topological_concentration", "graph.links", "TC", "A Topological Perspective on Demystifying GNN-Based Link Prediction Performance", "2310.04612", "done"),
  System("simplicial_closure", "graph.links", "ScHoLP", "Simplicial closure and higher-order link prediction", "1802.06916"),
  System("netinfof", "graph.links", "NetInfoF", "NetInfoF Framework: Measuring and Exploiting Network Usable Information", "2402.07999"),
  System("commuter_network", "graph.links", "Commuter network", "Reconstructing commuters network using machine learning and urban indicators", "1908.03512"),
  System("fastrp", "graph.embedding", "FastRP", "Fast and Accurate Network Embeddings via Very Sparse Random Projection", "1908.11512", "done"),
  System("graphvite", "graph.embedding", "GraphVite", "GraphVite: A High-Performance CPU-GPU Hybrid System for Node Embedding", "1903.00757", "done"),
  System("graphlet_orbits", "graph.embedding", "GRADCO", "Graphlets correct for the topological information missed by random walks", "2405.14194", "done"),
  System("spark_embedding", "graph.embedding", "DistNE", "Large-Scale Network Embedding in Apache Spark", "2106.10620", "done"),
  System("hnsw", "graph.search", "HNSW", "Efficient and robust approximate nearest neighbor search using Hierarchical Navigable Small World graphs", "1603.09320", "done"),
  System("minhash_communities", "graph.search", "MinHash communities", "Real-time community detection in large social networks on a laptop", "1601.03958", "done"),
  System("noisy_label_clustering", "graph.search", "LFD", "Local Graph Clustering with Noisy Labels", "2310.08031", "done"),
  System("random_spatial_networks", "graph.generators", "RSN", "Random Spatial Networks: Small Worlds without Clustering, Traveling Waves, and Hop-and-Spread Disease Dynamics", "1702.01252"),
  System("auglocal", "learning", "AugLocal", "Scaling Supervised Local Learning with Augmented Auxiliary Networks", "2402.17318", "done"),
  System("momentum_auxiliary", "learning", "MAN", "Momentum Auxiliary Network for Supervised Local Learning", "2407.05623", "done"),
  System("local_transformer", "learning", "InfoPro-L", "Local Learning on Transformers via Feature Reconstruction", "2212.14215"),
  System("prockd", "learning", "ProC-KD", "Prototype-guided Cross-task Knowledge Distillation for Large-scale Models", "2212.13180"),
  System("mend", "learning", "MEND", "Fast Model Editing at Scale", "2110.11309", "done"),
  System("transformable_search", "learning", "TAS", "Network Pruning via Transformable Architecture Search", "1905.09717", "done"),
  System("meta_pruning", "learning", "Meta pruning", "Meta Pruning via Graph Metanetworks: A Universal Meta Learning Framework for Network Pruning", "2506.12041"),
  System("data_pruning", "learning", "Data pruning", "Beyond neural scaling laws: beating power law scaling via data pruning", "2206.14486"),
  System("gais", "learning", "GAIS", "Scalable Graph Attention-based Instance Selection via Mini-Batch Sampling and Hierarchical Hashing", "2502.20293"),
  System("fractal_pretraining", "learning", "Fractal pre-training", "Improving Fractal Pre-training", "2110.03091"),
  System("fed_pub", "decentral", "FED-PUB", "Personalized Subgraph Federated Learning", "2206.10206"),
  System("modest", "decentral", "MoDeST", "MoDeST: Bridging the Gap between Federated and Decentralized Learning with Decentralized Sampling", "2302.13837", "done"),
  System("single_merging", "decentral", "Single merging", "A Single Merging Suffices: Recovering Server-based Learning Performance in Decentralized Learning", "2507.06542", "done"),
  System("disrupted_p2p", "decentral", "Disrupted P2P", "Exploring the Impact of Disrupted Peer-to-Peer Communications on Fully Decentralized Learning in Disaster Scenarios", "2310.02986", "done"),
  System("fedzip", "decentral", "FedZip", "FEDZIP: A Compression Framework for Communication-Efficient Federated Learning", "2102.01593", "done"),
  System("local_lipschitz", "analysis", "Lip-CROWN", "Efficiently Computing Local Lipschitz Constants of Neural Networks via Bound Propagation", "2210.07394", "done"),
  System("local_interaction_basis", "analysis", "LIB", "The Local Interaction Basis: Identifying Computationally-Relevant and Sparsely Interacting Features in Neural Networks", "2405.10928", "done"),
  System("scaling_laws", "analysis", "Scaling laws", "Explaining Neural Scaling Laws", "2102.06701"),
  System("locality_separation", "analysis", "DSD", "Role of Locality and Weight Sharing in Image-Based Tasks: A Sample Complexity Separation between CNNs, LCNs, and FCNs", "2403.15707"),
)
# fmt: on


def get(slug: str) -> System:
  """Returns the system called `slug`.

  Raises:
    ValueError: there is no such system.
  """
  for system in SYSTEMS:
    if system.slug == slug:
      return system
  raise ValueError(f"slug: got {slug!r}, expected one of {', '.join(s.slug for s in SYSTEMS)}")


def done() -> tuple[System, ...]:
  """Returns the systems that stand."""
  return tuple(system for system in SYSTEMS if system.status == "done")


def markdown() -> str:
  """Returns the table that README shows."""
  lines = ["| system | paper | module | status |", "|---|---|---|---|"]
  for s in SYSTEMS:
    paper = f"[{s.paper}](https://arxiv.org/abs/{s.arxiv})"
    lines.append(f"| {s.name} | {paper} | `{s.module}` | {s.status} |")
  return "\n".join(lines) + "\n"
