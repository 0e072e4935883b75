"""What a file computes in its runtime, against PyTorch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from groupconv.errors import ExportError
from groupconv.targets.base import FileTarget

# Largest difference over the largest number of an output; numbers of eight bits differ by some
# percent, but what saturates or is calibrated on something else by as much as there is.
TOLERANCE, INT8_TOLERANCE = 1e-3, 0.5


@dataclass(frozen=True)
class Agreement:
    """How outputs compare with PyTorch's. Differences are over the largest number of their output.

    Args:
        largest, mean: of the differences of all outputs; NaN where one has NaN and the other not.
        channel: of the outputs' second axis, that of the largest difference.
        top1: the part of the images with the same largest class; None unless the first output is
            (N, classes).
        accuracy: of the file and of PyTorch; None unless there are labels.
    """

    largest: float
    mean: float
    channel: int
    top1: float | None
    accuracy: tuple[float, float] | None = None

    def __str__(self) -> str:
        same = "" if self.top1 is None else f", the same class for {self.top1:.1%} of the images"
        if self.accuracy is not None:
            same += ", accuracy {:.2%} (PyTorch's {:.2%})".format(*self.accuracy)
        return (
            f"differs from PyTorch by {self.largest:.1e} of the largest number at most (channel "
            f"{self.channel}), {self.mean:.1e} on average{same}"
        )


def verify(
    target: FileTarget,
    path: Path,
    module: nn.Module,
    batches: Sequence[tuple[Tensor, ...]],
    labels: Sequence[Tensor] | None = None,
    tolerance: float = TOLERANCE,
) -> Agreement:
    """Run a file on inputs, all batches of one size, and compare.

    Args:
        labels: of each batch, for the accuracy.
        tolerance: of :attr:`Agreement.largest`.

    Raises:
        ExportError: its outputs are not those of ``module``, in number, in shape, or by more than
            ``tolerance``; or the runtime can't run it.
    """
    agreements = []
    try:
        opened = target.open(path, batches[0])
        for number, inputs in enumerate(batches):
            opened.feed(inputs)
            opened.run()
            classes = None if labels is None else labels[number]
            agreements.append(_agreement(opened.outputs(), module, inputs, classes))
    except ExportError as error:
        raise ExportError(f"{path.name}: in {target.name} {error}") from error
    except Exception as error:  # Runtimes have errors of their own, of many types.
        raise ExportError(f"{target.name} can't run {path.name}: {error}") from error
    agreement = _together(agreements)
    if not agreement.largest <= tolerance:
        raise ExportError(f"{path.name}: in {target.name} the network {agreement}")
    return agreement


def _agreement(
    found: list[Tensor], module: nn.Module, inputs: tuple[Tensor, ...], labels: Tensor | None
) -> Agreement:
    with torch.no_grad():
        expected = [x for x in pytree.tree_leaves(module(*inputs)) if isinstance(x, Tensor)]
    shapes, wanted = ([tuple(x.shape) for x in outputs] for outputs in (found, expected))
    if shapes != wanted:
        raise ExportError(f"outputs have shapes {shapes}, not {wanted}")
    agreement = compare(found, expected)
    if labels is None or agreement.top1 is None:
        return agreement
    right = [(y[0].argmax(1) == labels).double().mean().item() for y in (found, expected)]
    return replace(agreement, accuracy=(right[0], right[1]))


def _together(agreements: Sequence[Agreement]) -> Agreement:
    """Of several batches of one size."""
    worst = max(agreements, key=lambda a: math.inf if math.isnan(a.largest) else a.largest)
    same = [a.top1 for a in agreements if a.top1 is not None]
    right = [a.accuracy for a in agreements if a.accuracy is not None]
    accuracies = [sum(column) / len(right) for column in zip(*right, strict=True)]
    return replace(
        worst,
        mean=sum(a.mean for a in agreements) / len(agreements),
        top1=sum(same) / len(same) if same else None,
        accuracy=(accuracies[0], accuracies[1]) if right else None,
    )


def compare(found: list[Tensor], expected: list[Tensor]) -> Agreement:
    """How lists of tensors of the same shapes compare."""
    largest, channel = 0.0, 0
    total, count = 0.0, 0
    for y, z in zip(found, expected, strict=True):
        if not z.numel():
            continue
        differences = _differences(y.double(), z.double())
        total, count = total + differences.sum().item(), count + differences.numel()
        worst = differences.max().item()
        if math.isnan(worst) or worst > largest:
            largest = worst
            place = torch.unravel_index(differences.argmax(), differences.shape)
            channel = int(place[1]) if differences.ndim > 1 else 0
    top1 = None
    if expected and expected[0].ndim == 2:
        top1 = (found[0].argmax(1) == expected[0].argmax(1)).double().mean().item()
    return Agreement(largest, total / max(1, count), channel, top1)


def _differences(found: Tensor, expected: Tensor) -> Tensor:
    """Over the largest finite number; what is infinite or NaN in both is equal."""
    same = (found == expected) | (found.isnan() & expected.isnan())
    finite = expected[expected.isfinite()].abs()
    scale = finite.max().clamp_min(torch.finfo(torch.float32).tiny) if finite.numel() else 1.0
    return ((found - expected).abs() / scale).masked_fill(same, 0.0)
