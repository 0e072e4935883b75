"""``groupconv profile``: what each layer costs."""

from typing import Annotated

import torch
import typer

import groupconv
from groupconv.cli.console import JsonFlag, people, print_json
from groupconv.cli.models import load_model, sizes
from groupconv.cli.options import ModelArgument, Shape, Target, Weights


def profile(
    model: ModelArgument,
    weights: Weights = None,
    shape: Shape = "1,3,224,224",
    target: Target = "eager",
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
