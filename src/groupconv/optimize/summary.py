"""What a run found, as plain numbers and text: report.json, and the page made from it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from groupconv.files import write_text
from groupconv.kernels.spec import ConvSpec
from groupconv.optimize.evaluate import Quality
from groupconv.optimize.plan import PAGE, PLAN, REPORT, Plan
from groupconv.optimize.structure import Grouped, Structure, macs, unchanged
from groupconv.timing import Timing, machine
from groupconv.version import __version__


@dataclass(frozen=True)
class LayerRow:
    """One layer of the report.

    Args:
        name: of the layer.
        layer: as it was.
        structure: what stands there now.
        permutations: how many explicit ones are around it.
        seconds: measured, before and after.
        predicted_loss: share of its variance, as the choice was made; None where none was made.
        loss: the same after the refit.
        why: for people.
    """

    name: str
    layer: ConvSpec
    structure: Structure
    permutations: int
    seconds: tuple[float, float]
    predicted_loss: float | None
    loss: float
    why: str

    def to_dict(self) -> dict[str, Any]:
        grouped = isinstance(self.structure, Grouped)
        return {
            "name": self.name,
            "was": str(unchanged(self.layer)),
            "structure": str(self.structure),
            "groups": self.structure.groups if grouped else None,
            "macs": _pair(
                *(
                    macs(structure, self.layer)
                    for structure in (unchanged(self.layer), self.structure)
                )
            ),
            "latency": _pair(*self.seconds),
            "predicted_loss": self.predicted_loss,
            "loss": self.loss,
            "explicit_permutations": self.permutations,
            "why": self.why,
        }


def summarize(
    *,
    model: nn.Module,
    net: nn.Module,
    layers: Sequence[LayerRow],
    left: Mapping[str, str],
    fitted: Quality,
    quality: Quality,
    latency: tuple[Timing, Timing],
    predicted: float | None,
    macs: tuple[int, int],
    recovery: Sequence[Mapping[str, Any]],
    steps: Mapping[str, float],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The report of one run; latencies in seconds, MACs of one image.

    Args:
        model, net: the networks before and after.
        layers: those that could be changed.
        left: name of what could not be traced to the reason.
        fitted, quality: the converted network before and after recovery.
        latency: of the whole networks, in one interleaved run.
        predicted: latency of the network as a share of the original's, if the plan says so.
        macs: of the whole networks.
        recovery: its stages.
        steps: seconds of each step of the run.
        settings: arguments of the run.
    """
    params = [sum(p.numel() for p in network.parameters()) for network in (model, net)]
    return {
        "groupconv": __version__,
        "settings": dict(settings),
        "machine": machine(),
        **qualities(fitted, quality),
        "latency": _pair(latency[0].median, latency[1].median),
        "latency_spread": _pair(asdict(latency[0]), asdict(latency[1])),
        "speedup": latency[0].median / latency[1].median,
        "predicted_speedup": None if predicted is None else 1 / predicted,
        "macs": _pair(*macs),
        "params": _pair(*params),
        "layers": [layer.to_dict() for layer in layers],
        "left_as_they_are": dict(left),
        "recovery": list(recovery),
        "seconds": dict(steps),
    }


def qualities(fitted: Quality, quality: Quality) -> dict[str, Any]:
    """The entries of a report about a network before and after recovery."""
    return {
        "accuracy": _pair(quality.accuracy_before, quality.accuracy_after),
        "accuracy_interval": _pair(quality.interval_before, quality.interval_after),
        "accuracy_before_recovery": fitted.accuracy_after,
        "task": quality.task,
        "agreement": quality.agreement,
        "agreement_before_recovery": fitted.agreement,
        "overlap": quality.overlap,
        "output_error": quality.output_error,
        "psnr": quality.psnr,
        "test_images": quality.images,
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
        write_text(folder / name, text)


def _pair(before: Any, after: Any) -> dict[str, Any]:
    return {"before": before, "after": after}
