"""Whole networks in every engine: ``python -m benchmarks.networks``.

Every engine's result is held against eager PyTorch first, and only then are all of them timed in
turn, in the same run, with the same number of threads. Then each engine runs each network in a
process of its own, which tells how long it takes to build and what memory it needs. Ours is built
there with an empty code cache (cold), once more in a new process (warm), and in a third one it is
loaded from the file that was saved. That one's memory is compared with that of the other engines,
all of which have the network from a file, but for those that run PyTorch's module.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import zoo
from benchmarks.alone import measure
from benchmarks.engine import Ready, time_in_turn, wrong
from benchmarks.network_peers import ENGINES, LIBRARIES, OURS, OURS_FROM_FILE, Source
from benchmarks.networks_report import print_tables, summarize
from benchmarks.provenance import commit, versions
from groupconv.timing import Timing, machine

# Largest error over the root mean square of what eager PyTorch computes.
TOLERANCE = 1e-3
# Untimed passes before each timed one.
_WARM_PASSES = 1


@dataclass(frozen=True)
class Record:
    """What was measured of one network.

    Args:
        network, batch, size: its name, and its images: how many, and their rows and columns.
        weights: bytes of its parameters and statistics.
        times: engine to its time; the fastest right one of the peers is ``best_peer``.
        layouts: engine to the form it took its images in.
        refused: engine to the reason why it has no time.
        ratio: time of the best peer over ours; above 1, ours is faster.
        builds: engine to the seconds from the module or file to the end of the first pass, in a
            process of its own; of ours, with a warm cache, and from its own file.
        cold_build: of ours with an empty cache.
        memory: engine to the bytes it holds at most beyond the weights; see
            :mod:`benchmarks.alone`.
    """

    network: str
    batch: int
    size: int
    weights: int
    times: dict[str, Timing]
    layouts: dict[str, str]
    refused: dict[str, str]
    best_peer: str | None = None
    ratio: float | None = None
    builds: dict[str, float] = field(default_factory=dict)
    cold_build: float | None = None
    memory: dict[str, int] = field(default_factory=dict)


def compare(source: Source, engines: Sequence[str], *, threads: int, seconds: float) -> Record:
    """Check every engine on one network, then time those that are right."""
    with torch.inference_mode():
        reference = source.model(source.input)
    ready: dict[str, Ready] = {}
    refused: dict[str, str] = {}
    for name in engines:
        try:
            engine = ENGINES[name].prepare(source, threads)
            reason = (
                engine if isinstance(engine, str) else wrong(engine.output(), reference, TOLERANCE)
            )
        except Exception as error:  # One engine's failure must not end the run of all.
            reason = f"failed: {type(error).__name__}: {error}"
        if reason:
            refused[name] = reason
        elif isinstance(engine, Ready):
            ready[name] = engine
    times = (
        time_in_turn(ready, seconds=seconds, threads=threads, warm_passes=_WARM_PASSES)
        if ready
        else {}
    )
    peers = [name for name in times if name != OURS]
    best = min(peers, key=lambda name: times[name].median) if peers else None
    return Record(
        network=source.name,
        batch=source.batch,
        size=zoo.size(source.name),
        weights=sum(4 * tensor.numel() for tensor in source.model.state_dict().values()),
        times=times,
        layouts={name: engine.layout for name, engine in ready.items()},
        refused=refused,
        best_peer=best,
        ratio=times[best].median / times[OURS].median if best and OURS in times else None,
    )


def apart(record: Record, *, threads: int, folder: Path) -> Record:
    """``record`` with what every engine that was right needs in a process of its own.

    Args:
        folder: of the network's files.
    """
    builds: dict[str, float] = {}
    memory: dict[str, int] = {}
    cold = None
    places = {"batch": record.batch, "threads": threads, "folder": folder}
    names = list(record.times)
    if OURS in names:
        with tempfile.TemporaryDirectory(prefix="groupconv-cache-") as cache:
            cold, builds[OURS] = (
                measure(OURS, record.network, **places, cache=Path(cache)).build for _ in range(2)
            )
        # Here, and not in the process that is measured.
        _ = Source(record.network, record.batch, folder).compiled
        names[names.index(OURS)] = OURS_FROM_FILE
    for name in names:
        found = measure(name, record.network, **places)
        builds[name] = found.build
        if found.memory is not None:
            memory[name] = found.memory - record.weights
    return dataclasses.replace(record, builds=builds, cold_build=cold, memory=memory)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the speed of whole networks.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="images; default 1")
    parser.add_argument("--networks", metavar="NAME,...", help="default: all")
    parser.add_argument("--engines", metavar="NAME,...", help="default: all")
    parser.add_argument("--seconds", type=float, help="for each network; default 10, quick 2")
    parser.add_argument(
        "--quick", action="store_true", help="three networks, no build times, no memory"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all results")
    options = parser.parse_args(arguments)
    for name in ("threads", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    default = zoo.QUICK if options.quick else tuple(zoo.NETWORKS)
    options.networks = _names(parser, "networks", options.networks, tuple(zoo.NETWORKS), default)
    options.engines = _names(parser, "engines", options.engines, tuple(ENGINES), tuple(ENGINES))
    # Now, and not after all the work.
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    if options.seconds is None:
        options.seconds = 2.0 if options.quick else 10.0
    return options


def _names(
    parser: argparse.ArgumentParser,
    option: str,
    text: str | None,
    known: tuple[str, ...],
    default: tuple[str, ...],
) -> tuple[str, ...]:
    names = tuple(text.split(",")) if text is not None else default
    for name in names:
        if name not in known:
            parser.error(f"--{option}: {name!r} is none of {', '.join(known)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if ours is wrong anywhere, or can't run."""
    options = _arguments(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    console.print(
        f"{machine()['processor']}, {options.threads} thread(s), batch {options.batch}; an engine "
        f"is right if no output is off by more than {TOLERANCE} of their root mean square"
    )
    records: list[Record] = []
    for name in options.networks:
        with tempfile.TemporaryDirectory(prefix="groupconv-networks-") as path:
            source = Source(name, options.batch, Path(path))
            record = compare(
                source, options.engines, threads=options.threads, seconds=options.seconds
            )
            if not options.quick and name != zoo.TINY:
                record = apart(record, threads=options.threads, folder=Path(path))
        for fact in record.refused.items():
            console.print(f"{name}, {fact[0]}: {fact[1]}", markup=False)
        records.append(record)
        if options.json:
            # After each network: the run of all takes an hour.
            _write(options, records, load)
    print_tables(console, options.engines, records, summarize(records))
    return int(any(OURS in record.refused for record in records))


def _write(options: argparse.Namespace, records: Sequence[Record], load: float) -> None:
    result: dict[str, Any] = {
        "machine": machine(),
        "threads": options.threads,
        "load_before": load,
        "versions": versions(LIBRARIES),
        **commit(),
        "seconds_per_network": options.seconds,
        "tolerance": TOLERANCE,
        "records": [dataclasses.asdict(record) for record in records],
        "summary": summarize(records),
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
