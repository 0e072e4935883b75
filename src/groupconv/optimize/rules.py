"""What each operator does to the channels, in one table.

An operator that no rule names, and that PyTorch doesn't tag as pointwise, forbids to move whatever
it reads. Sums over channels (means, softmax, normalization) don't depend on their order, up to
rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from groupconv.optimize.layers import convolution, linear
from groupconv.optimize.moves import MOVES, moved
from groupconv.optimize.ties import Hashes, mix
from groupconv.optimize.values import Channels, Layer, Scattered, settle, spread, tied
from groupconv.optimize.walk import Walk, arguments, flat, operator, shape

Rule = Callable[[Walk, fx.Node], None]

# Axes that a sum may run over where the channels lie along several.
_FEW = 16


def apply(walk: Walk, node: fx.Node) -> None:
    """Apply the rule of the node's operator."""
    name = operator(node)
    rule = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
    if rule is not None:
        rule(walk, node)
    elif torch.Tag.pointwise in getattr(node.target, "tags", ()):
        pointwise(walk, node)
    else:
        walk.forget(node)


def same(walk: Walk, node: fx.Node) -> None:
    """The first argument's elements, unchanged."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value = walk.value(source)
    if value is None:
        walk.forget(node)
    else:
        walk.put(node, value)


def item(walk: Walk, node: fx.Node) -> None:
    """One tensor of a list."""
    source, index = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(index, int)
    values = walk.values(source)
    walk.put(node, values[index] if values else None)


def silent(walk: Walk, node: fx.Node) -> None:
    """A check of sizes or types: makes nothing."""


def pointwise(walk: Walk, node: fx.Node) -> None:
    """Every element is made from the elements that stand at its place, after broadcasting."""
    size = shape(node)
    nodes = [n for n in flat([node.args, *node.kwargs.values()]) if isinstance(n, fx.Node)]
    values = [walk.value(n) for n in nodes]
    along = {
        v.axis + len(size) - len(shape(n))
        for n, v in zip(nodes, values, strict=True)
        if isinstance(v, Channels) and len(v.cells) > 1
    }
    if len(along) != 1 or any(isinstance(v, Scattered) for v in values):
        _elementwise(walk, node, nodes)
        return
    (axis,) = along
    cells = walk.ties.open(size[axis])
    for number, n in enumerate(nodes):
        own = axis - len(size) + len(shape(n))
        if own >= 0 and shape(n)[own] > 1:
            walk.ties.tie(cells, walk.read(n, own), mix(number))
        elif walk.tensor(n) is not None:
            # It varies along other axes only, and those stay as they are.
            walk.freeze(n, f"read by {walk.label(node)}")
    walk.put(node, Channels(axis, cells))


def _elementwise(walk: Walk, node: fx.Node, nodes: Sequence[fx.Node]) -> None:
    """The same where the channels of the operands lie along several axes."""
    values, size = [walk.value(n) for n in nodes], shape(node)
    varied = [
        v is None and torch.Size(shape(n)).numel() > 1 for n, v in zip(nodes, values, strict=True)
    ]
    layers = [
        Layer(layer.cells.expand(size), _distinct(layer.places, number).expand(size))
        for number, (n, value) in enumerate(zip(nodes, values, strict=True))
        if value is not None
        for layer in spread(value, shape(n))
    ]
    if any(varied) or not layers:
        walk.forget(node)
    else:
        walk.put(node, settle(walk.ties, tuple(layers)))


def _distinct(places: Tensor, number: int) -> Tensor:
    """Places, hashed with the number of the operand."""
    return places * 2_654_435_761 + number + 1


def channelwise(walk: Walk, node: fx.Node) -> None:
    """Each channel on axis 1 is made from the same channel of the first argument."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value: Any = node.meta.get("val")
    size = shape(node) if isinstance(value, Tensor) else tuple(value[0].shape)
    if len(size) < 3 or len(shape(source)) != len(size) or size[1] != shape(source)[1]:
        walk.forget(node)
        return
    walk.write(node, 1, walk.read(source, 1))
    if not isinstance(value, Tensor):
        # A pool that also says where each maximum was.
        walk.put(node, [walk.value(node), None])


def padded(walk: Walk, node: fx.Node) -> None:
    """Padding; what stands beside the channels is constant and can't move."""
    given = arguments(node)
    source, pads = node.args[0], given["pad"]
    assert isinstance(source, fx.Node)
    ndim = len(shape(source))
    first = ndim - len(pads) // 2
    before, after = [0, 0] if first > 1 else pads[2 * (ndim - 2) : 2 * (ndim - 1)]
    constant = given.get("mode", "constant") == "constant"
    if before == after == 0 and first > 0:
        channelwise(walk, node)
    elif first < 1 or not constant or min(before, after) < 0:
        walk.forget(node)
    else:
        reads = walk.read(source, 1)
        index = np.arange(before, before + len(reads))
        cells = tied(walk.ties, shape(node)[1], reads, mix(0 * index), index)
        walk.ties.fix(np.delete(cells, index), "padded with constants")
        walk.put(node, Channels(1, cells))


def reduced(walk: Walk, node: fx.Node) -> None:
    """A mean, sum or maximum over some axes."""
    source, given = node.args[0], arguments(node)
    assert isinstance(source, fx.Node)
    value, ndim = walk.value(source), len(shape(source))
    dims = given.get("dim")
    dims = list(range(ndim)) if dims in (None, []) else dims
    gone = {d % ndim for d in ([dims] if isinstance(dims, int) else dims)}
    kept = bool(given.get("keepdim"))
    if value is None or walk.tensor(source) is not None:
        walk.forget(node)
    elif isinstance(value, Channels) and value.axis in gone:
        walk.put(node, None)
    elif isinstance(value, Channels):
        axis = value.axis - (0 if kept else sum(d < value.axis for d in gone))
        walk.write(node, axis, value.cells)
    elif len(gone) == 1 and shape(source)[min(gone)] <= _FEW:
        (dim,) = gone
        parts = [
            layer.map(lambda t, i=i: t.narrow(dim, i, 1) if kept else t.select(dim, i))  # type: ignore[misc]
            for layer in value.layers
            for i in range(shape(source)[dim])
        ]
        walk.put(node, settle(walk.ties, tuple(parts)))
    else:
        walk.forget(node)


def softmax(walk: Walk, node: fx.Node) -> None:
    """It may sum over the channels, or over axes beside them."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value = walk.value(source)
    if isinstance(value, Channels) and walk.tensor(source) is None:
        walk.write(node, value.axis, value.cells)
    else:
        walk.forget(node)


def batch_norm(walk: Walk, node: fx.Node) -> None:
    """One scale and shift for each channel, made from vectors over the channels or from itself."""
    _scaled(walk, node, node.args[0], node.args[1:5], 1, 0, mix(0))


def group_norm(walk: Walk, node: fx.Node) -> None:
    """Statistics over groups of channels: an order may change within each."""
    given, channels = arguments(node), shape(node)[1]
    group = np.arange(channels) // (channels // given["num_groups"])
    _scaled(walk, node, given["input"], [given["weight"], given["bias"]], 1, 0, mix(group))


def layer_norm(walk: Walk, node: fx.Node) -> None:
    """Statistics over the last axes, along which the weights run too."""
    given = arguments(node)
    source, axes = given["input"], len(given["normalized_shape"])
    value = walk.value(source)
    vectors = [given["weight"], given.get("bias")]
    if not isinstance(value, Channels):
        walk.forget(node)
    elif (own := value.axis - len(shape(node)) + axes) >= 0:
        _scaled(walk, node, source, vectors, value.axis, own, mix(0))
    else:
        walk.fix([v for v in vectors if isinstance(v, fx.Node)], f"read by {walk.label(node)}")
        walk.write(node, value.axis, value.cells)


def prelu(walk: Walk, node: fx.Node) -> None:
    """One slope for each channel, or one for all."""
    source, slope = node.args
    assert isinstance(slope, fx.Node)
    slopes = [] if torch.Size(shape(slope)).numel() == 1 else [slope]
    _scaled(walk, node, source, slopes, 1, 0, mix(0))


def _scaled(
    walk: Walk, node: fx.Node, source: Any, vectors: Sequence[Any], axis: int, own: int, how: Hashes
) -> None:
    """Channels along ``axis``, made from the source's and from vectors' axis ``own``."""
    cells = walk.ties.open(shape(node)[axis])
    walk.ties.tie(cells, walk.read(source, axis), how)
    for number, vector in enumerate(vectors):
        if isinstance(vector, fx.Node):
            walk.ties.tie(cells, walk.read(vector, own), mix(1, number))
    walk.put(node, Channels(axis, cells))


# fmt: off
_RULES: dict[str, Rule] = {
    "getitem": item, "_assert_tensor_metadata": silent, "sym_size": silent,
    "pad": padded, "constant_pad_nd": padded,
    "linear": linear, "prelu": prelu, "softmax": softmax, "log_softmax": softmax,
    "batch_norm": batch_norm, "group_norm": group_norm, "instance_norm": batch_norm,
    "layer_norm": layer_norm, "rms_norm": layer_norm,
    **dict.fromkeys(MOVES, moved),
    **dict.fromkeys((f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)), convolution),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std"), reduced),
    **dict.fromkeys((
        "clone", "contiguous", "detach", "alias", "lift_fresh_copy", "dropout", "feature_dropout",
        "alpha_dropout", "feature_alpha_dropout",
    ), same),
    # Not tagged as pointwise, though they are.
    **dict.fromkeys((
        "to", "_to_copy", "type_as", "relu6", "hardswish", "logsigmoid", "log_sigmoid",
    ), pointwise),
    **dict.fromkeys((
        *(f"{kind}_pool{n}d" for kind in ("max", "avg", "lp") for n in (1, 2, 3)),
        *(f"adaptive_{kind}_pool{n}d" for kind in ("max", "avg") for n in (1, 2, 3)),
        *(f"max_pool{n}d_with_indices" for n in (2, 3)),
        "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
        "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
        "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
        "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    ), channelwise),
}
# fmt: on
