"""Elementwise operators of PyTorch as Maps of one or two instructions."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from groupconv.compiler.building import Builder, UnsupportedError
from groupconv.compiler.graph import Instruction, Map, Value
from groupconv.compiler.views import Lazy

aten = torch.ops.aten

# Operators that take tensors and nothing else.
_PLAIN = {
    aten.mul: "mul", aten.maximum: "maximum", aten.minimum: "minimum", aten.relu: "relu",
    aten.relu6: "relu6", aten.silu: "silu", aten.hardswish: "hardswish", aten.sigmoid: "sigmoid",
    aten.hardsigmoid: "hardsigmoid", aten.tanh: "tanh", aten.exp: "exp", aten.log: "log",
    aten.sqrt: "sqrt", aten.rsqrt: "rsqrt", aten.neg: "neg", aten.abs: "abs", aten.erf: "erf",
    aten.mish: "mish", aten.prelu: "prelu", aten._prelu_kernel: "prelu",
}  # fmt: skip

# What an operator computes: tensors and numbers, and instructions in which operand i is the i-th.
_Program = tuple[tuple[Any, ...], tuple[Instruction, ...]]


def _one(function: str, *operands: Any, parameters: Sequence[float] = ()) -> _Program:
    numbers = tuple(range(len(operands)))
    return operands, (Instruction(function, numbers, tuple(map(float, parameters))),)


def _clamp(x: Any, low: float | None = None, high: float | None = None) -> _Program:
    if isinstance(low, Lazy | Tensor) or isinstance(high, Lazy | Tensor):
        raise UnsupportedError("its bounds are tensors")
    bounds = (-math.inf if low is None else low, math.inf if high is None else high)
    return _one("clamp", x, parameters=bounds)


def _elu(x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> _Program:
    if scale == input_scale == 1:
        return _one("elu", x, parameters=(alpha,))
    return (x,), (
        Instruction("mul", (0, float(input_scale))),
        Instruction("elu", (-1,), (float(alpha * input_scale),)),
        Instruction("mul", (-2, scale / input_scale)),
    )


def _softplus(x: Any, beta: float = 1, threshold: float = 20) -> _Program:
    if beta != 1 or threshold != 20:
        raise UnsupportedError(f"beta={beta}, threshold={threshold}")
    return _one("softplus", x)


def _rrelu(
    x: Any, noise: Any, low: float = 1 / 8, high: float = 1 / 3, training: bool = False
) -> _Program:
    if training:
        raise UnsupportedError("its slopes are random")
    return _one("leaky_relu", x, parameters=((low + high) / 2,))


def _gelu(x: Any, *, approximate: str = "none") -> _Program:
    return _one("gelu" if approximate == "none" else "gelu_tanh", x)


def _power(x: Any, exponent: Any) -> _Program:
    if isinstance(x, int | float) or isinstance(exponent, Lazy | Tensor):
        raise UnsupportedError("the exponent is a tensor")
    return _one("power", x, parameters=(exponent,))


def _divided(x: Any, y: Any, *, rounding_mode: str | None = None) -> _Program:
    if rounding_mode is not None:
        raise UnsupportedError(f"rounding_mode={rounding_mode!r}")
    return _one("div", x, y)


def _sum(function: str) -> Callable[..., _Program]:
    def program(x: Any, y: Any, alpha: float = 1) -> _Program:
        if alpha == 1:
            return _one(function, x, y)
        scaled = Instruction("mul", (1, float(alpha)))
        return (x, y), (scaled, Instruction(function, (0, -1)))

    return program


def _reversed_difference(x: Any, y: Any, alpha: float = 1) -> _Program:
    return _sum("sub")(y, x, alpha)


_WITH_ARGUMENTS: dict[Any, Callable[..., _Program]] = {
    aten.add: _sum("add"),
    aten.sub: _sum("sub"),
    aten.rsub: _reversed_difference,
    aten.div: _divided,
    aten.clamp: _clamp,
    aten.hardtanh: lambda x, low=-1.0, high=1.0: _clamp(x, low, high),
    aten.clamp_min: _clamp,
    aten.clamp_max: lambda x, high: _clamp(x, None, high),
    aten.leaky_relu: lambda x, slope=0.01: _one("leaky_relu", x, parameters=(slope,)),
    aten.rrelu_with_noise: _rrelu,
    aten.elu: _elu,
    aten.celu: lambda x, alpha=1.0: _elu(x, alpha, 1, 1 / alpha),
    aten.gelu: _gelu,
    aten.softplus: _softplus,
    aten.pow: _power,
    aten.square: lambda x: ((x,), (Instruction("mul", (0, 0)),)),
    aten.reciprocal: lambda x: _one("power", x, parameters=(-1.0,)),
}


def elementwise(builder: Builder, node: fx.Node, *args: Any, **kwargs: Any) -> Lazy | None:
    """The Map of an elementwise operator; None where it is none of those that we have."""
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    if packet in _PLAIN and not kwargs:
        operands, program = _one(_PLAIN[packet], *args)
    elif packet in _WITH_ARGUMENTS:
        operands, program = _WITH_ARGUMENTS[packet](*args, **kwargs)
    else:
        return None
    shape = tuple(node.meta["val"].shape)
    if not shape or node.meta["val"].dtype != torch.float32:
        raise UnsupportedError("the result is a single number")
    axis = _axis(builder, operands, shape)
    inputs: list[Value] = []
    constants: list[Tensor] = []
    places: list[tuple[str, Any]] = []
    for operand in operands:
        if isinstance(operand, Lazy):
            inputs.append(_spread(builder, operand, len(shape), axis))
            places.append(("input", len(inputs) - 1))
        elif isinstance(operand, Tensor) and operand.numel() > 1:
            row = _row(operand, shape, axis)
            if row is None:
                whole = operand.detach().reshape((1,) * (len(shape) - operand.ndim) + operand.shape)
                if not _spreads(tuple(whole.shape), shape, axis):
                    whole = whole.expand(shape)
                inputs.append(builder.constant(whole, axis))
                places.append(("input", len(inputs) - 1))
            else:
                constants.append(row)
                places.append(("constant", len(constants) - 1))
        else:
            places.append(("number", float(operand)))
    numbers = [
        {"input": at, "constant": len(inputs) + at if kind == "constant" else 0, "number": at}[kind]
        for kind, at in places
    ]
    renumbered = tuple(
        Instruction(
            step.function,
            tuple(numbers[o] if isinstance(o, int) and o >= 0 else o for o in step.operands),
            step.parameters,
        )
        for step in program
    )
    name = str(packet).removeprefix("aten.")
    return Lazy.of(builder.add(name, Map(renumbered, tuple(constants)), inputs, shape, axis))


def _axis(builder: Builder, operands: Sequence[Any], shape: tuple[int, ...]) -> int:
    """The axis of the channels: that of the largest input, of images rather 1; another one where
    the inputs could not be spread over the output."""
    inputs = [operand for operand in operands if isinstance(operand, Lazy)]
    axes = {builder.value(operand).axis for operand in inputs if operand.shape == shape}
    likely = [1] if 1 in axes or (not axes and len(shape) == 4) else [*axes]
    sizes = [(1,) * (len(shape) - len(operand.shape)) + operand.shape for operand in inputs]
    for axis in (*likely, len(shape) - 1, 1):
        if axis < len(shape) and all(_spreads(size, shape, axis) for size in sizes):
            return axis
    raise UnsupportedError(f"{' and '.join(str([*size]) for size in sizes)} give {[*shape]}")


def _spread(builder: Builder, held: Lazy, dims: int, axis: int) -> Value:
    """An input with as many axes as the output, and the same innermost."""
    missing = dims - len(held.shape)
    if missing:
        held = held.seen(aten.reshape.default, (1,) * missing + held.shape)
    return builder.laid_out(builder.value(held), axis)


def _spreads(size: tuple[int, ...], shape: tuple[int, ...], axis: int) -> bool:
    """Whether a Map spreads an input of ``size`` over its output."""
    if size == shape:
        return True
    others = [i for i in range(len(shape)) if i != axis]
    pixel = size[axis] == 1 and all(size[i] == shape[i] for i in others)
    image = (
        size[axis] == shape[axis]
        and size[0] in (1, shape[0])
        and all(size[i] == 1 for i in others if i != 0)
    )
    return pixel or image


def _row(tensor: Tensor, shape: tuple[int, ...], axis: int) -> Tensor | None:
    """A constant as one number for each channel, where it is one."""
    size = (1,) * (len(shape) - tensor.ndim) + tuple(tensor.shape)
    if all(n == (shape[i] if i == axis else 1) for i, n in enumerate(size)):
        return tensor.detach().reshape(-1).contiguous()
    return None
