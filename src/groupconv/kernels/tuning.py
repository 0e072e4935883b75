"""Choosing the tile of a kernel: the few best on paper, then the best of them by the clock.

The choice is remembered with the code. ``GROUPCONV_TUNE=0`` takes the best on paper, the same one
everywhere.
"""

import json
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from groupconv.kernels import cache, kernel
from groupconv.kernels.blocks import blocks
from groupconv.kernels.forward import Tile, taps_at_once
from groupconv.kernels.kernel import Kernel
from groupconv.kernels.machine import Machine, runnable
from groupconv.kernels.spec import KernelSpec
from groupconv.timing import interleave

# Seconds in which a layer is tuned, and those left for measuring what was compiled.
_BUDGET, _MEASURING = 0.25, 0.1
# Cycles until a sum can be added to again; two sums are begun in each cycle.
_LATENCY, _PER_CYCLE = 4, 2
# Bytes of rows and of weights that should stay close to the core.
_ROWS, _WEIGHTS = 2**18, 2**18


def tuning() -> bool:
    """Whether tiles are measured."""
    return os.environ.get("GROUPCONV_TUNE", "1") != "0"


def tuned(spec: KernelSpec, machine: Machine | None = None) -> Kernel:
    """The kernel for ``spec``: from this process, from the code cache, or made now."""
    machine = machine or runnable()[0]
    key = (spec, machine, tuning())
    with _lock:
        if key not in _known:
            _known[key] = _recall(*key) or _make(*key)
        return _known[key]


_known: dict[tuple[KernelSpec, Machine, bool], Kernel] = {}
_lock = threading.Lock()


def _recall(spec: KernelSpec, machine: Machine, measured: bool) -> Kernel | None:
    entry = cache.read(cache.key(spec, machine, measured))
    if entry is None:
        return None
    head, _, code = entry.partition(b"\n")
    return kernel.load(spec, machine, Tile(**json.loads(head)), code)


def _make(spec: KernelSpec, machine: Machine, measured: bool) -> Kernel:
    choices = candidates(spec, machine)
    if measured:
        code, made = _measure(spec, machine, choices)
    else:
        code = kernel.compile(spec, machine, choices[0])
        made = kernel.load(spec, machine, choices[0], code)
    head = json.dumps(asdict(made.tile)).encode()
    cache.write(cache.key(spec, machine, measured), head + b"\n" + code)
    return made


def candidates(spec: KernelSpec, machine: Machine) -> list[Tile]:
    """Tiles worth measuring, the best on paper first."""
    shapes: dict[tuple[int, ...], tuple[float, int, int]] = {}
    for vectors in (1, 2, 3, 4):
        kinds = blocks(spec.conv, machine.lanes, vectors)
        size = max(len(block.vectors) for block in kinds)
        for pixels in _pixels(spec, machine, size):
            cycles = sum(
                block.count * _cycles(spec, machine, pixels, len(block.vectors), block.scalar)
                for block in kinds
            )
            shapes.setdefault((pixels, size), (cycles, pixels, vectors))
    ranked = [Tile(p, v, *_passes(spec, machine, v)) for _, p, v in sorted(shapes.values())]
    best = ranked[0]
    height = spec.conv.output_size[0]
    rows = [
        Tile(best.pixels, best.vectors, r, best.channels)
        for r in dict.fromkeys((height, max(1, best.rows // 4)))
        if r != best.rows
    ]
    return [best, *ranked[1:3], *rows, *ranked[3:5]]


def _pixels(spec: KernelSpec, machine: Machine, vectors: int) -> list[int]:
    """Output pixels of a tile: what registers hold beside the weights of all taps, or of some."""
    width, k = spec.conv.output_size[1], spec.conv.kernel_size[1]
    found = []
    for taps in {k, -(-k // 2), -(-k // 3), 1}:
        most = (machine.registers - 1 - taps * vectors) // vectors
        if most >= 1:
            # Tiles of about equal size.
            found.append(math.ceil(width / math.ceil(width / most)))
    return sorted(set(found)) or [1]


def _cycles(spec: KernelSpec, machine: Machine, pixels: int, vectors: int, scalar: bool) -> float:
    """Guess of the cycles for one row of one block and input channel."""
    conv = spec.conv
    k, stride, dilation = conv.kernel_size[1], conv.stride[1], conv.dilation[1]
    total, width = 0.0, conv.output_size[1]
    for start in range(0, width, pixels):
        size = min(pixels, width - start)
        at_once = taps_at_once(machine, size, vectors)
        loads = float(k * vectors)
        for begin in range(0, k, at_once):
            taps = range(begin, min(k, begin + at_once))
            columns = {p * stride + kx * dilation for p in range(size) for kx in taps}
            loads += len(columns) * (1 if scalar else vectors)
        sums = size * vectors
        compute = max(sums * k / _PER_CYCLE, k * _LATENCY)
        # Loads run beside the arithmetic, but not for nothing.
        total += max(compute, loads / _PER_CYCLE) + 0.1 * loads
    return total


def _passes(spec: KernelSpec, machine: Machine, vectors: int) -> tuple[int, int]:
    """Rows of a task and channels of a chunk: what stays close to the core."""
    conv = spec.conv
    row = 4 * (
        conv.in_channels * conv.input_size[1] * conv.stride[0]
        + conv.out_channels * conv.output_size[1]
    )
    height = conv.output_size[0]
    rows = min(height, max(1, _ROWS // row))
    rows = -(-height // -(-height // rows))
    width = conv.in_channels // conv.groups
    weights = 4 * math.prod(conv.kernel_size) * vectors * machine.lanes
    channels = width
    while channels % 2 == 0 and channels * weights > _WEIGHTS:
        channels //= 2
    return rows, channels


def _measure(spec: KernelSpec, machine: Machine, choices: list[Tile]) -> tuple[bytes, Kernel]:
    """Compile and time candidates until the time is spent; the fastest, and its code."""
    begun = time.perf_counter()
    codes: list[bytes] = []
    kernels: list[Kernel] = []
    single = 0.0
    for tile in choices:
        # Each is run at least four times.
        ahead = 4 * single * (len(kernels) + 1)
        if kernels and time.perf_counter() - begun + ahead > _BUDGET - _MEASURING:
            break
        codes.append(kernel.compile(spec, machine, tile))
        kernels.append(kernel.load(spec, machine, tile, codes[-1]))
        if not single:
            first = _call(kernels[0])
            first()
            start = time.perf_counter()
            first()
            single = time.perf_counter() - start
    left = max(0.0, _BUDGET - (time.perf_counter() - begun))
    calls = {str(i): _call(made) for i, made in enumerate(kernels)}
    times = interleave(calls, seconds=min(left, _MEASURING), min_runs=2, max_runs=60)
    best = min(range(len(kernels)), key=lambda i: times[str(i)].q1)
    return codes[best], kernels[best]


def _call(made: Kernel) -> Callable[[], None]:
    """A call of a kernel on random numbers."""
    spec, conv = made.spec, made.spec.conv
    x = _random(spec.channels_last_input, 1, conv.in_channels, *conv.input_size)
    y = _random(spec.channels_last_output, 1, conv.out_channels, *spec.output_tensor_size)
    packed = made.pack(_random(False, *conv.weight_shape))
    bias = _random(False, conv.out_channels) if spec.bias else None
    residual = y.clone() if spec.residual else None
    order = torch.arange(conv.in_channels) if spec.ordered else None
    return lambda: made(x, packed, bias, y, residual, order)


def _random(channels_last: bool, *size: int) -> torch.Tensor:
    # From a generator of its own: the user's random numbers stay as they are.
    x = torch.randn(*size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x
