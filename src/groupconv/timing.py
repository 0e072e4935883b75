"""The only clock: several callables timed in turn, A B A B, in one run."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

# Seconds for which a whole network runs before it is another's turn.
TURN = 0.01


@dataclass(frozen=True)
class Timing:
    """Wall time of one call, in seconds: median and quartiles over ``runs`` samples."""

    median: float
    q1: float
    q3: float
    runs: int

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0], len(samples))
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3, len(samples))


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    min_runs: int = 5,
    max_runs: int = 200,
    rest: float = 0.0,
    turn: float = 0.0,
    between: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time every call in turn until ``seconds`` have passed, so that noise meets all alike.

    Each call is first run twice untimed: the first pays for allocation and code selection.

    Args:
        calls: name to callable.
        seconds: time to spend on all of them together, warm-up not counted.
        min_runs, max_runs: bounds on the turns of each.
        rest: seconds for which worker threads of one call keep their cores busy, waiting for more
            work, which others would pay for. Before each turn they are waited for; the next call
            then wakes its own in one untimed pass, and its turn lasts as long as the rest.
        turn: seconds that a turn lasts at least, after one untimed pass: the time of a network that
            runs again and again, whose weights the others' have not pushed out of the caches. 0:
            one pass.
        between: what happens between two passes of one call where it really runs. Done before
            each timed pass, and an untimed pass at the beginning of the turn.

    Returns:
        name to :class:`Timing`.
    """
    for call in calls.values():
        call()
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for run in range(max_runs):
        if run >= min_runs and time.perf_counter() > end:
            break
        for name, call in calls.items():
            if rest:
                time.sleep(rest)
            if rest or turn or between:
                call()
            samples[name] += _turn(call, max(rest, turn), between)
    return {name: Timing.of(s) for name, s in samples.items()}


def _turn(
    call: Callable[[], object], seconds: float, between: Callable[[], object] | None
) -> list[float]:
    """Times of passes, one at least."""
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        if between:
            between()
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return samples


def machine() -> dict[str, str | int]:
    """What a measured time depends on: processor, cores, threads, versions."""
    return {
        "processor": _processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
