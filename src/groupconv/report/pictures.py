"""The pictures of a report, as SVG text."""

import io
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

_BEFORE, _AFTER, _FITTED = "#8a8f98", "#0b6e4f", "#e0a030"


def frontier(report: Mapping[str, Any]) -> str:
    """Accuracy (or agreement with the original) against latency: before, refitted, recovered."""
    labelled = report["accuracy"]["before"] is not None
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    ms = {key: 1e3 * value for key, value in report["latency"].items()}
    if labelled:
        heights = {key: 100 * value for key, value in report["accuracy"].items()}
        fitted = 100 * report["accuracy_before_recovery"]
        axes.set_ylabel("top-1 accuracy, %")
    elif report["agreement"] is not None:
        heights = {"before": 100.0, "after": 100 * report["agreement"]}
        fitted = 100 * report["agreement_before_recovery"]
        axes.set_ylabel("same top-1 class as the original, %")
    else:
        heights = {"before": 0.0, "after": 100 * report["output_error"]}
        fitted = heights["after"]
        axes.set_ylabel("relative error of the output, %")
    if abs(fitted - heights["after"]) > 1e-9:
        axes.plot(
            ms["after"], fitted, "D", ms=7, color=_FITTED, label="refitted, not yet recovered"
        )
    for key, colour, label in (("before", _BEFORE, "original"), ("after", _AFTER, "optimized")):
        bars = None
        if labelled:
            low, high = report["accuracy_interval"][key]
            bars = [[heights[key] - 100 * low], [100 * high - heights[key]]]
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
    axes.set_xlim(left=0)
    axes.margins(y=0.25)
    axes.grid(alpha=0.25)
    axes.legend(loc="best", frameon=False, fontsize=9)
    return _svg(figure)


def layer_bars(report: Mapping[str, Any]) -> str:
    """Measured time of every layer that could change, before and after."""
    layers = report["layers"]
    figure = Figure(figsize=(7.6, 0.8 + 0.34 * max(len(layers), 1)), layout="constrained")
    axes = figure.subplots()
    rows = range(len(layers))
    for shift, key, colour, label in (
        (-0.19, "before", _BEFORE, "dense"),
        (0.19, "after", _AFTER, "as chosen"),
    ):
        axes.barh(
            [row + shift for row in rows],
            [1e3 * layer["latency"][key] for layer in layers],
            height=0.36,
            color=colour,
            label=label,
        )
    names = [
        layer["name"] + (f"  (G={layer['groups']})" if layer["groups"] > 1 else "  (dense)")
        for layer in layers
    ]
    axes.set_yticks(list(rows), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("measured time of the layer, ms")
    axes.grid(axis="x", alpha=0.25)
    if layers:
        axes.legend(loc="best", frameon=False, fontsize=9)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
