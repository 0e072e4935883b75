"""The function of a step around its body: arguments, tables, a thread's part of the work."""

from collections.abc import Callable, Sequence

import numpy as np

from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value
from groupconv.kernels.machine import Machine


def module(
    machine: Machine,
    name: str,
    arguments: Sequence[str],
    body: Callable[[Emitter], None],
    tables: Sequence[str] = (),
) -> str:
    """The module of ``void @name(ptr record, i64 thread, i64 threads)``.

    Args:
        arguments: what the record holds; ``body`` finds each under its name, such as ``%x``. All
            are pointers but for ``images``.
        tables: constants that it reads, from :func:`table`.
    """
    e = Emitter(machine)
    e.unpack(arguments, ("images",))
    body(e)
    e.do("ret void")
    bits = 32 * machine.lanes
    return "\n".join(
        [
            f'target triple = "{machine.triple}"',
            *sorted(e.declarations),
            *tables,
            f"define void @{name}(ptr %record, i64 %thread, i64 %threads) #0 {{\n{e.text()}\n}}",
            f'attributes #0 = {{ nounwind "prefer-vector-width"="{bits}" '
            f'"min-legal-vector-width"="{bits}" }}',
            "",
        ]
    )


def part(e: Emitter, total: Value) -> tuple[Value, Value]:
    """The first of ``total`` pieces of work that this thread does, and the one after its last."""
    start = e.div(e.mul(total, "%thread"), "%threads")
    return start, e.div(e.mul(total, e.add("%thread", 1)), "%threads")


def table(name: str, numbers: np.ndarray) -> str:
    """``@name``, an array of int64 or float32 numbers."""
    # As integers of the same bits: LLVM reads few decimal numbers.
    size = numbers.itemsize
    bits = ", ".join(f"i{8 * size} {n}" for n in numbers.view(f"i{size}").tolist())
    return f"@{name} = private constant [{len(numbers)} x i{8 * size}] [{bits}]"
