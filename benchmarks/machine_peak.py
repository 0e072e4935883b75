"""What the machine can do at best: multiply-adds in registers, and copies in and out of caches.

``python -m benchmarks.machine_peak`` prints it.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from groupconv.kernels.machine import runnable
from groupconv.kernels.peak import peak

_RUNS = 20
_MEMORY = 64 * 2**20


@dataclass(frozen=True)
class Peak:
    """Bounds on the speed of a machine, measured.

    Args:
        isa: the instruction set of the multiply-adds.
        flops: per second, two for each multiply-add.
        bandwidth: (bytes of a buffer, bytes per second read and written when it is copied),
            smallest buffer first.
    """

    isa: str
    flops: float
    bandwidth: tuple[tuple[int, float], ...]

    def copy_speed(self, size: int) -> float:
        """Bytes per second where ``size`` bytes are touched: that of the cache that holds them."""
        return next((b for n, b in self.bandwidth if size <= 2 * n), self.bandwidth[-1][1])

    def seconds(self, flops: float, size: int) -> tuple[float, str]:
        """The least time for so much arithmetic and memory, and which of the two takes it."""
        return max((flops / self.flops, "FMA"), (size / self.copy_speed(size), "memory"))

    def __str__(self) -> str:
        copies = ", ".join(f"{b / 1e9:.1f} GB/s in {_bytes(n)}" for n, b in self.bandwidth)
        return f"peak {self.flops / 1e9:.1f} GFLOP/s ({self.isa}); copies {copies}"


def measure(threads: int) -> Peak:
    """The peaks of ``threads`` threads: the best of many short runs.

    Raises:
        RuntimeError: the processor is not one that code can be generated for.
    """
    if not runnable():
        raise RuntimeError("the peak is measured on x86-64 and AArch64 only")
    machine = runnable()[0]
    # Source and destination fill half of the second-level caches.
    sizes = (threads * _second_level_cache() // 4, 4 * 2**20, _MEMORY)
    return Peak(
        machine.name,
        peak(threads),
        tuple((size, _copy_speed(size, threads)) for size in sizes),
    )


def _copy_speed(size: int, threads: int) -> float:
    """Bytes read plus bytes written per second; what a store reads first is not counted."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    source, target = torch.ones(size // 4), torch.empty(size // 4)
    repeats = max(1, 2**23 // size)

    def copy() -> None:
        for _ in range(repeats):
            target.copy_(source)

    seconds = _best(copy)
    torch.set_num_threads(before)
    return 2 * size * repeats / seconds


def _best(call: Callable[[], None]) -> float:
    times = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _second_level_cache() -> int:
    """Its bytes for one core; 256 KiB where the system doesn't tell."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    try:
        text = path.read_text().strip()
    except OSError:
        return 256 * 2**10
    unit = {"K": 2**10, "M": 2**20}.get(text[-1], 1)
    return int(text.rstrip("KM")) * unit


def _bytes(size: int) -> str:
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the peak speed of this machine.")
    parser.add_argument("--threads", type=int, default=1)
    print(measure(parser.parse_args(arguments).threads))


if __name__ == "__main__":
    main()
