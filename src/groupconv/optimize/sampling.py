"""Positions of layers on calibration images: which ones, and what stands there."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from groupconv import ranks
from groupconv.errors import ArgumentError
from groupconv.kernels.spec import ConvSpec


@dataclass(frozen=True)
class Sampling:
    """Where positions are taken from.

    Args:
        batches: makes the batches of images ``(N, C, H, W)``, in the same order on every call.
        images: how many images there are in them.
        max_positions: to sample of each layer, spread evenly over the images.
        seed: of the choice.
    """

    batches: Callable[[], Iterable[Tensor]]
    images: int
    max_positions: int
    seed: int

    def share(self) -> Iterator[tuple[int, int, Tensor]]:
        """The batches of this process: number, images before it, and the batch itself."""
        before = 0
        for number, batch in enumerate(self.batches()):
            if number % ranks.count() == ranks.rank():
                yield number, before, batch
            before += len(batch)

    def places(self, number: int, shape: Sequence[int]) -> tuple[Tensor, ...]:
        """Positions of a batch, the same whenever they are asked for.

        Args:
            number: of the batch.
            shape: of the tensor, ``(N, C, *size)``.

        Returns:
            The image, and the position on each axis, of shape ``(P,)`` each.
        """
        generator = torch.Generator().manual_seed((self.seed << 20) + number)
        count = math.ceil(self.max_positions * shape[0] / self.images)
        return _places(shape, count, generator)


def sample(
    spec: ConvSpec, x: Tensor, y: Tensor, positions: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """im2col vectors and outputs at random positions of a batch, or at all if there are fewer.

    Args:
        spec: of the convolution; its batch and input size are taken from ``x`` instead.
        x: ``(N, C_in, *size)``, input of the convolution, not padded.
        y: ``(N, C_out, *out_size)``.
        positions: at most this many.
        generator: picks them.

    Returns:
        u of shape ``(P, C_in * prod(k))``, y of shape ``(P, C_out)`` and the image in the batch
        that each position is from, of shape ``(P,)``.

    Raises:
        ArgumentError: the convolution is a transposed one.
    """
    place = _places(y.shape, positions, generator)
    return inputs_at(spec, x, tuple(y.shape[2:]), place), outputs_at(y, place), place[0]


def _places(shape: Sequence[int], positions: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Image and position on each axis, of some or all positions of a tensor ``(N, C, *size)``."""
    count, _, *size = shape
    total = count * math.prod(size)
    if positions < total:
        flat = torch.randperm(total, generator=generator)[:positions]
    else:
        flat = torch.arange(total)
    return torch.unravel_index(flat, (count, *size))


def inputs_at(
    spec: ConvSpec, x: Tensor, out_size: tuple[int, ...], place: tuple[Tensor, ...]
) -> Tensor:
    """``(P, C_in * prod(k))``: what a convolution sees at some positions of its output."""
    if spec.transposed:
        raise ArgumentError(
            f"moments: transposed=True ({spec.in_channels} -> {spec.out_channels} channels): "
            "only convolutions that are not transposed can be fitted"
        )
    x = F.pad(x, [n for pair in reversed(spec.padding) for n in pair])
    spatial = x.stride()[2:]
    windows = x.as_strided(
        (*x.shape[:2], *out_size, *spec.kernel_size),
        (
            *x.stride()[:2],
            *(a * s for a, s in zip(spatial, spec.stride, strict=True)),
            *(a * d for a, d in zip(spatial, spec.dilation, strict=True)),
        ),
    )
    # Channels last, so that one index picks all channels of a position.
    return windows.movedim(1, len(out_size) + 1)[place].flatten(1)


def outputs_at(y: Tensor, place: tuple[Tensor, ...]) -> Tensor:
    """``(P, C_out)``."""
    return y.movedim(1, -1)[place]
