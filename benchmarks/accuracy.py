"""What optimize() keeps of a network's accuracy, beside what people would otherwise do.

    python -m benchmarks.accuracy --model nets.py:vgg --data nets.py:train --test nets.py:test \
        --budget 50%macs --target native --seeds 3 --json out.json

Every seed takes its own choice of groups and positions, and its own baselines: the same groups cut
as the channels come, random groups refitted, and channels pruned until the network is as fast as
ours. None is trained. The exit status is 1 unless ours is more accurate than every baseline that
takes no more time, by more than the spread of the seeds; one that is much faster but less accurate
is not beaten.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import groupconv
from benchmarks.provenance import commit
from groupconv.cli.models import load_data, load_model
from groupconv.timing import machine

# Of our time: above the first a network is slower, below the second it is no match.
_SLOWER, _FASTER = 1.02, 0.9

Rows = dict[str, list[dict[str, Any]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if ours is not the best."""
    options = _arguments(arguments)
    rows: Rows = {}
    for seed in range(options.seeds):
        result = groupconv.optimize(
            load_model(options.model, options.weights),
            load_data(options.data),
            test=load_data(options.test),
            budget=options.budget,
            target=options.target,
            keep=options.keep,
            max_images=options.max_images,
            seed=seed,
            baselines=True,
        )
        original, *others = result.report["baselines"]
        for row in others:
            if "why_not" not in row:
                shares = {key: row[key] / original[key] for key in ("latency", "macs")}
                row = row | {"time": shares["latency"], "share": shares["macs"]}
            rows.setdefault(row["name"], []).append(row)
    accuracy = original["accuracy"]
    Console(width=120).print(_table(rows, accuracy, options))
    if options.json:
        record = {
            "machine": machine(),
            **commit(),
            "settings": {key: str(value) for key, value in vars(options).items()},
            "original_accuracy": accuracy,
            "runs": rows,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(not _ours_is_best(rows))


def _ours_is_best(rows: Rows) -> bool:
    """Whether the least accuracy of ours is above that of every baseline at the same time."""
    ours, *others = rows.values()
    least = min(row["accuracy"] for row in ours)
    return all(
        row["time"] > _SLOWER * mine["time"]
        or (row["accuracy"] < least and row["time"] >= _FASTER * mine["time"])
        for runs in others
        for mine, row in zip(ours, runs, strict=True)
        if "why_not" not in row
    )


def _table(rows: Rows, accuracy: float, options: argparse.Namespace) -> Table:
    title = (
        f"{options.model}, {', '.join(options.budget)} on {options.target}: {accuracy:.2%} before"
    )
    table = Table("", "accuracy", "time", "MACs", title=f"{title}; {options.seeds} seeds")
    for name, runs in rows.items():
        known = [row for row in runs if "why_not" not in row]
        if not known:
            table.add_row(name, runs[0]["why_not"], "", "")
            continue
        cells = [_spread([100 * row["accuracy"] for row in known], "%")]
        cells += [_spread([100 * row[key] for row in known], "%") for key in ("time", "share")]
        table.add_row(name, *cells)
    return table


def _spread(values: Sequence[float], unit: str) -> str:
    return f"{statistics.mean(values):.2f}{unit} ({min(values):.2f} to {max(values):.2f})"


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="as for groupconv optimize")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", required=True, help="calibration images")
    parser.add_argument("--test", required=True, help="labelled images to report on")
    parser.add_argument("--budget", action="append", required=True)
    parser.add_argument("--target", default="native")
    parser.add_argument("--keep", nargs="*", default=["first", "last"])
    parser.add_argument("--max-images", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
