"""Refined partitions: never worse, balanced, obedient, and at a local optimum of the exact loss."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groupconv.optimize.partition import Partition
from groupconv.optimize.refine import refine
from groupconv.optimize.schur import Regression


def random_problem(seed: int, in_channels: int, out_channels: int, taps: int) -> Regression:
    rng = np.random.default_rng(seed)
    d = in_channels * taps
    u = rng.normal(size=(4 * d, d)) @ rng.normal(size=(d, d))
    weight = rng.normal(size=(out_channels, d)) * rng.random((out_channels, d)) ** 3
    h = torch.from_numpy(u.T @ u) / len(u) + 1e-3 * torch.eye(d, dtype=torch.float64)
    w = torch.from_numpy(weight)
    t = w @ h
    return Regression(torch.cat([h, t.T], 1), float((t * w).sum()), taps, out_channels)


def shuffled(seed: int, groups: int, in_channels: int, out_channels: int) -> Partition:
    rng = np.random.default_rng(seed)
    orders = (tuple(rng.permutation(n).tolist()) for n in (in_channels, out_channels))
    return Partition(groups, *orders)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Regression, Partition]:
    groups, taps = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2]))
    sides = [groups * draw(st.integers(1, 3)) for _ in range(2)]
    seed = draw(st.integers(0, 2**32))
    return random_problem(seed, *sides, taps), shuffled(seed, groups, *sides)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(cases(), st.booleans(), st.booleans(), st.sampled_from([0, 1, 20]))
def test_never_worse_and_obedient(
    case: tuple[Regression, Partition], keep_in: bool, keep_out: bool, rounds: int
) -> None:
    problem, start = case
    found = refine(problem, start, rounds=rounds, keep_in=keep_in, keep_out=keep_out)
    assert found.loss == problem.loss(found.partition) <= problem.loss(start) + 1e-12
    assert sorted(found.partition.in_order) == list(range(problem.in_channels))
    assert sorted(found.partition.out_order) == list(range(problem.out_channels))
    assert not keep_in or found.partition.in_order == start.in_order
    assert not keep_out or found.partition.out_order == start.out_order
    again = refine(problem, start, rounds=rounds, keep_in=keep_in, keep_out=keep_out)
    assert again == found


@pytest.mark.parametrize("taps", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_no_swap_and_no_assignment_is_left(seed: int, taps: int) -> None:
    problem = random_problem(seed, 9, 6, taps)
    found = refine(problem, shuffled(seed, 3, 9, 6), rounds=100)
    assert found.converged
    assert found.swaps > 0
    best = found.loss - 2e-6  # as near as the search cares
    for order, width, side in (
        (found.partition.in_order, 3, 0),
        (found.partition.out_order, 2, 1),
    ):
        for i, j in itertools.combinations(range(len(order)), 2):
            if i // width == j // width:
                continue
            swapped = list(order)
            swapped[i], swapped[j] = order[j], order[i]
            orders = [found.partition.in_order, found.partition.out_order]
            orders[side] = tuple(swapped)
            assert problem.loss(Partition(3, *orders)) >= best


def test_rounds_bound_the_search() -> None:
    problem, start = random_problem(0, 16, 16, 1), shuffled(0, 4, 16, 16)
    results = [refine(problem, start, rounds=rounds) for rounds in (0, 1, 2, 50)]
    assert results[0].swaps == 0
    assert not results[0].converged
    assert results[-1].converged
    losses = [result.loss for result in results]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_a_copied_channel_goes_to_another_group() -> None:
    """Two channels that are alike are worth most apart: each group then has one of them."""
    rng = np.random.default_rng(0)
    u = torch.from_numpy(rng.normal(size=(4_000, 4)))
    u[:, 1] = u[:, 0] + 1e-2 * u[:, 1]
    h = u.T @ u / len(u)
    w = torch.zeros(4, 4, dtype=torch.float64)
    w[:2, [0, 2]], w[2:, [1, 3]] = 1.0, 1.0
    t = w @ h
    problem = Regression(torch.cat([h, t.T], 1), float((t * w).sum()), 1, 4)
    found = refine(problem, Partition.identity(2, 4, 4), rounds=10)
    groups = {frozenset(found.partition.in_order[:2]), frozenset(found.partition.in_order[2:])}
    assert groups in (
        {frozenset({0, 2}), frozenset({1, 3})},
        {frozenset({0, 3}), frozenset({1, 2})},
    )
    assert found.loss < 1e-3 < problem.loss(Partition.identity(2, 4, 4))
