"""The layers as stand-ins for torch's: same parameters, files, text and behaviour."""

import copy
import pickle
import re
from typing import NamedTuple

import pytest
import torch
from compare import assert_close
from torch import Tensor, nn

from groupconv import nn as our_nn
from groupconv.errors import ArgumentError


class Pair(NamedTuple):
    ours: type[nn.Module]
    theirs: type[nn.Module]
    dims: int


CONVS = [
    Pair(our_nn.GroupConv1d, nn.Conv1d, 1),
    Pair(our_nn.GroupConv2d, nn.Conv2d, 2),
    Pair(our_nn.GroupConv3d, nn.Conv3d, 3),
]
TRANSPOSED = [
    Pair(our_nn.GroupConvTranspose1d, nn.ConvTranspose1d, 1),
    Pair(our_nn.GroupConvTranspose2d, nn.ConvTranspose2d, 2),
    Pair(our_nn.GroupConvTranspose3d, nn.ConvTranspose3d, 3),
]
every_pair = pytest.mark.parametrize(
    "pair", [*CONVS, *TRANSPOSED], ids=lambda pair: pair.theirs.__name__
)
every_conv = pytest.mark.parametrize("pair", CONVS, ids=lambda pair: pair.theirs.__name__)
every_transposed = pytest.mark.parametrize(
    "pair", TRANSPOSED, ids=lambda pair: pair.theirs.__name__
)


def build(pair: Pair, *args: object, **kwargs: object) -> tuple[nn.Module, nn.Module]:
    """Ours, and torch's with the same parameters."""
    torch.manual_seed(0)
    ours, theirs = pair.ours(*args, **kwargs), pair.theirs(*args, **kwargs)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def image(pair: Pair, channels: int = 4, size: int = 6, batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    sizes = range(size, size + pair.dims)  # no two axes alike
    return torch.randn(batch, channels, *sizes)


@every_pair
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_and_repr(pair: Pair, bias: bool) -> None:
    kwargs = {"stride": 2, "padding": 1, "dilation": 3, "groups": 4, "bias": bias}
    ours, theirs = build(pair, 4, 8, 3, **kwargs)
    assert isinstance(ours, pair.theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == f"Group{theirs!r}"
    x = image(pair)
    assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)

    fresh = pair.theirs(4, 8, 3, **kwargs)
    result = ours.load_state_dict(fresh.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_close(ours(x), fresh(x), rtol=1e-5, atol=1e-6)


@every_pair
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_kernel_size_is_an_integer_or_one_per_axis(pair: Pair, kernel: int) -> None:
    for size in (kernel, (kernel,), [kernel] * pair.dims):
        layer = pair.ours(4, 4, size, groups=2)
        assert layer.kernel_size == (kernel,) * pair.dims
        assert layer.weight.shape[2:] == layer.kernel_size
    uneven = tuple(range(1, pair.dims + 1))
    assert pair.ours(4, 4, uneven, groups=2).weight.shape[2:] == uneven


@every_pair
def test_unbatched(pair: Pair) -> None:
    ours, theirs = build(pair, 4, 8, 3, stride=2, padding=1, groups=4)
    x = image(pair, batch=1)
    assert_close(ours(x[0]), theirs(x[0]), rtol=1e-5, atol=1e-6)
    assert_close(ours(x[0]), ours(x)[0], rtol=1e-6, atol=1e-6)


@every_pair
def test_meta_and_dtype(pair: Pair) -> None:
    layer = pair.ours(4, 8, 3, groups=2, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())
    x = image(pair)
    out = layer(x.to("meta", torch.bfloat16))
    assert out.is_meta
    assert out.shape == pair.theirs(4, 8, 3, groups=2)(x).shape
    with torch.device("meta"):
        assert pair.ours(4, 8, 3, groups=2).weight.is_meta


@every_pair
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_autocast(pair: Pair, groups: int) -> None:
    ours, theirs = build(pair, 4, 4, 3, groups=groups)
    x = image(pair)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = ours(x), theirs(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert_close(actual, ours(x), rtol=0.02, atol=0.02)


@every_pair
def test_deepcopy_and_pickle(pair: Pair) -> None:
    layer, _ = build(pair, 4, 8, 3, padding=1, groups=4)
    x = image(pair)
    expected = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(copied) is pair.ours
        assert_close(copied(x), expected, rtol=0, atol=0)
        nn.init.zeros_(copied.weight)
    assert_close(layer(x), expected, rtol=0, atol=0)


@every_conv
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_same_padding_keeps_the_size(pair: Pair, kernel: int) -> None:
    ours, theirs = build(pair, 4, 8, kernel, padding="same", dilation=2, groups=2)
    x = image(pair)
    assert ours(x).shape == (2, 8, *x.shape[2:])
    assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    by_number = pair.ours(4, 8, kernel, padding=kernel - 1, dilation=2, groups=2)
    by_number.load_state_dict(ours.state_dict())
    assert_close(ours(x), by_number(x), rtol=1e-5, atol=1e-6)


@every_conv
@pytest.mark.parametrize("padding", [2, "same", "valid"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes(pair: Pair, mode: str, padding: int | str) -> None:
    ours, theirs = build(pair, 4, 8, 3, padding=padding, padding_mode=mode, groups=4)
    x = image(pair)
    assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert_close(ours(x[0]), theirs(x)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(
    ("cls", "layout"),
    [
        (our_nn.GroupConv2d, torch.channels_last),
        (our_nn.GroupConvTranspose2d, torch.channels_last),
        (our_nn.GroupConv3d, torch.channels_last_3d),
    ],
)
def test_channels_last_is_kept(cls: type[nn.Module], layout: torch.memory_format, groups: int):
    torch.manual_seed(0)
    layer = cls(8, 8, 3, padding=1, groups=groups)
    x = torch.randn(2, 8, *[6] * cls._dims)
    expected = layer(x)
    layer.to(memory_format=layout)
    out = layer(x.to(memory_format=layout))
    assert out.is_contiguous(memory_format=layout)
    assert not out.is_contiguous()
    assert_close(out, expected, rtol=1e-5, atol=1e-5)


@every_transposed
def test_output_size(pair: Pair) -> None:
    ours, theirs = build(pair, 4, 8, 3, stride=2, groups=4)
    x = image(pair)
    least = [2 * (n - 1) + 3 for n in x.shape[2:]]
    most = [n + 1 for n in least]
    for size in (least, most, [2, 8, *most]):
        assert ours(x, size).shape[2:] == tuple(size[-pair.dims :])
        assert_close(ours(x, size), theirs(x, size), rtol=1e-5, atol=1e-6)
    assert_close(ours(x[0], most), theirs(x[0], most), rtol=1e-5, atol=1e-6)
    for size in ([n + 1 for n in most], [n - 1 for n in least], [*most, 1]):
        with pytest.raises(ArgumentError, match=rf"{pair.ours.__name__}: output_size=\["):
            ours(x, output_size=size)


@every_pair
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_input_of_another_shape(pair: Pair, mode: str) -> None:
    if mode != "zeros" and pair in TRANSPOSED:
        with pytest.raises(ArgumentError, match=f"padding_mode='{mode}'"):
            pair.ours(4, 4, 3, padding_mode=mode)
        return
    layer = pair.ours(4, 4, 3, padding=1, groups=2, padding_mode=mode)
    sizes = [5] * pair.dims
    for shape in ((5,), (*sizes, 5)[1:], (1, 1, 4, *sizes), (1, 4, *sizes[1:], 0)):
        with pytest.raises(ArgumentError, match=re.escape(f"input has shape {shape}")):
            layer(torch.ones(shape))
    with pytest.raises(ArgumentError, match=r"in_channels .*= 6"):
        layer(torch.ones(1, 6, *sizes))


def test_reset_parameters_keeps_torchs_draw() -> None:
    """One seed gives torch's weights for any groups, and torch's bias over sqrt(groups)."""
    for pair in (*CONVS, *TRANSPOSED):
        for groups in (1, 2, 4):
            torch.manual_seed(3)
            theirs = pair.theirs(8, 4, 3, groups=groups)
            torch.manual_seed(3)
            ours = pair.ours(8, 4, 3, groups=groups)
            assert torch.equal(ours.weight, theirs.weight)
            assert_close(ours.bias, theirs.bias / groups**0.5, rtol=1e-7, atol=0)
            if groups == 1:
                assert torch.equal(ours.bias, theirs.bias)


@every_pair
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_variance_of_a_fresh_layer(pair: Pair, groups: int) -> None:
    """Of an output that sees every tap, over many layers: 1/3 + 1/(3 fan_in), whatever groups.

    Weights are uniform with variance 1/(3 fan_in / groups), of which fan_in / groups add up; the
    bias has the dense layer's variance. torch's bias would add groups / (3 fan_in).
    """
    channels, kernel, layers = 4, 2, 1500
    torch.manual_seed(groups)
    layer = pair.ours(channels, channels, kernel, groups=groups)
    x = torch.ones(1, channels, *[kernel] * pair.dims)
    fan_in = channels * kernel**pair.dims
    middle = [kernel - 1 if layer.transposed else 0] * pair.dims
    outputs, biases = [], []
    with torch.no_grad():
        for _ in range(layers):
            layer.reset_parameters()
            outputs.append(layer(x)[(0, slice(None), *middle)])
            biases.append(layer.bias.clone())
    for drawn, variance in ((outputs, 1 / 3 + 1 / (3 * fan_in)), (biases, 1 / (3 * fan_in))):
        actual = torch.cat(drawn).double().var()
        assert_close(actual, torch.tensor(variance), rtol=0.05, atol=0)
