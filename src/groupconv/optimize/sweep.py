"""sweep(): a network for each of several budgets, and how they compare."""

import copy
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from groupconv import ranks
from groupconv.errors import ArgumentError
from groupconv.files import output_folder, write_text
from groupconv.optimize.budget import parse_budgets
from groupconv.optimize.finish import Result
from groupconv.optimize.further import read_result
from groupconv.optimize.pipeline import optimize
from groupconv.optimize.plan import load
from groupconv.optimize.planning import Planner
from groupconv.optimize.start import KEEP, Options, Source, check_round_to, end, started, texts
from groupconv.optimize.study import Study
from groupconv.recovery import Recovery
from groupconv.task import AUTO

# In the folder of a sweep, the reports of all budgets.
FRONTIER = "frontier.json"


def sweep(
    model: nn.Module,
    data: Any,
    *,
    budgets: Sequence[str],
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
    baselines: bool = False,
    task: str = AUTO,
    join: bool = False,
) -> list[Result]:
    """:func:`optimize` under several budgets in turn; what they share is done once.

    Args:
        model, data, target, recover, keep, restart, seed, test, batch_size, max_images, image_size,
            round_to, baselines, task: see :func:`optimize`.
        budgets: each for a network of its own.
        out: folder for a folder for each budget, frontier.json and frontier.html.
        join: whether to share the budgets with other processes, on this machine or others, that
            were started with the same arguments; each takes the next one that is free, and that of
            one that was lost. All end when every budget is done.

    Returns:
        The results in the order of the budgets.

    Raises:
        ArgumentError, DataError, BudgetError: as :func:`optimize`.
    """
    limits, options = (
        [parse_budgets(b) for b in budgets],
        Options(target, recover, batch_size, None, baselines, task),
    )
    if not limits:
        raise ArgumentError(f"budgets={budgets!r} must hold at least one budget")
    if len(set(budgets)) < len(budgets):
        raise ArgumentError(f"budgets={budgets!r} must differ: each has a folder of its own")
    check_round_to(round_to)
    if join:
        alone = partial(
            optimize,
            model,
            data,
            target=target,
            recover=recover,
            keep=texts(keep),
            seed=seed,
            test=test,
            batch_size=batch_size,
            max_images=max_images,
            image_size=image_size,
            round_to=round_to,
            baselines=baselines,
            task=task,
        )
        return _joined(model, budgets, out, restart, alone)
    source = Source(data, test, max_images, image_size, seed)
    asked = {"budgets": [texts(b) for b in budgets], "keep": texts(keep), "round_to": round_to}
    with started(model, source, options, out, asked, restart) as (job, finish):
        planner = Planner(job, texts(keep), round_to)
        results = []
        for text, each in zip(budgets, limits, strict=True):
            folder = None if job.folder is None else output_folder(job.folder / text)
            results.append(finish(*planner.plan(each), folder))
        if job.folder is not None and ranks.first():
            _write_frontier(job.folder, results)
        end(job)
    return results


def _joined(
    model: nn.Module,
    budgets: Sequence[str],
    out: str | Path | None,
    restart: bool,
    run: Callable[..., Result],
) -> list[Result]:
    """The budgets shared with other processes; what they made is read from their folders."""
    if out is None:
        raise ArgumentError("join=True needs an output folder, which the processes share: give out")
    if restart:
        raise ArgumentError(
            "restart=True with join=True would take the folder from others: empty it"
        )
    if ranks.count() > 1:
        raise ArgumentError("join=True is for processes apart, not for those of one torchrun")
    folder = output_folder(out)
    Study(folder, budgets).work(
        lambda budget: float(run(budget=budget, out=folder / budget).report["speedup"])
    )
    results = [_finished(folder / budget, copy.deepcopy(model)) for budget in budgets]
    _write_frontier(folder, results)
    return results


def _finished(folder: Path, model: nn.Module) -> Result:
    """The result that a process has written."""
    plan, report = read_result(folder)
    return Result(load(folder, model), plan, report)


def _write_frontier(folder: Path, results: Sequence[Result]) -> None:
    # Here, because matplotlib would add a third of a second to `import groupconv`.
    from groupconv.report import render_frontier

    reports = [result.report for result in results]
    for name, text in (
        ("frontier.html", render_frontier(reports)),
        (FRONTIER, json.dumps(reports, indent=1)),
    ):
        write_text(folder / name, text)
