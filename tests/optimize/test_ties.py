"""Random networks keep their outputs when channels change places, whatever ties them."""

import copy

import numpy as np
import pytest
import torch
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import RandomNetwork
from torch import Tensor, nn

from groupconv.kernels.spec import legal_groups
from groupconv.nn import ChannelPermutation
from groupconv.optimize.convert import convert
from groupconv.optimize.fold import fold_permutations, reorder
from groupconv.optimize.partition import Partition
from groupconv.optimize.ties import ALIKE, Ties, mix
from groupconv.optimize.trace import Trace, trace

SEEDS = st.integers(0, 10**6)


def example() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model(example())


def random_orders(mapped: Trace, rng: np.random.Generator) -> dict[int, tuple[int, ...]]:
    return {
        i: tuple(rng.permutation(space.channels).tolist())
        for i, space in enumerate(mapped.spaces)
        if space.fixed is None
    }


@torch.no_grad()
def plant(conv: nn.Module, rng: np.random.Generator) -> Partition:
    """A random partition; the weights that it cuts are set to zero."""
    assert isinstance(conv, nn.modules.conv._ConvNd)
    groups = int(rng.choice(legal_groups(conv.in_channels, conv.out_channels)[1:]))
    columns, rows = (rng.permutation(n) for n in (conv.in_channels, conv.out_channels))
    keep = torch.zeros_like(conv.weight)
    for outs, ins in zip(np.split(rows, groups), np.split(columns, groups), strict=True):
        keep[np.ix_(outs, ins)] = 1
    conv.weight.mul_(keep)
    return Partition(groups, tuple(columns.tolist()), tuple(rows.tolist()))


def check_reordering(seed: int) -> int:
    """Reorder every space of a random network; returns how many channels moved."""
    network = RandomNetwork(seed)
    mapped = trace(network, (example(),))
    reordered = copy.deepcopy(network)
    orders = random_orders(mapped, np.random.default_rng(seed))
    reorder(reordered, mapped.members, orders)
    assert_close(outputs(reordered), outputs(network), rtol=1e-5, atol=1e-5)
    return sum(len(order) for order in orders.values() if len(order) > 1)


def check_conversion(seed: int) -> None:
    """Cut every layer that can be cut, where the weights are zero already."""
    network, rng = RandomNetwork(seed), np.random.default_rng(seed)
    mapped = trace(network, (example(),))
    names = [
        conv.name
        for conv in mapped.convs
        if conv.spec.groups == 1
        and not conv.spec.linear
        and len(legal_groups(conv.spec.in_channels, conv.spec.out_channels)) > 1
    ]
    partitions = {n: plant(network.get_submodule(n), rng) for n in rng.permutation(names).tolist()}
    converted = convert(network, mapped, partitions)
    assert_close(outputs(converted.model), outputs(network), rtol=1e-5, atol=1e-5)
    explicit = [n for n, m in converted.model.named_modules() if isinstance(m, ChannelPermutation)]
    assert set(converted.permutations) <= set(explicit)
    for name, partition in partitions.items():
        assert converted.edits[name].structure.groups == partition.groups


@settings(max_examples=25, derandomize=True, deadline=None)
@given(seed=SEEDS)
def test_reordering_every_space_changes_nothing(seed: int) -> None:
    check_reordering(seed)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(seed=SEEDS)
def test_converting_every_layer_changes_nothing(seed: int) -> None:
    check_conversion(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2_000_000, 2_000_150))
def test_many_more(seed: int) -> None:
    check_reordering(seed)
    check_conversion(seed)


@settings(max_examples=10, derandomize=True, deadline=None)
@given(seed=SEEDS)
def test_an_empty_plan_changes_nothing(seed: int) -> None:
    network = RandomNetwork(seed)
    converted = convert(network, trace(network, (example(),)), {})
    assert_close(outputs(converted.model), outputs(network), rtol=1e-6, atol=1e-6)


@settings(max_examples=10, derandomize=True, deadline=None)
@given(seed=SEEDS)
def test_folding_changes_nothing(seed: int) -> None:
    network = RandomNetwork(seed)
    folded, names = fold_permutations(network, (example(),))
    for name in names:
        assert isinstance(folded.get_submodule(name), nn.Identity)
    assert_close(outputs(folded), outputs(network), rtol=1e-5, atol=1e-5)


def test_a_wrong_reordering_would_be_seen() -> None:
    assert min(check_reordering(seed) for seed in range(5)) >= 20
    network = RandomNetwork(0)
    mapped = trace(network, (example(),))
    reordered = copy.deepcopy(network)
    orders = random_orders(mapped, np.random.default_rng(0))
    reorder(reordered, mapped.members[1:], orders)
    assert (outputs(reordered) - outputs(network)).abs().max() > 1e-3


def test_strands_of_equal_signature_are_one_space() -> None:
    ties = Ties()
    a, b, c = ties.open(4), ties.open(4), ties.open(2)
    ties.tie(b, a, mix(0))
    ties.tie(c, b[:2], mix(0))
    spaces, (axis,) = ties.solve([b])
    assert [space.channels for space in spaces] == [2, 2]
    assert axis.spaces == (0, 0, 1, 1)
    assert axis.strands == (0, 1, 0, 1)


def test_labels_tell_strands_apart() -> None:
    ties = Ties()
    a, b = ties.open(4), ties.open(4)
    ties.tie(b, a, mix(np.array([5, 6, 5, 6])))
    _, (axis,) = ties.solve([a])
    assert axis.spaces == (0, 1, 0, 1)


def test_the_first_reason_is_kept() -> None:
    ties = Ties()
    a, b = ties.open(3), ties.open(3)
    ties.tie(b, a, mix(0))
    ties.fix(b[:1], "first")
    ties.fix(a, "second")
    spaces, _ = ties.solve([])
    assert [(space.channels, space.fixed) for space in spaces] == [(1, "first"), (2, "second")]


def test_strands_that_cannot_be_matched_stay() -> None:
    """Two rings of four cells, in which each cell looks like the next."""
    ties = Ties()
    a = ties.open(8)
    ties.tie(a, a[[1, 2, 3, 0, 5, 6, 7, 4]], mix(0))
    spaces, (axis,) = ties.solve([a])
    assert {space.fixed for space in spaces} == {ALIKE}
    assert axis.channels({}) == tuple(range(8))
