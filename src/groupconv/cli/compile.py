"""``groupconv compile``: a network as native code, checked, in a file."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.utils import _pytree as pytree

import groupconv
from groupconv.cli.console import JsonFlag, people, print_json
from groupconv.cli.models import load_trained, sizes
from groupconv.cli.options import ModelArgument, Shape, Weights
from groupconv.errors import ArgumentError, GroupConvError

# Error over the largest number that eager PyTorch computes.
_TOLERANCE = 1e-3


def compile(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="File for the compiled network.")],
    weights: Weights = None,
    shape: Shape = "1,3,224,224",
    json: JsonFlag = False,
) -> None:
    """Compile a network for one size of images, check it against PyTorch, and save it."""
    if not out.parent.is_dir():
        raise ArgumentError(f"out={str(out)!r}: there is no folder {str(out.parent)!r}")
    net = load_trained(model, weights).requires_grad_(False)
    x = torch.randn(sizes(shape), generator=torch.Generator().manual_seed(0))
    try:
        expected = net(x.clone())
    except RuntimeError as error:
        raise ArgumentError(f"the model can't run on shape={shape}: {error}") from error
    compiled = groupconv.compile(net, x)
    difference = _error(compiled(x), expected)
    report = compiled.report(x)
    if json:
        finite = difference if math.isfinite(difference) else None
        print_json({"out": str(out), "error": finite, **asdict(report)})
    else:
        people.print(str(report), highlight=False, markup=False, soft_wrap=True)
    if not difference <= _TOLERANCE:
        raise GroupConvError(
            f"the compiled network differs from PyTorch by {difference:.1e} of the largest number: "
            "not saved"
        )
    compiled.save(out)
    if not json:
        people.print(
            f"differs from PyTorch by {difference:.1e} of the largest number; written to {out}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _error(found: Any, expected: Any) -> float:
    """The largest difference over the largest number, of the worst output; NaN where there is one
    in any."""
    outputs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    errors = [_difference(y.double(), z.double()) for y, z in outputs]
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)


def _difference(found: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return ((found - expected).abs().max() / scale).item()
