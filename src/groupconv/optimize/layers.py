"""Convolutions and linear layers: weights with an axis for what they read and one for what they
write.

The order of channels passes through a depthwise layer. In a layer of wider groups it may change
within each group; that groups could also change places as wholes is not used.
"""

from typing import Any

import numpy as np
from torch import fx, nn

from groupconv.kernels.spec import ConvSpec, same_padding
from groupconv.optimize.ties import Cells, mix
from groupconv.optimize.values import Channels
from groupconv.optimize.walk import Call, Walk, arguments, operator, shape

_PADS = ("pad", "constant_pad_nd")


def linear(walk: Walk, node: fx.Node) -> None:
    """A matrix over the last axis."""
    source, weight, bias = (*node.args, None)[:3]
    assert isinstance(source, fx.Node)
    assert isinstance(weight, fx.Node)
    value, last = walk.value(source), len(shape(source)) - 1
    if isinstance(value, Channels) and 0 < value.axis < last:
        # It mixes positions of an axis beside the channels, alike in each of them.
        walk.fix(
            [n for n in node.all_input_nodes if n is not source], f"read by {walk.label(node)}"
        )
        walk.write(node, value.axis, value.cells)
    elif walk.tensor(weight) is None:
        walk.forget(node)
    else:
        reads = walk.read(source, last)
        walk.ties.tie(walk.parameter(weight, 1), reads, walk.call(node))
        cells = walk.ties.open(shape(node)[last])
        walk.ties.tie(cells, walk.parameter(weight, 0), mix(0))
        _add_bias(walk, cells, bias)
        walk.put(node, Channels(last, cells))
        if last == 1:
            walk.calls.append(Call(node, *_linear_layer(walk, node, weight), reads, cells))


def convolution(walk: Walk, node: fx.Node) -> None:
    """A convolution, transposed or not, of a parameter."""
    given = arguments(node)
    source, weight, groups = given["input"], given["weight"], given["groups"]
    unbatched = len(shape(source)) < len(shape(weight))
    if unbatched or walk.tensor(weight) is None:
        why = "the input has no batch axis" if unbatched else "the weight is computed"
        walk.skipped[walk.caller(node) or node.name] = why
        walk.forget(node)
        return
    transposed = operator(node).startswith("conv_transpose")
    reads, writes = walk.read(source, 1), walk.ties.open(shape(node)[1])
    width, copies = len(reads) // groups, len(writes) // groups
    rows = walk.parameter(weight, 0)
    if groups > 1 and width == 1:
        # Every output is made from one input.
        index = np.arange(len(writes))
        walk.ties.tie(writes, reads[index // copies], mix(2, index % copies))
        walk.ties.tie(rows, reads if transposed else writes, walk.call(node))
    else:
        blocks = walk.parameter(weight, 1, groups)
        into, out = (rows, blocks) if transposed else (blocks, rows)
        walk.ties.tie(into, reads, mix(walk.call(node), np.arange(len(reads)) // width))
        walk.ties.tie(writes, out, mix(3, np.arange(len(writes)) // copies))
    _add_bias(walk, writes, given["bias"])
    walk.put(node, Channels(1, writes))
    walk.calls.append(Call(node, *_layer(walk, node, given), reads, writes))


def _add_bias(walk: Walk, writes: Cells, bias: Any) -> None:
    if isinstance(bias, fx.Node):
        walk.ties.tie(writes, walk.read(bias, 0), mix(1))


def _linear_layer(walk: Walk, node: fx.Node, weight: fx.Node) -> tuple[str, ConvSpec | str]:
    """The name of the module that a linear layer is, and its sizes, or what else it is."""
    name = walk.caller(node)
    owner, _, parameter = (walk.name(weight) or "").rpartition(".")
    module = walk.modules.get(owner)
    if parameter != "weight" or type(module) is not nn.Linear or walk.modules[name] is not module:
        return name or node.name, "its weight is not that of a linear module"
    if why := _elsewhere(walk, weight, module):
        return name, why
    return name, ConvSpec(
        batch=shape(node)[0],
        in_channels=module.in_features,
        out_channels=module.out_features,
        input_size=(),
        kernel_size=(),
        stride=(),
        padding=(),
        dilation=(),
        groups=1,
    )


def _layer(walk: Walk, node: fx.Node, given: dict[str, Any]) -> tuple[str, ConvSpec | str]:
    """The name of the module that a convolution is, and its sizes, or what else it is."""
    name = walk.caller(node)
    owner, _, parameter = (walk.name(given["weight"]) or "").rpartition(".")
    if parameter != "weight" or not isinstance(walk.modules[owner], nn.modules.conv._ConvNd):
        return name or node.name, "its weight is not that of a convolution module"
    if why := _elsewhere(walk, given["weight"], walk.modules[owner]):
        return owner, why
    # A module of several names is known by the one that the forward pass uses.
    return name, _sizes(walk, node, name, given)


def _elsewhere(walk: Walk, weight: fx.Node, module: nn.Module) -> str | None:
    readers = [r for r in weight.users if walk.modules[walk.caller(r)] is not module]
    return f"its weight is read by {readers[0].name} too, outside the module" if readers else None


def _sizes(walk: Walk, node: fx.Node, name: str, given: dict[str, Any]) -> ConvSpec | str:
    module, source = walk.modules[name], given["input"]
    assert isinstance(module, nn.modules.conv._ConvNd)
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    if module.transposed:
        return "a transposed convolution"
    size, padding = shape(source), _padding(module)
    if walk.caller(source) == name and operator(source) in _PADS and name:
        # A subclass that pads to the size that TensorFlow's "same" gives.
        source, pads = source.args[0], source.args[1]
        pairs = list(zip(pads[::2], pads[1::2], strict=True))[::-1]
        if len(pairs) != len(padding) or arguments(given["input"]).get("value"):
            return "its forward computes more than a convolution"
        size = shape(source)
        padding = tuple((a + c, b + d) for (a, b), (c, d) in zip(padding, pairs, strict=True))
    around = [source, *node.users] if name else []
    if any(n.op == "call_function" and walk.caller(n) == name for n in around):
        return "its forward computes more than a convolution"
    own = (list(module.stride), list(module.dilation), module.groups)
    if own != (given["stride"], given["dilation"], given["groups"]):
        return "its forward does not use its own stride, dilation and groups"
    return ConvSpec(
        batch=size[0],
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        input_size=tuple(size[2:]),
        kernel_size=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=padding,
        dilation=tuple(module.dilation),
        groups=module.groups,
    )


def _padding(module: nn.modules.conv._ConvNd) -> tuple[tuple[int, int], ...]:
    if module.padding == "same":
        return tuple(same_padding(module.kernel_size, module.dilation))
    if isinstance(module.padding, str):
        return ((0, 0),) * len(module.kernel_size)
    return tuple((p, p) for p in module.padding)
