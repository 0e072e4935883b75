"""optimize(), plan() and apply(): the steps of the scheme in their order."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from groupconv import ranks
from groupconv.files import write_text
from groupconv.optimize.budget import parse_budgets
from groupconv.optimize.convert import check
from groupconv.optimize.finish import Result
from groupconv.optimize.plan import PLAN, Plan
from groupconv.optimize.planning import Planner
from groupconv.optimize.settle import complete, searched
from groupconv.optimize.start import KEEP, Options, Source, check_round_to, end, started, texts
from groupconv.recovery import Recovery
from groupconv.task import AUTO


def optimize(
    model: nn.Module,
    data: Any,
    *,
    budget: str | Sequence[str] = "2x",
    target: str = "eager",
    recover: str | Recovery = "none",
    keep: str | Sequence[str] = KEEP,
    out: str | Path | None = None,
    restart: bool = False,
    seed: int = 0,
    test: Any = None,
    batch_size: int = 1,
    max_images: int = 1_024,
    image_size: int = 224,
    round_to: int = 1,
    min_accuracy: float | None = None,
    baselines: bool = False,
    task: str = AUTO,
) -> Result:
    """Turn a trained CNN into a network of grouped convolutions under a budget.

    The model itself is left as it was. Interrupted and called again with the same arguments and
    ``out``, it goes on where it stopped.

    Args:
        model: a network of one image batch; evaluated in evaluation mode.
        data: calibration images: a tensor ``(N, C, H, W)``, a DataLoader, a folder, an ``.npz``.
        budget: a bound on the whole network: "2x" faster, "50%" of the latency, "12ms",
            "50%macs", "300Mmacs", "50%params", "1.2Mparams", "50%size", "5MB" of weights; or
            several of them, of which all must hold.
        target: the runtime whose measured time counts; "eager", "native", "onnxruntime",
            "openvino" or "litert".
        recover: "none"; "bn" re-estimates batch norm; with a time such as "10min" the result also
            learns from the original network, and from labels where data has any, for so long.
            More can be asked for with a :class:`Recovery`.
        keep: name or pattern (``"layer4.*"``) of layers to leave as they are, or several; "first"
            is the first layer, "last" one that makes the network's output.
        out: folder for model.safetensors, plan.json, report.json and report.html.
        restart: whether to forget a run with other arguments that was interrupted there.
        seed: of every random choice.
        test: images to report on, in any form that data takes; by default a fifth of data is
            held out.
        batch_size: images per call when latency is measured.
        max_images: calibration images to use at most.
        image_size: height and width of the images of a folder, in pixels.
        round_to: channels per group, and between two convolutions that stand in place of one, are
            multiples of it; depthwise convolutions are exempt.
        min_accuracy: top-1 accuracy on the test images, 0 to 1 (without labels, the share of them
            whose class stays), below which the costliest layer is left as it was, until it holds;
            the budget may then not.
        baselines: whether to report, beside the result, what plain cutting, random groups and
            channel pruning at equal time give on the same images.
        task: what the networks are compared by: "classify" (top-1 class), "segment" (class of each
            pixel), "detect" (objects found again) or "generate" (PSNR of the images); "auto" tells
            it from what the network returns.

    Returns:
        Result

    Raises:
        ArgumentError: an argument breaks a rule.
        DataError: images, weights or the output folder can't be used.
        BudgetError: no choice meets the budget; no result is written.
    """
    limits, options = (
        parse_budgets(budget),
        Options(target, recover, batch_size, min_accuracy, baselines, task),
    )
    check_round_to(round_to)
    source = Source(data, test, max_images, image_size, seed)
    asked = {"budget": texts(budget), "keep": texts(keep), "round_to": round_to}
    with started(model, source, options, out, asked, restart) as (job, finish):
        plan, decisions = Planner(job, texts(keep), round_to).plan(limits)
        result = finish(plan, decisions, job.folder)
        end(job)
    return result


def plan(
    model: nn.Module,
    data: Any,
    *,
    budget: str | Sequence[str] = "2x",
    target: str = "eager",
    keep: str | Sequence[str] = KEEP,
    out: str | Path | None = None,
    restart: bool = False,
    seed: int = 0,
    test: Any = None,
    batch_size: int = 1,
    max_images: int = 1_024,
    image_size: int = 224,
    round_to: int = 1,
) -> Plan:
    """The plan that :func:`optimize` would carry out, to be looked at or edited.

    Args:
        model, data, budget, target, keep, restart, seed, batch_size, max_images, image_size,
            round_to: see :func:`optimize`.
        out: folder for plan.json.
        test: if None, a fifth of data is left aside, as :func:`optimize` does.

    Raises:
        ArgumentError, DataError, BudgetError: as :func:`optimize`.
    """
    limits, options = parse_budgets(budget), Options(target, "none", batch_size, None, False, AUTO)
    check_round_to(round_to)
    source = Source(data, test, max_images, image_size, seed)
    asked = {"budget": texts(budget), "keep": texts(keep), "round_to": round_to}
    with started(model, source, options, out, asked, restart) as (job, _):
        made, _ = Planner(job, texts(keep), round_to).plan(limits)
        if job.folder is not None and ranks.first():
            write_text(job.folder / PLAN, made.to_json())
        end(job)
    return made


def apply(
    model: nn.Module,
    data: Any,
    plan: Plan,
    *,
    target: str = "eager",
    recover: str | Recovery = "none",
    out: str | Path | None = None,
    restart: bool = False,
    test: Any = None,
    batch_size: int = 1,
    max_images: int = 1_024,
    image_size: int = 224,
    min_accuracy: float | None = None,
    baselines: bool = False,
    task: str = AUTO,
) -> Result:
    """Carry out a plan.

    Args:
        model, data, target, recover, out, restart, test, batch_size, max_images, image_size,
            min_accuracy, baselines, task: see :func:`optimize`.
        plan: of :func:`plan`, or written by hand; grouped layers without orders of their channels
            get the best that are found. Its seed is used.

    Raises:
        ArgumentError: an argument breaks a rule.
        DataError: the plan is illegal for this network, every fault named; or as
            :func:`optimize`.
    """
    options = Options(target, recover, batch_size, min_accuracy, baselines, task)
    source = Source(data, test, max_images, image_size, plan.seed)
    with started(model, source, options, out, {"plan": plan.to_json()}, restart) as (job, finish):
        check(model, job.mapped, plan.layers)
        # All processes take part in their moments.
        job.searches(name for name, settled in plan.layers.items() if searched(settled))
        layers = ranks.on_first(lambda: complete(job.mapped, plan.layers, job.searches))
        result = finish(replace(plan, layers=layers), {}, job.folder)
        end(job)
    return result
