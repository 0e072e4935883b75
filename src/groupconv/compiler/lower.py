"""A graph with its places as steps: native tasks, and calls of PyTorch."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from groupconv.compiler.banded import filtered
from groupconv.compiler.convolve import convolve, multiply
from groupconv.compiler.graph import (
    AdaptivePool,
    Bands,
    Concat,
    Convolution,
    FromTiles,
    Gather,
    Graph,
    Host,
    LayerNorm,
    Map,
    Node,
    Pad,
    Pool,
    Products,
    Relayout,
    Softmax,
    ToTiles,
    Upsample,
    Value,
    View,
)
from groupconv.compiler.library import Library
from groupconv.compiler.memory import Memory, Place
from groupconv.compiler.steps.adaptive import AdaptivePoolStep
from groupconv.compiler.steps.copy import CopyStep
from groupconv.compiler.steps.from_tiles import FromTilesStep
from groupconv.compiler.steps.gather import GatherStep
from groupconv.compiler.steps.map import MapStep
from groupconv.compiler.steps.norm import LayerNormStep
from groupconv.compiler.steps.pad import PadStep
from groupconv.compiler.steps.pool import PoolStep
from groupconv.compiler.steps.relayout import RelayoutStep
from groupconv.compiler.steps.shuffle import ShuffleStep, regular
from groupconv.compiler.steps.softmax import SoftmaxStep
from groupconv.compiler.steps.step import Step
from groupconv.compiler.steps.to_tiles import ToTilesStep
from groupconv.compiler.steps.upsample import UpsampleStep
from groupconv.compiler.task import Call, Pointer, Task

# A guess of the bytes that one thread reads and writes in a second.
BYTES = 2e10


def lower(graph: Graph, memory: Memory, library: Library, alone: bool = False) -> list[Task | Call]:
    """The steps that compute ``graph``, in order.

    Args:
        alone: whether one thread runs all of them, however many there are.
    """
    lowering = _Lowering(memory, library, alone)
    return [step for node in graph.nodes for step in lowering.steps(node)]


class _Lowering:
    """Makes the steps of one node after another."""

    def __init__(self, memory: Memory, library: Library, alone: bool) -> None:
        self.places, self.library, self.alone = memory.places, library, alone

    def steps(self, node: Node) -> Iterator[Task | Call]:
        match node.operator:
            case Host() as operator:
                yield Call(node.name, operator, node.inputs, node.output)
            case Convolution() as operator:
                yield from convolve(node, operator, self.places, self.library, self.alone)
            case Products() as operator:
                yield multiply(node, operator, self.places, self.library, self.alone)
            case Bands() as operator:
                yield filtered(node, operator, self.places, self.library)
            case Concat():
                yield from self._concatenation(node)
            case View():
                # Only where the pixels lie apart, and would not be those of the new shape.
                if self.places[node.output].storage is not self.places[node.inputs[0]].storage:
                    x = node.inputs[0]
                    yield self._copy(
                        node, x, Place(self.places[node.output].storage, 0, x.channels)
                    )
            case Gather() as operator:
                if self.places[node.output].storage is not self.places[node.inputs[0]].storage:
                    yield self._gather(node, operator.order)
            case _:
                yield self._single(node)

    def _single(self, node: Node) -> Task:
        """Operators that are one step."""
        x, y = node.inputs[0], node.output
        strides = (self.places[x].pixel, self.places[y].pixel)
        size, written = _size(x), _size(y)
        match node.operator:
            case Map(program, constants):
                reads = tuple(_read(value, y) for value in node.inputs)
                pixels = tuple(self.places[value].pixel for value in (*node.inputs, y))
                count, channels = len(constants), y.channels
                expression = MapStep(program, reads, count, _pixels(y), channels, pixels)
                return self._task(node, expression, constants)
            case Pool() as pool:
                return self._task(node, PoolStep(pool, x.channels, size, strides))
            case AdaptivePool(kind):
                adaptive = AdaptivePoolStep(kind, x.channels, size, written, strides)
                return self._task(node, adaptive)
            case Upsample() as upsample:
                return self._task(node, UpsampleStep(upsample, x.channels, size, written, strides))
            case Pad() as pad:
                return self._task(node, PadStep(pad, x.channels, size, strides))
            case Softmax():
                return self._task(node, SoftmaxStep(_pixels(x), x.channels, strides))
            case ToTiles(results, before, output_size):
                inward = ToTilesStep(
                    results, x.channels, size, before, output_size, strides[0], _matrix(y)
                )
                return self._task(node, inward, images=x.shape[0])
            case FromTiles() as last:
                return self._from_tiles(node, last)
            case Relayout():
                return self._task(node, self._relayout(x, y))
            case LayerNorm(eps, weight, bias):
                norm = LayerNormStep(
                    _pixels(x), x.channels, strides, eps, weight is not None, bias is not None
                )
                return self._task(node, norm, (weight, bias))
        raise AssertionError(f"unknown operator {node.operator}")

    def _from_tiles(self, node: Node, last: FromTiles) -> Task:
        (x, *added), y = node.inputs, node.output
        residual = self.places[added[0]] if added else None
        strides = (residual.pixel if residual else 0, self.places[y].pixel)
        bias = None if last.bias is None else last.bias.detach().contiguous()
        step = FromTilesStep(
            last.results, y.channels, _size(y), strides, bias is not None, last.residual,
            last.activation, last.slope, _matrix(x),
        )  # fmt: skip
        record = (
            Pointer.to(self.places[x]),
            0 if bias is None else bias.data_ptr(),
            Pointer.to(residual) if residual else 0,
            Pointer.to(self.places[y]),
            _images(y),
        )
        return self._made(node, step, record, () if bias is None else (bias,))

    def _relayout(self, x: Value, y: Value) -> RelayoutStep:
        inward = x.contiguous
        inside = y if inward else x
        return RelayoutStep(_pixels(inside), inside.channels, self.places[inside].pixel, inward)

    def _concatenation(self, node: Node) -> Iterator[Task]:
        """Copies of the inputs that don't lie in their place."""
        target, start = self.places[node.output], 0
        for value in node.inputs:
            there = Place(target.storage, target.channel + start, target.pixel)
            if self.places[value] != there:
                yield self._copy(node, value, there)
            start += value.channels

    def _copy(self, node: Node, value: Value, target: Place) -> Task:
        source = self.places[value]
        step = CopyStep(_pixels(value), value.channels, (source.pixel, target.pixel))
        record = (Pointer.to(source), Pointer.to(target), _images(value))
        return self._made(node, step, record, ())

    def _gather(self, node: Node, order: tuple[int, ...]) -> Task:
        x, y = node.inputs[0], node.output
        source, target = self.places[x], self.places[y]
        strides, images = (source.pixel, target.pixel), _images(y)
        shuffle = regular(order)
        if shuffle is not None:
            first, groups, distance = shuffle
            step = ShuffleStep(_pixels(y), y.channels, groups, distance, strides)
            record = (Pointer.to(source, first), Pointer.to(target), images)
            return self._made(node, step, record, ())
        numbers = torch.tensor(order)
        return self._made(
            node,
            GatherStep(_pixels(y), y.channels, strides),
            (Pointer.to(source), numbers.data_ptr(), Pointer.to(target), images),
            (numbers,),
        )

    def _task(
        self,
        node: Node,
        step: Step,
        constants: Sequence[Tensor | None] = (),
        images: int | None = None,
    ) -> Task:
        """A step that reads all inputs, then constants.

        Args:
            images: where they are not those of the output.
        """
        kept = [None if t is None else t.detach().contiguous() for t in constants]
        record: tuple[int | Pointer, ...] = (
            *(Pointer.to(self.places[value]) for value in node.inputs),
            *(0 if t is None else t.data_ptr() for t in kept),
            Pointer.to(self.places[node.output]),
            _images(node.output) if images is None else images,
        )
        return self._made(node, step, record, tuple(t for t in kept if t is not None))

    def _made(
        self, node: Node, step: Step, record: tuple[int | Pointer, ...], keep: tuple[Tensor, ...]
    ) -> Task:
        *_, images = record
        assert len(record) == len(step.arguments)
        assert isinstance(images, int)
        size = images * step.bytes
        return Task(
            name=node.name,
            kind=type(step).__name__.removesuffix("Step").lower(),
            function=self.library.function(step),
            record=record,
            seconds=size / BYTES,
            macs=0,
            bytes=size,
            inputs=node.inputs,
            output=node.output,
            keep=keep,
        )


def _images(value: Value) -> int:
    return value.shape[0] if value.axis > 0 else 1


def _pixels(value: Value) -> int:
    """Of one image."""
    return value.pixels // max(1, _images(value))


def _matrix(value: Value) -> int:
    """Elements of one of those that minimal filtering multiplies."""
    return value.shape[1] * value.channels


def _size(value: Value) -> tuple[int, int]:
    """Rows and columns of an image, where it has them."""
    return (value.shape[2], value.shape[3]) if len(value.shape) == 4 else (1, 1)


def _read(value: Value, output: Value) -> str:
    """What there is of an input of a Map: see :class:`MapStep`."""
    if value.shape == output.shape:
        return "full"
    if value.channels == 1 and value.pixels == output.pixels:
        return "pixel"
    return "image" if _images(value) == _images(output) else "channel"
