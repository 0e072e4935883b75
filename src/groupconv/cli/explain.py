"""``groupconv explain``: which implementation runs each convolution, and why the others don't."""

import torch

import groupconv
from groupconv.cli.console import JsonFlag, people, print_json
from groupconv.cli.models import load_model, sizes
from groupconv.cli.options import ModelArgument, Shape, Weights
from groupconv.errors import ArgumentError, GroupConvError


def explain(
    model: ModelArgument,
    weights: Weights = None,
    shape: Shape = "1,3,224,224",
    json: JsonFlag = False,
) -> None:
    """Run a model once and show, for each convolution, what ran it and why."""
    net = load_model(model, weights)
    try:
        result = groupconv.explain(net, torch.randn(sizes(shape)))
    except RuntimeError as error:
        if isinstance(error, GroupConvError):
            raise
        raise ArgumentError(f"the model can't run on shape={shape}: {error}") from error
    if json:
        print_json(result.to_dict())
    else:
        people.print(str(result), highlight=False, markup=False, soft_wrap=True)
