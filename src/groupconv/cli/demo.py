"""``groupconv demo``: the whole job on real images, with nothing to download."""

from pathlib import Path
from typing import Annotated

import typer

import groupconv
from groupconv.cli.console import JsonFlag
from groupconv.cli.options import Out, Recover, Seed
from groupconv.cli.outcome import show_result
from groupconv.cli.watch import Quiet, watching
from groupconv.data.sample import fashion_mnist, trained_fashion_resnet

# So many images per call that the arithmetic is timed, not the call.
_BATCH = 64


def demo(
    out: Out = Path("groupconv-demo"),
    budget: Annotated[str, typer.Option(help="As in groupconv optimize.")] = "2x",
    recover: Recover = "15s",
    seed: Seed = 0,
    quiet: Quiet = False,
    json: JsonFlag = False,
) -> None:
    """Optimize a bundled network, trained on Fashion-MNIST, on its bundled images."""
    calibration, test = fashion_mnist()
    with watching(out, quiet):
        result = groupconv.optimize(
            trained_fashion_resnet(),
            calibration,
            budget=budget,
            target="eager",
            recover=recover,
            out=out,
            seed=seed,
            test=test,
            batch_size=_BATCH,
            max_images=len(calibration),
        )
    show_result(result.report, out, json)
