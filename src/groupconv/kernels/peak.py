"""The multiply-adds that the processor can do at best: in registers, with nothing to wait for."""

import ctypes
import functools
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from groupconv.kernels import jit
from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value
from groupconv.kernels.machine import Machine, runnable

_ROUNDS = 4
_RUNS = 20
# Seconds of a run: long enough that starting the threads costs nothing.
_LONG = 0.02
_PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)


@functools.cache
def peak(threads: int) -> float:
    """Floating-point operations per second, two for each multiply-add: the best of many runs."""
    machine = runnable()[0]
    sums = machine.registers - 4
    # a = a * 0.5 + 1 stays near 2: no infinities, no slow tiny numbers.
    values = np.concatenate(
        [np.full(machine.lanes, v, np.float32) for v in (0.5, 1.0, *np.linspace(1, 3, sums))]
    )
    code = jit.load(jit.compile_object(_emit(machine, sums), machine), "peak", _PROTOTYPE)
    buffers = [values.copy() for _ in range(threads)]
    count, best = 10_000, 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_RUNS):
            start = time.perf_counter()
            list(pool.map(code, [b.ctypes.data for b in buffers], [count] * threads))
            elapsed = time.perf_counter() - start
            best = max(best, 2 * threads * count * _ROUNDS * sums * machine.lanes / elapsed)
            count = max(count, int(count * _LONG / elapsed))
    return best


def _emit(machine: Machine, count: int) -> str:
    """``peak(x, n)``: ``count`` sums that don't wait for each other, n times _ROUNDS steps each."""
    e = Emitter(machine)
    factor, term = e.load("%x"), e.load("%x", e.lanes)
    starts = [e.load("%x", (2 + i) * e.lanes) for i in range(count)]

    def body(_: Value, sums: list[str]) -> list[str]:
        for _ in range(_ROUNDS):
            sums = [e.multiply_add(value, factor, term) for value in sums]
        return sums

    for i, value in enumerate(e.fold(0, "%n", 1, starts, body)):
        e.store(value, "%x", (2 + i) * e.lanes)
    e.do("ret void")
    width = 32 * machine.lanes
    return "\n".join(
        [
            f'target triple = "{machine.triple}"',
            *sorted(e.declarations),
            f"define void @peak(ptr %x, i64 %n) #0 {{\n{e.text()}\n}}",
            f'attributes #0 = {{ nounwind "prefer-vector-width"="{width}" '
            f'"min-legal-vector-width"="{width}" }}',
        ]
    )
