"""Arguments and options that several verbs share, each written once as the type of a parameter."""

from pathlib import Path
from typing import Annotated

import typer

_MODEL = "torchvision:NAME, timm:NAME or file.py:function."

# Of the verbs that look at one network.
ModelArgument = Annotated[str, typer.Argument(help=_MODEL)]
Shape = Annotated[str, typer.Option(help="Input shape.")]

Weights = Annotated[Path | None, typer.Option(help="State dict to load.")]
Target = Annotated[
    str,
    typer.Option(
        help="Runtime whose time counts: eager, inductor, native, onnxruntime, openvino, litert or "
        "executorch."
    ),
]

Optimized = Annotated[
    Path | None, typer.Option(help="Folder that optimize wrote: take its network.")
]

# Of the verbs that change one.
Model = Annotated[str, typer.Option(help=_MODEL)]
Data = Annotated[
    str, typer.Option(help="Folder of images, .npz, or file.py:function giving a DataLoader.")
]
Test = Annotated[
    str | None, typer.Option(help="Images to report on; default: a fifth of the data.")
]
Out = Annotated[Path, typer.Option(help="Folder for the result.")]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        help="2x, 50%, 12ms, 50%macs, 300Mmacs, 50%params, 1.2Mparams, 50%size or 5MB; "
        "repeatable, all must hold. Default: 2x."
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        help="Layer or pattern to leave as it is; repeatable. Default: first and last, the ends "
        "of the network; any --keep replaces both."
    ),
]
RoundTo = Annotated[
    int, typer.Option(help="Channels per group are multiples of this, except depthwise.")
]
Recover = Annotated[str, typer.Option(help="none, bn, or a time such as 10min.")]
Restart = Annotated[
    bool,
    typer.Option("--restart", help="Forget a run with other inputs that was interrupted there."),
]
Train = Annotated[
    str | None,
    typer.Option(
        help="Images for --recover to learn from, and their labels if they have any; default: the "
        "data."
    ),
]
MinAccuracy = Annotated[
    float | None,
    typer.Option(
        help="0 to 1: layers become what they were, the costliest first, until the accuracy "
        "(without labels, the agreement with the original) is at least this."
    ),
]
Baselines = Annotated[
    bool,
    typer.Option("--baselines", help="Report a plain cut, random groups and pruning beside it."),
]
Task = Annotated[
    str,
    typer.Option(
        help="What the networks are compared by: classify, segment (class of each pixel), detect "
        "(objects found again), generate (PSNR of the images) or auto (as the outputs look)."
    ),
]
BatchSize = Annotated[int, typer.Option(help="Images per call when time is measured.")]
MaxImages = Annotated[int, typer.Option(help="Calibration images to use.")]
ImageSize = Annotated[int, typer.Option(help="Size of a folder's images, in pixels.")]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]

DEFAULT_BUDGET = ("2x",)
DEFAULT_KEEP = ("first", "last")
