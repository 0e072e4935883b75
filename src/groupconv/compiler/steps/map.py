"""Elementwise expressions."""

from dataclasses import dataclass

from groupconv.compiler.graph import Instruction
from groupconv.compiler.steps import entry, row
from groupconv.compiler.steps.copy import copy_channels
from groupconv.compiler.steps.functions import apply
from groupconv.compiler.steps.step import Step
from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value
from groupconv.kernels.machine import Machine

# Vectors of one long row whose code stands side by side.
_VECTORS = 4
# Elements of a cache line: no two threads write to the same one.
_LINE = 16
# Vectors of channels up to which lanes that a last vector would waste are worth the effort.
_FEW = 4


@dataclass(frozen=True, eq=False)
class MapStep(Step):
    """See :class:`groupconv.compiler.graph.Map`; y may be the memory of a full input with the same
    stride.

    Args:
        program: the instructions.
        reads: what there is of each input: a value for each pixel and channel (``full``), one for
            each channel of an image (``image``), one for each channel (``channel``), one for each
            pixel (``pixel``).
        constants: their number.
        pixels: of one image.
        channels: of a pixel.
        strides: of each input, then of y: elements from one pixel to the next; from one image to
            the next where there is a value for each channel of an image; meaningless for
            ``channel``.
    """

    program: tuple[Instruction, ...]
    reads: tuple[str, ...]
    constants: int
    pixels: int
    channels: int
    strides: tuple[int, ...]

    # By what they look like: in Python 1 and 1.0 are equal, but the second is no operand's number.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, MapStep) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def arguments(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self._inputs, *self._constants, "y", "images")

    @property
    def _inputs(self) -> list[str]:
        return [f"x{i}" for i in range(len(self.reads))]

    @property
    def _constants(self) -> list[str]:
        return [f"c{i}" for i in range(self.constants)]

    @property
    def bytes(self) -> int:
        whole = self.pixels * self.channels
        sizes = {
            "full": whole, "image": self.channels, "channel": self.channels, "pixel": self.pixels,
        }  # fmt: skip
        read = sum(sizes[read] for read in self.reads)
        return 4 * (read + self.constants * self.channels + whole)

    def write(self, machine: Machine, name: str) -> str:
        body = self._one_row if self._is_one_row(machine.lanes) else self._rows
        return entry.module(machine, name, self.arguments, body)

    @property
    def _operands(self) -> list[tuple[str, str, int]]:
        """Of each operand its pointer, what there is of it, and its stride."""
        inputs = zip(self._inputs, self.reads, self.strides[:-1], strict=True)
        return [
            *((f"%{name}", read, stride) for name, read, stride in inputs),
            *((f"%{name}", "channel", 0) for name in self._constants),
        ]

    def _is_one_row(self, lanes: int) -> bool:
        """Whether the pixels are rather taken as one long row of values."""
        kinds = {read for _, read, _ in self._operands}
        full = [stride for _, read, stride in self._operands if read == "full"]
        if not kinds <= {"full", "channel"} or {*full, self.strides[-1]} != {self.channels}:
            return False
        wasted = self.channels % lanes and self.channels < _FEW * lanes
        return "channel" not in kinds or bool(wasted)

    def _one_row(self, e: Emitter) -> None:
        total = e.mul("%images", self.pixels * self.channels)
        start, stop = entry.part(e, e.div(e.add(total, _LINE - 1), _LINE))
        start, stop = e.mul(start, _LINE), e.min(e.mul(stop, _LINE), total)
        # What there is for each channel is repeated, so that a vector can begin at any channel.
        sources = [
            (self._repeated(e, pointer), True) if read == "channel" else (pointer, False)
            for pointer, read, _ in self._operands
        ]

        def at(place: Value, count: int) -> None:
            repeats = any(repeated for _, repeated in sources)
            channel = e.rem(place, self.channels) if repeats else 0
            loaded = [e.load(p, channel if again else place, count) for p, again in sources]
            e.store(self._result(e, loaded), "%y", place, count)

        length, group = e.sub(stop, start), _VECTORS * e.lanes
        grouped = e.add(start, e.mul(e.div(length, group), group))
        whole = e.add(start, e.mul(e.div(length, e.lanes), e.lanes))
        with e.loop(start, grouped, group) as place:
            for i in range(_VECTORS):
                at(e.add(place, i * e.lanes), e.lanes)
        with e.loop(grouped, whole, e.lanes) as place:
            at(place, e.lanes)
        with e.loop(whole, stop) as place:
            at(place, 1)

    def _repeated(self, e: Emitter, source: str) -> str:
        """Memory that holds ``source`` again and again, for a vector more than the channels."""
        times = -(-(self.channels + e.lanes) // self.channels)
        memory = e.stack(-(-times * self.channels // e.lanes))
        with e.loop(0, times * self.channels, self.channels) as first:
            target = e.offset(memory, first)
            copy_channels(e, source, target, self.channels)
        return memory

    def _rows(self, e: Emitter) -> None:
        start, stop = entry.part(e, e.mul("%images", self.pixels))
        with e.loop(start, stop) as pixel:
            image = e.div(pixel, self.pixels) if "image" in self.reads else 0
            number = {"full": pixel, "pixel": pixel, "image": image, "channel": 0}
            sources = [
                (e.offset(pointer, e.mul(number[read], stride)), read)
                for pointer, read, stride in self._operands
            ]
            y = e.offset("%y", e.mul(pixel, self.strides[-1]))
            # One value for all channels is loaded once.
            vectors = [e.broadcast(p) if read == "pixel" else p for p, read in sources]

            def value(c: Value, count: int) -> str:
                loaded = [
                    vector if read == "pixel" else e.load(vector, c, count)
                    for vector, (_, read) in zip(vectors, sources, strict=True)
                ]
                return self._result(e, loaded)

            row.store(e, y, self.channels, value)

    def _result(self, e: Emitter, operands: list[str]) -> str:
        results: list[str] = []
        for instruction in self.program:
            values = [
                e.constant(operand) if isinstance(operand, float)
                else operands[operand] if operand >= 0
                else results[-1 - operand]
                for operand in instruction.operands
            ]  # fmt: skip
            results.append(apply(e, instruction.function, values, instruction.parameters))
        return results[-1]
