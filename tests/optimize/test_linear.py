"""Linear layers: convolutions on no axes, which may become a product of two."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compare import assert_close
from torch import Tensor, nn

import groupconv
from groupconv.errors import DataError
from groupconv.kernels.spec import ConvSpec
from groupconv.optimize.convert import convert
from groupconv.optimize.menu import Candidate
from groupconv.optimize.pair import pair_shapes
from groupconv.optimize.partition import Partition
from groupconv.optimize.structure import Grouped, Pair, kind, macs, weights
from groupconv.optimize.survey import Survey
from groupconv.optimize.trace import trace

pytestmark = pytest.mark.usefixtures("steady_clock")

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
RANK = Pair(8, 1, 1, False)


class Classifier(nn.Module):
    """Two convolutions and three linear layers, the second of rank 8."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3)
        self.fc1 = nn.Linear(32, 64)
        self.fc2 = nn.Linear(64, 48, bias=not norm)
        self.norm = nn.BatchNorm1d(48) if norm else nn.Identity()
        self.fc3 = nn.Linear(48, 10)
        with torch.no_grad():
            self.fc2.weight.copy_(torch.randn(48, 8) @ torch.randn(8, 64) / 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3))
        x = torch.relu(self.norm(self.fc2(torch.relu(self.fc1(x)))))
        y: Tensor = self.fc3(x)
        return y


def outputs(net: nn.Module) -> Tensor:
    with torch.inference_mode():
        y: Tensor = net.eval()(X)
    return y


def test_they_are_traced_as_convolutions_on_no_axes() -> None:
    result = trace(Classifier().eval(), (X[:2],))
    assert [conv.name for conv in result.convs] == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    fc2 = result.convs[3]
    assert fc2.spec == ConvSpec(2, 64, 48, (), (), (), (), (), 1)
    assert fc2.then == ("relu",)
    assert fc2.spec.linear
    assert not result.convs[0].spec.linear
    assert fc2.inputs.spaces == result.convs[2].outputs.spaces
    assert macs(RANK, fc2.spec) == weights(RANK, fc2.spec) == 8 * (64 + 48)
    assert {(shape.groups, shape.pointwise_groups) for shape in pair_shapes(fc2.spec)} == {(1, 1)}


class Odd(nn.Module):
    """Linear layers that are left as they are."""

    def __init__(self, forward: Callable[["Odd", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.how = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda net, x: net.fc(net.fc(x)), "called 2 times in one pass"),
        (lambda net, x: net.fc(x) * net.fc.weight.sum(), "its weight is read by sum_1 too"),
        (lambda net, x: net.fc(x[:, None]), None),
    ],
)
def test_what_is_left_as_it_is(forward: Callable[[Odd, Tensor], Tensor], why: str | None) -> None:
    result = trace(Odd(forward).eval(), (X[:2],))
    assert "fc" not in [conv.name for conv in result.convs]
    assert (why in result.skipped["fc"]) if why else ("fc" not in result.skipped)


@pytest.mark.parametrize("norm", [False, True])
def test_a_low_rank_is_found_and_fitted(norm: bool, tmp_path: Path) -> None:
    """Beside a convolution in groups, whose channels the layers after it take in a new order."""
    net = Classifier(norm).eval()
    planted = torch.arange(16).reshape(2, 8).flatten() % 2
    with torch.no_grad():
        rows = torch.arange(32) % 2
        net.conv2.weight[rows[:, None] != planted] = 0
    expected = outputs(net)
    plan = groupconv.Plan({"conv2": Grouped(2), "fc2": RANK}, {}, "by hand", "eager", 0, None)
    result = groupconv.apply(net, X, plan, out=tmp_path)
    first, second = result.model.fc2.conv, result.model.fc2.pointwise
    assert (type(first), type(second)) == (nn.Linear, nn.Linear)
    assert (first.bias, first.out_features, second.in_features) == (None, 8, 8)
    assert_close(outputs(result.model), expected, rtol=1e-3, atol=1e-3)
    loaded = groupconv.load(tmp_path, Classifier(norm))
    assert_close(outputs(loaded), outputs(result.model), rtol=0, atol=0)


def test_one_that_stays_dense_is_built_as_a_convolution_is() -> None:
    """Its weights kept, with a bias to take the mean where it has none."""
    net = Classifier().eval()
    net.fc2.bias = None
    expected = outputs(net)
    made = convert(net, trace(net, (X[:2],)), {"fc2": Grouped(1)}).model
    assert type(made.fc2) is nn.Linear
    assert_close(made.fc2.bias, torch.zeros(48), rtol=0, atol=0)
    assert_close(outputs(made), expected, rtol=0, atol=0)


def test_it_is_chosen_where_it_loses_least() -> None:
    net = Classifier().eval()
    result = groupconv.optimize(net, X, budget="90%params", keep=["conv*", "fc1", "fc3"])
    settled = result.plan.layers["fc2"]
    assert isinstance(settled, Pair)
    # The narrowest that is exact.
    assert settled.middle == 8
    assert_close(outputs(result.model), outputs(net), rtol=1e-3, atol=1e-3)
    (row,) = result.report["layers"]
    assert row["structure"] == f"rank {settled.middle}"


def test_the_classifier_is_the_last_layer() -> None:
    plan = groupconv.plan(Classifier().eval(), X, budget="75%params")
    assert plan.layers
    assert not plan.layers.keys() & {"conv1", "fc3"}
    alone = groupconv.plan(Classifier().eval(), X, budget="60%params", keep="last")
    assert "fc3" not in alone.layers


@pytest.mark.parametrize(
    ("settled", "why"),
    [
        (Partition.identity(2, 64, 48), "fc2: groups=2 can't stand in place of a linear layer"),
        (Pair(8, 2, 1, False), "fc2: groups=2 to 8 channels .* can't stand in place of a linear"),
        (Pair(48, 2, 2, True), "fc2: .* a low rank can: a pair with groups=1"),
        (Pair(0, 1, 1, False), "fc2: first of the pair: out_channels=0 must be a positive"),
    ],
)
def test_other_structures_are_refused(settled: Partition | Pair, why: str) -> None:
    net = Classifier().eval()
    with pytest.raises(DataError, match=why):
        convert(net, trace(net, (X[:2],)), {"fc2": settled})


def test_wide_ones_get_no_low_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their components would not be found in time; channels they may lose."""
    from groupconv.optimize import planning

    monkeypatch.setattr(planning, "_WIDE", 40)
    seen: list[Survey] = []
    make = planning.Survey

    def survey(*given: dict[str, list[Candidate]]) -> Survey:
        seen.append(make(*given))
        return seen[-1]

    monkeypatch.setattr(planning, "Survey", survey)
    groupconv.plan(copy.deepcopy(Classifier()).eval(), X, budget="90%params", keep=["first"])
    others = {
        name: {kind(candidate.structure) for candidate in menu[1:]} - {"narrowed"}
        for name, menu in seen[0].menus.items()
    }
    assert {name for name, kinds in others.items() if kinds} == {"conv2", "fc1", "fc3"}
