"""The figures of a report in rows, for the terminal and for the page alike."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from groupconv.task import AGREEMENT


def faster(speedup: float) -> str:
    """A quotient of two latencies in words."""
    return f"{speedup:.2f}x faster" if speedup >= 1 else f"{1 / speedup:.2f}x slower"


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
        share = f"{100 * report['agreement']:.2f}%"
        rows.append((AGREEMENT[report["task"]], "100%", share, ""))
    if report["overlap"] is not None:
        rows.append(("their overlap (IoU)", "1", f"{report['overlap']:.4f}", ""))
    if report["output_error"] is not None:
        rows.append(("relative output error", "0", f"{report['output_error']:.4f}", ""))
    if report["psnr"] is not None:
        rows.append(("likeness of the images (PSNR)", "", f"{report['psnr']:.1f} dB", ""))
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
            faster(report["speedup"]),
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


def frontier_rows(reports: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A header, and what came of each budget."""
    rows: list[tuple[str, ...]] = [("budget", "latency", "change", "MACs", "parameters", "quality")]
    for report in reports:
        quality = _quality({**report, "accuracy": report["accuracy"]["after"]})
        shares = [report[key]["after"] / report[key]["before"] for key in ("macs", "params")]
        rows.append(
            (
                report["settings"]["budget"],
                f"{1e3 * report['latency']['after']:.3f} ms",
                faster(report["speedup"]),
                *(f"{100 * share:.1f}%" for share in shares),
                quality,
            )
        )
    return rows


def frontier_table(reports: Sequence[Mapping[str, Any]]) -> Table:
    """The same for the terminal."""
    settings = reports[0]["settings"]
    return _table(f"{settings['model']} on {settings['target']}", frontier_rows(reports))


def baseline_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A header, and what each baseline gives on the same images; a reason where it gives none."""
    rows: list[tuple[str, ...]] = [("network", "latency", "MACs", "quality")]
    for row in report["baselines"]:
        if "why_not" in row:
            rows.append((row["name"], "", "", row["why_not"]))
        else:
            cells = (f"{1e3 * row['latency']:.3f} ms", f"{row['macs'] / 1e6:,.3f} M")
            rows.append((row["name"], *cells, _quality(row)))
    return rows


def baseline_table(report: Mapping[str, Any]) -> Table:
    """The same for the terminal."""
    return _table("Beside it, on the same images and without recovery", baseline_rows(report))


def bench_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A header, and what was measured of each runtime that ran the network."""
    rows: list[tuple[str, ...]] = [
        ("runtime", "ms", "quartiles", "images/s", "memory MB", "file MB", "difference")
    ]
    for row in found["results"]:
        if row["why_not"] is None:
            q1, median, q3 = (f"{1e3 * row['latency'][key]:.3f}" for key in ("q1", "median", "q3"))
            rows.append(
                (
                    row["target"],
                    median,
                    f"{q1}-{q3}",
                    f"{row['throughput']:.1f}",
                    "?" if row["memory"] is None else f"{row['memory'] / 1e6:.1f}",
                    f"{row['bytes'] / 1e6:.1f}",
                    f"{row['agreement']['largest']:.0e}",
                )
            )
    return rows


def bench_table(found: Mapping[str, Any]) -> Table:
    """The same for the terminal, with the reasons of those that did not run it."""
    machine = found["machine"]
    table = _table(
        f"{found['network']}, {_sizes(found)}: {machine['processor']}, "
        f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}",
        bench_rows(found),
    )
    lines = [
        f"images/s: in passes of {found['batch']}; memory: of a process of its own, weights "
        "included; difference: from PyTorch, over the largest number of the output"
    ]
    lines += [f"{row['target']}: {row['why_not'] or row['version']}" for row in found["results"]]
    table.caption = "\n".join(lines)
    return table


def _sizes(found: Mapping[str, Any]) -> str:
    return " and ".join("x".join(map(str, shape)) for shape in found["shapes"])


def _quality(row: Mapping[str, Any]) -> str:
    """What is known of a network's outputs: accuracy, else agreement, else error."""
    if row["accuracy"] is not None:
        return f"accuracy {100 * row['accuracy']:.2f}%"
    if row["agreement"] is not None:
        return f"{AGREEMENT[row['task']]} {100 * row['agreement']:.2f}%"
    return f"output error {row['output_error']:.4f}"


def _table(title: str, rows: Sequence[Sequence[str]]) -> Table:
    """Rows under a header; the first column is text, the others are figures."""
    table = Table(title=title)
    header, *body = rows
    for i, column in enumerate(header):
        table.add_column(column, justify="right" if i else "left")
    for row in body:
        table.add_row(*row)
    return table
