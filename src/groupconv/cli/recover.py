"""``groupconv recover``: a finished result learns further."""

from pathlib import Path
from typing import Annotated

import typer

from groupconv.cli import options as opt
from groupconv.cli.console import JsonFlag
from groupconv.cli.models import load_data, load_recovery, load_trained
from groupconv.cli.outcome import show_result
from groupconv.cli.watch import Quiet, TensorBoard, watching
from groupconv.optimize.further import recover_further


def recover(
    optimized: Annotated[Path, typer.Argument(help="Folder that optimize or apply wrote.")],
    model: opt.Model,
    data: opt.Data,
    out: opt.Out,
    time: Annotated[str, typer.Option(help="How long to learn, such as 10min; or bn.")] = "10min",
    weights: opt.Weights = None,
    train: opt.Train = None,
    task: opt.Task = "auto",
    test: opt.Test = None,
    max_images: opt.MaxImages = 1024,
    image_size: opt.ImageSize = 224,
    seed: opt.Seed = 0,
    restart: opt.Restart = False,
    tensorboard: TensorBoard = False,
    quiet: Quiet = False,
    json: JsonFlag = False,
) -> None:
    """Let a finished result learn further from the original network."""
    with watching(out, quiet, tensorboard):
        result = recover_further(
            optimized,
            load_trained(model, weights),
            load_data(data),
            load_recovery(time, train),
            out=out,
            restart=restart,
            seed=seed,
            test=None if test is None else load_data(test),
            max_images=max_images,
            image_size=image_size,
            task=task,
        )
    show_result(result.report, out, json)
