"""``groupconv optimize``: the whole job on a user's model and images."""

from typing import Annotated, Any

import typer

import groupconv
from groupconv.cli import options as opt
from groupconv.cli.console import JsonFlag
from groupconv.cli.models import load_data, load_recovery, load_trained
from groupconv.cli.outcome import check_budgets, check_floor, show_result, show_sweep
from groupconv.cli.watch import Quiet, TensorBoard, watching
from groupconv.errors import ArgumentError


def optimize(
    model: opt.Model,
    data: opt.Data,
    out: opt.Out,
    weights: opt.Weights = None,
    budget: opt.Budget = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="A sweep, such as 90%,70%,50%: a network for each budget, each in a folder of "
            "its own, and frontier.html to compare them. Instead of --budget."
        ),
    ] = None,
    join: Annotated[
        bool,
        typer.Option(
            "--join",
            help="Share the budgets with other processes started with the same arguments, on this "
            "machine or on others that see the output folder.",
        ),
    ] = False,
    target: opt.Target = "eager",
    recover: opt.Recover = "none",
    train: opt.Train = None,
    keep: opt.Keep = None,
    round_to: opt.RoundTo = 1,
    min_accuracy: opt.MinAccuracy = None,
    baselines: opt.Baselines = False,
    task: opt.Task = "auto",
    test: opt.Test = None,
    batch_size: opt.BatchSize = 1,
    max_images: opt.MaxImages = 1024,
    image_size: opt.ImageSize = 224,
    seed: opt.Seed = 0,
    restart: opt.Restart = False,
    tensorboard: TensorBoard = False,
    quiet: Quiet = False,
    json: JsonFlag = False,
) -> None:
    """Turn a trained CNN into a network of grouped convolutions under a budget, or under each."""
    if join and budgets is None:
        raise ArgumentError("join=True shares several budgets: give --budgets")
    if budgets is not None and (budget or min_accuracy is not None):
        other = "--budget" if budget else "--min-accuracy"
        raise ArgumentError(
            f"budgets={budgets!r} asks for a network under each of them and can't go with {other}, "
            "which is about one network"
        )
    net = load_trained(model, weights)
    shared: dict[str, Any] = {
        "target": target,
        "recover": load_recovery(recover, train),
        "keep": keep or opt.DEFAULT_KEEP,
        "round_to": round_to,
        "baselines": baselines,
        "task": task,
        "out": out,
        "restart": restart,
        "seed": seed,
        "test": None if test is None else load_data(test),
        "batch_size": batch_size,
        "max_images": max_images,
        "image_size": image_size,
    }
    if budgets is not None:
        each = [text.strip() for text in budgets.split(",")]
        with watching(out, quiet, tensorboard):
            results = groupconv.sweep(net, load_data(data), budgets=each, join=join, **shared)
        show_sweep([result.report for result in results], out, json)
        return
    bounds = budget or opt.DEFAULT_BUDGET
    with watching(out, quiet, tensorboard):
        result = groupconv.optimize(
            net, load_data(data), budget=bounds, min_accuracy=min_accuracy, **shared
        )
    show_result(result.report, out, json)
    check_floor(result.report, min_accuracy)
    check_budgets(net, result, bounds)
