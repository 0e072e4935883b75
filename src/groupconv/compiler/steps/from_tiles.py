"""The products of minimal filtering to images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from groupconv.compiler.filtering import TAPS, tiles
from groupconv.compiler.steps import entry, transform
from groupconv.compiler.steps.channels import cover
from groupconv.compiler.steps.step import Step
from groupconv.kernels.activation import activate
from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value
from groupconv.kernels.machine import Machine


@dataclass(frozen=True)
class FromTilesStep(Step):
    """Matrices of products to images in NHWC, and what is done to the results of a convolution.

    Args:
        results: of a tile, along each side.
        channels: of a pixel.
        output_size: rows and columns of an image.
        strides: of the residual and of the output.
        bias: whether there is one.
        residual, activation, slope: see :class:`groupconv.kernels.spec.KernelSpec`.
        matrix: elements from one matrix to the next.
    """

    results: int
    channels: int
    output_size: tuple[int, int]
    strides: tuple[int, int]
    bias: bool
    residual: str | None
    activation: str | None
    slope: float
    matrix: int

    arguments: ClassVar[tuple[str, ...]] = ("x", "bias", "residual", "y", "images")

    @property
    def tiles(self) -> tuple[int, int]:
        """Down and across."""
        return tiles(self.output_size, self.results)

    @property
    def bytes(self) -> int:
        numbers = (self.results + TAPS - 1) ** 2 * math.prod(self.tiles)
        images = 2 if self.residual else 1
        return 4 * self.channels * (numbers + images * math.prod(self.output_size))

    def write(self, machine: Machine, name: str) -> str:
        return entry.module(machine, name, self.arguments, self._body)

    def _body(self, e: Emitter) -> None:
        (height, width), (down, across) = self.output_size, self.tiles
        with e.loop(*entry.part(e, e.mul("%images", down))) as line:
            image, tile = e.div(line, down), e.rem(line, down)
            row = e.mul(tile, self.results)
            first = e.add(e.mul(image, height * width), e.mul(row, width))
            with e.loop(0, across) as number:
                column = e.mul(number, self.results)
                x = e.offset("%x", e.mul(e.add(e.mul(line, across), number), self.channels))
                self._tile(e, x, (row, column), e.add(first, column))

    def _tile(self, e: Emitter, x: str, place: tuple[Value, Value], first: Value) -> None:
        side, width = range(self.results + TAPS - 1), self.output_size[1]
        rows, columns = (
            self._inside(e, start, size)
            for start, size in zip(place, self.output_size, strict=True)
        )

        def some(channel: Value, vectors: Sequence[tuple[int, int]]) -> None:
            for offset, count in vectors:
                at = e.add(channel, offset)
                products = [
                    [e.load(x, e.add((r * len(side) + c) * self.matrix, at), count) for c in side]
                    for r in side
                ]
                square = transform.results(e, self.results, products)
                for r, line in enumerate(square):
                    for c, value in enumerate(line):
                        pixel = e.add(first, r * width + c)
                        conditions = [i for i in (rows[r], columns[c]) if i is not None]
                        if not conditions:
                            self._finish(e, value, pixel, at, count)
                            continue
                        both = f"and i1 {conditions[0]}, {conditions[-1]}"
                        with e.when(e.let(both)):
                            self._finish(e, value, pixel, at, count)

        cover(e, self.channels, 1, some)

    def _inside(self, e: Emitter, start: Value, size: int) -> list[str | None]:
        """For each line of a tile whether it is in the image; None where it always is: the last
        tiles have results past it unless they divide it."""
        left = size % self.results or self.results
        return [
            e.let(f"icmp slt i64 {e.add(start, i)}, {size}") if i >= left else None
            for i in range(self.results)
        ]

    def _finish(self, e: Emitter, value: str, pixel: Value, at: Value, count: int) -> None:
        if self.bias:
            value = e.arithmetic("fadd", value, e.load("%bias", at, count))
        residual = "zeroinitializer"
        if self.residual:
            residual = e.load("%residual", e.add(e.mul(pixel, self.strides[0]), at), count)
        if self.residual == "before":
            value = e.arithmetic("fadd", value, residual)
        value = activate(e, self.activation, self.slope, value)
        if self.residual == "after":
            value = e.arithmetic("fadd", value, residual)
        e.store(value, "%y", e.add(e.mul(pixel, self.strides[1]), at), count)
