"""Images to the tiles of minimal filtering, as the points see them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from groupconv.compiler.filtering import TAPS, tiles
from groupconv.compiler.steps import entry, transform
from groupconv.compiler.steps.channels import cover
from groupconv.compiler.steps.step import Step
from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value
from groupconv.kernels.machine import Machine


@dataclass(frozen=True)
class ToTilesStep(Step):
    """Images in NHWC to a matrix ``(images * tiles, channels)`` for each number of a tile, one
    after another.

    Args:
        results: of a tile, along each side; its inputs are two more.
        channels: of a pixel.
        input_size: rows and columns of an image.
        before: rows and columns of padding before the image.
        output_size: rows and columns of the result of the convolution.
        stride: of the input.
        matrix: elements from one matrix to the next.
    """

    results: int
    channels: int
    input_size: tuple[int, int]
    before: tuple[int, int]
    output_size: tuple[int, int]
    stride: int
    matrix: int

    arguments: ClassVar[tuple[str, ...]] = ("x", "y", "images")

    @property
    def side(self) -> int:
        """Inputs along each side of a tile."""
        return self.results + TAPS - 1

    @property
    def tiles(self) -> tuple[int, int]:
        """Down and across."""
        return tiles(self.output_size, self.results)

    @property
    def bytes(self) -> int:
        numbers = self.side**2 * math.prod(self.tiles)
        return 4 * self.channels * (math.prod(self.input_size) + numbers)

    def write(self, machine: Machine, name: str) -> str:
        return entry.module(machine, name, self.arguments, self._body)

    def _body(self, e: Emitter) -> None:
        (height, width), (top, left) = self.input_size, self.before
        down, across = self.tiles
        with e.loop(*entry.part(e, e.mul("%images", down))) as line:
            image, tile = e.div(line, down), e.rem(line, down)
            x = e.offset("%x", e.mul(image, height * width * self.stride))
            row = e.sub(e.mul(tile, self.results), top)
            with e.loop(0, across) as number:
                column = e.sub(e.mul(number, self.results), left)
                y = e.offset("%y", e.mul(e.add(e.mul(line, across), number), self.channels))
                self._tile(e, x, row, column, y)

    def _tile(self, e: Emitter, x: str, row: Value, column: Value, y: str) -> None:
        """One tile, whole, or with zeros where it is outside of the image."""
        height, width = self.input_size
        side = range(self.side)
        corner = e.offset(x, e.mul(e.add(e.mul(row, width), column), self.stride))
        whole = e.let(
            f"and i1 {e.let(f'icmp ult i64 {row}, {max(0, height - self.side + 1)}')}, "
            f"{e.let(f'icmp ult i64 {column}, {max(0, width - self.side + 1)}')}"
        )

        def inside(at: Value, count: int) -> transform.Square:
            return [
                [e.load(corner, e.add(at, (r * width + c) * self.stride), count) for c in side]
                for r in side
            ]

        with e.when(whole):
            self._transform(e, inside, y)
        with e.when(e.let(f"xor i1 {whole}, true")):
            # What is outside is read from the pixel nearest to it, and not used.
            rows = [_clamped(e, e.add(row, r), height) for r in side]
            columns = [_clamped(e, e.add(column, c), width) for c in side]
            there = [[e.let(f"and i1 {a}, {b}") for _, b in columns] for _, a in rows]
            starts = [e.offset(x, e.mul(r, width * self.stride)) for r, _ in rows]
            steps = [e.mul(c, self.stride) for c, _ in columns]

            def border(at: Value, count: int) -> transform.Square:
                return [
                    [
                        e.let(
                            f"select i1 {there[r][c]}, {e.vector} "
                            f"{e.load(starts[r], e.add(steps[c], at), count)}, "
                            f"{e.vector} zeroinitializer"
                        )
                        for c in side
                    ]
                    for r in side
                ]

            self._transform(e, border, y)

    def _transform(
        self, e: Emitter, load: Callable[[Value, int], transform.Square], y: str
    ) -> None:
        def some(channel: Value, vectors: Sequence[tuple[int, int]]) -> None:
            for offset, count in vectors:
                at = e.add(channel, offset)
                tile = transform.inputs(e, self.results, load(at, count))
                for i, value in enumerate(v for line in tile for v in line):
                    e.store(value, y, e.add(i * self.matrix, at), count)

        cover(e, self.channels, 1, some)


def _clamped(e: Emitter, index: Value, size: int) -> tuple[Value, str]:
    """The nearest index of ``size`` ones, and whether it is ``index`` itself."""
    inside = e.let(f"icmp ult i64 {index}, {size}")
    return e.min(e.max(index, 0), size - 1), inside
