"""What a program is made of: pieces of native work with their records, and calls of PyTorch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from groupconv.compiler.graph import Host, Value
from groupconv.compiler.memory import Place, Storage
from groupconv.compiler.packed import Packed


@dataclass(frozen=True, eq=False)
class Pointer:
    """An address that is known when a program runs: in a storage, or in every thread's scratch.

    Args:
        storage: in what; None for the scratch.
        offset: bytes from its start.
    """

    storage: Storage | None
    offset: int = 0

    @classmethod
    def to(cls, place: Place, elements: int = 0) -> "Pointer":
        """To ``elements`` float32 values after the start of a value."""
        return cls(place.storage, 4 * (place.channel + elements))


@dataclass(frozen=True, eq=False)
class Task:
    """One native function and what it is called with.

    Args:
        name: of the node that it belongs to.
        kind: what it does, for people.
        function: its address; takes a record, a thread's number and the number of threads.
        record: its arguments: numbers, or pointers that differ from call to call.
        seconds: a guess of its time on one thread.
        macs: multiply-adds.
        bytes: read and written, at least.
        scratch: bytes that each thread needs for itself.
        inputs: what it reads.
        output: what it computes, or a part of it; no part is read by another one.
        packed: the weights whose address is in the record.
        keep: other tensors whose addresses are.
    """

    name: str
    kind: str
    function: int
    record: tuple[int | Pointer, ...]
    seconds: float
    macs: int
    bytes: int
    inputs: tuple[Value, ...]
    output: Value
    scratch: int = 0
    packed: Packed | None = None
    keep: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it reads beside values."""
        return self.keep if self.packed is None else (self.packed.tensor, *self.keep)


@dataclass(frozen=True, eq=False)
class Call:
    """An operator that PyTorch runs.

    Args:
        name: of its node.
        host: the operator.
        inputs, output: what it reads and makes.
    """

    name: str
    host: Host
    inputs: tuple[Value, ...]
    output: Value


def empty(value: Value) -> Tensor:
    """Memory for ``value`` alone, laid out as it is; its numbers are whatever is there."""
    if not value.shape:
        return torch.empty((), dtype=value.dtype)
    others = [n for i, n in enumerate(value.shape) if i != value.axis]
    return torch.empty(*others, value.channels, dtype=value.dtype).movedim(-1, value.axis)


def view(value: Value, place: Place, memory: Tensor) -> Tensor:
    """``value`` as PyTorch sees it, where it lies.

    Args:
        memory: float32; its first element is the first one of the place's storage.
    """
    others = [n for i, n in enumerate(value.shape) if i != value.axis]
    strides: list[int] = []
    step = place.pixel
    for n in reversed(others):
        strides.insert(0, step)
        step *= n
    flat = torch.as_strided(
        memory, [*others, value.channels], [*strides, 1], memory.storage_offset() + place.channel
    )
    return flat.movedim(-1, value.axis)
