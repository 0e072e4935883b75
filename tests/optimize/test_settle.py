"""Chosen structures get their channels: permuted where it was asked for, losses no higher."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from random_networks import RandomNetwork
from torch import Tensor, nn

from groupconv.kernels.spec import legal_groups
from groupconv.optimize.convert import Converted, Settled, convert, structure_of
from groupconv.optimize.menu import Candidate, by_priority, freedom, menu
from groupconv.optimize.pair import pair_shapes
from groupconv.optimize.partition import Partition
from groupconv.optimize.sampling import Sampling
from groupconv.optimize.settle import complete, settle, sketch
from groupconv.optimize.structure import DENSE, Grouped, Pair
from groupconv.optimize.survey import Searches
from groupconv.optimize.trace import Trace, TracedConv, trace

X = torch.randn(2, 3, 8, 8)


def eligible(mapped: Trace) -> list[TracedConv]:
    return [
        conv
        for conv in mapped.convs
        if conv.spec.groups == 1
        and not conv.spec.transposed
        and not conv.spec.linear
        and len(legal_groups(conv.spec.in_channels, conv.spec.out_channels)) > 1
    ]


def chosen(mapped: Trace, seed: int, *, cut: float = 1.0) -> dict[str, Candidate]:
    """For each layer an entry of the menu that it has; a share of them grouped, others not."""
    rng = np.random.default_rng(seed)
    convs = eligible(mapped)
    free = freedom(mapped, convs)
    choices = {}
    for conv in convs:
        spec = conv.spec
        groups = int(rng.choice(legal_groups(spec.in_channels, spec.out_channels)[1:]))
        if rng.random() >= cut:
            others = [DENSE, *pair_shapes(spec)]
            choices[conv.name] = Candidate(others[rng.integers(len(others))], 0.1)
            continue
        wide = (groups < spec.in_channels, groups < spec.out_channels)
        settled = [not f and w for f, w in zip(free[conv.name], wide, strict=True)]
        permuted = settled if rng.random() < 0.5 else (False, False)
        choices[conv.name] = Candidate(Grouped(groups), 0.1, None, "energy", *permuted)
    return choices


def asked(choices: Mapping[str, Candidate]) -> set[str]:
    """The permutations that candidates have, as :attr:`Converted.permutations` names them."""
    return {
        f"{name}.{side}"
        for name, choice in choices.items()
        for side, wanted in (("order_in", choice.permute_in), ("order_out", choice.permute_out))
        if wanted
    }


def permuted_for_nothing(
    converted: Converted, choices: Mapping[str, Candidate]
) -> Iterator[tuple[str, bool]]:
    """Permutations that were asked for and have become free, and whether they are there."""
    for where in converted.placed:
        for side, channels in (("in", where.channels_in), ("out", where.channels_out)):
            name = f"{where.conv.name}.order_{side}"
            if name in asked(choices) - set(converted.permutations):
                yield name, channels != tuple(range(len(channels)))


def searches_of(net: nn.Module, mapped: Trace, images: Tensor, seed: int = 0) -> Searches:
    def batches() -> Iterator[Tensor]:
        yield from images.split(8)

    return Searches(net, mapped.convs, Sampling(batches, len(images), 500, seed), {})


def assert_as_chosen(
    mapped: Trace, choices: Mapping[str, Candidate], layers: Mapping[str, Settled]
) -> None:
    """Every layer but the dense ones, by priority, with its structure."""
    cut = {name: c.structure for name, c in choices.items() if c.structure != DENSE}
    assert {name: structure_of(settled) for name, settled in layers.items()} == cut
    assert all(isinstance(layers[n], Partition) == isinstance(cut[n], Grouped) for n in cut)
    assert list(layers) == [c.name for c in by_priority(mapped.convs) if c.name in cut]


def assert_sketched(net: nn.Module, mapped: Trace, choices: Mapping[str, Candidate]) -> int:
    """Permutations where they were asked for; returns how many of those have become free."""
    layers = sketch(mapped, choices)
    assert_as_chosen(mapped, choices, layers)
    converted = convert(net, mapped, layers)
    assert set(converted.permutations) <= asked(choices)
    free = dict(permuted_for_nothing(converted, choices))
    assert all(free.values()), free
    return len(free)


@pytest.mark.parametrize("seed", range(12))
def test_a_sketch_permutes_what_the_candidates_permute(seed: int) -> None:
    net = RandomNetwork(seed)
    mapped = trace(net, (X,))
    for cut in (1.0, 0.5):
        assert_sketched(net, mapped, chosen(mapped, seed, cut=cut))


class Residuals(nn.Module):
    """Convolutions between the two ends of one sum, as RepVGG's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.a, self.b = nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 24, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (x + self.a(x)).relu()
        return self.head((x + self.b(x)).relu().mean((2, 3)))


def test_one_order_for_both_ends_of_a_residual_layer() -> None:
    torch.manual_seed(0)
    net = Residuals().eval()
    mapped = trace(net, (X,))
    free = freedom(mapped, [found_conv(mapped, name) for name in "ab"])
    assert free == {"a": (True, False), "b": (False, False)}
    searches = searches_of(net, mapped, torch.randn(32, 3, 8, 8))
    weights = {"a": 1.0, "b": 1.0}
    plain = {n: Candidate(Grouped(4), 0.1, None, "energy") for n in "ab"}
    given = {n: Partition.identity(4, 24, 24) for n in "ab"}
    layers = settle(mapped, plain, weights, searches)
    for found in (sketch(mapped, plain), layers):
        assert not convert(net, mapped, found).permutations
    assert weighted(searches, layers, weights) < 0.98 * weighted(searches, given, weights)
    # The menu says what it costs where nothing is permuted.
    entries = menu(found_conv(mapped, "a"), searches("a")["a"], free["a"], round_to=1)
    four = {c.permute_out: c for c in entries if c.structure == Grouped(4)}
    assert four[False].loss == pytest.approx(searches("a")["a"].problem.loss(given["a"]))
    assert not four[False].permute_in
    assert four[True].loss < four[False].loss
    permuted = {"a": four[True]}
    for found in (sketch(mapped, permuted), settle(mapped, permuted, weights, searches)):
        assert convert(net, mapped, found).permutations == ("a.order_out",)


def found_conv(mapped: Trace, name: str) -> TracedConv:
    return next(conv for conv in mapped.convs if conv.name == name)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_sketches_of_real_networks(name: str) -> None:
    net = getattr(torchvision.models, name)(weights=None).eval()
    mapped = trace(net, (torch.randn(1, 3, 64, 64),))
    for seed in range(2):
        choices = chosen(mapped, seed)
        # Every order is claimed by its costliest layer, unless that is permuted.
        plain = {n: replace(c, permute_in=False, permute_out=False) for n, c in choices.items()}
        assert assert_sketched(net, mapped, plain) == 0
        assert assert_sketched(net, mapped, choices) < len(asked(choices)) / 2


def weighted(
    searches: Searches, layers: Mapping[str, Settled], weights: Mapping[str, float]
) -> float:
    cut = {name: settled for name, settled in layers.items() if isinstance(settled, Partition)}
    found = searches(cut)
    return sum(weights[name] * found[name].problem.loss(cut[name]) for name in cut)


@pytest.mark.parametrize("seed", range(8))
def test_settled_layers_lose_no_more_than_first_come_orders(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = RandomNetwork(seed)
    mapped = trace(net, (X,))
    searches = searches_of(net, mapped, torch.randn(16, 3, 8, 8))
    choices = chosen(mapped, seed, cut=0.8)
    rng = np.random.default_rng(seed)
    weights = {name: float(rng.random()) + 0.01 for name in choices}
    layers = settle(mapped, choices, weights, searches)
    assert_as_chosen(mapped, choices, layers)
    assert set(convert(net, mapped, layers).permutations) <= asked(choices), net.kinds
    assert settle(mapped, choices, weights, searches) == layers
    monkeypatch.setattr(
        sys.modules[settle.__module__],
        "align",
        lambda orders, layers, rounds: {layer.name: layer.partition for layer in layers},
    )
    first_come = settle(mapped, choices, weights, searches)
    assert weighted(searches, layers, weights) <= weighted(searches, first_come, weights) + 1e-12


def test_nothing_is_settled_where_nothing_is_cut() -> None:
    net = RandomNetwork(0)
    mapped = trace(net, (X,))
    searches = searches_of(net, mapped, torch.randn(8, 3, 8, 8))
    assert settle(mapped, {}, {}, searches) == {}
    convs = eligible(mapped)
    dense = {conv.name: Candidate(DENSE, 0.0) for conv in convs}
    assert settle(mapped, dense, {}, searches) == sketch(mapped, dense) == {}
    rank = {convs[0].name: Candidate(Pair(2, 1, 1, False), 0.1)}
    assert settle(mapped, rank, {}, searches) == {convs[0].name: Pair(2, 1, 1, False)}


@pytest.mark.parametrize("seed", range(6))
def test_a_plan_without_orders_is_completed(seed: int) -> None:
    net = RandomNetwork(seed)
    mapped, rng = trace(net, (X,)), np.random.default_rng(seed)
    searches = searches_of(net, mapped, torch.randn(16, 3, 8, 8))
    layers: dict[str, Settled] = {}
    for number, conv in enumerate(eligible(mapped)):
        spec = conv.spec
        groups = int(rng.choice(legal_groups(spec.in_channels, spec.out_channels)[1:]))
        sides = (tuple(rng.permutation(n).tolist()) for n in (spec.in_channels, spec.out_channels))
        layers[conv.name] = (
            Grouped(groups), Partition(groups, *sides), DENSE, Pair(2, 1, 1, False), Grouped(groups)
        )[number % 5]  # fmt: skip
    done = complete(mapped, layers, searches)
    assert done.keys() == {name for name, settled in layers.items() if settled != DENSE}
    for name, settled in done.items():
        wanted = layers[name]
        assert structure_of(settled) == structure_of(wanted)
        assert isinstance(settled, Partition) or isinstance(wanted, Pair)
        assert settled == wanted or isinstance(wanted, Grouped)
    # What a person asked for comes first and stays as it is; the others add no permutation.
    given = {name for name, settled in layers.items() if isinstance(settled, Partition)}
    permuted = convert(net, mapped, done).permutations
    assert {name.rpartition(".")[0] for name in permuted} <= given
    alone = {name: settled for name, settled in layers.items() if name in given}
    assert set(convert(net, mapped, alone).permutations) == set(permuted)
