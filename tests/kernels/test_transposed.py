"""Transposed convolutions as plain ones: every phase, in float64 and on kernels."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.kernel_cases import SWEEP, Case, Numbers, convolved, run, transposed
from torch import Tensor

from groupconv.kernels.candidates import candidates
from groupconv.kernels.machine import Machine, runnable
from groupconv.kernels.spec import ConvSpec, KernelSpec
from groupconv.kernels.transposed import Phase, phases

_TORCH: tuple[Callable[..., Tensor], ...] = (
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)


def _whole(conv: ConvSpec, x: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's transposed convolution."""
    pads = [before for before, _ in conv.padding]
    function = _TORCH[len(conv.input_size) - 1]
    return function(
        x, weight, None, conv.stride, pads, conv.output_padding, conv.groups, conv.dilation
    )


def _joined(conv: ConvSpec, parts: list[Phase], x: Tensor, weight: Tensor) -> Tensor:
    """The results of all phases where they belong, and how often each was written."""
    y = torch.zeros(len(x), conv.out_channels, *conv.output_size, dtype=torch.float64)
    times = torch.zeros(conv.output_size)
    for part in parts:
        place = tuple(slice(r, None, s) for r, s in zip(part.start, conv.stride, strict=True))
        y[..., *place] = convolved(part.conv, x, part.weight(weight))
        times[place] += 1
    assert times.max() <= 1
    return y


def _random(conv: ConvSpec) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (2, conv.in_channels, *conv.input_size)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    return x, torch.randn(conv.weight_shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_phases_are_the_whole(dims: int) -> None:
    @settings(SWEEP, max_examples=200)
    @given(conv=transposed(dims))
    def sweep(conv: ConvSpec) -> None:
        x, weight = _random(conv)
        parts = phases(conv)
        assert len(parts) <= math.prod(conv.stride)
        for part in parts:
            assert tuple(part.weight(weight).shape) == part.conv.weight_shape
            assert all(part.taps)
        actual = _joined(conv, parts, x, weight)
        assert_close(actual, _whole(conv, x, weight), rtol=1e-12, atol=1e-12)

    sweep()


def test_each_tap_belongs_to_one_phase() -> None:
    @settings(SWEEP, max_examples=200)
    @given(conv=transposed(1))
    def sweep(conv: ConvSpec) -> None:
        taps = [tap for part in phases(conv) for tap in part.taps[0]]
        assert len(set(taps)) == len(taps)
        assert set(taps) <= set(range(conv.kernel_size[0]))
        if conv.output_size[0] >= conv.stride[0]:
            assert len(taps) == conv.kernel_size[0]

    sweep()


def test_the_comparison_sees_a_wrong_phase() -> None:
    conv = ConvSpec(1, 4, 6, (5, 4), (3, 3), (2, 2), ((1, 1),) * 2, (1, 1), 2, True, (1, 0))
    x, weight = _random(conv)
    expected, parts = _whole(conv, x, weight), phases(conv)
    assert_close(_joined(conv, parts, x, weight), expected, rtol=1e-12, atol=1e-12)
    turned = dataclasses.replace(parts[-1], taps=tuple(taps[::-1] for taps in parts[-1].taps))
    for wrong in (parts[1:], [*parts[:-1], turned]):
        with pytest.raises(AssertionError):
            assert_close(_joined(conv, wrong, x, weight), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("target", runnable(), ids=lambda target: target.name)
def test_on_kernels(target: Machine) -> None:
    """Each phase writes its own outputs of one tensor, and no others; the sums are exact."""

    @settings(SWEEP, max_examples=12)
    @given(conv=transposed(2), last_in=st.booleans(), last_out=st.booleans())
    def sweep(conv: ConvSpec, last_in: bool, last_out: bool) -> None:
        x, weight = _random(conv)
        x, weight = (8 * x).round().float(), (8 * weight).round().float()
        y = torch.zeros(2, conv.out_channels, *conv.output_size)
        for part in phases(conv):
            spec = KernelSpec(
                part.conv, last_in, last_out, step=conv.stride, written_size=conv.output_size
            )
            case = Case(spec, candidates(spec, target)[0], 2, part.start)
            numbers = Numbers(x, part.weight(weight), None, None, None)
            # Nothing but the outputs of this phase stops being NaN.
            y += run(case, target, numbers).nan_to_num(0)
        expected = _whole(conv, x.double(), weight.double())
        assert_close(y, expected, rtol=0, atol=0)

    sweep()
