"""Batch norms as part of the convolutions before them, on the graph of ``torch.export``."""

from typing import Any

import torch
from torch import fx
from torch.nn.utils.fusion import fuse_conv_bn_weights

_aten = torch.ops.aten
_CONVOLUTIONS = {
    _aten.conv1d.default, _aten.conv1d.padding, _aten.conv2d.default, _aten.conv2d.padding,
    _aten.conv3d.default, _aten.conv3d.padding,
}  # fmt: skip


def fold_batch_norms(graph_module: fx.GraphModule) -> int:
    """Fold those of evaluation mode that alone read a convolution of weights that it alone reads.

    Returns:
        How many there were.
    """
    found = 0
    for norm in list(graph_module.graph.nodes):
        if norm.target is not _aten.batch_norm.default:
            continue
        conv, gamma, beta, mean, variance, training, _, eps = norm.args[:8]
        if conv.target not in _CONVOLUTIONS or len(conv.users) > 1 or training:
            continue
        weight, bias = conv.args[1], conv.args[2] if len(conv.args) > 2 else None
        own = [weight, bias, mean, variance, gamma, beta]
        if any(x is not None and x.op != "get_attr" for x in own):
            continue
        w, b, *rest = (_tensor(graph_module, x) for x in own)
        if rest[0] is None:
            continue
        folded = fuse_conv_bn_weights(w, b, rest[0], rest[1], eps, rest[2], rest[3])
        with graph_module.graph.inserting_before(conv):
            names = []
            for kind, tensor in zip(("weight", "bias"), folded, strict=True):
                names.append(f"{conv.name}_folded_{kind}")
                graph_module.register_buffer(names[-1], tensor.detach())
            attributes = [graph_module.graph.get_attr(name) for name in names]
        conv.args = (conv.args[0], *attributes, *conv.args[3:])
        norm.replace_all_uses_with(conv)
        found += 1
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return found


def _tensor(graph_module: fx.GraphModule, node: fx.Node | None) -> Any:
    """What an attribute's node reads."""
    if node is None:
        return None
    owner, _, name = str(node.target).rpartition(".")
    return getattr(graph_module.get_submodule(owner), name)
