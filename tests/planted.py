"""Weights that a structure holds exactly, planted in dense layers."""

import copy

import torch
from torch import Tensor, nn

from groupconv.optimize.partition import Partition
from groupconv.optimize.structure import Pair


def ungrouped(conv: nn.Conv2d) -> Tensor:
    """The weights of a grouped convolution as those of a dense one, zero between the groups."""
    weight = torch.zeros(conv.out_channels, conv.in_channels, *conv.kernel_size)
    rows = torch.arange(conv.out_channels).chunk(conv.groups)
    columns = torch.arange(conv.in_channels).chunk(conv.groups)
    for some, inputs, block in zip(rows, columns, conv.weight.chunk(conv.groups), strict=True):
        weight[some[:, None], inputs] = block
    return weight


@torch.no_grad()
def plant_pair(conv: nn.Conv2d, pair: Pair) -> None:
    """Give a layer the weights of a random pair."""
    steps = pair.build(copy.deepcopy(conv), bias=True)
    first, second = steps["conv"], steps["pointwise"]
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    for part in (first, second):
        nn.init.normal_(part.weight, std=part.weight[0].numel() ** -0.5)
    taps, mixing = ungrouped(first), ungrouped(second)[..., 0, 0]
    if pair.shuffle:
        taps = nn.ChannelShuffle(pair.groups)(taps.transpose(0, 1)).transpose(0, 1)
    conv.weight.copy_(torch.einsum("om,mikl->oikl", mixing, taps))


@torch.no_grad()
def plant_groups(conv: nn.Conv2d, partition: Partition) -> None:
    """Set to zero the weights that the partition cuts."""
    keep = torch.zeros_like(conv.weight)
    columns = torch.tensor(partition.in_order).chunk(partition.groups)
    for rows, inputs in zip(
        torch.tensor(partition.out_order).chunk(partition.groups), columns, strict=True
    ):
        keep[rows[:, None], inputs] = 1
    conv.weight.mul_(keep)
