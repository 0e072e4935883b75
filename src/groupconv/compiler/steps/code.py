"""Native code of steps, made once for each machine and kept in the code cache."""

import functools
import hashlib
from pathlib import Path

from groupconv.compiler.steps.step import Step
from groupconv.kernels import cache, jit
from groupconv.kernels.machine import Machine, runnable


def name(step: Step, machine: Machine) -> str:
    """The symbol of the step's function: one for all steps that look the same."""
    return "step_" + hashlib.sha256(repr((step, machine)).encode()).hexdigest()[:32]


def object_code(step: Step, machine: Machine) -> bytes:
    """The object file that holds :func:`name`, from the cache or compiled now."""
    key = cache.key("step", generator(), step, machine)
    code = cache.read(key)
    if code is None:
        code = jit.compile_object(step.write(machine, name(step, machine)), machine)
        cache.write(key, code)
    return code


_addresses: dict[str, int] = {}


def function(step: Step, machine: Machine | None = None) -> int:
    """The address of ``void f(ptr record, i64 thread, i64 threads)``: see :meth:`Step.write`."""
    machine = machine or runnable()[0]
    # By its name: in Python 1 and 1.0 are equal, but a number in an expression is not an operand.
    symbol = name(step, machine)
    if symbol not in _addresses:
        _addresses[symbol] = jit.known(symbol) or jit.address(object_code(step, machine), symbol)
    return _addresses[symbol]


@functools.cache
def generator() -> str:
    """Names the code of this package that has a part in what is generated."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
