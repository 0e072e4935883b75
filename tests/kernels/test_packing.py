"""Packed weights hold every weight once, where the code reads it, and zeros elsewhere."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.kernel_cases import SWEEP, convs
from torch import Tensor

from groupconv.kernels.blocks import Block, blocks
from groupconv.kernels.packing import pack
from groupconv.kernels.spec import ConvSpec
from groupconv.kernels.tile import sum_channels


def _unpack(
    packed: Tensor, conv: ConvSpec, kinds: list[Block], lanes: int
) -> tuple[Tensor, Tensor]:
    """The weights, and what lies in lanes that no output channel has."""
    height, columns = conv.kernel_size
    weight = torch.full(conv.weight_shape, torch.nan)
    rest, at = [], 0
    for block in kinds:
        chunk = sum_channels(conv)
        shape = (block.width // chunk, height, chunk, columns, len(block.vectors), lanes)
        for output, _ in block.starts():
            part = packed[at : at + math.prod(shape)].reshape(shape)
            at += math.prod(shape)
            for q, vector in enumerate(block.vectors):
                for lane in range(lanes):
                    one = part[..., q, lane]
                    if lane < len(vector.sources):
                        # [chunk, kernel row, channel, column] to [chunk and channel, row, column]
                        values = one.transpose(1, 2).reshape(block.width, height, columns)
                        weight[output + vector.offset + lane] = values
                    else:
                        rest.append(one.flatten())
    assert at == packed.numel()
    return weight, torch.cat(rest) if rest else torch.zeros(0)


@st.composite
def _packings(draw: st.DrawFn) -> tuple[ConvSpec, int, int]:
    return draw(convs()), draw(st.sampled_from([4, 8, 16])), draw(st.integers(1, 4))


@settings(SWEEP, max_examples=300)
@given(packing=_packings())
def test_every_weight_once(packing: tuple[ConvSpec, int, int]) -> None:
    conv, lanes, vectors = packing
    kinds = blocks(conv, lanes, vectors)
    # All different, none zero.
    weight = torch.arange(1.0, 1 + math.prod(conv.weight_shape)).reshape(conv.weight_shape)
    packed = pack(weight, conv, kinds, lanes)
    assert packed.dtype == weight.dtype
    assert packed.is_contiguous()
    assert packed.ndim == 1
    found, rest = _unpack(packed, conv, kinds, lanes)
    assert torch.equal(found, weight)
    assert not rest.any()
    # However the weights lie in memory.
    last = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(pack(last, conv, kinds, lanes), packed)
    back = weight.flip(-1).contiguous().flip(-1)
    assert torch.equal(pack(back, conv, kinds, lanes), packed)


@pytest.mark.parametrize(("width", "chunk"), [(6, 6), (64, 64), (86, 43), (67, 1)])
@pytest.mark.parametrize("vectors", [1, 2])
def test_unpacking_sees_two_weights_exchanged(width: int, chunk: int, vectors: int) -> None:
    conv = ConvSpec(1, 2 * width, 40, (9, 9), (3, 2), (1, 1), ((1, 1), (1, 1)), (1, 1), 2)
    assert sum_channels(conv) == chunk
    kinds = blocks(conv, 8, vectors)
    weight = torch.arange(1.0, 1 + math.prod(conv.weight_shape)).reshape(conv.weight_shape)
    packed = pack(weight, conv, kinds, 8)
    wrong = packed.clone()
    wrong[[5, 70]] = packed[[70, 5]]
    assert not torch.equal(_unpack(wrong, conv, kinds, 8)[0], weight)
    wrong = packed.clone()
    wrong[packed == 0] = 1
    assert _unpack(wrong, conv, kinds, 8)[1].any()
