"""What the result is held against: cut as it comes, random groups, channels pruned."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from compare import assert_close
from networks import images, residual
from random_networks import RandomNetwork
from torch import Tensor, nn
from traced import Net, capture, conv, found

from groupconv.errors import ArgumentError, BudgetError, DataError
from groupconv.kernels.spec import legal_groups
from groupconv.nn import ChannelPermutation
from groupconv.optimize.baselines import plain_cut, pruned, random_groups
from groupconv.optimize.cost import count_macs
from groupconv.optimize.prune import importance, prunable, prune, strongest
from groupconv.optimize.sampling import Sampling
from groupconv.optimize.trace import trace

GROUPS = {"conv1": 4, "conv2": 2}
X = images()
SECONDS = 1e-9


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor = X) -> Tensor:
    return model(x)


def error(model: nn.Module, other: nn.Module) -> float:
    expected = outputs(model)
    return float((outputs(other) - expected).norm() / expected.norm())


def seconds(net: nn.Module) -> float:
    """A latency in proportion to the MACs."""
    return SECONDS * count_macs(net, (X[:1],))


def sample(x: Tensor, seed: int = 0) -> Sampling:
    return Sampling(lambda: x.split(32), images=len(x), max_positions=4_000, seed=seed)


def test_plain_cut_is_the_network_with_blocks_of_its_weights() -> None:
    net = residual()
    cut = plain_cut(net, trace(net, (X,)), GROUPS)
    masked = residual()
    for name, groups in GROUPS.items():
        width = 16 // groups
        block = torch.arange(16) // width
        layer = masked.get_submodule(name)
        layer.weight.data[block[:, None] != block] = 0
        assert (cut.get_submodule(name).groups, type(cut.get_submodule(name))) == (
            groups,
            nn.Conv2d,
        )
    assert_close(outputs(cut), outputs(masked), rtol=1e-5, atol=1e-5)
    assert error(net, cut) > 0.05


@pytest.mark.parametrize("make", [plain_cut, random_groups])
def test_groups_that_cannot_be(make: Callable[..., nn.Module]) -> None:
    net = residual()
    mapped = trace(net, (X,))
    more = () if make is plain_cut else (sample(X),)
    with pytest.raises(DataError, match="groups: layer 'nowhere' can't be cut: no such layer"):
        make(net, mapped, {"nowhere": 2}, *more)
    with pytest.raises(DataError, match=r"fc: groups=2 can't stand in place of a linear layer"):
        make(net, mapped, {"fc": 2}, *more)
    with pytest.raises(DataError, match=r"plan: conv1: .*nearest legal groups"):
        make(net, mapped, {"conv1": 3}, *more)


def test_random_groups_are_refitted() -> None:
    net = residual()
    mapped = trace(net, (X,))
    plain = error(net, plain_cut(net, mapped, GROUPS))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    weights = []
    for seed in range(3):
        cut = random_groups(net, mapped, GROUPS, sample(X, seed))
        assert {name: cut.get_submodule(name).groups for name in GROUPS} == GROUPS
        assert error(net, cut) < 0.8 * plain
        weights.append(cut.conv1.weight)
    again = random_groups(net, mapped, GROUPS, sample(X, 2))
    assert torch.equal(again.conv1.weight, weights[2])
    assert not torch.equal(weights[0], weights[1])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_random_groups_are_random() -> None:
    """Which inputs meet in a group of a lone layer between two others, over many seeds."""
    torch.manual_seed(0)
    net = Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 8), c=conv(8, 2)).eval()
    mapped, together = trace(net, (X,)), np.zeros((8, 8))
    for seed in range(60):
        cut = random_groups(net, mapped, {"b": 2}, sample(X[:4], seed))
        # The rows of the stem's bias say which channel stands where.
        order = [(net.a.bias == value).nonzero().item() for value in cut.a.bias]
        for group in (order[:4], order[4:]):
            together[np.ix_(group, group)] += 1
    off = together[~np.eye(8, dtype=bool)] / 60
    # 3 of the 7 others share a group with each: 0.43, with a standard error of 0.064.
    assert np.abs(off - 3 / 7).max() < 0.26
    assert not any(isinstance(m, ChannelPermutation) for m in cut.modules())


@pytest.mark.parametrize("seed", range(5))
def test_random_groups_need_no_permutation(seed: int) -> None:
    net, x = RandomNetwork(seed), torch.randn(4, 3, 8, 8)
    mapped, rng = trace(net, (x,)), np.random.default_rng(seed)
    legal = {
        layer.name: legal_groups(layer.spec.in_channels, layer.spec.out_channels)[1:]
        for layer in mapped.convs
        if layer.spec.groups == 1 and not layer.spec.linear
    }
    groups = {name: int(rng.choice(some)) for name, some in legal.items() if some}
    cut = random_groups(net, mapped, groups, sample(x, seed))
    names = [name for name, m in cut.named_modules() if isinstance(m, ChannelPermutation)]
    assert names == [n for n, m in net.named_modules() if isinstance(m, ChannelPermutation)]
    assert {name: cut.get_submodule(name).groups for name in groups} == groups
    assert torch.isfinite(outputs(cut, x)).all()


@pytest.mark.parametrize("share", [0.6, 0.2])
def test_pruned_meets_its_bound_with_least_pruning(share: float) -> None:
    """Against every step of 1/64, where the search looks at a few."""
    net = residual(channels=48)
    mapped, bound = trace(net, (X,)), share * seconds(net)
    measured: list[float] = []

    def latency(tried: nn.Module) -> float:
        measured.append(seconds(tried))
        return measured[-1]

    result = pruned(net, mapped, latency, bound, sample(X))
    assert seconds(result) in measured
    assert len(measured) <= 18
    spaces, _ = prunable(net, mapped, (X[:2],))
    values = importance(net, mapped, [X])
    values = {space: values[space] for space in spaces}
    steps = [strongest(values, k / 64) for k in range(65)]
    cuts = [prune(net, mapped, kept) for kept in steps]
    best = max((k for k in range(65) if seconds(cuts[k]) <= bound), key=lambda k: seconds(cuts[k]))
    shapes = [{name: v.shape for name, v in m.state_dict().items()} for m in (result, cuts[best])]
    assert shapes[0] == shapes[1]
    stay = list(steps[best][found(mapped, "conv2").outputs.spaces[0]])
    whole, refitted, cut = (capture(m, ["bn2"], X)["bn2"][1] for m in (net, result, cuts[best]))
    target = whole[:, stay]
    assert (refitted - target).norm() < 0.9 * (cut - target).norm()


def test_times_that_fall_when_channels_are_added() -> None:
    """A width at which the network is slow for its size hides the wider ones from halving."""
    net = residual(channels=64)
    mapped = trace(net, (X,))

    def latency(tried: nn.Module) -> float:
        width = tried.get_submodule("conv2").weight.shape[0]
        return {48: 3.0, 56: 2.0, 64: 4.0}.get(width, 1.0)

    result = pruned(net, mapped, latency, 2.0, sample(X))
    assert latency(result) == 2.0


def test_a_bound_that_holds_already() -> None:
    net = residual()
    result = pruned(net, trace(net, (X,)), seconds, seconds(net), sample(X))
    assert result is not net
    assert_close(outputs(result), outputs(net), rtol=0, atol=0)


def test_bounds_that_cannot_be_met() -> None:
    net = residual()
    mapped = trace(net, (X,))
    with pytest.raises(BudgetError, match=r"bound=1e-12 s can't be met by pruning: .* 2 spaces"):
        pruned(net, mapped, seconds, 1e-12, sample(X))
    for bound in (0.0, -1.0, float("nan")):
        with pytest.raises(ArgumentError, match="must be a positive number of seconds"):
            pruned(net, mapped, seconds, bound, sample(X))
