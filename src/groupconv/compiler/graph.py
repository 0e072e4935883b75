"""A network as plain records: values, and the operators between them.

A value has PyTorch's shape; one of its axes, the *channels*, lies innermost in memory, the others
in their order. So ``(N, C, H, W)`` with channel axis 1 is NHWC in memory, with channel axis 3 it is
a contiguous tensor. To native code a value is a number of *pixels*, each a row of channels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from groupconv.kernels.spec import ConvSpec

Sides = tuple[tuple[int, int], tuple[int, int]]


@dataclass(eq=False)
class Value:
    """The result of a node, an input of the network, or a constant; equal only to itself.

    Args:
        name: for people, unique in its graph.
        shape: as PyTorch sees it.
        axis: the axis of the channels, innermost in memory; 1 for images in NHWC, 0 for a number
            without axes.
        dtype: float32 for all that native code touches.
    """

    name: str
    shape: tuple[int, ...]
    axis: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def channels(self) -> int:
        return self.shape[self.axis] if self.shape else 1

    @property
    def pixels(self) -> int:
        """Rows of channels in memory."""
        return math.prod(n for i, n in enumerate(self.shape) if i != self.axis)

    @property
    def contiguous(self) -> bool:
        """Whether memory holds it in the order of its axes."""
        return self.axis == max(0, len(self.shape) - 1)

    def __repr__(self) -> str:
        return f"{self.name}{list(self.shape)}"


@dataclass(frozen=True, eq=False)
class Convolution:
    """``activation(conv(x) + bias + residual)``; inputs: x, then the residual if there is one.

    x has channel axis 1, or is contiguous. A linear layer on the channels of each pixel is one with
    a kernel of one pixel on an image of one row, whatever the shape of x.

    Args:
        conv: of the whole batch; 2-d (1-d ones as images of one row), plain or transposed.
        weight: ``conv.weight_shape``, float32.
        bias: ``(out_channels,)`` or None.
        activation, slope: see :class:`groupconv.kernels.spec.KernelSpec`.
        residual: None, or whether the second input is added ``before`` or ``after`` the activation.
        order: None, or the order in which the channels of x are taken.
    """

    conv: ConvSpec
    weight: Tensor
    bias: Tensor | None = None
    activation: str | None = None
    slope: float = 0.01
    residual: str | None = None
    order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ToTiles:
    """The first third of a 3x3 convolution after Winograd: x, ``(N, C, H, W)``, as a matrix for
    each number of a tile, ``((results + 2)**2, tiles, C)``, channel axis 2.

    Args:
        results: of a tile, along each side; see :mod:`groupconv.compiler.filtering`.
        before: rows and columns of padding before the image.
        output_size: rows and columns of the result of the convolution.
    """

    results: int
    before: tuple[int, int]
    output_size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Products:
    """The second third: each of the matrices times one of weights, an image of pixels convolved
    with weights of its own.

    Args:
        weight: ``((results + 2)**2, out_channels, in_channels / groups, 1, 1)``.
        rows: of a matrix that hold tiles; those after them are never looked at.
        groups: of the channels.
        chain: see :class:`groupconv.kernels.spec.KernelSpec`.
    """

    weight: Tensor
    rows: int
    groups: int
    chain: int


@dataclass(frozen=True, eq=False)
class Bands:
    """All three thirds of a 3x3 convolution, for some lines of tiles at a time, so that what is
    between them stays near: inputs are x, then the residual if there is one.

    Args:
        conv: of the whole batch.
        weight, chain: see :class:`Products`.
        results: see :class:`ToTiles`.
        lines: of tiles in a band; they divide the lines of all images.
        bias, activation, slope, residual: see :class:`Convolution`.
    """

    conv: ConvSpec
    weight: Tensor
    chain: int
    results: int
    lines: int
    bias: Tensor | None
    activation: str | None
    slope: float
    residual: str | None


@dataclass(frozen=True, eq=False)
class FromTiles:
    """The last third: inputs are the products, then the residual if there is one.

    Args:
        results: see :class:`ToTiles`.
        bias, activation, slope, residual: see :class:`Convolution`.
    """

    results: int
    bias: Tensor | None
    activation: str | None
    slope: float
    residual: str | None


@dataclass(frozen=True)
class Instruction:
    """One step of an elementwise expression.

    Args:
        function: one of :data:`FUNCTIONS`.
        operands: each the number of an operand of the node (0, 1, ...: its inputs, then its
            constants), the result of an earlier instruction (-1 is the first one's, -2 the
            second's), or a number (a float).
        parameters: of the function: the slope of ``leaky_relu``, the bounds of ``clamp``, the
            alpha of ``elu``, the exponent of ``power``.
    """

    function: str
    operands: tuple[int | float, ...]
    parameters: tuple[float, ...] = ()


# Function to its number of operands; the names are PyTorch's.
FUNCTIONS = {
    "add": 2, "sub": 2, "mul": 2, "div": 2, "maximum": 2, "minimum": 2, "prelu": 2,
    "relu": 1, "relu6": 1, "silu": 1, "hardswish": 1, "leaky_relu": 1, "sigmoid": 1,
    "hardsigmoid": 1, "gelu": 1, "gelu_tanh": 1, "elu": 1, "tanh": 1, "exp": 1, "log": 1,
    "sqrt": 1, "rsqrt": 1, "neg": 1, "abs": 1, "clamp": 1, "softplus": 1, "mish": 1, "erf": 1,
    "power": 1,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Map:
    """An elementwise expression; its result is that of the last instruction.

    All inputs have the channel axis of the output, and its shape, or 1 on some axes: on all but the
    batch and the channels (one value for each channel of an image, ``(N, C, 1, 1)``, or of all,
    ``(1, C, 1, 1)``), or on the channels alone (one for each pixel, ``(N, 1, H, W)``).

    Args:
        program: the instructions, in order.
        constants: one number for each channel, ``(C,)``; they follow the inputs as operands.
    """

    program: tuple[Instruction, ...]
    constants: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Pool:
    """Max or average pooling over the rows and columns of ``(N, C, H, W)``, channel axis 1.

    Args:
        kind: ``max`` or ``average``.
        kernel_size, stride, dilation: rows, columns.
        padding: (before, after) of rows and of columns, with what ceil_mode adds at the end. It
            never is the maximum.
        counted: the part of the padding that counts in an average: all of it with
            count_include_pad, but for what ceil_mode added; none of it without.
    """

    kind: str
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: Sides
    dilation: tuple[int, int] = (1, 1)
    counted: Sides = ((0, 0), (0, 0))


@dataclass(frozen=True)
class AdaptivePool:
    """PyTorch's adaptive pooling of ``(N, C, H, W)``, channel axis 1; to 1x1 it is the mean.

    Args:
        kind: ``max`` or ``average``.
    """

    kind: str


@dataclass(frozen=True)
class Upsample:
    """Interpolation of ``(N, C, H, W)``, channel axis 1.

    Args:
        mode: ``nearest`` or ``bilinear``.
        align_corners: of bilinear.
        scales: what was given for rows and columns, or None where a size was: PyTorch computes
            the places in the input from them.
    """

    mode: str
    align_corners: bool = False
    scales: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class Pad:
    """Constant padding of rows and columns, channel axis 1: (before, after); negative ones crop."""

    padding: Sides
    value: float = 0.0


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """Normalisation over the channels of each pixel, then ``* weight + bias`` where given."""

    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Softmax:
    """Over the channels of each pixel."""


@dataclass(frozen=True)
class Gather:
    """Channel i of the output is channel ``order[i]`` of the input: shuffle, split, slice."""

    order: tuple[int, ...]


def consecutive(order: tuple[int, ...]) -> bool:
    """Whether a gather takes neighbouring channels, as they are."""
    return order == tuple(range(order[0], order[0] + len(order)))


@dataclass(frozen=True)
class Concat:
    """Any number of inputs side by side along the channels."""


@dataclass(frozen=True)
class View:
    """The same memory under another shape or other axes."""


@dataclass(frozen=True)
class Relayout:
    """The same tensor with another axis innermost: from axis 1 to the last one, or back."""


@dataclass(frozen=True)
class Input:
    """Stands for a value among the arguments of a :class:`Host` operator.

    Args:
        number: which of the node's inputs.
    """

    number: int


@dataclass(frozen=True, eq=False)
class Host:
    """What PyTorch runs: native code ends before it and goes on after it.

    Args:
        target: an operator of PyTorch, such as ``aten.cumsum.default``.
        args, kwargs: its arguments, nested lists and :class:`Input` included.
        item: which of the results is the node's, where there are several.
        reason: why it isn't native, for people.
    """

    target: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    item: int | None
    reason: str

    @property
    def dense(self) -> bool:
        """Whether it relies on contiguous inputs: PyTorch's public operators make sure that its
        private ones get them."""
        return self.target._opname.startswith("_")


Operator = (
    Convolution | ToTiles | Products | FromTiles | Bands | Map | Pool | AdaptivePool | Upsample
    | Pad | LayerNorm | Softmax | Gather | Concat | View | Relayout | Host
)  # fmt: skip


@dataclass(eq=False)
class Node:
    """One operator, what it reads and what it makes.

    Args:
        name: of the module or operator that it came from, for people.
    """

    name: str
    operator: Operator
    inputs: tuple[Value, ...]
    output: Value


@dataclass(eq=False)
class Graph:
    """Nodes in an order in which they can run.

    Args:
        inputs: of the network, in the order of its arguments.
        outputs: what it returns, flat.
        nodes: in order.
        constants: values that never change, such as a table of positions, as PyTorch holds them.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    nodes: list[Node] = field(default_factory=list)
    constants: dict[Value, Tensor] = field(default_factory=dict)

    def readers(self) -> dict[Value, list[Node]]:
        """For each value that nodes read, these nodes; what the network returns is no reading."""
        found: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                found.setdefault(value, []).append(node)
        return found

    def producers(self) -> dict[Value, Node]:
        """The node that makes each value that a node makes."""
        return {node.output: node for node in self.nodes}

    def replace(
        self, nodes: Sequence[Node], values: Mapping[Value, Value] | None = None
    ) -> "Graph":
        """A graph of ``nodes`` that read, and return, ``values[v]`` in place of ``v``."""
        now = values or {}

        def current(value: Value) -> Value:
            while value in now:
                value = now[value]
            return value

        renewed = [
            Node(n.name, n.operator, tuple(current(v) for v in n.inputs), n.output) for n in nodes
        ]
        outputs = tuple(current(v) for v in self.outputs)
        used = {value for node in renewed for value in node.inputs}.union(outputs)
        constants = {v: tensor for v, tensor in self.constants.items() if v in used}
        return Graph(self.inputs, outputs, renewed, constants)
