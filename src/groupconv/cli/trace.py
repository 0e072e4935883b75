"""``groupconv trace``: the convolutions of a model and how their channels are tied together."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

import torch
from rich.table import Table

from groupconv.cli.console import JsonFlag, people, print_json
from groupconv.cli.models import load_model, sizes
from groupconv.cli.options import ModelArgument, Shape, Weights
from groupconv.optimize.spaces import Axis
from groupconv.optimize.trace import Trace
from groupconv.optimize.trace import trace as trace_model


def trace(
    model: ModelArgument,
    weights: Weights = None,
    shape: Shape = "1,3,224,224",
    json: JsonFlag = False,
) -> None:
    """Show every convolution, what follows it, and which channels may change places."""
    result = trace_model(load_model(model, weights), (torch.randn(sizes(shape)),))
    if json:
        print_json(_values(result))
    else:
        _print(result)


def _values(result: Trace) -> dict[str, Any]:
    """The map as plain numbers and text; axes as runs of spaces and their numbers of channels."""
    convs = [
        {
            "name": conv.name,
            **asdict(conv.spec),
            "then": conv.then,
            "batch_norm": conv.batch_norm,
            "input_spaces": _runs(conv.inputs),
            "output_spaces": _runs(conv.outputs),
        }
        for conv in result.convs
    ]
    spaces = [
        {
            "channels": space.channels,
            "fixed": space.fixed,
            "members": [
                f"{member.module}.{member.parameter}[{member.axis}]"
                for member in result.members
                if index in member.runs.spaces
            ],
        }
        for index, space in enumerate(result.spaces)
    ]
    return {"convolutions": convs, "spaces": spaces, "skipped": result.skipped}


def _print(result: Trace) -> None:
    table = Table("layer", "channels", "kernel", "groups", "then", "input spaces", "output spaces")
    for conv in result.convs:
        spec = conv.spec
        table.add_row(
            conv.name,
            f"{spec.in_channels} -> {spec.out_channels}",
            "x".join(map(str, spec.kernel_size)),
            str(spec.groups),
            ", ".join(conv.then),
            *(_in_words(axis, result) for axis in (conv.inputs, conv.outputs)),
        )
    people.print(table)
    fixed = Counter[str]()
    for space in result.spaces:
        if space.fixed is not None:
            fixed[space.fixed] += space.channels
    free = sum(space.channels for space in result.spaces if space.fixed is None)
    lines = [
        f"{free} sets of tied channels may change places within their spaces",
        *(f"{count} stay: {reason}" for reason, count in fixed.items()),
        *(f"left as it is: {name} ({reason})" for name, reason in result.skipped.items()),
    ]
    for line in lines:
        people.print(line, highlight=False, markup=False, soft_wrap=True)


def _runs(axis: Axis) -> Sequence[tuple[int, int]]:
    return [(space, len(list(run))) for space, run in groupby(axis.spaces)]


def _in_words(axis: Axis, result: Trace) -> str:
    """``3, 5*`` for positions in spaces 3 and 5, of which the second is fixed."""
    names = [f"{n}{'' if result.spaces[n].fixed is None else '*'}" for n, _ in _runs(axis)]
    shown = names if len(names) <= 4 else [*names[:3], f"... ({len(names)} runs)"]
    return ", ".join(shown)
