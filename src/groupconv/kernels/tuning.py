"""Choosing the tile of a kernel: of the few best on paper the best by the clock.

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

from groupconv.kernels import cache, kernel, openmp
from groupconv.kernels.candidates import candidates
from groupconv.kernels.kernel import Kernel
from groupconv.kernels.machine import Machine, runnable
from groupconv.kernels.spec import KernelSpec
from groupconv.kernels.tile import Tile
from groupconv.timing import interleave

# Seconds in which a layer is tuned.
_BUDGET = 0.25
# Times that each candidate runs before it is timed, and is timed at least.
_UNTIMED, _MIN_RUNS = 2, 2
# Seconds below which it matters what the caches hold.
_SHORT = 2e-3
# Ratio of two times below which they are the same.
_NOISE = 1.02
# What is asked for ahead counts as this much faster: here nobody else uses the caches that all
# cores share, and asking shows its worth when somebody does.
_AHEAD = 1.1
# Bytes of input and output that the caches near the core hold between layers, and those that no
# cache holds from one call to the next.
_NEAR, _FAR = 2**22, 2**24


def tuning() -> bool:
    """Whether tiles are measured."""
    return os.environ.get("GROUPCONV_TUNE", "1") != "0"


def tuned(
    spec: KernelSpec,
    images: int = 1,
    machine: Machine | None = None,
    worth_sharing: float | None = None,
) -> Kernel:
    """The kernel for ``spec``: from this process, from the code cache, or made now.

    Args:
        images: about how many images it will be called with.
        worth_sharing: seconds of work from which threads share it; by default those of a kernel
            that is called alone.
    """
    machine = machine or runnable()[0]
    least = kernel.WORTH_SHARING if worth_sharing is None else worth_sharing
    shared = openmp.threads() > 1 and images * kernel.guess(spec.conv, machine) >= least
    distance = sum(images * _bytes(spec) > held for held in (_NEAR, _FAR))
    key = (spec, machine, tuning(), distance, shared)
    with _lock:
        if key not in _known:
            # An empty batch would time nothing, and what it chose would be kept for all others.
            sample = max(1, min(images, -(-2 * _FAR // _bytes(spec))))
            _known[key] = _recall(key) or _make(key, sample)
        return _known[key]


# A kernel, its machine, whether tiles are measured, how many of the bounds its images exceed, and
# whether threads share them.
_Key = tuple[KernelSpec, Machine, bool, int, bool]
_known: dict[_Key, Kernel] = {}
_lock = threading.Lock()


def _after_fork() -> None:
    """The thread that held the lock is not in the child."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _recall(key: _Key) -> Kernel | None:
    entry = cache.read(cache.key(*key))
    if entry is None:
        return None
    head, _, code = entry.partition(b"\n")
    return kernel.load(key[0], key[1], Tile(**json.loads(head)), code)


def _make(key: _Key, images: int) -> Kernel:
    spec, machine, measured, distance, shared = key
    choices = candidates(spec, machine, distance > 0, shared)
    if measured:
        code, made = _measure(spec, machine, choices, images, shared)
    else:
        code = kernel.compile(spec, machine, choices[0])
        made = kernel.load(spec, machine, choices[0], code)
    head = json.dumps(asdict(made.tile)).encode()
    cache.write(cache.key(*key), head + b"\n" + code)
    return made


def _bytes(spec: KernelSpec) -> int:
    """Of one image, before and after."""
    conv = spec.conv
    pixels = conv.in_channels * math.prod(conv.input_size)
    return 4 * (pixels + conv.out_channels * math.prod(conv.output_size))


def _measure(
    spec: KernelSpec, machine: Machine, choices: list[Tile], images: int, shared: bool
) -> tuple[bytes, Kernel]:
    """Compile and time candidates until the time is spent; the fastest, and its code."""
    begun = time.perf_counter()
    call = _calls(spec, images, shared)
    codes: dict[Tile, bytes] = {}
    kernels: list[Kernel] = []
    calls: dict[str, Callable[[], None]] = {}
    single = compiling = 0.0
    for tile in choices:
        # The next may take half as long again to compile as the slowest; then all are timed.
        ahead = 1.5 * compiling * (tile.code not in codes)
        ahead += (_UNTIMED + _MIN_RUNS) * single * (len(calls) + 2)
        started = time.perf_counter()
        if kernels and started - begun + ahead > _BUDGET:
            break
        if tile.code not in codes:
            codes[tile.code] = kernel.compile(spec, machine, tile)
            compiling = max(compiling, time.perf_counter() - started)
        kernels.append(kernel.load(spec, machine, tile, codes[tile.code]))
        run = call(kernels[-1])
        run()
        if not single:
            start = time.perf_counter()
            run()
            single = time.perf_counter() - start
        if single < _SHORT:
            # The caches shall hold what this kernel uses, its own weights too.
            calls[f"{tile} warms up"] = run
        calls[str(tile)] = run
    left = _BUDGET - (time.perf_counter() - begun) - _UNTIMED * single * len(calls)
    times = interleave(calls, seconds=left, min_runs=_MIN_RUNS, max_runs=60)
    firsts = [times[str(made.tile)].q1 / (_AHEAD if made.tile.ahead else 1) for made in kernels]
    # What looked better on paper wins where the clock can't tell.
    best = next(i for i, q1 in enumerate(firsts) if q1 <= _NOISE * min(firsts))
    return codes[kernels[best].tile.code], kernels[best]


def _calls(spec: KernelSpec, images: int, shared: bool) -> Callable[[Kernel], Callable[[], None]]:
    """From a kernel to a call of it, on the same tensors for every kernel: as in a network, the
    caches still hold what was used last."""
    conv = spec.conv
    into, out, written = conv.in_channels, conv.out_channels, spec.output_tensor_size
    x = _ones(spec.input_stride, images, into, *conv.input_size)
    y = _ones(spec.output_stride, images, out, *written)
    bias = torch.ones(out, dtype=torch.float32) if spec.bias else None
    residual = _ones(spec.residual_stride, images, out, *written) if spec.residual else None
    order = torch.arange(conv.in_channels) if spec.ordered else None

    def call(made: Kernel) -> Callable[[], None]:
        packed = torch.ones(made.packed_size, dtype=torch.float32)
        return lambda: made(x, packed, bias, y, residual, order, alone=not shared)

    return call


def _ones(stride: int, images: int, channels: int, *size: int) -> torch.Tensor:
    """Images whose pixels lie ``stride`` elements apart: NCHW where it is 1."""
    if stride == 1:
        return torch.ones(images, channels, *size, dtype=torch.float32)
    return torch.ones(images, *size, stride, dtype=torch.float32).movedim(-1, 1)[:, :channels]
