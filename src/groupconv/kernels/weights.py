"""Packed weights, kept beside the tensor that they were made from.

A tensor can change without any sign of it: ``.data``, ``detach()`` and ``numpy()`` hand out its
memory, and writing there leaves its version as it was. So the bytes themselves are compared with
a copy before each use, which costs a small part of the convolution that follows.
"""

import ctypes
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

_compare = ctypes.CDLL(None).memcmp
_compare.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


@dataclass
class _Entry:
    owner: weakref.ref[Tensor]
    copy: Tensor
    pointer: int
    size: int
    stride: tuple[int, ...]
    packed: tuple[Tensor, ...]


_entries: dict[tuple[int, Hashable], _Entry] = {}


def packed(
    weight: Tensor, key: Hashable, pack: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """``pack(weight)``, made again only when the numbers in ``weight`` are others than last time.

    Args:
        weight: the weights.
        key: names what ``pack`` does, and the shape and dtype that it does it to.
    """
    name = (id(weight), key)
    entry = _entries.get(name)
    if (
        entry is not None
        and entry.owner() is weight
        and entry.stride == weight.stride()
        and not _compare(entry.pointer, weight.data_ptr(), entry.size)
    ):
        return entry.packed
    with torch.no_grad():
        # First the copy: were the weights changed meanwhile, it would not match the next time.
        copy = weight.detach().clone()
        result = pack(copy)
    # A copy is dense; weights that are not are packed each time.
    if copy.stride() == weight.stride():
        owner = weakref.ref(weight, lambda _: _entries.pop(name, None))
        _entries[name] = _Entry(owner, copy, copy.data_ptr(), copy.nbytes, copy.stride(), result)
    return result
