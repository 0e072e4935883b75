"""Images moved, cropped and flipped at random."""

import pytest
import torch
from torch import Tensor

from groupconv.recovery.augment import augment

SIZES = [(24, 32), (96, 128)]


def gradient(height: int, width: int, count: int = 64) -> Tensor:
    """Images whose two channels say where each pixel was, from 0 to 1."""
    rows, columns = torch.meshgrid(
        torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij"
    )
    return torch.stack([rows, columns]).expand(count, -1, -1, -1).contiguous()


def changed(images: Tensor, seed: int = 0) -> Tensor:
    return augment(images, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
def test_every_image_by_itself(size: tuple[int, int]) -> None:
    images = gradient(*size)
    found = changed(images)
    assert found.shape == images.shape
    assert len(torch.unique(found.flatten(1), dim=0)) > 50
    assert found.min() >= 0
    assert found.max() <= 1
    # Half of them are flipped: columns fall from left to right.
    flipped = (found[:, 1, :, -1] < found[:, 1, :, 0]).float().mean()
    assert 0.25 < flipped < 0.75


def test_small_ones_are_moved_by_an_eighth() -> None:
    found = changed(gradient(24, 32))
    # Where the middle of each came from.
    middle = found[:, 0, 12].mean(1) * 23
    assert (middle - 12).abs().max() <= 3 + 1e-4
    steps = (found[:, 0, 1:] - found[:, 0, :-1]).abs()
    assert torch.allclose(steps[steps > 1e-4], torch.tensor(1 / 23), atol=1e-5)


def test_of_large_ones_a_part_fills_the_image() -> None:
    found = changed(gradient(96, 128))
    height = found[:, 0].amax((1, 2)) - found[:, 0].amin((1, 2))
    width = found[:, 1].amax((1, 2)) - found[:, 1].amin((1, 2))
    area = height * width
    assert 0.3 < area.min() < 0.6
    assert area.max() > 0.8


def test_the_generator_decides_alone() -> None:
    images = gradient(24, 32, 8)
    before = torch.get_rng_state()
    assert torch.equal(changed(images, 3), changed(images, 3))
    assert not torch.equal(changed(images, 3), changed(images, 4))
    assert torch.equal(torch.get_rng_state(), before)
