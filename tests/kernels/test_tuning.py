"""Tiles that are chosen: the same each time, remembered on disk, for one thread or several."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from groupconv.kernels import cache, kernel, openmp, tuning
from groupconv.kernels.candidates import candidates
from groupconv.kernels.kernel import Kernel
from groupconv.kernels.machine import Machine, runnable
from groupconv.kernels.spec import ConvSpec, KernelSpec

every_machine = pytest.mark.parametrize("target", runnable(), ids=lambda target: target.name)


PADS = ((1, 1), (1, 1))
SMALL = KernelSpec(ConvSpec(1, 12, 20, (9, 8), (3, 3), (1, 1), PADS, (1, 1), 4), bias=True)

LARGE = dataclasses.replace(SMALL, conv=dataclasses.replace(SMALL.conv, input_size=(90, 80)))


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
    assert first.tile == candidates(SMALL, target, shared=False)[0]
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
    assert far.tile == candidates(SMALL, target, True, openmp.threads() > 1)[0]
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
    assert measured.tile in candidates(SMALL, target, shared=False)
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
    monkeypatch.setattr(tuning, "_NEAR", 2**14)
    found = tuning.tuned(SMALL, 100)
    assert found is not tuning.tuned(SMALL)
    assert found.tile in candidates(SMALL, runnable()[0], True, openmp.threads() > 1)


def test_an_empty_batch_is_tuned_on_an_image(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it chooses is remembered for batches that are not empty."""
    monkeypatch.setenv("GROUPCONV_TUNE", "1")
    timed, measure = list[int](), tuning._measure

    def spy(*arguments: Any) -> tuple[bytes, Kernel]:
        timed.append(arguments[3])
        return measure(*arguments)

    monkeypatch.setattr(tuning, "_measure", spy)
    assert tuning.tuned(SMALL, 0) is tuning.tuned(SMALL, 1)
    assert timed == [1]


@pytest.mark.parametrize(
    "change",
    [
        {"channels_last_input": False},
        {"channels_last_output": False},
        {"ordered": True},
        {"residual": "before", "activation": "silu"},
        {"residual": "after", "input_pixel": 13, "output_pixel": 24, "residual_pixel": 21},
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


@every_machine
def test_one_thread_and_several_have_tiles_of_their_own(fresh: Path, target: Machine) -> None:
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(tuning.tuned(LARGE, 1, target))
            # Not worth sharing, unless the other threads wait for it already.
            made.append(tuning.tuned(SMALL, 1, target))
            made.append(tuning.tuned(SMALL, 1, target, worth_sharing=1e-9))
    finally:
        torch.set_num_threads(before)
    for alone, shared in zip(made[:3:2], made[3::2], strict=True):
        assert alone is not shared
        assert alone.tile == candidates(alone.spec, target, shared=False)[0]
        assert shared.tile == candidates(alone.spec, target, shared=True)[0]
        assert torch.equal(_result(alone), _result(shared))
    assert made[1] is made[4]
