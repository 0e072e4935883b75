"""Blocks cover every output channel once, and each lane sees the inputs of its own group."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.kernel_cases import SWEEP, convs

from groupconv.kernels.blocks import Block, blocks
from groupconv.kernels.emit import Emitter
from groupconv.kernels.machine import NAMES, machine
from groupconv.kernels.spec import ConvSpec


def _conv(wide_in: int, wide_out: int, groups: int, columns: int = 3) -> ConvSpec:
    return ConvSpec(
        1, wide_in * groups, wide_out * groups, (9, 9), (3, columns), (1, 1), ((1, 3),) * 2,
        (1, 1), groups,
    )  # fmt: skip


def _check(conv: ConvSpec, kinds: list[Block], lanes: int, vectors: int) -> None:
    wide_in, wide_out = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    seen = []
    for block in kinds:
        assert block.width == wide_in
        ends = [vector.offset + len(vector.sources) for vector in block.vectors]
        # One after another, without gaps.
        assert [vector.offset for vector in block.vectors] == [0, *ends[:-1]]
        assert ends[-1] == block.outputs
        starts = list(block.starts())
        assert len(starts) == block.count
        for output, into in starts:
            assert 0 <= into <= into + block.inputs <= conv.in_channels
            for vector in block.vectors:
                assert 1 <= len(vector.sources) <= lanes
                for lane, source in enumerate(vector.sources):
                    channel = output + vector.offset + lane
                    assert into + source == channel // wide_out * wide_in
                    assert 0 <= source <= block.inputs - wide_in
                    seen.append(channel)
        # More than were asked for only where vectors share a group, and then at most four.
        assert len(block.vectors) <= max(vectors, 4)
        if wide_out >= 4 * lanes:
            assert len(block.vectors) <= vectors
    assert sorted(seen) == list(range(conv.out_channels))


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_every_channel_once_for_every_width(lanes: int) -> None:
    widths, groups = (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 31, 33), (1, 2, 3, 5, 8, 21)
    for wide_in, wide_out, number in itertools.product(widths, widths, groups):
        for vectors, columns in ((1, 1), (2, 3), (3, 1), (4, 7)):
            conv = _conv(wide_in, wide_out, number, columns)
            _check(conv, blocks(conv, lanes, vectors), lanes, vectors)


@settings(SWEEP, max_examples=300)
@given(conv=convs(), lanes=st.sampled_from([4, 8, 16]), vectors=st.integers(1, 6))
def test_every_channel_once(conv: ConvSpec, lanes: int, vectors: int) -> None:
    _check(conv, blocks(conv, lanes, vectors), lanes, vectors)


def test_the_check_rejects_planted_faults() -> None:
    """A channel missing, one twice, a lane that sees another group, vectors with a gap."""
    conv = _conv(3, 5, 6)
    kinds = blocks(conv, 8, 2)
    _check(conv, kinds, 8, 2)
    block = kinds[0]
    first = block.vectors[0]
    other = dataclasses.replace(first, sources=(*first.sources[:-1], first.sources[-1] + 3))
    for wrong in (
        kinds[1:],
        [*kinds, block],
        [dataclasses.replace(block, first_input=block.first_input + 3), *kinds[1:]],
        [dataclasses.replace(block, vectors=(other, *block.vectors[1:])), *kinds[1:]],
        [dataclasses.replace(block, vectors=block.vectors[1:]), *kinds[1:]],
    ):
        with pytest.raises(AssertionError):
            _check(conv, wrong, 8, 2)


@pytest.mark.parametrize("name", NAMES)
def test_code_starts_where_the_list_says(name: str) -> None:
    """The code for a block's first channels, on numbers that are known."""
    target = machine(name)
    for wide_in, wide_out, groups in ((1, 1, 50), (4, 4, 9), (3, 5, 7), (8, 70, 3), (2, 33, 1)):
        for vectors in (1, 2, 3):
            for block in blocks(_conv(wide_in, wide_out, groups), target.lanes, vectors):
                e = Emitter(target)
                found = [block.start(e, index) for index in range(block.count)]
                assert found == list(block.starts())


def test_lanes_are_full_where_widths_divide_them() -> None:
    for lanes, width in itertools.product((4, 8, 16), (1, 2, 4, 8, 16, 32)):
        conv = _conv(width, width, 32)
        for block in blocks(conv, lanes, 1):
            assert {len(vector.sources) for vector in block.vectors} == {lanes}
