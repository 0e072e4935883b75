"""What a graph means: its operators in plain PyTorch, and the rules that its nodes keep."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from groupconv.compiler.graph import (
    FUNCTIONS,
    AdaptivePool,
    Concat,
    Convolution,
    Gather,
    Graph,
    Host,
    Input,
    Instruction,
    LayerNorm,
    Map,
    Node,
    Pad,
    Pool,
    Relayout,
    Softmax,
    Upsample,
    Value,
    View,
)
from groupconv.kernels.spec import ACTIVATIONS, ConvSpec

_CALLS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "prelu": lambda x, slope: torch.where(x > 0, x, slope * x),
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu": F.elu,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "neg": torch.neg,
    "abs": torch.abs,
    "clamp": torch.clamp,
    "softplus": F.softplus,
    "mish": F.mish,
    "erf": torch.erf,
    "power": torch.pow,
}
_PARAMETERS = {"leaky_relu": 1, "clamp": 2, "elu": 1, "power": 1}


@torch.no_grad()
def evaluate(graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What a graph returns, in the dtype of ``inputs``: in float64 it is the truth.

    Every rule of :mod:`groupconv.compiler.graph` is asserted on the way.
    """
    dtype = next((x.dtype for x in inputs if x.is_floating_point()), torch.float32)
    assert set(_CALLS) == set(FUNCTIONS)
    known: dict[Value, Tensor] = {}
    for value, x in [*zip(graph.inputs, inputs, strict=True), *graph.constants.items()]:
        assert value not in known, f"{value} twice"
        assert tuple(x.shape) == value.shape, f"{value} is {list(x.shape)}"
        known[value] = x.to(dtype) if x.is_floating_point() else x
    for node in graph.nodes:
        _check_values(node, known)
        y = _compute(node, [known[v] for v in node.inputs], dtype)
        assert tuple(y.shape) == node.output.shape, f"{node.name}: {list(y.shape)}, {node.output}"
        known[node.output] = y
    names = [value.name for value in known]
    assert len(set(names)) == len(names), f"a name twice among {sorted(names)}"
    return [known[value] for value in graph.outputs]


def in_memory(x: Tensor, value: Value) -> Tensor:
    """The elements of ``value`` in the order of memory: its channels innermost."""
    return x.movedim(value.axis, -1).contiguous()


def from_memory(x: Tensor, value: Value) -> Tensor:
    """The tensor whose elements lie in memory in the order of those of ``x``."""
    shape = [n for i, n in enumerate(value.shape) if i != value.axis]
    return x.reshape(*shape, value.channels).movedim(-1, value.axis)


def _check_values(node: Node, known: dict[Value, Tensor]) -> None:
    assert node.output not in known, f"{node.name}: {node.output} is made twice"
    for value in node.inputs:
        assert value in known, f"{node.name} reads {value} before it is made"
    for value in (*node.inputs, node.output):
        assert 0 <= value.axis < max(1, len(value.shape)), f"{value}: axis {value.axis}"
    if not isinstance(node.operator, Host):
        assert all(v.dtype == torch.float32 for v in (*node.inputs, node.output)), node.name


def _compute(node: Node, inputs: list[Tensor], dtype: torch.dtype) -> Tensor:
    operator, out = node.operator, node.output
    if isinstance(operator, Host):
        return _host(operator, inputs)
    if isinstance(operator, Map):
        return _map(node, operator, inputs, dtype)
    if isinstance(operator, Convolution):
        return _convolution(node, operator, inputs, dtype)
    if isinstance(operator, Concat):
        assert all(v.axis == out.axis for v in node.inputs), node.name
        return torch.cat(inputs, out.axis)
    (x,), (value,) = inputs, node.inputs
    if isinstance(operator, View):
        return from_memory(in_memory(x, value), out)
    if isinstance(operator, Relayout):
        assert {value.axis, out.axis} <= {1, x.ndim - 1}, node.name
        return x
    assert value.axis == out.axis, f"{node.name}: axes {value.axis} and {out.axis}"
    if isinstance(operator, Gather):
        assert all(0 <= i < value.channels for i in operator.order), node.name
        return x.index_select(value.axis, torch.tensor(operator.order))
    if isinstance(operator, Softmax):
        return x.softmax(value.axis)
    if isinstance(operator, LayerNorm):
        scale, shift = (
            None if t is None else t.to(dtype) for t in (operator.weight, operator.bias)
        )
        y = F.layer_norm(x.movedim(value.axis, -1), (value.channels,), scale, shift, operator.eps)
        return y.movedim(-1, value.axis)
    assert x.ndim == 4, f"{node.name}: {value} is no image"
    assert value.axis == 1, f"{node.name}: channel axis {value.axis}"
    if isinstance(operator, Pool):
        return _pool(operator, x)
    if isinstance(operator, AdaptivePool):
        pool = {"max": F.adaptive_max_pool2d, "average": F.adaptive_avg_pool2d}[operator.kind]
        return pool(x, out.shape[2:])
    if isinstance(operator, Upsample):
        size, scales = out.shape[2:], operator.scales
        if operator.mode == "nearest":
            return torch.ops.aten.upsample_nearest2d(x, size, *scales)
        assert operator.mode == "bilinear", operator.mode
        return torch.ops.aten.upsample_bilinear2d(x, size, operator.align_corners, *scales)
    assert isinstance(operator, Pad)
    return F.pad(x, _sides(operator.padding), value=operator.value)


def _sides(padding: Sequence[tuple[int, int]]) -> list[int]:
    """(before, after) of each axis as ``F.pad`` takes them."""
    return [end for pair in reversed(padding) for end in pair]


def as_planes(node: Node) -> bool:
    """Whether a convolution reads a contiguous tensor as images, (N, C, H, W) as it stands.

    Otherwise channels lie innermost: it is an image in NHWC, or a linear layer.
    """
    return node.inputs[0].axis != 1 and node.output.axis == 1


def _convolution(
    node: Node, operator: Convolution, inputs: list[Tensor], dtype: torch.dtype
) -> Tensor:
    conv, value, out = operator.conv, node.inputs[0], node.output
    assert tuple(operator.weight.shape) == conv.weight_shape, node.name
    assert operator.bias is None or operator.bias.shape == (conv.out_channels,), node.name
    assert operator.activation is None or operator.activation in ACTIVATIONS, node.name
    assert len(conv.input_size) == 2, node.name
    assert len(inputs) == 1 + (operator.residual is not None), node.name
    x, planes = in_memory(inputs[0], value), as_planes(node)
    if planes:
        x = x.reshape(conv.batch, conv.in_channels, *conv.input_size)
    else:
        assert value.channels == conv.in_channels, f"{node.name}: {value}, {conv}"
        x = x.reshape(conv.batch, *conv.input_size, conv.in_channels).movedim(-1, 1)
    if operator.order is not None:
        assert sorted(operator.order) == list(range(conv.in_channels)), node.name
        x = x[:, list(operator.order)]
    y = _convolved(conv, x, operator.weight.to(dtype))
    if operator.bias is not None:
        y = y + operator.bias.to(dtype)[:, None, None]
    y = y.reshape(out.shape) if planes else from_memory(y.movedim(1, -1), out)
    if operator.residual is None:
        return _activated(operator, y)
    assert node.inputs[1].shape == out.shape, f"{node.name}: residual {node.inputs[1]}"
    assert node.inputs[1].axis == out.axis, f"{node.name}: axis of {node.inputs[1]}"
    if operator.residual == "before":
        return _activated(operator, y + inputs[1])
    assert operator.residual == "after", operator.residual
    return _activated(operator, y) + inputs[1]


def _convolved(conv: ConvSpec, x: Tensor, weight: Tensor) -> Tensor:
    if not conv.transposed:
        x = F.pad(x, _sides(conv.padding))
        return F.conv2d(x, weight, None, conv.stride, 0, conv.dilation, conv.groups)
    y = F.conv_transpose2d(
        x, weight, None, conv.stride, 0, groups=conv.groups, dilation=conv.dilation
    )
    more = conv.output_padding or (0, 0)
    cut = [(-a, extra - b) for (a, b), extra in zip(conv.padding, more, strict=True)]
    return F.pad(y, _sides(cut))


def _activated(operator: Convolution, y: Tensor) -> Tensor:
    if operator.activation is None:
        return y
    parameters = (operator.slope,) if operator.activation == "leaky_relu" else ()
    return _CALLS[operator.activation](y, *parameters)


def _map(node: Node, operator: Map, inputs: list[Tensor], dtype: torch.dtype) -> Tensor:
    out = node.output
    channels = [out.channels if i == out.axis else 1 for i in range(len(out.shape))]
    per_image = [n if i in (0, out.axis) else 1 for i, n in enumerate(out.shape)]
    per_pixel = [1 if i == out.axis else n for i, n in enumerate(out.shape)]
    for value in node.inputs:
        assert value.axis == out.axis, f"{node.name}: {value} has axis {value.axis}"
        legal = (list(out.shape), per_image, per_pixel, channels)
        assert list(value.shape) in legal, f"{node.name}: {value} for {out}"
    operands = list(inputs)
    for constant in operator.constants:
        assert constant.shape == (out.channels,), f"{node.name}: {list(constant.shape)}"
        operands.append(constant.to(dtype).reshape(channels))
    results: list[Tensor] = []
    assert operator.program, node.name
    for instruction in operator.program:
        results.append(_instruction(node, instruction, operands, results, dtype))
    return results[-1].expand(out.shape)


def _instruction(
    node: Node,
    instruction: Instruction,
    operands: list[Tensor],
    results: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    function, parameters = instruction.function, instruction.parameters
    assert len(instruction.operands) == FUNCTIONS[function], f"{node.name}: {instruction}"
    assert len(parameters) == _PARAMETERS.get(function, 0), f"{node.name}: {instruction}"
    values = []
    for operand in instruction.operands:
        if isinstance(operand, float):
            values.append(torch.tensor(operand, dtype=dtype))
        elif operand >= 0:
            values.append(operands[operand])
        else:
            assert -operand <= len(results), f"{node.name}: {instruction} reads ahead"
            values.append(results[-1 - operand])
    return _CALLS[function](*values, *parameters)


def _pool(operator: Pool, x: Tensor) -> Tensor:
    assert all(end >= 0 for pair in operator.padding for end in pair)
    if operator.kind == "max":
        x = F.pad(x, _sides(operator.padding), value=-torch.inf)
        return F.max_pool2d(x, operator.kernel_size, operator.stride, 0, operator.dilation)
    assert operator.kind == "average", operator.kind
    # Sums of the pixels in each window, over how many of them count.
    rest = [
        (a - c, b - d) for (a, b), (c, d) in zip(operator.padding, operator.counted, strict=True)
    ]
    ones = F.pad(torch.ones_like(x[:1, :1]), _sides(operator.counted), value=1.0)
    count = _window_sums(operator, F.pad(ones, _sides(rest)))
    return _window_sums(operator, F.pad(x, _sides(operator.padding))) / count


def _window_sums(operator: Pool, x: Tensor) -> Tensor:
    window = x.new_ones(x.shape[1], 1, *operator.kernel_size)
    return F.conv2d(x, window, None, operator.stride, 0, operator.dilation, groups=x.shape[1])


def _host(operator: Host, inputs: list[Tensor]) -> Tensor:
    def argument(given: Any) -> Any:
        if isinstance(given, Input):
            x = inputs[given.number]
            return x.contiguous() if operator.dense else x
        if isinstance(given, (list, tuple)):
            return type(given)(argument(item) for item in given)
        return given

    found = operator.target(
        *(argument(given) for given in operator.args),
        **{name: argument(given) for name, given in operator.kwargs.items()},
    )
    return found if operator.item is None else found[operator.item]
