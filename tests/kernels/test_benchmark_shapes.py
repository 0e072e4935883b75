"""Every convolution that the benchmarks time, computed on native kernels and held to the truth.

Numbers are small integers, so that every sum in float32 is exact: a result is right to the last
bit, or wrong. Tensors lie between margins of NaN, and the output holds NaN before.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import FOLDER, Shape, read
from groupconv.kernels import kernel, tuning
from groupconv.kernels.candidates import candidates
from groupconv.kernels.kernel import Kernel
from groupconv.kernels.machine import runnable
from groupconv.kernels.native import Native
from groupconv.kernels.reference import group_conv_reference
from groupconv.kernels.request import Request
from groupconv.kernels.spec import ConvSpec, KernelSpec

# Largest integer, and elements on either side of a tensor.
_INTEGER, _MARGIN = 31, 1024
# One shape in so many is computed in every run.
_SPREAD = 5


def _shapes() -> list[Shape]:
    """One shape for each distinct convolution; of large batches two images."""
    found: dict[ConvSpec, Shape] = {}
    for path in sorted(FOLDER.glob("*.csv")):
        for shape in read(path):
            spec = replace(shape.spec, batch=min(2, shape.spec.batch))
            found.setdefault(spec, replace(shape, spec=spec))
    return list(found.values())


SHAPES = _shapes()


def _parameters() -> list[object]:
    found = []
    for i, shape in enumerate(SHAPES):
        marks = () if i % _SPREAD == 0 else (pytest.mark.slow,)
        found.append(pytest.param(shape, id=str(shape).replace(": ", "-"), marks=marks))
    return found


def _integers(*size: int) -> Tensor:
    return torch.randint(-_INTEGER, _INTEGER + 1, size).float()


def _between_margins(x: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    """A copy of ``x`` laid out as asked, and the memory that it lies in."""
    dense = (x.movedim(1, -1) if channels_last else x).contiguous()
    memory = torch.full((_MARGIN + x.numel() + _MARGIN,), math.nan)
    inside = memory[_MARGIN:-_MARGIN].view(dense.shape)
    inside.copy_(dense)
    return (inside.movedim(-1, 1) if channels_last else inside), memory


def test_every_file_is_here() -> None:
    assert {shape.network for shape in SHAPES} <= {path.stem for path in FOLDER.glob("*.csv")}
    assert len(SHAPES) > 150
    assert {len(shape.spec.input_size) for shape in SHAPES} == {1, 2}
    assert {shape.spec.batch for shape in SHAPES} == {1, 2}
    # Sums stay exact.
    taps = max(math.prod(shape.spec.weight_shape[1:]) for shape in SHAPES)
    assert (taps + 1) * _INTEGER**2 < 2**24


@pytest.mark.parametrize("shape", _parameters())
def test_equals_float64(shape: Shape) -> None:
    _check(shape)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SHAPES)), ids=[str(shape) for shape in SHAPES])
def test_another_tile_equals_float64(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a user's machine the clock may choose any of the candidates: here one of the others."""

    def tuned(spec: KernelSpec, images: int = 1) -> Kernel:
        machine = runnable()[0]
        tiles = candidates(spec, machine)
        others = tiles[1:] or tiles
        tile = replace(others[number % len(others)], ahead=number % 2 == 0)
        return kernel.load(spec, machine, tile, kernel.compile(spec, machine, tile))

    monkeypatch.setattr(tuning, "tuned", tuned)
    _check(SHAPES[number])


def _check(shape: Shape) -> None:
    spec = shape.spec
    torch.manual_seed(0)
    x = _integers(spec.batch, spec.in_channels, *spec.input_size)
    weight, bias = _integers(*spec.weight_shape), _integers(spec.out_channels)
    expected = group_conv_reference(spec, x, weight, bias)
    for channels_last in (False, True):
        native = Native(Request(spec, torch.float32, channels_last, channels_last, True, True))
        image, _ = _between_margins(x, channels_last)
        y, memory = _between_margins(torch.full_like(expected, math.nan).float(), channels_last)
        native.compute(image, native.pack(weight), bias, y)
        assert memory[:_MARGIN].isnan().all()
        assert memory[-_MARGIN:].isnan().all()
        assert torch.equal(y.double(), expected), f"channels_last={channels_last}"
