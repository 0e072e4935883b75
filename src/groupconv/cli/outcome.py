"""What a run made, shown; and whether it holds what was asked of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from groupconv.cli.console import people, print_json
from groupconv.errors import BudgetError
from groupconv.optimize import Result
from groupconv.optimize.budget import Budget, parse_budgets
from groupconv.report import baseline_table, frontier_table, summary_table


def show_result(report: Mapping[str, Any], out: Path, json: bool) -> None:
    """Print the summary and name the files."""
    if json:
        print_json(report)
        return
    people.print(summary_table(report))
    if "baselines" in report:
        people.print(baseline_table(report))
    _name_files(out)


def show_sweep(reports: Sequence[Mapping[str, Any]], out: Path, json: bool) -> None:
    """The same for a network under each of several budgets."""
    if json:
        print_json({"runs": list(reports)})
        return
    people.print(frontier_table(reports))
    _name_files(out)


def check_floor(report: Mapping[str, Any], min_accuracy: float | None) -> None:
    """Raise BudgetError if the accuracy, or without labels the agreement, is below a floor."""
    if min_accuracy is None:
        return
    score = report["accuracy"]["after"]
    score = report["agreement"] if score is None else score
    if score is None or score < min_accuracy:
        found = "can't be told of such an output" if score is None else f"{score:.4f}"
        raise BudgetError(
            f"min_accuracy={min_accuracy}: does not hold, even unchanged: the accuracy is {found}"
        )


def check_budgets(original: nn.Module, result: Result, budgets: Sequence[str]) -> None:
    """Raise BudgetError naming every budget that a result does not hold.

    A latency is over its budget when three quarters of the runs are.
    """
    report = result.report
    before = {"size": _size(original)}
    after = {"size": _size(result.model)}
    for quantity in ("macs", "params", "latency"):
        before[quantity], after[quantity] = report[quantity]["before"], report[quantity]["after"]
    after["latency"] = report["latency_spread"]["after"]["q1"]

    def over(budget: Budget) -> bool:
        return after[budget.quantity] > budget.bound(before[budget.quantity])

    broken = [
        f"budget={budget.text!r} does not hold: {budget.amount_text(after[budget.quantity])} "
        f"where {budget.amount_text(budget.bound(before[budget.quantity]))} are allowed"
        for budget in parse_budgets(budgets)
        if over(budget)
    ]
    if broken:
        raise BudgetError("; ".join(broken))


def _size(model: nn.Module) -> float:
    return float(sum(t.numel() * t.element_size() for t in model.state_dict().values()))


def _name_files(out: Path) -> None:
    written = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    people.print(f"written to {out}: {', '.join(written)}", highlight=False, soft_wrap=True)
