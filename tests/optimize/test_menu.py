"""Menus: every legal structure, losses that are exact, orders as free as the network allows."""

import numpy as np
import pytest
import torch
from torch import nn
from traced import conv, found, traced

from groupconv.kernels.spec import legal_groups
from groupconv.optimize.menu import Candidate, by_priority, freedom, menu, tied
from groupconv.optimize.pair import pair_shapes
from groupconv.optimize.schur import Regression
from groupconv.optimize.search import Search
from groupconv.optimize.structure import DENSE, Grouped, Pair
from groupconv.optimize.trace import Trace, TracedConv


def search(layer: TracedConv, taps: int | None = None) -> Search:
    """Random correlated inputs and a random layer of its sizes."""
    spec = layer.spec
    taps = taps or spec.kernel_size[0] * spec.kernel_size[1]
    rng, d = np.random.default_rng(0), spec.in_channels * taps
    u = rng.normal(size=(6 * d, d)) @ rng.normal(size=(d, d))
    h = torch.from_numpy(u.T @ u) / len(u) + 1e-3 * torch.eye(d, dtype=torch.float64)
    w = torch.from_numpy(rng.normal(size=(spec.out_channels, d)))
    problem = Regression(
        torch.cat([h, h @ w.T], 1), float((w @ h * w).sum()), taps, spec.out_channels
    )
    return Search(problem, 0)


def layer(in_channels: int, out_channels: int, kernel: int = 3) -> TracedConv:
    made = traced(
        lambda n, x: n.b(n.c(n.a(x))),
        a=conv(4, in_channels), c=conv(in_channels, out_channels, kernel),
        b=conv(out_channels, 2),
    )  # fmt: skip
    return found(made, "c")


def grouped(candidates: list[Candidate]) -> list[Candidate]:
    return [c for c in candidates if isinstance(c.structure, Grouped) and c.structure != DENSE]


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("free", [(True, True), (True, False), (False, True), (False, False)])
def test_every_entry_with_its_exact_loss(free: tuple[bool, bool], kernel: int) -> None:
    one = layer(12, 8, kernel)
    known = search(one)
    entries = menu(one, known, free, round_to=1)
    assert entries[0] == Candidate(DENSE, 0.0)
    assert {c.structure for c in entries if isinstance(c.structure, Pair)} == {
        *pair_shapes(one.spec)
    }
    assert {c.structure.groups for c in grouped(entries)} == {2, 4}
    for entry in grouped(entries):
        partition = entry.partition
        assert entry.loss == pytest.approx(known.problem.loss(partition))
        assert partition.groups == entry.structure.groups
        # Where nothing absorbs an order, it is the given one or costs a permutation.
        if not free[0] and not entry.permute_in:
            assert partition.in_order == tuple(range(12))
        if not free[1] and not entry.permute_out:
            assert partition.out_order == tuple(range(8))
        assert not (free[0] and entry.permute_in)
        assert not (free[1] and entry.permute_out)
    best = {}
    for entry in grouped(entries):
        best.setdefault(entry.structure, []).append(entry)
    for plain, *permuted in best.values():
        assert not plain.permute_in
        assert not plain.permute_out
        assert len(permuted) <= 1
        assert all(other.loss <= plain.loss for other in permuted)
        # What is hopeless with few groups is not searched with more.
        if plain.structure == Grouped(2):
            assert len(permuted) == (free != (True, True))


def test_groups_of_one_channel_are_not_permuted() -> None:
    """Another numbering of the groups does it."""
    wide_in, wide_out, depthwise = layer(8, 2), layer(2, 8), layer(2, 2)
    for one, expected in ((wide_in, (True, False)), (wide_out, (False, True)), (depthwise, None)):
        entries = grouped(menu(one, search(one), (False, False), round_to=1))
        permuted = [(c.permute_in, c.permute_out) for c in entries if c.permute_in or c.permute_out]
        assert permuted == ([] if expected is None else [expected])


@pytest.mark.parametrize("round_to", [1, 2, 4])
def test_channels_per_group_are_rounded(round_to: int) -> None:
    one = layer(16, 16)
    for entry in menu(one, search(one), (True, True), round_to=round_to)[1:]:
        for spec in entry.structure.specs(one.spec):
            widths = (spec.in_channels // spec.groups, spec.out_channels // spec.groups)
            assert widths[0] == 1 or not any(width % round_to for width in widths)
    groups = {c.structure.groups for c in grouped(menu(one, search(one), (True, True), round_to=4))}
    assert groups == {2, 4, 16}
    assert set(legal_groups(16, 16)) > groups


def test_a_very_wide_layer_has_no_pairs() -> None:
    one = layer(8, 8)
    reduced = Search(search(one).problem.separable(), 0)
    entries = menu(one, reduced, (True, True), round_to=1)
    assert {c.structure for c in entries} == {DENSE, Grouped(2), Grouped(4), Grouped(8)}


def chain() -> Trace:
    return traced(
        lambda n, x: n.b(n.d(n.c(n.a(x).relu()))), a=conv(4, 8), c=conv(8, 8, 3), d=conv(8, 8),
        b=conv(8, 2),
    )  # fmt: skip


def test_costly_layers_choose_first() -> None:
    made = chain()
    assert [c.name for c in by_priority(made.convs)] == ["c", "d", "a", "b"]
    assert freedom(made, made.convs) == {
        "c": (True, True), "d": (False, True), "a": (False, False), "b": (False, False)
    }  # fmt: skip
    # Layers that can't be cut claim nothing.
    rest = [found(made, name) for name in "ad"]
    assert freedom(made, rest) == {"d": (True, True), "a": (False, True)}


def test_a_layer_with_both_ends_in_one_sum_is_tied() -> None:
    made = traced(
        lambda n, x: n.b(n.add(n.a(x))), a=conv(4, 8), b=conv(8, 2), add=Added(),
    )  # fmt: skip
    inner = found(made, "add.inner")
    assert tied(inner)
    assert not tied(found(made, "a"))
    assert freedom(made, [inner]) == {"add.inner": (True, False)}
    entries = grouped(menu(inner, search(inner), (True, False), round_to=1))
    given = tuple(range(8))
    for entry in entries:
        orders = (entry.partition.in_order, entry.partition.out_order)
        assert entry.permute_out or orders == (given, given)
        assert not entry.permute_in


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = conv(8, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def test_names_for_people() -> None:
    assert str(Candidate(Grouped(2), 0.1)) == "groups=2"
    assert str(Candidate(Grouped(2), 0.1, permute_out=True)) == "groups=2 permuted"
    assert str(Candidate(Pair(4, 1, 1, False), 0.1)) == "rank 4"
