"""Copies of pixels, from one distance between them to another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from groupconv.compiler.steps import entry
from groupconv.compiler.steps.channels import Cut, cover
from groupconv.compiler.steps.step import Step
from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value
from groupconv.kernels.machine import Machine

# Vectors that are loaded before they are stored.
_VECTORS = 8


@dataclass(frozen=True)
class CopyStep(Step):
    """Copies neighbouring channels: a slice, or a part of a concatenation.

    Args:
        pixels: of an image.
        channels: that are copied; ``x`` and ``y`` point to the first one.
        strides: of the input and of the output.
    """

    pixels: int
    channels: int
    strides: tuple[int, int]

    arguments: ClassVar[tuple[str, ...]] = ("x", "y", "images")

    @property
    def bytes(self) -> int:
        return 8 * self.pixels * self.channels

    def write(self, machine: Machine, name: str) -> str:
        return entry.module(machine, name, self.arguments, self._body)

    def _body(self, e: Emitter) -> None:
        start, stop = entry.part(e, e.mul("%images", self.pixels))
        x, y = (
            e.offset(pointer, e.mul(start, stride))
            for pointer, stride in zip(("%x", "%y"), self.strides, strict=True)
        )
        copy_pixels(e, x, y, e.sub(stop, start), self.channels, self.strides)


def copy_pixels(
    e: Emitter, x: str, y: str, pixels: Value, channels: int, strides: tuple[int, int]
) -> None:
    """Copy pixels that lie side by side."""
    if strides == (channels, channels):
        _copy_run(e, x, y, e.mul(pixels, channels))
        return
    with e.loop(0, pixels) as pixel:
        copy_channels(
            e,
            e.offset(x, e.mul(pixel, strides[0])),
            e.offset(y, e.mul(pixel, strides[1])),
            channels,
        )


def copy_channels(e: Emitter, x: str, y: str, channels: int) -> None:
    """Copy neighbouring elements."""

    def some(channel: Value, vectors: Sequence[Cut]) -> None:
        values = [e.load(x, e.add(channel, offset), count) for offset, count in vectors]
        for value, (offset, count) in zip(values, vectors, strict=True):
            e.store(value, y, e.add(channel, offset), count)

    cover(e, channels, _VECTORS, some)


def _copy_run(e: Emitter, x: str, y: str, elements: Value) -> None:
    """Copy neighbouring elements, of a number that may be known when the step runs."""
    if isinstance(elements, int):
        copy_channels(e, x, y, elements)
        return
    done: Value = 0
    for size in (_VECTORS * e.lanes, e.lanes):
        stop = e.mul(e.div(elements, size), size)
        with e.loop(done, stop, size) as start:
            copy_channels(e, e.offset(x, start), e.offset(y, start), size)
        done = stop
    with e.loop(done, elements) as last:
        e.copy(e.offset(x, last), e.offset(y, last))
