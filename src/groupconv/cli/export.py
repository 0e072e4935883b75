"""``groupconv export``: a network in a file of another runtime, checked there."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

import groupconv
from groupconv.cli.console import JsonFlag, people, print_json
from groupconv.cli.models import load_data, load_finished, sizes
from groupconv.cli.options import ModelArgument, Optimized, Shape, Weights
from groupconv.data import load_images
from groupconv.errors import ArgumentError


def export(
    model: ModelArgument,
    out: Annotated[
        Path,
        typer.Argument(
            help="File: .onnx, .xml (OpenVINO), .tflite, .pte, .mlpackage, .pt2 or .groupconv."
        ),
    ],
    weights: Weights = None,
    optimized: Optimized = None,
    shape: Shape = "1,3,224,224",
    data: Annotated[
        str | None, typer.Option(help="Images to compare on; default: random numbers.")
    ] = None,
    max_images: Annotated[int, typer.Option(help="Images to compare on, at most.")] = 1000,
    any_size: Annotated[bool, typer.Option("--any-size", help="For images of any size.")] = False,
    dense: Annotated[
        bool, typer.Option("--dense", help="Grouped layers as dense ones with zeros.")
    ] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Quantize; needs --data.")] = False,
    calibrate: Annotated[int, typer.Option(help="Images to calibrate INT8 on.")] = 128,
    json: JsonFlag = False,
) -> None:
    """Write a network to a file, run it in its runtime, and compare it with PyTorch."""
    metadata = {"groupconv": groupconv.__version__}
    net = load_finished(model, weights, optimized)
    if optimized is not None:
        plan = (optimized / "plan.json").read_bytes()
        metadata["groupconv_plan"] = hashlib.sha256(plan).hexdigest()
    size = sizes(shape)
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    images = labels = calibration = None
    if data is not None:
        loaded = load_images(load_data(data), limit=max_images, image_size=size[-1])
        images, labels = loaded.images, loaded.labels
        x = images[: size[0]]
    if int8:
        if images is None:
            raise ArgumentError("int8 needs images to calibrate on: give --data")
        if not 0 < calibrate < len(images):
            raise ArgumentError(
                f"calibrate={calibrate} must be 1 or more and leave some of the {len(images)} "
                "images to compare on"
            )
        calibration, images = images[:calibrate], images[calibrate:]
        labels = None if labels is None else labels[calibrate:]
    found = groupconv.export(
        net,
        x,
        out,
        images=images,
        labels=labels,
        int8=calibration,
        any_size=any_size,
        dense=dense,
        metadata=metadata,
    )
    if json:
        print_json(asdict(found))
    else:
        people.print(str(found), highlight=False, markup=False, soft_wrap=True)
