"""Tensors that share some of their channels, or hold them in other places."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from traced import after, before, conv, found, traced

from groupconv.optimize.spaces import Space


def test_concatenation_is_read_segment_by_segment() -> None:
    result = traced(
        lambda net, x: net.c(torch.cat([net.a(x), net.a2(x)], 1)), a2=conv(4, 3), c=conv(9, 2)
    )
    (first,), (second,) = (set(found(result, name).outputs.spaces) for name in ("a", "a2"))
    read = found(result, "c").inputs
    assert read.spaces == (first,) * 6 + (second,) * 3
    assert read.strands == (*range(6), *range(3))
    assert result.spaces[first] == Space(6, None)
    assert result.spaces[second] == Space(3, None)


def test_concatenation_with_itself_is_one_space_twice() -> None:
    result = traced(lambda net, x: net.c(torch.cat([net.a(x)] * 2, 1)), c=conv(12, 2))
    read = found(result, "c").inputs
    assert set(read.spaces) == set(found(result, "a").outputs.spaces)
    assert read.strands == (*range(6), *range(6))
    assert read.slots == (0,) * 6 + (1,) * 6


def test_slices_cut_a_space() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        left, right = net.a(x).split([2, 4], 1)
        return net.c(left) + net.d(right)

    result = traced(forward, c=conv(2, 2), d=conv(4, 2))
    assert before(result, "c") == Space(2, None)
    assert before(result, "d") == Space(4, None)
    outputs = found(result, "a").outputs
    assert outputs.spaces == found(result, "c").inputs.spaces + found(result, "d").inputs.spaces


def test_halves_that_meet_move_together() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        left, right = net.a(x).chunk(2, 1)
        return net.c(left * right.sigmoid())

    result = traced(forward, c=conv(3, 2))
    outputs = found(result, "a").outputs
    assert after(result, "a") == Space(3, None)
    assert outputs.strands == (0, 1, 2, 0, 1, 2)
    assert outputs.space is None


def test_shuffle_maps_channels() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.c(x.view(2, 2, 3, 8, 8).transpose(1, 2).reshape(2, 6, 8, 8))

    result = traced(forward, c=conv(6, 2))
    assert after(result, "a") == Space(6, None)
    assert found(result, "a").outputs.strands == (0, 1, 2, 3, 4, 5)
    assert found(result, "c").inputs.strands == (0, 3, 1, 4, 2, 5)


def test_sum_with_a_shuffle_of_itself_stays() -> None:
    result = traced(lambda net, x: net.c((y := net.a(x)) + F.channel_shuffle(y, 2)), c=conv(6, 2))
    # Channels 0 and 5 keep their places; the shuffle turns the others round in one cycle.
    assert found(result, "c").inputs.space is None
    assert all(result.spaces[s].channels <= 2 for s in found(result, "c").inputs.spaces)


@pytest.mark.parametrize(
    ("flat", "axes"), [("c h w", (0, 1, 2, 3)), ("h w c", (0, 2, 3, 1)), ("h c w", (0, 2, 1, 3))]
)
def test_flatten_into_linear(flat: str, axes: tuple[int, ...]) -> None:
    result = traced(
        lambda net, x: net.fc(F.avg_pool2d(net.a(x), 4).permute(axes).flatten(1)),
        fc=nn.Linear(24, 2),
    )
    assert after(result, "a") == Space(6, None)
    (weight,) = (m for m in result.members if (m.module, m.axis) == ("fc", 1))
    channel = {"c": "123456", "h": "ab", "w": "yz"}
    order = [
        next(p for p in parts if p.isdigit())
        for parts in itertools.product(*(channel[name] for name in flat.split()))
    ]
    assert [str(s + 1) for s in weight.runs.strands] == order
    assert sorted(weight.runs.slots) == sorted([0, 1, 2, 3] * 6)


def test_pixel_shuffle_moves_blocks() -> None:
    result = traced(
        lambda net, x: net.c(F.pixel_shuffle(net.a8(x), 2)), a8=conv(4, 8), c=conv(2, 3)
    )
    assert before(result, "c") == Space(2, None)
    assert found(result, "a8").outputs.strands == (0, 0, 0, 0, 1, 1, 1, 1)


def test_linear_then_view_then_transposed() -> None:
    result = traced(
        lambda net, x: net.up(net.fc(net.a(x).mean((2, 3))).view(2, 8, 4, 4)),
        fc=nn.Linear(6, 128),
        up=nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1),
    )
    assert result.skipped == {"up": "a transposed convolution"}
    (rows,) = (m for m in result.members if (m.module, m.parameter, m.axis) == ("fc", "weight", 0))
    assert rows.runs.strands == tuple(c for c in range(8) for _ in range(16))
    assert result.spaces[rows.runs.spaces[0]] == Space(8, None)
