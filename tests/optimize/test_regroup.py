"""Layers that have groups already: fewer of them lose nothing, more of them are searched."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from compare import assert_close
from torch import Tensor, nn

import groupconv
from groupconv.errors import BudgetError
from groupconv.optimize.convert import convert
from groupconv.optimize.latency import Timed
from groupconv.optimize.partition import Partition
from groupconv.optimize.structure import DENSE, Grouped, Pair, dense_weight
from groupconv.optimize.trace import TracedConv, trace

pytestmark = pytest.mark.usefixtures("steady_clock")


def network(groups: int = 4, bias: bool = False) -> nn.Sequential:
    """A bottleneck of ResNeXt's kind, with batch norms that have seen something."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 32, 1, bias=bias), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=groups, bias=bias), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    net(torch.randn(32, 3, 10, 10))
    return net.eval()


def images() -> Tensor:
    return torch.randn(48, 3, 10, 10, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(6, 6, 1), (8, 12, 4), (6, 12, 6)])
def test_a_layer_in_groups_is_a_dense_one_with_zeros(
    layer: type[nn.Conv2d], inputs: int, outputs: int, groups: int
) -> None:
    conv = layer(inputs, outputs, 3, groups=groups, bias=False)
    dense = layer(inputs, outputs, 3, bias=False)
    dense.load_state_dict({"weight": dense_weight(conv)})
    x = torch.randn(2, inputs, *[5] * (conv.weight.ndim - 2))
    assert_close(dense(x), conv(x), rtol=1e-5, atol=1e-6)
    assert int((dense.weight != 0).sum()) == conv.weight.numel()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("settled", [DENSE, Partition.identity(2, 32, 32)], ids=["dense", "2"])
def test_fewer_groups_change_nothing(settled: Grouped | Partition, bias: bool) -> None:
    net, x = network(bias=bias), images()
    converted = convert(net, trace(net, (x[:2],)), {"4": settled})
    assert converted.model[4].groups == settled.groups
    assert converted.permutations == ()
    with torch.no_grad():
        assert_close(converted.model(x), net(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fastest", [1, 2])
def test_fewer_groups_where_the_target_is_faster_with_them(
    fastest: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A runtime without kernels for narrow groups; nothing is lost, whatever the budget."""

    def layer_times(
        layers: Mapping[str, tuple[TracedConv, Sequence[Timed]]], *_: object
    ) -> dict[str, list[float]]:
        return {
            name: [
                1e-4 if structure == Grouped(fastest) and name == "4" else 1e-3
                for structure, *_ in structures
            ]
            for name, (_, structures) in layers.items()
        }

    for module in ("planning", "finish"):
        monkeypatch.setattr(sys.modules[f"groupconv.optimize.{module}"], "layer_times", layer_times)
    net, x = network(), images()
    result = groupconv.optimize(net, x, out=tmp_path, budget="1Gmacs")
    assert result.model[4].groups == fastest
    assert list(result.plan.layers) == ["4"]
    assert result.report["agreement"] == 1
    (row,) = (row for row in result.report["layers"] if row["name"] == "4")
    assert (row["was"], row["groups"]) == ("groups=4", fastest)
    assert row["macs"] == {"before": 32 * 8 * 900, "after": 32 * 32 // fastest * 900}
    assert row["loss"] < 1e-6
    with torch.no_grad():
        assert_close(result.model(x), net(x), rtol=1e-4, atol=1e-5)
        assert_close(groupconv.load(tmp_path, network())(x), result.model(x), rtol=0, atol=0)
    assert groupconv.apply(net, x, result.plan).model[4].groups == fastest


def test_more_groups_find_blocks_in_the_blocks() -> None:
    """Planted in order: nothing is lost, and it takes half of the layer's multiply-adds."""
    net, x = network(), images()
    with torch.no_grad():
        weight = net[4].weight.view(4, 2, 4, 2, 4, 3, 3)
        weight[:, 0, :, 1] = weight[:, 1, :, 0] = 0
    result = groupconv.optimize(net, x, budget="93%macs", keep=["0", "1", "7", "10"])
    assert result.model[4].groups == 8
    with torch.no_grad():
        assert_close(result.model(x), net(x), rtol=1e-3, atol=1e-4)


def test_more_groups_lose_little_by_their_refit() -> None:
    net, x = network(), images()
    mapped = trace(net, (x[:2],))
    cut = convert(net, mapped, {"4": Partition.identity(8, 32, 32)}).model
    result = groupconv.apply(net, x, groupconv.Plan({"4": Grouped(8)}))
    assert result.model[4].groups == 8
    with torch.no_grad():
        right = net(x)
        errors = [float((other(x) - right).square().mean()) for other in (cut, result.model)]
    assert errors[1] < errors[0]


def test_a_pair_in_place_of_groups() -> None:
    """Written by hand: of full rank, with a group for each of the layer's, nothing is lost."""
    net, x = network(bias=True), images()
    result = groupconv.apply(net, x, groupconv.Plan({"4": Pair(32, 4, 1, False)}))
    with torch.no_grad():
        assert_close(result.model(x), net(x), rtol=1e-2, atol=1e-3)


def test_the_groups_that_a_layer_has_already_are_no_change() -> None:
    net, x = network(), images()
    assert groupconv.apply(net, x, groupconv.Plan({"4": Grouped(4)})).plan.layers == {}


def test_depthwise_layers_stay() -> None:
    net = network(groups=32)
    with pytest.raises(BudgetError, match="can't be met"):
        groupconv.optimize(net, images(), budget="90%macs", keep=["0", "1", "7", "10"])
