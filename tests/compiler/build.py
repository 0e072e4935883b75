"""Graphs built by hand: one method for each operator, with weights from a seed."""

import math
from collections.abc import Sequence

import torch
from compare import assert_close
from compiler.evaluate import evaluate
from torch import Tensor

from groupconv.compiler.graph import (
    AdaptivePool,
    Concat,
    Convolution,
    Gather,
    Graph,
    Instruction,
    LayerNorm,
    Map,
    Node,
    Operator,
    Pad,
    Pool,
    Relayout,
    Sides,
    Softmax,
    Upsample,
    Value,
    View,
)
from groupconv.kernels.spec import ConvSpec

NO_PADDING = ((0, 0), (0, 0))


class Builder:
    """Nodes so far; every method adds one and returns its value."""

    def __init__(self, *shapes: tuple[int, ...], seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.inputs = tuple(Value(f"input{i}", shape) for i, shape in enumerate(shapes))
        self.nodes: list[Node] = []
        self.constants: dict[Value, Tensor] = {}

    def graph(self, *outputs: Value) -> Graph:
        return Graph(self.inputs, outputs, list(self.nodes), dict(self.constants))

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def constant(self, *shape: int) -> Value:
        value = Value(f"constant{len(self.constants)}", shape)
        self.constants[value] = self.numbers(*shape)
        return value

    def add(
        self, operator: Operator, inputs: Sequence[Value], shape: Sequence[int], axis: int = 1
    ) -> Value:
        name = f"{type(operator).__name__.lower()}{len(self.nodes)}"
        value = Value(name, tuple(shape), axis)
        self.nodes.append(Node(name, operator, tuple(inputs), value))
        return value

    def conv(
        self,
        x: Value,
        out: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        padding: int | Sides | None = None,
        groups: int = 1,
        transposed: bool = False,
        bias: bool = True,
        **more: object,
    ) -> Value:
        """Of an image in NHWC, or of a contiguous one as planes; of the same size by default."""
        pad = kernel // 2 if padding is None else padding
        sides = ((pad, pad),) * 2 if isinstance(pad, int) else pad
        batch, into, *size = x.shape
        conv = ConvSpec(
            batch,
            into,
            out,
            tuple(size),
            (kernel,) * 2,
            (stride,) * 2,
            sides,
            (1, 1),
            groups,
            transposed,
        )
        weight = self.numbers(*conv.weight_shape) / math.sqrt(math.prod(conv.weight_shape[1:]))
        operator = Convolution(conv, weight, self.numbers(out) if bias else None, **more)
        return self.add(operator, (x,), (batch, out, *conv.output_size))

    def linear(self, x: Value, out: int) -> Value:
        """On the channels, the last axis of a contiguous value."""
        assert x.contiguous
        conv = ConvSpec(1, x.channels, out, (1, x.pixels), (1, 1), (1, 1), NO_PADDING, (1, 1), 1)
        weight = self.numbers(*conv.weight_shape) / math.sqrt(x.channels)
        return self.add(
            Convolution(conv, weight, self.numbers(out)), (x,), (*x.shape[:-1], out), x.axis
        )

    def map(
        self,
        inputs: Value | Sequence[Value],
        *program: tuple[object, ...],
        constants: Sequence[Tensor] = (),
    ) -> Value:
        """Instructions as (function, operands, parameters or nothing), on the shape of the first
        input."""
        inputs = (inputs,) if isinstance(inputs, Value) else inputs
        shape = max((v.shape for v in inputs), key=math.prod)
        instructions = tuple(Instruction(*parts) for parts in program)
        return self.add(Map(instructions, tuple(constants)), inputs, shape, inputs[0].axis)

    def norm(self, x: Value) -> Value:
        """A batch norm."""
        factor, summand = self.numbers(x.channels), self.numbers(x.channels)
        return self.map(x, ("mul", (0, 1)), ("add", (-1, 2)), constants=(factor, summand))

    def act(self, x: Value, function: str = "relu", *parameters: float) -> Value:
        return self.map(x, (function, (0,), parameters))

    def sum(self, x: Value, y: Value) -> Value:
        return self.map((x, y), ("add", (0, 1)))

    def gather(self, x: Value, order: Sequence[int]) -> Value:
        shape = [len(order) if i == x.axis else n for i, n in enumerate(x.shape)]
        return self.add(Gather(tuple(order)), (x,), shape, x.axis)

    def shuffle(self, x: Value, groups: int) -> Value:
        return self.gather(x, torch.arange(x.channels).view(groups, -1).T.flatten().tolist())

    def split(self, x: Value, first: int) -> tuple[Value, Value]:
        channels = range(x.channels)
        return self.gather(x, channels[:first]), self.gather(x, channels[first:])

    def concat(self, *inputs: Value) -> Value:
        axis = inputs[0].axis
        shape = list(inputs[0].shape)
        shape[axis] = sum(v.channels for v in inputs)
        return self.add(Concat(), inputs, shape, axis)

    def pool(
        self, x: Value, kind: str = "max", kernel: int = 3, stride: int = 2, padding: int = 1
    ) -> Value:
        size = [(n + 2 * padding - kernel) // stride + 1 for n in x.shape[2:]]
        sides = ((padding, padding),) * 2
        operator = Pool(
            kind,
            (kernel,) * 2,
            (stride,) * 2,
            sides,
            counted=sides if kind == "average" else NO_PADDING,
        )
        return self.add(operator, (x,), (*x.shape[:2], *size))

    def mean(self, x: Value) -> Value:
        return self.add(AdaptivePool("average"), (x,), (*x.shape[:2], 1, 1))

    def upsample(self, x: Value, factor: int = 2) -> Value:
        size = [factor * n for n in x.shape[2:]]
        return self.add(Upsample("nearest"), (x,), (*x.shape[:2], *size))

    def pad(self, x: Value, padding: Sides, value: float = 0.0) -> Value:
        size = [n + a + b for n, (a, b) in zip(x.shape[2:], padding, strict=True)]
        return self.add(Pad(padding, value), (x,), (*x.shape[:2], *size))

    def layer_norm(self, x: Value) -> Value:
        scale, shift = self.numbers(x.channels), self.numbers(x.channels)
        return self.add(LayerNorm(1e-5, scale, shift), (x,), x.shape, x.axis)

    def softmax(self, x: Value) -> Value:
        return self.add(Softmax(), (x,), x.shape, x.axis)

    def view(self, x: Value, shape: Sequence[int], axis: int = 1) -> Value:
        return self.add(View(), (x,), shape, axis)

    def relayout(self, x: Value, axis: int) -> Value:
        return self.add(Relayout(), (x,), x.shape, axis)

    def excite(self, x: Value, gate: str = "sigmoid") -> Value:
        """Squeeze and excite."""
        small = self.act(self.conv(self.mean(x), max(1, x.channels // 2)))
        scale = self.act(self.conv(small, x.channels), gate)
        return self.map((x, scale), ("mul", (0, 1)))


def kinds(graph: Graph) -> list[str]:
    """The operators of a graph in the order of its nodes."""
    return [type(node.operator).__name__ for node in graph.nodes]


def functions(graph: Graph) -> list[list[str]]:
    """The functions of each of its Maps."""
    return [
        [instruction.function for instruction in node.operator.program]
        for node in graph.nodes
        if isinstance(node.operator, Map)
    ]


def assert_same(before: Graph, after: Graph, seed: int = 0, atol: float = 1e-5) -> None:
    """Both have the same inputs and outputs, and compute the same in float64."""
    assert after.inputs == before.inputs
    assert [(v.shape, v.axis) for v in after.outputs] == [(v.shape, v.axis) for v in before.outputs]
    random = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(v.shape, generator=random, dtype=torch.float64) for v in before.inputs]
    expected, actual = evaluate(before, inputs), evaluate(after, inputs)
    for a, e in zip(actual, expected, strict=True):
        # Weights are rounded to float32 where they change.
        scale = max(1.0, e.abs().max().item())
        assert_close(a / scale, e / scale, rtol=1e-5, atol=atol)
