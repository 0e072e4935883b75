"""Grouped convolutions as dense ones: zeros between channels of different groups."""

import copy

import torch
from torch import Tensor, nn


@torch.no_grad()
def ungrouped(model: nn.Module) -> nn.Module:
    """A copy that computes the same without grouped convolutions, for hardware that has none.
    Depthwise ones, which all hardware has, stay.

    Args:
        model: left as it was.
    """
    net = copy.deepcopy(model)
    for conv in net.modules():
        if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        if 1 < conv.groups < conv.in_channels:
            conv.weight = nn.Parameter(expanded(conv.weight, conv.groups))
            conv.groups = 1
    return net


def expanded(weight: Tensor, groups: int) -> Tensor:
    """``(C_out, C_in, *k)`` of ``(C_out, C_in / groups, *k)``: zeros between the groups."""
    parts = weight.unflatten(0, (groups, -1))
    whole = weight.new_zeros(*parts.shape[:2], groups, *parts.shape[2:])
    same = torch.arange(groups)
    whole[same, :, same] = parts
    return whole.flatten(2, 3).flatten(0, 1)
