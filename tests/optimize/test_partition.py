"""Co-clustering: balanced, obedient, reproducible, and right where the answer is known."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from groupconv.optimize.partition import Partition, assign, cluster


def kept(strength: NDArray[np.float64], partition: Partition) -> float:
    """Share of the energy inside the groups."""
    rows = np.split(np.array(partition.out_order), partition.groups)
    columns = np.split(np.array(partition.in_order), partition.groups)
    inside = sum(strength[np.ix_(r, c)].sum() for r, c in zip(rows, columns, strict=True))
    return round(float(inside / strength.sum()), 12)


def planted(channels: int, groups: int, seed: int) -> NDArray[np.float64]:
    """Blocks of energy behind random orders of rows and columns."""
    rng = np.random.default_rng(seed)
    width = channels // groups
    blocks = np.kron(np.eye(groups), np.ones((width, width)))
    blocks *= rng.uniform(0.5, 1.5, blocks.shape)
    return blocks[rng.permutation(channels)][:, rng.permutation(channels)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[np.float64], int, list[int] | None, list[int] | None]:
    groups = draw(st.integers(1, 5))
    width_in, width_out = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    strength = rng.random((groups * width_out, groups * width_in))
    strength *= draw(st.sampled_from([0.0, 1e-12, 1.0, 1e12]))
    sides = (
        draw(st.one_of(st.none(), st.permutations(range(groups * width))))
        for width in (width_in, width_out)
    )
    return strength, groups, *sides


@settings(max_examples=150, derandomize=True, deadline=None)
@given(cases())
def test_balanced_and_obedient(
    case: tuple[NDArray[np.float64], int, list[int] | None, list[int] | None],
) -> None:
    strength, groups, given_in, given_out = case
    options = {"given_in": given_in, "given_out": given_out, "seed": 3}
    partition = cluster(strength, groups, **options)
    assert partition.groups == groups
    assert sorted(partition.in_order) == list(range(strength.shape[1]))
    assert sorted(partition.out_order) == list(range(strength.shape[0]))
    assert all(type(i) is int for i in partition.in_order + partition.out_order)
    for side, order in ((given_in, partition.in_order), (given_out, partition.out_order)):
        assert side is None or tuple(side) == order
    assert cluster(strength, groups, **options) == partition


@pytest.mark.parametrize(("channels", "groups"), [(16, 4), (64, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_finds_planted_blocks(channels: int, groups: int, seed: int) -> None:
    strength = planted(channels, groups, seed)
    identity = Partition.identity(groups, channels, channels)
    assert kept(strength, identity) < 0.6
    assert kept(strength, cluster(strength, groups, seed=seed)) == 1
    free = cluster(strength, groups, seed=seed + 1)
    # With one side known the other follows.
    assert kept(strength, cluster(strength, groups, given_in=free.in_order)) == 1
    assert kept(strength, cluster(strength, groups, given_out=free.out_order)) == 1


def test_finds_planted_blocks_under_noise() -> None:
    clean = planted(16, 4, 0)
    noisy = clean + 0.2 * np.random.default_rng(1).random(clean.shape)
    assert kept(clean, cluster(noisy, 4)) == 1


def test_the_seed_picks_among_equals() -> None:
    # Without any structure, different starts end differently.
    strength = np.random.default_rng(0).random((16, 16))
    assert len({cluster(strength, 4, seed=seed) for seed in range(8)}) > 1


def test_identity() -> None:
    assert Partition.identity(2, 4, 6) == Partition(2, (0, 1, 2, 3), (0, 1, 2, 3, 4, 5))


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_assignment_is_the_best_of_all(groups: int) -> None:
    gain = np.random.default_rng(groups).normal(size=(6, groups))
    every = set(itertools.permutations(np.repeat(np.arange(groups), 6 // groups).tolist()))
    best = max(gain[np.arange(6), list(labels)].sum() for labels in every)
    labels = assign(gain, groups)
    assert np.bincount(labels).tolist() == [6 // groups] * groups
    assert gain[np.arange(6), labels].sum() == pytest.approx(best)


@pytest.mark.parametrize("values", ["any", "skewed", "negative", "few", "equal", "tiny"])
@pytest.mark.parametrize(
    ("groups", "room"), [(1, 5), (1, 70), (2, 40), (5, 7), (5, 17), (16, 12), (17, 3), (40, 2)]
)
def test_assignment_agrees_with_the_general_solver(groups: int, room: int, values: str) -> None:
    rng = np.random.default_rng(room)
    shape = (groups * room, groups)
    gain = {
        "any": rng.random(shape) * rng.exponential(size=(shape[0], 1)),
        "skewed": rng.random(shape) * rng.exponential(size=groups),
        "negative": rng.normal(size=shape) - 5,
        "few": rng.integers(0, 3, shape).astype(float),
        "equal": np.zeros(shape),
        "tiny": 1e-20 * rng.random(shape),
    }[values]
    rows, columns = linear_sum_assignment(np.repeat(gain, room, axis=1), maximize=True)
    labels = assign(gain, groups)
    assert np.bincount(labels, minlength=groups).tolist() == [room] * groups
    best = gain[rows, columns // room].sum()
    assert gain[np.arange(len(gain)), labels].sum() == pytest.approx(best, rel=1e-9, abs=0)
