"""One file in its runtime in a process of its own: how much memory it occupies.

``python -m groupconv.targets.alone TARGET TINY FILE THREADS SHAPES`` prints one number. The runtime
has opened and run the tiny network before: its libraries are loaded, its threads started. Memory is
what the process holds at most during passes, less what it held before the network was opened:
weights, packed or not, buffers, code, and what opening left behind. Only Linux tells it.
"""

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from groupconv.errors import GroupConvError
from groupconv.targets.base import FileTarget

# Of the tiny network.
TINY = (1, 1, 8, 8)
_PASSES = 3
# Where Linux tells what a process holds, and is told to count the most anew.
STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory(target: FileTarget, tiny: Path, path: Path, shapes: list[list[int]]) -> int | None:
    """Bytes that a network needs in a new process, those of its weights included; None where the
    system doesn't tell.

    Args:
        tiny: file of a network for inputs of shape :data:`TINY`.
        path: of the network.
        shapes: of its inputs.

    Raises:
        GroupConvError: the process failed.
    """
    if not STATUS.exists():
        return None
    command = [sys.executable, "-m", __name__, target.name, tiny, path]
    done = subprocess.run(
        [*map(str, command), str(torch.get_num_threads()), json.dumps(shapes)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise GroupConvError(
            f"{target.name} in a process of its own ended with {done.returncode}: {last}"
        )
    # Libraries have things to say about themselves before.
    return int(done.stdout.strip().splitlines()[-1])


def occupied(field: str) -> int:
    """``VmRSS``, what this process holds, or ``VmHWM``, the most it did, in bytes."""
    lines = STATUS.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def tidy() -> None:
    """Give back to the system what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def count_anew() -> None:
    """From now on the most is counted anew."""
    _CLEAR.write_text("5")


def main(name: str, tiny: Path, path: Path, shapes: list[list[int]]) -> int:
    """What :func:`memory` asks for, in this process."""
    from groupconv.targets import get_target

    target = get_target(name)
    assert isinstance(target, FileTarget)
    first = target.open(tiny, (torch.zeros(TINY),))
    first.run()
    del first
    tidy()
    before = occupied("VmRSS")
    opened = target.open(path, tuple(torch.zeros(shape) for shape in shapes))
    opened.run()
    tidy()
    count_anew()
    for _ in range(_PASSES):
        opened.run()
    return occupied("VmHWM") - before


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    print(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[5])))
