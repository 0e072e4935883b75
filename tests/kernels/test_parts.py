"""Convolutions of every kind from their parts, as one who keeps records calls them: by name."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.kernel_cases import (
    SWEEP,
    WORK,
    Margins,
    activated,
    check_gaps,
    convolved,
    convs,
    from_layout,
    laid_out,
    same_bits,
    transposed,
)
from torch import Tensor

from groupconv.errors import ArgumentError
from groupconv.kernels.machine import runnable
from groupconv.kernels.module import RECORD
from groupconv.kernels.parts import Parts, parts
from groupconv.kernels.reference import group_conv_reference
from groupconv.kernels.spec import ACTIVATIONS, RESIDUALS, ConvSpec

pytestmark = pytest.mark.skipif(not runnable(), reason="no code for this processor")

_NONE = ((0, 0), (0, 0))
KINDS = {
    "pointwise": ConvSpec(1, 9, 20, (10, 14), (1, 1), (1, 1), _NONE, (1, 1), 1),
    "one row": ConvSpec(1, 12, 8, (23,), (5,), (2,), ((2, 1),), (1,), 4),
    "pointwise row": ConvSpec(1, 12, 8, (23,), (1,), (1,), ((0, 0),), (1,), 4),
    "grouped": ConvSpec(1, 12, 18, (8, 7), (3, 3), (1, 2), ((1, 1), (1, 0)), (1, 1), 3),
    "upsampling": ConvSpec(1, 10, 6, (5, 6), (4, 4), (2, 2), ((1, 1), (1, 1)), (1, 1), 2, True),
    "doubling": ConvSpec(1, 10, 17, (5, 6), (2, 2), (2, 2), _NONE, (1, 1), 1, True),
    "sparse": ConvSpec(1, 8, 8, (4, 3), (2, 3), (3, 2), _NONE, (1, 1), 8, True, (1, 1)),
    "transposed row": ConvSpec(1, 8, 6, (9,), (5,), (3,), ((2, 2),), (1,), 2, True, (1,)),
}


@st.composite
def kinds(draw: st.DrawFn) -> ConvSpec:
    """Convolutions of one or two axes, plain or transposed."""
    if draw(st.booleans()):
        return draw(transposed(draw(st.sampled_from([1, 2]))))
    conv = draw(convs(False))
    if draw(st.booleans()):
        return conv
    axes = ("input_size", "kernel_size", "stride", "padding", "dilation")
    return replace(conv, **{name: getattr(conv, name)[1:] for name in axes})


@st.composite
def rests(draw: st.DrawFn, conv: ConvSpec) -> dict[str, Any]:
    """What is done beside the convolution, and where its tensors lie."""
    last_in, last_out = draw(st.booleans()), draw(st.booleans())
    residual = draw(st.sampled_from([None, *RESIDUALS]))
    into, out = conv.in_channels, conv.out_channels
    more = st.sampled_from([0, 1, 3, 8, 33])
    found = {
        "channels_last_input": last_in,
        "channels_last_output": last_out,
        "bias": draw(st.booleans()),
        "residual": residual,
        "activation": draw(st.sampled_from([None, *ACTIVATIONS])),
        "slope": 0.25,
        "ordered": draw(st.booleans()),
        "input_pixel": into + draw(more) if last_in else None,
        "output_pixel": out + draw(more) if last_out else None,
        "residual_pixel": out + draw(more) if last_out and residual else None,
    }
    return found


def _integers(*size: int) -> Tensor:
    return torch.randint(-31, 32, size).float()


def _reached(conv: ConvSpec) -> Tensor:
    """Which outputs a tap can reach, from the definition."""
    if not conv.transposed:
        return torch.ones(conv.output_size, dtype=torch.bool)
    found = torch.ones((), dtype=torch.bool)
    for n, k, s, (pad, _), d in zip(
        conv.output_size, conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True
    ):
        axis = [any((o + pad - tap * d) % s == 0 for tap in range(k)) for o in range(n)]
        found = found.unsqueeze(-1) & torch.tensor(axis)
    return found


def _check(
    conv: ConvSpec, rest: dict[str, Any], whole: Parts, images: int = 2, threads: int = 2
) -> None:
    """All parts on one tensor: right where a tap reaches, and nothing else written."""
    reached = _reached(conv)
    assert whole.sparse == (not reached.all())
    torch.manual_seed(0)
    unit = 2.0 ** -round(math.log2(200 * math.sqrt(math.prod(conv.weight_shape[1:]))))
    x = _integers(images, conv.in_channels, *conv.input_size)
    weight = _integers(*conv.weight_shape) * unit
    bias = _integers(conv.out_channels) * (31 * unit) if rest["bias"] else None
    size = (images, conv.out_channels, *conv.output_size)
    residual = _integers(*size) * (31 * unit) if rest["residual"] else None
    order = torch.randperm(conv.in_channels) if rest["ordered"] else None

    seen = x if order is None else x[:, order]
    result = (
        group_conv_reference(conv, seen, weight)
        if conv.transposed
        else convolved(conv, seen, weight)
    )
    if bias is not None:
        result = result + bias.double().reshape(-1, *[1] * len(conv.output_size))
    if residual is not None and rest["residual"] == "before":
        result = result + residual
    if whole.parts:
        result = activated(whole.parts[0].spec, result)
    if residual is not None and rest["residual"] == "after":
        result = result + residual
    expected = torch.where(reached, result, math.nan)

    actual = _run(whole, rest, size, threads, (x, weight, bias, residual, order))
    exact = rest["activation"] in (None, "relu", "relu6")
    rtol, atol = (0.0, 0.0) if exact else (1e-6, 1e-5)
    assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


def _run(
    whole: Parts,
    rest: dict[str, Any],
    size: tuple[int, ...],
    threads: int,
    given: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    """What the parts write, on records of their own; as calls of the kernels would."""
    x, weight, bias, residual, order = given
    last_in, last_out = rest["channels_last_input"], rest["channels_last_output"]
    pixels = [rest[f"{name}_pixel"] or 0 for name in ("input", "output", "residual")]
    memory = Margins()
    x_memory = memory.put(laid_out(x, last_in, pixels[0]))
    ys = [
        memory.put(laid_out(torch.full(size, math.nan), last_out, pixels[1]), fixed=False)
        for _ in range(2)
    ]
    beside = None if residual is None else memory.put(laid_out(residual, last_out, pixels[2]))
    bias, order = (None if t is None else memory.put(t) for t in (bias, order))
    for part in whole.parts:
        kernel = part.kernel(len(x))
        packed = memory.put(kernel.pack(part.weight(weight)))
        buffer = memory.put(torch.full((threads * kernel.buffer,), math.nan), fixed=False)
        values = {
            "x": x_memory.data_ptr(),
            "w": packed.data_ptr(),
            "bias": 0 if bias is None else bias.data_ptr(),
            "residual": 0 if beside is None else beside.data_ptr() + 4 * part.residual_offset,
            "order": 0 if order is None else order.data_ptr(),
            "y": ys[0].data_ptr() + 4 * part.offset,
            "buffer": buffer.data_ptr(),
            "images": len(x),
            "rows": kernel.tile.rows,
            "blocks": kernel.tile.blocks,
            "share": kernel.buffer,
            "x_image": kernel.spec.input_image,
            "y_image": kernel.spec.output_image,
            "w_image": 0,
        }
        record = torch.tensor([values[name] for name in RECORD])
        for thread in range(threads):
            WORK(kernel.work)(record.data_ptr(), thread, threads)
        kernel(
            from_layout(x_memory, tuple(x.shape), last_in, pixels[0]),
            packed, bias, ys[1], beside, order, part.offset,
        )  # fmt: skip
    memory.check()
    for y in ys:
        if last_out:
            check_gaps(y, size, pixels[1])
    first, second = (from_layout(y, size, last_out, pixels[1]) for y in ys)
    assert same_bits(first, second)
    return first


def _sweep(count: int) -> None:
    @settings(SWEEP, max_examples=count)
    @given(data=st.data(), conv=kinds(), threads=st.integers(1, 4))
    def sweep(data: st.DataObject, conv: ConvSpec, threads: int) -> None:
        rest = data.draw(rests(conv))
        _check(conv, rest, parts(conv, **rest), threads=threads)

    sweep()


def test_any_convolution_is_right() -> None:
    _sweep(12)


@pytest.mark.slow
def test_any_convolution_is_right_long() -> None:
    _sweep(150)


@pytest.mark.parametrize("residual", [None, *RESIDUALS])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_on_slices(name: str, residual: str | None) -> None:
    conv = KINDS[name]
    rest = {
        "channels_last_input": True, "channels_last_output": True, "bias": True,
        "residual": residual, "activation": "relu6" if residual else "silu", "ordered": False,
        "input_pixel": conv.in_channels + 5, "output_pixel": conv.out_channels + 3,
        "residual_pixel": conv.out_channels + 8 if residual else None,
    }  # fmt: skip
    _check(conv, rest, parts(conv, **rest))


def test_the_comparison_sees_a_part_at_a_wrong_place() -> None:
    conv = KINDS["upsampling"]
    rest = dict.fromkeys(
        ("residual", "activation", "input_pixel", "output_pixel", "residual_pixel"), None
    )
    rest |= {"channels_last_input": True, "channels_last_output": True}
    rest |= {"bias": False, "ordered": False}
    whole = parts(conv, **rest)
    _check(conv, rest, whole)
    first, second, *others = whole.parts
    assert first.phase is not None
    assert second.phase is not None
    swapped = (
        replace(first, phase=replace(first.phase, start=second.phase.start)),
        replace(second, phase=replace(second.phase, start=first.phase.start)),
    )
    with pytest.raises(AssertionError, match="not equal"):
        _check(conv, rest, Parts((*swapped, *others), sparse=False))


def test_which_are_sparse() -> None:
    assert [name for name, conv in KINDS.items() if parts(conv).sparse] == ["sparse"]


def test_offsets_are_those_of_the_wider_tensor() -> None:
    """In NCHW they count within a plane."""
    conv = KINDS["upsampling"]
    wide = parts(conv, residual="after", output_pixel=11, residual_pixel=20).parts
    planes = parts(conv, channels_last_output=False, residual="after").parts
    width = conv.output_size[1]
    pixels = [0, 1, width, width + 1]
    assert [part.offset for part in wide] == [11 * pixel for pixel in pixels]
    assert [part.residual_offset for part in wide] == [20 * pixel for pixel in pixels]
    assert [part.offset for part in planes] == pixels
    assert [part.residual_offset for part in planes] == pixels


def test_any_batch_and_dense_distances_are_the_same_parts() -> None:
    conv = KINDS["grouped"]
    dense = parts(
        replace(conv, batch=7), residual="before", input_pixel=12, output_pixel=18,
        residual_pixel=18,
    )  # fmt: skip
    assert dense == parts(conv, residual="before")


def test_what_breaks_a_rule_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"input_pixel=11 must be an integer >= 12"):
        parts(KINDS["grouped"], input_pixel=11)
    with pytest.raises(ArgumentError, match=r"output_pixel=18 needs channels last"):
        parts(KINDS["grouped"], channels_last_output=False, output_pixel=18)
