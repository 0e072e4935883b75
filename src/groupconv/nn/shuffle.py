"""Layers that only move channels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from groupconv.errors import ArgumentError
from groupconv.nn.functional import channel_shuffle


class ChannelShuffle(nn.ChannelShuffle):
    """Interleave the channels of ``groups`` groups; see :func:`channel_shuffle`.

    Args:
        groups: positive; divides the channels of every input. With 1 the input is returned.

    Shape:
        Input and output ``(N, C, *)``.

    Raises:
        ArgumentError: groups is not a positive integer, or does not divide C.
    """

    def __init__(self, groups: int) -> None:
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
            raise ArgumentError(f"ChannelShuffle: groups={groups!r} must be a positive integer")
        super().__init__(groups)

    def forward(self, input: Tensor) -> Tensor:
        return channel_shuffle(input, self.groups)


class ChannelPermutation(nn.Module):
    """Put the channels in another order: output channel ``i`` is input channel ``order[i]``.

    The order belongs to the architecture, as groups does: it is not in the state_dict.

    Args:
        order: a permutation of 0 .. C-1. When it is the identity the input is returned.

    Shape:
        Input and output ``(N, C, *)``.

    Raises:
        ArgumentError: order is not a permutation, or the input does not have C channels.
    """

    order: Tensor

    def __init__(self, order: Sequence[int] | Tensor) -> None:
        super().__init__()
        values = torch.as_tensor(order, dtype=torch.int64, device="cpu").clone()
        if values.ndim != 1 or not torch.equal(values.sort().values, torch.arange(len(values))):
            raise ArgumentError(
                f"ChannelPermutation: order={order!r} must hold each of 0 .. C-1 exactly once"
            )
        self.register_buffer("order", values, persistent=False)
        self.channels = len(values)
        self.is_identity = torch.equal(values, torch.arange(len(values)))

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim < 2 or input.shape[1] != self.channels:
            raise ArgumentError(
                f"ChannelPermutation: input has shape {tuple(input.shape)}; expected "
                f"(N, {self.channels}, *)"
            )
        return input if self.is_identity else input.index_select(1, self.order)

    def extra_repr(self) -> str:
        return f"{self.channels}" + (", identity" if self.is_identity else "")
