"""What a run found, as plain numbers and text: report.json, and the page made from it."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from groupconv.files import replacing
from groupconv.optimize.convert import Converted
from groupconv.optimize.evaluate import Quality
from groupconv.optimize.plan import PAGE, PLAN, REPORT, Plan
from groupconv.optimize.structure import Candidate, Menu
from groupconv.optimize.trace import Trace
from groupconv.timing import Timing, machine
from groupconv.version import __version__


def summarize(
    *,
    model: nn.Module,
    converted: Converted,
    mapped: Trace,
    menus: Mapping[str, Menu],
    chosen: Mapping[str, Candidate],
    times: Mapping[str, tuple[float, float]],
    losses: Mapping[str, float],
    fitted: Quality,
    quality: Quality,
    latency: tuple[Timing, Timing],
    macs: tuple[int, ...],
    steps: Mapping[str, float],
    settings: Mapping[str, Any],
    reasons: Mapping[str, str],
) -> dict[str, Any]:
    """The report of one run; latencies in seconds, MACs of one image.

    Args:
        model, converted: the networks before and after.
        mapped: trace of the model.
        menus, chosen: the candidates of each layer and the one taken.
        times: measured seconds of each layer, dense and as chosen.
        losses: share of each grouped layer's variance that its refit lost.
        fitted, quality: the converted network before and after recovery.
        latency: of the whole networks, in one interleaved run.
        macs: of the whole networks.
        steps: seconds of each step of the run.
        settings: arguments of the run.
        reasons: why each layer is as it is.
    """
    params = [sum(p.numel() for p in net.parameters()) for net in (model, converted.model)]
    layers = []
    for name, choice in chosen.items():
        dense, edit = menus[name].conv.spec, converted.edits.get(name)
        layers.append(
            {
                "name": name,
                "groups": choice.spec.groups,
                "macs": _pair(dense.macs // dense.batch, choice.spec.macs // dense.batch),
                "latency": _pair(*times[name]),
                "predicted_loss": choice.loss,
                "loss": losses.get(name, 0.0),
                "explicit_permutations": 0
                if edit is None
                else (edit.order_in is not None) + (edit.order_out is not None),
                "why": reasons[name],
            }
        )
    return {
        "groupconv": __version__,
        "settings": dict(settings),
        "machine": machine(),
        "accuracy": _pair(quality.accuracy_before, quality.accuracy_after),
        "accuracy_interval": _pair(quality.interval_before, quality.interval_after),
        "accuracy_before_recovery": fitted.accuracy_after,
        "agreement": quality.agreement,
        "agreement_before_recovery": fitted.agreement,
        "output_error": quality.output_error,
        "test_images": quality.images,
        "latency": _pair(latency[0].median, latency[1].median),
        "latency_spread": _pair(asdict(latency[0]), asdict(latency[1])),
        "speedup": latency[0].median / latency[1].median,
        "macs": _pair(*macs),
        "params": _pair(*params),
        "layers": layers,
        "left_as_they_are": dict(mapped.skipped),
        "seconds": dict(steps),
    }


def write_report(folder: Path, plan: Plan, report: Mapping[str, Any]) -> None:
    """Write plan.json, report.html and report.json, each whole or not at all."""
    # Here, because matplotlib would add a third of a second to `import groupconv`.
    from groupconv.report import render_page

    for name, text in (
        (PLAN, plan.to_json()),
        (PAGE, render_page(report)),
        (REPORT, json.dumps(report, indent=1)),
    ):
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _pair(before: Any, after: Any) -> dict[str, Any]:
    return {"before": before, "after": after}
