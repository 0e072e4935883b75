"""Whether the machine is free enough to be timed on."""

import logging
import os
import time
from pathlib import Path

import torch

from groupconv.errors import BusyError

log = logging.getLogger(__name__)

_STAT = Path("/proc/stat")
# Seconds of one look, and of all before giving up.
_LOOK, _PATIENCE = 0.3, 15.0
# Of a core: what a system does of its own accord is less.
_SOME = 0.3
_ANYWAY = "GROUPCONV_BUSY"


def require_quiet() -> None:
    """Wait for a while until the machine has an idle core for each of PyTorch's threads.

    Where the system doesn't tell how busy it is, or ``GROUPCONV_BUSY=1`` is set, nothing is asked.

    Raises:
        BusyError: others keep using the cores.
    """
    if measured_anyway():
        return
    threads = torch.get_num_threads()
    end = time.perf_counter() + _PATIENCE
    told = False
    while (free := _free_cores()) is not None and free < threads - _SOME:
        if time.perf_counter() > end:
            raise BusyError(
                f"others use this machine: {free:.1f} of {_cores()} cores are idle, and to measure "
                f"time with {threads} threads takes as many; end what runs beside it, use fewer "
                f"threads, or set {_ANYWAY}=1 to measure all the same"
            )
        if not told:
            log.info("others use this machine, waiting: %.1f cores are idle", free)
            told = True


def measured_anyway() -> bool:
    """Whether times are wanted whatever else runs: ``GROUPCONV_BUSY=1``."""
    return os.environ.get(_ANYWAY) == "1"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _free_cores() -> float | None:
    """Cores that no other process used in a moment, of those that this one may use."""
    if not _STAT.exists():
        return None
    used, own = _ticks(), _own_seconds()
    start = time.perf_counter()
    time.sleep(_LOOK)
    took = time.perf_counter() - start
    busy = (_ticks() - used) / os.sysconf("SC_CLK_TCK")
    return _cores() - (busy - (_own_seconds() - own)) / took


def _ticks() -> int:
    """Of all that used our cores so far, other machines on the same processor too."""
    ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    rows = (line.split() for line in _STAT.read_text().splitlines() if line.startswith("cpu"))
    # user, nice, system, idle, iowait, irq, softirq, steal; guests are part of the first two.
    counts = ([int(n) for n in row[1:9]] for row in rows if row[0] in ours)
    return sum(sum(row) - row[3] - row[4] for row in counts)


def _own_seconds() -> float:
    """Of this process: its workers may still wait actively for more work."""
    times = os.times()
    return times.user + times.system
