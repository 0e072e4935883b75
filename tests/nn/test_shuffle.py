"""Layers that only move channels."""

import copy
import pickle

import numpy as np
import pytest
import torch
from compare import assert_close
from torch import nn

from groupconv.errors import ArgumentError
from groupconv.nn import ChannelPermutation, ChannelShuffle, GroupConv2d, functional

ORDER = [2, 0, 3, 1, 5, 4]


@pytest.mark.parametrize("shape", [(2, 12, 5), (2, 12, 4, 5), (1, 12, 2, 3, 4)])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12])
def test_shuffle_interleaves(shape: tuple[int, ...], groups: int) -> None:
    """Output channel i * groups + q is input channel q * (C / groups) + i."""
    x = torch.randn(shape)
    out = ChannelShuffle(groups)(x)
    per_group = 12 // groups
    order = [q * per_group + i for i in range(per_group) for q in range(groups)]
    assert_close(out, x[:, order], rtol=0, atol=0)
    assert_close(functional.channel_shuffle(x, groups), out, rtol=0, atol=0)
    assert_close(ChannelPermutation(order)(x), out, rtol=0, atol=0)
    assert_close(nn.ChannelShuffle(groups)(x), out, rtol=0, atol=0)


def test_shuffle_lets_every_group_see_every_group() -> None:
    """Without it the second grouped layer never sees the other half of the input."""
    layers = [GroupConv2d(8, 8, 1, groups=2) for _ in range(2)]
    for shuffle, reached in ((ChannelShuffle(1), 4), (ChannelShuffle(2), 8)):
        x = torch.ones(1, 8, 1, 1, requires_grad=True)
        layers[1](shuffle(layers[0](x)))[0, 0].sum().backward()
        assert x.grad.count_nonzero() == reached


def test_identity_returns_the_same_object() -> None:
    x = torch.randn(2, 6, 4, 4)
    assert ChannelShuffle(1)(x) is x
    assert functional.channel_shuffle(x, 1) is x
    assert ChannelPermutation(range(6))(x) is x
    assert ChannelPermutation(ORDER)(x) is not x


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((2, 6, 4, 5), torch.channels_last), ((2, 6, 3, 4, 5), torch.channels_last_3d)],
)
def test_shuffle_keeps_channels_last(
    shape: tuple[int, ...], layout: torch.memory_format, groups: int
) -> None:
    x = torch.randn(shape)
    out = ChannelShuffle(groups)(x.to(memory_format=layout))
    assert out.is_contiguous(memory_format=layout)
    assert_close(out, ChannelShuffle(groups)(x), rtol=0, atol=0)


@pytest.mark.parametrize("layer", [ChannelShuffle(3), ChannelPermutation(ORDER)], ids=str)
def test_derivatives(layer: nn.Module) -> None:
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


@pytest.mark.parametrize("groups", [0, -1, 2.0, "2", None, True, (2,)])
def test_shuffle_refuses_groups(groups: object) -> None:
    with pytest.raises(ArgumentError, match="ChannelShuffle: groups="):
        ChannelShuffle(groups)
    with pytest.raises(ArgumentError, match="channel_shuffle: groups="):
        functional.channel_shuffle(torch.ones(1, 4, 4), groups)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shuffle_refuses_inputs(device: str) -> None:
    with pytest.raises(ArgumentError, match=r"groups=4.*nearest legal groups: 3, 6"):
        ChannelShuffle(4)(torch.ones(1, 6, 4, 4, device=device))
    with pytest.raises(ArgumentError, match=r"shape \(1, 4\)"):
        ChannelShuffle(4)(torch.ones(1, 4, device=device))


def test_shuffle_takes_numpys_integers() -> None:
    x = torch.randn(1, 6, 4)
    assert_close(ChannelShuffle(np.int64(2))(x), ChannelShuffle(2)(x), rtol=0, atol=0)
    assert repr(ChannelShuffle(2)) == repr(nn.ChannelShuffle(2))


@pytest.mark.parametrize("order", [ORDER, tuple(ORDER), torch.tensor(ORDER), np.array(ORDER)])
def test_permutation_takes_any_sequence(order: object) -> None:
    x = torch.randn(2, 6, 4)
    layer = ChannelPermutation(order)
    assert_close(layer(x), torch.stack([x[:, i] for i in ORDER], 1), rtol=0, atol=0)
    assert repr(layer) == "ChannelPermutation(6)"
    assert repr(ChannelPermutation([0, 1])) == "ChannelPermutation(2, identity)"


def test_permutation_does_not_follow_its_argument() -> None:
    order = torch.tensor(ORDER)
    layer = ChannelPermutation(order)
    order.zero_()
    assert layer.order.tolist() == ORDER


@pytest.mark.parametrize(
    "order",
    [
        [0, 0], [1, 2], [0, -1], [[0, 1]], [0.0, 1.7], [True, False], "10", None, 0,
        torch.tensor([0.0, 1.5]), torch.tensor(0), torch.tensor([[1, 0]]), np.array([0.5, 1.0]),
    ],
    ids=repr,
)  # fmt: skip
def test_permutation_refuses_orders(order: object) -> None:
    with pytest.raises(ArgumentError, match="ChannelPermutation: order="):
        ChannelPermutation(order)


@pytest.mark.parametrize("shape", [(1, 5, 4), (6,), (6, 4), (1, 7, 6)])
@pytest.mark.parametrize("order", [ORDER, range(6)], ids=["permutes", "identity"])
def test_permutation_refuses_inputs(order: list[int], shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match=r"expected \(N, 6, \*\)"):
        ChannelPermutation(order)(torch.ones(shape))


def test_permutation_survives_copies_and_casts() -> None:
    layer, x = ChannelPermutation(ORDER), torch.randn(2, 6, 4, 4)
    assert layer.state_dict() == {}
    assert layer.load_state_dict({}, strict=True)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_close(copied(x), layer(x), rtol=0, atol=0)
    half = copy.deepcopy(layer).half()
    assert half.order.dtype == torch.int64
    assert_close(half(x), layer(x), rtol=0, atol=0)


def test_permutation_built_on_meta_gets_its_order_with_its_memory() -> None:
    """to_empty() leaves buffers unset and the file does not hold the order."""
    with torch.device("meta"):
        layer = nn.Sequential(ChannelPermutation(ORDER))
    assert layer(torch.ones(2, 6, 4, device="meta")).shape == (2, 6, 4)
    layer.to_empty(device="cpu")
    x = torch.randn(2, 6, 4)
    assert_close(layer(x), x[:, ORDER], rtol=0, atol=0)
