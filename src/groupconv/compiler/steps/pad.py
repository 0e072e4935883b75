"""Constant padding of rows and columns."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from groupconv.compiler.graph import Pad
from groupconv.compiler.steps import entry
from groupconv.compiler.steps.channels import Cut, cover
from groupconv.compiler.steps.copy import copy_pixels
from groupconv.compiler.steps.step import Step
from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value
from groupconv.kernels.machine import Machine

# Vectors that are stored at once.
_VECTORS = 8


@dataclass(frozen=True)
class PadStep(Step):
    """Padding and cropping of images in NHWC.

    Args:
        pad: what is put around, or taken away.
        channels: of a pixel.
        input_size: rows and columns of an image.
        strides: of the input and of the output.
    """

    pad: Pad
    channels: int
    input_size: tuple[int, int]
    strides: tuple[int, int]

    arguments: ClassVar[tuple[str, ...]] = ("x", "y", "images")

    @property
    def output_size(self) -> tuple[int, int]:
        rows, columns = (n + sum(p) for n, p in zip(self.input_size, self.pad.padding, strict=True))
        return rows, columns

    @property
    def bytes(self) -> int:
        kept = math.prod(stop - first for first, stop in map(self._kept, (0, 1)))
        return 4 * self.channels * (kept + math.prod(self.output_size))

    def _kept(self, axis: int) -> tuple[int, int]:
        """The outputs along an axis that come from the input."""
        before, size = self.pad.padding[axis][0], self.output_size[axis]
        first = min(max(before, 0), size)
        return first, min(max(before + self.input_size[axis], first), size)

    def write(self, machine: Machine, name: str) -> str:
        return entry.module(machine, name, self.arguments, self._body)

    def _body(self, e: Emitter) -> None:
        (rows, columns), (height, width) = self.output_size, self.input_size
        (before, _), (left, _) = self.pad.padding
        into, out = self.strides
        (first, stop), (start, end) = map(self._kept, (0, 1))
        with e.loop(*entry.part(e, e.mul("%images", rows))) as line:
            image, row = e.div(line, rows), e.rem(line, rows)
            y = e.offset("%y", e.mul(line, columns * out))
            # Below ``first``, the difference is a large number.
            inside = e.let(f"icmp ult i64 {e.sub(row, first)}, {stop - first}")
            with e.when(inside):
                pixel = e.add(e.mul(image, height * width), e.mul(e.sub(row, before), width))
                x = e.offset("%x", e.mul(e.add(pixel, start - left), into))
                self._fill(e, y, start)
                if end > start:
                    target = e.offset(y, start * out)
                    copy_pixels(e, x, target, end - start, self.channels, self.strides)
                self._fill(e, e.offset(y, end * out), columns - end)
            outside = e.let(f"xor i1 {inside}, true")
            with e.when(outside):
                self._fill(e, y, columns)

    def _fill(self, e: Emitter, y: str, pixels: int) -> None:
        """Store the value in neighbouring pixels."""
        if not pixels:
            return
        stride, channels, value = self.strides[1], self.channels, e.constant(self.pad.value)
        if stride == channels:
            pixels, channels = 1, pixels * channels

        def some(channel: Value, vectors: Sequence[Cut]) -> None:
            for offset, count in vectors:
                e.store(value, y, e.add(at, e.add(channel, offset)), count)

        with e.loop(0, pixels) as pixel:
            at = e.mul(pixel, stride)
            cover(e, channels, _VECTORS, some)
