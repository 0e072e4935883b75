"""``groupconv bench``: one network in every runtime, side by side."""

from pathlib import Path
from typing import Annotated

import torch
import typer

import groupconv
from groupconv.cli.console import JsonFlag, json_text, people, print_json
from groupconv.cli.models import load_finished, sizes
from groupconv.cli.options import ModelArgument, Optimized, Shape, Weights
from groupconv.cli.watch import watching
from groupconv.errors import ArgumentError
from groupconv.files import output_folder, write_text
from groupconv.report import bench_picture, bench_table


def bench(
    model: ModelArgument,
    weights: Weights = None,
    optimized: Optimized = None,
    shape: Shape = "1,3,224,224",
    target: Annotated[
        list[str] | None, typer.Option(help="Runtime; repeatable. Default: all.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images per pass for the throughput.")] = 8,
    seconds: Annotated[float, typer.Option(help="To time each runtime for.")] = 0.8,
    threads: Annotated[
        int | None, typer.Option(help="Of each runtime. Default: as many as PyTorch takes.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json and bench.svg.")] = None,
    json: JsonFlag = False,
) -> None:
    """Time a network in every runtime that is installed, and compare what it computes there."""
    folder = None if out is None else output_folder(out)
    if threads is not None:
        if threads < 1:
            raise ArgumentError(f"threads={threads} must be 1 or more")
        torch.set_num_threads(threads)
    net = load_finished(model, weights, optimized)
    x = torch.randn(sizes(shape), generator=torch.Generator().manual_seed(0))
    with watching(None):
        found = groupconv.bench(net, x, targets=target, batch=batch, seconds=seconds).to_dict()
    found["network"] = model
    if folder is not None:
        write_text(folder / "bench.json", json_text(found))
        write_text(folder / "bench.svg", bench_picture(found))
    if json:
        print_json(found)
    else:
        people.print(bench_table(found))
