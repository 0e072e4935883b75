"""Converted networks whose groups keep every nonzero weight compute what the original does."""

import pytest
import torch
from compare import assert_close
from torch import Tensor, nn

from groupconv.nn import ChannelPermutation
from groupconv.optimize.convert import convert
from groupconv.optimize.partition import Partition
from groupconv.optimize.trace import trace

CHANNELS = 8


class Tied(nn.Module):
    """A random chain of the ties between channels that the trace understands."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.kinds = kinds
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.layers = nn.ModuleList(self._layer(kind) for kind in kinds)
        self.fc = nn.Linear(CHANNELS, 5)

    @staticmethod
    def _layer(kind: str) -> nn.Module:
        conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=kind == "plain")
        if kind == "depthwise":
            return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)
        if kind == "excite":
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(CHANNELS, CHANNELS, 1))
        if kind == "pool":
            return nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.SiLU())
        norm = nn.BatchNorm2d(CHANNELS)
        with torch.no_grad():
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        return nn.Sequential(conv, norm, nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            if kind == "residual":
                x = x + layer(x)
            elif kind == "excite":
                x = x * torch.sigmoid(layer(x))
            else:
                x = layer(x)
        return self.fc(x.mean((2, 3)))


def _plant(conv: nn.Conv2d, groups: int) -> Partition:
    """Zero what lies outside random groups, and say which they are."""
    rows, columns = torch.randperm(conv.out_channels), torch.randperm(conv.in_channels)
    keep = torch.zeros(conv.out_channels, conv.in_channels)
    for outputs, inputs in zip(rows.chunk(groups), columns.chunk(groups), strict=True):
        keep[outputs[:, None], inputs[None, :]] = 1
    with torch.no_grad():
        conv.weight.mul_(keep[:, :, None, None])
    return Partition(groups, tuple(columns.tolist()), tuple(rows.tolist()))


@pytest.mark.parametrize("seed", range(25))
def test_reordering_alone_changes_nothing(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    kinds = ["plain", "residual", "depthwise", "excite", "pool", "chain"]
    picked = torch.randint(len(kinds), (5,), generator=generator)
    model = Tied(["chain", *(kinds[i] for i in picked)]).eval()
    x = torch.randn(2, 3, 6, 6)
    mapped = trace(model, (x,))
    partitions = {}
    for conv in mapped.convs:
        module = model.get_submodule(conv.name)
        if conv.spec.linear:
            continue
        assert isinstance(module, nn.Conv2d)
        if (
            conv.name != "stem"
            and conv.spec.groups == 1
            and torch.rand(1, generator=generator) < 0.7
        ):
            partitions[conv.name] = _plant(module, 2 if torch.rand(1) < 0.5 else 4)
    with torch.inference_mode():
        expected = model(x)
        converted = convert(model, mapped, partitions)
        assert_close(converted.model(x), expected, rtol=1e-5, atol=1e-5)
        assert_close(model(x), expected, rtol=0, atol=0)
    for name, partition in partitions.items():
        edit = converted.edits[name]
        assert edit.structure.groups == partition.groups


def test_a_free_order_is_absorbed_and_a_fixed_one_is_explicit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)
    )
    x = torch.randn(2, 3, 6, 6)
    inner, last = model[2], model[4]
    assert isinstance(inner, nn.Conv2d)
    assert isinstance(last, nn.Conv2d)

    def permutations(partitions: dict[str, Partition]) -> int:
        with torch.inference_mode():
            converted = convert(model, trace(model, (x,)), partitions)
            assert_close(converted.model(x), model(x), rtol=1e-5, atol=1e-5)
        return sum(isinstance(m, ChannelPermutation) for m in converted.model.modules())

    first = _plant(inner, 4)
    assert permutations({"2": first}) == 0
    second = _plant(last, 4)
    # The last layer's outputs leave the network: their order has to be restored.
    assert permutations({"4": second}) == 1
    # Both want their own order of the channels between them, and only one can have it.
    assert permutations({"2": first, "4": second}) == 2
