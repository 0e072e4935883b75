"""Plans made for one runtime, on all the others.

    python -m benchmarks.targets --model nets.py:vgg --data nets.py:train --test nets.py:test \
        --budget 2x --json out.json

For each runtime a network is optimized under the same budget; then every one of these networks, and
the original, is timed on every runtime, all of them in one interleaved run, and checked there
against PyTorch. A budget that is a share of the original's time asks most where the original is
fastest: such a plan can be faster everywhere.

The exit status is 1 if, on some runtime, another's plan of no fewer MACs is faster than its own, a
budget doesn't hold within 5% or a prediction within 10%.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import groupconv
from benchmarks.provenance import commit, versions
from groupconv.cli.models import load_data, load_model
from groupconv.optimize.budget import parse_budget
from groupconv.optimize.cost import count_macs
from groupconv.targets import get_target
from groupconv.timing import TURN, Timing, interleave, machine

TARGETS = ("native", "onnxruntime", "openvino", "litert")
_LIBRARIES = ("torch", "onnxruntime", "openvino", "ai-edge-litert", "litert-torch")
ORIGINAL = "original"
# Times that differ by less are the same.
_SAME_TIME = 1.02
_BUDGET, _PREDICTION = 1.05, 1.1


@dataclass(frozen=True)
class Row:
    """One runtime.

    Args:
        target: its name.
        accuracy: of the plan made for it; None without labels.
        groups: layer name to what stands in its place there.
        predicted: time of its plan's network as a share of the original's, when it was chosen.
        times: name of what a plan was made for to the time of its network here, the original too.
        macs: the same, to its multiply-adds.
    """

    target: str
    accuracy: float | None
    groups: dict[str, str]
    predicted: float
    times: dict[str, Timing]
    macs: dict[str, int]

    def share(self, plan: str) -> float:
        """Time of a plan's network over that of the original."""
        return self.times[plan].median / self.times[ORIGINAL].median

    def faults(self, budget: float | None) -> list[str]:
        """What doesn't hold here.

        Args:
            budget: the share of the original's time that is allowed, or None.
        """
        own = self.share(self.target)
        found = [
            f"the plan for {plan} takes {self.share(plan):.1%}, the own one {own:.1%}"
            for plan in self.times.keys() - {ORIGINAL, self.target}
            if self.macs[plan] >= self.macs[self.target] and own > _SAME_TIME * self.share(plan)
        ]
        if budget is not None and own > _BUDGET * budget:
            found.append(f"{own:.1%} of the original's time, {budget:.1%} are allowed")
        if not 1 / _PREDICTION <= own / self.predicted <= _PREDICTION:
            found.append(f"{own:.1%} of the original's time, {self.predicted:.1%} were predicted")
        return [f"{self.target}: {fault}" for fault in found]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if something doesn't hold."""
    options = _arguments(arguments)
    model = load_model(options.model, options.weights)
    networks: dict[str, nn.Module] = {ORIGINAL: model}
    reports = {}
    for name in options.targets:
        result = groupconv.optimize(
            model,
            load_data(options.data),
            test=load_data(options.test),
            budget=options.budget,
            target=name,
            max_images=options.max_images,
        )
        networks[name], reports[name] = result.model, result.report
    x = torch.randn(1, *reports[options.targets[0]]["settings"]["input_shape"])
    macs = {name: count_macs(net, (x,)) for name, net in networks.items()}
    rows = []
    for name in options.targets:
        target, report = get_target(name), reports[name]
        calls = {plan: target.build(net, (x,)) for plan, net in networks.items()}
        times = interleave(
            calls,
            seconds=options.seconds,
            min_runs=21,
            max_runs=10_000,
            rest=target.rest,
            turn=TURN,
        )
        groups = {layer["name"]: layer["structure"] for layer in report["layers"]}
        predicted = 1 / report["predicted_speedup"]
        rows.append(Row(name, report["accuracy"]["after"], groups, predicted, times, macs))
    budget = parse_budget(options.budget).fraction
    faults = [fault for row in rows for fault in row.faults(budget)]
    Console(width=120).print(_table(rows))
    print("\n".join(faults) or "all holds")
    if options.json:
        record = {
            "machine": machine(),
            "versions": versions(_LIBRARIES),
            **commit(),
            "settings": {key: str(value) for key, value in vars(options).items()},
            "rows": [asdict(row) for row in rows],
            "faults": faults,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(faults))


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="time of the network made for each runtime, % of the original's there")
    for column in ("on", "original ms", *(f"for {row.target}" for row in rows), "predicted"):
        table.add_column(column, justify="left" if column == "on" else "right")
    for row in rows:
        shares = (f"{100 * row.share(other.target):.1f}" for other in rows)
        first = f"{1e3 * row.times[ORIGINAL].median:.3f}"
        table.add_row(row.target, first, *shares, f"{100 * row.predicted:.1f}")
    table.add_row(
        "MACs", "100", *(f"{100 * r.macs[r.target] / r.macs[ORIGINAL]:.1f}" for r in rows), ""
    )
    accuracies = ("" if r.accuracy is None else f"{100 * r.accuracy:.2f}" for r in rows)
    table.add_row("accuracy", "", *accuracies, "")
    return table


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plans made for one runtime, on the others.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--budget", default="2x", help="of time; default 2x")
    parser.add_argument("--targets", default=",".join(TARGETS), metavar="NAME,...")
    parser.add_argument("--max-images", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=10.0, help="on each runtime")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args(arguments)
    if parse_budget(options.budget).quantity != "latency":
        parser.error(f"--budget {options.budget}: must be one of time, such as 2x")
    options.targets = options.targets.split(",")
    for name in options.targets:
        get_target(name)
    return options


if __name__ == "__main__":
    sys.exit(main())
