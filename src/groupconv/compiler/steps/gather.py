"""Channels in any order."""

from dataclasses import dataclass
from typing import ClassVar

from groupconv.compiler.steps import entry
from groupconv.compiler.steps.channels import cuts
from groupconv.compiler.steps.step import Step
from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value
from groupconv.kernels.machine import Machine

# Channels whose numbers are kept in registers, and pixels that they serve.
_CHANNELS, _PIXELS = 8, 16


@dataclass(frozen=True)
class GatherStep(Step):
    """Channel i of the output is channel ``order[i]`` of the input.

    Args:
        pixels: of an image.
        channels: of the output; ``order`` is an array of as many 64-bit integers.
        strides: of the input and of the output.
    """

    pixels: int
    channels: int
    strides: tuple[int, int]

    arguments: ClassVar[tuple[str, ...]] = ("x", "order", "y", "images")

    @property
    def bytes(self) -> int:
        return 8 * self.pixels * self.channels

    def write(self, machine: Machine, name: str) -> str:
        return entry.module(machine, name, self.arguments, self._body)

    def _body(self, e: Emitter) -> None:
        start, stop = entry.part(e, e.mul("%images", self.pixels))
        # So few that they stay in the first cache while their channels are taken.
        with e.loop(start, stop, _PIXELS) as first:
            last = e.min(e.add(first, _PIXELS), stop)
            size = min(_CHANNELS, e.lanes)
            whole = self.channels // size
            if whole:
                with e.loop(0, whole * size, size) as channel:
                    self._channels(e, first, last, channel, size)
            for start, count in cuts(self.channels, size)[whole:]:
                self._channels(e, first, last, start, count)

    def _channels(self, e: Emitter, first: Value, last: Value, channel: Value, count: int) -> None:
        into, out = self.strides
        sources = [e.offset("%x", e.load_index("%order", e.add(channel, i))) for i in range(count)]
        target = e.offset("%y", channel)
        with e.loop(first, last) as pixel:
            at, vector = e.mul(pixel, into), "poison"
            for lane, source in enumerate(sources):
                value = e.let(f"load float, ptr {e.offset(source, at)}, align 4")
                vector = e.let(f"insertelement {e.vector} {vector}, float {value}, i64 {lane}")
            e.store(vector, target, e.mul(pixel, out), count)
