"""The code for every machine, also those that this computer is not: read, not run."""

import re

import pytest

from groupconv.kernels import jit, module
from groupconv.kernels.candidates import candidates
from groupconv.kernels.machine import NAMES, machine
from groupconv.kernels.spec import ConvSpec, KernelSpec

# in_channels, out_channels, groups, kernel: every way to bring the input in.
LAYERS = {
    "depthwise": (64, 64, 64, 3),
    "depthwise 7x7": (96, 96, 96, 7),
    "width 2": (64, 64, 32, 3),
    "width 4": (128, 128, 32, 3),
    "width 8": (256, 256, 32, 3),
    "width 16": (128, 128, 8, 3),
    "width 24": (48, 48, 2, 3),
    "dense": (64, 128, 1, 3),
    "pointwise": (64, 256, 1, 1),
}
# Multiply-adds of whole vectors, of single values, and vectors that go to the stack and back.
WHOLE = {"neon": r"fmla\s+v\d+\.4s", "sse4.2": r"mulps\b"}
SINGLE = {"neon": r"fmadd\s+s", "sse4.2": r"mulss\b"}
SPILL = {
    "neon": r"(str|ldr|stp|ldp)\s+q.*\[sp",
    "sse4.2": r"(movups|movaps|addps|mulps)\b.*\(%rsp\)",
}
AVX_WHOLE, AVX_SINGLE = r"vfmadd\w+ps\b", r"vfmadd\w+ss\b"
AVX_SPILL = r"(vmovups|vmovaps|vfmadd\w+ps)\b.*\(%rsp\)"


def _blocks(text: str) -> list[list[str]]:
    """Instructions between two labels or jumps."""
    found: list[list[str]] = [[]]
    for line in map(str.strip, text.splitlines()):
        if re.match(r"[.\w$]+:", line):
            found.append([])
        elif line and not line.startswith((".", "#", "//")):
            found[-1].append(line)
            if re.match(r"(j\w+|b|b\.\w+|cbn?z|tbn?z|ret\w*)\b", line):
                found.append([])
    return found


def _count(pattern: str, lines: list[str]) -> int:
    return sum(re.match(pattern, line) is not None for line in lines)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", NAMES)
def test_inner_loops_are_vectors_in_registers(name: str, layer: str) -> None:
    into, out, groups, k = LAYERS[layer]
    pad = (k // 2, k // 2)
    conv = ConvSpec(1, into, out, (28, 28), (k, k), (1, 1), (pad, pad), (1, 1), groups)
    spec, target = KernelSpec(conv, bias=True), machine(name)
    tile = candidates(spec, target)[0]
    text = jit.assembly(module.emit(spec, target, tile, "kernel"), target)
    whole = WHOLE.get(name, AVX_WHOLE)
    inner = [block for block in _blocks(text) if _count(whole, block) >= 4]
    lines = [line for block in inner for line in block]
    least = tile.pixels * min(tile.vectors, -(-out // target.lanes)) * k
    assert max(_count(whole, block) for block in inner) >= least / 2
    assert _count(SINGLE.get(name, AVX_SINGLE), lines) == 0
    assert _count(SPILL.get(name, AVX_SPILL), lines) == 0
    if name == "avx512":
        assert "zmm" in text
    elif name == "avx2":
        assert "zmm" not in text
        assert "ymm" in text


def test_the_checks_see_spills_and_single_values() -> None:
    """What the test above counts is there to be found in other code."""
    lines = [
        "vmovups\t32(%rsp), %ymm1",
        "vmovaps %ymm2, -8(%rsp)",
        "vfmadd231ss %xmm1, %xmm2, %xmm3",
    ]
    assert _count(AVX_SPILL, lines) == 2
    assert _count(AVX_SINGLE, lines) == 1
    assert _count(SPILL["neon"], ["ldr\tq1, [sp, #64]", "ldr q0, [x1]"]) == 1
