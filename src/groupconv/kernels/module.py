"""A whole kernel as an LLVM module: which work there is, who does it, where it is staged.

The work is cut into tasks: some rows of one image times one block of channels, numbered with the
blocks innermost, so that neighbouring tasks share their input. Every thread takes an equal run of
tasks. No sum depends on how the tasks are shared out.
"""

import ctypes
import functools
import struct

from groupconv.kernels.blocks import Block, blocks
from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value
from groupconv.kernels.forward import BlockFunction
from groupconv.kernels.machine import Machine
from groupconv.kernels.spec import KernelSpec
from groupconv.kernels.staging import InputStage, OutputStage
from groupconv.kernels.tile import Tile

# What the work is done on: a record of eight bytes each, in this order. ``rows`` and ``blocks``
# are those of the tile, and ``share`` the elements of the buffer for each thread, so that tiles
# that differ in nothing else share their code. ``x_image``, ``y_image`` and ``w_image`` are the
# elements from one image to the next, and from its weights to those of the next: 0 where all have
# the same.
RECORD = (
    "x", "w", "bias", "residual", "order", "y", "buffer", "images", "rows", "blocks", "share",
    "x_image", "y_image", "w_image",
)  # fmt: skip
# What a kernel is called with, a record too: from Python, one pointer costs a quarter of the time
# of fifteen arguments. The last three are functions of the OpenMP runtime.
ARGUMENTS = (*RECORD, "threads", "parallel", "thread_number", "thread_count")
LAYOUT = struct.Struct(f"{len(ARGUMENTS)}Q")
PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_INTEGERS = ("images", "rows", "blocks", "share", "x_image", "y_image", "w_image", "threads")


def buffer_size(spec: KernelSpec, machine: Machine, tile: Tile) -> int:
    """Elements of the buffer that each thread stages rows in; 0 where nothing is staged."""
    machine = tile.narrowed(machine)
    kinds = blocks(spec.conv, machine.lanes, tile.vectors)
    # On integers that are known, an emitter does plain arithmetic.
    e = Emitter(machine)
    size = e.add(
        _input_buffer(e, spec, kinds, tile.rows), _output_buffer(e, spec, kinds, tile.rows)
    )
    assert isinstance(size, int)
    return size


def _input_buffer(e: Emitter, spec: KernelSpec, kinds: list[Block], rows: Value) -> Value:
    """Elements for the input of ``rows`` rows of the output."""
    if not spec.staged_input:
        return 0
    conv = spec.conv
    reach = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1
    rows = e.min(e.add(e.mul(e.sub(rows, 1), conv.stride[0]), reach), conv.input_size[0])
    return _whole_lines(e, e.mul(rows, conv.input_size[1] * max(block.inputs for block in kinds)))


def _output_buffer(e: Emitter, spec: KernelSpec, kinds: list[Block], rows: Value) -> Value:
    if spec.channels_last_output:
        return 0
    return _whole_lines(
        e, e.mul(rows, spec.conv.output_size[1] * max(block.outputs for block in kinds))
    )


def _whole_lines(e: Emitter, elements: Value) -> Value:
    """Rounded up to cache lines, so that no two threads write to the same one."""
    return e.mul(e.div(e.add(elements, 15), 16), 16)


def emit(spec: KernelSpec, machine: Machine, tile: Tile, name: str) -> str:
    """The module of ``void @name(ptr record)``, with :data:`ARGUMENTS`, and of what each of its
    threads runs: ``void @name_work(ptr record, i64 thread, i64 threads)``, with :data:`RECORD`."""
    machine = tile.narrowed(machine)
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
    work = _Work(spec, machine, kinds, kernels, inputs, outputs)
    functions: list[BlockFunction | InputStage | OutputStage] = [
        *kernels,
        *inputs.values(),
        *outputs.values(),
    ]
    texts = [function.write() for function in functions]
    texts += [work.write(work_name(name)), _member(name, machine), _entry(name, machine)]
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


def work_name(name: str) -> str:
    """The function that does one thread's part of the work of the kernel ``name``."""
    return f"{name}_work"


def _entry(name: str, machine: Machine) -> str:
    """Run the work on the record, on every thread."""
    e = Emitter(machine)
    e.unpack(ARGUMENTS, _INTEGERS, ("threads", "parallel"))
    several = e.let("icmp sgt i64 %threads, 1")
    with e.when(several):
        threads = e.let("trunc i64 %threads to i32")
        e.do(f"call void %parallel(ptr @{name}.member, ptr %record, i32 {threads}, i32 0)")
        e.do("ret void")
        e.unreachable("alone")
    e.do(f"call void @{work_name(name)}(ptr %record, i64 0, i64 1)")
    e.do("ret void")
    return f"define void @{name}(ptr %record) #0 {{\n{e.text()}\n}}\n"


def _member(name: str, machine: Machine) -> str:
    """What each thread of a team runs: it asks for its number and does its part."""
    e = Emitter(machine)
    e.unpack(ARGUMENTS, _INTEGERS, ("thread_number", "thread_count"))
    thread, threads = (
        e.let(f"sext i32 {e.let(f'call i32 %{function}()')} to i64")
        for function in ("thread_number", "thread_count")
    )
    e.do(f"call void @{work_name(name)}(ptr %record, i64 {thread}, i64 {threads})")
    e.do("ret void")
    return f"define internal void @{name}.member(ptr %record) #0 {{\n{e.text()}\n}}\n"


class _Work:
    """Writes the function that each thread runs."""

    def __init__(
        self,
        spec: KernelSpec,
        machine: Machine,
        kinds: list[Block],
        kernels: list[BlockFunction],
        inputs: dict[int, InputStage],
        outputs: dict[int, OutputStage],
    ) -> None:
        self.spec, self.kinds, self.kernels = spec, kinds, kernels
        self.inputs, self.outputs = inputs, outputs
        self.e = Emitter(machine)

    def write(self, name: str) -> str:
        e, conv = self.e, self.spec.conv
        e.unpack(RECORD, _INTEGERS)
        chunks = self._parts(conv.output_size[0], "%rows")
        parts = [self._parts(block.count, "%blocks") for block in self.kinds]
        per_chunk = functools.reduce(e.add, parts)
        total = e.mul("%images", e.mul(chunks, per_chunk))
        start = e.div(e.mul(total, "%thread"), "%threads")
        stop = e.div(e.mul(total, e.add("%thread", 1)), "%threads")
        buffer = e.offset("%buffer", e.mul("%thread", "%share"))
        results = buffer
        if self.outputs:
            results = e.offset(buffer, _input_buffer(e, self.spec, self.kinds, "%rows"))
        # Which rows and channels lie in the buffer: none yet.
        staged = e.let("alloca i64")
        e.do(f"store i64 -1, ptr {staged}")
        with e.loop(start, stop) as task:
            chunk, part = e.div(task, per_chunk), e.rem(task, per_chunk)
            self._task(chunk, chunks, part, parts, buffer, results, staged)
        e.do("ret void")
        return (
            f"define void @{name}(ptr %record, i64 %thread, i64 %threads) #0 {{\n{e.text()}\n}}\n"
        )

    def _parts(self, whole: int, size: Value) -> Value:
        """How many parts of ``size`` at most make up the whole."""
        return self.e.div(self.e.add(size, whole - 1), size)

    def _task(
        self,
        chunk: Value,
        chunks: Value,
        part: Value,
        parts: list[Value],
        buffer: str,
        results: str,
        staged: str,
    ) -> None:
        e, conv = self.e, self.spec.conv
        image, rows = e.div(chunk, chunks), e.rem(chunk, chunks)
        first = e.mul(rows, "%rows")
        last = e.min(e.add(first, "%rows"), conv.output_size[0])
        x, weights, y = (e.offset(f"%{n}", e.mul(image, f"%{n}_image")) for n in ("x", "w", "y"))
        residual = e.offset("%residual", e.mul(image, self.spec.residual_image))
        parts_before: Value = 0
        weights_before = 0
        for kind, kernel, count in zip(self.kinds, self.kernels, parts, strict=True):
            number = e.sub(part, parts_before)
            with e.when(e.let(f"icmp ult i64 {number}, {count}")):
                begin = e.mul(number, "%blocks")
                end = e.min(e.add(begin, "%blocks"), kind.count)
                w = e.offset(weights, weights_before)
                first_output, first_input = kind.start(e, begin)
                source, target = x, y
                if self.inputs:
                    stage = self.inputs[kind.inputs]
                    place = (chunk, first_input, first, last)
                    source = self._stage(stage, x, buffer, staged, *place)
                if self.outputs:
                    target = e.offset(results, e.sub(0, e.mul(first, kernel.output_row)))
                kernel.call(e, w, source, residual, target, begin, end, first, last)
                if self.outputs:
                    width = conv.output_size[1]
                    self.outputs[kind.outputs].call(
                        e, results, residual, y, first_output,
                        e.mul(first, width), e.mul(e.sub(last, first), width),
                    )  # fmt: skip
            parts_before = e.add(parts_before, count)
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
