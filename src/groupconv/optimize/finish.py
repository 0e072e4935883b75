"""The steps that carry a plan out: convert, refit, recover, evaluate, report."""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from groupconv import ranks
from groupconv.data import Images
from groupconv.optimize.beside import beside
from groupconv.optimize.choose import Decision
from groupconv.optimize.convert import Converted, convert, structure_of, without
from groupconv.optimize.evaluate import Quality, compare
from groupconv.optimize.job import Job
from groupconv.optimize.latency import layer_times
from groupconv.optimize.plan import Plan, save_weights
from groupconv.optimize.refit import refit
from groupconv.optimize.structure import unchanged
from groupconv.optimize.summary import LayerRow, summarize, write_report
from groupconv.optimize.visit import images_at_once
from groupconv.recovery import Recovery
from groupconv.recovery.lessons import batch_size
from groupconv.task import AGREEMENT

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """A converted network.

    Args:
        model: the network, in evaluation mode.
        plan: which layers were changed, and why.
        report: accuracy, latency (seconds), MACs and parameters before and after, and the same
            per layer; plain numbers and text, as in ``report.json``.
    """

    model: nn.Module
    plan: Plan
    report: dict[str, Any]


@dataclass(frozen=True)
class Carried:
    """A plan carried out.

    Args:
        converted: its network.
        losses: layer name to the share of its variance that is lost.
        refitted: the network before recovery.
        fitted, quality: how good it was then, and is now.
        stages: of the recovery.
    """

    converted: Converted
    losses: dict[str, float]
    refitted: nn.Module
    fitted: Quality
    quality: Quality
    stages: list[dict[str, Any]]


@dataclass(frozen=True)
class Finish:
    """How plans of one run are carried out.

    Args:
        job: the run.
        held_out: images to report on.
        recover: what is done after the refit.
        judged: images by which it is told whether that helps.
        min_accuracy: see :func:`optimize`, or None.
        baselines: whether to build and measure them beside each result.
        task: by which networks are compared, see :func:`compare`.
    """

    job: Job
    held_out: Images
    recover: Recovery
    judged: Images
    min_accuracy: float | None
    baselines: bool
    task: str

    def __call__(
        self, plan: Plan, decisions: Mapping[str, Decision], folder: Path | None
    ) -> Result:
        """Carry out a plan and write the results.

        Args:
            plan: legal for the network.
            decisions: what it comes from, for the report; none where a person wrote it.
            folder: for the results, or None.
        """
        job = self.job
        # Those of a plan may be of structures that a person has changed since.
        reasons = dict(plan.reasons) if decisions else {}
        while True:
            carried = self._carry_out(plan)
            converted, losses, quality = carried.converted, carried.losses, carried.quality
            score = (
                quality.accuracy_after if quality.accuracy_after is not None else quality.agreement
            )
            if self.min_accuracy is None or not plan.layers or (score or 0) >= self.min_accuracy:
                break
            worst = max(plan.layers, key=lambda name: _cost(name, decisions, losses))
            log.info("%.2f%% is below the floor: %s is as it was", 100 * (score or 0), worst)
            why = f"kept: without it the accuracy was {score:.4f}, the floor {self.min_accuracy}"
            left = without(job.mapped, plan.layers, worst)
            given_back = dict.fromkeys(plan.layers.keys() - left.keys(), why)
            reasons |= given_back
            plan = replace(plan, layers=left, reasons={**plan.reasons, **given_back})
        with job.step("evaluate"):
            latency = job.latency(converted.model)
        report = summarize(
            model=job.model,
            net=converted.model,
            layers=self._rows(plan, decisions, reasons, converted, losses),
            left=job.mapped.skipped,
            fitted=carried.fitted,
            quality=quality,
            latency=latency,
            predicted=plan.latency,
            macs=(job.macs, job.count_macs(converted.model)),
            recovery=carried.stages,
            steps=job.steps,
            settings={
                "model": job.name,
                "budget": plan.budget,
                "target": job.target.name,
                "recover": self.recover.time,
                "seed": job.seed,
                "batch_size": job.batch_size,
                "input_shape": list(job.images.images.shape[1:]),
                "data": job.images.source,
                "calibration_images": len(job.images),
                "test_data": self.held_out.source,
            },
        )
        if self.baselines and plan.layers:
            with job.step("baselines"):
                report["baselines"] = beside(job, plan.layers, carried.refitted, self._quality)
        if folder is not None and ranks.first():
            save_weights(folder, converted, job.folded, job.baked)
            write_report(folder, plan, report)
        return Result(converted.model, plan, report)

    def _carry_out(self, plan: Plan) -> Carried:
        """The network of a plan: converted, refitted, recovered."""
        job = self.job
        converted = convert(job.model, job.mapped, plan.layers)
        with job.step("refit"):
            losses = refit(job.model, converted, job.sampling, job.store("refit"), job.importance)
        fitted = ranks.on_first(lambda: self._quality(converted.model))
        log.info("refitted: %s", _in_words(fitted))
        if self.recover.seconds is None or not converted.placed:
            return Carried(converted, losses, converted.model, fitted, fitted, [])
        net, refitted = converted.model, copy.deepcopy(converted.model)
        # Here, because accelerate would add seconds to `import groupconv`.
        from groupconv.recovery.stages import School

        with job.step("recover"):
            school = School.of(
                job.model,
                converted.features,
                job.images,
                self.judged,
                self.recover,
                batch=batch_size(job.pixels),
                seed=job.seed,
                # Learning depends on all that the plan changes.
                store=job.store("recover", plan.to_json(), self.recover.described()),
            )
            stages = school.teach(net)
        quality = ranks.on_first(lambda: self._quality(net))
        log.info("recovered: %s", _in_words(quality))
        return Carried(converted, losses, refitted, fitted, quality, stages)

    def _quality(self, net: nn.Module) -> Quality:
        """How good a network is beside the original."""
        at_once = images_at_once(self.job.pixels, self.job.device)
        return compare(self.job.model, net, self.held_out, self.task, at_once)

    def _rows(
        self,
        plan: Plan,
        decisions: Mapping[str, Decision],
        reasons: Mapping[str, str],
        converted: Converted,
        losses: Mapping[str, float],
    ) -> list[LayerRow]:
        """The layers of the report: all that were decided on, or those of the plan."""
        job, edits = self.job, converted.edits
        convs = [c for c in job.mapped.convs if c.name in decisions or c.name in plan.layers]
        structures = {
            conv.name: structure_of(plan.layers.get(conv.name, unchanged(conv.spec)))
            for conv in convs
        }
        permuted = {
            name: (edit.order_in is not None, edit.order_out is not None)
            for name, edit in edits.items()
        }
        # Measured already where they were chosen by their times.
        timed = {
            conv.name: (
                conv,
                [
                    (unchanged(conv.spec), False, False),
                    (structures[conv.name], *permuted.get(conv.name, (False, False))),
                ],
            )
            for conv in convs
        }
        times = ranks.on_first(lambda: layer_times(timed, job.table, job.batch_size, job.weights))
        return [
            LayerRow(
                conv.name,
                conv.spec,
                structures[conv.name],
                sum(permuted.get(conv.name, ())),
                (times[conv.name][0], times[conv.name][1]),
                decisions[conv.name].candidate.loss if conv.name in decisions else None,
                losses.get(conv.name, 0.0),
                reasons.get(conv.name, "as the plan has it"),
            )
            for conv in convs
        ]


def _cost(name: str, decisions: Mapping[str, Decision], losses: Mapping[str, float]) -> float:
    """What a layer costs the network, as far as it is known."""
    return decisions[name].error if name in decisions else losses.get(name, 0.0)


def _in_words(quality: Quality) -> str:
    if quality.accuracy_after is not None and quality.accuracy_before is not None:
        return f"accuracy {quality.accuracy_after:.2%} (original {quality.accuracy_before:.2%})"
    if quality.agreement is not None:
        return f"{AGREEMENT[quality.task]} {quality.agreement:.2%}"
    if quality.psnr is not None:
        return f"images like the original's, PSNR {quality.psnr:.1f} dB"
    return f"relative output error {quality.output_error:.4f}"
