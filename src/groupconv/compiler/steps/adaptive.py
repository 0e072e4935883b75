"""Adaptive max and average pooling; to one pixel it is the maximum or the mean of an image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from groupconv.compiler.graph import Pool
from groupconv.compiler.steps import entry
from groupconv.compiler.steps.channels import Cut, blocks, cover, cuts
from groupconv.compiler.steps.pool import PoolStep
from groupconv.compiler.steps.step import Step
from groupconv.compiler.steps.window import Range, Window
from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value
from groupconv.kernels.machine import Machine

# Vectors of channels whose results are kept in registers.
_VECTORS = 4
# The same for a whole image: all loads of a pixel are from one place, and far from the next one.
_MOST = 8
# Blocks of channels of an image that threads can share, if each is a line of the cache at least.
_BLOCKS, _LINE = 4, 16
# Pixels in one chain of sums, about: errors grow with its length.
_CHAIN = 16


@dataclass(frozen=True)
class AdaptivePoolStep(Step):
    """Adaptive pooling of images in NHWC.

    Args:
        kind: ``max`` or ``average``.
        channels: of a pixel.
        input_size, output_size: rows and columns of an image.
        strides: of the input and of the output.
    """

    kind: str
    channels: int
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    strides: tuple[int, int]

    arguments: ClassVar[tuple[str, ...]] = ("x", "y", "images")

    @property
    def bytes(self) -> int:
        return 4 * self.channels * (math.prod(self.input_size) + math.prod(self.output_size))

    def write(self, machine: Machine, name: str) -> str:
        if self.output_size == (1, 1):
            return entry.module(machine, name, self.arguments, lambda e: _Whole(self, e).body())
        sizes = list(zip(self.input_size, self.output_size, strict=True))
        if all(n % out == 0 for n, out in sizes):
            rows, columns = (n // out for n, out in sizes)
            pool = Pool(self.kind, (rows, columns), (rows, columns), ((0, 0), (0, 0)))
            return PoolStep(pool, self.channels, self.input_size, self.strides).write(machine, name)
        return entry.module(machine, name, self.arguments, lambda e: _windows(self, e))


def _windows(step: AdaptivePoolStep, e: Emitter) -> None:
    """Windows of several sizes, which may overlap."""
    (height, width), (rows, columns), (into, out) = step.input_size, step.output_size, step.strides
    window = Window(e, step.kind)

    def taps(output: Value, size: int, outputs: int) -> Range:
        first = e.div(e.mul(output, size), outputs)
        return first, e.div(e.add(e.mul(e.add(output, 1), size), outputs - 1), outputs)

    with e.loop(*entry.part(e, e.mul("%images", rows))) as line:
        image, row = e.div(line, rows), e.rem(line, rows)
        x = e.offset("%x", e.mul(image, height * width * into))
        down = taps(row, height, rows)
        with e.loop(0, columns) as column:
            across = taps(column, width, columns)
            y = e.offset("%y", e.mul(e.add(e.mul(line, columns), column), out))
            pixels = e.mul(e.sub(down[1], down[0]), e.sub(across[1], across[0]))
            divisor = e.integer(pixels) if step.kind == "average" else "poison"

            def some(channel: Value, vectors: Sequence[Cut]) -> None:
                at = e.offset(x, channel)
                found = window.rows(at, down, width * into, across, into, vectors)
                window.store(found, divisor, e.offset(y, channel), vectors)

            cover(e, step.channels, _VECTORS, some)


class _Whole:
    """Writes the loop over images and blocks of their channels."""

    def __init__(self, step: AdaptivePoolStep, e: Emitter) -> None:
        self.e, self.channels, (self.into, self.out) = e, step.channels, step.strides
        self.pixels = math.prod(step.input_size)
        self.window = Window(e, step.kind)
        # So many chains, one inside the other, and so many pixels or chains in each.
        self.levels = max(1, math.ceil(math.log(self.pixels, _CHAIN)))
        self.chain = math.ceil(self.pixels ** (1 / self.levels))

    def body(self) -> None:
        e, found = self.e, cuts(self.channels, self.e.lanes)
        most = min(_MOST, max(_LINE // e.lanes, -(-len(found) // _BLOCKS)))
        size, full = blocks(self.channels, e.lanes, most)
        rest = found[full * size :]
        number = full + bool(rest)
        with e.loop(*entry.part(e, e.mul("%images", number))) as task:
            image, block = e.div(task, number), e.rem(task, number)
            x = e.offset("%x", e.mul(image, self.pixels * self.into))
            y = e.offset("%y", e.mul(image, self.out))
            if full:
                with e.when(e.let(f"icmp slt i64 {block}, {full}")):
                    channel = e.mul(block, size * e.lanes)
                    self._block(e.offset(x, channel), e.offset(y, channel), found[:size])
            if rest:
                with e.when(e.let(f"icmp eq i64 {block}, {full}")):
                    self._block(x, y, rest)

    def _block(self, x: str, y: str, vectors: Sequence[Cut]) -> None:
        found = self._join(x, self.pixels, self.levels, vectors)
        self.window.store(found, self.pixels, y, vectors)

    def _join(self, x: str, pixels: Value, levels: int, vectors: Sequence[Cut]) -> list[str]:
        """The first ``pixels`` at ``x``, as chains of chains."""
        if levels == 1:
            return self.window.row(x, (0, pixels), self.into, vectors)
        e, part = self.e, self.chain ** (levels - 1)
        even = isinstance(pixels, int) and pixels % part == 0

        def more(start: Value, found: list[str]) -> list[str]:
            count = part if even else e.min(e.sub(pixels, start), part)
            at = e.offset(x, e.mul(start, self.into))
            return self.window.join(found, self._join(at, count, levels - 1, vectors))

        return e.fold(0, pixels, part, self.window.nothing(vectors), more)
