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
from dataclasses import asdict, replace

import torch

from groupconv.kernels import cache, kernel
from groupconv.kernels.blocks import Block, blocks
from groupconv.kernels.kernel import Kernel
from groupconv.kernels.machine import Machine, runnable
from groupconv.kernels.spec import KernelSpec
from groupconv.kernels.tile import SPARE, Tile, strips, sum_channels, taps_at_once
from groupconv.timing import interleave

# Seconds in which a layer is tuned, and those left for measuring what was compiled.
_BUDGET, _MEASURING = 0.27, 0.08
# Ratio of two times below which they are the same.
_NOISE = 1.02
# Cycles until a sum can be added to again; two sums are begun in each cycle.
_LATENCY, _PER_CYCLE = 4, 2
# Cycles that a load costs beside the arithmetic.
_LOAD = 0.3
# Tasks that an image should give, so that threads end together.
_TASKS = 16
# Rows of a tile at most, tiles that are measured, and multiply-adds in their code.
_LINES, _MOST, _CODE = 4, 7, 2500
# Bytes of rows and of weights that should stay close to the core.
_ROWS, _WEIGHTS = 2**18, 2**18
# Bytes between pixels whose multiples fall on few places of the first cache.
_ALIAS = 512
# Bytes of input and output that stay close to the core, and that the caches hold between layers.
_SMALL, _NEAR = 2**19, 2**22


def tuning() -> bool:
    """Whether tiles are measured."""
    return os.environ.get("GROUPCONV_TUNE", "1") != "0"


def tuned(spec: KernelSpec, images: int = 1, machine: Machine | None = None) -> Kernel:
    """The kernel for ``spec``: from this process, from the code cache, or made now.

    Args:
        images: about how many images it will be called with.
    """
    machine = machine or runnable()[0]
    far = images * _bytes(spec) > _NEAR
    key = (spec, machine, tuning(), far)
    with _lock:
        if key not in _known:
            _known[key] = _recall(*key) or _make(*key)
        return _known[key]


_known: dict[tuple[KernelSpec, Machine, bool, bool], Kernel] = {}
_lock = threading.Lock()


def _after_fork() -> None:
    """The thread that held the lock is not in the child."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _recall(spec: KernelSpec, machine: Machine, measured: bool, far: bool) -> Kernel | None:
    entry = cache.read(cache.key(spec, machine, measured, far))
    if entry is None:
        return None
    head, _, code = entry.partition(b"\n")
    return kernel.load(spec, machine, Tile(**json.loads(head)), code)


def _make(spec: KernelSpec, machine: Machine, measured: bool, far: bool) -> Kernel:
    choices = candidates(spec, machine, far)
    if measured:
        images = -(-4 * _NEAR // _bytes(spec)) if far else 1
        code, made = _measure(spec, machine, choices, images)
    else:
        code = kernel.compile(spec, machine, choices[0])
        made = kernel.load(spec, machine, choices[0], code)
    head = json.dumps(asdict(made.tile)).encode()
    cache.write(cache.key(spec, machine, measured, far), head + b"\n" + code)
    return made


def _bytes(spec: KernelSpec) -> int:
    """Of one image, before and after."""
    conv = spec.conv
    pixels = conv.in_channels * math.prod(conv.input_size)
    return 4 * (pixels + conv.out_channels * math.prod(conv.output_size))


def candidates(spec: KernelSpec, machine: Machine, far: bool = False) -> list[Tile]:
    """Tiles worth measuring, the best on paper first.

    Args:
        far: whether input and output are more than the caches hold between two layers.
    """
    ranked: dict[Tile, float] = {}
    for vectors in (1, 2, 3, 4):
        kinds = blocks(spec.conv, machine.lanes, vectors)
        size = max(len(block.vectors) for block in kinds)
        # Several rows at once pay where each loaded input meets few sums.
        most = 1 if kinds[0].scalar or spec.conv.kernel_size[0] == 1 else _LINES
        for lines in range(1, min(most, spec.conv.output_size[0]) + 1):
            fitting = _pixels(spec, machine, size * lines)
            if not fitting:
                continue
            cycles = {
                pixels: sum(
                    block.count * _cycles(spec, machine, pixels, lines, block) for block in kinds
                )
                for pixels in fitting
            }
            pixels = min(cycles, key=cycles.__getitem__)
            if ranked and _code(spec, kinds[0], pixels, lines) > _CODE:
                continue
            rows, channels = _passes(spec, machine, size, lines)
            ranked.setdefault(Tile(pixels, size, rows, channels, lines=lines), cycles[pixels])
    found = sorted(ranked, key=ranked.__getitem__)
    best, others = found[0], found[1:]
    number = sum(block.count for block in blocks(spec.conv, machine.lanes, best.vectors))
    if not kinds[0].scalar and not spec.staged:
        others = [*_by_memory(spec, found, number, far), *others]
        if _bytes(spec) <= _SMALL and number >= _TASKS:
            # All is close to the core: blocks are short, and share the cost of being called.
            best, *others = (replace(tile, blocks=4) for tile in (best, *others))
    rows = max(1, best.rows // (4 * best.lines)) * best.lines
    if number >= _TASKS:
        rows = -(-spec.conv.output_size[0] // best.lines) * best.lines
    choices = [best, *others[:3], replace(best, rows=rows), *others[3:]]
    return [replace(tile, ahead=far) for tile in dict.fromkeys(choices)][:_MOST]


def _code(spec: KernelSpec, block: Block, pixels: int, lines: int) -> int:
    """Multiply-adds in the code of one block: what loops over rows and channels leave."""
    height, k = spec.conv.kernel_size
    once = k * (height * lines if lines > 1 else 1) * (1 if block.scalar else block.width)
    return len(strips(spec.conv, pixels)) * pixels * len(block.vectors) * once


def _by_memory(spec: KernelSpec, found: list[Tile], number: int, far: bool) -> list[Tile]:
    """Of the tiles whose vectors hold channels side by side, those that suit the memory best."""
    row = spec.conv.output_size[0] == 1
    if row or far:
        # What comes from far away, or one long row of many channels, in the order of memory; a
        # row alone is left in parts for several threads.
        single = [tile for tile in found if tile.vectors == tile.lines == 1]
        together = max(1, number // 4) if row else number
        return [replace(tile, blocks=together) for tile in dict.fromkeys([found[0], *single])]
    if 4 * spec.conv.in_channels % _ALIAS == 0:
        # Pixels whose addresses differ by little but a power of two meet in the same places of
        # the cache: fewer of them, and more of each.
        few = [tile for tile in found if tile.vectors == tile.lines == 2]
        return [replace(tile, blocks=4) for tile in (*few, *found[:2])]
    return []


def _pixels(spec: KernelSpec, machine: Machine, vectors: int) -> list[int]:
    """Output pixels of a tile: what registers hold beside the weights of all taps, or of some."""
    width, k = spec.conv.output_size[1], spec.conv.kernel_size[1]
    found = set()
    for taps in {k, -(-k // 2), -(-k // 3), 1}:
        most = (machine.registers - SPARE - taps * vectors) // vectors
        if most >= 1:
            # Tiles of about equal size.
            found.add(math.ceil(width / math.ceil(width / most)))
            found.add(math.ceil(width / math.ceil(width / max(1, most // 2))))
    return sorted(found)


def _cycles(spec: KernelSpec, machine: Machine, pixels: int, lines: int, block: Block) -> float:
    """Guess of the cycles for ``lines`` rows of one block and input channel, over lines."""
    conv, vectors = spec.conv, len(block.vectors)
    (height, k), (down, stride) = conv.kernel_size, conv.stride
    spread = conv.dilation[1]
    rows = {line * down + ky * conv.dilation[0] for line in range(lines) for ky in range(height)}
    # Loads for one pixel: each vector its own, or each group that they see.
    inputs = vectors
    if block.scalar:
        inputs = len({source for vector in block.vectors for source in vector.sources})
    whole, rest = divmod(conv.output_size[1], pixels)
    total = 0.0
    for count, size in ((whole, pixels), (1, rest)):
        if not count or not size:
            continue
        sums = lines * size * vectors
        at_once = taps_at_once(machine, sums, vectors * lines)
        loads = float(lines * height * k * vectors)
        for begin in range(0, k, at_once):
            taps = range(begin, min(k, begin + at_once))
            columns = {p * stride + kx * spread for p in range(size) for kx in taps}
            loads += len(rows) * len(columns) * inputs
        compute = max(sums / _PER_CYCLE, _LATENCY) * height * k
        # Loads run beside the arithmetic, but not for nothing.
        total += count * (max(compute, loads / _PER_CYCLE) + _LOAD * loads)
    return total / lines


def _passes(spec: KernelSpec, machine: Machine, vectors: int, lines: int) -> tuple[int, int]:
    """Rows of a task and channels of a chunk: what stays close to the core, in enough tasks."""
    conv = spec.conv
    number = sum(block.count for block in blocks(conv, machine.lanes, vectors))
    row = 4 * (
        conv.in_channels * conv.input_size[1] * conv.stride[0]
        + conv.out_channels * conv.output_size[1]
    )
    height = conv.output_size[0]
    rows = max(1, _ROWS // row)
    if spec.staged_input:
        # Each task fills its buffer with the rows above and below too.
        rows = max(rows, 4 * (conv.kernel_size[0] - 1) * conv.dilation[0])
    rows = min(rows, height, max(1, height * number // _TASKS))
    rows = -(-height // -(-height // rows))
    rows = -(-rows // lines) * lines
    width = conv.in_channels // conv.groups
    weights = 4 * math.prod(conv.kernel_size) * vectors * machine.lanes
    chunk = sum_channels(conv)
    legal = [n for n in range(chunk, width + 1, chunk) if width % n == 0]
    channels = max((n for n in legal if n * weights <= _WEIGHTS), default=chunk)
    return rows, channels


def _measure(
    spec: KernelSpec, machine: Machine, choices: list[Tile], images: int
) -> tuple[bytes, Kernel]:
    """Compile and time candidates until the time is spent; the fastest, and its code."""
    begun = time.perf_counter()
    codes: list[bytes] = []
    kernels: list[Kernel] = []
    single = compiling = 0.0
    for tile in choices:
        # Each is run at least four times, and the next takes about as long to compile as the last.
        ahead = compiling + 4 * single * (len(kernels) + 1)
        started = time.perf_counter()
        if kernels and started - begun + ahead > _BUDGET - _MEASURING:
            break
        codes.append(kernel.compile(spec, machine, tile))
        kernels.append(kernel.load(spec, machine, tile, codes[-1]))
        compiling = time.perf_counter() - started
        if not single:
            first = _call(kernels[0], images)
            first()
            start = time.perf_counter()
            first()
            single = time.perf_counter() - start
    left = max(0.0, _BUDGET - (time.perf_counter() - begun))
    calls = {str(i): _call(made, images) for i, made in enumerate(kernels)}
    times = interleave(calls, seconds=min(left, _MEASURING), min_runs=2, max_runs=60)
    least = min(timing.q1 for timing in times.values())
    # What looked better on paper wins where the clock can't tell.
    best = next(i for i in range(len(kernels)) if times[str(i)].q1 <= _NOISE * least)
    return codes[best], kernels[best]


def _call(made: Kernel, images: int = 1) -> Callable[[], None]:
    """A call of a kernel on random numbers."""
    spec, conv = made.spec, made.spec.conv
    x = _random(spec.channels_last_input, images, conv.in_channels, *conv.input_size)
    y = _random(spec.channels_last_output, images, conv.out_channels, *spec.output_tensor_size)
    packed = made.pack(_random(False, *conv.weight_shape))
    bias = _random(False, conv.out_channels) if spec.bias else None
    residual = y.clone() if spec.residual else None
    order = torch.arange(conv.in_channels) if spec.ordered else None
    return lambda: made(x, packed, bias, y, residual, order)


def _random(channels_last: bool, *size: int) -> torch.Tensor:
    # From a generator of its own: the user's random numbers stay as they are.
    x = torch.randn(*size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x
