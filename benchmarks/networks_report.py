"""The comparison of whole networks as tables and a summary."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks import zoo
from benchmarks.network_peers import OURS, OURS_FROM_FILE

if TYPE_CHECKING:
    from benchmarks.networks import Record


def summarize(records: Sequence["Record"]) -> dict[str, Any]:
    """Geometric means of peers' times over ours; the tiny network tells what a call costs."""
    whole = [record for record in records if record.network != zoo.TINY]
    judged = [(record.network, record.ratio) for record in whole if record.ratio is not None]
    worst = min(judged, key=lambda entry: entry[1], default=None)
    ratios: dict[str, list[float]] = {}
    for record in whole:
        for name, time in record.times.items():
            if name != OURS and OURS in record.times:
                ratios.setdefault(name, []).append(time.median / record.times[OURS].median)
    tiny = next((record for record in records if record.network == zoo.TINY), None)
    return {
        "best_peer": _mean([ratio for _, ratio in judged]),
        "by_peer": {name: _mean(values) for name, values in ratios.items()},
        "worst": {"network": worst[0], "ratio": worst[1]} if worst else None,
        "call": {name: t.median for name, t in tiny.times.items()} if tiny else None,
    }


def _mean(ratios: Sequence[float]) -> dict[str, float | int | None]:
    return {
        "ratio": statistics.geometric_mean(ratios) if ratios else None,
        "networks": len(ratios),
    }


def print_tables(
    console: Console, engines: Sequence[str], records: Sequence["Record"], summary: dict[str, Any]
) -> None:
    _print_times(console, engines, records)
    apart = [record for record in records if record.builds]
    if apart:
        _print(console, engines, apart, "build and first pass, s (ours: warm)", _build)
        _print(console, engines, apart, "memory at most during a pass beyond weights, MB", _memory)
    _print_summary(console, summary)


def _print_times(console: Console, engines: Sequence[str], records: Sequence["Record"]) -> None:
    """One row per network: milliseconds of each engine, and how ours stands."""
    table = Table(title="time of one pass, ms", title_justify="left")
    table.add_column("network", no_wrap=True)
    for name in (*engines, "best / ours"):
        table.add_column(name, justify="right")
    for record in records:
        times = {name: f"{1e3 * t.median:.2f}" for name, t in record.times.items()}
        if record.best_peer:
            times[record.best_peer] = f"[bold]{times[record.best_peer]}[/bold]"
        row = [record.network]
        for name in engines:
            is_wrong = record.refused.get(name, "").startswith("WRONG")
            row.append(times.get(name, "[red]wrong[/red]" if is_wrong else "-"))
        row.append(f"{record.ratio:.2f}x" if record.ratio else "-")
        table.add_row(*row)
    console.print(table)


def _print(
    console: Console,
    engines: Sequence[str],
    records: Sequence["Record"],
    title: str,
    cells: Callable[["Record"], Mapping[str, str]],
) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("network", no_wrap=True)
    columns = [
        name for name in (*engines, _COLD, OURS_FROM_FILE) if any(name in cells(r) for r in records)
    ]
    for name in columns:
        table.add_column(name, justify="right")
    for record in records:
        row = cells(record)
        table.add_row(record.network, *(row.get(name, "-") for name in columns))
    console.print(table)


_COLD = f"{OURS}, cold"


def _build(record: "Record") -> dict[str, str]:
    cells = {name: f"{seconds:.2f}" for name, seconds in record.builds.items()}
    return cells if record.cold_build is None else {**cells, _COLD: f"{record.cold_build:.2f}"}


def _memory(record: "Record") -> dict[str, str]:
    return {name: f"{n / 1e6:.1f}" for name, n in record.memory.items()}


def _print_summary(console: Console, summary: dict[str, Any]) -> None:
    if summary["best_peer"]["networks"]:
        rows = {"best of all": summary["best_peer"], **summary["by_peer"]}
        table = Table(title="time of a peer / ours", title_justify="left")
        for name in ("peer", "geometric mean", "networks"):
            table.add_column(name, justify="left" if name == "peer" else "right")
        for name, mean in rows.items():
            table.add_row(name, f"{mean['ratio']:.2f}x", str(mean["networks"]))
        console.print(table)
    if summary["worst"]:
        console.print(f"worst: {summary['worst']['network']}: {summary['worst']['ratio']:.2f}x")
    if summary["call"]:
        calls = ", ".join(f"{name} {1e6 * time:.0f}" for name, time in summary["call"].items())
        console.print(f"a call of the tiny network, us: {calls}")
