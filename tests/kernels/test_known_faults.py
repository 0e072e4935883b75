"""Faults that people met elsewhere in grouped convolution: wrong numbers, crashes, slow paths.

Each has its right value, here on native kernels. Left out:

- a tensor of more than 2**31 elements on a GPU, and the weight gradient of such a tensor on an
  AMD GPU: no such device; tensors of more than 2**31 and 2**32 bytes are here;
- the memory of bfloat16 conv3d and the speed of float16 conv1d under autocast, on a GPU;
- MobileNetV3 on ARM: a measurement, which the profiler prints beside the multiply-adds;
- int8 slower than float16: kernels compute in float32 only.

Nothing here asserts a time: only that what is chosen is the fastest of what was measured.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor, nn

from groupconv.kernels import dispatch, jit, kernel, tuning
from groupconv.kernels.native import Native
from groupconv.kernels.reference import group_conv_reference
from groupconv.kernels.request import Request
from groupconv.kernels.spec import ACTIVATIONS, ConvSpec, KernelSpec, legal_groups
from groupconv.nn import (
    GroupConv1d,
    GroupConv2d,
    GroupConv3d,
    GroupConvTranspose1d,
    GroupConvTranspose2d,
    functional,
)
from groupconv.nn.explain import explain
from groupconv.timing import Timing

both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])


@pytest.fixture(autouse=True)
def _native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native kernels wherever they are legal, chosen anew."""
    monkeypatch.setenv("GROUPCONV_NATIVE", "1")
    monkeypatch.setattr(dispatch, "_choices", {})


@pytest.fixture
def _by_the_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a user's machine: what is fastest runs, and nothing is known yet."""
    monkeypatch.delenv("GROUPCONV_NATIVE")
    monkeypatch.setenv("GROUPCONV_TUNE", "1")
    monkeypatch.setenv("GROUPCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_known", {})


@contextmanager
def _only(name: str) -> Iterator[list[dict[str, str]]]:
    """Fail unless every call in the block runs on ``name``; gives why the others didn't."""
    ran: list[str] = []
    refused: list[dict[str, str]] = []
    with dispatch.listening(lambda choice, why: (ran.append(choice), refused.append(why))):
        yield refused
    assert ran
    assert set(ran) == {name}


@contextmanager
def _poisoned() -> Iterator[None]:
    """The memory that kernels write to holds NaN before."""
    compute = Native.compute

    def poisoned(self: Native, x: Tensor, weights: object, bias: object, y: Tensor) -> None:
        y.fill_(math.nan)
        compute(self, x, weights, bias, y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Native, "compute", poisoned)
        yield


def _laid_out(x: Tensor, channels_last: bool) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def _run(
    spec: ConvSpec, x: Tensor, weight: Tensor, bias: Tensor | None, channels_last: bool
) -> Tensor:
    """What the kernels make of it, in memory that held NaN."""
    biased = bias is not None
    native = Native(Request(spec, torch.float32, channels_last, channels_last, True, biased))
    y = torch.full((spec.batch, spec.out_channels, *spec.output_size), math.nan)
    y = _laid_out(y, channels_last)
    native.compute(_laid_out(x, channels_last), native.pack(weight), bias, y)
    return y


# Wrong numbers.


@both_layouts
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("channels", [(4, 16), (6, 9), (8, 8), (24, 40), (48, 36)], ids=str)
def test_impulse_reaches_its_own_group_only(
    channels: tuple[int, int], dims: int, transposed: bool, channels_last: bool
) -> None:
    """Elsewhere 4 to 16 channels in two groups gave zeros. Image i has a one in channel i."""
    inputs, outputs = channels
    for groups in legal_groups(inputs, outputs):
        wide_in, wide_out = inputs // groups, outputs // groups
        spec = ConvSpec(
            inputs, inputs, outputs, (1,) * dims, (1,) * dims, (1,) * dims, ((0, 0),) * dims,
            (1,) * dims, groups, transposed,
        )  # fmt: skip
        x = torch.eye(inputs).reshape(inputs, inputs, *spec.input_size)
        ones = torch.ones(spec.weight_shape)
        out = _run(spec, x, ones, None, channels_last).flatten(1)
        own = torch.arange(inputs)[:, None] // wide_in == torch.arange(outputs) // wide_out
        assert torch.equal(out, own.float()), groups
        # And each output sees the weight that it should.
        weight = torch.arange(1.0, ones.numel() + 1).reshape(spec.weight_shape)
        out = _run(spec, x, weight, None, channels_last)
        assert torch.equal(out.double(), group_conv_reference(spec, x, weight)), groups


def test_four_to_sixteen_channels_in_two_groups() -> None:
    x = torch.zeros(1, 4, 1, 1)
    x[0, 3] = 1
    with _only("native"):
        out = functional.group_conv2d(x, torch.ones(16, 2, 1, 1), groups=2)
    assert out.flatten().tolist() == [0] * 8 + [1] * 8


@both_layouts
@pytest.mark.parametrize("channels", range(1, 41))
def test_depthwise_at_every_number_of_channels(channels: int, channels_last: bool) -> None:
    """Vectors leave a remainder at some; elsewhere 24 were wrong. Each tap counts pixels."""
    x = _laid_out(torch.ones(1, channels, 6, 6), channels_last)
    weight = torch.ones(channels, 1, 3, 3, requires_grad=True)
    with _only("native"):
        out = functional.group_conv2d(x, weight, None, 2, 1, 1, channels)
    counts = torch.tensor([[4.0, 6, 6], [6, 9, 9], [6, 9, 9]])
    # At this stride the outputs count the same as the taps.
    assert torch.equal(out, counts.expand(1, channels, 3, 3))
    out.sum().backward()
    assert torch.equal(weight.grad, counts.expand(channels, 1, 3, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [1, 4])
def test_sum_of_four_ones_in_half_precision(channels: int, dtype: torch.dtype) -> None:
    x = torch.ones(1, channels, 2, 2, dtype=dtype)
    weight = torch.ones(channels, 1, 2, 2, dtype=dtype)
    with _only("native in float32"):
        out = functional.group_conv2d(x, weight, groups=channels)
    assert out.dtype == dtype
    assert out.flatten().tolist() == [4] * channels


def test_gradients_per_sample_add_up_to_the_batchs() -> None:
    """vmap is left to PyTorch, and must agree with what the kernels give without it."""
    torch.manual_seed(0)
    layer = GroupConv2d(6, 9, 3, padding=1, groups=3)
    x = torch.randn(5, 6, 7, 7)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    with _only("aten") as refused:
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    assert "vmap" in refused[0]["native"]
    with _only("native"):
        layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        assert_close(each[name].sum(0), p.grad, rtol=1e-4, atol=1e-3)


_ACTIVATION = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "sigmoid": torch.sigmoid,
}


@both_layouts
@pytest.mark.parametrize("groups", [1, 2, 4, 16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_reaches_every_group(activation: str, groups: int, channels_last: bool) -> None:
    """Elsewhere only the first group's channels were activated in NHWC."""
    torch.manual_seed(0)
    conv = ConvSpec(1, 16, 16, (8, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), groups)
    x, weight = 2 * torch.randn(2, 16, 8, 8), torch.randn(conv.weight_shape)
    bias, residual = torch.randn(16), torch.randn(2, 16, 8, 8)
    spec = KernelSpec(conv, channels_last, channels_last, True, "before", activation, slope=0.1)
    made = tuning.tuned(spec)
    y = _laid_out(torch.full((2, 16, 8, 8), math.nan), channels_last)
    given = (_laid_out(t, channels_last) for t in (x, residual))
    made(next(given), made.pack(weight), bias, y, next(given))
    before = group_conv_reference(conv, x, weight, bias) + residual
    expected = _ACTIVATION[activation](before)
    for group in range(groups):
        mine = slice(group * 16 // groups, (group + 1) * 16 // groups)
        assert (before[:, mine] < -3).any()
        assert (before[:, mine] > 6).any()
        assert_close(y[:, mine], expected[:, mine], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 64, 128])
def test_compiled_depthwise_equals_native(groups: int) -> None:
    """Forward and weight gradient; elsewhere they differed only with as many groups as channels.

    In float32 on a CPU, where no TF32 is used.
    """
    torch.manual_seed(0)
    layer = GroupConv2d(128, 128, 3, padding=1, groups=groups)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 128, 9, 9)
    with _only("native"):
        expected = layer(x)
    (slope,) = torch.autograd.grad(expected.square().mean(), layer.weight)
    actual = compiled(x)
    (compiled_slope,) = torch.autograd.grad(actual.square().mean(), layer.weight)
    torch._dynamo.reset()
    assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert_close(compiled_slope, slope, rtol=1e-4, atol=1e-6)


# Crashes and limits.


@both_layouts
@pytest.mark.parametrize(
    ("layer", "shape", "out_shape"),
    [
        *[
            (GroupConv2d(20, 20, 3, 1, 1, groups=g), (0, 20, 100, 100), (0, 20, 100, 100))
            for g in (1, 4, 20)
        ],
        (
            GroupConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1, groups=4),
            (0, 8, 5, 5),
            (0, 8, 10, 10),
        ),
    ],
    ids=str,
)
def test_empty_batch(
    layer: nn.Module, shape: tuple[int, ...], out_shape: tuple[int, ...], channels_last: bool
) -> None:
    """It is left to PyTorch; its gradients are zero, not memory that nobody set."""
    layer.zero_grad()
    x = _laid_out(torch.ones(shape), channels_last).requires_grad_()
    with _only("aten") as refused:
        out = layer(x)
    assert refused[0]["native"] == "a tensor is empty, or has no memory"
    assert out.shape == out_shape
    out.sum().backward()
    assert x.grad.shape == shape
    for p in layer.parameters():
        assert p.grad.shape == p.shape
        assert p.grad.count_nonzero() == 0


def _depthwise_equals_crops(height: int, width: int, stride: int, channels_last: bool) -> None:
    """One large image in 64 groups, against the truth on crops; the last lie farthest away."""
    torch.manual_seed(0)
    weight = torch.randint(-31, 32, (64, 1, 3, 3)).float()
    spec = ConvSpec(
        1, 64, 64, (height, width), (3, 3), (stride, stride), ((1, 1), (1, 1)), (1, 1), 64
    )
    # Numbers that repeat after a prime: much quicker to make than random ones.
    repeated = torch.randint(-31, 32, (1_000_003,)).float()
    x = _image(64, (height, width), channels_last)
    flat = (x.movedim(1, -1) if channels_last else x).view(-1)
    for start in range(0, flat.numel(), repeated.numel()):
        part = flat[start : start + repeated.numel()]
        part.copy_(repeated[: part.numel()])
    # Not through the functions: PyTorch would run once too, in as much memory again.
    native = Native(Request(spec, torch.float32, channels_last, channels_last, True, False))
    y = _image(64, spec.output_size, channels_last).fill_(math.nan)
    native.compute(x, native.pack(weight), None, y)
    rows, columns = spec.output_size
    size = 24
    for top, left in itertools.product((1, rows // 2, rows - size), (1, columns // 2)):
        # The last crop may end with the image.
        bottom, right = ((first + size - 1) * stride + 2 for first in (top, left))
        part = x[:, :, top * stride - 1 : bottom, left * stride - 1 : right].double()
        part = F.pad(part, (0, 0, 0, max(0, bottom - height)))
        expected = F.conv2d(part, weight.double(), None, stride, groups=64)
        crop = y[:, :, top : top + size, left : left + size]
        assert torch.equal(crop.double(), expected), (top, left)
    assert not any(channel.isnan().any() for channel in y[0])


def _image(channels: int, size: tuple[int, ...], channels_last: bool) -> Tensor:
    """Memory for one image, laid out without a copy."""
    if channels_last:
        return torch.empty(1, *size, channels).movedim(-1, 1)
    return torch.empty(1, channels, *size)


@both_layouts
@pytest.mark.parametrize("stride", [1, 4])
def test_large_depthwise(stride: int, channels_last: bool) -> None:
    _depthwise_equals_crops(280, 186, stride, channels_last)


@pytest.mark.slow
@both_layouts
def test_depthwise_beyond_31_bits(channels_last: bool) -> None:
    """Input and output of 2.2 GB each: more than 2**31 bytes; elsewhere a segmentation fault."""
    assert 4 * 64 * 4480 * 1880 > 2**31
    _depthwise_equals_crops(4480, 1880, 1, channels_last)


@pytest.mark.slow
@both_layouts
def test_depthwise_beyond_32_bits(channels_last: bool) -> None:
    """An input of 4.4 GB: more than 2**32 bytes."""
    assert 4 * 64 * 4480 * 3850 > 2**32
    _depthwise_equals_crops(4480, 3850, 4, channels_last)


@pytest.mark.parametrize("groups", [1, 16])
def test_transposed_view_of_length_one(groups: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1, 16).transpose(1, 2)
    weight = torch.randn(16, 16 // groups, 1)
    with _only("native"):
        out = functional.group_conv1d(x, weight, groups=groups)
    assert out.shape == (1, 16, 1)
    expected = (
        torch.einsum("oi,nil->nol", weight[:, :, 0], x)
        if groups == 1
        else x * weight.reshape(1, 16, 1)
    )
    assert_close(out, expected, rtol=1e-6, atol=1e-6)


@both_layouts
@pytest.mark.parametrize(
    ("cls", "kernel_size", "stride", "padding", "output_padding", "dilation", "size"),
    [
        (GroupConvTranspose1d, 3, 2, 0, 1, 1, (18,)),
        (GroupConvTranspose1d, 3, 3, 1, 2, 1, (24,)),
        (GroupConvTranspose2d, 3, 2, 0, 1, 1, (18, 12)),
        (GroupConvTranspose2d, 3, 3, 1, 2, 1, (24, 15)),
        # Some outputs, and whole rows of them, are reached by no tap at all.
        (GroupConvTranspose1d, 1, 2, 0, 1, 1, (16,)),
        (GroupConvTranspose2d, 2, 4, 0, 3, 1, (33, 21)),
        (GroupConvTranspose2d, 3, 2, 1, 1, 2, (18, 12)),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_output_padding_above_padding(
    cls: type[nn.Module],
    kernel_size: int,
    stride: int,
    padding: int,
    output_padding: int,
    dilation: int,
    size: tuple[int, ...],
    bias: bool,
    channels_last: bool,
) -> None:
    """Elsewhere the process ended. Outputs that no tap reaches hold the bias."""
    torch.manual_seed(0)
    layer = cls(4, 4, kernel_size, stride, padding, output_padding, 4, bias, dilation)
    x = _laid_out(torch.randn(1, 4, *(8, 5)[: len(size)]), channels_last)
    with _poisoned(), _only("native"):
        out = layer(x)
    assert out.shape == (1, 4, *size)
    layers = {GroupConvTranspose1d: F.conv_transpose1d, GroupConvTranspose2d: F.conv_transpose2d}
    wide = [None if t is None else t.double() for t in (x, layer.weight, layer.bias)]
    expected = layers[cls](*wide, stride, padding, output_padding, 4, dilation)
    assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_groups_from_a_shape() -> None:
    def smooth(image: Tensor) -> Tensor:
        channels = image.shape[1]
        weight = torch.ones(channels, 1, 3, 3) / 9
        return functional.group_conv2d(image, weight, groups=channels)

    torch.manual_seed(0)
    compiled = torch.compile(smooth, backend="aot_eager", dynamic=True)
    for channels in (3, 4):
        image = torch.randn(1, channels, 16, 16)
        expected = F.avg_pool2d(image.double(), 3, stride=1)
        with _only("native"):
            assert_close(smooth(image), expected, rtol=1e-5, atol=1e-6)
        assert_close(compiled(image), expected, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_one_channel_in_channels_last() -> None:
    """Its strides fit both layouts at once."""
    torch.manual_seed(0)
    layer = GroupConv2d(1, 5, 1)
    plain = torch.randn(1, 1, 7, 5)
    expected = plain * layer.weight.reshape(1, 5, 1, 1) + layer.bias.reshape(1, 5, 1, 1)
    for x in (plain, plain.contiguous(memory_format=torch.channels_last)):
        with torch.no_grad(), _only("native"):
            assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    for last_in, last_out in itertools.product((False, True), repeat=2):
        conv = ConvSpec(1, 1, 5, (7, 5), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 1)
        made = tuning.tuned(KernelSpec(conv, last_in, last_out, bias=True))
        y = _laid_out(torch.full((1, 5, 7, 5), math.nan), last_out)
        with torch.no_grad():
            made(plain, made.pack(layer.weight), layer.bias, y)
        assert_close(y, expected, rtol=1e-6, atol=1e-6)


# Speed: what is chosen is the fastest of what was measured.


@contextmanager
def _comparisons(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, float]]]:
    """Every comparison that is made in the block."""
    seen: list[dict[str, float]] = []
    compare = dispatch._compare

    def noted(*arguments: object) -> dict[str, float]:
        seen.append(compare(*arguments))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "_compare", noted)
        yield seen


_SWEEPS = [
    *[pytest.param((128, g, 14, 1), id=f"128 channels, {g} groups") for g in (1, 4, 32, 128)],
    *[
        pytest.param((128, g, 28, 2), marks=pytest.mark.slow, id=f"two images, {g} groups")
        for g in (1, 2, 4, 8, 16, 32, 128)
    ],
    *[pytest.param((64, g, 40, 1), id=f"64 channels, {g} groups") for g in (64, 32, 16, 8)],
]


@pytest.mark.usefixtures("_by_the_clock")
@pytest.mark.parametrize("sweep", _SWEEPS)
def test_the_fastest_is_chosen(
    sweep: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per number of groups by the clock, not by the arithmetic, which says little about it."""
    channels, groups, size, batch = sweep
    layer = GroupConv2d(channels, channels, 3, padding=1, groups=groups)
    x = torch.randn(batch, channels, size, size)
    with _comparisons(monkeypatch) as seen:
        (call,) = explain(layer, x).calls
    (times,) = seen
    assert times.keys() == {"native", "aten"}
    assert call.chosen == min(times, key=times.__getitem__)
    (slower,) = times.keys() - {call.chosen}
    assert call.refused[slower] == (
        f"{times[slower] * 1e6:.0f} us, {call.chosen} {times[call.chosen] * 1e6:.0f} us"
    )


@pytest.mark.usefixtures("_by_the_clock")
@pytest.mark.parametrize("faster", ["native", "aten"])
def test_the_clock_decides_either_way(faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(calls: dict[str, object], **_: object) -> dict[str, Timing]:
        return {name: Timing.of([1e-3 if name == faster else 4e-3]) for name in calls}

    monkeypatch.setattr(dispatch, "interleave", planted)
    layer = GroupConv2d(8, 8, 3, groups=4)
    (call,) = explain(layer, torch.randn(1, 8, 9, 9)).calls
    assert call.chosen == faster
    (why,) = (reason for name, reason in call.refused.items() if name in ("native", "aten"))
    assert why == f"4000 us, {faster} 1000 us"


@pytest.mark.usefixtures("_by_the_clock")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_goes_the_faster_way(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere 4 to 16 times slower than float32: here it is computed in float32 if that pays."""
    torch.manual_seed(0)
    layer = GroupConv2d(64, 64, 3, padding=1, groups=8, dtype=dtype)
    x = torch.randn(1, 64, 28, 28, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with _comparisons(monkeypatch) as seen:
        explanation = explain(layer, x)
    (call,), (times,) = explanation.calls, seen
    assert times.keys() == {"native in float32", "aten"}
    assert call.chosen == min(times, key=times.__getitem__)
    assert f"runs on {call.chosen}" in str(explanation)
    assert call.refused["native"] == f"the input is {dtype}, this takes torch.float32"
    wide = [t.double() for t in (x, layer.weight, layer.bias)]
    expected = F.conv2d(*wide, padding=1, groups=8)
    with torch.no_grad():
        assert_close(layer(x), expected, rtol=torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_three_axes_go_to_pytorch_and_say_why(groups: int) -> None:
    torch.manual_seed(0)
    layer = GroupConv3d(16, 16, 3, padding=1, groups=groups)
    x = torch.randn(1, 16, 4, 8, 8)
    explanation = explain(layer, x)
    (call,) = explanation.calls
    assert call.chosen == "aten"
    assert call.refused["native"] == "kernels have 1 or 2 spatial axes, the input has 3"
    assert f"not on native: {call.refused['native']}" in str(explanation)
    wide = [t.double() for t in (x, layer.weight, layer.bias)]
    assert_close(layer(x), F.conv3d(*wide, padding=1, groups=groups), rtol=1e-5, atol=1e-5)


@both_layouts
@pytest.mark.parametrize(
    ("channels", "size", "k"), [(48, (32, 32), (31, 31)), (768, (64,), (31,)), (40, (7, 5), (9, 9))]
)
def test_large_depthwise_kernels(
    channels: int, size: tuple[int, ...], k: tuple[int, ...], channels_last: bool
) -> None:
    """The same numbers as from the stock kernels, which are 10 to 20 times slower elsewhere."""
    torch.manual_seed(0)
    one, pads = (1,) * len(size), tuple((n // 2, n // 2) for n in k)
    spec = ConvSpec(1, channels, channels, size, k, one, pads, one, channels)
    x, bias = torch.randn(1, channels, *size), torch.randn(channels)
    weight = torch.randn(spec.weight_shape)
    out = _run(spec, x, weight, bias, channels_last)
    assert_close(out, group_conv_reference(spec, x, weight, bias), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
def test_both_layouts_give_the_same_numbers(width: int, dims: int) -> None:
    """Few channels per group are slow elsewhere where the layout is forced on them."""
    torch.manual_seed(0)
    channels, one = 2 * max(width, 16), (1,) * dims
    spec = ConvSpec(
        2, channels, channels, (9,) * dims, (3,) * dims, one, ((1, 1),) * dims, one,
        channels // width,
    )  # fmt: skip
    x, weight = torch.randn(2, channels, *spec.input_size), torch.randn(spec.weight_shape)
    bias = torch.randn(channels)
    expected = group_conv_reference(spec, x, weight, bias)
    contiguous, last = (_run(spec, x, weight, bias, flag) for flag in (False, True))
    assert_close(contiguous, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(last, contiguous)
    # Through the functions, the output is laid out as PyTorch's.
    ours, theirs = (
        getattr(space, f"{prefix}conv{dims}d")
        for space, prefix in ((functional, "group_"), (F, ""))
    )
    for flag in (False, True):
        given = (_laid_out(x, flag), weight, bias, 1, 1, 1, spec.groups)
        with _only("native"):
            out = ours(*given)
        assert out.stride() == theirs(*given).stride()
        assert torch.equal(out, contiguous)


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_switch_between_native_and_pytorch(
    dtype: torch.dtype, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GROUPCONV_NATIVE takes or leaves the kernels; the numbers are the same."""
    torch.manual_seed(0)
    layer = GroupConv2d(24, 36, 3, padding=1, groups=4, dtype=dtype)
    x = _laid_out(torch.randn(2, 24, 11, 10, dtype=dtype), channels_last)
    results, slopes = [], []
    for value, names in (("1", ("native", "native in float32")), ("0", ("aten", "aten"))):
        monkeypatch.setenv("GROUPCONV_NATIVE", value)
        monkeypatch.setattr(dispatch, "_choices", {})
        layer.zero_grad()
        with _only(names[dtype != torch.float32]) as refused:
            results.append(layer(x))
        if value == "0":
            assert refused[0]["native"] == "GROUPCONV_NATIVE=0"
        results[-1].square().sum().backward()
        slopes.append(layer.weight.grad.clone())
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert_close(*results, rtol=tolerance, atol=tolerance)
    assert_close(*slopes, rtol=tolerance, atol=tolerance * slopes[1].abs().max().item())


@pytest.mark.usefixtures("_by_the_clock")
@pytest.mark.parametrize("layer", [
    GroupConv1d(12, 12, 3, groups=12),
    GroupConv2d(12, 24, 3, groups=4),
    GroupConvTranspose2d(12, 12, 3, stride=2, groups=3),
], ids=str)  # fmt: skip
def test_second_call_of_a_kind_makes_nothing(
    layer: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call pays for code and for comparing; a new process pays for neither."""
    x = torch.randn(2, 12, *[9] * (layer.weight.ndim - 2))
    with torch.no_grad():
        first = layer(x)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("this was done before")

    for module, name in (
        (jit, "compile_object"),
        (kernel, "compile"),
        (tuning, "_measure"),
        (dispatch, "interleave"),
    ):
        monkeypatch.setattr(module, name, never)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(dispatch, "choose", never)
        patch.setattr(tuning, "tuned", never)
        assert torch.equal(layer(x.clone()), first)
        # Other weights are no other kind.
        for p in layer.parameters():
            p.mul_(2)
        assert_close(layer(x), 2 * first, rtol=1e-6, atol=1e-6)
    # As in a new process: only what lies on disk is known.
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(tuning, "_known", {})
    with torch.no_grad():
        assert_close(layer(x), 2 * first, rtol=1e-6, atol=1e-6)
