"""What more threads bring our kernels: ``python -m benchmarks.kernel_threads``.

Each convolution of the comparison is timed on one thread and on several in turn, in the same run,
with the tiles that were chosen for that number of threads.
"""

import argparse
import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.engine import Ready, time_in_turn
from benchmarks.kernels import WARM_PASSES, tensors
from benchmarks.peers import groupconv
from benchmarks.provenance import commit, versions
from benchmarks.shapes import FOLDER, Shape, read
from groupconv.timing import machine

# The seconds on one thread above which the whole gain is expected: below it, handing work over
# takes a part of the time that shows.
LONG = 200e-6


def compare(shape: Shape, *, threads: int, seconds: float) -> dict[str, Any]:
    """The median seconds of one shape on one thread and on ``threads``."""
    weight, bias, input = tensors(shape.spec)
    ready: dict[str, Ready] = {}
    for count in (1, threads):
        engine = groupconv(shape.spec, weight, bias, input, count)
        if isinstance(engine, str):
            raise RuntimeError(f"{shape}: {engine}")
        run = functools.partial(_on, count, engine.run)
        ready[str(count)] = dataclasses.replace(engine, run=run)
    times = time_in_turn(ready, seconds=seconds, threads=threads, warm_passes=WARM_PASSES)
    one, several = (times[name].median for name in ready)
    return {"shape": str(shape), "one": one, "several": several, "gain": one / several}


def _on(threads: int, run: Callable[[], object]) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    run()


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The gains of long and of short ones, and the least of each."""
    found: dict[str, Any] = {}
    for name, kind in (
        ("long", [r for r in records if r["one"] > LONG]),
        ("short", [r for r in records if r["one"] <= LONG]),
    ):
        if kind:
            least = min(kind, key=lambda record: record["gain"])
            found[name] = {
                "shapes": len(kind),
                "gain": statistics.geometric_mean(record["gain"] for record in kind),
                "least": {"shape": least["shape"], "gain": least["gain"]},
            }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", type=Path, metavar="FILE", help="default: all")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each shape")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all results")
    options = parser.parse_args(arguments)
    shapes = {
        shape.spec: shape
        for path in options.shapes or sorted(FOLDER.glob("*.csv"))
        for shape in read(path)
    }
    console = Console(width=120)
    records = []
    with torch.inference_mode():
        for shape in shapes.values():
            record = compare(shape, threads=options.threads, seconds=options.seconds)
            records.append(record)
            console.print(
                f"{record['shape']:60} {1e6 * record['one']:9.1f} µs  {record['gain']:.2f}x"
            )
    summary = summarize(records)
    console.print(summary)
    if options.json:
        result = {
            "machine": machine(),
            "threads": options.threads,
            "versions": versions(("torch",)),
            **commit(),
            "records": records,
            "summary": summary,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
