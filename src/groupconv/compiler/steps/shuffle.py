"""Regular channel shuffles: groups of channels taken in turn, one channel of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from groupconv.compiler.steps import entry
from groupconv.compiler.steps.channels import cuts
from groupconv.compiler.steps.step import Step
from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value
from groupconv.kernels.machine import Machine

# Numbers of groups whose vectors are rather interleaved than their channels copied one by one.
GROUPS = (2, 3, 4, 8)


@dataclass(frozen=True)
class ShuffleStep(Step):
    """Channel ``k * groups + g`` of the output is channel ``g * distance + k`` of the input.

    Args:
        pixels: of an image.
        channels: of the output, a multiple of the groups; ``x`` and ``y`` point to the first one.
        groups: one of :data:`GROUPS`.
        distance: channels of the input from one group to the next.
        strides: of the input and of the output.
    """

    pixels: int
    channels: int
    groups: int
    distance: int
    strides: tuple[int, int]

    arguments: ClassVar[tuple[str, ...]] = ("x", "y", "images")

    @property
    def bytes(self) -> int:
        return 8 * self.pixels * self.channels

    def write(self, machine: Machine, name: str) -> str:
        return entry.module(machine, name, self.arguments, self._body)

    def _body(self, e: Emitter) -> None:
        width, (into, out) = self.channels // self.groups, self.strides
        with e.loop(*entry.part(e, e.mul("%images", self.pixels))) as pixel:
            x, y = e.offset("%x", e.mul(pixel, into)), e.offset("%y", e.mul(pixel, out))
            whole = width // e.lanes
            if whole:
                with e.loop(0, whole * e.lanes, e.lanes) as start:
                    self._interleave(e, x, y, start, e.lanes)
            for start, count in cuts(width, e.lanes)[whole:]:
                self._interleave(e, x, y, start, count)

    def _interleave(self, e: Emitter, x: str, y: str, start: Value, count: int) -> None:
        sources = [e.offset(x, e.add(g * self.distance, start)) for g in range(self.groups)]
        store_interleaved(e, sources, e.offset(y, e.mul(start, self.groups)), count)


def regular(order: Sequence[int]) -> tuple[int, int, int] | None:
    """(first channel, groups, distance) of a shuffle that :class:`ShuffleStep` does, or None.

    It may take a part of each group, as where a shuffle is followed by a split.
    """
    for groups in GROUPS:
        if len(order) % groups or len(order) < 2 * groups:
            continue
        first, distance = order[0], order[1] - order[0]
        wanted = [first + i % groups * distance + i // groups for i in range(len(order))]
        if list(order) == wanted:
            return first, groups, distance
    return None


def store_interleaved(e: Emitter, sources: Sequence[str], target: str, count: int) -> None:
    """Store the first ``count`` values of each source (lanes at most) in turn: the first one of
    every source, the second ones, and so on."""
    rows = [e.load(source, 0, count) for source in sources]
    columns = e.transpose(rows) if len(rows) == e.lanes else _interleaved(e, rows)
    for i, column in enumerate(columns):
        if (left := count * len(rows) - i * e.lanes) > 0:
            e.store(column, target, i * e.lanes, min(left, e.lanes))


def _interleaved(e: Emitter, rows: Sequence[str]) -> list[str]:
    """As many vectors as there are rows, which hold their lanes in turn."""
    found = []
    for i in range(len(rows)):
        # Where each lane comes from: lane ``where // number`` of row ``where % number``.
        places = [divmod(i * e.lanes + lane, len(rows)) for lane in range(e.lanes)]
        vector = rows[0]
        kept = [at if row == 0 else 0 for at, row in places]
        for number, row in enumerate(rows[1:], 1):
            lanes = [
                e.lanes + at if source == number else lane
                for lane, (at, source) in zip(kept, places, strict=True)
            ]
            vector = e.shuffle(vector, row, lanes)
            # From now on every lane is where it belongs.
            kept = list(range(e.lanes))
        found.append(vector)
    return found
