"""A finished result that learns further, into a folder of its own."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from groupconv import ranks
from groupconv.data import largest_map
from groupconv.errors import ArgumentError, DataError
from groupconv.files import output_folder
from groupconv.optimize.evaluate import compare, task_of
from groupconv.optimize.finish import Result
from groupconv.optimize.plan import PLAN, REPORT, Plan, load, save_again
from groupconv.optimize.start import Source
from groupconv.optimize.summary import qualities, write_report
from groupconv.optimize.visit import accepted, images_at_once
from groupconv.recovery import Recovery
from groupconv.recovery.recover import recover
from groupconv.task import AUTO, check_task


def recover_further(
    folder: str | Path,
    model: nn.Module,
    data: Any,
    recovery: str | Recovery,
    *,
    out: str | Path,
    restart: bool = False,
    seed: int = 0,
    test: Any = None,
    max_images: int = 1_024,
    image_size: int = 224,
    task: str = AUTO,
) -> Result:
    """Teach what :func:`optimize` wrote to one folder further, and write it to another.

    The report is that of the first, but for what is said of the network's outputs, anew on these
    test images, and for the stages of recovery, which come after those that were.

    Args:
        folder: of a finished result; left as it was.
        model: the original network; left as it was.
        data, test, restart, seed, max_images, image_size, task: see :func:`optimize`.
        recovery: see :func:`groupconv.recover`.
        out: another folder, for the same files.

    Raises:
        ArgumentError: the folders are the same, or the recovery has no time.
        DataError: the folder holds no result for this network, or images can't be used.
    """
    if Path(out).resolve() == Path(folder).resolve():
        raise ArgumentError(f"out={str(out)!r} holds what is to learn: give another folder")
    check_task(task)
    original = copy.deepcopy(model).eval()
    student = load(folder, copy.deepcopy(model))
    plan, report = read_result(Path(folder))
    source = Source(data, test, max_images, image_size, seed)
    images, held_out = source.load()
    task = task_of(original, held_out.images[:1], task)
    one = images.images[:1].to(next(original.parameters()).device)
    with torch.inference_mode(), accepted(one):
        at_once = images_at_once(largest_map(one, original(one)), one.device)
    fitted = ranks.on_first(lambda: compare(original, student, held_out, task, at_once))
    stages = recover(
        student,
        original,
        images.images if images.labels is None else (images.images, images.labels),
        recovery,
        out=out,
        restart=restart,
        seed=seed,
        max_images=max_images,
        image_size=image_size,
    )
    quality = ranks.on_first(lambda: compare(original, student, held_out, task, at_once))
    report |= qualities(fitted, quality)
    report["recovery"] = [*report["recovery"], *stages]
    report["settings"] |= {"test_data": held_out.source}
    if ranks.first():
        written = output_folder(out)
        save_again(written, student, folder)
        write_report(written, plan, report)
    return Result(student, plan, report)


def read_result(folder: Path) -> tuple[Plan, dict[str, Any]]:
    """The plan and the report of a finished result.

    Raises:
        DataError: the folder holds none.
    """
    try:
        plan = Plan.from_json((folder / PLAN).read_text(encoding="utf-8"))
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{folder}: not the folder of a finished result: {error}") from error
    if not isinstance(report, dict):
        raise DataError(f"{folder / REPORT}: not a report of groupconv")
    return plan, report
