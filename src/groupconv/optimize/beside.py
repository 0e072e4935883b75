"""The baselines of a run, built and measured beside its own result on the same images."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from groupconv.errors import BudgetError
from groupconv.kernels.spec import ConvSpec, legal_groups
from groupconv.optimize.baselines import plain_cut, pruned, random_groups
from groupconv.optimize.convert import Settled, structure_of
from groupconv.optimize.evaluate import Quality
from groupconv.optimize.job import Job
from groupconv.optimize.structure import Grouped, macs
from groupconv.timing import TURN, interleave

log = logging.getLogger(__name__)

_SECONDS = 0.5


def beside(
    job: Job,
    layers: Mapping[str, Settled],
    fitted: nn.Module,
    judge: Callable[[nn.Module], Quality],
) -> list[dict[str, Any]]:
    """What the same images and the same time give without this library's choices.

    The same layers in groups, of their channels as they come and without a refit, and of random
    channels and refitted; and the dense network with channels pruned until it is as fast, refitted.
    A convolution that became something else than a grouped one is cut into the number of groups
    nearest in multiply-adds; linear layers stay as they are there.

    Args:
        job: the run.
        layers: of its plan.
        fitted: its network, refitted but not recovered: no baseline is either.
        judge: says how good a network is beside the original.

    Returns:
        for each network its name, and accuracy, agreement, latency (seconds, all in one run) and
        MACs; the original and ours first. A baseline that can't be had has the reason as
        ``"why_not"`` instead.
    """
    convs = {conv.name: conv for conv in job.mapped.convs}
    groups = {
        name: _groups(settled, convs[name].spec)
        for name, settled in layers.items()
        if not convs[name].spec.linear and convs[name].spec.groups == 1
    }
    ours = job.target.build(fitted, (job.example(job.batch_size),))

    def relative(net: nn.Module) -> float:
        """Time of a network over that of ours, in one run."""
        calls = {"ours": ours, "other": job.target.build(net, (job.example(job.batch_size),))}
        times = interleave(calls, seconds=_SECONDS, min_runs=7, turn=TURN)
        return times["other"].median / times["ours"].median

    nets: dict[str, nn.Module | str] = {
        "original": job.model,
        "refitted, not recovered": fitted,
        "same groups, channels as they come, not refitted": plain_cut(
            job.model, job.mapped, groups
        ),
        "same groups, random channels, refitted": random_groups(
            job.model, job.mapped, groups, job.sampling
        ),
    }
    name = "channels pruned to the same time, refitted"
    try:
        nets[name] = pruned(job.model, job.mapped, relative, 1.0, job.sampling)
    except BudgetError as error:
        nets[name] = str(error)
    calls = {
        name: job.target.build(net, (job.example(job.batch_size),))
        for name, net in nets.items()
        if isinstance(net, nn.Module)
    }
    times = interleave(calls, seconds=2 * _SECONDS * len(calls), min_runs=7, turn=TURN)
    rows: list[dict[str, Any]] = []
    for name, net in nets.items():
        if isinstance(net, str):
            rows.append({"name": name, "why_not": net})
            continue
        quality = judge(net)
        rows.append(
            {
                "name": name,
                "accuracy": quality.accuracy_after,
                "task": quality.task,
                "agreement": quality.agreement,
                "output_error": quality.output_error,
                "latency": times[name].median,
                "macs": job.count_macs(net),
            }
        )
        log.info("%s: %s", name, rows[-1])
    return rows


def _groups(settled: Settled, dense: ConvSpec) -> int:
    structure = structure_of(settled)
    if isinstance(structure, Grouped):
        return structure.groups
    wanted = macs(Grouped(1), dense) / macs(structure, dense)
    legal = legal_groups(dense.in_channels, dense.out_channels)
    return min(legal, key=lambda groups: (abs(groups / wanted - 1), groups))
