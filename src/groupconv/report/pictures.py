"""The pictures of a report, as SVG text."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from groupconv.task import AGREEMENT

_BEFORE, _AFTER, _FITTED = "#8a8f98", "#0b6e4f", "#e0a030"


def frontier(report: Mapping[str, Any]) -> str:
    """Accuracy (or agreement with the original) against latency: before, refitted, recovered."""
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    ms = {key: 1e3 * value for key, value in report["latency"].items()}
    what, heights, fitted = _quality(report)
    axes.set_ylabel(what)
    if abs(fitted - heights["after"]) > 1e-9:
        axes.plot(
            ms["after"], fitted, "D", ms=7, color=_FITTED, label="refitted, not yet recovered"
        )
    for key, colour, label in (("before", _BEFORE, "original"), ("after", _AFTER, "optimized")):
        bars = _interval(report, key)
        axes.errorbar(
            ms[key], heights[key], yerr=bars, fmt="o", ms=8, capsize=4, color=colour, label=label
        )
    axes.annotate(
        "",
        xy=(ms["after"], heights["after"]),
        xytext=(ms["before"], heights["before"]),
        arrowprops={"arrowstyle": "->", "color": "#bbbbbb", "shrinkA": 8, "shrinkB": 8},
    )
    batch = report["settings"]["batch_size"]
    axes.set_xlabel(f"measured latency on {report['settings']['target']}, ms (batch {batch})")
    axes.set_xlim(0, 1.12 * max(ms.values()))
    axes.margins(y=0.25)
    axes.grid(alpha=0.25)
    axes.legend(loc="best", frameon=False, fontsize=9)
    return _svg(figure)


def layer_bars(layers: Sequence[Mapping[str, Any]]) -> str:
    """Measured time of every layer that could change, before and after; at least one."""
    figure = Figure(figsize=(8.4, 1.1 + 0.38 * len(layers)), layout="constrained")
    axes = figure.subplots()
    rows = range(len(layers))
    for shift, key, colour, label in (
        (-0.19, "before", _BEFORE, "as it was"),
        (0.19, "after", _AFTER, "as chosen"),
    ):
        axes.barh(
            [row + shift for row in rows],
            [1e3 * layer["latency"][key] for layer in layers],
            height=0.36,
            color=colour,
            label=label,
        )
    names = [f"{_shortened(layer['name'])}\n{layer['structure']}" for layer in layers]
    axes.set_yticks(list(rows), names, fontsize=7.5, linespacing=1.1)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlabel("measured time of the layer, ms")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return _svg(figure)


def sweep_picture(reports: Sequence[Mapping[str, Any]]) -> str:
    """Quality against latency of several runs on one network, each named by its budget.

    A line joins those that no other run beats in both.
    """
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    points = []
    for report in reports:
        # Each beside the original in the same run: shares of its time compare across runs.
        x, (what, heights, _) = 100 / report["speedup"], _quality(report)
        points.append((x, heights["after"], report["settings"]["budget"]))
        axes.errorbar(x, heights["after"], yerr=_interval(report, "after"), fmt="o", color=_AFTER,
                      ecolor="#a9cfc1", capsize=3)  # fmt: skip
    axes.errorbar(100.0, heights["before"], yerr=_interval(report, "before"), fmt="o",
                  color=_BEFORE, ecolor="#d0d3d8", capsize=3)  # fmt: skip
    axes.annotate("original", (100.0, heights["before"]), textcoords="offset points",
                  xytext=(6, -3), fontsize=8)  # fmt: skip
    original = (100.0, heights["before"])
    less_is_better = what.startswith("relative error")
    best = _best([*((x, y) for x, y, _ in points), original], -1.0 if less_is_better else 1.0)
    axes.plot([x for x, _ in best], [y for _, y in best], color=_AFTER, lw=1, zorder=1)
    # Away from the line, which rises to the right where more is better.
    up = (-5, -10) if less_is_better else (-5, 4)
    for x, y, name in points:
        axes.annotate(name, (x, y), textcoords="offset points", xytext=up, ha="right", fontsize=8)
    settings = reports[0]["settings"]
    axes.set_xlabel(
        f"latency on {settings['target']}, % of the original's (batch {settings['batch_size']})"
    )
    axes.set_ylabel(what)
    axes.set_xlim(0, 1.2 * max(100.0, *(x for x, _, _ in points)))
    axes.margins(y=0.12)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return _svg(figure)


def bench_picture(found: Mapping[str, Any]) -> str:
    """Latency, throughput and memory of one network in every runtime that ran it."""
    rows = [row for row in found["results"] if row["why_not"] is None]
    panels: list[tuple[str, list[float]]] = [
        ("latency, ms", [1e3 * row["latency"]["median"] for row in rows]),
        (f"images/s, batch {found['batch']}", [row["throughput"] for row in rows]),
        ("memory, MB", [(row["memory"] or 0) / 1e6 for row in rows]),
    ]
    figure = Figure(figsize=(10.0, 1.2 + 0.4 * len(rows)), layout="constrained")
    names = [row["target"] for row in rows]
    colours = [_AFTER if name == "native" else _BEFORE for name in names]
    every = figure.subplots(1, 3, sharey=True)
    every[0].invert_yaxis()
    for axes, (title, values) in zip(every, panels, strict=True):
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0, 1.2 * max(values, default=1.0) or 1.0)
        axes.spines[["top", "right"]].set_visible(False)
    shapes = " and ".join("x".join(map(str, shape)) for shape in found["shapes"])
    threads = found["machine"]["threads"]
    plural = "s" * (threads != 1)
    figure.suptitle(f"{found['network']}, {shapes}, {threads} thread{plural}", fontsize=11)
    return _svg(figure)


def _best(points: Sequence[tuple[float, float]], sign: float) -> list[tuple[float, float]]:
    """The points that none beats, from left to right; more of ``sign`` times height is better."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not best or sign * y > sign * best[-1][1]:
            best.append((x, y))
    return best


def _shortened(name: str, most: int = 48) -> str:
    return name if len(name) <= most else "…" + name[-most:]


def _interval(report: Mapping[str, Any], key: str) -> list[list[float]] | None:
    """The 95% interval of an accuracy as lengths below and above it, in points."""
    if report["accuracy"][key] is None:
        return None
    low, high = report["accuracy_interval"][key]
    value = report["accuracy"][key]
    return [[100 * (value - low)], [100 * (high - value)]]


def _quality(report: Mapping[str, Any]) -> tuple[str, dict[str, float], float]:
    """What is drawn, its values before and after, and before recovery."""
    if report["accuracy"]["before"] is not None:
        heights = {key: 100 * value for key, value in report["accuracy"].items()}
        return "top-1 accuracy, %", heights, 100 * report["accuracy_before_recovery"]
    if report["agreement"] is not None:
        heights = {"before": 100.0, "after": 100 * report["agreement"]}
        fitted = 100 * report["agreement_before_recovery"]
        return f"{AGREEMENT[report['task']]}, %", heights, fitted
    error = 100 * report["output_error"]
    return "relative error of the output, %", {"before": 0.0, "after": error}, error


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
