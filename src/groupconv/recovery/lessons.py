"""Images that a student learns from, and those that it is judged by."""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from groupconv.data import Images, load_images
from groupconv.errors import DataError
from groupconv.recovery.options import Recovery
from groupconv.store import fingerprint

_MOST_IMAGES = 1_000_000
# Of the images to learn from, one in so many is judged by, at most so many.
_JUDGED, _MOST_JUDGED = 10, 512
# Images of a batch, at most, and their pixels: a backward pass keeps all activations.
_BATCH, _PIXELS = 64, 1 << 19


def with_images(recover: str | Recovery, image_size: int, seed: int) -> Recovery:
    """What is asked for, its own images at hand.

    Args:
        recover: a :class:`Recovery`, or its time.
        image_size, seed: see :func:`load_images`.
    """
    found = recover if isinstance(recover, Recovery) else Recovery(recover)
    if found.train is None or isinstance(found.train, DataLoader):
        return found
    train = load_images(found.train, limit=_MOST_IMAGES, image_size=image_size, seed=seed)
    return replace(found, train=train)


def judged(images: Images, recovery: Recovery, seed: int) -> tuple[Images, Recovery, Images]:
    """Images that nothing is fitted to set aside, to judge by them what is learned.

    Args:
        images: for calibration, learned from where the recovery has none; some of them or all may
            be among the recovery's.
        recovery: its images at hand.
        seed: of the choice.

    Returns:
        the calibration images and the recovery without them, and these.

    Raises:
        DataError: no image is left to calibrate on.
    """
    if recovery.seconds is None:
        return images, recovery, images
    if not isinstance(recovery.train, Images):
        # Shuffled: those of a folder are sorted by class.
        apart, images = images.shuffled(seed).split(_judges(images))
        return images, recovery, apart
    # Those that the refit has not seen come first.
    train = recovery.train.shuffled(seed)
    train = train.take(_among(train.images, images.images).argsort(stable=True))
    apart, train = train.split(_judges(train))
    images = images.take(~_among(images.images, apart.images))
    if not len(images):
        raise DataError(f"{images.source}: every image is needed to judge by; give others, or more")
    return images, replace(recovery, train=train), apart


def batch_size(pixels: int) -> int:
    """Images of a batch to learn from, of so many pixels each."""
    return max(min(_BATCH, _PIXELS // pixels), 2)


def _judges(images: Images) -> int:
    return min(math.ceil(len(images) / _JUDGED), _MOST_JUDGED)


def _among(images: Tensor, others: Tensor) -> Tensor:
    """Which images are equal to one of some others: ``(N,)``, booleans."""
    known = {fingerprint([("image", other)]) for other in others}
    return torch.tensor([fingerprint([("image", image)]) in known for image in images])
