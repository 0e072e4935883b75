"""Structures: their costs against the modules they build, what a build keeps, and plain values."""

import json
import math

import pytest
import torch
from compare import assert_close
from torch import Tensor, nn

from groupconv.errors import ArgumentError, DataError
from groupconv.kernels.spec import ConvSpec
from groupconv.nn import ChannelShuffle, GroupConv2d
from groupconv.optimize.cost import count_macs
from groupconv.optimize.structure import (
    DENSE,
    Grouped,
    Pair,
    Structure,
    from_dict,
    macs,
    to_dict,
    weights,
)
from groupconv.optimize.trace import trace

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
STRUCTURES: list[Structure] = [
    DENSE,
    Grouped(4),
    Pair(6, 1, 1, False),
    Pair(8, 4, 1, False),
    Pair(16, 8, 1, False),
    Pair(8, 4, 2, True),
    Pair(24, 4, 12, True),
]
SETTINGS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 2, "padding": "valid", "bias": False},
]


def spec_of(conv: nn.Module, x: Tensor) -> ConvSpec:
    return trace(conv, (x,)).convs[0].spec


def counted_by_hand(net: nn.Module, x: Tensor) -> int:
    """Output elements of each convolution times the weights that make one of them."""
    total = 0

    def add(conv: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * conv.weight[0].numel()

    for module in net.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            module.register_forward_hook(add)
    net(x)
    return total


@pytest.mark.parametrize("structure", STRUCTURES[1::2], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_costs_are_those_of_the_modules(structure: Structure, settings: dict, dims: int) -> None:
    conv, x = KINDS[dims - 1](8, 12, **settings), torch.randn(2, 8, *[7] * dims)
    dense, shape = spec_of(conv, x), conv(x).shape
    structure.check("conv", conv)
    net = nn.Sequential(structure.build(conv, bias=True))
    convs = [m for m in net if isinstance(m, nn.modules.conv._ConvNd)]
    assert net(x).shape == shape
    assert weights(structure, dense) == sum(c.weight.numel() for c in convs)
    assert [s.weight_shape for s in structure.specs(dense)] == [
        tuple(c.weight.shape) for c in convs
    ]
    one = x[:1]
    assert macs(structure, dense) == count_macs(net, (one,)) == counted_by_hand(net, one)
    # The specs are those that a trace of the built modules finds.
    assert structure.specs(dense) == tuple(found.spec for found in trace(net, (x,)).convs)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_a_build_is_zeros_but_for_the_bias(structure: Structure) -> None:
    for had, wanted in ((True, False), (False, True), (False, False)):
        conv = nn.Conv2d(8, 12, 3, bias=had)
        steps = structure.build(conv, bias=wanted)
        names = {f"{name}.{key}" for name, m in steps.items() for key, _ in m.named_parameters()}
        last = "pointwise" if isinstance(structure, Pair) else "conv"
        assert (f"{last}.bias" in names) == (had or wanted)
        assert {n for n in names if n.endswith("bias")} <= {f"{last}.bias"}
        assert all(not m.weight.any() for m in steps.values() if hasattr(m, "weight"))


def test_a_cut_layer_keeps_its_own_bias() -> None:
    conv = nn.Conv2d(8, 12, 3)
    bias = conv.bias
    assert Grouped(2).build(conv, bias=True)["conv"].bias is bias


@pytest.mark.parametrize("structure", [Grouped(4), Pair(8, 4, 2, True)], ids=str)
def test_settings_of_the_layer_are_kept(structure: Structure) -> None:
    conv = nn.Conv2d(
        8, 12, 3, stride=2, padding=1, dilation=2, padding_mode="reflect", dtype=torch.float64
    ).requires_grad_(False)
    x = torch.randn(1, 8, 9, 9, dtype=torch.float64)
    expected = conv(x).shape
    net = nn.Sequential(structure.build(conv, bias=True))
    first = net.conv
    assert isinstance(first, nn.Conv2d)
    assert (first.stride, first.padding, first.dilation) == ((2, 2), (1, 1), (2, 2))
    assert first.padding_mode == "reflect"
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in net.parameters())
    assert net(x).shape == expected


@pytest.mark.parametrize("structure", [Grouped(4), Pair(8, 4, 2, True)], ids=str)
def test_device_and_class_are_kept(structure: Structure) -> None:
    conv = GroupConv2d(8, 12, 3, device="meta")
    steps = structure.build(conv, bias=True)
    assert {type(m) for m in steps.values()} - {ChannelShuffle} == {GroupConv2d}
    assert {p.device.type for m in steps.values() for p in m.parameters()} == {"meta"}


@pytest.mark.parametrize("structure", [Grouped(2), Pair(8, 2, 1, False)], ids=str)
@pytest.mark.parametrize(
    ("kind", "layout"),
    [(nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d)],
)
def test_memory_format_is_kept(
    structure: Structure, kind: type, layout: torch.memory_format
) -> None:
    for kept in (layout, torch.contiguous_format):
        conv = kind(8, 12, 3).to(memory_format=kept)
        weight = structure.build(conv, bias=True)["conv"].weight
        assert weight.is_contiguous(memory_format=kept)


def test_shuffle_is_torchs_and_order_says_so() -> None:
    pair = Pair(24, 4, 12, True)
    channels = torch.arange(24.0).reshape(1, 24, 1, 1)
    shuffled = pair.build(nn.Conv2d(8, 12, 1), bias=False)["shuffle"](channels)
    assert_close(shuffled, nn.ChannelShuffle(4)(channels), rtol=0, atol=0)
    assert_close(shuffled.flatten(), pair.order(), rtol=0, atol=0)
    assert Pair(24, 4, 12, False).order().tolist() == list(range(24))


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Grouped(3), r"layer: in_channels=8 not divisible by groups=3.*nearest legal groups: 2, 4"),
        (Grouped(8), r"layer: out_channels=12 not divisible by groups=8"),
        (Grouped(0), r"groups=0 must be a positive integer"),
        (Pair(6, 4, 1, False), r"layer: first of the pair: out_channels=6 not divisible"),
        (Pair(8, 4, 8, True), r"layer: second of it: out_channels=12 not divisible by groups=8"),
        (Pair(0, 1, 1, False), r"out_channels=0 must be a positive integer"),
    ],
)  # fmt: skip
def test_illegal_structures_are_named(structure: Structure, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        structure.check("layer", nn.Conv2d(8, 12, 1))


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_plain_values(structure: Structure) -> None:
    text = json.dumps(to_dict(structure))
    assert from_dict(json.loads(text)) == structure
    assert from_dict({**json.loads(text), "in_order": [1, 0]}) == structure


def test_plain_values_of_people() -> None:
    assert from_dict({"groups": 4}) == Grouped(4)
    with pytest.raises(
        DataError, match="structure='winograd' must be one of grouped, narrowed, pair"
    ):
        from_dict({"structure": "winograd"})


def test_every_structure_has_a_name_of_its_own() -> None:
    """Measured times are kept by it."""
    assert str(DENSE) == "dense"
    assert str(Grouped(4)) == "groups=4"
    assert str(Pair(6, 1, 1, False)) == "rank 6"
    assert str(Pair(16, 4, 4, True)) == "groups=4 to 16 channels, shuffled, + pointwise groups=4"
    pairs = [
        Pair(middle, groups, pointwise, shuffle)
        for middle in (8, 16)
        for groups in (1, 2, 4)
        for pointwise in (1, 2)
        for shuffle in (False, True)
        # One group has nothing to shuffle.
        if groups > 1 or not shuffle
    ]
    assert len({str(pair) for pair in pairs}) == len(pairs)


def test_batch_does_not_count() -> None:
    conv = nn.Conv2d(8, 12, 3)
    one, many = (spec_of(conv, torch.randn(n, 8, 6, 6)) for n in (1, 5))
    expected = math.prod((4, 4, 12, 8, 3, 3)) // 4
    assert macs(Grouped(4), one) == macs(Grouped(4), many) == expected
