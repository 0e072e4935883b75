"""Packed weights, kept beside the tensor that they were made from.

A tensor can change without any sign of it: ``.data``, ``detach()`` and ``numpy()`` hand out its
memory, and writing there leaves its version as it was. So before each use the numbers themselves
are compared, by their fingerprint, which costs a small part of the convolution that follows.
"""

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from groupconv.kernels import openmp
from groupconv.kernels.fingerprint import fingerprint, words
from groupconv.kernels.machine import runnable


@dataclass(frozen=True)
class _Entry:
    """What was packed from a tensor, and the fingerprint that the tensor had."""

    owner: weakref.ref[Tensor]
    stride: tuple[int, ...]
    words: int
    state: Tensor
    state_pointer: int
    packed: tuple[Tensor, ...]


_Name = tuple[int, torch.dtype, Hashable]
_entries: dict[_Name, _Entry] = {}


def packed(
    weight: Tensor, key: Hashable, pack: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """``pack(weight)``, made again only when the numbers in ``weight`` are others than last time.

    Args:
        weight: the weights.
        key: names what ``pack`` does, and the shape that it does it to.
    """
    name = (id(weight), weight.dtype, key)
    entry = _entries.get(name)
    if (
        entry is not None
        and entry.owner() is weight
        and entry.stride == weight.stride()
        and not fingerprint()(weight.data_ptr(), entry.words, entry.state_pointer, None)
    ):
        return entry.packed
    with openmp.own_threads():
        return _pack_anew(name, weight, pack)


def _pack_anew(
    name: _Name, weight: Tensor, pack: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    # Weights with gaps between them, or half a word too long, are packed each time.
    if weight.nbytes % 4 or not _dense(weight):
        return pack(weight.detach())
    # Of a copy, which nobody changes between the fingerprint and the packing.
    copy = weight.detach().clone()
    state = torch.zeros(words(runnable()[0]), dtype=torch.int32)
    fingerprint()(copy.data_ptr(), copy.nbytes // 4, state.data_ptr(), state.data_ptr())
    owner = weakref.ref(weight, lambda _: _entries.pop(name, None))
    result = pack(copy)
    _entries[name] = _Entry(
        owner, weight.stride(), copy.nbytes // 4, state, state.data_ptr(), result
    )
    return result


def _dense(weight: Tensor) -> bool:
    return weight.is_contiguous() or (
        weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    )
