"""How good a network is: accuracy with its interval where there are labels, else likeness."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groupconv.data import Images, largest_map
from groupconv.errors import DataError
from groupconv.optimize.cost import tensors_in

# Images of a batch, at most, and pixels.
_BATCH, _PIXELS = 128, 1 << 23


@dataclass(frozen=True)
class Quality:
    """A converted network beside the original, on the same images.

    Args:
        images: how many.
        accuracy_before, accuracy_after: top-1, or None without labels or classes.
        interval_before, interval_after: their 95% intervals (Wilson's).
        agreement: share of images with the same top-1 class, or None if the output has no classes.
        output_error: ``|y' - y| / |y|`` over all outputs.
        psnr: of images that the network makes, those of the original being what is right, in dB;
            None if it makes none, or the same.
    """

    images: int
    accuracy_before: float | None
    accuracy_after: float | None
    interval_before: tuple[float, float] | None
    interval_after: tuple[float, float] | None
    agreement: float | None
    output_error: float
    psnr: float | None = None


@torch.inference_mode()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """The network's first output tensor for every image, on the CPU.

    Raises:
        DataError: the network does not accept the images, or does not give tensors.
    """
    device = next(model.parameters()).device
    # One image tells how large the outputs are. It runs again with the others: a batch of its own
    # would have a mean of its own, which trials correct batch by batch.
    first = run(model, images[:1].to(device))
    size = max(1, min(_BATCH, _PIXELS // largest_map(images, first)))
    return torch.cat([run(model, part.to(device)).float().cpu() for part in images.split(size)])


def run(model: nn.Module, batch: Tensor) -> Tensor:
    """One forward pass; the first tensor among what the network returns.

    Raises:
        DataError: the network does not accept the images, or gives no tensor.
    """
    try:
        result: Any = model(batch)
    except RuntimeError as error:
        raise DataError(
            f"the model does not accept images of shape {tuple(batch.shape)}: {error}"
        ) from error
    leaves = tensors_in(result)
    if not leaves:
        raise DataError(f"the model returns a {type(result).__name__} without a tensor")
    return leaves[0]


def compare(original: nn.Module, converted: nn.Module, test: Images) -> Quality:
    """Measure both networks on the same images."""
    before, after = outputs(original, test.images), outputs(converted, test.images)
    error = float((after - before).norm() / before.norm().clamp_min(1e-30))
    if before.ndim != 2 or before.shape[1] < 2:
        psnr = _psnr(before, after) if _are_images(before) else None
        return Quality(len(test), None, None, None, None, None, error, psnr)
    classes = before.argmax(1), after.argmax(1)
    agreement = float((classes[0] == classes[1]).float().mean())
    if test.labels is None or int(test.labels.max()) >= before.shape[1]:
        return Quality(len(test), None, None, None, None, agreement, error)
    hits = [int((top == test.labels).sum()) for top in classes]
    return Quality(
        len(test),
        hits[0] / len(test),
        hits[1] / len(test),
        wilson(hits[0], len(test)),
        wilson(hits[1], len(test)),
        agreement,
        error,
    )


def _are_images(y: Tensor) -> bool:
    return y.ndim == 4 and y.shape[1] in (1, 3)


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
    return (middle - spread) / scale, (middle + spread) / scale
