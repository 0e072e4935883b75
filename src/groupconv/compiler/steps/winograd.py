"""Winograd's minimal filtering F(2x2, 3x3): 16 products for four outputs instead of 36.

After Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308): tiles
of 4x4 inputs, two pixels apart, are transformed; of each of the 16 numbers of all tiles a matrix is
made, and multiplied by one of weights; the products of a tile are transformed to 2x2 outputs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from groupconv.compiler.steps import entry
from groupconv.compiler.steps.channels import cover
from groupconv.compiler.steps.step import Step
from groupconv.kernels.activation import activate
from groupconv.kernels.emit import Emitter, Value
from groupconv.kernels.machine import Machine

# Numbers along each side of a tile, and of its outputs.
TILE, OUTPUTS = 4, 2
_Square = list[list[str]]


@dataclass(frozen=True)
class ToTilesStep(Step):
    """Images in NHWC to 16 matrices ``(images * tiles, channels)``, one after another.

    Args:
        channels: of a pixel.
        input_size: rows and columns of an image.
        before: rows and columns of padding before the image.
        tiles: down and across.
        stride: of the input.
    """

    channels: int
    input_size: tuple[int, int]
    before: tuple[int, int]
    tiles: tuple[int, int]
    stride: int

    arguments: ClassVar[tuple[str, ...]] = ("x", "y", "images")

    @property
    def bytes(self) -> int:
        tiles = TILE * TILE * math.prod(self.tiles)
        return 4 * self.channels * (math.prod(self.input_size) + tiles)

    def write(self, machine: Machine, name: str) -> str:
        return entry.module(machine, name, self.arguments, self._body)

    def _body(self, e: Emitter) -> None:
        (height, width), (top, left) = self.input_size, self.before
        down, across = self.tiles
        matrix = e.mul("%images", down * across * self.channels)
        with e.loop(*entry.part(e, e.mul("%images", down))) as line:
            image, tile = e.div(line, down), e.rem(line, down)
            x = e.offset("%x", e.mul(image, height * width * self.stride))
            row = e.sub(e.mul(tile, OUTPUTS), top)
            with e.loop(0, across) as number:
                column = e.sub(e.mul(number, OUTPUTS), left)
                y = e.offset("%y", e.mul(e.add(e.mul(line, across), number), self.channels))
                self._tile(e, x, row, column, y, matrix)

    def _tile(self, e: Emitter, x: str, row: Value, column: Value, y: str, matrix: Value) -> None:
        """One tile, whole, or with zeros where it is outside of the image."""
        height, width = self.input_size
        corner = e.offset(x, e.mul(e.add(e.mul(row, width), column), self.stride))
        whole = e.let(
            f"and i1 {e.let(f'icmp ult i64 {row}, {max(0, height - TILE + 1)}')}, "
            f"{e.let(f'icmp ult i64 {column}, {max(0, width - TILE + 1)}')}"
        )

        def inside(at: Value, count: int) -> _Square:
            return [
                [e.load(corner, e.add(at, self._pixel(r, c)), count) for c in range(TILE)]
                for r in range(TILE)
            ]

        def border(at: Value, count: int) -> _Square:
            return [
                [self._or_zero(e, corner, row, column, (r, c), at, count) for c in range(TILE)]
                for r in range(TILE)
            ]

        with e.when(whole):
            self._transform(e, inside, y, matrix)
        with e.when(e.let(f"xor i1 {whole}, true")):
            self._transform(e, border, y, matrix)

    def _pixel(self, row: int, column: int) -> int:
        return (row * self.input_size[1] + column) * self.stride

    def _or_zero(
        self,
        e: Emitter,
        corner: str,
        row: Value,
        column: Value,
        place: tuple[int, int],
        at: Value,
        count: int,
    ) -> str:
        (r, c), (height, width) = place, self.input_size
        there = e.let(
            f"and i1 {e.let(f'icmp ult i64 {e.add(row, r)}, {height}')}, "
            f"{e.let(f'icmp ult i64 {e.add(column, c)}, {width}')}"
        )
        return e.choose(
            there,
            lambda: [e.load(corner, e.add(at, self._pixel(r, c)), count)],
            lambda: ["zeroinitializer"],
        )[0]

    def _transform(
        self, e: Emitter, load: Callable[[Value, int], _Square], y: str, matrix: Value
    ) -> None:
        def some(channel: Value, vectors: Sequence[tuple[int, int]]) -> None:
            for offset, count in vectors:
                at = e.add(channel, offset)
                tile = _both_ways(load(at, count), lambda d: _input_side(e, d))
                for i, value in enumerate(v for line in tile for v in line):
                    e.store(value, y, e.add(e.mul(matrix, i), at), count)

        cover(e, self.channels, 1, some)


@dataclass(frozen=True)
class FromTilesStep(Step):
    """16 matrices of products to images in NHWC, and what is done to the results of a convolution.

    Args:
        channels: of a pixel.
        output_size: rows and columns of an image.
        strides: of the residual and of the output.
        bias: whether there is one.
        residual, activation, slope: see :class:`groupconv.kernels.spec.KernelSpec`.
    """

    channels: int
    output_size: tuple[int, int]
    strides: tuple[int, int]
    bias: bool
    residual: str | None
    activation: str | None
    slope: float

    arguments: ClassVar[tuple[str, ...]] = ("x", "bias", "residual", "y", "images")

    @property
    def tiles(self) -> tuple[int, int]:
        return tiles(self.output_size)

    @property
    def bytes(self) -> int:
        numbers = TILE * TILE * math.prod(self.tiles)
        images = 2 if self.residual else 1
        return 4 * self.channels * (numbers + images * math.prod(self.output_size))

    def write(self, machine: Machine, name: str) -> str:
        return entry.module(machine, name, self.arguments, self._body)

    def _body(self, e: Emitter) -> None:
        (height, width), (down, across) = self.output_size, self.tiles
        matrix = e.mul("%images", down * across * self.channels)
        with e.loop(*entry.part(e, e.mul("%images", down))) as line:
            image, tile = e.div(line, down), e.rem(line, down)
            row = e.mul(tile, OUTPUTS)
            first = e.add(e.mul(image, height * width), e.mul(row, width))
            with e.loop(0, across) as number:
                column = e.mul(number, OUTPUTS)
                x = e.offset("%x", e.mul(e.add(e.mul(line, across), number), self.channels))
                self._tile(e, x, matrix, (row, column), e.add(first, column))

    def _tile(
        self, e: Emitter, x: str, matrix: Value, place: tuple[Value, Value], first: Value
    ) -> None:
        (row, column), (height, width) = place, self.output_size
        # The last tiles have outputs past the image where its sides are odd.
        inside = [
            [
                None if r == c == 0 else e.let(
                    f"and i1 {e.let(f'icmp slt i64 {e.add(row, r)}, {height}')}, "
                    f"{e.let(f'icmp slt i64 {e.add(column, c)}, {width}')}"
                )
                for c in range(OUTPUTS)
            ]
            for r in range(OUTPUTS)
        ]  # fmt: skip

        def some(channel: Value, vectors: Sequence[tuple[int, int]]) -> None:
            for offset, count in vectors:
                at = e.add(channel, offset)
                numbers = iter(range(TILE * TILE))
                products = [
                    [e.load(x, e.add(e.mul(matrix, next(numbers)), at), count) for _ in range(TILE)]
                    for _ in range(TILE)
                ]
                results = _both_ways(products, lambda m: _output_side(e, m))
                for r, line in enumerate(results):
                    for c, value in enumerate(line):
                        pixel = e.add(first, r * width + c)
                        condition = inside[r][c]
                        if condition is None:
                            self._finish(e, value, pixel, at, count)
                            continue
                        with e.when(condition):
                            self._finish(e, value, pixel, at, count)

        cover(e, self.channels, 1, some)

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


def tiles(output_size: Sequence[int]) -> tuple[int, int]:
    """Tiles down and across an image of outputs."""
    down, across = (-(-n // OUTPUTS) for n in output_size)
    return down, across


def _both_ways(square: _Square, transform: Callable[[list[str]], list[str]]) -> _Square:
    """The transform of every column, then of every row of what that makes."""
    columns = [transform(list(column)) for column in zip(*square, strict=True)]
    return [transform(list(row)) for row in zip(*columns, strict=True)]


def _input_side(e: Emitter, d: list[str]) -> list[str]:
    return [
        e.arithmetic("fsub", d[0], d[2]),
        e.arithmetic("fadd", d[1], d[2]),
        e.arithmetic("fsub", d[2], d[1]),
        e.arithmetic("fsub", d[1], d[3]),
    ]


def _output_side(e: Emitter, m: list[str]) -> list[str]:
    return [
        e.arithmetic("fadd", e.arithmetic("fadd", m[0], m[1]), m[2]),
        e.arithmetic("fsub", e.arithmetic("fsub", m[1], m[2]), m[3]),
    ]
