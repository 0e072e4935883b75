"""The loop over all steps of a program, as native code: one parallel region for a whole network.

Every thread walks through the same list of steps and does its part of each. Steps that are too
small to be shared are done by the first thread; the others wait only where they must.

They wait at a barrier of our own: that of libgomp calls the kernel each time, which takes as long
as a small step.
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
# arguments. The list, its length, threads, where they meet, functions of the OpenMP runtime, and
# one of the system that lets others run.
ARGUMENTS = (
    "steps", "count", "threads", "place", "parallel", "thread_number", "thread_count", "give_way",
)  # fmt: skip
LAYOUT = struct.Struct(f"{len(ARGUMENTS)}Q")
# Where threads meet: words of eight bytes, zeros at first. The first one counts those that have
# arrived, and the one in the middle the meetings; they lie on different lines of the cache.
PLACE = 32
# Looks whether the others are here, some 20 us, after which a thread lets others run between two:
# there may be more threads than cores.
_LOOKS = 1000
_INTEGERS = ("count", "threads")
_SHARED = "ptr %steps, i64 %count, ptr %place, ptr %give_way"
_PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


def emit(machine: Machine, name: str) -> str:
    """The module of ``void @name(ptr record)``, record of :data:`ARGUMENTS`."""
    parts = [_entry(machine, name), _member(machine, name), _steps(machine, name)]
    declarations = set().union(*(part.declarations for part, _ in parts))
    texts = [*(text for _, text in parts), _meet(machine, name)]
    return "\n".join([f'target triple = "{machine.triple}"', *sorted(declarations), *texts])


def _entry(machine: Machine, name: str) -> tuple[Emitter, str]:
    """Walk, alone or in a parallel region."""
    e = Emitter(machine)
    e.unpack(ARGUMENTS, _INTEGERS)
    with e.when(e.let("icmp sgt i64 %threads, 1")):
        threads = e.let("trunc i64 %threads to i32")
        e.do(f"call void %parallel(ptr @{name}_member, ptr %record, i32 {threads}, i32 0)")
        e.do("ret void")
        e.unreachable("alone")
    e.do(f"call void @{name}_steps({_SHARED}, i64 0, i64 1)")
    e.do("ret void")
    return e, f"define void @{name}(ptr %record) nounwind {{\n{e.text()}\n}}\n"


def _member(machine: Machine, name: str) -> tuple[Emitter, str]:
    """What every thread of the region runs."""
    e = Emitter(machine)
    e.unpack(ARGUMENTS, _INTEGERS)
    thread, team = (
        e.let(f"sext i32 {e.let(f'call i32 %{function}()')} to i64")
        for function in ("thread_number", "thread_count")
    )
    e.do(f"call void @{name}_steps({_SHARED}, i64 {thread}, i64 {team})")
    e.do("ret void")
    return e, f"define internal void @{name}_member(ptr %record) nounwind {{\n{e.text()}\n}}\n"


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
            e.do(f"call void @{name}_meet(ptr %place, ptr %give_way, i64 %team)")
    e.do("ret void")
    return e, (
        f"define internal void @{name}_steps({_SHARED}, i64 %thread, i64 %team) nounwind "
        f"{{\n{e.text()}\n}}\n"
    )


def _meet(machine: Machine, name: str) -> str:
    """Wait until all threads of the team are here."""
    pause, kind, hint = (
        ("llvm.aarch64.hint", "i32", "i32 1")
        if machine.name == "neon"
        else ("llvm.x86.sse2.pause", "", "")
    )
    return f"""
declare void @{pause}({kind})
define internal void @{name}_meet(ptr %place, ptr %give_way, i64 %team) nounwind {{
entry:
  %meetings = getelementptr i64, ptr %place, i64 {PLACE // 2}
  %before = load atomic i64, ptr %meetings monotonic, align 8
  %here = atomicrmw add ptr %place, i64 1 acq_rel
  %others = sub i64 %team, 1
  %last = icmp eq i64 %here, %others
  br i1 %last, label %open, label %look
open:
  store atomic i64 0, ptr %place monotonic, align 8
  %after = add i64 %before, 1
  store atomic i64 %after, ptr %meetings release, align 8
  ret void
look:
  %looks = phi i64 [ 0, %entry ], [ %more, %wait ], [ %more, %rest ]
  %now = load atomic i64, ptr %meetings acquire, align 8
  %met = icmp ne i64 %now, %before
  br i1 %met, label %done, label %wait
wait:
  call void @{pause}({hint})
  %more = add i64 %looks, 1
  %early = icmp ult i64 %more, {_LOOKS}
  br i1 %early, label %look, label %rest
rest:
  call i32 %give_way()
  br label %look
done:
  ret void
}}
"""


@functools.cache
def give_way() -> int:
    """The address of the function that lets another thread run."""
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0


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
