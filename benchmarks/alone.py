"""One network in one engine in a process of its own: how long it takes to build, what it occupies.

``python -m benchmarks.alone ENGINE NETWORK BATCH THREADS FOLDER`` prints one JSON object. The
engine has built and run the tiny network before: its libraries are loaded, its threads started.

Memory is what the process holds at most during passes, less what it held before the network was
made or loaded: weights, packed or not, buffers, code, and what building left behind. Only Linux
tells it.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import zoo
from benchmarks.engine import Ready
from benchmarks.network_peers import ENGINES, FROM_FILE, OURS_FROM_FILE, Source
from groupconv.targets.alone import STATUS, count_anew, occupied, tidy

_PASSES = 3


@dataclass(frozen=True)
class Alone:
    """What one process found.

    Args:
        build: seconds from the form that the engine is made from (a module, a file) to one that
            has run once.
        memory: bytes at most during passes, those of the weights included; None where the system
            doesn't tell.
    """

    build: float
    memory: int | None


def measure(
    engine: str, name: str, *, batch: int, threads: int, folder: Path, cache: Path | None = None
) -> Alone:
    """Build and run ``engine`` in a new process.

    Args:
        folder: of the network's files; see :class:`benchmarks.network_peers.Source`.
        cache: the folder of generated code, or the user's own.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", "benchmarks.alone", engine, name, str(batch), str(threads)]
    environment = dict(os.environ)
    if cache is not None:
        environment["GROUPCONV_CACHE"] = str(cache)
    done = subprocess.run(
        [*command, str(folder)],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RuntimeError(f"{engine}, {name}: the process ended with {done.returncode}: {last}")
    # Libraries have things to say about themselves before.
    return Alone(**json.loads(done.stdout.strip().splitlines()[-1]))


def _build(engine: str, source: Source, threads: int) -> tuple[Ready, float]:
    found = FROM_FILE if engine == OURS_FROM_FILE else ENGINES[engine]
    getattr(source, found.form)
    start = time.perf_counter()
    ready = found.prepare(source, threads)
    if isinstance(ready, str):
        raise RuntimeError(ready)
    ready.run()
    return ready, time.perf_counter() - start


def main(engine: str, name: str, batch: int, threads: int, folder: Path) -> Alone:
    torch.set_num_threads(threads)
    tiny, _ = _build(engine, Source(zoo.TINY, 1, folder), threads)
    del tiny
    tidy()
    before = occupied("VmRSS") if STATUS.exists() else None
    ready, build = _build(engine, Source(name, batch, folder), threads)
    tidy()
    if before is not None:
        count_anew()
    for _ in range(_PASSES):
        ready.run()
    return Alone(build, None if before is None else occupied("VmHWM") - before)


if __name__ == "__main__":
    found = main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
    print(json.dumps(found.__dict__))
