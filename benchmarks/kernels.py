"""One convolution at a time, in every engine: ``python -m benchmarks.kernels``.

Every engine's result is held against the float64 reference first, and only then are all of them
timed in turn, in the same run. Times are of one forward pass, images and weights laid out as the
engine likes them best; borders that an engine can't add itself are in its input already.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.engine import Ready, time_in_turn, wrong
from benchmarks.kernels_report import picture, print_summary, print_table, summarize
from benchmarks.machine_peak import Peak, measure
from benchmarks.peers import ENGINES, LIBRARIES, OURS, PEERS
from benchmarks.provenance import commit, versions
from benchmarks.shapes import FOLDER, Shape, read
from groupconv.kernels.reference import group_conv_reference
from groupconv.kernels.spec import ConvSpec
from groupconv.timing import Timing, machine

# Largest error over the root mean square of the result. Half precision anywhere goes beyond it.
TOLERANCE = 2e-4
# Untimed passes before each timed one: after one, caches still hold the last engine's data.
WARM_PASSES = 3


@dataclass(frozen=True)
class Record:
    """What was measured of one shape.

    Args:
        shape: the convolution.
        times: engine to its time; the fastest right one of the peers is ``best_peer``.
        layouts: engine to the form it took its images in.
        refused: engine to the reason why it has no time.
        ratio: time of the best peer over ours; above 1, ours is faster.
        flops: of ours per second; see ``Shape.flops``.
        bound: what bounds the speed on this machine, "FMA" or "memory".
        of_bound: the part of that bound that ours reaches.
    """

    shape: Shape
    times: dict[str, Timing]
    layouts: dict[str, str]
    refused: dict[str, str]
    best_peer: str | None = None
    ratio: float | None = None
    flops: float | None = None
    bound: str | None = None
    of_bound: float | None = None

    def as_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {**values.pop("shape"), "width": self.shape.width, **values}


def compare(shape: Shape, *, threads: int, seconds: float, peak: Peak) -> Record:
    """Check every engine on one shape, then time those that are right."""
    weight, bias, input = tensors(shape.spec)
    reference = group_conv_reference(shape.spec, input, weight, bias)
    ready: dict[str, Ready] = {}
    refused: dict[str, str] = {}
    for name, prepare in ENGINES.items():
        try:
            engine = prepare(shape.spec, weight, bias, input, threads)
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
        time_in_turn(ready, seconds=seconds, threads=threads, warm_passes=WARM_PASSES)
        if ready
        else {}
    )
    record = Record(shape, times, {name: e.layout for name, e in ready.items()}, refused)
    peers = [name for name in PEERS if name in times]
    if OURS not in times:
        return record
    ours = times[OURS].median
    least, bound = peak.seconds(shape.flops, shape.bytes)
    best = min(peers, key=lambda name: times[name].median) if peers else None
    return dataclasses.replace(
        record,
        best_peer=best,
        ratio=times[best].median / ours if best else None,
        flops=shape.flops / ours,
        bound=bound,
        of_bound=least / ours,
    )


def tensors(spec: ConvSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias and input of a convolution, of usual sizes; the same at every call."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(spec.weight_shape, generator=random)
    weight /= weight[0].numel() ** 0.5
    bias = torch.randn(spec.out_channels, generator=random)
    input = torch.randn(spec.batch, spec.in_channels, *spec.input_size, generator=random)
    return weight, bias, input


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the speed of grouped convolutions.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", type=Path, metavar="FILE", help="default: all")
    parser.add_argument("--seconds", type=float, help="for each shape; default 2, quick 0.3")
    parser.add_argument("--quick", action="store_true", help="one shape in eight")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all results")
    parser.add_argument(
        "--picture", type=Path, metavar="PATH", help="draw time against groups of width_sweep"
    )
    options = parser.parse_args(arguments)
    options.shapes = options.shapes or sorted(FOLDER.glob("*.csv"))
    if options.picture and "width_sweep" not in {path.stem for path in options.shapes}:
        parser.error("--picture needs width_sweep.csv among --shapes")
    # Now, and not after all the work.
    for path in filter(None, (options.json, options.picture)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if options.seconds is None:
        options.seconds = 0.3 if options.quick else 2.0
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if ours is wrong anywhere, or can't run."""
    options = _arguments(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    peak = measure(options.threads)
    console.print(f"{machine()['processor']}, {options.threads} thread(s): {peak}")
    records: list[Record] = []
    known: dict[ConvSpec, Record] = {}
    told: set[tuple[str, str]] = set()
    with torch.inference_mode():
        for path in options.shapes:
            shapes = read(path)
            if options.quick:
                shapes = shapes[len(shapes) // 2 % 8 :: 8]
            for shape in shapes:
                if shape.spec not in known:
                    known[shape.spec] = compare(
                        shape, threads=options.threads, seconds=options.seconds, peak=peak
                    )
                records.append(dataclasses.replace(known[shape.spec], shape=shape))
                for fact in records[-1].refused.items():
                    if fact not in told:
                        told.add(fact)
                        console.print(f"{fact[0]}, {shape}: {fact[1]}")
            print_table(console, path.stem, records[-len(shapes) :])
    summary = summarize(list(known.values()))
    print_summary(console, summary)
    if options.json:
        result = {
            "machine": machine(),
            "threads": options.threads,
            "load_before": load,
            "peak": dataclasses.asdict(peak),
            "versions": versions(LIBRARIES),
            **commit(),
            "seconds_per_shape": options.seconds,
            "tolerance": TOLERANCE,
            "records": [record.as_dict() for record in records],
            "summary": summary,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.picture:
        picture(records, options.picture)
    return int(any(OURS in record.refused for record in records))


if __name__ == "__main__":
    sys.exit(main())
