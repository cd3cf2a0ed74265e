"""ForwardGNN: graph networks trained layer by layer with local losses; no gradient crosses a layer.

    z_l = ReLU(conv_l(n(z_{l-1}))),    n(z) = z / (|z| + 1e-8),    z_0 = features, of nodes and of C virtual nodes

    SF:  logits_i,c = z_i . z_{N+c},    loss_l = cross-entropy over training nodes,    predict sum_l softmax(logits_l)

The virtual node of a class is linked with its training nodes, so that one forward pass both makes the class a vector
and compares nodes with it.

Park, Wang, Simoulin, Yang, Yang, Rossi, Trivedi and Ahmed, "Forward Learning of Graph Neural Networks", ICLR 2024,
arXiv:2403.11004; code `facebookresearch/forwardgnn`.

| paper | here | trains |
|---|---|---|
| SF | `single_forward` | layer after layer |
| SF-Top-To-Input, SF-Top-To-Loss | `top_to_input`, `top_to_loss` | all layers in every epoch, each with its own loss |
| FF-LA, FF-VN | `label_appending`, `virtual_nodes` | layer after layer, with negative examples |
| FL-CE and its FF form, top-down FL-CE | `link_forward`, `link_top_down` | the same for links |
| BP | `backprop` | all layers end to end |

Each is a function of a `Net` and a `Recipe` that returns a `Method`: a learner for `train.fit` and a predictor. The
batch is a `NodeTask` or a `LinkTask`, which holds one graph and S splits; all splits train at once.

    task = forward_gnn.node_task(features, senders, receivers, labels, forward_gnn.node_splits(len(labels)))
    method = forward_gnn.single_forward(forward_gnn.Net(num_classes=7, depth=2))
    state = train.fit(method.learner, task, steps=method.steps, workdir=folder, key=key)

Symbols of the paper: theta is `theta`, tau `temperature`; a layer's goodness is sum_k z_k^2.

Differs from the official code: validation takes the outputs of the next forward pass, which are those of the parameters
to be validated; splits are trained together, a layer until the last of them stops; a graph with virtual nodes is the
given one with a border (`Bordered`), and inputs that stay are aggregated once. None of it changes a result. Edge splits
are drawn by NumPy. Labels are not appended to the features of single-forward algorithms, as in the official scripts.
"""

from jaxlab.graph.nets.forward_gnn.convolution import (
  Bordered,
  Conv,
  Stacked,
  aggregate,
  bordered,
  from_torch,
  frozen_aggregate,
  normalize,
  product,
  stack,
)
from jaxlab.graph.nets.forward_gnn.engine import Method, Net, Recipe, State, class_links
from jaxlab.graph.nets.forward_gnn.joint import backprop, link_top_down, top_to_input, top_to_loss
from jaxlab.graph.nets.forward_gnn.layerwise import (
  Streams,
  class_logits,
  goodness_loss,
  label_appending,
  link_forward,
  outputs,
  single_forward,
  virtual_nodes,
  wrong_classes,
)
from jaxlab.graph.nets.forward_gnn.tasks import LinkTask, NodeTask, Pairs, link_task, node_splits, node_task

__all__ = [
  "Bordered",
  "Conv",
  "LinkTask",
  "Method",
  "Net",
  "NodeTask",
  "Pairs",
  "Recipe",
  "Stacked",
  "State",
  "Streams",
  "aggregate",
  "backprop",
  "bordered",
  "class_links",
  "class_logits",
  "from_torch",
  "frozen_aggregate",
  "goodness_loss",
  "label_appending",
  "link_forward",
  "link_task",
  "link_top_down",
  "node_splits",
  "node_task",
  "normalize",
  "outputs",
  "product",
  "single_forward",
  "stack",
  "top_to_input",
  "top_to_loss",
  "virtual_nodes",
  "wrong_classes",
]
