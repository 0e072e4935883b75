"""A whole kernel as an LLVM module: which work there is, who does it, where it is staged.

The work is cut into tasks: some rows of one image times one block of channels, numbered with the
blocks innermost, so that neighbouring tasks share their input. Every thread takes an equal run of
tasks. No sum depends on how the tasks are shared out.
"""

import ctypes
import math

from groupconv.kernels.blocks import Block, blocks
from groupconv.kernels.emit import Emitter, Value
from groupconv.kernels.forward import BlockFunction
from groupconv.kernels.machine import Machine
from groupconv.kernels.spec import KernelSpec
from groupconv.kernels.staging import InputStage, OutputStage
from groupconv.kernels.tile import Tile

# What a kernel is called with, in this order; the last three are functions of the OpenMP runtime.
ARGUMENTS = (
    "x", "w", "bias", "residual", "order", "y", "buffer", "images", "threads",
    "parallel", "thread_number", "thread_count",
)  # fmt: skip
_INTEGERS = ("images", "threads")
PROTOTYPE = ctypes.CFUNCTYPE(
    None, *(ctypes.c_int64 if name in _INTEGERS else ctypes.c_void_p for name in ARGUMENTS)
)


def buffer_size(spec: KernelSpec, machine: Machine, tile: Tile) -> int:
    """Elements of the buffer that each thread stages rows in; 0 where nothing is staged."""
    kinds = blocks(spec.conv, machine.lanes, tile.vectors)
    return _input_buffer(spec, kinds, tile) + _output_buffer(spec, kinds, tile)


def _input_rows(spec: KernelSpec, rows: int) -> int:
    """Rows of the input that ``rows`` rows of the output need, at most."""
    conv = spec.conv
    return min(
        conv.input_size[0],
        (rows - 1) * conv.stride[0] + (conv.kernel_size[0] - 1) * conv.dilation[0] + 1,
    )


def _input_buffer(spec: KernelSpec, kinds: list[Block], tile: Tile) -> int:
    if not spec.staged_input:
        return 0
    rows = _input_rows(spec, tile.rows) * spec.conv.input_size[1]
    return _whole_lines(rows * max(block.inputs for block in kinds))


def _output_buffer(spec: KernelSpec, kinds: list[Block], tile: Tile) -> int:
    if spec.channels_last_output:
        return 0
    rows = tile.rows * spec.conv.output_size[1]
    return _whole_lines(rows * max(block.outputs for block in kinds))


def _whole_lines(elements: int) -> int:
    """Rounded up to cache lines, so that no two threads write to the same one."""
    return -(-elements // 16) * 16


def emit(spec: KernelSpec, machine: Machine, tile: Tile, name: str) -> str:
    """The module; its function ``name`` takes :data:`ARGUMENTS`."""
    assert tile.blocks == 1 or not spec.staged
    kinds = blocks(spec.conv, machine.lanes, tile.vectors)
    kernels = [
        BlockFunction(spec, block, machine, tile, f"block{i}") for i, block in enumerate(kinds)
    ]
    inputs = {
        n: InputStage(spec, machine, n, f"input{n}")
        for n in sorted({block.inputs for block in kinds})
        if spec.staged_input
    }
    outputs = {
        n: OutputStage(spec, machine, n, f"output{n}")
        for n in sorted({block.outputs for block in kinds})
        if not spec.channels_last_output
    }
    work = _Work(spec, machine, tile, kinds, kernels, inputs, outputs)
    functions: list[BlockFunction | InputStage | OutputStage] = [
        *kernels,
        *inputs.values(),
        *outputs.values(),
    ]
    texts = [function.write() for function in functions]
    texts += [work.write(f"{name}.work"), _entry(name, machine)]
    declarations = work.e.declarations.union(*(function.e.declarations for function in functions))
    bits = 32 * machine.lanes
    return "\n".join(
        [
            f'target triple = "{machine.triple}"',
            *sorted(declarations),
            *texts,
            f'attributes #0 = {{ nounwind noinline "prefer-vector-width"="{bits}" '
            f'"min-legal-vector-width"="{bits}" }}',
        ]
    )


def _entry(name: str, machine: Machine) -> str:
    """Put the arguments into a record and run the work on it, on every thread."""
    e = Emitter(machine)
    record = e.let(f"alloca [{len(ARGUMENTS)} x i64]")
    for i, argument in enumerate(ARGUMENTS):
        kind = "i64" if argument in _INTEGERS else "ptr"
        place = e.let(f"getelementptr i64, ptr {record}, i64 {i}")
        e.do(f"store {kind} %{argument}, ptr {place}")
    several = e.let("icmp sgt i64 %threads, 1")
    with e.when(several):
        threads = e.let("trunc i64 %threads to i32")
        e.do(f"call void %parallel(ptr @{name}.work, ptr {record}, i32 {threads}, i32 0)")
        e.do("ret void")
        e.unreachable("alone")
    e.do(f"call void @{name}.work(ptr {record})")
    e.do("ret void")
    parameters = ", ".join(
        f"{'i64' if argument in _INTEGERS else 'ptr'} %{argument}" for argument in ARGUMENTS
    )
    return f"define void @{name}({parameters}) #0 {{\n{e.text()}\n}}\n"


class _Work:
    """Writes the function that each thread runs."""

    def __init__(
        self,
        spec: KernelSpec,
        machine: Machine,
        tile: Tile,
        kinds: list[Block],
        kernels: list[BlockFunction],
        inputs: dict[int, InputStage],
        outputs: dict[int, OutputStage],
    ) -> None:
        self.spec, self.tile, self.kinds, self.kernels = spec, tile, kinds, kernels
        self.inputs, self.outputs = inputs, outputs
        self.input_buffer = _input_buffer(spec, kinds, tile)
        self.buffer = self.input_buffer + _output_buffer(spec, kinds, tile)
        self.e = Emitter(machine)

    def write(self, name: str) -> str:
        e, conv = self.e, self.spec.conv
        for i, argument in enumerate(ARGUMENTS):
            kind = "i64" if argument in _INTEGERS else "ptr"
            place = e.let(f"getelementptr i64, ptr %record, i64 {i}")
            e.do(f"%{argument} = load {kind}, ptr {place}")
        thread, threads = self._team()
        chunks = -(-conv.output_size[0] // self.tile.rows)
        per_chunk = sum(-(-block.count // self.tile.blocks) for block in self.kinds)
        total = e.mul("%images", chunks * per_chunk)
        start = e.div(e.mul(total, thread), threads)
        stop = e.div(e.mul(total, e.add(thread, 1)), threads)
        buffer = e.offset("%buffer", e.mul(thread, self.buffer))
        # Which rows and channels lie in the buffer: none yet.
        staged = e.let("alloca i64")
        e.do(f"store i64 -1, ptr {staged}")
        with e.loop(start, stop) as task:
            chunk, part = e.div(task, per_chunk), e.rem(task, per_chunk)
            self._task(chunk, chunks, part, buffer, staged)
        e.do("ret void")
        return f"define internal void @{name}(ptr %record) #0 {{\n{e.text()}\n}}\n"

    def _team(self) -> tuple[Value, Value]:
        """This thread's number and the size of its team, asked only where there is a team."""
        e = self.e
        numbers = [e.let("alloca i64"), e.let("alloca i64")]
        for number, alone in zip(numbers, (0, 1), strict=True):
            e.do(f"store i64 {alone}, ptr {number}")
        with e.when(e.let("icmp sgt i64 %threads, 1")):
            for number, function in zip(numbers, ("thread_number", "thread_count"), strict=True):
                answer = e.let(f"call i32 %{function}()")
                e.do(f"store i64 {e.let(f'sext i32 {answer} to i64')}, ptr {number}")
        thread, threads = (e.let(f"load i64, ptr {number}") for number in numbers)
        return thread, threads

    def _task(self, chunk: Value, chunks: int, part: Value, buffer: str, staged: str) -> None:
        e, spec, conv = self.e, self.spec, self.spec.conv
        image, rows = e.div(chunk, chunks), e.rem(chunk, chunks)
        first = e.mul(rows, self.tile.rows)
        last = e.min(e.add(first, self.tile.rows), conv.output_size[0])
        x = e.offset("%x", e.mul(image, conv.in_channels * math.prod(conv.input_size)))
        size = e.mul(image, conv.out_channels * math.prod(spec.output_tensor_size))
        y, residual = e.offset("%y", size), e.offset("%residual", size)
        parts_before = weights_before = 0
        for kind, kernel in zip(self.kinds, self.kernels, strict=True):
            parts = -(-kind.count // self.tile.blocks)
            number = e.sub(part, parts_before)
            with e.when(e.let(f"icmp ult i64 {number}, {parts}")):
                begin = e.mul(number, self.tile.blocks)
                end = e.min(e.add(begin, self.tile.blocks), kind.count)
                w = e.offset("%w", weights_before)
                first_output, first_input = kind.start(e, begin)
                source, target = x, y
                if self.inputs:
                    stage = self.inputs[kind.inputs]
                    place = (chunk, first_input, first, last)
                    source = self._stage(stage, x, buffer, staged, *place)
                if self.outputs:
                    results = e.offset(buffer, self.input_buffer)
                    target = e.offset(results, e.sub(0, e.mul(first, kernel.output_row)))
                kernel.call(e, w, source, residual, target, begin, end, first, last)
                if self.outputs:
                    width = conv.output_size[1]
                    self.outputs[kind.outputs].call(
                        e, results, residual, y, first_output,
                        e.mul(first, width), e.mul(e.sub(last, first), width),
                    )  # fmt: skip
            parts_before += parts
            weights_before += kind.count * kernel.weights

    def _stage(
        self,
        stage: InputStage,
        x: str,
        buffer: str,
        staged: str,
        chunk: Value,
        channel: Value,
        first: Value,
        last: Value,
    ) -> str:
        """Fill the buffer unless the last task did; where row 0 of the image would lie."""
        e, conv = self.e, self.spec.conv
        (before, _), stride, width = conv.padding[0], conv.stride[0], conv.input_size[1]
        reach = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1
        low = e.max(e.sub(e.mul(first, stride), before), 0)
        high = e.add(e.sub(e.mul(e.sub(last, 1), stride), before), reach)
        high = e.max(e.min(high, conv.input_size[0]), low)
        wanted = e.add(e.mul(chunk, conv.in_channels), channel)
        there = e.let(f"load i64, ptr {staged}")
        with e.when(e.let(f"icmp ne i64 {wanted}, {there}")):
            pixels = e.mul(e.sub(high, low), width)
            stage.call(e, x, buffer, channel, e.mul(low, width), pixels)
            e.do(f"store i64 {wanted}, ptr {staged}")
        return e.offset(buffer, e.sub(0, e.mul(low, width * stage.channels)))
