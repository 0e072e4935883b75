"""The comparison of engines as tables, a summary and a picture."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.peers import ENGINES, OURS

if TYPE_CHECKING:
    from benchmarks.kernels import Record

_WIDTHS = (1, 2, 4, 8, 16)
_SLOW = 0.95


def print_table(console: Console, network: str, records: Sequence["Record"]) -> None:
    """One row per shape: microseconds of each engine, and how ours stands."""
    table = Table(title=network, title_justify="left")
    table.add_column("layer", no_wrap=True)
    for name in (*ENGINES, "best / ours", "GFLOP/s", "of bound"):
        table.add_column(name, justify="right")
    for record in records:
        times = {name: f"{1e6 * t.median:.1f}" for name, t in record.times.items()}
        if record.best_peer:
            times[record.best_peer] = f"[bold]{times[record.best_peer]}[/bold]"
        row = [record.shape.layer]
        for name in ENGINES:
            wrong = record.refused.get(name, "").startswith("WRONG")
            row.append(times.get(name, "[red]wrong[/red]" if wrong else "-"))
        row.append(f"{record.ratio:.2f}x" if record.ratio else "-")
        row.append(f"{record.flops / 1e9:.1f}" if record.flops else "-")
        row.append(f"{record.of_bound:.0%} {record.bound}" if record.of_bound else "-")
        table.add_row(*row)
    console.print(table)


def summarize(records: Sequence["Record"]) -> dict[str, Any]:
    """Geometric means of the ratios, every distinct convolution counted once."""
    judged = [record for record in records if record.ratio is not None]
    grouped = [record for record in judged if record.shape.spec.groups > 1]
    widths: dict[str, list[Record]] = {str(width): [] for width in (*_WIDTHS, "other")}
    for record in grouped:
        width = record.shape.width
        widths[str(width) if width in _WIDTHS else "other"].append(record)
    slowest = sorted(judged, key=_ratio)
    return {
        "by_width": {name: _mean(members) for name, members in widths.items()},
        "grouped": _mean(grouped),
        "dense": _mean([record for record in judged if record.shape.spec.groups == 1]),
        "worst": _entry(slowest[0]) if slowest else None,
        "slower": [_entry(record) for record in slowest if _ratio(record) < _SLOW],
        "refused": {
            name: sum(name in record.refused for record in records)
            for name in ENGINES
            if any(name in record.refused for record in records)
        },
    }


def _ratio(record: "Record") -> float:
    assert record.ratio is not None
    return record.ratio


def _mean(records: Sequence["Record"]) -> dict[str, float | int | None]:
    ratios = [_ratio(record) for record in records]
    return {
        "ratio": statistics.geometric_mean(ratios) if ratios else None,
        "shapes": len(ratios),
    }


def _entry(record: "Record") -> dict[str, Any]:
    return {"shape": str(record.shape), "ratio": record.ratio, "best_peer": record.best_peer}


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    table = Table(title="time of the best peer / ours", title_justify="left")
    for name in ("width", "geometric mean", "shapes"):
        table.add_column(name, justify="left" if name == "width" else "right")
    rows = {**summary["by_width"], "all grouped": summary["grouped"], "dense": summary["dense"]}
    for name, mean in rows.items():
        if mean["shapes"]:
            table.add_row(name, f"{mean['ratio']:.2f}x", str(mean["shapes"]))
    console.print(table)
    if summary["worst"]:
        console.print(f"worst: {_text(summary['worst'])}")
    console.print(f"{len(summary['slower'])} shape(s) below {_SLOW}x")
    for entry in summary["slower"]:
        console.print(f"  {_text(entry)}")


def _text(entry: dict[str, Any]) -> str:
    return f"{entry['shape']}: {entry['ratio']:.2f}x ({entry['best_peer']})"


def picture(records: Sequence["Record"], path: Path) -> None:
    """Time against the number of groups, with dense / groups: what the arithmetic promises."""
    sweep = [record for record in records if record.shape.network == "width_sweep"]
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for name in ENGINES:
        points = [(r.shape.spec.groups, r.times[name].median) for r in sweep if name in r.times]
        if points:
            groups, times = zip(*sorted(points), strict=True)
            axes.plot(
                groups,
                [1e3 * t for t in times],
                marker="o",
                ms=4,
                lw=2.5 if name == OURS else 1.2,
                zorder=3 if name == OURS else 2,
                label=name,
            )
    dense = [t.median for r in sweep if r.shape.spec.groups == 1 for t in r.times.values()]
    if dense:
        all_groups = sorted(r.shape.spec.groups for r in sweep)
        axes.plot(
            all_groups,
            [1e3 * min(dense) / groups for groups in all_groups],
            "k:",
            lw=1,
            label="fastest dense / groups",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([r.shape.spec.groups for r in sweep], [str(r.shape.spec.groups) for r in sweep])
    axes.set_xlabel("groups")
    axes.set_ylabel("time of one pass, ms")
    if sweep:
        axes.set_title(f"128 channels, 3x3, 56x56, batch {sweep[0].shape.spec.batch}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
