"""The figures of a report in rows, for the terminal and for the page alike."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def summary_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(what, before, after, change) for accuracy, latency, MACs and parameters."""
    rows: list[tuple[str, ...]] = []
    accuracy = report["accuracy"]
    if accuracy["before"] is not None:
        cells = []
        for key in ("before", "after"):
            low, high = report["accuracy_interval"][key]
            cells.append(f"{100 * accuracy[key]:.2f}% [{100 * low:.2f}, {100 * high:.2f}]")
        change = f"{100 * (accuracy['after'] - accuracy['before']):+.2f} points"
        rows.append(("accuracy [95%]", *cells, change))
    if report["agreement"] is not None:
        rows.append(("same class as original", "100%", f"{100 * report['agreement']:.2f}%", ""))
    rows.append(("relative output error", "0", f"{report['output_error']:.4f}", ""))
    for what, key, scale, unit in (
        ("parameters", "params", 1e6, "M"),
        ("MACs per image", "macs", 1e6, "M"),
    ):
        before, after = report[key]["before"], report[key]["after"]
        cells = [f"{value / scale:,.3f} {unit}" for value in (before, after)]
        rows.append((what, *cells, f"{100 * after / before:.1f}%"))
    before, after = report["latency"]["before"], report["latency"]["after"]
    batch = report["settings"]["batch_size"]
    rows.append(
        (
            f"latency, batch {batch}",
            f"{1e3 * before:.3f} ms",
            f"{1e3 * after:.3f} ms",
            f"{report['speedup']:.2f}x faster",
        )
    )
    return rows


def summary_table(report: Mapping[str, Any]) -> Table:
    """The summary as a table for the terminal."""
    settings = report["settings"]
    table = Table(
        title=f"{settings['model']} on {settings['target']}, budget {settings['budget']}",
        caption=(
            f"{report['test_images']} test images; latency: median of "
            f"{report['latency_spread']['after']['runs']} interleaved runs, "
            f"{report['machine']['threads']} threads"
        ),
    )
    for column, justify in (("", "left"), ("before", "right"), ("after", "right"), ("", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in summary_rows(report):
        table.add_row(*row)
    return table
