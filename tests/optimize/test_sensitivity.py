"""What a layer's loss costs the network: refits against least squares, errors against the truth."""

import copy
from contextlib import nullcontext

import pytest
import torch
from compare import assert_close
from networks import images, residual
from torch import Tensor, nn
from traced import Net

from groupconv.errors import DataError
from groupconv.optimize.covariance import LayerSums, Moments, SeparableMoments, SeparableSums
from groupconv.optimize.menu import SWEEPS, Candidate
from groupconv.optimize.pair import fit_pair
from groupconv.optimize.partition import Partition
from groupconv.optimize.sampling import sample
from groupconv.optimize.schur import RIDGE, Regression, scale
from groupconv.optimize.sensitivity import Sensitivity, Trials, of_groups, refitted
from groupconv.optimize.structure import DENSE, Grouped, Pair
from groupconv.optimize.trace import trace
from groupconv.optimize.visit import outputs


def positions(layer: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    spec = trace(layer, (x,)).convs[0].spec
    return sample(spec, x, layer(x).detach(), 10**6, torch.Generator())


def moments_of(layer: nn.Conv2d, x: Tensor) -> Moments:
    u, y, image = positions(layer, x)
    sums = LayerSums(u.shape[1], y.shape[1])
    sums.add(u, y, image)
    return sums.finish()


def separable_of(layer: nn.Conv2d, x: Tensor) -> SeparableMoments:
    u, _, _ = positions(layer, x)
    sums = SeparableSums(layer.in_channels, layer.weight[0, 0].numel())
    sums.add(u)
    return sums.finish()


def partition_of(groups: int, in_channels: int, out_channels: int, seed: int = 0) -> Partition:
    generator = torch.Generator().manual_seed(seed)
    sides = (torch.randperm(n, generator=generator).tolist() for n in (in_channels, out_channels))
    return Partition(groups, *map(tuple, sides))


def blocks(partition: Partition) -> list[tuple[Tensor, Tensor]]:
    sides = (torch.tensor(o).chunk(partition.groups)
             for o in (partition.in_order, partition.out_order))  # fmt: skip
    return list(zip(*sides, strict=True))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_refitted_weights_are_those_of_least_squares(groups: int, kernel: int) -> None:
    """On the positions themselves, with the ridge as rows of its own."""
    torch.manual_seed(groups)
    mix = nn.Conv2d(8, 8, 3, dtype=torch.float64)
    layer = nn.Conv2d(8, 12, kernel, padding=1, dtype=torch.float64)
    x = mix(torch.randn(12, 8, 9, 9, dtype=torch.float64)).detach()
    moments = moments_of(layer, x)
    partition = partition_of(groups, 8, 12)
    found = refitted(Regression.of(moments, layer.weight), layer.weight, of_groups(partition))
    assert found.shape == layer.weight.shape
    u, y, _ = positions(layer, x)
    u, y = (u - u.mean(0)) / len(u) ** 0.5, (y - y.mean(0)) / len(u) ** 0.5
    expected = torch.zeros_like(found)
    for inputs, rows in blocks(partition):
        trained = layer.weight.detach()[rows][:, inputs].flatten(1)
        ridge = (RIDGE * scale(moments)) ** 0.5
        kept = u.unflatten(1, (8, -1))[:, inputs].flatten(1)
        a = torch.cat([kept, ridge * torch.eye(kept.shape[1], dtype=torch.float64)])
        b = torch.cat([y[:, rows], ridge * trained.T])
        solved = torch.linalg.lstsq(a, b).solution.T
        expected[rows[:, None], inputs] = solved.unflatten(1, (len(inputs), kernel, kernel))
    assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_refitted_weights_of_a_wide_layer_stay_in_their_groups() -> None:
    """Of such a layer only the covariance between channels is known."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 4, 3), torch.randn(32, 8, 9, 9)
    partition = partition_of(2, 8, 4)
    weight = refitted(
        Regression.of(separable_of(layer, x), layer.weight), layer.weight, of_groups(partition)
    )
    inside = torch.zeros(4, 8, dtype=torch.bool)
    for inputs, rows in blocks(partition):
        inside[rows[:, None], inputs] = True
    assert not weight[~inside].any()
    # Channels that are nearly independent say little of each other.
    assert_close(weight[inside], layer.weight[inside], rtol=0, atol=0.02)


def linear() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 1)
    ).eval()
    return net, torch.randn(24, 3, 8, 8)


def cut(problem: Regression, groups: int, seed: int = 0) -> Candidate:
    partition = partition_of(groups, problem.in_channels, problem.out_channels, seed)
    return Candidate(Grouped(groups), problem.loss(partition), partition, "random")


def problem_of(net: nn.Sequential, x: Tensor) -> Regression:
    """Of the second layer."""
    return Regression.of(moments_of(net[1], net[0](x).detach()), net[1].weight)


def true_error(net: nn.Sequential, x: Tensor, weight: Tensor) -> float:
    """Of a network made by hand: the weights replaced, the means of its outputs restored."""
    changed, weight = copy.deepcopy(net), weight.float()
    with torch.no_grad():
        inner = net[0](x)
        lost = (net[1](inner) - nn.functional.conv2d(inner, weight, padding=1)).mean((0, 2, 3))
        changed[1] = nn.Conv2d(8, 8, 3, padding=1)
        changed[1].weight.copy_(weight)
        changed[1].bias.copy_(lost)
        before, after = net(x).double(), changed(x).double()
    return float((after - before).square().sum() / (before - before.mean(0)).square().sum())


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_the_error_of_a_cut_is_the_real_one(groups: int) -> None:
    net, x = linear()
    problem = problem_of(net, x)
    only = cut(problem, groups)
    found = Trials(net, x).sensitivity("1", problem, [Candidate(DENSE, 0.0), only])
    assert found.error(only.loss) == pytest.approx(
        true_error(net, x, refitted(problem, net[1].weight, of_groups(only.partition))), rel=1e-3
    )
    assert found.error(0.0) == 0.0


def test_two_cuts_lie_on_the_curve() -> None:
    net, x = linear()
    problem = problem_of(net, x)
    cuts = sorted((cut(problem, groups) for groups in (2, 4, 8)), key=lambda c: c.loss)
    # What loses more than half is not tried.
    gentle, harsh = (replace_loss(c, loss) for c, loss in zip(cuts[:2], (0.1, 0.3), strict=True))
    trials = Trials(net, x)
    pair = Candidate(Pair(4, 1, 1, False), 0.2)
    menu = [Candidate(DENSE, 0.0), harsh, pair, replace_loss(cuts[2], 0.9), gentle]
    found = trials.sensitivity("1", problem, menu)
    for one in (gentle, harsh):
        measured = true_error(net, x, refitted(problem, net[1].weight, of_groups(one.partition)))
        assert found.error(one.loss) == pytest.approx(measured, rel=1e-3)
    assert found.error(gentle.loss) < found.error(0.2) < found.error(harsh.loss)
    step = 1e-6
    slope = (found.error(0.2 + step) - found.error(0.2 - step)) / (2 * step)
    assert found.slope(0.2) == pytest.approx(slope, rel=1e-6)
    # More loss never counts as better.
    swapped = [replace_loss(gentle, 0.3), replace_loss(harsh, 0.1)]
    assert trials.sensitivity("1", problem, swapped).power == 0.0


def replace_loss(candidate: Candidate, loss: float) -> Candidate:
    return Candidate(candidate.structure, loss, candidate.partition, candidate.start)


def test_a_cut_that_loses_nothing_says_nothing_of_the_others() -> None:
    net, x = linear()
    problem = problem_of(net, x)
    harsh = [replace_loss(cut(problem, 8), 0.8), replace_loss(cut(problem, 4), 0.6)]
    planted = replace_loss(cut(problem, 2), 1e-15)
    found = Trials(net, x).sensitivity("1", problem, [planted, *harsh])
    measured = true_error(net, x, refitted(problem, net[1].weight, of_groups(harsh[1].partition)))
    assert found.error(0.6) == pytest.approx(measured, rel=1e-3)
    # A loss of rounding errors is not a measure of anything.
    alone = Trials(net, x).sensitivity("1", problem, [planted])
    assert alone.error(1e-4) == pytest.approx(
        true_error(net, x, refitted(problem, net[1].weight, of_groups(planted.partition))), rel=1e-3
    )


def test_a_pair_is_tried_with_its_fitted_weights() -> None:
    net, x = linear()
    problem, pair = problem_of(net, x), Pair(4, 1, 1, False)
    fitted = fit_pair(problem, pair, sweeps=SWEEPS)
    found = Trials(net, x).sensitivity("1", problem, [Candidate(pair, fitted.loss)])
    weight = fitted.dense().reshape(net[1].weight.shape)
    assert found.error(fitted.loss) == pytest.approx(true_error(net, x, weight), rel=1e-3)


def test_nothing_to_try() -> None:
    net, x = linear()
    found = Trials(net, x).sensitivity("1", problem_of(net, x), [Candidate(DENSE, 0.0)])
    assert found == Sensitivity(1.0, 1.25)
    assert found.slope(0.0) > 0


def test_a_layer_that_does_not_matter() -> None:
    torch.manual_seed(0)
    net = Net(lambda n, x: n.a(x) + 0.0 * n.b(x), a=nn.Conv2d(4, 6, 1), b=nn.Conv2d(4, 6, 1)).eval()
    x = torch.randn(16, 4, 6, 6)
    trials = Trials(net, x)
    errors = {}
    for name in "ab":
        layer = net.get_submodule(name)
        problem = Regression.of(moments_of(layer, x), layer.weight)
        errors[name] = trials.sensitivity(name, problem, [cut(problem, 2)]).error(0.5)
    assert errors["b"] < 1e-9 < 1e-2 < errors["a"]


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_left_as_it_was(fails: bool) -> None:
    net, x = residual(), images()
    seen = []
    net.conv2.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    (expected,) = outputs(net, x)
    trials = Trials(net, x)
    inner = net.relu(net.bn1(net.conv1(net.stem(x)))).detach()
    problem = Regression.of(moments_of(net.conv2, inner), net.conv2.weight)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = net.fc.register_forward_hook(fail) if fails else None
    stopped = pytest.raises(DataError, match="out of memory") if fails else nullcontext()
    with stopped:
        trials.sensitivity("conv2", problem, [cut(problem, 2), cut(problem, 4)])
    if handle is not None:
        handle.remove()
    assert len(net.conv2._forward_hooks) == 1
    assert not any(m._forward_hooks for m in net.modules() if m is not net.conv2)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(outputs(net, x)[0], expected)
    assert len(seen) > 2
