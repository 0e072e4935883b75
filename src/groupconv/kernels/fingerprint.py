"""A fingerprint of numbers in memory, at the speed of reading them.

Weights can change without any sign of it, so they are looked at before each use of what was made
from them. Each lane of a few vectors runs a chain over its share of the words: add the word, fold
the high bits into the low ones, multiply by an odd number. A step can be undone when its word is
known, so one changed word in a chain always shows; several may cancel out by chance.
"""

import ctypes
import functools

from groupconv.kernels import cache, jit
from groupconv.kernels.emit import Emitter
from groupconv.kernels.machine import Machine, runnable

# Chains side by side, so that each waits for its last step while others run.
_VECTORS = 8
# An odd number without pattern (from MurmurHash3), and how far high bits are folded down.
_FACTOR, _FOLD = 0x85EBCA6B, 15
_PROTOTYPE = ctypes.CFUNCTYPE(
    ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p
)


def words(machine: Machine) -> int:
    """32-bit words of a fingerprint."""
    return _VECTORS * machine.lanes + 1


def emit(machine: Machine) -> str:
    """The module: ``i64 fingerprint(ptr data, i64 words, ptr expected, ptr found)``.

    It returns 0 if the fingerprint is the expected one, and stores it in ``found`` unless that is
    null.
    """
    e = Emitter(machine)
    integers = f"<{machine.lanes} x i32>"
    stride = _VECTORS * machine.lanes

    def as_integers(vector: str) -> str:
        return e.let(f"bitcast {e.vector} {vector} to {integers}")

    def mix(type: str, state: str, word: str, constant: str) -> str:
        added = e.let(f"add {type} {state}, {word}")
        # Before the product, whose highest bit depends on no other bit's change.
        high = e.let(f"lshr {type} {added}, {constant.format(_FOLD)}")
        folded = e.let(f"xor {type} {added}, {high}")
        return e.let(f"mul {type} {folded}, {constant.format(_FACTOR)}")

    def step(at: str | int, states: list[str]) -> list[str]:
        results = []
        for i, state in enumerate(states):
            word = as_integers(e.load("%data", e.add(at, i * machine.lanes)))
            mixed = mix(integers, as_integers(state), word, "splat (i32 {})")
            results.append(e.let(f"bitcast {integers} {mixed} to {e.vector}"))
        return results

    whole = e.mul(e.div("%words", stride), stride)
    states = e.fold(0, whole, stride, [e.constant(i + 1.0) for i in range(_VECTORS)], step)
    # The words that are left go through one chain, kept in memory past the vectors.
    rest = e.let("alloca i32")
    e.do(f"store i32 1, ptr {rest}")
    with e.loop(whole, "%words") as at:
        place = e.offset("%data", at)
        word, state = e.let(f"load i32, ptr {place}"), e.let(f"load i32, ptr {rest}")
        e.do(f"store i32 {mix('i32', state, word, '{}')}, ptr {rest}")

    last = e.let(f"load i32, ptr {rest}")
    before = e.let(f"load i32, ptr {e.offset('%expected', stride)}")
    differs = e.let(f"icmp ne i32 {before}, {last}")
    for i, state in enumerate(states):
        place = e.offset("%expected", i * machine.lanes)
        before = e.let(f"load {integers}, ptr {place}, align 4")
        lanes = e.let(f"icmp ne {integers} {before}, {as_integers(state)}")
        some = e.let(f"bitcast <{machine.lanes} x i1> {lanes} to i{machine.lanes}")
        other = e.let(f"icmp ne i{machine.lanes} {some}, 0")
        differs = e.let(f"or i1 {differs}, {other}")
    with e.when(e.let("icmp ne ptr %found, null")):
        for i, state in enumerate(states):
            e.store(state, "%found", i * machine.lanes)
        e.do(f"store i32 {last}, ptr {e.offset('%found', stride)}")
    e.do(f"ret i64 {e.let(f'zext i1 {differs} to i64')}")
    return "\n".join(
        [
            f'target triple = "{machine.triple}"',
            *sorted(e.declarations),
            f"define i64 @{_name(machine)}"
            "(ptr %data, i64 %words, ptr %expected, ptr %found) nounwind {",
            f"{e.text()}\n}}",
        ]
    )


@functools.cache
def fingerprint(machine: Machine | None = None) -> jit.Function:
    """``fingerprint(data, words, expected, found)``: see :func:`emit`."""
    machine = machine or runnable()[0]
    key = cache.key("fingerprint", machine)
    code = cache.read(key)
    if code is None:
        code = jit.compile_object(emit(machine), machine)
        cache.write(key, code)
    return jit.load(code, _name(machine), _PROTOTYPE)


def _name(machine: Machine) -> str:
    return "fingerprint_" + machine.name.replace(".", "_")
