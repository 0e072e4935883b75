"""``groupconv apply``: a plan carried out, as it was made or as a person edited it."""

from pathlib import Path
from typing import Annotated

import typer

import groupconv
from groupconv.cli import options as opt
from groupconv.cli.console import JsonFlag
from groupconv.cli.models import load_data, load_recovery, load_trained
from groupconv.cli.outcome import check_floor, show_result
from groupconv.cli.watch import Quiet, TensorBoard, watching
from groupconv.errors import DataError


def apply(
    plan: Annotated[Path, typer.Argument(help="plan.json, as plan or optimize wrote it, edited.")],
    model: opt.Model,
    data: opt.Data,
    out: opt.Out,
    weights: opt.Weights = None,
    target: opt.Target = "eager",
    recover: opt.Recover = "none",
    train: opt.Train = None,
    min_accuracy: opt.MinAccuracy = None,
    baselines: opt.Baselines = False,
    task: opt.Task = "auto",
    test: opt.Test = None,
    batch_size: opt.BatchSize = 1,
    max_images: opt.MaxImages = 1024,
    image_size: opt.ImageSize = 224,
    restart: opt.Restart = False,
    tensorboard: TensorBoard = False,
    quiet: Quiet = False,
    json: JsonFlag = False,
) -> None:
    """Carry out a plan: the structures that it names, whatever they cost."""
    with watching(out, quiet, tensorboard):
        result = groupconv.apply(
            load_trained(model, weights),
            load_data(data),
            _read(plan),
            target=target,
            recover=load_recovery(recover, train),
            min_accuracy=min_accuracy,
            baselines=baselines,
            task=task,
            out=out,
            restart=restart,
            test=None if test is None else load_data(test),
            batch_size=batch_size,
            max_images=max_images,
            image_size=image_size,
        )
    show_result(result.report, out, json)
    check_floor(result.report, min_accuracy)


def _read(path: Path) -> groupconv.Plan:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"plan={str(path)!r} can't be read: {error}") from error
    return groupconv.Plan.from_json(text)
