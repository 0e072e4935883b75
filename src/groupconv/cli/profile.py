"""``groupconv profile``: what each layer costs."""

from pathlib import Path
from typing import Annotated

import torch
import typer

import groupconv
from groupconv.cli.console import JsonFlag, people, print_json
from groupconv.cli.models import load_model, sizes


def profile(
    model: Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME or file.py:function.")],
    weights: Annotated[Path | None, typer.Option(help="State dict to load.")] = None,
    shape: Annotated[str, typer.Option(help="Input shape.")] = "1,3,224,224",
    target: Annotated[str, typer.Option(help="Runtime to measure on.")] = "eager",
    backward: Annotated[bool, typer.Option(help="Count the backward pass too.")] = False,
    latency: Annotated[bool, typer.Option(help="Measure time.")] = True,
    json: JsonFlag = False,
) -> None:
    """Show parameters, MACs, activation bytes, groups, width and latency of every layer."""
    net = load_model(model, weights)
    result = groupconv.profile(
        net, torch.randn(sizes(shape)), target=target, backward=backward, latency=latency
    )
    if json:
        print_json(result.to_dict())
    else:
        people.print(str(result), highlight=False, markup=False, soft_wrap=True)
