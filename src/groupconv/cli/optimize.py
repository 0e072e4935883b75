"""``groupconv optimize``: the whole job on a user's model and images."""

from pathlib import Path
from typing import Annotated, Any

import typer

import groupconv
from groupconv.cli.console import JsonFlag, people, print_json, show_progress
from groupconv.cli.models import load_function, load_model
from groupconv.report import summary_table


def optimize(
    model: Annotated[str, typer.Option(help="torchvision:NAME, timm:NAME or file.py:function.")],
    data: Annotated[
        str, typer.Option(help="Folder of images, .npz, or file.py:function giving a DataLoader.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the result.")],
    weights: Annotated[Path | None, typer.Option(help="State dict to load.")] = None,
    budget: Annotated[
        str, typer.Option(help="2x, 50%, 12ms, 50%macs, 300Mmacs, 50%params, 1.2Mparams.")
    ] = "2x",
    target: Annotated[str, typer.Option(help="Runtime whose time counts.")] = "eager",
    recover: Annotated[str, typer.Option(help="none, bn, or a time such as 10min.")] = "none",
    keep: Annotated[
        list[str] | None, typer.Option(help="Layer or pattern to leave as it is; repeatable.")
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Images to report on; default: a fifth of the data.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per call when time is measured.")] = 1,
    max_images: Annotated[int, typer.Option(help="Calibration images to use.")] = 1024,
    image_size: Annotated[int, typer.Option(help="Size of a folder's images, in pixels.")] = 224,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Turn a trained CNN into a network of grouped convolutions under a budget."""
    show_progress()
    if weights is None and ".py:" not in model:
        people.print(f"{model} has random weights: give its trained ones with --weights")
    result = groupconv.optimize(
        load_model(model, weights),
        _data(data),
        budget=budget,
        target=target,
        recover=recover,
        keep=tuple(keep or ()),
        out=out,
        seed=seed,
        test=None if test is None else _data(test),
        batch_size=batch_size,
        max_images=max_images,
        image_size=image_size,
    )
    finish(result.report, out, json)


def finish(report: dict[str, Any], out: Path, json: bool) -> None:
    """Print the summary and name the files."""
    if json:
        print_json(report)
        return
    people.print(summary_table(report))
    written = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    people.print(f"written to {out}: {', '.join(written)}", highlight=False, soft_wrap=True)


def _data(name: str) -> Any:
    return load_function(name)() if ".py:" in name else name
