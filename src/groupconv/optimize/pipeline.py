"""optimize(), plan(), apply() and sweep(): the steps of the scheme in their order."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from groupconv import ranks
from groupconv.data import Images, load_images
from groupconv.errors import ArgumentError, DataError
from groupconv.files import output_folder, write_text
from groupconv.optimize.budget import parse_budgets
from groupconv.optimize.capture import evaluation_mode
from groupconv.optimize.convert import check
from groupconv.optimize.finish import Finish, Result
from groupconv.optimize.job import Job
from groupconv.optimize.plan import PLAN, Plan
from groupconv.optimize.planning import FIRST, LAST, Planner
from groupconv.optimize.settle import complete, searched
from groupconv.recovery import Recovery
from groupconv.store import claimed, fingerprint
from groupconv.targets import get_target
from groupconv.version import __version__

_KEEP = (FIRST, LAST)
_MOST_IMAGES = 1_000_000
# Of the images to learn from, one in so many is judged by, at most so many.
_JUDGED, _MOST_JUDGED = 10, 512


def optimize(
    model: nn.Module,
    data: Any,
    *,
    budget: str | Sequence[str] = "2x",
    target: str = "eager",
    recover: str | Recovery = "none",
    keep: Sequence[str] = _KEEP,
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
) -> Result:
    """Turn a trained CNN into a network of grouped convolutions under a budget.

    The model itself is left as it was. Interrupted and
    called again with the same arguments and ``out``, it goes on where it stopped.

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
        keep: names or patterns (``"layer4.*"``) of layers to leave as they are; "first" is the
            first convolution, "last" one that makes the network's output.
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
            whose class stays), below which the costliest layer is left dense after all, until it
            holds; the budget may then not.
        baselines: whether to report, beside the result, what plain cutting, random groups and
            channel pruning at equal time give on the same images.

    Returns:
        Result

    Raises:
        ArgumentError: an argument breaks a rule.
        DataError: images, weights or the output folder can't be used.
        BudgetError: no choice meets the budget; no result is written.
    """
    limits, options = (
        parse_budgets(budget),
        _Options(target, recover, batch_size, min_accuracy, baselines),
    )
    _check_round_to(round_to)
    source = _Source(data, test, max_images, image_size, seed)
    asked = {"budget": _texts(budget), "keep": list(keep), "round_to": round_to}
    with _started(model, source, options, out, asked, restart) as (job, finish):
        plan, decisions = Planner(job, keep, round_to).plan(limits)
        result = finish(plan, decisions, job.folder)
        _end(job)
    return result


def plan(
    model: nn.Module,
    data: Any,
    *,
    budget: str | Sequence[str] = "2x",
    target: str = "eager",
    keep: Sequence[str] = _KEEP,
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
    limits, options = parse_budgets(budget), _Options(target, "none", batch_size, None, False)
    _check_round_to(round_to)
    source = _Source(data, test, max_images, image_size, seed)
    asked = {"budget": _texts(budget), "keep": list(keep), "round_to": round_to}
    with _started(model, source, options, out, asked, restart) as (job, _):
        made, _ = Planner(job, keep, round_to).plan(limits)
        if job.folder is not None and ranks.first():
            write_text(job.folder / PLAN, made.to_json())
        _end(job)
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
) -> Result:
    """Carry out a plan.

    Args:
        model, data, target, recover, out, restart, test, batch_size, max_images, image_size,
            min_accuracy, baselines: see :func:`optimize`.
        plan: of :func:`plan`, or written by hand; grouped layers without orders of their channels
            get the best that are found. Its seed is used.

    Raises:
        ArgumentError: an argument breaks a rule.
        DataError: the plan is illegal for this network, every fault named; or as
            :func:`optimize`.
    """
    options = _Options(target, recover, batch_size, min_accuracy, baselines)
    source = _Source(data, test, max_images, image_size, plan.seed)
    with _started(model, source, options, out, {"plan": plan.to_json()}, restart) as (job, finish):
        check(job.mapped, plan.layers)
        # All processes take part in their moments.
        job.searches(name for name, settled in plan.layers.items() if searched(settled))
        layers = ranks.on_first(lambda: complete(job.mapped, plan.layers, job.searches))
        result = finish(replace(plan, layers=layers), {}, job.folder)
        _end(job)
    return result


def sweep(
    model: nn.Module,
    data: Any,
    *,
    budgets: Sequence[str],
    target: str = "eager",
    recover: str | Recovery = "none",
    keep: Sequence[str] = _KEEP,
    out: str | Path | None = None,
    restart: bool = False,
    seed: int = 0,
    test: Any = None,
    batch_size: int = 1,
    max_images: int = 1_024,
    image_size: int = 224,
    round_to: int = 1,
    baselines: bool = False,
) -> list[Result]:
    """:func:`optimize` under several budgets in turn; what they share is done once.

    Args:
        model, data, target, recover, keep, restart, seed, test, batch_size, max_images, image_size,
            round_to, baselines: see :func:`optimize`.
        budgets: each for a network of its own.
        out: folder for a folder for each budget, frontier.json and frontier.html.

    Returns:
        The results in the order of the budgets.

    Raises:
        ArgumentError, DataError, BudgetError: as :func:`optimize`.
    """
    limits, options = (
        [parse_budgets(b) for b in budgets],
        _Options(target, recover, batch_size, None, baselines),
    )
    if not limits:
        raise ArgumentError(f"budgets={budgets!r} must hold at least one budget")
    if len(set(budgets)) < len(budgets):
        raise ArgumentError(f"budgets={budgets!r} must differ: each has a folder of its own")
    _check_round_to(round_to)
    source = _Source(data, test, max_images, image_size, seed)
    asked = {"budgets": [_texts(b) for b in budgets], "keep": list(keep), "round_to": round_to}
    with _started(model, source, options, out, asked, restart) as (job, finish):
        planner = Planner(job, keep, round_to)
        results = []
        for text, each in zip(budgets, limits, strict=True):
            folder = None if job.folder is None else output_folder(job.folder / text)
            results.append(finish(*planner.plan(each), folder))
        if job.folder is not None and ranks.first():
            _write_frontier(job.folder, results)
        _end(job)
    return results


@dataclass(frozen=True)
class _Options:
    """Arguments that the verbs share."""

    target: str
    recover: str | Recovery
    batch_size: int
    min_accuracy: float | None
    baselines: bool

    def __post_init__(self) -> None:
        get_target(self.target)
        if self.batch_size < 1:
            raise ArgumentError(f"batch_size={self.batch_size!r} must be a positive integer")
        if self.min_accuracy is not None and not 0 <= self.min_accuracy <= 1:
            raise ArgumentError(f"min_accuracy={self.min_accuracy!r} must be between 0 and 1")
        if self.baselines and ranks.count() > 1:
            raise ArgumentError("baselines=True must be measured by one process alone")


@dataclass(frozen=True)
class _Source:
    """Where the images come from."""

    data: Any
    test: Any
    max_images: int
    image_size: int
    seed: int

    def load(self) -> tuple[Images, Images]:
        """Images to calibrate on and to report on."""
        if self.max_images < 1:
            raise ArgumentError(f"max_images={self.max_images!r} must be a positive integer")
        size, seed = self.image_size, self.seed
        images = load_images(self.data, limit=self.max_images, image_size=size, seed=seed)
        if self.test is None:
            held_out, images = images.shuffled(seed).split(max(1, len(images) // 5))
        else:
            held_out = load_images(self.test, limit=_MOST_IMAGES, image_size=size, seed=seed)
        if len(images) < 2:
            raise DataError(
                f"{images.source}: {len(images)} images are left to calibrate on; give more"
            )
        return images, held_out

    def recovery(self, recover: str | Recovery) -> Recovery:
        """What is asked for, its images at hand."""
        found = recover if isinstance(recover, Recovery) else Recovery(recover)
        if found.train is None or isinstance(found.train, DataLoader):
            return found
        train = load_images(
            found.train, limit=_MOST_IMAGES, image_size=self.image_size, seed=self.seed
        )
        return replace(found, train=train)


@contextmanager
def _started(
    model: nn.Module,
    source: _Source,
    options: _Options,
    out: str | Path | None,
    asked: Mapping[str, Any],
    restart: bool,
) -> Iterator[tuple[Job, Finish]]:
    """A job after its arguments were checked, and how it ends; the model evaluates meanwhile.

    Args:
        asked: what the verb was asked for beside the options.
    """
    folder = None if out is None else output_folder(out)
    _check_weights(model)
    images, held_out = source.load()
    recovery = source.recovery(options.recover)
    images, recovery, judged = _judged(images, recovery, source.seed)
    with ExitStack() as stack:
        if folder is not None:
            inputs = {
                "model": f"{type(model).__name__} {fingerprint(model.state_dict().items())}",
                "data": _described(images),
                "test": _described(held_out),
                **asked,
                **asdict(replace(options, recover=recovery.described())),
                "seed": source.seed,
                "groupconv": __version__,
                "torch": torch.__version__,
            }
            ranks.on_first(lambda: stack.enter_context(claimed(folder, inputs, restart=restart)))
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(source.seed)
        job = Job(
            model,
            images,
            get_target(options.target),
            seed=source.seed,
            batch_size=options.batch_size,
            folder=folder,
        )
        finish = Finish(job, held_out, recovery, judged, options.min_accuracy, options.baselines)
        yield job, finish


def _end(job: Job) -> None:
    """Forget what was kept for going on, when all processes have done their part."""
    ranks.gathered(None)
    if ranks.first():
        job.store().clear()


def _described(images: Images) -> str:
    tensors = [("images", images.images)]
    tensors += [] if images.labels is None else [("labels", images.labels)]
    return f"{len(images)} images, {fingerprint(tensors)}"


def _texts(budget: str | Sequence[str]) -> list[str]:
    return [budget] if isinstance(budget, str) else list(budget)


def _judged(images: Images, recovery: Recovery, seed: int) -> tuple[Images, Recovery, Images]:
    """Images that nothing is fitted to set aside, to judge by them what is learned.

    Returns:
        the calibration images and the recovery without them, and these.
    """
    if recovery.seconds is None:
        return images, recovery, images
    if isinstance(recovery.train, Images):
        judged, train = _apart(recovery.train, seed)
        return images, replace(recovery, train=train), judged
    judged, images = _apart(images, seed)
    return images, recovery, judged


def _apart(images: Images, seed: int) -> tuple[Images, Images]:
    # Shuffled: those of a folder are sorted by class.
    count = min(math.ceil(len(images) / _JUDGED), _MOST_JUDGED)
    return images.shuffled(seed).split(count)


def _write_frontier(folder: Path, results: Sequence[Result]) -> None:
    # Here, because matplotlib would add a third of a second to `import groupconv`.
    from groupconv.report import render_frontier

    reports = [result.report for result in results]
    for name, text in (
        ("frontier.html", render_frontier(reports)),
        ("frontier.json", json.dumps(reports, indent=1)),
    ):
        write_text(folder / name, text)


def _check_round_to(round_to: int) -> None:
    if round_to < 1:
        raise ArgumentError(f"round_to={round_to!r} must be a positive integer")


def _check_weights(model: nn.Module) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if not any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules()):
        raise ArgumentError(f"model: {type(model).__name__} has no convolution")
    for name, tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DataError(f"model: {name} holds NaN or Inf")
