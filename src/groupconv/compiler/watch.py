"""Whether tensors still hold the numbers that they held: nothing else tells of every change."""

from collections.abc import Iterable

import torch
from torch import Tensor

from groupconv.kernels.fingerprint import fingerprint, words
from groupconv.kernels.machine import runnable


class Watch:
    """Remembers tensors by their numbers; keeps none of them.

    Versions of tensors don't do: who writes through ``.data`` or ``numpy()`` leaves them as they
    were.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        parts = [_words(tensor) for tensor in tensors]
        self._kinds = [kind for kind, *_ in parts]
        self._states = torch.zeros(len(parts), words(runnable()[0]), dtype=torch.int32)
        self._rows = [row.data_ptr() for row in self._states]
        for (_, data, count), row in zip(parts, self._rows, strict=True):
            fingerprint()(data.data_ptr(), count, row, row)

    def holds(self, tensors: Iterable[Tensor]) -> bool:
        """Whether these tensors have the shapes and numbers of those remembered."""
        check, position = fingerprint(), 0
        for tensor in tensors:
            kind, data, count = _words(tensor)
            if (
                position == len(self._rows)
                or kind != self._kinds[position]
                or check(data.data_ptr(), count, self._rows[position], None)
            ):
                return False
            position += 1
        return position == len(self._rows)


_Kind = tuple[torch.Size, torch.dtype, tuple[int, ...]]


def _words(tensor: Tensor) -> tuple[_Kind, Tensor, int]:
    """What else must be equal, and memory with all of its numbers in words of four bytes."""
    kind = (tensor.shape, tensor.dtype, tensor.stride())
    if tensor.nbytes % 4:
        whole = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        return kind, torch.nn.functional.pad(whole, (0, -len(whole) % 4)), -(-len(whole) // 4)
    dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    return kind, tensor if dense else tensor.detach().contiguous(), tensor.nbytes // 4
