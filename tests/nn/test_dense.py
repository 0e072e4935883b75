"""Grouped convolutions written as dense ones."""

from pathlib import Path

import pytest
import torch
from torch import nn

import groupconv
from groupconv import nn as gnn
from groupconv.nn.dense import ungrouped

LAYERS = {
    "1-d": (nn.Conv1d(6, 4, 3, groups=2), (2, 6, 9)),
    "2-d": (nn.Conv2d(6, 9, 3, groups=3, padding=1, padding_mode="reflect"), (2, 6, 7, 8)),
    "ours": (gnn.GroupConv2d(8, 4, 3, groups=4, bias=False, stride=2), (1, 8, 7, 8)),
    "3-d": (nn.Conv3d(4, 6, 2, groups=2, dilation=2), (1, 4, 5, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_they_compute_the_same(kind: str) -> None:
    layer, shape = LAYERS[kind]
    net = nn.Sequential(layer).eval()
    groups, before = layer.groups, layer.weight.clone()
    dense = ungrouped(net)
    x = torch.randn(shape)
    torch.testing.assert_close(dense(x), net(x))
    assert dense[0].groups == 1
    assert dense[0].weight.count_nonzero() == before.numel()
    assert layer.groups == groups
    assert torch.equal(layer.weight, before)


def test_depthwise_and_dense_ones_stay() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 4, 1)).eval()
    same = ungrouped(net)
    assert [conv.groups for conv in same] == [4, 1]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), same.parameters(), strict=True))


def test_a_file_without_groups(tmp_path: Path) -> None:
    net, x = nn.Conv2d(8, 8, 3, groups=2).eval(), torch.randn(1, 8, 6, 6)
    found = groupconv.export(net, x, tmp_path / "net.pt2", dense=True)
    assert found.agreement.largest < 1e-5
    weights = torch.export.load(tmp_path / "net.pt2").state_dict
    assert weights["weight"].shape == (8, 8, 3, 3)
