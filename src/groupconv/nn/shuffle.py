"""Layers that only move channels."""

from collections.abc import Callable, Iterable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from groupconv.errors import ArgumentError
from groupconv.kernels.spec import is_int
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
        if not is_int(groups) or groups < 1:
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
        items = order.tolist() if isinstance(order, Tensor) else order
        values = list(items) if isinstance(items, Iterable) else [None]
        ascending = list(range(len(values)))
        if not all(map(is_int, values)) or sorted(values) != ascending:
            raise ArgumentError(
                f"ChannelPermutation: order={order!r} must hold each of 0 .. C-1 exactly once"
            )
        self.channels = len(values)
        self.is_identity = values == ascending
        self._values = tuple(values)
        self.register_buffer("order", torch.tensor(values, dtype=torch.int64), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim < 2 or input.shape[1] != self.channels:
            raise ArgumentError(
                f"ChannelPermutation: input has shape {tuple(input.shape)}; expected "
                f"(N, {self.channels}, *)"
            )
        return input if self.is_identity else input.index_select(1, self.order)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # After to_empty() the order is unset, and no state_dict holds it.
        self.order.copy_(torch.tensor(self._values, dtype=torch.int64, device="cpu"))
        return self

    def extra_repr(self) -> str:
        return f"{self.channels}" + (", identity" if self.is_identity else "")
