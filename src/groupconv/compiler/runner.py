"""The loop over all steps of a program, as native code: one parallel region for a whole network.

Every thread walks through the same list of steps and does its part of each. Steps that are too
small to be shared are done by the first thread; the others wait only where they must.
"""

import ctypes
import functools
import struct

from groupconv.kernels import cache, jit
from groupconv.kernels.emit import Emitter
from groupconv.kernels.machine import Machine, runnable

# A step of the list, eight bytes each: the function, its record, how many threads may share it,
# and whether all threads meet after it.
STEP = ("function", "record", "threads", "meet")
# What the loop is called with, a record too: from Python, one pointer costs less than seven
# arguments. The list, its length, threads, and functions of the OpenMP runtime.
ARGUMENTS = ("steps", "count", "threads", "parallel", "barrier", "thread_number", "thread_count")
LAYOUT = struct.Struct(f"{len(ARGUMENTS)}Q")
_INTEGERS = ("count", "threads")
_PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


def emit(machine: Machine, name: str) -> str:
    """The module of ``void @name(ptr record)``, record of :data:`ARGUMENTS`."""
    parts = [_entry(machine, name), _member(machine, name), _steps(machine, name)]
    declarations = set().union(*(part.declarations for part, _ in parts))
    texts = [text for _, text in parts]
    return "\n".join([f'target triple = "{machine.triple}"', *sorted(declarations), *texts])


def _entry(machine: Machine, name: str) -> tuple[Emitter, str]:
    """Walk, alone or in a parallel region."""
    e = Emitter(machine)
    _unpack(e)
    with e.when(e.let("icmp sgt i64 %threads, 1")):
        threads = e.let("trunc i64 %threads to i32")
        e.do(f"call void %parallel(ptr @{name}_member, ptr %record, i32 {threads}, i32 0)")
        e.do("ret void")
        e.unreachable("alone")
    e.do(f"call void @{name}_steps(ptr %steps, i64 %count, ptr %barrier, i64 0, i64 1)")
    e.do("ret void")
    return e, f"define void @{name}(ptr %record) nounwind {{\n{e.text()}\n}}\n"


def _member(machine: Machine, name: str) -> tuple[Emitter, str]:
    """What every thread of the region runs."""
    e = Emitter(machine)
    _unpack(e)
    thread, team = (
        e.let(f"sext i32 {e.let(f'call i32 %{function}()')} to i64")
        for function in ("thread_number", "thread_count")
    )
    e.do(f"call void @{name}_steps(ptr %steps, i64 %count, ptr %barrier, i64 {thread}, i64 {team})")
    e.do("ret void")
    return e, f"define internal void @{name}_member(ptr %record) nounwind {{\n{e.text()}\n}}\n"


def _unpack(e: Emitter) -> None:
    """Values of ``%record`` under the names of :data:`ARGUMENTS`."""
    for i, argument in enumerate(ARGUMENTS):
        kind = "i64" if argument in _INTEGERS else "ptr"
        e.do(f"%{argument} = load {kind}, ptr {e.let(f'getelementptr i64, ptr %record, i64 {i}')}")


def _steps(machine: Machine, name: str) -> tuple[Emitter, str]:
    """One thread's walk through the steps."""
    e = Emitter(machine)
    with e.loop(0, "%count") as step:
        place = e.let(f"getelementptr [{len(STEP)} x i64], ptr %steps, i64 {step}")
        fields = [e.let(f"getelementptr i64, ptr {place}, i64 {i}") for i in range(len(STEP))]
        function, record = (e.let(f"load ptr, ptr {field}") for field in fields[:2])
        most, meet = (e.let(f"load i64, ptr {field}") for field in fields[2:])
        sharing = e.min(most, "%team")
        with e.when(e.let(f"icmp slt i64 %thread, {sharing}")):
            e.do(f"call void {function}(ptr {record}, i64 %thread, i64 {sharing})")
        together = e.let("icmp sgt i64 %team, 1")
        asked = e.let(f"icmp ne i64 {meet}, 0")
        with e.when(e.let(f"and i1 {together}, {asked}")):
            e.do("call void %barrier()")
    e.do("ret void")
    return e, (
        f"define internal void @{name}_steps(ptr %steps, i64 %count, ptr %barrier, i64 %thread, "
        f"i64 %team) nounwind {{\n{e.text()}\n}}\n"
    )


def name(machine: Machine) -> str:
    """The symbol of the loop."""
    return f"run_{machine.name.replace('.', '_')}"


def object_code(machine: Machine) -> bytes:
    """The object file that holds :func:`name`, from the cache or compiled now."""
    text = emit(machine, name(machine))
    key = cache.key("runner", text, machine)
    code = cache.read(key)
    if code is None:
        code = jit.compile_object(text, machine)
        cache.write(key, code)
    return code


@functools.cache
def runner(machine: Machine | None = None) -> jit.Function:
    """``run(record)``, record of :data:`ARGUMENTS`."""
    machine = machine or runnable()[0]
    symbol = name(machine)
    return _PROTOTYPE(jit.known(symbol) or jit.address(object_code(machine), symbol))
