"""Tiles that are chosen: legal for every kernel, the same each time, remembered on disk."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.kernel_cases import SWEEP, specs

from groupconv.kernels import cache, kernel, tuning
from groupconv.kernels.blocks import blocks
from groupconv.kernels.kernel import Kernel
from groupconv.kernels.machine import NAMES, Machine, machine, runnable
from groupconv.kernels.spec import ConvSpec, KernelSpec
from groupconv.kernels.tile import SPARE, Tile, sum_channels

every_machine = pytest.mark.parametrize("target", runnable(), ids=lambda target: target.name)


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
SMALL = dataclasses.replace(_layer(12, 20, 4, 3, (9, 8)), bias=True)


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
    size = max(len(block.vectors) for block in blocks(spec.conv, target.lanes, tile.vectors))
    return (tile.pixels + 1) * tile.lines * size + SPARE


def _check(spec: KernelSpec, target: Machine, far: bool = False) -> None:
    found = tuning.candidates(spec, target, far)
    assert 1 <= len(found) <= 7
    assert len(set(found)) == len(found)
    assert found == tuning.candidates(spec, target, far)
    assert {tile.ahead for tile in found} == {far}
    for tile in found:
        assert _illegal(spec, tile) is None, tile
        assert _registers(spec, target, tile) <= target.registers, tile


@pytest.mark.parametrize("name", NAMES)
def test_candidates_are_legal(name: str) -> None:
    target = machine(name)

    @settings(SWEEP, max_examples=100)
    @given(spec=specs(), far=st.booleans())
    def sweep(spec: KernelSpec, far: bool) -> None:
        _check(spec, target, far)

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
    tile = tuning.candidates(spec, target)[0]
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


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No kernel is known, in this process or on disk."""
    folder = tmp_path / "kernels"
    monkeypatch.setenv("GROUPCONV_CACHE", str(folder))
    monkeypatch.setattr(tuning, "_known", {})
    return folder


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process, where nothing may be compiled."""

    def fail(*_: object) -> bytes:
        raise AssertionError("compiled")

    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(kernel, "compile", fail)


def _result(made: Kernel) -> torch.Tensor:
    """What a kernel makes of the same numbers."""
    spec, conv = made.spec, made.spec.conv
    generator = torch.Generator().manual_seed(1)
    last = torch.channels_last

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    x = random(2, conv.in_channels, *conv.input_size).contiguous(memory_format=last)
    size = (2, conv.out_channels, *conv.output_size)
    y = torch.full(size, math.nan).contiguous(memory_format=last)
    bias = random(conv.out_channels) if spec.bias else None
    made(x, made.pack(random(*conv.weight_shape)), bias, y)
    assert not y.isnan().any()
    return y


@every_machine
def test_the_choice_on_paper(fresh: Path, monkeypatch: pytest.MonkeyPatch, target: Machine) -> None:
    """The same without measuring: in this process, from the cache, and made anew."""
    first = tuning.tuned(SMALL, 1, target)
    assert first is tuning.tuned(SMALL, 1, target)
    assert first is tuning.tuned(dataclasses.replace(SMALL), 3, target)
    assert first.tile == tuning.candidates(SMALL, target)[0]
    assert first.machine == target
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setenv("GROUPCONV_CACHE", str(fresh.parent / "other"))
    again = tuning.tuned(SMALL, 1, target)
    assert again is not first
    assert again.tile == first.tile
    _forget(monkeypatch)
    recalled = tuning.tuned(SMALL, 1, target)
    assert recalled.tile == first.tile
    assert torch.equal(_result(recalled), _result(first))


@every_machine
def test_near_and_far_batches_give_the_same_numbers(fresh: Path, target: Machine) -> None:
    near, far = tuning.tuned(SMALL, 1, target), tuning.tuned(SMALL, 10**6, target)
    assert far is not near
    assert far.tile == tuning.candidates(SMALL, target, True)[0]
    assert [near.tile.ahead, far.tile.ahead] == [False, True]
    assert torch.equal(_result(far), _result(near))


@every_machine
def test_a_measured_choice_is_found_again(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, target: Machine
) -> None:
    state = torch.get_rng_state()
    unmeasured = tuning.tuned(SMALL, 1, target)
    monkeypatch.setenv("GROUPCONV_TUNE", "1")
    measured = tuning.tuned(SMALL, 1, target)
    assert measured is not unmeasured
    assert measured is tuning.tuned(SMALL, 1, target)
    assert measured.tile in tuning.candidates(SMALL, target)
    assert cache.usage().entries == 2
    _forget(monkeypatch)
    recalled = tuning.tuned(SMALL, 1, target)
    assert recalled is not measured
    assert recalled.tile == measured.tile
    assert torch.equal(_result(recalled), _result(measured))
    # Another kernel is not there, and would be compiled.
    with pytest.raises(AssertionError, match="compiled"):
        tuning.tuned(dataclasses.replace(SMALL, bias=False), 1, target)
    # The user's random numbers stay as they are.
    assert torch.equal(torch.get_rng_state(), state)


def test_an_entry_that_was_changed_is_not_used(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning.tuned(SMALL)
    (entry,) = fresh.glob("*.kernel")
    data = bytearray(entry.read_bytes())
    data[-1] ^= 1
    entry.write_bytes(bytes(data))
    _forget(monkeypatch)
    with pytest.raises(AssertionError, match="compiled"):
        tuning.tuned(SMALL)


def test_a_far_batch_can_be_measured(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPCONV_TUNE", "1")
    # As small as a near one.
    monkeypatch.setattr(tuning, "_NEAR", 2**12)
    assert tuning.tuned(SMALL, 100).tile.ahead


@pytest.mark.parametrize(
    "change",
    [
        {"channels_last_input": False},
        {"channels_last_output": False},
        {"ordered": True},
        {"residual": True, "activation": "silu"},
        {"step": (2, 3), "written_size": (18, 24)},
    ],
    ids=str,
)
def test_every_kind_of_kernel_can_be_measured(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object]
) -> None:
    monkeypatch.setenv("GROUPCONV_TUNE", "1")
    spec = dataclasses.replace(SMALL, **change)
    assert not tuning.tuned(spec).tile.ahead
