"""``groupconv plan``: what optimize would do, to be looked at and edited before it is done."""

import json as json_format
from collections.abc import Mapping

from rich.table import Table
from torch import nn

import groupconv
from groupconv.cli import options as opt
from groupconv.cli.console import JsonFlag, people, print_json
from groupconv.cli.models import load_data, load_trained
from groupconv.cli.watch import Quiet, watching
from groupconv.data import load_images
from groupconv.kernels.spec import ConvSpec
from groupconv.optimize.convert import structure_of
from groupconv.optimize.plan import PLAN
from groupconv.optimize.structure import macs, unchanged
from groupconv.optimize.trace import trace


def plan(
    model: opt.Model,
    data: opt.Data,
    out: opt.Out,
    weights: opt.Weights = None,
    budget: opt.Budget = None,
    target: opt.Target = "eager",
    keep: opt.Keep = None,
    round_to: opt.RoundTo = 1,
    test: opt.Test = None,
    batch_size: opt.BatchSize = 1,
    max_images: opt.MaxImages = 1024,
    image_size: opt.ImageSize = 224,
    seed: opt.Seed = 0,
    restart: opt.Restart = False,
    quiet: Quiet = False,
    json: JsonFlag = False,
) -> None:
    """Choose a structure for every layer and write plan.json; groupconv apply carries it out."""
    net = load_trained(model, weights)
    with watching(out, quiet):
        made = groupconv.plan(
            net,
            load_data(data),
            budget=budget or opt.DEFAULT_BUDGET,
            target=target,
            keep=keep or opt.DEFAULT_KEEP,
            round_to=round_to,
            out=out,
            restart=restart,
            seed=seed,
            test=None if test is None else load_data(test),
            batch_size=batch_size,
            max_images=max_images,
            image_size=image_size,
        )
    if json:
        print_json(json_format.loads(made.to_json()))
        return
    few = load_images(load_data(data), limit=2, image_size=image_size, seed=seed)
    layers = {conv.name: conv.spec for conv in trace(net, (few.images,)).convs}
    people.print(_table(net, made, layers))
    people.print(f"written to {out / PLAN}; edit it and run groupconv apply", soft_wrap=True)


def _table(net: nn.Module, made: groupconv.Plan, layers: Mapping[str, ConvSpec]) -> Table:
    """Every layer that could change, in the order in which they run."""
    table = Table(title=f"{type(net).__name__} on {made.target}, budget {made.budget}")
    table.add_column("layer", overflow="fold")
    table.add_column("structure", overflow="fold")
    table.add_column("MACs, M", justify="right", no_wrap=True)
    table.add_column("why", ratio=1)
    for name, layer in layers.items():
        if name in made.reasons:
            as_it_was = unchanged(layer)
            structure = structure_of(made.layers.get(name, as_it_was))
            before, after = (macs(s, layer) / 1e6 for s in (as_it_was, structure))
            kept = structure == as_it_was
            change = f"{before:,.2f}" if kept else f"{before:,.2f} -> {after:,.2f}"
            table.add_row(name, str(structure), change, made.reasons[name])
    return table
