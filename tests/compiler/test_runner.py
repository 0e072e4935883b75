"""The loop over all steps as assembly, for instruction sets that this machine may not have."""

import pytest

from groupconv.compiler import runner
from groupconv.kernels import jit
from groupconv.kernels.machine import machine


@pytest.mark.parametrize(
    ("name", "pause"), [("avx2", "pause"), ("avx512", "pause"), ("neon", "yield")]
)
def test_threads_that_wait_tell_the_core(name: str, pause: str) -> None:
    there = machine(name)
    text = jit.assembly(runner.emit(there, "run"), there)
    assert pause in [line.strip() for line in text.splitlines()]
