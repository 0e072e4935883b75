"""Session: the memory of one call of a program, and the call itself.

Every call that runs at the same time has its own arena and its own records, in which only the
addresses of the network's inputs and outputs change from one call to the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groupconv.compiler.graph import Graph, Input, Value
from groupconv.compiler.memory import Memory, Storage
from groupconv.compiler.runner import LAYOUT, PLACE, STEP, give_way, runner
from groupconv.compiler.schedule import schedule
from groupconv.compiler.task import Call, Task, empty, view
from groupconv.kernels import openmp


@dataclass(frozen=True)
class Run:
    """Tasks that follow each other without a call of PyTorch between them: their numbers."""

    first: int
    stop: int


class Session:
    """Runs a program, one call at a time.

    Args:
        graph, memory: the program's.
        steps: tasks and calls, in order.
        threads: that share the work.
        arena: ``memory.arena`` bytes, as float32.
    """

    def __init__(
        self,
        graph: Graph,
        memory: Memory,
        steps: Sequence[Task | Call],
        threads: int,
        arena: Tensor,
    ) -> None:
        self.graph, self.memory, self.threads = graph, memory, threads
        self.tasks = [step for step in steps if isinstance(step, Task)]
        self.parts = _runs(steps)
        self.arena = arena
        share = max((task.scratch for task in self.tasks), default=0)
        self.scratch = torch.empty(max(1, threads * share // 4), dtype=torch.float32)
        self.constants = list(graph.constants.values())
        self._write_records()
        self.place = np.zeros(PLACE, np.int64)
        self._run = runner()
        self._arguments = {part: self._pack(part) for part in self.parts if isinstance(part, Run)}

    def _write_records(self) -> None:
        starts = np.cumsum([0, *(len(task.record) for task in self.tasks)])
        self.records = np.zeros(starts[-1], np.int64)
        # Where addresses in the network's inputs and outputs go, and how far from their start.
        self._moving: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for start, task in zip(starts, self.tasks, strict=False):
            for slot, item in enumerate(task.record, start):
                if isinstance(item, int):
                    self.records[slot] = item
                elif item.storage is None:
                    self.records[slot] = self.scratch.data_ptr() + item.offset
                elif item.storage.kind in ("input", "output"):
                    moving = (item.storage.kind, item.storage.number)
                    self._moving.setdefault(moving, []).append((int(slot), item.offset))
                else:
                    self.records[slot] = self._memory(item.storage).data_ptr() + item.offset
        turns = schedule(self.tasks, self.memory.places, self.threads)
        base = self.records.ctypes.data
        self.steps = np.array(
            [
                (task.function, base + 8 * start, turn.threads, turn.meet)
                for task, start, turn in zip(self.tasks, starts, turns, strict=False)
            ],
            np.int64,
        ).reshape(len(self.tasks), len(STEP))

    def _memory(self, storage: Storage) -> Tensor:
        """What an arena's or a constant's storage begins with."""
        if storage.kind == "constant":
            return self.constants[storage.number]
        return self.arena[storage.offset // 4 :]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The network's outputs."""
        frame = self._begin(inputs)
        for part in self.parts:
            self._do(part, frame)
        return frame.results()

    def timed(
        self, inputs: Sequence[Tensor], clock: Callable[[], float]
    ) -> tuple[list[Tensor], list[float]]:
        """The same, step by step, with the seconds of each."""
        frame, seconds = self._begin(inputs), []
        for part in self.parts:
            singles: list[Run | Call] = [part]
            if isinstance(part, Run):
                singles = [Run(i, i + 1) for i in range(part.first, part.stop)]
            for single in singles:
                start = clock()
                self._do(single, frame)
                seconds.append(clock() - start)
        return frame.results(), seconds

    def _begin(self, inputs: Sequence[Tensor]) -> "_Frame":
        frame = _Frame(self.graph, self.memory, self.arena, inputs)
        for (kind, number), slots in self._moving.items():
            tensors: Sequence[Tensor | None] = inputs if kind == "input" else frame.outputs
            tensor = tensors[number]
            assert tensor is not None
            start = tensor.data_ptr()
            for slot, offset in slots:
                self.records[slot] = start + offset
        return frame

    def _do(self, part: Run | Call, frame: "_Frame") -> None:
        if isinstance(part, Run):
            self._run(self._arguments.get(part) or self._pack(part))
        else:
            frame.call(part)

    def _pack(self, part: Run) -> bytes:
        """What the runner is called with."""
        pool = openmp.pool()
        return LAYOUT.pack(
            self.steps.ctypes.data + 8 * len(STEP) * part.first,
            part.stop - part.first,
            self.threads,
            self.place.ctypes.data,
            *((pool.parallel, pool.thread_number, pool.thread_count) if pool else (0, 0, 0)),
            give_way() if pool else 0,
        )


class _Frame:
    """The values of one call, as PyTorch's tensors.

    Args:
        graph, memory: the program's.
        arena: of the session.
        inputs: of the network.
    """

    def __init__(
        self, graph: Graph, memory: Memory, arena: Tensor, inputs: Sequence[Tensor]
    ) -> None:
        self.graph, self.memory, self.arena, self.inputs = graph, memory, arena, inputs
        # Those that tasks write.
        self.outputs = [
            empty(value) if memory.is_output(value, number) else None
            for number, value in enumerate(graph.outputs)
        ]
        # What PyTorch makes and native code never touches.
        self.loose: dict[Value, Tensor] = {}

    def results(self) -> list[Tensor]:
        """The outputs of the network; none of them shares memory with the arena."""
        return [
            self._result(value) if tensor is None else tensor
            for value, tensor in zip(self.graph.outputs, self.outputs, strict=True)
        ]

    def _result(self, value: Value) -> Tensor:
        found = self.find(value)
        return found if value in self.graph.inputs else found.clone()

    def find(self, value: Value) -> Tensor:
        if value in self.loose:
            return self.loose[value]
        if value in self.graph.inputs:
            return self.inputs[self.graph.inputs.index(value)]
        if value in self.graph.constants:
            return self.graph.constants[value]
        place = self.memory.places[value]
        storage = place.storage
        match storage.kind:
            case "input":
                start: Tensor | None = self.inputs[storage.number]
            case "output":
                start = self.outputs[storage.number]
            case "constant":
                start = list(self.graph.constants.values())[storage.number]
            case _:
                start = self.arena[storage.offset // 4 :]
        assert start is not None
        return view(value, place, start)

    def call(self, call: Call) -> None:
        """Let PyTorch compute one value."""

        def argument(item: Any) -> Any:
            if isinstance(item, Input):
                found = self.find(call.inputs[item.number])
                return found.contiguous() if call.host.dense else found
            if isinstance(item, list | tuple):
                return type(item)(map(argument, item))
            return item

        kwargs = {name: argument(item) for name, item in call.host.kwargs.items()}
        result = call.host.target(*map(argument, call.host.args), **kwargs)
        if call.host.item is not None:
            result = result[call.host.item]
        if call.output in self.memory.places:
            self.find(call.output).copy_(result)
        else:
            self.loose[call.output] = result


def _runs(steps: Sequence[Task | Call]) -> list[Run | Call]:
    """Neighbouring tasks joined into runs."""
    found: list[Run | Call] = []
    tasks = 0
    for step in steps:
        if isinstance(step, Call):
            found.append(step)
            continue
        if found and isinstance(last := found[-1], Run):
            found[-1] = Run(last.first, tasks + 1)
        else:
            found.append(Run(tasks, tasks + 1))
        tasks += 1
    return found
