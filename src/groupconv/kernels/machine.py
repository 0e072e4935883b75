"""Machine: what the generator has to know of a processor."""

import functools
from dataclasses import dataclass

import llvmlite.binding as llvm


@dataclass(frozen=True)
class Machine:
    """One instruction set that kernels can be generated for.

    Args:
        name: the name that people see.
        triple: LLVM target triple.
        cpu: the processor whose scheduling model LLVM uses.
        features: LLVM features, ``+`` or ``-`` before each, separated by commas.
        lanes: float32 values in a vector register.
        registers: vector registers for the generator to plan with.
        masked: whether part of a vector is loaded and stored in one instruction.
    """

    name: str
    triple: str
    cpu: str
    features: str
    lanes: int
    registers: int
    masked: bool


_SSE = "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt"
_AVX2 = f"{_SSE},+avx,+avx2,+fma,+f16c,+bmi,+bmi2"
_AVX512 = f"{_AVX2},+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl,+evex512"

# What each set needs of the processor, best first; tuned for a common processor that has it. Where
# a tile has many sums, LLVM moves loads ahead of their turn: two registers of 32 are left for them.
_X86 = {
    "avx512": (("avx512f", "avx512dq", "avx512vl", "avx512bw", "fma"), _AVX512, 16, 30, True),
    "avx2": (("avx2", "fma"), _AVX2, 8, 16, True),
    # Products need registers of their own before they are added.
    "sse4.2": (("sse4.2",), _SSE, 4, 11, False),
}
_X86_CPU = {"avx512": "skylake-avx512", "avx2": "haswell", "sse4.2": "nehalem"}
NAMES = (*_X86, "neon")


def machine(name: str, triple: str | None = None) -> Machine:
    """The Machine called ``name``, whether or not this computer is one."""
    if name == "neon":
        return Machine("neon", triple or "aarch64-linux-gnu", "generic", "+neon", 4, 30, False)
    _, features, lanes, registers, masked = _X86[name]
    return Machine(
        name, triple or "x86_64-linux-gnu", _X86_CPU[name], features, lanes, registers, masked
    )


@functools.cache
def runnable() -> tuple[Machine, ...]:
    """The machines whose code this computer runs, best first; empty on an unknown processor."""
    triple = llvm.get_process_triple()
    family = triple.partition("-")[0]
    if family in ("aarch64", "arm64"):
        return (machine("neon", triple),)
    if family != "x86_64":
        return ()
    features = llvm.get_host_cpu_features()
    return tuple(
        machine(name, triple)
        for name, (needs, *_) in _X86.items()
        if all(features.get(need, False) for need in needs)
    )
