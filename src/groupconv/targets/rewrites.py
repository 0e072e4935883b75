"""Exact rewritings for formats that lack an operator, on the graph of ``torch.export``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

_aten = torch.ops.aten
_VIEWS = {_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default}
_TRANSPOSED = {
    _aten.conv_transpose1d.default: 1,
    _aten.conv_transpose2d.input: 2,
    _aten.conv_transpose3d.input: 3,
}
_COPIES = {_aten.contiguous.default, _aten.clone.default}


def replace_shuffles(
    graph_module: fx.GraphModule, function: Callable[[Tensor, int], Tensor] | None = None
) -> int:
    """Channel shuffles as a function has them.

    Args:
        function: by default :func:`shuffled`, which needs no tensor of five axes.

    Returns:
        How many there were.
    """
    found = 0
    for node in list(graph_module.graph.nodes):
        shuffle = _shuffle(node)
        if shuffle is not None:
            x, groups = shuffle
            _replace(node, function or shuffled, (x, groups))
            found += 1
    _finish(graph_module)
    return found


def replace_transposed(graph_module: fx.GraphModule) -> int:
    """Transposed convolutions as plain ones, but for those without groups, dilation or padding.

    Returns:
        How many there were.
    """
    found = 0
    for node in list(graph_module.graph.nodes):
        axes = _TRANSPOSED.get(node.target)
        if axes is None or axes == 3:
            continue
        arguments = _transposed_arguments(node, axes)
        padding, more, groups, dilation = arguments[4:]
        if groups > 1 or any(padding) or any(more) or any(n != 1 for n in dilation):
            _replace(node, transposed, arguments)
            found += 1
    _finish(graph_module)
    return found


def shuffled(x: Tensor, groups: int) -> Tensor:
    """``torch.nn.functional.channel_shuffle`` of ``(N, C, H, W)``: channels last, pixels as one
    axis."""
    batch, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(-1, groups, channels // groups)
    return pixels.transpose(1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def shuffled_by_views(x: Tensor, groups: int) -> Tensor:
    """The same in three steps, by way of five axes."""
    split = x.unflatten(1, (groups, x.shape[1] // groups))
    return split.transpose(1, 2).reshape(x.shape)


def shuffled_by_index(x: Tensor, groups: int) -> Tensor:
    """The same in one step, whatever the other sizes are."""
    order = torch.arange(x.shape[1]).unflatten(0, (groups, x.shape[1] // groups))
    return x.index_select(1, order.T.flatten())


def replace_output_padding(graph_module: fx.GraphModule) -> int:
    """Transposed convolutions with more output padding than padding, or with any in three axes, as
    ones with neither, whose result is cut and filled.

    Returns:
        How many there were.
    """
    found = 0
    for node in list(graph_module.graph.nodes):
        axes = _TRANSPOSED.get(node.target)
        if axes is None:
            continue
        arguments = _transposed_arguments(node, axes)
        padding, more = arguments[4:6]
        if any(n > (0 if axes == 3 else p) for p, n in zip(padding, more, strict=True)):
            _replace(node, transposed_then_cut, arguments)
            found += 1
    _finish(graph_module)
    return found


def transposed_then_cut(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    """A transposed convolution: what lies beyond the reach of all kernels is the bias alone."""
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(stride) - 1]
    y = function(x, weight, None, stride, 0, 0, groups, dilation)
    filling: list[int] = []
    for axis, (n, more) in enumerate(zip(padding, output_padding, strict=True), start=2):
        y = y.narrow(axis, n, y.shape[axis] - n - max(n - more, 0))
        filling = [0, max(more - n, 0), *filling]
    y = F.pad(y, filling)
    return y if bias is None else y + bias.reshape(-1, *[1] * len(stride))


def replace_circular_padding(graph_module: fx.GraphModule) -> int:
    """Circular padding as the joining of slices.

    Returns:
        How many there were.
    """
    found = 0
    for node in list(graph_module.graph.nodes):
        if node.target is _aten.pad.default and node.args[2:3] == ("circular",):
            _replace(node, joined, node.args[:2])
            found += 1
    _finish(graph_module)
    return found


def joined(x: Tensor, sides: Sequence[int]) -> Tensor:
    """``torch.nn.functional.pad`` in circular mode."""
    for number in range(len(sides) // 2):
        axis = x.ndim - 1 - number
        before, after = sides[2 * number : 2 * number + 2]
        parts = [x]
        if before:
            parts.insert(0, x.narrow(axis, x.shape[axis] - before, before))
        if after:
            parts.append(x.narrow(axis, 0, after))
        x = torch.cat(parts, axis) if len(parts) > 1 else x
    return x


def transposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    """``torch.nn.functional.conv_transpose2d``, or 1d, as a convolution of the image with zeros
    between its pixels: as many times the arithmetic as the strides multiply to."""
    into, out = weight.shape[0] // groups, weight.shape[1]
    axes = list(range(2, weight.ndim))
    flipped = weight.unflatten(0, (groups, into)).transpose(1, 2).flatten(0, 1).flip(axes)
    kept = torch.zeros([n * step for n, step in zip(x.shape[2:], stride, strict=True)])
    kept[tuple(slice(None, None, step) for step in stride)] = 1
    spread = F.interpolate(x, scale_factor=[float(n) for n in stride], mode="nearest") * kept
    sides: list[int] = []
    for axis in reversed(range(len(stride))):
        reach = dilation[axis] * (weight.shape[2 + axis] - 1) - padding[axis]
        # After the last pixel there are zeros already.
        sides += [reach, reach + output_padding[axis] - (stride[axis] - 1)]
    assert out * groups == len(flipped)
    convolve = F.conv1d if len(stride) == 1 else F.conv2d
    return convolve(F.pad(spread, sides), flipped, bias, 1, 0, dilation, groups)


def _shuffle(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The input and the groups of the shuffle that ends with ``node``."""
    if node.target is _aten.channel_shuffle.default:
        x, groups = node.args
        assert isinstance(x, fx.Node)
        assert isinstance(groups, int)
        return (x, groups) if len(_shape(x)) == 4 else None
    if node.target not in _VIEWS:
        return None
    turned = _before(node)
    while turned is not None and turned.target in _COPIES:
        turned = _before(turned)
    if turned is None or turned.target is not _aten.transpose.int:
        return None
    split = _before(turned)
    if split is None or split.target not in _VIEWS:
        return None
    x = _before(split)
    if x is None or len(_shape(x)) != 4 or _shape(node) != _shape(x):
        return None
    parts, (batch, _, *size) = _shape(split), _shape(x)
    if len(parts) != 5 or (parts[0], *parts[3:]) != (batch, *size):
        return None
    axes = {axis % 5 for axis in turned.args[1:] if isinstance(axis, int)}
    return (x, parts[1]) if axes == {1, 2} else None


def _before(node: fx.Node) -> fx.Node | None:
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _transposed_arguments(node: fx.Node, axes: int) -> tuple[Any, ...]:
    """Input, weight, bias, stride, padding, output padding, groups and dilation."""
    ones, zeros = [1] * axes, [0] * axes
    defaults = (None, ones, zeros, zeros, 1, ones)
    return (*node.args, *defaults[len(node.args) - 2 :])


def _replace(node: fx.Node, function: Any, arguments: tuple[Any, ...]) -> None:
    """A call of a function of ours in place of a node; the next capture sees what it does."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(function, arguments)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)


def _finish(graph_module: fx.GraphModule) -> None:
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
