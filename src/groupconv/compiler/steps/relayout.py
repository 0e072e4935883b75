"""Planes of pixels to rows of channels, or back: transposition."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from groupconv.compiler.steps import entry
from groupconv.compiler.steps.channels import cuts
from groupconv.compiler.steps.shuffle import GROUPS, store_interleaved
from groupconv.compiler.steps.step import Step
from groupconv.kernels.emit import Emitter
from groupconv.kernels.machine import Machine

# Pixels of a plane that are taken together: a line of the cache.
_PIXELS = 16


@dataclass(frozen=True)
class RelayoutStep(Step):
    """(N, C, pixels), contiguous, to (N, pixels, C), or back.

    Args:
        pixels: of an image.
        channels: planes of it.
        stride: elements from one pixel to the next where channels are innermost.
        inward: whether the channels become innermost; otherwise they are.
    """

    pixels: int
    channels: int
    stride: int
    inward: bool

    arguments: ClassVar[tuple[str, ...]] = ("x", "y", "images")

    @property
    def bytes(self) -> int:
        return 8 * self.pixels * self.channels

    def write(self, machine: Machine, name: str) -> str:
        return entry.module(machine, name, self.arguments, self._body)

    def _body(self, e: Emitter) -> None:
        """Blocks of pixels; the last one of an image overlaps the one before it rather than being
        smaller. What both hold is written twice, maybe by two threads: it is the same."""
        size = min(_PIXELS, self.pixels)
        number = -(-self.pixels // size)
        rows, planes = self.pixels * self.stride, self.channels * self.pixels
        into, out = (planes, rows) if self.inward else (rows, planes)
        with e.loop(*entry.part(e, e.mul("%images", number))) as task:
            image, block = e.div(task, number), e.rem(task, number)
            pixel = e.min(e.mul(block, size), self.pixels - size)
            x, y = e.offset("%x", e.mul(image, into)), e.offset("%y", e.mul(image, out))
            plane_side, row_side = (x, y) if self.inward else (y, x)
            plane_side = e.offset(plane_side, pixel)
            row_side = e.offset(row_side, e.mul(pixel, self.stride))
            if self.inward and self.stride == self.channels and self.channels in (1, *GROUPS):
                self._few(e, plane_side, row_side, size)
            else:
                self._squares(e, plane_side, row_side, size)

    def _few(self, e: Emitter, planes: str, rows: str, pixels: int) -> None:
        """Pixels so small that several fit in a vector."""
        for start, count in cuts(pixels, e.lanes):
            sources = [e.offset(planes, c * self.pixels + start) for c in range(self.channels)]
            store_interleaved(e, sources, e.offset(rows, start * self.channels), count)

    def _squares(self, e: Emitter, planes: str, rows: str, pixels: int) -> None:
        size = min(e.lanes, self.channels)
        with e.loop(0, self.channels, size) as start:
            channel = e.min(start, self.channels - size)
            plane = e.offset(planes, e.mul(channel, self.pixels))
            for first, count in cuts(pixels, e.lanes):
                row = e.offset(rows, e.add(channel, first * self.stride))
                self._square(e, e.offset(plane, first), row, size, count)

    def _square(self, e: Emitter, plane: str, row: str, channels: int, pixels: int) -> None:
        in_planes = [(plane, c * self.pixels, pixels) for c in range(channels)]
        in_rows = [(row, p * self.stride, channels) for p in range(pixels)]
        source, target = (in_planes, in_rows) if self.inward else (in_rows, in_planes)
        vectors = [e.load(*place) for place in source]
        columns = e.transpose(_filled(vectors, e.lanes))
        for column, (pointer, at, count) in zip(columns, target, strict=False):
            e.store(column, pointer, at, count)


def _filled(vectors: Sequence[str], lanes: int) -> list[str]:
    return [*vectors, *["poison"] * (lanes - len(vectors))]
