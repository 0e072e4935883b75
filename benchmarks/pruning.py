"""Ours beside dense channel pruning by torch-pruning: as fast, taught for as long.

    python -m benchmarks.pruning --model nets.py:vgg --data nets.py:few --train nets.py:train \
        --test nets.py:test --budget 2x --recover 5min --seeds 3 --json out.json

For each seed our network is optimized under the budget and taught by the original. torch-pruning
takes channels by the norms of all weights that go with them until the network is as fast as ours,
measured in turns, and its network is taught in the same way for the same time. The exit status is 1
unless ours is more accurate by a point in the mean over the seeds.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import groupconv
from benchmarks.provenance import commit, versions
from groupconv.cli.models import load_data, load_model
from groupconv.data import load_images
from groupconv.optimize.cost import count_macs
from groupconv.optimize.evaluate import compare
from groupconv.targets import Target, get_target
from groupconv.timing import TURN, interleave, machine

# Halvings of the range that the share of pruned channels is in.
_STEPS = 6
_SECONDS = 1.5
# Points that ours must be better by.
_BETTER = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if ours is not better by a point."""
    options = _arguments(arguments)
    original = load_model(options.model, options.weights).eval()
    calibration = load_images(load_data(options.data), limit=options.max_images)
    train = load_data(options.train) if options.train else None
    test = load_images(load_data(options.test), limit=1_000_000)
    example = calibration.images[:1]
    target = get_target(options.target)
    rows = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        recovery = groupconv.Recovery(options.recover, train=train)
        ours = groupconv.optimize(
            original,
            calibration,
            budget=options.budget,
            target=options.target,
            keep=options.keep,
            recover=recovery,
            test=test,
            seed=seed,
        ).model
        pruned, ratio = as_fast(original, ours, example, target)
        untaught = compare(original, pruned, test).accuracy_after
        groupconv.recover(pruned, original, calibration, recovery, seed=seed)
        nets = {"original": original, "ours": ours, "torch-pruning": pruned}
        times = timed(nets, example, target)
        row: dict[str, Any] = {"seed": seed, "pruning_ratio": ratio, "before_recovery": untaught}
        for name, net in nets.items():
            row[name] = {
                "accuracy": compare(original, net, test).accuracy_after,
                "latency": times[name],
                "macs": count_macs(net, (example,)),
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    better = statistics.mean(_points(row) for row in rows)
    Console(width=100).print(_table(rows, better, options))
    if options.json:
        record = {
            "machine": machine(),
            **commit(),
            "versions": versions(["torch", "torch-pruning"]),
            "settings": {key: str(value) for key, value in vars(options).items()},
            "points_better": better,
            "runs": rows,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(better < _BETTER)


def as_fast(
    original: nn.Module, ours: nn.Module, example: Tensor, target: Target
) -> tuple[nn.Module, float]:
    """The network with the fewest channels pruned that takes no longer than ours, and their share.

    By bisection, which takes it that less is faster.
    """
    low, high = 0.0, 1.0
    found: tuple[nn.Module, float] | None = None
    for _ in range(_STEPS):
        ratio = (low + high) / 2
        pruned = prune(original, example, ratio)
        times = timed({"ours": ours, "pruned": pruned}, example, target)
        if times["pruned"] <= times["ours"]:
            found, high = (pruned, ratio), ratio
        else:
            low = ratio
    if found is None:
        raise SystemExit("no pruning is as fast as ours")
    return found


def prune(original: nn.Module, example: Tensor, ratio: float) -> nn.Module:
    """A share of the channels of every layer but the last gone, their numbers multiples of 8."""
    net = copy.deepcopy(original).requires_grad_(True)
    last = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    pruner = torch_pruning.pruner.BasePruner(
        net,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[last],
        round_to=8,
    )
    pruner.step()
    return net.eval().requires_grad_(False)


def timed(nets: dict[str, nn.Module], example: Tensor, target: Target) -> dict[str, float]:
    """Seconds of each, in one interleaved run."""
    calls = {name: target.build(net, (example,)) for name, net in nets.items()}
    times = interleave(calls, seconds=_SECONDS * len(calls), min_runs=7, turn=TURN)
    return {name: timing.median for name, timing in times.items()}


def _points(row: dict[str, Any]) -> float:
    """What ours is better by."""
    points: float = 100 * (row["ours"]["accuracy"] - row["torch-pruning"]["accuracy"])
    return points


def _table(rows: Sequence[dict[str, Any]], better: float, options: argparse.Namespace) -> Table:
    title = f"{options.model}, {options.budget} on {options.target}, {options.recover} of learning"
    table = Table("", "accuracy", "time", "MACs", title=f"{title}: {better:+.2f} points")
    for name in ("original", "ours", "torch-pruning"):
        shares = [
            [f"{100 * row[name][key] / row['original'][key]:.1f}%" for row in rows]
            for key in ("latency", "macs")
        ]
        accuracy = [f"{row[name]['accuracy']:.2%}" for row in rows]
        table.add_row(name, *(" ".join(cells) for cells in (accuracy, *shares)))
    return table


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="as for groupconv optimize")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", required=True, help="calibration images")
    parser.add_argument("--train", help="images to learn from; default: those for calibration")
    parser.add_argument("--test", required=True, help="labelled images to report on")
    parser.add_argument("--budget", default="2x")
    parser.add_argument("--target", default="native")
    parser.add_argument("--keep", nargs="*", default=["first"])
    parser.add_argument("--recover", default="5min")
    parser.add_argument("--max-images", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
