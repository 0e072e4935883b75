"""The steps that make a plan: survey the layers, choose structures, settle their channels."""

import fnmatch
import logging
import math
from collections.abc import Sequence

from groupconv import ranks
from groupconv.errors import ArgumentError
from groupconv.kernels.spec import ConvSpec
from groupconv.optimize.budget import Budget
from groupconv.optimize.choose import Decision, choose
from groupconv.optimize.job import Job
from groupconv.optimize.latency import layer_times
from groupconv.optimize.menu import Candidate
from groupconv.optimize.moments import EXACT
from groupconv.optimize.narrowing import Narrowing, narrowings
from groupconv.optimize.plan import Plan
from groupconv.optimize.sensitivity import Sensitivity, Trials
from groupconv.optimize.settle import searched, settle
from groupconv.optimize.structure import unchanged
from groupconv.optimize.survey import Survey, affordable, menus_and_sensitivities
from groupconv.optimize.trace import Trace, TracedConv
from groupconv.optimize.visit import images_at_once

log = logging.getLogger(__name__)

# What `keep` calls the first layer, and those that make the network's output.
FIRST, LAST = "first", "last"
# Of a linear layer's inputs and outputs the fewer number, at most.
_WIDE = 2_048


class Planner:
    """Plans for one network, under any number of budgets.

    Args:
        job: the run.
        keep: names or patterns of layers to leave as they are; "first" and "last" too.
        round_to: channels per group, and between the convolutions of a pair, are multiples of it.

    Raises:
        ArgumentError: a pattern matches no convolution.
    """

    def __init__(self, job: Job, keep: Sequence[str], round_to: int) -> None:
        self.job = job
        convs = _eligible(job.mapped, keep)
        log.info("%d of %d layers can be changed", len(convs), len(job.mapped.convs))
        names = [conv.name for conv in convs]
        store = job.store("survey", round_to, names)
        trials = Trials(
            job.model,
            job.ready(affordable(job.images.images, len(convs), job.macs)),
            job.importance,
            job.mapped.ends,
            images_at_once(job.pixels, job.device),
        )
        with job.step("survey"):
            menus, sensitivities = menus_and_sensitivities(
                job.mapped, convs, job.searches, store, trials, round_to=round_to
            )
            narrower = narrowings(
                job.mapped,
                _changeable(job.mapped, keep),
                job.searches,
                store,
                trials,
                example=job.example(2),
                round_to=round_to,
            )
        ties = _offer(narrower, job.mapped, menus, sensitivities)
        with job.step("measure"):
            layers = {
                conv.name: (
                    conv,
                    [(c.structure, c.permute_in, c.permute_out) for c in menus[conv.name]],
                )
                for conv in job.mapped.convs
                if conv.name in menus
            }
            times = ranks.on_first(
                lambda: layer_times(layers, job.table, job.batch_size, job.weights)
            )
        self.survey = Survey(menus, sensitivities, times, ties)

    def plan(self, budgets: Sequence[Budget]) -> tuple[Plan, dict[str, Decision]]:
        """The plan that loses least within the budgets, and what was decided for each layer.

        Raises:
            BudgetError: nothing on the menus meets them.
        """
        job = self.job
        with job.step("select"):
            choice = ranks.on_first(
                lambda: choose(
                    job.model, job.mapped, self.survey, budgets, job.known_latency, macs=job.macs
                )
            )
        with job.step("settle"):
            decisions = choice.decisions
            chosen = {name: decision.candidate for name, decision in decisions.items()}
            slopes = {
                name: self.survey.sensitivities[name]["grouped"].slope(candidate.loss)
                for name, candidate in chosen.items()
                if self.survey.changes(name, candidate) and searched(candidate.structure)
            }
            # All processes take part in their moments.
            job.searches(slopes)
            layers = ranks.on_first(lambda: settle(job.mapped, chosen, slopes, job.searches))
        reasons = {name: decision.why for name, decision in decisions.items()}
        text = ", ".join(budget.text for budget in budgets)
        plan = Plan(layers, reasons, text, job.target.name, job.seed, choice.latency)
        return plan, decisions


def _offer(
    narrower: Sequence[Narrowing],
    mapped: Trace,
    menus: dict[str, list[Candidate]],
    sensitivities: dict[str, dict[str, Sensitivity]],
) -> list[list[tuple[str, int]]]:
    """Add what spaces may lose to the menus, in place; gives what stands together."""
    specs = {conv.name: conv.spec for conv in mapped.convs}
    ties = []
    for narrowing in narrower:
        for candidates in narrowing.candidates:
            tie = []
            for name, candidate in candidates.items():
                menu = menus.setdefault(name, [Candidate(unchanged(specs[name]), 0.0)])
                tie.append((name, len(menu)))
                menu.append(candidate)
            ties.append(tie)
        for name, sensitivity in narrowing.sensitivities.items():
            sensitivities.setdefault(name, {})["narrowed"] = sensitivity
    return ties


def _eligible(mapped: Trace, keep: Sequence[str]) -> list[TracedConv]:
    """Layers that can be replaced and that the user does not keep."""
    changeable = _changeable(mapped, keep)
    return [
        conv
        for conv in mapped.convs
        if conv.name in changeable
        and (_narrow(conv.spec) if conv.spec.linear else _divides(conv.spec))
    ]


def _changeable(mapped: Trace, keep: Sequence[str]) -> set[str]:
    """Names of the layers that can be fitted and that the user does not keep."""
    names = [conv.name for conv in mapped.convs]
    special = {FIRST: names[:1], LAST: [c.name for c in mapped.convs if _makes_output(mapped, c)]}
    kept: set[str] = set()
    for pattern in keep:
        found = special.get(pattern, fnmatch.filter(names, pattern))
        if not found and pattern not in special:
            raise ArgumentError(
                f"keep={pattern!r} matches no layer; they are {', '.join(names)}, and "
                f"{FIRST!r} and {LAST!r} name the ends of the network"
            )
        kept.update(found)
    return {conv.name for conv in mapped.convs if not conv.spec.transposed} - kept


def _divides(spec: ConvSpec) -> bool:
    """Whether a convolution could have another number of groups; not so a depthwise one."""
    return math.gcd(spec.in_channels, spec.out_channels) > 1 and spec.groups < spec.in_channels


def _narrow(spec: ConvSpec) -> bool:
    """Whether the sums of a linear layer fit into memory, and its components are found in time."""
    sizes = spec.in_channels, spec.out_channels
    return max(sizes) <= EXACT and min(sizes) <= _WIDE


def _makes_output(mapped: Trace, conv: TracedConv) -> bool:
    """Whether the channels that a layer writes are those of the network's output.

    What is seen of a detector ends long before.
    """
    reasons = {mapped.spaces[space].fixed for space in conv.outputs.spaces}
    return mapped.ends == ("",) and any(
        reason is not None and reason.startswith("output of") for reason in reasons
    )
