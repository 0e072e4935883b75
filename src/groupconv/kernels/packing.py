"""Weights in the order in which the generated code reads them."""

import torch
from torch import Tensor

from groupconv.kernels.blocks import Block
from groupconv.kernels.spec import CHAIN, ConvSpec
from groupconv.kernels.tile import sum_channels


def size(conv: ConvSpec, kinds: list[Block], lanes: int) -> int:
    """Elements of packed weights."""
    return sum(block.count * len(block.vectors) * lanes * conv.fan_in for block in kinds)


def pack(
    weight: Tensor, conv: ConvSpec, kinds: list[Block], lanes: int, chain: int = CHAIN
) -> Tensor:
    """Flatten ``weight`` as the blocks, one after another, read it.

    A block reads ``[chunk][kernel row][channel][kernel column][vector][lane]``, where a chunk is
    ``sum_channels(conv, chain)`` input channels; lanes without an output channel hold zero.

    Args:
        weight: ``conv.weight_shape``.
        kinds: the blocks of the kernel.
        lanes: of a vector.
        chain: of the kernel's spec.

    Returns:
        1-d tensor.
    """
    out, width, height, columns = weight.shape
    # The row past the end stands for the lanes without an output channel.
    padded = torch.cat([weight, weight.new_zeros(1, width, height, columns)])
    parts, chunk = [], sum_channels(conv, chain)
    for block in kinds:
        table = torch.full((block.count, len(block.vectors), lanes), out)
        starts = torch.tensor([first for first, _ in block.starts()])
        for q, vector in enumerate(block.vectors):
            used = torch.arange(len(vector.sources)) + vector.offset
            table[:, q, : len(used)] = starts[:, None] + used
        picked = padded[table].reshape(
            block.count, len(block.vectors), lanes, width // chunk, chunk, height, columns
        )
        parts.append(picked.permute(0, 3, 5, 4, 6, 1, 2).flatten())
    return torch.cat(parts)
