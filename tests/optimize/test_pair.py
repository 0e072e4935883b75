"""Two convolutions for one: against planted pairs, closed forms, gradients and the layers run."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from groupconv.kernels.spec import ConvSpec
from groupconv.optimize.covariance import LayerSums
from groupconv.optimize.pair import Pair, fit_pair, pair_shapes
from groupconv.optimize.sampling import sample
from groupconv.optimize.schur import RIDGE, Regression, scale
from groupconv.optimize.trace import trace

# Input channels, output channels, taps.
Sides = tuple[int, int, int]

KINDS: dict[str, tuple[Sides, Pair]] = {
    "low rank": ((8, 12, 3), Pair(3, 1, 1, False)),
    "low rank, few outputs": ((8, 5, 3), Pair(3, 1, 1, False)),
    "low rank, many outputs": ((6, 24, 1), Pair(3, 1, 1, False)),
    "grouped and pointwise": ((8, 20, 4), Pair(8, 4, 1, False)),
    "depthwise separable": ((8, 12, 9), Pair(8, 8, 1, False)),
    "depthwise, two per channel": ((4, 12, 9), Pair(8, 4, 1, False)),
    "shuffled, one channel per block": ((16, 16, 1), Pair(16, 4, 4, True)),
    "shuffled, four per block": ((16, 32, 1), Pair(16, 2, 2, True)),
    "shuffled, not to every block": ((18, 18, 1), Pair(18, 6, 6, True)),
    "shuffled, uneven": ((12, 9, 1), Pair(12, 3, 3, True)),
    "not shuffled, other groups": ((12, 8, 2), Pair(12, 6, 4, False)),
}
ITERATED = [kind for kind, (_, shape) in KINDS.items() if shape.groups > 1]


def problem_of(weight: Tensor, taps: int, seed: int, noise: float = 0.0) -> Regression:
    """Correlated inputs, and what ``(C_out, D)`` weights make of them, with noise."""
    rng = np.random.default_rng(seed)
    d = weight.shape[1]
    u = torch.from_numpy(rng.normal(size=(4 * d, d)) @ rng.normal(size=(d, d)))
    h = u.T @ u / len(u) + 1e-3 * torch.eye(d, dtype=torch.float64)
    t = weight @ h
    total = (1 + noise) * float((t * weight).sum())
    return Regression(torch.cat([h, t.T], 1), total, taps, len(weight))


def random_problem(sides: Sides, seed: int) -> Regression:
    in_channels, out_channels, taps = sides
    rng = np.random.default_rng(seed)
    size = (out_channels, in_channels * taps)
    weight = torch.from_numpy(rng.normal(size=size) * rng.random(size) ** 3)
    return problem_of(weight, taps, seed, noise=0.25)


def random_weights(sides: Sides, shape: Pair, seed: int) -> tuple[Tensor, Tensor]:
    in_channels, out_channels, taps = sides
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(shape.middle, in_channels // shape.groups * taps))
    second = rng.normal(size=(out_channels, shape.middle // shape.pointwise_groups))
    return torch.from_numpy(first), torch.from_numpy(second)


def composed(sides: Sides, shape: Pair, first: Tensor, second: Tensor) -> Tensor:
    """Dense weights of a pair: torch's own operators on every unit vector, taps on one axis."""
    in_channels, _, taps = sides
    unit = torch.eye(in_channels * taps, dtype=torch.float64).unflatten(1, (in_channels, taps))
    middle = nn.functional.conv1d(unit, first.unflatten(1, (-1, taps)), groups=shape.groups)
    if shape.shuffle:
        middle = nn.ChannelShuffle(shape.groups)(middle)
    out = nn.functional.conv1d(middle, second[:, :, None], groups=shape.pointwise_groups)
    return out[:, :, 0].T


def lost(problem: Regression, weight: Tensor) -> Tensor:
    """The quadratic form itself, of dense weights."""
    explained = 2 * (weight * problem.t).sum() - (weight @ problem.h * weight).sum()
    return 1 - explained / problem.total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_planted_pairs_are_recovered(kind: str, seed: int) -> None:
    sides, shape = KINDS[kind]
    weight = composed(sides, shape, *random_weights(sides, shape, seed))
    found = fit_pair(problem_of(weight, sides[2], seed), shape, sweeps=0)
    assert found.loss < 1e-9
    assert_close(composed(sides, shape, found.first, found.second), weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ITERATED)
def test_planted_pairs_are_recovered_from_random_weights(kind: str) -> None:
    sides, shape = KINDS[kind]
    weight = composed(sides, shape, *random_weights(sides, shape, 0))
    problem = problem_of(weight, sides[2], 0)
    found = [
        fit_pair(problem, shape, sweeps=500, start=random_weights(sides, shape, seed)).loss
        for seed in range(1, 5)
    ]
    assert min(found) < 1e-4
    assert max(found) < 1e-2


@pytest.mark.parametrize("sides", [(4, 7, 3), (5, 16, 2), (9, 9, 1)])
def test_low_rank_is_reduced_rank_regression(sides: Sides) -> None:
    """Outputs on whitened inputs, cut to their leading singular values."""
    problem = random_problem(sides, 0)
    whitening = np.linalg.inv(np.linalg.cholesky(problem.h.numpy()))
    singular = np.linalg.svd(problem.t.numpy() @ whitening.T, compute_uv=False)
    losses = []
    for rank in range(1, 13):
        found = fit_pair(problem, Pair(rank, 1, 1, False), sweeps=5)
        assert found.loss == pytest.approx(
            1 - (singular[:rank] ** 2).sum() / problem.total, abs=1e-10
        )
        losses.append(found.loss)
    assert all(more <= less + 1e-12 for less, more in pairwise(losses))
    assert losses[0] > losses[-1] + 0.1


def test_each_block_of_outputs_has_a_low_rank_of_its_own() -> None:
    problem = random_problem((4, 8, 2), 0)
    halves = [
        Regression(torch.cat([problem.h, t.T], 1), problem.total, 2, 4) for t in problem.t.chunk(2)
    ]
    apart = [fit_pair(half, Pair(3, 1, 1, False), sweeps=0).loss for half in halves]
    whole = fit_pair(problem, Pair(6, 1, 2, False), sweeps=0).loss
    assert 1 - whole == pytest.approx(sum(1 - loss for loss in apart), abs=1e-10)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Sides, Pair]:
    groups, pointwise_groups = (draw(st.sampled_from([1, 2, 3, 4])) for _ in range(2))
    sides = (
        groups * draw(st.integers(1, 3)),
        pointwise_groups * draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 4])),
    )
    middle = math.lcm(groups, pointwise_groups) * draw(st.integers(1, 2))
    return sides, Pair(middle, groups, pointwise_groups, draw(st.booleans()))


@settings(max_examples=80, derandomize=True, deadline=None)
@given(cases(), st.integers(0, 2**32), st.sampled_from([0, 1, 7]), st.booleans())
def test_loss_is_that_of_the_weights(
    case: tuple[Sides, Pair], seed: int, sweeps: int, given_start: bool
) -> None:
    sides, shape = case
    problem = random_problem(sides, seed)
    start = random_weights(sides, shape, seed + 1) if given_start else None
    found = fit_pair(problem, shape, sweeps=sweeps, start=start)
    weight = composed(sides, shape, found.first, found.second)
    assert found.loss == pytest.approx(float(lost(problem, weight)), abs=1e-9)
    assert_close(found.dense(), weight, rtol=1e-9, atol=1e-9)
    if start is not None:
        assert found.loss <= lost(problem, composed(sides, shape, *start)) + 1e-9


@pytest.mark.parametrize("kind", ITERATED)
@pytest.mark.parametrize("random", [False, True])
def test_no_sweep_loses_more(kind: str, random: bool) -> None:
    sides, shape = KINDS[kind]
    problem = random_problem(sides, 1)
    start = random_weights(sides, shape, 2) if random else None
    losses = [fit_pair(problem, shape, sweeps=n, start=start).loss for n in range(12)]
    assert all(after <= before + 1e-12 for before, after in pairwise(losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ITERATED)
def test_no_direction_is_left(kind: str) -> None:
    """The second weights are always the best for the first; in the end the first ones are too."""
    sides, shape = KINDS[kind]
    problem = random_problem(sides, 0)
    slopes = []
    for sweeps in (1, 1_000):
        found = fit_pair(problem, shape, sweeps=sweeps)
        weights = found.first.requires_grad_(), found.second.requires_grad_()
        lost(problem, composed(sides, shape, *weights)).backward()
        slopes.append([float(w.grad.norm() * w.detach().norm()) for w in weights])
    assert max(second for _, second in slopes) < 1e-6
    assert slopes[1][0] < 5e-3 < slopes[0][0]


def test_a_fit_goes_on_from_a_shorter_one() -> None:
    sides, shape = KINDS["depthwise separable"]
    problem = random_problem(sides, 0)
    short, long = (fit_pair(problem, shape, sweeps=n) for n in (3, 50))
    further = fit_pair(problem, shape, sweeps=50, start=(short.first, short.second))
    assert further.loss < short.loss
    assert further.loss == pytest.approx(long.loss, rel=0.02)


def test_orders_that_do_not_matter() -> None:
    """Of the outputs under one pointwise group; of the inputs where each is a group."""
    rng = np.random.default_rng(0)
    for kind, inputs in (("grouped and pointwise", False), ("depthwise separable", True)):
        sides, shape = KINDS[kind]
        problem = random_problem(sides, 0)
        outputs = torch.from_numpy(rng.permutation(sides[1]))
        columns = torch.arange(len(problem.h))
        if inputs:
            columns = problem.rows(torch.from_numpy(rng.permutation(sides[0])))
        h, t = problem.h[columns][:, columns], problem.t[outputs][:, columns]
        moved = replace(problem, system=torch.cat([h, t.T], 1))
        # By other paths, so alike only where both have arrived.
        expected, actual = (fit_pair(p, shape, sweeps=1_000) for p in (problem, moved))
        assert actual.loss == pytest.approx(expected.loss, rel=1e-3)
        assert_close(actual.dense(), expected.dense()[outputs][:, columns], rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 1])
def test_middle_channels_to_spare(kind: str, rank: int) -> None:
    """Weights of rank 0 or 1 leave nothing to do for most, and the start gives them noise."""
    sides, shape = KINDS[kind]
    rng = np.random.default_rng(0)
    size = (sides[1], rank), (rank, sides[0] * sides[2])
    weight = torch.from_numpy(rng.normal(size=size[0]) @ rng.normal(size=size[1]))
    problem = replace(problem_of(weight, sides[2], 0), total=float(sides[1]))
    found = fit_pair(problem, shape, sweeps=20)
    assert found.first.isfinite().all()
    assert found.second.isfinite().all()
    if rank == 0:
        assert found.loss == 1
        assert not found.dense().any()
    else:
        actual = lost(problem, composed(sides, shape, found.first, found.second))
        assert found.loss == pytest.approx(max(float(actual), 0), abs=1e-9)


def test_equal_and_dead_middle_channels() -> None:
    sides, shape = KINDS["grouped and pointwise"]
    problem = random_problem(sides, 0)
    first, second = random_weights(sides, shape, 1)
    first[1], first[2] = first[0], 0
    second[:, 5] = 0
    losses = [fit_pair(problem, shape, sweeps=n, start=(first, second)).loss for n in range(8)]
    assert all(after <= before + 1e-12 for before, after in pairwise(losses))


def test_weights_into_and_out_of_a_channel_have_equal_norms() -> None:
    sides, shape = KINDS["shuffled, uneven"]
    first, second = random_weights(sides, shape, 0)
    start = 1e6 * first, 1e-3 * second
    found = fit_pair(random_problem(sides, 0), shape, sweeps=3, start=start)
    out = found.second.unflatten(0, (shape.pointwise_groups, -1)).norm(dim=1).flatten()
    into = nn.ChannelShuffle(shape.groups)(found.first[None])[0].norm(dim=1)
    assert_close(out, into, rtol=1e-9, atol=0)


def test_a_reduced_problem_is_refused() -> None:
    problem = random_problem((4, 6, 3), 0).separable()
    with pytest.raises(AssertionError):
        fit_pair(problem, Pair(4, 1, 1, False), sweeps=0)


LAYERS = {
    "1-d": nn.Conv1d(8, 12, 4, stride=2, padding=2, dilation=2),
    "2-d": nn.Conv2d(8, 12, 3, stride=2, padding=1),
    "3-d": nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1)),
    "pointwise": nn.Conv2d(16, 24, 1, stride=2),
}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def as_module(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> nn.Module:
    padding = [before for before, _ in spec.padding]
    module = CONVS[len(padding)](
        spec.in_channels, spec.out_channels, spec.kernel_size, spec.stride, padding,
        spec.dilation, spec.groups, bias is not None, dtype=torch.float64,
    )  # fmt: skip
    with torch.no_grad():
        module.weight.copy_(weight.reshape(spec.weight_shape))
        if bias is not None:
            module.bias.copy_(bias)
    return module


@pytest.mark.parametrize("name", LAYERS)
def test_both_layers_leave_the_predicted_variance(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name].double().requires_grad_(False)
    size = (9, 8, 7)[: layer.weight.ndim - 2]
    x = torch.randn(24, layer.in_channels, *size).double().cumsum(-1)
    x = x + x.roll(1, 1)
    y = layer(x)
    spec = replace(trace(layer, (x,)).convs[0].spec, batch=1)
    sums = LayerSums(layer.weight[0].numel(), layer.out_channels)
    sums.add(*sample(spec, x, y, 10**6, torch.Generator()))
    moments = sums.finish()
    problem = Regression.of(moments, layer.weight)
    dense = layer.weight.flatten(1)
    shapes = pair_shapes(spec)
    assert any(shape.shuffle for shape in shapes) == (name == "pointwise")
    for shape in shapes:
        found = fit_pair(problem, shape, sweeps=5)
        weight = found.dense()
        first, second = shape.specs(spec)
        pair = nn.Sequential(
            as_module(first, found.first, None),
            nn.ChannelShuffle(shape.groups) if shape.shuffle else nn.Identity(),
            as_module(second, found.second, moments.mean_y - weight @ moments.mean_u),
        )
        left = (pair(x).detach() - y).movedim(1, -1).flatten(0, -2)
        assert_close(left.mean(0), torch.zeros(layer.out_channels), rtol=0, atol=1e-9)
        penalty = RIDGE * scale(moments) * (weight - dense).square().sum()
        variance = left.square().mean(0).sum() + penalty
        assert found.loss == pytest.approx(float(variance) / problem.total, abs=1e-9)


@st.composite
def specs(draw: st.DrawFn) -> ConvSpec:
    axes = draw(st.integers(1, 3))
    kernel, stride, dilation = (
        tuple(draw(st.integers(1, most)) for _ in range(axes)) for most in (3, 2, 2)
    )
    return ConvSpec(
        batch=draw(st.integers(1, 2)),
        in_channels=draw(st.integers(1, 64)),
        out_channels=draw(st.integers(1, 64)),
        input_size=(8,) * axes,
        kernel_size=kernel,
        stride=stride,
        padding=((1, 0),) * axes,
        dilation=dilation,
        groups=1,
    )


@settings(max_examples=200, derandomize=True, deadline=None)
@given(specs())
def test_shapes_are_legal_cheaper_and_different(spec: ConvSpec) -> None:
    shapes = pair_shapes(spec)
    assert len(set(shapes)) == len(shapes)
    for shape in shapes:
        # A ConvSpec of illegal groups or channels can't be made.
        first, second = shape.specs(spec)
        assert first.output_size == second.output_size == spec.output_size
        assert (first.in_channels, second.out_channels) == (spec.in_channels, spec.out_channels)
        assert first.macs + second.macs < spec.macs
        assert not shape.shuffle or math.prod(spec.kernel_size) == 1


def test_shapes_of_known_layers() -> None:
    wide = ConvSpec(1, 12, 64, (7, 7), (3, 3), (1, 1), ((1, 1),) * 2, (1, 1), 1)
    assert pair_shapes(wide) == [
        *[Pair(rank, 1, 1, False) for rank in (8, 16, 24, 32, 40)],
        *[Pair(middle, groups, 1, False) for middle in (12, 24, 36) for groups in (2, 3, 4, 6, 12)],
    ]
    pointwise = replace(wide, in_channels=48, kernel_size=(1, 1), padding=((0, 0),) * 2)
    assert pair_shapes(pointwise) == [
        *[Pair(rank, 1, 1, False) for rank in (8, 16, 24)],
        *[Pair(48, groups, groups, True) for groups in (2, 4, 8, 16)],
    ]
    assert pair_shapes(replace(wide, groups=4)) == []
    assert pair_shapes(replace(wide, transposed=True)) == []
