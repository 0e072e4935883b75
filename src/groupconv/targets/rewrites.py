"""Exact rewritings for formats that lack an operator, on the graph of ``torch.export``."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

_aten = torch.ops.aten
_VIEWS = {_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default}
_TRANSPOSED = {_aten.conv_transpose1d.default: 1, _aten.conv_transpose2d.input: 2}
_COPIES = {_aten.contiguous.default, _aten.clone.default}


def replace_shuffles(graph_module: fx.GraphModule) -> int:
    """Channel shuffles without a tensor of five axes: channels last, pixels as one axis.

    Returns:
        How many there were.
    """
    found = 0
    for node in list(graph_module.graph.nodes):
        shuffle = _shuffle(node)
        if shuffle is not None:
            x, groups = shuffle
            _replace(node, shuffled, (x, groups))
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
        if axes is None:
            continue
        x, weight, *rest = node.args
        ones, zeros = [1] * axes, [0] * axes
        bias, stride, padding, more, groups, dilation = _filled(
            rest, (None, ones, zeros, zeros, 1, ones)
        )
        if groups > 1 or any(padding) or any(more) or any(n != 1 for n in dilation):
            arguments = (x, weight, bias, stride, padding, more, groups, dilation)
            _replace(node, transposed, arguments)
            found += 1
    _finish(graph_module)
    return found


def shuffled(x: Tensor, groups: int) -> Tensor:
    """``torch.nn.functional.channel_shuffle`` of ``(N, C, H, W)``."""
    batch, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(-1, groups, channels // groups)
    return pixels.transpose(1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2)


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


def _filled(given: Sequence[Any], defaults: Sequence[Any]) -> list[Any]:
    return [*given, *defaults[len(given) :]]


def _replace(node: fx.Node, function: Any, arguments: tuple[Any, ...]) -> None:
    """A call of a function of ours in place of a node; the next capture sees what it does."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(function, arguments)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)


def _finish(graph_module: fx.GraphModule) -> None:
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
