"""Where every value lies: one arena for all of them, shared over time.

Values that are parts of a wider one (a slice of channels, an input of a concatenation) have no
memory of their own: they lie in it, their pixels further apart than their channels are many. So
neither a split nor a concatenation has work left to do.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from groupconv.compiler.graph import (
    Concat,
    Convolution,
    Gather,
    Graph,
    Host,
    Map,
    Node,
    Relayout,
    Value,
    View,
    consecutive,
)
from groupconv.compiler.weights import reads_planes

# Bytes to which buffers are aligned: a line of the cache.
_ALIGNMENT = 64


@dataclass(eq=False)
class Storage:
    """Memory that one value fills, and others may lie in.

    Args:
        size: bytes.
        first, last: numbers of the nodes between which it is in use.
        kind: ``arena``, or ``input``, ``output`` or ``constant`` where it is not ours.
        number: which input, output or constant.
        offset: byte of the arena where it begins.
    """

    size: int
    first: int
    last: int
    kind: str = "arena"
    number: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Place:
    """Where a value lies.

    Args:
        storage: in what.
        channel: the element of each pixel where its channels begin.
        pixel: elements from one pixel to the next.
    """

    storage: Storage
    channel: int
    pixel: int


@dataclass
class Memory:
    """The places of all values that native code touches, and the bytes of the arena."""

    places: dict[Value, Place] = field(default_factory=dict)
    arena: int = 0

    def is_output(self, value: Value, number: int) -> bool:
        """Whether a step writes ``value`` where the network returns its output ``number``."""
        place = self.places.get(value)
        return place is not None and (place.storage.kind, place.storage.number) == (
            "output",
            number,
        )

    def storages(self) -> list[Storage]:
        return list(dict.fromkeys(place.storage for place in self.places.values()))


def is_native(value: Value) -> bool:
    """Whether the value can lie in the arena."""
    return value.dtype == torch.float32 and len(value.shape) > 0


def plan(graph: Graph) -> Memory:
    """Places for all values of ``graph``, in an arena as small as a simple search finds."""
    places = _Places(graph)
    places.find()
    memory = Memory(places.found)
    memory.arena = _pack([s for s in memory.storages() if s.kind == "arena"])
    return memory


class _Places:
    """Decides which values lie in which, from the last to the first."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.found: dict[Value, Place] = {}
        self.producers = graph.producers()
        self.made = {node.output: i for i, node in enumerate(graph.nodes)}
        self.read = {value: max(self.made[node.output] for node in nodes)
                     for value, nodes in graph.readers().items()}  # fmt: skip
        self.read.update(dict.fromkeys(graph.outputs, len(graph.nodes)))
        # Steps on planes know of no distance between pixels.
        self.dense = {value for node in graph.nodes for value in _planes(node)}

    def find(self) -> None:
        for kind, values in (("input", self.graph.inputs), ("constant", self.graph.constants)):
            for number, value in enumerate(values):
                if is_native(value):
                    self._own(value, kind, number)
        for number, value in enumerate(self.graph.outputs):
            self._output(value, number)
        # Wider concatenations come later: what lies in them need not lie in the narrower ones.
        for node in reversed(self.graph.nodes):
            if isinstance(node.operator, Concat) and is_native(node.output):
                self._concatenation(node)
        for node in self.graph.nodes:
            if is_native(node.output) and node.output not in self.found:
                self._node(node)
        for value, place in self.found.items():
            storage = place.storage
            storage.first = min(storage.first, self.made.get(value, -1))
            storage.last = max(storage.last, self.read.get(value, storage.first))

    def _own(self, value: Value, kind: str = "arena", number: int = 0) -> Place:
        size = 4 * value.pixels * value.channels
        storage = Storage(size, self.made.get(value, -1), self.made.get(value, -1), kind, number)
        self.found[value] = Place(storage, 0, value.channels)
        return self.found[value]

    def _output(self, value: Value, number: int) -> None:
        """What the network returns is written where it is returned, if native code makes it."""
        owner = value
        while (node := self.producers.get(owner)) and isinstance(node.operator, View):
            owner = node.inputs[0]
        node = self.producers.get(owner)
        if node is None or owner in self.found or not is_native(owner):
            return
        if isinstance(node.operator, Host) or _slice(node) is not None:
            return
        self._own(owner, "output", number)

    def _concatenation(self, node: Node) -> None:
        if node.output not in self.found:
            if self._are_neighbours(node):
                return
            self._own(node.output)
        place, start = self.found[node.output], 0
        for value in node.inputs:
            if self._may_move(value) and node.inputs.count(value) == 1:
                self.found[value] = Place(place.storage, place.channel + start, place.pixel)
            start += value.channels

    def _may_lie(self, value: Value, place: Place) -> bool:
        """Whether all that read and write ``value`` find it there."""
        return value not in self.dense or place.pixel == value.channels

    def _are_neighbours(self, node: Node) -> bool:
        """Whether the inputs will lie side by side already, in a wider concatenation."""
        if node.output in self.dense:
            return False
        first, *others = (self.found.get(value) for value in node.inputs)
        if first is None or first.storage.kind in ("input", "constant"):
            return False
        channel = first.channel
        for value, place in zip(node.inputs, [first, *others], strict=True):
            if place is None or place != Place(first.storage, channel, first.pixel):
                return False
            channel += value.channels
        self.found[node.output] = first
        return True

    def _may_move(self, value: Value) -> bool:
        """Whether a step writes it that can write anywhere."""
        node = self.producers.get(value)
        return (
            node is not None
            and value not in self.found
            and value not in self.dense
            and not isinstance(node.operator, View)
            and _slice(node) is None
        )

    def _node(self, node: Node) -> None:
        start = _slice(node)
        if start is not None or isinstance(node.operator, View):
            source = self.found.get(node.inputs[0])
            if source is not None and self._fits(node, source):
                # Dense memory seen as rows of another length.
                dense = start is None and source.pixel == node.inputs[0].channels
                pixel = node.output.channels if dense else source.pixel
                place = Place(source.storage, source.channel + (start or 0), pixel)
                if self._may_lie(node.output, place):
                    self.found[node.output] = place
                    return
        if isinstance(node.operator, Map):
            for value in node.inputs:
                if self._ends_here(value, node) and self._may_lie(node.output, self.found[value]):
                    self.found[node.output] = self.found[value]
                    return
        self._own(node.output)

    def _fits(self, node: Node, source: Place) -> bool:
        """Whether pixels that lie apart are still the same rows of channels."""
        value = node.inputs[0]
        if isinstance(node.operator, Gather) or source.pixel == value.channels:
            return True
        return node.output.channels == value.channels

    def _ends_here(self, value: Value, node: Node) -> bool:
        """Whether ``node`` may write over ``value``: of its shape, and nobody needs it, nor what
        shares its memory, any more."""
        place, number = self.found.get(value), self.made[node.output]
        if place is None or place.storage.kind != "arena" or value.shape != node.output.shape:
            return False
        for other in node.inputs:
            # What lies beside it, or is spread over it, would be read after it is written over.
            there = self.found.get(other)
            if (
                there
                and there.storage is place.storage
                and (there != place or other.shape != value.shape)
            ):
                return False
        return all(
            self.read.get(other, -1) <= number
            for other, there in self.found.items()
            if there.storage is place.storage
        )


def _planes(node: Node) -> list[Value]:
    """What the node reads or writes as planes, channel by channel."""
    if isinstance(node.operator, Relayout):
        return [value for value in (*node.inputs, node.output) if value.contiguous]
    if isinstance(node.operator, Convolution) and reads_planes(node):
        return [node.inputs[0]]
    return []


def _slice(node: Node) -> int | None:
    """The first channel where the node takes neighbouring ones."""
    if isinstance(node.operator, Gather) and consecutive(node.operator.order):
        return node.operator.order[0]
    return None


def _pack(storages: list[Storage]) -> int:
    """Give every storage its offset, large ones first, each the lowest that is free while it is in
    use; returns the bytes of all."""
    placed: list[Storage] = []
    for storage in sorted(storages, key=lambda s: -s.size):
        storage.offset = next(_gaps(storage, placed))
        placed.append(storage)
    return max((s.offset + _aligned(s.size) for s in placed), default=0)


def _gaps(storage: Storage, placed: list[Storage]) -> Iterator[int]:
    """Offsets where it fits, the lowest first."""
    taken = sorted(
        (other.offset, other.offset + _aligned(other.size))
        for other in placed
        if other.first <= storage.last and storage.first <= other.last
    )
    end = 0
    for start, stop in taken:
        if start - end >= _aligned(storage.size):
            yield end
        end = max(end, stop)
    yield end


def _aligned(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT
