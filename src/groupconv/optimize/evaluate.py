"""How good a network is: accuracy with its interval where there are labels, else likeness."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from groupconv.data import Images
from groupconv.errors import DataError
from groupconv.optimize.cost import tensors_in
from groupconv.optimize.objects import holds_objects, match_all
from groupconv.optimize.visit import BATCH, accepted, outputs
from groupconv.task import AUTO, CLASSIFY, DETECT, GENERATE, OTHER, SEGMENT

_RETURNED = {
    CLASSIFY: "(N, classes)",
    SEGMENT: "(N, classes, *size), the size that of the images",
    DETECT: "a dictionary of boxes, labels and scores for each image, as torchvision's detectors",
    GENERATE: "images, (N, 1, H, W) or (N, 3, H, W)",
}


@dataclass(frozen=True)
class Quality:
    """A converted network beside the original, on the same images.

    What a task has no use for is None.

    Args:
        task: "classify", "segment", "detect", "generate" or "other".
        images: how many.
        accuracy_before, accuracy_after: top-1, with labels.
        interval_before, interval_after: their 95% intervals (Wilson's).
        agreement: share of images, or of pixels, with the same top-1 class; of a detector the F1
            score of what is found again, the original's objects being what is right.
        overlap: of the objects found again, mean intersection over union of their masks, or of
            their boxes.
        output_error: ``|y' - y| / |y|`` over all outputs.
        psnr: of images that the network makes, those of the original being what is right, in dB;
            None if it makes the same.
    """

    task: str
    images: int
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    interval_before: tuple[float, float] | None = None
    interval_after: tuple[float, float] | None = None
    agreement: float | None = None
    overlap: float | None = None
    output_error: float | None = None
    psnr: float | None = None


def compare(
    original: nn.Module,
    converted: nn.Module,
    test: Images,
    task: str = AUTO,
    at_once: int = BATCH,
) -> Quality:
    """Measure both networks on the same images.

    Args:
        original, converted: in evaluation mode.
        test: the images, perhaps with labels of classes.
        task: one of :data:`groupconv.task.TASKS`; "auto" tells it from what the original returns.
        at_once: images per forward pass.

    Raises:
        DataError: a network does not accept the images, or does not do the task.
    """
    task = task_of(original, test.images[:1], task)
    if task == DETECT:
        return _compare_objects(original, converted, test, at_once)
    before, after = (outputs(net, test.images, at_once=at_once) for net in (original, converted))
    off = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
    size = sum(float(b.square().sum()) for b in before)
    quality = Quality(task, len(test), output_error=math.sqrt(off / max(size, 1e-60)))
    if task == GENERATE:
        return replace(quality, psnr=_psnr(before[0], after[0]))
    if task not in (CLASSIFY, SEGMENT):
        return quality
    classes = before[0].argmax(1), after[0].argmax(1)
    quality = replace(quality, agreement=float((classes[0] == classes[1]).float().mean()))
    if task == SEGMENT or test.labels is None or int(test.labels.max()) >= before[0].shape[1]:
        return quality
    hits = [int((top == test.labels).sum()) for top in classes]
    return replace(
        quality,
        accuracy_before=hits[0] / len(test),
        accuracy_after=hits[1] / len(test),
        interval_before=wilson(hits[0], len(test)),
        interval_after=wilson(hits[1], len(test)),
    )


@torch.inference_mode()
def task_of(model: nn.Module, image: Tensor, task: str) -> str:
    """What a network does by what it returns of an image, ``(1, C, H, W)``, if that is to be told.

    Raises:
        DataError: it returns what that task can't.
    """
    batch = image.to(next(model.parameters()).device)
    with accepted(batch):
        returned: Any = model(batch)
    first = next(iter(tensors_in(returned)), None)
    shape = () if first is None else tuple(first.shape)
    fits = {
        DETECT: holds_objects(returned),
        CLASSIFY: len(shape) == 2 and shape[1] > 1,
        GENERATE: len(shape) == 4 and shape[1] in (1, 3),
        SEGMENT: len(shape) > 2 and shape[1] > 1 and shape[2:] == image.shape[2:],
        OTHER: True,
    }
    if task == AUTO:
        return next(name for name in fits if fits[name])
    if not fits[task]:
        found = f"a {type(returned).__name__}" + f", first a tensor of shape {shape}" * bool(shape)
        raise DataError(f"task={task!r}: the model returns {found}; expected {_RETURNED[task]}")
    return task


@torch.inference_mode()
def _compare_objects(
    original: nn.Module, converted: nn.Module, test: Images, at_once: int
) -> Quality:
    found = []
    for net in (original, converted):
        device = next(net.parameters()).device
        parts = test.images.split(at_once)
        found.append([objects for part in parts for objects in net(part.to(device))])
    pairs = match_all(*found)
    return Quality(DETECT, len(test), agreement=pairs.f1, overlap=pairs.overlap)


def _psnr(right: Tensor, y: Tensor) -> float | None:
    """Peak signal-to-noise ratio, the peak being the range of what is right."""
    error = float((y - right).double().square().mean())
    peak = float(right.max() - right.min())
    return 10 * math.log10(peak**2 / error) if error and peak else None


def wilson(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927, https://doi.org/10.2307/2276774).

    Args:
        hits, total: counts, total > 0.
        z: quantile of the normal distribution; the default gives 95%.
    """
    p = hits / total
    middle = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # Of all or none of them the share is an end itself, but for rounding.
    return max(min((middle - spread) / scale, p), 0.0), min(max((middle + spread) / scale, p), 1.0)
