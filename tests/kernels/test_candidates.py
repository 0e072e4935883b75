"""Tiles on paper: legal for every kernel, the same each time, within the registers."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.kernel_cases import SWEEP, specs

from groupconv.kernels.blocks import blocks
from groupconv.kernels.candidates import candidates
from groupconv.kernels.machine import NAMES, Machine, machine
from groupconv.kernels.spec import ConvSpec, KernelSpec
from groupconv.kernels.tile import SPARE, Tile, sum_channels


def _layer(
    into: int, out: int, groups: int, k: int, size: tuple[int, int], stride: int = 1
) -> KernelSpec:
    pad = (k // 2, k // 2)
    conv = ConvSpec(1, into, out, size, (k, k), (stride, stride), (pad, pad), (1, 1), groups)
    return KernelSpec(conv)


# As in networks, larger than those of the sweep.
LAYERS = [
    _layer(3, 64, 1, 7, (224, 224), 2),
    _layer(64, 64, 1, 3, (56, 56)),
    _layer(512, 512, 1, 3, (7, 7)),
    _layer(2048, 1000, 1, 1, (1, 1)),
    _layer(128, 128, 32, 3, (56, 56)),
    _layer(1024, 1024, 32, 3, (7, 7), 2),
    _layer(144, 144, 144, 3, (56, 56), 2),
    _layer(768, 768, 768, 31, (14, 14)),
    _layer(4096, 4096, 4096, 1, (1, 1)),
    _layer(512, 512, 256, 9, (1, 10000)),
    _layer(1, 1, 1, 1, (1, 1)),
    _layer(997, 991, 1, 3, (5, 3)),
]


def _illegal(spec: KernelSpec, tile: Tile) -> str | None:
    """What is wrong with a tile."""
    conv = spec.conv
    if min(dataclasses.astuple(tile)[:6]) < 1:
        return "a field below 1"
    if tile.blocks != 1 and spec.staged:
        return "blocks of a staged kernel"
    if (conv.in_channels // conv.groups) % tile.channels:
        return "channels do not divide the width"
    if tile.channels % sum_channels(conv):
        return "channels cut a chain of sums"
    if tile.rows % tile.lines:
        return "rows not in whole lines"
    return None


def _registers(spec: KernelSpec, target: Machine, tile: Tile) -> int:
    """For sums, the weights of one column of the kernel beside them, and inputs."""
    lanes = tile.narrowed(target).lanes
    size = max(len(block.vectors) for block in blocks(spec.conv, lanes, tile.vectors))
    return (tile.pixels + 1) * tile.lines * size + SPARE


def _check(spec: KernelSpec, target: Machine, far: bool = False, shared: bool = True) -> None:
    found = candidates(spec, target, far, shared)
    assert 1 <= len(found) <= 12
    assert len(set(found)) == len(found)
    assert found == candidates(spec, target, far, shared)
    narrow = spec.conv.in_channels // spec.conv.groups <= 64
    assert any(tile.ahead for tile in found) == (far and narrow and not spec.staged)
    for tile in found:
        assert _illegal(spec, tile) is None, tile
        assert _registers(spec, target, tile) <= target.registers, tile


@pytest.mark.parametrize("name", NAMES)
def test_candidates_are_legal(name: str) -> None:
    target = machine(name)

    @settings(SWEEP, max_examples=100)
    @given(spec=specs(), far=st.booleans(), shared=st.booleans())
    def sweep(spec: KernelSpec, far: bool, shared: bool) -> None:
        _check(spec, target, far, shared)

    sweep()
    for spec in LAYERS:
        for far in (False, True):
            _check(spec, target, far)
            _check(dataclasses.replace(spec, channels_last_output=False), target, far)


@pytest.mark.parametrize(
    "change",
    [
        {"pixels": 0},
        {"rows": 0},
        {"channels": 2},
        {"channels": 3},
        {"lines": 2, "rows": 3},
        {"blocks": 0},
    ],
    ids=str,
)
def test_the_check_sees_illegal_tiles(change: dict[str, int]) -> None:
    target, spec = machine("avx2"), _layer(9, 400, 1, 3, (9, 40))
    tile = candidates(spec, target)[0]
    assert _illegal(spec, tile) is None
    assert _illegal(spec, dataclasses.replace(tile, **change)) is not None
    many = _layer(90, 400, 1, 3, (9, 40))
    assert _illegal(many, dataclasses.replace(tile, channels=30)) is None
    assert _illegal(many, dataclasses.replace(tile, channels=45)) is not None
    staged = dataclasses.replace(spec, ordered=True)
    assert _illegal(staged, dataclasses.replace(tile, blocks=2)) is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_narrow_image(name: str) -> None:
    """Few tiles of several rows fit the registers there."""
    pads = ((11, -8), (-4, -5))
    narrow = KernelSpec(ConvSpec(1, 80, 80, (10, 11), (2, 2), (1, 1), pads, (1, 1), 80))
    _check(narrow, machine(name))


@pytest.mark.parametrize("name", NAMES)
def test_several_threads_get_several_tasks(name: str) -> None:
    """Where the image has enough rows and blocks; one thread need not be called so often."""
    target = machine(name)
    for spec in (LAYERS[1], LAYERS[4], LAYERS[6]):
        for tile in candidates(spec, target):
            lanes = tile.narrowed(target).lanes
            number = sum(block.count for block in blocks(spec.conv, lanes, tile.vectors))
            chunks = -(-spec.conv.output_size[0] // tile.rows)
            assert chunks * -(-number // tile.blocks) >= 8, tile
        alone = candidates(spec, target, shared=False)
        assert max(tile.rows for tile in alone) == spec.conv.output_size[0]


@pytest.mark.parametrize(
    ("out_channels", "groups", "expected"),
    [
        (24, 1, True),
        (60, 3, True),
        (24, 24, True),
        (64, 1, False),
        (128, 4, False),
        (64, 16, False),
    ],
)
def test_wide_vectors_that_would_be_part_empty_meet_narrow_ones(
    out_channels: int, groups: int, expected: bool
) -> None:
    spec = _layer(4 * groups, out_channels, groups, 1, (28, 28))
    assert any(tile.narrow for tile in candidates(spec, machine("avx512"))) == expected
    assert not candidates(spec, machine("avx512"))[0].narrow
    assert not any(tile.narrow for tile in candidates(spec, machine("avx2")))


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    # Of 64 places for lines of memory, pixels of 512 bytes meet eight, pixels of 576 all.
    [(128, 56, True), (144, 56, False), (128, 16, False), (1024, 7, True), (960, 7, False)],
)
def test_pixels_that_push_each_other_out_meet_small_tiles(
    channels: int, width: int, expected: bool
) -> None:
    found = candidates(_layer(channels, channels, channels, 3, (width, width)), machine("avx512"))
    assert ((found[0].pixels, found[0].vectors, found[0].lines) == (2, 4, 2)) == expected


def test_tiles_that_differ_in_the_order_share_their_code() -> None:
    found = candidates(LAYERS[4], machine("avx2"))
    assert len({tile.code for tile in found}) < len(found)
    assert found[0].code == dataclasses.replace(found[0], rows=found[0].lines, blocks=1)
